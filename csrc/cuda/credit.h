// credit on the GPU: one launch.
#pragma once
#include "common/credit.h"

namespace capo::cuda {

// A cudaError_t, 0 for none. Advantages of a group that contradicts the layout of a Credit are NaN.
int credit(const CreditArgs& args, void* stream);

}  // namespace capo::cuda
