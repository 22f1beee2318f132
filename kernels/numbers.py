"""Functions of numbers that Triton has not, or not as accurately: in float32, for scalars and blocks alike."""

import triton
import triton.language as tl

LN2 = tl.constexpr(0.6931471805599453)


@triton.jit
def not_finite(x):
    """Whether x is NaN or infinite."""
    return x - x != 0.0


@triton.jit
def expm1(x):
    """exp(x) - 1 without cancellation."""
    series = 1.0 + x * (1 / 8)
    series = 1.0 + x * (1 / 7) * series
    series = 1.0 + x * (1 / 6) * series
    series = 1.0 + x * (1 / 5) * series
    series = 1.0 + x * (1 / 4) * series
    series = 1.0 + x * (1 / 3) * series
    series = 1.0 + x * (1 / 2) * series
    return tl.where(tl.abs(x) < 0.4, x * series, tl.exp(x) - 1.0)


@triton.jit
def log1p(x):
    """log(1 + x) for finite x >= 0, as a few digits of its size and the rest.

    The hardware's logarithm has an absolute error that a small x does not survive.
    """
    bits = (1.0 + x).to(tl.int32, bitcast=True)
    exponent = (bits - 0x3F3504F3) >> 23  # so that the mantissa lies between the roots of 1/2 and of 2
    mantissa = (bits - (exponent << 23)).to(tl.float32, bitcast=True)
    f = tl.where(exponent == 0, x, mantissa - 1.0)
    q = f / (2.0 + f)
    s = q * q
    log = q * (2.0 + s * (2 / 3 + s * (2 / 5 + s * (2 / 7 + s * (2 / 9)))))
    k = exponent.to(tl.float32)
    return k * 0.693359375, log - k * 2.12194440e-4
