// The blocks of the first response of each group do all of the group; all others leave at once. So responses need no
// order, nothing is kept in memory between steps, and no block waits for another. Statistics are float64 and made in
// two passes; every block of a group makes them for itself.
#include "cuda/credit.h"
#include "cuda/device.cuh"
#include "cuda/weights.cuh"

namespace capo::cuda {
namespace {

using device::kLanes;

constexpr int kWarps = 8;
constexpr int kThreads = kWarps * kLanes;
constexpr int kParts = 2;  // blocks that write the tokens of a group
constexpr int kEach = 4;   // ids a thread looks at in one go
constexpr int kChunk = kThreads * kEach;
constexpr int kMembers = 2 * kChunk;  // of a group, at a time

struct Memory {
  int64_t members[kMembers];
  double sums[kWarps];
  int counts[kWarps];
};

CAPO_DEVICE double infinite() { return static_cast<double>(INFINITY); }
CAPO_DEVICE double nothing() { return static_cast<double>(NAN); }

// What is known of one response.
struct Response {
  int64_t first, last;            // tokens
  int64_t first_step, last_step;  // none if they do not fit
  double outcome;
  bool fits;

  CAPO_DEVICE Response(const CreditArgs& a, int64_t i) {
    first = a.cu_seqlens[i];
    last = a.cu_seqlens[i + 1];
    first_step = a.cu_steps[i];
    last_step = a.cu_steps[i + 1];
    outcome = static_cast<double>(a.outcomes[i]);
    fits = 0 <= first && first <= last && last <= a.tokens && 0 <= first_step && first_step <= last_step &&
           last_step <= a.steps && fabs(outcome) != infinite();
    if (!fits) first_step = last_step = 0;
    first = first < 0 ? 0 : first > a.tokens ? a.tokens : first;
    last = last < first ? first : last > a.tokens ? a.tokens : last;
  }
  CAPO_DEVICE bool decided() const { return !isnan(outcome); }
  CAPO_DEVICE bool right() const { return outcome > 0.0; }
  CAPO_DEVICE double length() const { return static_cast<double>(last - first); }
};

struct Weight {
  double weight;
  bool foreign;
};

CAPO_SLOW Weight read_weight(const int8_t* votes, int64_t count, Vote rule) {
  const VoteCount found = count_votes(votes, count);
  return {step_weight(found.n, found.c, rule), found.foreign};
}

CAPO_DEVICE Weight read_weight(const CreditArgs& a, int64_t step) {
  return read_weight(a.votes + step * a.votes_per_step, a.votes_per_step, a.rule.vote);
}

CAPO_DEVICE double weight_of(const CreditArgs& a, int64_t step) { return read_weight(a, step).weight; }

// One value in the tokens [first, last), by one warp.
CAPO_SLOW void fill_tokens(float* out, int64_t first, int64_t last, float value, int lane) {
  int64_t begin = first;
  while (begin < last && reinterpret_cast<uintptr_t>(out + begin) % 16 != 0) ++begin;
  const int64_t whole = begin + (last - begin) / 4 * 4;
  if (lane < begin - first) out[first + lane] = value;
  const uint32_t bits = device::float_to_bits(value);
  const device::Vector four = {{bits, bits, bits, bits}};
  for (int64_t token = begin + 4 * lane; token < whole; token += 4 * kLanes) device::store(out + token, four);
  if (lane < last - whole) out[whole + lane] = value;
}

template <typename T, typename Combine>
CAPO_DEVICE T over_warp(T x, const Combine& combine) {
#pragma unroll
  for (int mask = kLanes / 2; mask > 0; mask /= 2) x = combine(x, device::shuffle_xor(x, mask));
  return x;
}

struct Add {
  CAPO_DEVICE double operator()(double x, double y) const { return x + y; }
};
struct Smaller {
  CAPO_DEVICE double operator()(double x, double y) const { return x < y ? x : y; }
};
struct Larger {
  CAPO_DEVICE double operator()(double x, double y) const { return x > y ? x : y; }
};

// What the samples of a group give; what a sample is, Group says.
struct Moments {
  double count = 0.0, mean = 0.0, squares = 0.0, low = infinite(), high = -infinite();
};

// One group, by one block. All loops over members go by warps, all in a member by lanes.
class Group {
 public:
  CAPO_DEVICE Group(const CreditArgs& args, int64_t leader)
      : a(args),
        memory(*reinterpret_cast<Memory*>(device::block_memory())),
        leader(leader),
        id(args.groups[leader]),
        warp(device::thread() / kLanes),
        lane(device::thread() % kLanes) {}

