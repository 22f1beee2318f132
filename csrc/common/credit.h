// Step weights, and the names of the credit rules: shared by host and device. Formulas: capo.reference.
#pragma once
#include <math.h>
#include <stdint.h>
#include <string.h>

#include "common/hd.h"

namespace capo {

enum class Vote : int { kMajority, kStrictMajority, kIntersection, kUnion, kAverage };
enum class Reward : int { kStep, kStepSuffix, kPrefix, kFlawed, kShare };
enum class Normalize : int { kGroupTokens, kGroupMean, kResponses, kResponsesMean, kLeaveOneOut, kGroupSteps };

struct CreditRule {
  Vote vote;
  double outcome_weight;
  double process_weight;
  Normalize normalize;
  double std_floor;
  double clamp;  // or infinity
  Reward reward;
};

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
  int num_threads;  // of the CPU
};

// Counts of one step's votes: n valid, c of them flagging; foreign: some number among them is no vote.
struct VoteCount {
  int64_t n, c;
  bool foreign;
};

// Eight votes at a time, one in each byte of a word: 1 is 0x01, -1 is 0xff.
CAPO_HD VoteCount count_votes(const int8_t* votes, int64_t count) {
  constexpr uint64_t kOnes = 0x0101010101010101u;
  uint64_t flagged_total = 0, abstained_total = 0, foreign = 0;
  for (int64_t k = 0; k < count; k += 8) {
    uint64_t word = 0;
    if (count - k >= 8)
      memcpy(&word, votes + k, 8);
    else
      memcpy(&word, votes + k, static_cast<size_t>(count - k));
    const uint64_t abstained = (word >> 7) & kOnes;
    const uint64_t flagged = word & kOnes & ~abstained;
    foreign |= word ^ (flagged | (abstained * 0xff));
    flagged_total += (flagged * kOnes) >> 56;  // the sum of the bytes
    abstained_total += (abstained * kOnes) >> 56;
  }
  return {count - static_cast<int64_t>(abstained_total), static_cast<int64_t>(flagged_total), foreign != 0};
}

// Weight of a step with n valid votes, c of them flagging.
CAPO_HD double step_weight(int64_t n, int64_t c, Vote vote) {
  if (n == 0) return 0.0;
  switch (vote) {
    case Vote::kMajority:
      return 2 * c >= n;
    case Vote::kStrictMajority:
      return 2 * c > n;
    case Vote::kIntersection:
      return c == n;
    case Vote::kUnion:
      return c >= 1;
    default:
      return static_cast<double>(c) / static_cast<double>(n);
  }
}

// The reward of a token outside all steps.
CAPO_HD double base_reward(const CreditRule& rule, double outcome, bool any_flagged) {
  const double c = rule.outcome_weight, p = rule.process_weight;
  switch (rule.reward) {
    case Reward::kPrefix:
      return outcome > 0.0 ? c : p;
    case Reward::kFlawed:
      return outcome > 0.0 ? (any_flagged ? c - p : c) : -c;
    default:
      return c * outcome;
  }
}

// Whether max - min is within the rounding of means among the numbers.
CAPO_HD bool constant_but_rounding(double low, double high) {
  const double a = fabs(low), b = fabs(high);
  return !(high > low) || high - low <= 1e-12 * (a > b ? a : b);
}

// Never below the floor.
CAPO_HD double inverse_std(double std, const CreditRule& rule) {
  return 1.0 / (std < rule.std_floor ? rule.std_floor : std);
}

}  // namespace capo
