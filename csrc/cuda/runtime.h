// What Python asks of the CUDA runtime.
#pragma once

namespace capo::cuda {

const char* error_text(int error);

}  // namespace capo::cuda