  // Whether no response before has the group's id.
  CAPO_DEVICE bool leads() const {
    for (int64_t end = leader; end > 0; end -= kChunk) {
      bool found = false;
#pragma unroll
      for (int k = 0; k < kEach; ++k) {
        const int64_t i = end - 1 - k * kThreads - device::thread();
        found |= i >= 0 && a.groups[i] == id;
      }
      if (device::any_of_block(found)) return false;
    }
    return true;
  }

  CAPO_DEVICE void run(int part) {
    bool bad = false;
    each_member(0, 1, [&](int64_t i) { bad |= !fits(i); });
    broken = device::any_of_block(bad);
    if (!broken) find_scales();
    each_member(part, kParts, [&](int64_t i) { write(i); });
  }

  CAPO_DEVICE void fill(int64_t first, int64_t last, float value) const {
    fill_tokens(a.advantages, first, last, value, lane);
  }

  // Calls visit(i) for those members whose number is `part` modulo `parts`, each by one warp, in an order of its own.
  template <typename Visit>
  CAPO_DEVICE void each_member(int part, int parts, const Visit& visit) {
    int64_t next = leader;
    while (next < a.responses) {
      int number = 0;
      for (; next < a.responses && number <= kMembers - kChunk; next += kChunk) number = collect(next, number);
      device::sync_block();
      for (int k = part + parts * warp; k < number; k += parts * kWarps) visit(memory.members[k]);
      device::sync_block();
    }
  }

 private:
  const CreditArgs& a;
  Memory& memory;
  const int64_t leader, id;
  const int warp, lane;
  bool broken = false;
  // advantage = (reward - offset) * factor; for shares that of the outcome, and that of the share.
  double offset = 0.0, factor = 0.0, share_offset = 0.0, share_factor = 0.0;
  double members = 0.0, total = 0.0;  // decided responses, sum of their means

  // Appends the members among the next ids to the list, in their order; gives its length.
  CAPO_DEVICE int collect(int64_t first, int number) {
    uint32_t found[kEach];
    int own = 0;
#pragma unroll
    for (int k = 0; k < kEach; ++k) {
      const int64_t i = first + (warp * kEach + k) * kLanes + lane;
      found[k] = device::ballot(i < a.responses && a.groups[i] == id);
      own += device::count_bits(found[k]);
    }
    if (lane == 0) memory.counts[warp] = own;
    device::sync_block();
    int place = number, all = number;
    for (int i = 0; i < kWarps; ++i) {
      if (i < warp) place += memory.counts[i];
      all += memory.counts[i];
    }
#pragma unroll
    for (int k = 0; k < kEach; ++k) {
      const uint32_t before = found[k] & ((1u << lane) - 1u);
      if ((found[k] >> lane) & 1u)
        memory.members[place + device::count_bits(before)] = first + (warp * kEach + k) * kLanes + lane;
      place += device::count_bits(found[k]);
    }
    device::sync_block();
    return all;
  }

  // Whether a lane has nothing to say against response i.
  CAPO_SLOW_MEMBER bool fits(int64_t i) const {
    const Response r(a, i);
    bool foreign = false, good = r.fits;
    for (int64_t s = r.first_step + lane; s < r.last_step; s += kLanes) {
      const int64_t before = s == r.first_step ? r.first : a.ends[s - 1];
      good &= before <= a.starts[s] && a.starts[s] <= a.ends[s] && a.ends[s] <= r.last;
      foreign |= read_weight(a, s).foreign;
    }
    return good && !foreign;
  }

  CAPO_DEVICE bool by_steps() const { return a.rule.reward == Reward::kStep && a.rule.process_weight > 0.0; }

