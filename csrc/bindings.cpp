// capo._native: the table of contents of this folder. Tensors arrive as addresses (uintptr_t); capo/native.py makes
// them.
#include <pybind11/pybind11.h>

#include "text/segment.h"

namespace py = pybind11;

namespace {

template <typename T>
T* pointer(uintptr_t address) {
  return reinterpret_cast<T*>(address);
}

void bind_text(py::module_& m) {
  m.def(
      "token_flags",
      [](uintptr_t data, uintptr_t offsets, int64_t size, uintptr_t special, uintptr_t eos, uintptr_t flags) {
        const capo::TokenTable table{size, pointer<const uint8_t>(data), pointer<const int64_t>(offsets), nullptr};
        capo::token_flags(table, pointer<const uint8_t>(special), pointer<const uint8_t>(eos), pointer<uint8_t>(flags));
      },
      py::arg("data"), py::arg("offsets"), py::arg("size"), py::arg("special"), py::arg("eos"), py::arg("flags"),
      py::call_guard<py::gil_scoped_release>());
  m.def(
      "segment",
      [](uintptr_t ids, bool ids_are_int64, uintptr_t cu_seqlens, int64_t num_responses, uintptr_t data,
         uintptr_t offsets, uintptr_t flags, int64_t size, int64_t newlines, uintptr_t span_starts, uintptr_t span_ends,
         uintptr_t cu_spans, int64_t max_steps, uintptr_t starts, uintptr_t ends, uintptr_t cu_steps, int num_threads) {
        const capo::TokenTable table{size, pointer<const uint8_t>(data), pointer<const int64_t>(offsets),
                                     pointer<const uint8_t>(flags)};
        const capo::Delimiters delimiters{newlines, pointer<const int64_t>(span_starts),
                                          pointer<const int64_t>(span_ends), pointer<const int64_t>(cu_spans)};
        const auto run = [&](const auto* typed_ids) {
          return capo::segment(typed_ids, pointer<const int64_t>(cu_seqlens), num_responses, table, delimiters,
                               max_steps, num_threads, pointer<int64_t>(starts), pointer<int64_t>(ends),
                               pointer<int64_t>(cu_steps));
        };
        return ids_are_int64 ? run(pointer<const int64_t>(ids)) : run(pointer<const int32_t>(ids));
      },
      py::arg("ids"), py::arg("ids_are_int64"), py::arg("cu_seqlens"), py::arg("num_responses"), py::arg("data"),
      py::arg("offsets"), py::arg("flags"), py::arg("size"), py::arg("newlines"), py::arg("span_starts"),
      py::arg("span_ends"), py::arg("cu_spans"), py::arg("max_steps"), py::arg("starts"), py::arg("ends"),
      py::arg("cu_steps"), py::arg("num_threads"), py::call_guard<py::gil_scoped_release>());
}

}  // namespace

PYBIND11_MODULE(_native, m) {
  m.doc() = "C++ kernels of capo; called through capo.native";
  bind_text(m);
}
