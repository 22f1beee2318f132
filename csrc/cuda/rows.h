// Rows of logits on the GPU, in steps: read, then results, then gradients; for rows whose gradient has to wait for that
// of others, for rows that are few, and for capo.linear. Functions return a cudaError_t, 0 for none; nothing waits.
#pragma once
#include <cstddef>
#include <cstdint>

#include "common/policy_loss.h"
#include "common/rows.h"

namespace capo::cuda {

using Stream = void*;

struct Head {
  const void* logits;  // [rows, V]
  int64_t stride;      // elements from row to row
  Dtype dtype;
  int64_t rows, vocab;
  const int64_t* labels;  // [rows]
  bool partial;           // -1: not in this part of the vocabulary; else a label outside of it gives NaN
  float temperature;
  const float* temperatures;  // [rows], or null: `temperature` for all
};

// Which rows are live; null: all.
struct Live {
  const double* weights;  // [rows], 0 for the dead
  const bool* mask;       // [rows]
};

struct RowResults {
  double* stats;    // [rows, kRowStats], or null
  float* logprobs;  // [rows], or null, as is the next; 0 for the dead
  float* entropy;
};

// Bytes of `tiles` below.
size_t size_of_tiles(int64_t rows, int64_t vocab);

// Reads the live rows.
int read_rows(const Head& head, const Live& live, const RowResults& results, void* tiles, Stream stream);

// Log-probabilities of the labels and entropies; reads stats and temperatures only.
int row_logprobs(const Head& head, const double* stats, float* logprobs, float* entropy, Stream stream);

struct RowGrads {
  Head head;
  int64_t count;
  const int64_t* rows;  // [count]: row rows[i] of the logits gives row i of the gradient; null: i
  const double* stats;  // this and all below: by row of the logits
  const double* slopes;
  const double* entropy_slopes;  // or null: -entropy_coef * weight
  double entropy_coef;
  const double* weights;             // or null: all are live
  const unsigned long long* active;  // or null: by what all weights are divided
  void* grad;                        // [count, V]; may be the logits if rows[i] is i or i is not among the rows
  int64_t grad_stride;
};
int row_grads(const RowGrads& args, Stream stream);

struct LossTerms {
  TokenValues values;
  const float* logprobs;             // [rows]
  const float* entropy;              // [rows]
  const double* weights;             // [rows]
  bool all_live;                     // else those of weight 0 are not
  const unsigned long long* active;  // or null: by what all weights are divided
  const int64_t* cu_seqlens;         // [responses + 1]
  int64_t rows, responses;
  LossRule rule;
  float* loss;     // [rows] before weights
  float* kl;       // [rows]
  bool* clipped;   // [rows]
  double* slopes;  // [rows] d loss / d logp
};
int loss_terms(const LossTerms& args, Stream stream);

}  // namespace capo::cuda