  // The first flagged step, or last_step, in all lanes.
  CAPO_SLOW_MEMBER int64_t first_flagged(const Response& r) const {
    for (int64_t s = r.first_step; s < r.last_step; s += kLanes) {
      const uint32_t found = device::ballot(s + lane < r.last_step && weight_of(a, s + lane) >= 0.5);
      if (found != 0) return s + device::count_bits((found & (0u - found)) - 1u);
    }
    return r.last_step;
  }

  CAPO_DEVICE double base_of(const Response& r) const {
    const bool any = a.rule.reward == Reward::kFlawed && r.right() && first_flagged(r) < r.last_step;
    return base_reward(a.rule, r.outcome, any);
  }

  // Where the rewards of a wrong response's tokens become 0.
  CAPO_DEVICE int64_t error_of(const Response& r) const {
    if (a.rule.reward != Reward::kPrefix || r.right()) return r.last;
    const int64_t s = first_flagged(r);
    return s < r.last_step ? a.starts[s] : r.last;
  }

  // Calls visit(tokens, reward) for runs of tokens, every run in one lane; the order is another.
  template <typename Visit>
  CAPO_DEVICE void runs(const Response& r, const Visit& visit) const {
    const double base = base_of(r);
    const auto run = [&](int64_t tokens, double reward) {
      if (tokens > 0) visit(static_cast<double>(tokens), reward);
    };
    if (!by_steps()) {
      const int64_t error = error_of(r);
      if (lane == 0) {
        run(error - r.first, base);
        run(r.last - error, 0.0);
      }
      return;
    }
    for (int64_t s = r.first_step + lane; s < r.last_step; s += kLanes) {
      run(a.starts[s] - (s == r.first_step ? r.first : a.ends[s - 1]), base);
      run(a.ends[s] - a.starts[s], base - a.rule.process_weight * weight_of(a, s));
    }
    if (lane == 0) run(r.last - (r.first_step == r.last_step ? r.first : a.ends[r.last_step - 1]), base);
  }

  // Mean reward of a response's tokens, and their range; exactly their value if they are equal, and the base reward of
  // an empty response. In all lanes.
  CAPO_DEVICE double mean_of(const Response& r, double* lowest, double* highest) const {
    double sum = 0.0, low = infinite(), high = -infinite();
    runs(r, [&](double tokens, double reward) {
      sum += tokens * reward;
      low = Smaller()(low, reward);
      high = Larger()(high, reward);
    });
    sum = over_warp(sum, Add());
    low = over_warp(low, Smaller());
    high = over_warp(high, Larger());
    if (r.first == r.last) low = high = base_of(r);
    *lowest = low;
    *highest = high;
    return high > low ? sum / r.length() : low;
  }

  CAPO_DEVICE double mean_of(const Response& r) const {
    double low, high;
    return mean_of(r, &low, &high);
  }

  CAPO_DEVICE double step_reward(const Response& r, int64_t s) const {
    return a.rule.outcome_weight * r.outcome - a.rule.process_weight * weight_of(a, s);
  }

  CAPO_DEVICE double share_of(const Response& r) const {
    double flagged = 0.0;
    for (int64_t s = r.first_step + lane; s < r.last_step; s += kLanes) flagged += weight_of(a, s) >= 0.5;
    flagged = over_warp(flagged, Add());
    const double count = static_cast<double>(r.last_step - r.first_step);
    return count == 0.0 ? 1.0 : 1.0 - flagged / count;
  }

  template <typename Combine>
  CAPO_DEVICE double over_block(double x, const Combine& combine) {
    x = over_warp(x, combine);
    device::sync_block();
    if (lane == 0) memory.sums[warp] = x;
    device::sync_block();
    x = memory.sums[0];
    for (int i = 1; i < kWarps; ++i) x = combine(x, memory.sums[i]);
    return x;
  }

