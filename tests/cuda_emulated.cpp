// The module of the CUDA kernels for the CPU: the functions of csrc/cuda/bindings.cpp and the device that is played.
#include <pybind11/stl.h>

#include "bindings.h"
#include "cuda_emulator.h"

PYBIND11_MODULE(cuda_emulated, m) {
  m.def("set_device", [](bool clusters, int multiprocessors, int64_t most_memory, int64_t target_memory) {
    auto& device = capo::device::emulated;
    device.clusters = clusters;
    device.multiprocessors = multiprocessors;
    device.most_memory = most_memory;
    device.target_memory = target_memory;
  });
  // Rows of logits and of gradients, [(begin, end)], which alone may be touched until the next call; gives how often
  // another place was since the last.
  m.def("watch", [](std::vector<std::pair<uintptr_t, uintptr_t>> rows) {
    const int64_t outside = capo::device::rows.outside;
    capo::device::rows = {std::move(rows), 0};
    return outside;
  });
  m.def("elements", [] { return capo::device::elements; });
  m.def("launches", [] { return capo::device::emulated.launches; });
  m.attr("architectures") = "emulated";
  capo::bind_cuda(m);
}
