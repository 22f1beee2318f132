#include "cuda/runtime.h"

#include "cuda/device.cuh"

namespace capo::cuda {

const char* error_text(int error) { return device::text_of(static_cast<cudaError_t>(error)); }

}  // namespace capo::cuda
