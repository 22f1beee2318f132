// A row of logits: what is known of it once it was read, and what its gradient is made of; shared by host and device.
#pragma once
#include <math.h>
#include <stdint.h>

#include "common/hd.h"

namespace capo {

enum class Dtype : int { kFloat32 = 0, kBFloat16 = 1, kFloat16 = 2 };

CAPO_HD int64_t size_of(Dtype dtype) { return dtype == Dtype::kFloat32 ? 4 : 2; }

// What one pass over a row of logits z gives. Exponents are t = (z - top) * rate, where rate is log2(e) / temperature;
// top is the largest logit or one near it, which keeps the powers of two in range.
struct RowStats {
  float top;
  double sum;      // of 2^t; NaN if the row has NaN, +inf, or nothing but -inf
  double centred;  // of 2^t * t
  bool infinite;   // the row has -inf
};

constexpr int64_t kRowStats = 5;  // numbers in memory: those of RowStats; logit of the label, -inf if it is not here

struct Row {
  RowStats stats;
  float at_label;  // logit of the label
  float logp, entropy;
};

// d loss / d z of a row is 2^t * (alpha + beta * t), but at the label.
struct RowFactors {
  double alpha, beta;
  float label_grad;
};

constexpr double kLn2 = 0.693147180559945309;

// Rows of 16 bits are scaled in float32: their log-probabilities follow suit.
CAPO_HD double rate_of(float temperature, Dtype dtype) {
  const double rate = 1.0 / (kLn2 * temperature);
  return dtype == Dtype::kFloat32 ? rate : static_cast<float>(rate);
}

CAPO_HD Row row_of(const double* stats) {
  return {{static_cast<float>(stats[0]), stats[1], stats[2], stats[3] != 0.0}, static_cast<float>(stats[4]), 0.f, 0.f};
}

CAPO_HD void finish_row(Row& row, double rate) {
  const double log_sum = log2(row.stats.sum);
  const double at_label = (static_cast<double>(row.at_label) - row.stats.top) * rate;
  row.logp = static_cast<float>(kLn2 * (at_label - log_sum));
  row.entropy = static_cast<float>(kLn2 * (log_sum - row.stats.centred / row.stats.sum));
}

// With g = d loss / d logp and h = d loss / d entropy: the gradient of capo.reference.policy_loss_gradient.
CAPO_HD RowFactors row_factors(const Row& r, double g, double h, float temperature) {
  const double s = 1.0 / temperature, sum = r.stats.sum, mean = kLn2 * r.stats.centred / sum;
  const double p = exp(static_cast<double>(r.logp));
  const double centred_label = p > 0.0 ? r.logp + log(sum) - mean : 0.0;
  RowFactors how;
  how.alpha = s * (h * mean - g) / sum;
  how.beta = -s * h * kLn2 / sum;
  how.label_grad = static_cast<float>(s * (g * -expm1(static_cast<double>(r.logp)) - h * p * centred_label));
  return how;
}

}  // namespace capo
