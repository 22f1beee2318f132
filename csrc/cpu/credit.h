// credit on the CPU: B responses, M steps, K votes a step, N tokens.
#pragma once
#include <cstdint>

#include "common/credit.h"

namespace capo {

struct CreditArgs {
  const float* outcomes;      // [B]
  const int8_t* votes;        // [M, K]
  const int64_t* starts;      // [M]
  const int64_t* ends;        // [M]
  const int64_t* cu_steps;    // [B + 1]
  const int64_t* cu_seqlens;  // [B + 1]
  const int64_t* groups;      // [B]
  float* advantages;          // [N]
  int64_t responses, steps, votes_per_step, tokens;
  CreditRule rule;
  int num_threads;
};

// False if the input does not have the layout of a Credit.
bool credit(const CreditArgs& args);

}  // namespace capo
