#include "cpu/policy_loss.h"

#include <atomic>
#include <cmath>
#include <cstddef>
#include <limits>
#include <vector>

#include "common/checks.h"
#include "common/parallel.h"

namespace capo {
namespace {

const void* row_at(const void* base, int64_t row, int64_t stride, Dtype dtype) {
  return static_cast<const std::byte*>(base) + row * stride * size_of(dtype);
}
void* row_at(void* base, int64_t row, int64_t stride, Dtype dtype) {
  return static_cast<std::byte*>(base) + row * stride * size_of(dtype);
}

bool labels_fit(const int64_t* labels, const bool* mask, int64_t rows, int64_t vocab) {
  for (int64_t i = 0; i < rows; ++i)
    if ((mask == nullptr || mask[i]) && (labels[i] < 0 || labels[i] >= vocab)) return false;
  return true;
}

constexpr double kLn2 = 0.693147180559945309;

// What is known of a row once its logits were read.
struct Row {
  RowStats stats;
  float logp, entropy;
};

// Rows of 16 bits are scaled in float32: their log-probabilities follow suit.
double rate_of(float temperature, Dtype dtype) {
  const double rate = 1.0 / (kLn2 * temperature);
  return dtype == Dtype::kFloat32 ? rate : static_cast<float>(rate);
}

Row read_row(const RowKernels& kernels, const void* row, Dtype dtype, int64_t vocab, int64_t label, double rate,
             bool infinite) {
  const int type = static_cast<int>(dtype);
  Row result;
  result.stats = kernels.stats[type](row, vocab, rate, label, infinite);
  const double log_sum = std::log2(result.stats.sum);
  const double at_label = (static_cast<double>(kernels.load[type](row, label)) - result.stats.top) * rate;
  result.logp = static_cast<float>(kLn2 * (at_label - log_sum));
  result.entropy = static_cast<float>(kLn2 * (log_sum - result.stats.centred / result.stats.sum));
  return result;
}

class Pass {
 public:
  explicit Pass(const PolicyLossArgs& a)
      : args(a),
        kernels(row_kernels()),
        type(static_cast<int>(a.dtype)),
        rate(rate_of(a.rule.temperature, a.dtype)),
        live(a.rows),
        response(a.rows),
        counts(a.responses),
        loss(a.rows),
        kl(a.rows),
        clipped(a.rows),
        stream(a.grad != a.logits && a.rows * a.vocab * size_of(a.dtype) > kCache) {}

  void run() {
    find_live_rows();
    if (args.rule.ratio == Ratio::kToken)
      token_ratio();
    else
      sequence_ratio();
    reduce();
  }

 private:
  // A gradient larger than this will not be found in the cache by whoever reads it.
  static constexpr int64_t kCache = int64_t{16} << 20;

  const PolicyLossArgs& args;
  const RowKernels& kernels;
  const int type;
  const double rate;
  std::atomic<bool> infinite{false};  // whether rows with -inf were seen: others are likely to have some too
  std::vector<char> live;
  std::vector<int64_t> response;
  std::vector<int64_t> counts;  // unmasked tokens of each response
  std::vector<float> loss, kl;  // of each token, before weights
  std::vector<char> clipped;
  int64_t num_active = 0;
  const bool stream;

  bool active(int64_t row) const { return args.mask == nullptr || args.mask[row]; }

  void find_live_rows() {
    const LossRule& rule = args.rule;
    const bool other_terms = rule.kl != Kl::kNone || rule.entropy_coef != 0.f;
    for (int64_t i = 0; i < args.responses; ++i) {
      const int64_t first = args.cu_seqlens[i], last = args.cu_seqlens[i + 1];
      bool any = false;
      for (int64_t row = first; row < last; ++row) {
        response[row] = i;
        if (!active(row)) continue;
        ++counts[i];
        live[row] = other_terms || args.advantages[row] != 0.f;
        any |= live[row];
      }
      num_active += counts[i];
      if (rule.ratio != Ratio::kToken && any)
        for (int64_t row = first; row < last; ++row) live[row] = active(row);
    }
  }

