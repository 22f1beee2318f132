// capo._native: the table of contents of this folder. Tensors arrive as addresses (uintptr_t); capo/native.py makes them.
#include <pybind11/pybind11.h>

namespace py = pybind11;

PYBIND11_MODULE(_native, m) { m.doc() = "C++ kernels of capo; called through capo.native"; }
