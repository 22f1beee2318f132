// policy_loss and logprobs on the CPU. N tokens, R rows of logits (N of logprobs), V vocabulary, B responses; strides
// are in elements.
#pragma once
#include <cstdint>

#include "common/policy_loss.h"
#include "cpu/rows.h"

namespace capo {

struct PolicyLossArgs {
  const void* logits;  // [R, V]
  int64_t logits_stride;
  void* grad;  // [R, V], may be the logits; null: no gradient wanted
  int64_t grad_stride;
  bool grad_is_zero;  // rows without a gradient need no writing
  Dtype dtype;        // of both
  int64_t rows, vocab, tokens, responses;
  const int64_t* token_of;  // [R] token of each row, rising, with a ratio per token; null: row i is that of token i
  const int64_t* labels;    // [N]
  TokenValues values;
  const bool* mask;           // [N] or null: all count
  const int64_t* cu_seqlens;  // [B + 1]
  LossRule rule;
  float* loss;           // [1]
  float* logprobs;       // [N]
  float* entropy;        // [N]
  float* clip_fraction;  // [1]
  float* kl;             // [1]
  int num_threads;
};

// False if cu_seqlens, token_of or a label of an unmasked token do not fit; then nothing was written.
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

// The same in parts, for logits that come in chunks of rows or are split over the vocabulary. Every row that is given
// is live and has its weight.

struct HeadRows {
  const void* logits;  // [rows, V]
  int64_t stride;
  Dtype dtype;
  int64_t vocab;
  const int64_t* labels;  // [rows], -1: not in this part of the vocabulary
  float temperature;
  const float* temperatures;  // [rows], or null: `temperature` for all
  int num_threads;

  float temperature_of(int64_t row) const { return temperatures == nullptr ? temperature : temperatures[row]; }
  double rate(int64_t row) const;
};

// stats [rows, kRowStats] of the logits.
void row_stats(const HeadRows& args, int64_t rows, double* stats);

// Log-probabilities of the labels and entropies [rows]; reads stats and temperatures only.
void row_logprobs(const HeadRows& args, int64_t rows, const double* stats, float* logprobs, float* entropy);

// The gradient of row rows[i] of the logits into row i of grad [count, V], which may be the logits as long as rows[i]
// is i or i is not among the rows. All else is indexed by the row of the logits.
void row_grads(const HeadRows& args, int64_t count, const int64_t* rows, const double* stats, const double* slopes,
               const double* entropy_slopes, void* grad);

struct LossTermsArgs {
  TokenValues values;
  const float* logprobs;      // [N]
  const float* entropy;       // [N]
  const double* weights;      // [N] of each token in the loss
  const int64_t* cu_seqlens;  // [B + 1]
  int64_t responses;
  LossRule rule;
  float* loss;     // [N] before weights
  float* kl;       // [N]
  bool* clipped;   // [N]
  double* slopes;  // [N] d loss / d logp
};

void loss_terms(const LossTermsArgs& args);

}  // namespace capo
