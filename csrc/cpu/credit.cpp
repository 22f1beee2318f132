// Group statistics need only the lengths and weights of the steps: O(M) in float64; the token pass writes runs of equal
// values.
#include "cpu/credit.h"

#include <algorithm>
#include <atomic>
#include <cmath>
#include <limits>
#include <memory>
#include <numeric>
#include <vector>

#include "common/checks.h"
#include "common/parallel.h"
#include "cpu/rows.h"

namespace capo {
namespace {

constexpr double kInfinity = std::numeric_limits<double>::infinity();

// Smallest and largest of the numbers seen.
struct Range {
  double low = kInfinity, high = -kInfinity;
  void add(double x) {
    low = std::min(low, x);
    high = std::max(high, x);
  }
  bool constant() const { return !(high > low); }
};

// Mean and standard deviation of few numbers, in two passes.
struct Moments {
  double mean = 0.0, std = 0.0;
  Moments(const std::vector<double>& x, double degrees_lost) {
    for (double value : x) mean += value;
    mean /= static_cast<double>(x.size());
    double squares = 0.0;
    for (double value : x) squares += (value - mean) * (value - mean);
    std = std::sqrt(squares / (static_cast<double>(x.size()) - degrees_lost));
  }
};

class Pass {
 public:
  explicit Pass(const CreditArgs& a)
      : args(a),
        rule(a.rule),
        kernels(row_kernels()),
        weights(std::make_unique_for_overwrite<double[]>(a.steps)),
        offset(std::make_unique_for_overwrite<double[]>(a.responses)),
        factor(std::make_unique_for_overwrite<double[]>(a.responses)) {}

  // False if the steps or votes of a response do not fit.
  bool run() {
    std::vector<int64_t> order(args.responses);
    std::iota(order.begin(), order.end(), int64_t{0});
    std::stable_sort(order.begin(), order.end(), [&](int64_t a, int64_t b) { return args.groups[a] < args.groups[b]; });
    std::vector<size_t> cu_groups = {0};
    for (size_t i = 1; i <= order.size(); ++i)
      if (i == order.size() || args.groups[order[i]] != args.groups[order[i - 1]]) cu_groups.push_back(i);
    const int64_t num_groups = static_cast<int64_t>(cu_groups.size()) - 1;
    // A group is written by the thread that has its steps in the cache, unless there are too few of them for all
    // threads.
    const bool write_at_once = num_groups >= args.num_threads;
    std::atomic<bool> all_fit{true};
    parallel_for(num_groups, 1, args.num_threads, [&](int64_t first, int64_t last) {
      for (int64_t g = first; g < last; ++g) {
        const int64_t* responses = order.data() + cu_groups[g];
        const size_t count = cu_groups[g + 1] - cu_groups[g];
        if (!group(responses, count))
          all_fit = false;
        else if (write_at_once)
          for (size_t k = 0; k < count; ++k) write(responses[k]);
      }
    });
    if (all_fit && !write_at_once)
      parallel_for(args.responses, 64, args.num_threads, [&](int64_t first, int64_t last) {
        for (int64_t i = first; i < last; ++i) write(i);
      });
    return all_fit;
  }

 private:
  using Members = std::vector<int64_t>;  // the decided responses of a group

  const CreditArgs& args;
  const CreditRule& rule;
  const RowKernels& kernels;
  std::unique_ptr<double[]> weights;         // of each step
  std::unique_ptr<double[]> offset, factor;  // of each response: advantage = (reward - offset) * factor

  // Weights of the steps of a response; false if a step lies outside of it or before the one before, or a vote is none.
  bool weigh(int64_t i) {
    bool foreign = false;
    int64_t token = args.cu_seqlens[i];
    for (int64_t s = args.cu_steps[i]; s < args.cu_steps[i + 1]; ++s) {
      if (args.starts[s] < token || args.ends[s] < args.starts[s]) return false;
      token = args.ends[s];
      const VoteCount votes = count_votes(args.votes + s * args.votes_per_step, args.votes_per_step);
      foreign |= votes.foreign;
      weights[s] = step_weight(votes.n, votes.c, rule.vote);
    }
    return !foreign && token <= args.cu_seqlens[i + 1];
  }

  int64_t length(int64_t i) const { return args.cu_seqlens[i + 1] - args.cu_seqlens[i]; }
  bool right(int64_t i) const { return args.outcomes[i] > 0.f; }
  double outcome(int64_t i) const { return static_cast<double>(args.outcomes[i]); }