  // `samples(r, visit)` calls visit(how_often, value) for the samples of a decided response, each in one lane.
  template <typename Samples>
  CAPO_DEVICE Moments moments_of(const Samples& samples) {
    Moments result;
    double sum = 0.0;
    const auto each = [&](const auto& visit) {
      each_member(0, 1, [&](int64_t i) {
        const Response r(a, i);
        if (r.decided()) samples(r, visit);
      });
    };
    each([&](double often, double value) {
      result.count += often;
      sum += often * value;
      result.low = Smaller()(result.low, value);
      result.high = Larger()(result.high, value);
    });
    result.count = over_block(result.count, Add());
    total = over_block(sum, Add());
    result.low = over_block(result.low, Smaller());
    result.high = over_block(result.high, Larger());
    result.mean = total / (result.count > 0.0 ? result.count : 1.0);
    const double mean = result.mean;
    double squares = 0.0;
    each([&](double often, double value) { squares += often * (value - mean) * (value - mean); });
    result.squares = over_block(squares, Add());
    return result;
  }

  // 1 / sample std; 0 where all are equal or there is but one.
  CAPO_DEVICE double scale_of(const Moments& m) const {
    if (m.count < 2.0 || constant_but_rounding(m.low, m.high)) return 0.0;
    return inverse_std(sqrt(m.squares / (m.count - 1.0)), a.rule);
  }

  CAPO_DEVICE void find_scales() {
    const CreditRule& rule = a.rule;
    if (rule.reward == Reward::kShare) {
      const Moments outcomes = moments_of([&](const Response& r, const auto& visit) {
        if (lane == 0) visit(1.0, r.outcome);
      });
      offset = outcomes.mean;
      factor = scale_of(outcomes);
      const Moments shares = moments_of([&](const Response& r, const auto& visit) {
        if (!r.right()) return;
        const double share = share_of(r);
        if (lane == 0) visit(1.0, share);
      });
      share_offset = shares.mean;
      share_factor = scale_of(shares);
    } else if (rule.reward == Reward::kStepSuffix) {
      over_all(moments_of([&](const Response& r, const auto& visit) {
        for (int64_t s = r.first_step + lane; s < r.last_step; s += kLanes) visit(1.0, step_reward(r, s));
      }));
    } else if (rule.normalize == Normalize::kGroupTokens || rule.normalize == Normalize::kGroupMean) {
      over_all(moments_of([&](const Response& r, const auto& visit) { runs(r, visit); }));
    } else {
      over_responses();
    }
  }

  CAPO_DEVICE void over_all(const Moments& m) {
    if (!(m.high > m.low)) return;
    offset = m.mean;
    factor = a.rule.normalize == Normalize::kGroupMean ? 1.0 : inverse_std(sqrt(m.squares / m.count), a.rule);
  }

  CAPO_DEVICE void over_responses() {
    double low = infinite(), high = -infinite();
    const Moments means = moments_of([&](const Response& r, const auto& visit) {
      double lowest, highest;
      const double mean = mean_of(r, &lowest, &highest);
      low = Smaller()(low, lowest);
      high = Larger()(high, highest);
      if (lane == 0) visit(1.0, mean);
    });
    low = over_block(low, Smaller());
    high = over_block(high, Larger());
    members = means.count;
    if (constant_but_rounding(low, high)) return;
    offset = means.mean;
    switch (a.rule.normalize) {
      case Normalize::kResponsesMean:
        factor = 1.0;
        return;
      case Normalize::kLeaveOneOut:
        factor = members < 2.0 ? 0.0 : 1.0;
        return;
      default:
        factor = scale_of(means);
    }
  }

  CAPO_DEVICE void put(int64_t first, int64_t last, double advantage) const {
    const double limit = a.rule.clamp;
    fill(first, last, static_cast<float>(advantage > limit ? limit : advantage < -limit ? -limit : advantage));
  }

  CAPO_DEVICE void write(int64_t i) {
    const Response r(a, i);
    if (broken) return put(r.first, r.last, nothing());
    if (!r.decided()) return fill(r.first, r.last, 0.f);
    if (a.rule.reward == Reward::kShare) {
      const double share = r.right() && share_factor != 0.0 ? (share_of(r) - share_offset) * share_factor : 0.0;
      const double outcome = factor != 0.0 ? (r.outcome - offset) * factor : 0.0;
      return put(r.first, r.last, a.rule.outcome_weight * outcome + a.rule.process_weight * share);
    }
    if (factor == 0.0) return fill(r.first, r.last, 0.f);
    if (a.rule.reward == Reward::kStepSuffix) return write_suffixes(r);
    double own = offset;
    if (a.rule.normalize == Normalize::kLeaveOneOut) own = (total - mean_of(r)) / (members - 1.0);
    const double base = (base_of(r) - own) * factor;
    if (by_steps()) return write_steps(r, base, own);
    const int64_t error = error_of(r);
    put(r.first, error, base);
    put(error, r.last, (0.0 - own) * factor);
  }