  // Weight of a token's loss in the total.
  double weight(int64_t row) const {
    switch (args.rule.reduce) {
      case Reduce::kSequenceMean:
        return 1.0 / (static_cast<double>(counts[response[row]]) * static_cast<double>(args.responses));
      case Reduce::kTokenMean:
        return 1.0 / static_cast<double>(num_active);
      default:
        return 1.0 / static_cast<double>(args.rule.constant);
    }
  }

  const void* logits(int64_t row) const { return row_at(args.logits, row, args.logits_stride, args.dtype); }
  void* grad(int64_t row) const { return row_at(args.grad, row, args.grad_stride, args.dtype); }

  void fill_zero(int64_t row) {
    if (!args.grad_is_zero) kernels.fill[type](grad(row), args.vocab, 0.f, stream);
  }

  void clear(int64_t row) {
    args.logprobs[row] = args.entropy[row] = 0.f;
    if (args.grad != nullptr) fill_zero(row);
  }

  Row read(int64_t row) {
    const Row result = read_row(kernels, logits(row), args.dtype, args.vocab, args.labels[row], rate,
                                infinite.load(std::memory_order_relaxed));
    if (result.stats.infinite) infinite.store(true, std::memory_order_relaxed);
    args.logprobs[row] = result.logp;
    args.entropy[row] = result.entropy;
    return result;
  }

  float log_ratio(int64_t row, float logp) const {
    if (args.old_logprobs == nullptr) return 0.f + (std::isnan(logp) ? logp : 0.f);
    return logp - args.old_logprobs[row];
  }

  TokenTerms terms(int64_t row, float logp, float entropy, float ratio) {
    TokenInput t;
    t.logp = logp;
    t.entropy = entropy;
    t.log_ratio = ratio;
    const float old = args.old_logprobs == nullptr ? logp : args.old_logprobs[row];
    t.mismatch = args.rollout_logprobs == nullptr ? 0.f : old - args.rollout_logprobs[row];
    t.advantage = args.advantages[row];
    t.ref_logp = args.ref_logprobs == nullptr ? 0.f : args.ref_logprobs[row];
    const TokenTerms result = token_terms(t, args.rule);
    loss[row] = result.loss;
    kl[row] = result.kl;
    clipped[row] = result.clipped;
    return result;
  }

  // g: d loss / d logp of the row. The derivative is that of capo.reference.policy_loss_gradient.
  void write_grad(int64_t row, const Row& r, double g) {
    const double s = 1.0 / args.rule.temperature, sum = r.stats.sum, mean = kLn2 * r.stats.centred / sum;
    const double h = -static_cast<double>(args.rule.entropy_coef) * weight(row);
    if (g == 0.0 && h == 0.0) {
      fill_zero(row);
      return;
    }
    const double p = std::exp(static_cast<double>(r.logp));
    const double centred_label = p > 0.0 ? r.logp + std::log(sum) - mean : 0.0;
    RowGrad how;
    how.rate = rate;
    how.top = r.stats.top;
    how.infinite = r.stats.infinite;
    how.alpha = s * (h * mean - g) / sum;
    how.beta = -s * h * kLn2 / sum;
    how.label = args.labels[row];
    how.label_grad = static_cast<float>(s * (g * -std::expm1(static_cast<double>(r.logp)) - h * p * centred_label));
    how.stream = stream;
    if (!std::isfinite(how.alpha) || !std::isfinite(how.beta) || !std::isfinite(how.label_grad)) {
      kernels.fill[type](grad(row), args.vocab, std::numeric_limits<float>::quiet_NaN(), stream);
      return;
    }
    kernels.grad[type](logits(row), grad(row), args.vocab, how);
  }

  int64_t grain() const { return std::clamp<int64_t>(args.rows / (8 * std::max(args.num_threads, 1)), 1, 8); }

  // Every row is finished while it is in the cache: one read of the logits, one write of the gradient.
  void token_ratio() {
    parallel_for(args.rows, grain(), args.num_threads, [&](int64_t first, int64_t last) {
      for (int64_t row = first; row < last; ++row) {
        if (!live[row]) {
          clear(row);
          continue;
        }
        const Row r = read(row);
        const TokenTerms t = terms(row, r.logp, r.entropy, log_ratio(row, r.logp));
        if (args.grad == nullptr) continue;
        write_grad(row, r, (static_cast<double>(t.through_ratio) + t.through_logp) * weight(row));
      }
    });
  }

