// Launches: counts and weights of the tokens (and their advantages, from a credit), the rows, the metrics. Dead rows
// are not read.
#include <algorithm>

#include "cuda/credit.h"
#include "cuda/policy_loss.h"
#include "cuda/rows.cuh"
#include "cuda/weights.cuh"

namespace capo::cuda {
namespace {

constexpr int kWarps = 8;
constexpr int kThreads = kWarps * kLanes;
constexpr int kMostWarps = 32;
// Where a row is read twice, one row at a time on a multiprocessor: so more of them stay in the cache. Logits of 32
// bits take twice the registers.
CAPO_HD constexpr int warps_of_row(Dtype dtype) { return dtype == Dtype::kFloat32 ? kMostWarps / 2 : kMostWarps; }
constexpr int kMostBlocks = 8;  // of a cluster, on any device that has clusters

// Lies in the workspace. Every call sets the first two to zero, and where some tokens have no row, the next three.
struct Workspace {
  unsigned long long* active;  // [1] number of unmasked tokens
  double* weights;         // [N] of each token in the loss, 0 for the dead; to be divided by `active` for token means
  float *loss, *kl;        // [N] before weights
  bool* clipped;           // [N]
  double *stats, *slopes;  // [N, kRowStats], [N]; in steps
  void* tiles;