  // The first flagged step of a response, or cu_steps[i + 1].
  int64_t first_flagged(int64_t i) const {
    int64_t s = args.cu_steps[i];
    while (s < args.cu_steps[i + 1] && weights[s] < 0.5) ++s;
    return s;
  }

  // The reward of a token outside all steps.
  double base_of(int64_t i) const {
    const bool any_flagged = rule.reward == Reward::kFlawed && first_flagged(i) < args.cu_steps[i + 1];
    return base_reward(rule, outcome(i), any_flagged);
  }

  // Calls visit(first, last, reward) for runs of tokens of response i with one reward, in order and without gaps.
  template <typename Visit>
  void runs(int64_t i, const Visit& visit) const {
    const int64_t first = args.cu_seqlens[i], last = args.cu_seqlens[i + 1];
    const double base = base_of(i);
    const auto run = [&](int64_t from, int64_t to, double reward) {
      if (to > from) visit(from, to, reward);
    };
    if (rule.reward == Reward::kPrefix && !right(i)) {
      const int64_t s = first_flagged(i);
      const int64_t error = s < args.cu_steps[i + 1] ? args.starts[s] : last;
      run(first, error, base);
      run(error, last, 0.0);
    } else if (rule.reward == Reward::kStep && rule.process_weight > 0.0) {
      int64_t token = first;
      for (int64_t s = args.cu_steps[i]; s < args.cu_steps[i + 1]; ++s) {
        run(token, args.starts[s], base);
        run(args.starts[s], args.ends[s], base - rule.process_weight * weights[s]);
        token = args.ends[s];
      }
      run(token, last, base);
    } else {  // with P = 0 the steps are not looked at: the result is that of the outcomes alone, bit for bit
      run(first, last, base);
    }
  }

  // Offset and factor of the responses of a group; false if one does not fit.
  bool group(const int64_t* responses, size_t count) {
    Members members;
    for (size_t k = 0; k < count; ++k) {
      const int64_t i = responses[k];
      if (!weigh(i) || std::isinf(args.outcomes[i])) return false;
      offset[i] = factor[i] = 0.0;
      if (!std::isnan(args.outcomes[i])) members.push_back(i);  // an undecided outcome leaves its group
    }
    if (!members.empty()) statistics(members);
    return true;
  }

  void statistics(const Members& members) {
    if (rule.reward == Reward::kStepSuffix)
      step_suffix(members);
    else if (rule.reward == Reward::kShare)
      share(members);
    else if (rule.normalize == Normalize::kGroupTokens || rule.normalize == Normalize::kGroupMean)
      over_tokens(members);
    else
      over_responses(members);
  }

  void over_tokens(const Members& members) {
    Range range;
    double sum = 0.0, squares = 0.0;
    int64_t count = 0;
    for (int64_t i : members) {
      count += length(i);
      runs(i, [&](int64_t first, int64_t last, double r) {
        range.add(r);
        sum += static_cast<double>(last - first) * r;
      });
    }
    if (range.constant()) return;
    const double mean = sum / static_cast<double>(count);
    for (int64_t i : members)
      runs(i, [&](int64_t first, int64_t last, double r) {
        squares += static_cast<double>(last - first) * (r - mean) * (r - mean);
      });
    const bool divide = rule.normalize == Normalize::kGroupTokens;
    const double scale = divide ? inverse_std(std::sqrt(squares / static_cast<double>(count)), rule) : 1.0;
    for (int64_t i : members) {
      offset[i] = mean;
      factor[i] = scale;
    }
  }

  void over_responses(const Members& members) {
    Range tokens, among_means;
    std::vector<double> means;
    for (int64_t i : members) {
      Range own;
      double sum = 0.0;
      runs(i, [&](int64_t first, int64_t last, double r) {
        own.add(r);
        sum += static_cast<double>(last - first) * r;
      });
      if (length(i) == 0) own.add(base_of(i));
      means.push_back(own.constant() ? own.low : sum / static_cast<double>(length(i)));
      tokens.add(own.low);
      tokens.add(own.high);
      among_means.add(means.back());
    }
    if (constant_but_rounding(tokens.low, tokens.high)) return;
    const double count = static_cast<double>(members.size());
    if (rule.normalize == Normalize::kResponsesMean) {
      const double mean = Moments(means, 0.0).mean;
      for (int64_t i : members) offset[i] = mean, factor[i] = 1.0;
      return;
    }
    if (members.size() == 1) return;
    if (rule.normalize == Normalize::kLeaveOneOut) {
      const double sum = std::accumulate(means.begin(), means.end(), 0.0);
      for (size_t k = 0; k < members.size(); ++k) {
        offset[members[k]] = (sum - means[k]) / (count - 1.0);
        factor[members[k]] = 1.0;
      }
      return;
    }
    if (constant_but_rounding(among_means.low, among_means.high)) return;
    const Moments moments(means, 1.0);
    for (int64_t i : members) offset[i] = moments.mean, factor[i] = inverse_std(moments.std, rule);
  }

