// policy_loss on the GPU: N rows, V vocabulary, B responses; strides are in elements.
#pragma once
#include "cuda/rows.h"

namespace capo::cuda {

// How the rows are gone through where each has a ratio of its own; the bits are the same.
enum class Form : int {
  kChosen,     // by what the device can do
  kOnChip,     // a cluster of blocks has a row in its shared memory: one read, one write
  kTwoPasses,  // a block reads a row twice, the second time from its end, where the cache still has it
  kInSteps,    // as rows.h has it; a row is divided among blocks
};

struct PolicyLoss {
  Head head;
  void* grad;  // [N, V], may be the logits; null: no gradient wanted
  int64_t grad_stride;
  int64_t responses;
  TokenValues values;
  const bool* mask;           // [N] or null: all count
  const int64_t* cu_seqlens;  // [B + 1]
  LossRule rule;
  float* loss;           // [1], NaN if cu_seqlens do not fit
  float* logprobs;       // [N]
  float* entropy;        // [N]
  float* clip_fraction;  // [1]
  float* kl;             // [1]
  Form form;
};

// The form that runs, and bytes of workspace for it.
Form form_of(const PolicyLoss& args);
size_t workspace_of(const PolicyLoss& args, Form form);

int policy_loss(const PolicyLoss& args, Form form, void* workspace, Stream stream);

}  // namespace capo::cuda
