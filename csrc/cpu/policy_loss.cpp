#include "cpu/policy_loss.h"

#include <atomic>
#include <cmath>
#include <cstddef>
#include <limits>
#include <memory>
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

// Whether places [count] are within [0, size) and each is behind the one before.
bool rising(const int64_t* places, int64_t count, int64_t size) {
  for (int64_t i = 0; i < count; ++i)
    if (places[i] <= (i == 0 ? -1 : places[i - 1]) || places[i] >= size) return false;
  return true;
}

Row read_row(const RowKernels& kernels, const void* row, Dtype dtype, int64_t vocab, int64_t label, double rate,
             bool infinite) {
  const int type = static_cast<int>(dtype);
  Row result{};
  result.stats = kernels.stats[type](row, vocab, rate, label, infinite);
  result.at_label = kernels.load[type](row, label);
  finish_row(result, rate);
  return result;
}

RowGrad row_grad(const Row& r, double g, double h, float temperature, double rate, int64_t label, bool stream) {
  const RowFactors factors = row_factors(r, g, h, temperature);
  return {rate, r.stats.top, factors.alpha, factors.beta, label, factors.label_grad, r.stats.infinite, stream};
}

void write_row(const RowKernels& kernels, int type, const void* row, void* grad, int64_t vocab, const RowGrad& how) {
  if (std::isfinite(how.alpha) && std::isfinite(how.beta) && std::isfinite(how.label_grad))
    kernels.grad[type](row, grad, vocab, how);
  else
    kernels.fill[type](grad, vocab, std::numeric_limits<float>::quiet_NaN(), how.stream);
}

// The loss of each token and what it is made of.
struct Tokens {
  const LossRule& rule;
  const TokenValues& values;
  const float* logprobs;
  const float* entropy;
  float* loss;  // before weights, as is kl
  float* kl;
  bool* clipped;

  float log_ratio(int64_t row) const { return own_log_ratio(values, row, logprobs[row]); }

  TokenTerms terms(int64_t row, float ratio) const {
    const TokenTerms result = token_terms(token_input(values, row, logprobs[row], entropy[row], ratio), rule);
    loss[row] = result.loss;
    kl[row] = result.kl;
    clipped[row] = result.clipped;
    return result;
  }

  double slope(int64_t row, double weight) const {
    const TokenTerms t = terms(row, log_ratio(row));
    return (static_cast<double>(t.through_ratio) + t.through_logp) * weight;
  }

  // Slopes g of the `count` live tokens of a response, whose ratio is that of all of them.
  template <typename Live, typename Weight>
  void sequence_slopes(int64_t first, int64_t last, int64_t count, const Live& live, const Weight& weight,
                       double* g) const {
    double total = 0.0;
    for (int64_t row = first; row < last; ++row)
      if (live(row)) total += log_ratio(row);
    const float mean = static_cast<float>(total / static_cast<double>(count));
    double through_ratio = 0.0;
    for (int64_t row = first; row < last; ++row) {
      if (!live(row)) continue;
      const TokenTerms t = terms(row, mean);
      g[row] = t.through_logp * weight(row);
      if (rule.ratio == Ratio::kSequenceToken)
        g[row] += t.through_ratio * weight(row);
      else
        through_ratio += t.through_ratio * weight(row);
    }
    if (rule.ratio == Ratio::kSequence)
      for (int64_t row = first; row < last; ++row)
        if (live(row) && logprobs[row] != -std::numeric_limits<float>::infinity())
          g[row] += through_ratio / static_cast<double>(count);
  }
};

class Pass {
 public:
  explicit Pass(const PolicyLossArgs& a)
      : args(a),
        kernels(row_kernels()),
        type(static_cast<int>(a.dtype)),
        rate(rate_of(a.rule.temperature, a.dtype)),
        live(a.tokens),
        response(a.tokens),
        counts(a.responses),
        loss(a.tokens),
        kl(a.tokens),
        clipped(std::make_unique<bool[]>(a.tokens)),
        tokens{a.rule, a.values, a.logprobs, a.entropy, loss.data(), kl.data(), clipped.get()},
        stream(a.grad != a.logits && a.rows * a.vocab * size_of(a.dtype) > kCache) {}

