// policy_loss on the GPU: N tokens, R rows of logits, V vocabulary, B responses; strides are in elements.
#pragma once
#include "common/credit.h"
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
  Head head;   // its labels are those of all tokens
  void* grad;  // [R, V], may be the logits; null: no gradient wanted
  int64_t grad_stride;
  int64_t tokens, responses;
  const int64_t* token_of;  // [R] token of each row, rising; loss in steps has none. Null: row i is that of token i
  TokenValues values;
  const bool* mask;           // [N] or null: all count
  const int64_t* cu_seqlens;  // [B + 1]
  const CreditArgs* credit;  // of the same cu_seqlens, that makes the advantages among the values; null: they are there
  LossRule rule;
  float* loss;           // [1], NaN if cu_seqlens or token_of do not fit
  float* logprobs;       // [N], zeros where there is a token_of, as is the next
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
