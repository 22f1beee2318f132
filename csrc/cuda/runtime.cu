#include "cuda/device.cuh"
#include "cuda/runtime.h"

namespace capo::cuda {

const char* error_text(int error) { return device::text_of(static_cast<cudaError_t>(error)); }

}  // namespace capo::cuda
