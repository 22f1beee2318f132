// Step weights, and the names of the credit rules: shared by host and device. Formulas: capo.reference.
#pragma once
#include <stdint.h>

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

// Weight of a step from its votes: n of them valid, c flagging.
CAPO_HD double step_weight(const int8_t* votes, int64_t count, Vote vote) {
  int64_t n = 0, c = 0;
  for (int64_t k = 0; k < count; ++k) {
    n += votes[k] >= 0;
    c += votes[k] > 0;
  }
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

}  // namespace capo