  Workspace(void* memory, int64_t tokens) {
    char* next = static_cast<char*>(memory);
    const auto take = [&](auto*& pointer, int64_t count) {
      pointer = reinterpret_cast<std::remove_reference_t<decltype(pointer)>>(next);
      next += (count * static_cast<int64_t>(sizeof(*pointer)) + 15) / 16 * 16;
    };
    take(active, 2);
    take(weights, tokens);
    size_of_weights = next - static_cast<char*>(memory);
    take(loss, tokens);
    take(kl, tokens);
    take(clipped, tokens);
    size = next - static_cast<char*>(memory);
    take(slopes, tokens);
    take(stats, tokens * kRowStats);
    tiles = next;
    size_in_steps = next - static_cast<char*>(memory);
  }
  int64_t size_of_weights, size, size_in_steps;
};

// Counts and weights of the tokens of one response.
CAPO_KERNEL(kThreads, 4)
weights_of_tokens(const TokenWeights a) {
  auto* const counts = reinterpret_cast<uint64_t*>(device::block_memory());
  auto* const any = reinterpret_cast<uint32_t*>(counts + kWarps);
  weigh_response<kThreads>(a, device::block(), device::thread(), [&](Seen seen) {
    seen = seen_by_warp(seen);
    const int warp = device::thread() / kLanes;
    if (device::thread() % kLanes == 0) {
      counts[warp] = seen.count;
      any[warp] = seen.any;
    }
    device::sync_block();
    seen = {0, false};
    for (int i = 0; i < kWarps; ++i) {
      seen.count += counts[i];
      seen.any |= any[i] != 0;
    }
    return seen;
  });
}

// A row that a block, or a cluster of blocks, has to itself.
struct LossRows {
  PolicyLoss loss;
  Workspace w;
  double rate;
  int cluster;
  int tiles_of_block;
};

CAPO_DEVICE int64_t token_of(const PolicyLoss& l, int64_t row) { return l.token_of == nullptr ? row : l.token_of[row]; }

template <Dtype kType, bool kOnChip, int kRowWarps>
CAPO_DEVICE void loss_of_row(const LossRows& a) {
  const PolicyLoss& l = a.loss;
  const int64_t row = device::block() / a.cluster, vocab = l.head.vocab;
  const int rank = static_cast<int>(device::block() % a.cluster);
  const int warp = device::thread() / kLanes, lane = device::thread() % kLanes;
  const int tiles = tiles_of(vocab), first = rank * a.tiles_of_block + warp;
  const int end = (rank + 1) * a.tiles_of_block, last = end < tiles ? end : tiles;
  const int64_t token = token_of(l, row);  // below it is looked up again, as registers are short
  const bool inside = token >= 0 && token < l.tokens;
  if (!inside || a.w.weights[token] == 0.0) {
    if (l.grad != nullptr)
      write_zeros<kType>(row_at<kType>(l.grad, row, l.grad_stride), first, last, kRowWarps, vocab, lane);
    if (inside && rank == 0 && device::thread() == 0) l.logprobs[token] = l.entropy[token] = 0.f;
    return;
  }
  if constexpr (kOnChip) device::arrive_at_cluster();
  auto* const how = reinterpret_cast<GradFactors*>(device::block_memory());
  auto* const stats = reinterpret_cast<TileStats*>(how + 1);
  char* const kept = reinterpret_cast<char*>(stats) + (tiles * sizeof(TileStats) + 15) / 16 * 16;
  constexpr int64_t kBytes = kTile * Format<kType>::kSize;
  const char* const logits = row_at<kType>(l.head.logits, row, l.head.stride);
  if (device::thread() == 0) {  // kept in memory of its own, as registers are short
    const int64_t label = l.head.labels[token_of(l, row)];
    const bool known = label >= 0 && label < vocab;
    how->label_grad = known ? Format<kType>::load(logits, label) : not_a_number();
  }
  Exponent<kType> exponent(a.rate);
  for (int tile = first; tile < last; tile += kRowWarps) {
    Tile<kType> z;
    const uint32_t rest = z.template read_for_columns<!kOnChip>(logits, vocab, tile, lane);
    if constexpr (kOnChip) z.put(kept + (tile - rank * a.tiles_of_block) * kBytes, lane);
    z.to_columns(rest, logits, vocab, tile, lane);
    const TileStats found = z.stats(exponent);
    if (lane == 0) stats[tile] = found;
  }
  if constexpr (kOnChip) {
    device::sync_warp();
    device::wait_for_cluster();
    if (lane < a.cluster && lane != rank)
      for (int tile = first; tile < last; tile += kRowWarps) device::in_block(stats, lane)[tile] = stats[tile];
    device::sync_warp();
    device::arrive_at_cluster();
    device::wait_for_cluster();
  } else {
    device::sync_block();
  }
  if (warp == 0) {
    Row result = {};
    result.stats = put_together(stats, tiles, a.rate, lane);
    if (lane == 0) {
      result.at_label = how->label_grad;
      finish_row(result, a.rate);
      const int64_t token = token_of(l, row);
      const float ratio = own_log_ratio(l.values, token, result.logp);
      const TokenTerms terms = token_terms(token_input(l.values, token, result.logp, result.entropy, ratio), l.rule);
      if (rank == 0) {
        l.logprobs[token] = result.logp;
        l.entropy[token] = result.entropy;
        a.w.loss[token] = terms.loss;
        a.w.kl[token] = terms.kl;
        a.w.clipped[token] = terms.clipped;
      }
      double weight = a.w.weights[token];
      if (l.rule.reduce == Reduce::kTokenMean) weight *= 1.0 / static_cast<double>(*a.w.active);
      const double slope = (static_cast<double>(terms.through_ratio) + terms.through_logp) * weight;
      const double entropy_slope = -static_cast<double>(l.rule.entropy_coef) * weight;
      *how = grad_factors(result, slope, entropy_slope, l.rule.temperature, l.head.labels[token]);
    }
  }
  if (l.grad == nullptr) return;
  char* const grad = row_at<kType>(l.grad, row, l.grad_stride);
  device::sync_block();
  const GradFactors& factors = *how;
  if (factors.zero) return write_zeros<kType>(grad, first, last, kRowWarps, vocab, lane);
  exponent.set_top(factors.top);
  // From the last to the first: what was read last is nearest.
  for (int tile = first + (last - 1 - first) / kRowWarps * kRowWarps; tile >= first && tile < last; tile -= kRowWarps) {
    if (is_whole<kType>(logits, grad, vocab, tile)) {
      Tile<kType> z;
      if constexpr (kOnChip)
        z.get(kept + (tile - rank * a.tiles_of_block) * kBytes, lane);
      else
        z.template read<false>(logits, tile, Format<kType>::shift_of(grad), lane);
      write_gradient(z, grad, tile, exponent, factors, how->label, how->label_grad, lane);
    } else {
      write_gradient_in_part<kType>(logits, grad, vocab, tile, a.rate, how);
    }
  }
}

template <Dtype kType>
CAPO_KERNEL(kThreads, kType == Dtype::kFloat32 ? 3 : 4)
loss_of_rows_on_chip(const LossRows a) {
  if constexpr (device::kHasClusters) loss_of_row<kType, true, kWarps>(a);
}

template <Dtype kType>
CAPO_KERNEL(warps_of_row(kType) * kLanes, 1)
loss_of_rows_in_two_passes(const LossRows a) {
  loss_of_row<kType, false, warps_of_row(kType)>(a);
}

// Sums over the tokens, by one block.
CAPO_KERNEL(kMostWarps* kLanes, 1)
metrics(const PolicyLoss a, const Workspace w) {
  constexpr int kAll = kMostWarps * kLanes;
  const int warp = device::thread() / kLanes, lane = device::thread() % kLanes;
  double sums[3] = {};
  for (int64_t token = device::thread(); token < a.tokens; token += kAll) {
    const double weight = w.weights[token];
    if (weight == 0.0) continue;
    sums[0] += w.loss[token] * weight;
    sums[1] += w.kl[token];
    sums[2] += w.clipped[token];
  }
  bool fits = true;
  for (int64_t i = device::thread(); i < a.responses; i += kAll) fits &= a.cu_seqlens[i] <= a.cu_seqlens[i + 1];
  fits &= a.cu_seqlens[0] == 0 && a.cu_seqlens[a.responses] == a.tokens;
  if (a.token_of != nullptr)
    for (int64_t i = device::thread(); i < a.head.rows; i += kAll)
      fits &= (i == 0 ? -1 : a.token_of[i - 1]) < a.token_of[i] && a.token_of[i] < a.tokens;
  if (!fits) sums[0] = static_cast<double>(not_a_number());
  auto* const memory = reinterpret_cast<double*>(device::block_memory());
#pragma unroll
  for (int k = 0; k < 3; ++k) {
#pragma unroll
    for (int mask = kLanes / 2; mask > 0; mask /= 2) sums[k] += device::shuffle_xor(sums[k], mask);
    if (lane == 0) memory[k * kMostWarps + warp] = sums[k];
  }
  device::sync_block();
  if (device::thread() != 0) return;
  double totals[3] = {};
  for (int k = 0; k < 3; ++k)
    for (int i = 0; i < kMostWarps; ++i) totals[k] += memory[k * kMostWarps + i];
  const double active = *w.active > 0 ? static_cast<double>(*w.active) : 1.0;
  *a.loss = static_cast<float>(a.rule.reduce == Reduce::kTokenMean ? totals[0] * (1.0 / active) : totals[0]);
  *a.kl = static_cast<float>(totals[1] / active);
  *a.clip_fraction = static_cast<float>(totals[2] / active);
}

int64_t memory_of_row(int tiles) {
  return static_cast<int64_t>(sizeof(GradFactors)) + (tiles * static_cast<int64_t>(sizeof(TileStats)) + 15) / 16 * 16;
}

// Blocks in the cluster of a row that lies in their memory, and bytes of each; 0 blocks if it does not fit.
struct Cluster {
  int blocks;
  int tiles_of_block;
  int memory;
};

Cluster cluster_of(const Head& head, int64_t most) {
  const int tiles = tiles_of(head.vocab);
  const int64_t wanted = device::target_memory();
  for (int blocks = 1; blocks <= kMostBlocks; blocks *= 2) {
    const int each = (tiles + blocks - 1) / blocks;
    const int64_t memory = memory_of_row(tiles) + int64_t{kTile} * each * size_of(head.dtype);
    if (memory <= (blocks < kMostBlocks ? std::min(wanted, most) : most))
      return {blocks, each, static_cast<int>(memory)};
  }
  return {0, 0, 0};
}

int loss_of_rows(const PolicyLoss& args, Form form, const Workspace& w, cudaStream_t stream) {
  const Head& head = args.head;
  const double rate = rate_of(args.rule.temperature, head.dtype);
  const int tiles = tiles_of(head.vocab);
  const auto run = [&](auto on_chip, auto two_passes) -> int {
    if (form == Form::kOnChip) {
      const Cluster cluster = cluster_of(head, device::most_memory());
      const LossRows rows = {args, w, rate, cluster.blocks, cluster.tiles_of_block};
      return device::launch(on_chip, {head.rows * cluster.blocks, kThreads, cluster.memory, cluster.blocks, stream},
                            rows);
    }
    const LossRows rows = {args, w, rate, 1, tiles};
    return device::launch(
        two_passes, {head.rows, warps_of_row(head.dtype) * kLanes, static_cast<int>(memory_of_row(tiles)), 1, stream},
        rows);
  };
  switch (head.dtype) {
    case Dtype::kFloat32:
      return run(loss_of_rows_on_chip<Dtype::kFloat32>, loss_of_rows_in_two_passes<Dtype::kFloat32>);
    case Dtype::kBFloat16:
      return run(loss_of_rows_on_chip<Dtype::kBFloat16>, loss_of_rows_in_two_passes<Dtype::kBFloat16>);
    default:
      return run(loss_of_rows_on_chip<Dtype::kFloat16>, loss_of_rows_in_two_passes<Dtype::kFloat16>);
  }
}

int loss_in_steps(const PolicyLoss& args, const Workspace& w, Stream stream) {
  const unsigned long long* const active = args.rule.reduce == Reduce::kTokenMean ? w.active : nullptr;
  int error = read_rows(args.head, {w.weights, nullptr}, {w.stats, args.logprobs, args.entropy}, w.tiles, stream);
  if (error != 0) return error;
  error = loss_terms({args.values, args.logprobs, args.entropy, w.weights, false, active, args.cu_seqlens,
                      args.head.rows, args.responses, args.rule, w.loss, w.kl, w.clipped, w.slopes},
                     stream);
  if (error != 0 || args.grad == nullptr) return error;
  return row_grads({args.head, args.head.rows, nullptr, w.stats, w.slopes, nullptr,
                    static_cast<double>(args.rule.entropy_coef), w.weights, active, args.grad, args.grad_stride},
                   stream);
}

}  // namespace

Form form_of(const PolicyLoss& args) {
  if (args.rule.ratio != Ratio::kToken) return Form::kInSteps;
  if (args.form != Form::kChosen && (args.form != Form::kInSteps || args.token_of == nullptr)) return args.form;
  if (device::has_clusters() && cluster_of(args.head, device::most_memory()).blocks > 0) return Form::kOnChip;
  const bool fits = memory_of_row(tiles_of(args.head.vocab)) <= device::most_memory();
  const bool many = args.head.rows >= 2 * device::multiprocessors();
  return args.token_of != nullptr || (fits && many) ? Form::kTwoPasses : Form::kInSteps;
}

size_t workspace_of(const PolicyLoss& args, Form form) {
  const Workspace sizes(nullptr, args.tokens);
  if (form != Form::kInSteps) return static_cast<size_t>(sizes.size);
  return static_cast<size_t>(sizes.size_in_steps) + size_of_tiles(args.head.rows, args.head.vocab);
}

int policy_loss(const PolicyLoss& args, Form form, void* workspace, Stream stream) {
  const auto on = static_cast<cudaStream_t>(stream);
  const Workspace w(workspace, args.tokens);
  const bool whole = args.token_of == nullptr && args.head.rows == args.tokens;
  int error = device::clear(workspace, static_cast<size_t>(whole ? w.size_of_weights : w.size), on);
  if (error != 0) return error;
  const TokenWeights weights = {args.values.advantages, args.mask, args.cu_seqlens, args.tokens,
                                args.responses,         args.rule, w.active,        w.weights};
  error = args.credit == nullptr
              ? device::launch(weights_of_tokens, {args.responses, kThreads, 12 * kWarps, 1, on}, weights)
              : credit_and_weights(*args.credit, weights, stream);
  if (error != 0) return error;
  error = form == Form::kInSteps ? loss_in_steps(args, w, stream) : loss_of_rows(args, form, w, on);
  if (error != 0) return error;
  return device::launch(metrics, {1, kMostWarps * kLanes, 3 * kMostWarps * static_cast<int>(sizeof(double)), 1, on},
                        args, w);
}

}  // namespace capo::cuda
