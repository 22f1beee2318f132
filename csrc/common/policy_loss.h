// The loss of one token and its derivatives: the formulas of capo.reference, shared by host and device.
#pragma once
#include <math.h>
#include <stdint.h>

#include "common/hd.h"

namespace capo {

enum class Ratio : int { kToken, kSequence, kSequenceToken };
enum class Reduce : int { kSequenceMean, kTokenMean, kConstant };
enum class Kl : int { kNone, kK1, kK2, kK3 };
enum class Objective : int { kClip, kCispo };

// LossRule of capo/losses.py; bounds instead of widths, infinity for "off".
struct LossRule {
  float ratio_low;   // 1 - clip_low
  float ratio_high;  // 1 + clip_high
  float clip_dual;   // or infinity
  Ratio ratio;
  Reduce reduce;
  float constant;
  float kl_coef;
  Kl kl;  // kNone if kl_coef is 0
  float entropy_coef;
  float temperature;
  Objective objective;
  float importance_cap;  // or a negative number
};

// What the loss of a token is made of besides its logits; [N], those marked may be null.
struct TokenValues {
  const float* advantages;
  const float* old_logprobs;      // or null: on-policy
  const float* ref_logprobs;      // or null
  const float* rollout_logprobs;  // or null
};

constexpr float kLogRatioLimit = 20.f;

struct TokenInput {
  float logp;
  float entropy;
  float log_ratio;  // logp - old_logp, or its mean over the response
  float mismatch;   // old_logp - rollout_logp
  float advantage;
  float ref_logp;
};

struct TokenTerms {
  float loss;
  float through_ratio;  // d loss / d log_ratio
  float through_logp;   // d loss / d logp besides that
  float kl;
  bool clipped;
};

CAPO_HD float limited(float x) {
  return x > kLogRatioLimit ? kLogRatioLimit : (x < -kLogRatioLimit ? -kLogRatioLimit : x);
}

CAPO_HD TokenTerms token_terms(const TokenInput& t, const LossRule& rule) {
  TokenTerms out = {0.f, 0.f, 0.f, 0.f, false};
  const float ratio = expf(limited(t.log_ratio));
  const float bounded = ratio < rule.ratio_low ? rule.ratio_low : (ratio > rule.ratio_high ? rule.ratio_high : ratio);
  if (rule.objective == Objective::kCispo) {
    out.clipped = bounded != ratio;
    out.loss = -bounded * t.advantage * t.logp;
    out.through_logp = -bounded * t.advantage;
  } else {
    const bool clipped = bounded * t.advantage < ratio * t.advantage;
    const bool dual = t.advantage < 0.f && ratio > rule.clip_dual;
    out.clipped = clipped || dual;
    out.loss = -(dual ? rule.clip_dual : clipped ? bounded : ratio) * t.advantage;
    // A label of probability 0 has no gradient through a ratio of its own.
    const bool impossible = t.logp == -INFINITY && rule.ratio != Ratio::kSequence;
    const bool held = out.clipped || fabsf(t.log_ratio) > kLogRatioLimit || impossible;
    out.through_ratio = held ? 0.f : -ratio * t.advantage;
  }
  if (rule.importance_cap >= 0.f) {
    const float weight = fminf(expf(limited(t.mismatch)), rule.importance_cap);
    out.loss *= weight;
    out.through_ratio *= weight;
    out.through_logp *= weight;
  }
  if (rule.kl != Kl::kNone) {
    const float d = t.logp - t.ref_logp;
    float slope;
    if (rule.kl == Kl::kK1) {
      out.kl = d;
      slope = 1.f;
    } else if (rule.kl == Kl::kK2) {
      out.kl = 0.5f * d * d;
      slope = d;
    } else {
      const float held = limited(d);
      const float e = expm1f(-held);
      out.kl = e + held;
      slope = fabsf(d) > kLogRatioLimit ? 0.f : -e;
    }
    out.loss += rule.kl_coef * out.kl;
    out.through_logp += rule.kl_coef * slope;
  }
  out.loss -= rule.entropy_coef != 0.f ? rule.entropy_coef * t.entropy : 0.f;
  return out;
}

// Whether a token's loss may have a gradient though its advantage is 0.
CAPO_HD bool has_other_terms(const LossRule& rule) { return rule.kl != Kl::kNone || rule.entropy_coef != 0.f; }

// logp - old_logp; on-policy 0, but NaN where logp is.
CAPO_HD float own_log_ratio(const TokenValues& values, int64_t row, float logp) {
  if (values.old_logprobs == nullptr) return 0.f + (isnan(logp) ? logp : 0.f);
  return logp - values.old_logprobs[row];
}

CAPO_HD TokenInput token_input(const TokenValues& values, int64_t row, float logp, float entropy, float log_ratio) {
  TokenInput t;
  t.logp = logp;
  t.entropy = entropy;
  t.log_ratio = log_ratio;
  const float old = values.old_logprobs == nullptr ? t.logp : values.old_logprobs[row];
  t.mismatch = values.rollout_logprobs == nullptr ? 0.f : old - values.rollout_logprobs[row];
  t.advantage = values.advantages[row];
  t.ref_logp = values.ref_logprobs == nullptr ? 0.f : values.ref_logprobs[row];
  return t;
}

}  // namespace capo
