"""Triton's interpreter for CPU tensors, with four of its faults put right; import this before the kernels.

It cuts float32 off to bfloat16 where every GPU rounds to the nearest; it multiplies matrices of bfloat16 as if their bits were
integers; up to Triton 3.6 it does not know that NumPy 2.4
refuses int() of an array with one element; and it prepares the language anew for every call of a function in a kernel, which
takes longer than the call.
"""

import os
from types import SimpleNamespace

import numpy as np

os.environ["TRITON_INTERPRET"] = "1"

import triton.language as tl
from triton.runtime import interpreter

_patch_lang_tensor, _convert_float = interpreter._patch_lang_tensor, interpreter._convert_float
_create_dot = interpreter.InterpreterBuilder.create_dot


def _patch(tensor, *scope):  # Triton 3.4 has no scope
    _patch_lang_tensor(tensor, *scope)
    set_attr = scope[0].set_attr if scope else setattr
    set_attr(tensor, "__index__", lambda self: self.handle.data.item())


def _convert(values, source, target, rounding):
    if (source, target) == (tl.bfloat16, tl.float32):
        return (values.view(np.uint16).astype(np.uint32) << 16).reshape(values.shape)
    if (source, target) == (tl.float32, tl.bfloat16):
        bits = values.view(np.uint32)
        nearest = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
        return np.where(np.isnan(values), 0x7FC0, nearest).astype(np.uint16)
    return _convert_float(values, source, target, rounding)


def _dot(self, a, b, d, *options):
    a, b = (
        interpreter.TensorHandle(_convert(x.data, tl.bfloat16, tl.float32, None).view(np.float32), tl.float32)
        if x.dtype == tl.bfloat16
        else x
        for x in (a, b)
    )
    return _create_dot(self, a, b, d, *options)


interpreter._patch_lang_tensor, interpreter._convert_float = _patch, _convert
interpreter.InterpreterBuilder.create_dot = _dot
# What a kernel and all functions in it refer to, prepared once when the kernel starts.
_EVERYTHING = SimpleNamespace(__globals__={"tl": tl, "core": tl.core})
_patch_lang = interpreter._patch_lang
interpreter._patch_lang = lambda kernel: _patch_lang(_EVERYTHING)
interpreter.InterpretedFunction.__call__ = lambda self, *args, **options: self.rewrite()(*args, **options)
