// policy_loss and logprobs on the CPU. N rows, V vocabulary, B responses; strides are in elements.
#pragma once
#include <cstdint>

#include "common/policy_loss.h"
#include "cpu/rows.h"

namespace capo {

struct PolicyLossArgs {
  const void* logits;  // [N, V]
  int64_t logits_stride;
  void* grad;  // [N, V], may be the logits; null: no gradient wanted
  int64_t grad_stride;
  bool grad_is_zero;  // rows without a gradient need no writing
  Dtype dtype;        // of both
  int64_t rows, vocab, responses;
  const int64_t* labels;          // [N]
  const float* advantages;        // [N]
  const float* old_logprobs;      // [N] or null: on-policy
  const float* ref_logprobs;      // [N] or null
  const float* rollout_logprobs;  // [N] or null
  const bool* mask;               // [N] or null: all count
  const int64_t* cu_seqlens;      // [B + 1]
  LossRule rule;
  float* loss;           // [1]
  float* logprobs;       // [N]
  float* entropy;        // [N]
  float* clip_fraction;  // [1]
  float* kl;             // [1]
  int num_threads;
};

// False if cu_seqlens or a label of an unmasked row do not fit; then nothing was written.
bool policy_loss(const PolicyLossArgs& args);

struct LogprobsArgs {
  const void* logits;
  int64_t logits_stride;
  Dtype dtype;
  int64_t rows, vocab;
  const int64_t* labels;
  const bool* mask;
  float temperature;
  float* logprobs;
  float* entropy;
  int num_threads;
};

bool logprobs(const LogprobsArgs& args);

}  // namespace capo