  // 32 steps are looked up at once, then written one after the other.
  CAPO_SLOW_MEMBER void write_steps(const Response& r, double base, double own) const {
    int64_t token = r.first;
    for (int64_t s = r.first_step; s < r.last_step; s += kLanes) {
      int64_t start = 0, end = 0;
      double value = 0.0;
      if (s + lane < r.last_step) {
        start = a.starts[s + lane];
        end = a.ends[s + lane];
        const double reward = base_reward(a.rule, r.outcome, false) - a.rule.process_weight * weight_of(a, s + lane);
        value = (reward - own) * factor;
      }
      for (int k = 0; k < kLanes && s + k < r.last_step; ++k) {
        const int64_t from = device::shuffle(start, k), to = device::shuffle(end, k);
        put(token, from, base);
        put(from, to, device::shuffle(value, k));
        token = to;
      }
    }
    put(token, r.last, base);
  }

  // The sum over the steps that end after the token, from the last step to the first.
  CAPO_SLOW_MEMBER void write_suffixes(const Response& r) const {
    double sum = 0.0;
    int64_t end = r.last;
    for (int64_t next = r.last_step; next > r.first_step; next -= kLanes) {
      const int64_t s = next - 1 - lane;
      int64_t own_end = 0;
      double value = 0.0;
      if (s >= r.first_step) {
        own_end = a.ends[s];
        value = (step_reward(r, s) - offset) * factor;
      }
      for (int k = 0; k < kLanes && next - 1 - k >= r.first_step; ++k) {
        const int64_t from = device::shuffle(own_end, k);
        put(from, end, sum);
        sum += device::shuffle(value, k);
        end = from;
      }
    }
    put(r.first, end, sum);
  }
};

// What both kernels do; gives whether this block did one of a group's parts.
CAPO_DEVICE bool do_group(const CreditArgs& a, Group& group, int64_t response, int part) {
  if (part == 0 && device::thread() < kLanes) {  // tokens that no response has
    const auto held = [&](int64_t token) { return token < 0 ? 0 : token > a.tokens ? a.tokens : token; };
    const float nan = static_cast<float>(nothing());
    if (response == 0) group.fill(0, held(a.cu_seqlens[0]), nan);
    if (response == a.responses - 1) group.fill(held(a.cu_seqlens[a.responses]), a.tokens, nan);
  }
  if (!group.leads()) return false;
  group.run(part);
  return true;
}

CAPO_KERNEL(kThreads, 2)
advantages_of_groups(const CreditArgs a) {
  const int64_t response = device::block() / kParts;
  Group group(a, response);
  do_group(a, group, response, static_cast<int>(device::block() % kParts));
}

CAPO_SLOW void weigh_by_warp(const TokenWeights& a, int64_t response) {
  weigh_response<kLanes>(a, response, device::thread() % kLanes, [](Seen seen) { return seen_by_warp(seen); });
}

CAPO_KERNEL(kThreads, 2)
weights_of_groups(const CreditArgs a, const TokenWeights weights) {
  const int64_t response = device::block() / kParts;
  const int part = static_cast<int>(device::block() % kParts);
  Group group(a, response);
  if (do_group(a, group, response, part))
    group.each_member(part, kParts, [&](int64_t i) { weigh_by_warp(weights, i); });
}

device::Launch how_to_launch(const CreditArgs& args, void* stream) {
  return {args.responses * kParts, kThreads, static_cast<int>(sizeof(Memory)), 1, static_cast<cudaStream_t>(stream)};
}

}  // namespace

int credit(const CreditArgs& args, void* stream) {
  return device::launch(advantages_of_groups, how_to_launch(args, stream), args);
}

int credit_and_weights(const CreditArgs& args, const TokenWeights& weights, void* stream) {
  return device::launch(weights_of_groups, how_to_launch(args, stream), args, weights);
}

}  // namespace capo::cuda