  // The ratio needs the log-probabilities of the whole response: all rows are read, then read again for the gradient.
  void sequence_ratio() {
    std::vector<Row> rows(args.rows);
    parallel_for(args.rows, grain(), args.num_threads, [&](int64_t first, int64_t last) {
      for (int64_t row = first; row < last; ++row)
        if (live[row]) rows[row] = read(row);
    });
    std::vector<double> g(args.rows);
    for (int64_t i = 0; i < args.responses; ++i) {
      const int64_t first = args.cu_seqlens[i], last = args.cu_seqlens[i + 1];
      double total = 0.0;
      for (int64_t row = first; row < last; ++row)
        if (live[row]) total += log_ratio(row, rows[row].logp);
      const float mean = static_cast<float>(total / static_cast<double>(counts[i]));
      double through_ratio = 0.0;
      for (int64_t row = first; row < last; ++row) {
        if (!live[row]) continue;
        const TokenTerms t = terms(row, rows[row].logp, rows[row].entropy, mean);
        g[row] = t.through_logp * weight(row);
        if (args.rule.ratio == Ratio::kSequenceToken)
          g[row] += t.through_ratio * weight(row);
        else
          through_ratio += t.through_ratio * weight(row);
      }
      if (args.rule.ratio == Ratio::kSequence)
        for (int64_t row = first; row < last; ++row)
          if (live[row] && rows[row].logp != -std::numeric_limits<float>::infinity())
            g[row] += through_ratio / static_cast<double>(counts[i]);
    }
    parallel_for(args.rows, grain(), args.num_threads, [&](int64_t first, int64_t last) {
      for (int64_t row = first; row < last; ++row) {
        if (!live[row])
          clear(row);
        else if (args.grad != nullptr)
          write_grad(row, rows[row], g[row]);
      }
    });
  }

  void reduce() {
    double total = 0.0, total_kl = 0.0;
    int64_t num_clipped = 0;
    for (int64_t i = 0; i < args.responses; ++i) {
      double sum = 0.0;
      int64_t first = -1;
      for (int64_t row = args.cu_seqlens[i]; row < args.cu_seqlens[i + 1]; ++row) {
        if (!live[row]) continue;
        first = row;
        sum += loss[row];
        total_kl += kl[row];
        num_clipped += clipped[row];
      }
      if (first >= 0) total += sum * weight(first);
    }
    const double active_or_one = num_active > 0 ? static_cast<double>(num_active) : 1.0;
    *args.loss = static_cast<float>(total);
    *args.kl = static_cast<float>(total_kl / active_or_one);
    *args.clip_fraction = static_cast<float>(static_cast<double>(num_clipped) / active_or_one);
  }
};

}  // namespace

bool policy_loss(const PolicyLossArgs& args) {
  if (!cumulative(args.cu_seqlens, args.responses, args.rows)) return false;
  if (!labels_fit(args.labels, args.mask, args.rows, args.vocab)) return false;
  Pass(args).run();
  return true;
}

bool logprobs(const LogprobsArgs& args) {
  if (!labels_fit(args.labels, args.mask, args.rows, args.vocab)) return false;
  const RowKernels& kernels = row_kernels();
  parallel_for(args.rows, 8, args.num_threads, [&](int64_t first, int64_t last) {
    Row result{};
    for (int64_t row = first; row < last; ++row) {
      const bool infinite = result.stats.infinite;
      result = {};
      if (args.mask == nullptr || args.mask[row])
        result = read_row(kernels, row_at(args.logits, row, args.logits_stride, args.dtype), args.dtype, args.vocab,
                          args.labels[row], rate_of(args.temperature, args.dtype), infinite);
      args.logprobs[row] = result.logp;
      args.entropy[row] = result.entropy;
    }
  });
  return true;
}

}  // namespace capo
