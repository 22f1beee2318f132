// Weights of the tokens of a response, for kernels that have the advantages and for those that just made them.
#pragma once
#include "cuda/device.cuh"
#include "cuda/weights.h"

namespace capo::cuda {

// Of the tokens of a response: how many are not masked, and whether one of those has an advantage.
struct Seen {
  uint64_t count;
  bool any;
};

// In all lanes of a warp.
CAPO_DEVICE Seen seen_by_warp(Seen x) {
#pragma unroll
  for (int mask = device::kLanes / 2; mask > 0; mask /= 2) x.count += device::shuffle_xor(x.count, mask);
  return {x.count, device::ballot(x.any) != 0};
}

// By kThreads threads, of which this is the one at `place`; together(seen) gives what all of them saw.
template <int kThreads, typename Together>
CAPO_DEVICE void weigh_response(const TokenWeights& a, int64_t response, int place, const Together& together) {
  const int64_t begin = a.cu_seqlens[response], end = a.cu_seqlens[response + 1];
  const int64_t first = (begin > 0 ? begin : 0) + place, last = end < a.tokens ? end : a.tokens;
  const auto active = [&](int64_t token) { return a.mask == nullptr || a.mask[token]; };
  Seen seen = {0, false};
#pragma unroll 4
  for (int64_t token = first; token < last; token += kThreads)
    if (active(token)) {
      ++seen.count;
      seen.any |= a.advantages[token] != 0.f;
    }
  seen = together(seen);
  if (place == 0) device::add_to_count(a.active, seen.count);
  double weight = 1.0;
  if (a.rule.reduce == Reduce::kSequenceMean)
    weight /= static_cast<double>(seen.count) * static_cast<double>(a.responses);
  if (a.rule.reduce == Reduce::kConstant) weight /= static_cast<double>(a.rule.constant);
  const bool other_terms = has_other_terms(a.rule), one_ratio = a.rule.ratio != Ratio::kToken;
#pragma unroll 4
  for (int64_t token = first; token < last; token += kThreads)
    if (active(token) && (other_terms || (one_ratio ? seen.any : a.advantages[token] != 0.f)))
      a.weights[token] = weight;
}

}  // namespace capo::cuda
