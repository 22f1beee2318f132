// credit on the GPU: one launch, also where the weights of the tokens in the loss are made with it.
#pragma once
#include "common/credit.h"
#include "cuda/weights.h"

namespace capo::cuda {

// A cudaError_t, 0 for none. Advantages of a group that contradicts the layout of a Credit are NaN.
int credit(const CreditArgs& args, void* stream);

// The same, and the weights of the tokens; of both, advantages and cu_seqlens are the same.
int credit_and_weights(const CreditArgs& args, const TokenWeights& weights, void* stream);

}  // namespace capo::cuda
