// The weight of each token in the loss.
#pragma once
#include "common/policy_loss.h"

namespace capo::cuda {

struct TokenWeights {
  const float* advantages;    // [N]
  const bool* mask;           // [N] or null: all count
  const int64_t* cu_seqlens;  // [B + 1]
  int64_t tokens, responses;
  LossRule rule;
  unsigned long long* active;  // [1] to which the number of unmasked tokens is added
  double* weights;             // [N] zeros, which the dead keep; to be divided by `active` for token means
};

}  // namespace capo::cuda