  double step_reward(int64_t i, int64_t s) const {
    return rule.outcome_weight * outcome(i) - rule.process_weight * weights[s];
  }

  void step_suffix(const Members& members) {
    Range range;
    std::vector<double> rewards;
    for (int64_t i : members)
      for (int64_t s = args.cu_steps[i]; s < args.cu_steps[i + 1]; ++s) {
        rewards.push_back(step_reward(i, s));
        range.add(rewards.back());
      }
    if (range.constant()) return;
    const Moments moments(rewards, 0.0);
    for (int64_t i : members) offset[i] = moments.mean, factor[i] = inverse_std(moments.std, rule);
  }

  // (x - mean) / sample std; zeros where all are equal or there is but one.
  std::vector<double> normalized(const std::vector<double>& x) const {
    Range range;
    for (double value : x) range.add(value);
    std::vector<double> result(x.size(), 0.0);
    if (x.size() < 2 || constant_but_rounding(range.low, range.high)) return result;
    const Moments moments(x, 1.0);
    const double scale = inverse_std(moments.std, rule);
    for (size_t k = 0; k < x.size(); ++k) result[k] = (x[k] - moments.mean) * scale;
    return result;
  }

  // The advantage is one number a response: offset minus that number, factor -1 and reward 0 give it back.
  void share(const Members& members) {
    std::vector<double> outcomes, shares;
    for (int64_t i : members) {
      outcomes.push_back(outcome(i));
      if (!right(i)) continue;
      const int64_t count = args.cu_steps[i + 1] - args.cu_steps[i];
      int64_t flagged = 0;
      for (int64_t s = args.cu_steps[i]; s < args.cu_steps[i + 1]; ++s) flagged += weights[s] >= 0.5;
      shares.push_back(count == 0 ? 1.0 : 1.0 - static_cast<double>(flagged) / static_cast<double>(count));
    }
    const std::vector<double> by_outcome = normalized(outcomes), by_share = normalized(shares);
    size_t next = 0;
    for (size_t k = 0; k < members.size(); ++k) {
      const int64_t i = members[k];
      const double process = right(i) ? by_share[next++] : 0.0;
      offset[i] = rule.outcome_weight * by_outcome[k] + rule.process_weight * process;
      factor[i] = 1.0;
    }
  }

  void fill(int64_t first, int64_t last, float advantage) const {
    kernels.fill[static_cast<int>(Dtype::kFloat32)](args.advantages + first, last - first, advantage, false);
  }

  void put(int64_t first, int64_t last, double advantage) const {
    fill(first, last, static_cast<float>(std::clamp(advantage, -rule.clamp, rule.clamp)));
  }

  void write(int64_t i) const {
    const int64_t first = args.cu_seqlens[i], last = args.cu_seqlens[i + 1];
    if (factor[i] == 0.0) {
      fill(first, last, 0.f);
    } else if (rule.reward == Reward::kShare) {
      put(first, last, offset[i]);
    } else if (rule.reward == Reward::kStepSuffix) {
      double sum = 0.0;
      int64_t end = last;
      for (int64_t s = args.cu_steps[i + 1]; s-- > args.cu_steps[i];) {
        put(args.ends[s], end, sum);
        sum += (step_reward(i, s) - offset[i]) * factor[i];
        end = args.ends[s];
      }
      put(first, end, sum);
    } else {
      runs(i, [&](int64_t from, int64_t to, double r) { put(from, to, (r - offset[i]) * factor[i]); });
    }
  }
};

}  // namespace

bool credit(const CreditArgs& args) {
  return cumulative(args.cu_seqlens, args.responses, args.tokens) &&
         cumulative(args.cu_steps, args.responses, args.steps) && Pass(args).run();
}

}  // namespace capo