  void run() {
    find_live_tokens();
    if (args.rows < args.tokens) leave_out_tokens();
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
  std::unique_ptr<bool[]> clipped;
  const Tokens tokens;
  int64_t num_active = 0;
  const bool stream;

  bool active(int64_t row) const { return args.mask == nullptr || args.mask[row]; }

  int64_t token_of(int64_t row) const { return args.token_of == nullptr ? row : args.token_of[row]; }

  // Those without a row of logits are dead.
  void leave_out_tokens() {
    std::vector<char> given(args.tokens);
    for (int64_t row = 0; row < args.rows; ++row) given[args.token_of[row]] = 1;
    for (int64_t token = 0; token < args.tokens; ++token) {
      live[token] &= given[token];
      args.logprobs[token] = args.entropy[token] = 0.f;
    }
  }

  void find_live_tokens() {
    const LossRule& rule = args.rule;
    const bool other_terms = has_other_terms(rule);
    for (int64_t i = 0; i < args.responses; ++i) {
      const int64_t first = args.cu_seqlens[i], last = args.cu_seqlens[i + 1];
      bool any = false;
      for (int64_t row = first; row < last; ++row) {
        response[row] = i;
        if (!active(row)) continue;
        ++counts[i];
        live[row] = other_terms || args.values.advantages[row] != 0.f;
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
    args.logprobs[token_of(row)] = args.entropy[token_of(row)] = 0.f;
    if (args.grad != nullptr) fill_zero(row);
  }

  Row read(int64_t row) {
    const int64_t token = token_of(row);
    const Row result = read_row(kernels, logits(row), args.dtype, args.vocab, args.labels[token], rate,
                                infinite.load(std::memory_order_relaxed));
    if (result.stats.infinite) infinite.store(true, std::memory_order_relaxed);
    args.logprobs[token] = result.logp;
    args.entropy[token] = result.entropy;
    return result;
  }

  void write_grad(int64_t row, const Row& r, double g) {
    const int64_t token = token_of(row);
    const double h = -static_cast<double>(args.rule.entropy_coef) * weight(token);
    if (g == 0.0 && h == 0.0) {
      fill_zero(row);
      return;
    }
    const RowGrad how = row_grad(r, g, h, args.rule.temperature, rate, args.labels[token], stream);
    write_row(kernels, type, logits(row), grad(row), args.vocab, how);
  }

  int64_t grain() const { return std::clamp<int64_t>(args.rows / (8 * std::max(args.num_threads, 1)), 1, 8); }

  // Every row is finished while it is in the cache: one read of the logits, one write of the gradient.
  void token_ratio() {
    parallel_for(args.rows, grain(), args.num_threads, [&](int64_t first, int64_t last) {
      for (int64_t row = first; row < last; ++row) {
        const int64_t token = token_of(row);
        if (!live[token]) {
          clear(row);
          continue;
        }
        const Row r = read(row);
        const double g = tokens.slope(token, weight(token));
        if (args.grad != nullptr) write_grad(row, r, g);
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
      tokens.sequence_slopes(
          first, last, counts[i], [&](int64_t row) { return live[row] != 0; }, [&](int64_t row) { return weight(row); },
          g.data());
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
  if (!cumulative(args.cu_seqlens, args.responses, args.tokens)) return false;
  if (!labels_fit(args.labels, args.mask, args.tokens, args.vocab)) return false;
  if (args.token_of != nullptr && !rising(args.token_of, args.rows, args.tokens)) return false;
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

void row_stats(const HeadRows& args, int64_t rows, double* stats) {
  const RowKernels& kernels = row_kernels();
  const int type = static_cast<int>(args.dtype);
  constexpr float kInfinity = std::numeric_limits<float>::infinity();
  parallel_for(rows, 4, args.num_threads, [&](int64_t first, int64_t last) {
    bool infinite = false;
    for (int64_t row = first; row < last; ++row) {
      const void* logits = row_at(args.logits, row, args.stride, args.dtype);
      const bool own = args.labels[row] >= 0;
      RowStats r = kernels.stats[type](logits, args.vocab, args.rate(row), own ? args.labels[row] : 0, infinite);
      infinite = r.infinite;
      if (r.top == -kInfinity)  // NaN or nothing but -inf: whoever adds up parts of a row has to know
        for (int64_t i = 0; i < args.vocab; ++i)
          if (std::isnan(kernels.load[type](logits, i))) r.top = std::numeric_limits<float>::quiet_NaN();
      double* out = stats + row * kRowStats;
      out[0] = r.top;
      out[1] = r.sum;
      out[2] = r.centred;
      out[3] = r.infinite;
      out[4] = own ? kernels.load[type](logits, args.labels[row]) : -kInfinity;
    }
  });
}

void row_logprobs(const HeadRows& args, int64_t rows, const double* stats, float* logprobs, float* entropy) {
  for (int64_t i = 0; i < rows; ++i) {
    Row row = row_of(stats + i * kRowStats);
    finish_row(row, args.rate(i));
    logprobs[i] = row.logp;
    entropy[i] = row.entropy;
  }
}

void row_grads(const HeadRows& args, int64_t count, const int64_t* rows, const double* stats, const double* slopes,
               const double* entropy_slopes, void* grad) {
  const RowKernels& kernels = row_kernels();
  parallel_for(count, 4, args.num_threads, [&](int64_t first, int64_t last) {
    for (int64_t i = first; i < last; ++i) {
      const int64_t from = rows[i];
      Row row = row_of(stats + from * kRowStats);
      finish_row(row, args.rate(from));
      const RowGrad how = row_grad(row, slopes[from], entropy_slopes[from], args.temperature_of(from), args.rate(from),
                                   args.labels[from], false);
      write_row(kernels, static_cast<int>(args.dtype), row_at(args.logits, from, args.stride, args.dtype),
                row_at(grad, i, args.stride, args.dtype), args.vocab, how);
    }
  });
}

void loss_terms(const LossTermsArgs& args) {
  const Tokens tokens{args.rule, args.values, args.logprobs, args.entropy, args.loss, args.kl, args.clipped};
  for (int64_t i = 0; i < args.responses; ++i) {
    const int64_t first = args.cu_seqlens[i], last = args.cu_seqlens[i + 1];
    if (args.rule.ratio == Ratio::kToken)
      for (int64_t row = first; row < last; ++row) args.slopes[row] = tokens.slope(row, args.weights[row]);
    else
      tokens.sequence_slopes(
          first, last, last - first, [](int64_t) { return true; }, [&](int64_t row) { return args.weights[row]; },
          args.slopes);
  }
}

double HeadRows::rate(int64_t row) const { return rate_of(temperature_of(row), dtype); }

}  // namespace capo
