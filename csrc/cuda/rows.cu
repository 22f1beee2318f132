#include "cuda/rows.cuh"
#include "cuda/rows.h"

namespace capo::cuda {
namespace {

constexpr int kWarps = 8;
constexpr int kThreads = kWarps * kLanes;
constexpr int kTilesOfBlock = 4 * kWarps;  // enough that the start of a block weighs little

int64_t splits_of(int64_t vocab) { return (tiles_of(vocab) + kTilesOfBlock - 1) / kTilesOfBlock; }

CAPO_DEVICE bool is_live(const Live& live, int64_t row) {
  if (live.weights != nullptr) return live.weights[row] != 0.0;
  return live.mask == nullptr || live.mask[row];
}

CAPO_DEVICE float temperature_of(const Head& head, int64_t row) {
  return head.temperatures == nullptr ? head.temperature : head.temperatures[row];
}

// Statistics of some tiles of one row.
template <Dtype kType>
CAPO_KERNEL(kThreads, kType == Dtype::kFloat32 ? 3 : 4)
tiles_of_rows(const Head head, const Live live, TileStats* tiles, int64_t splits) {
  const int64_t row = device::block() / splits;
  const int split = static_cast<int>(device::block() % splits);
  if (!is_live(live, row)) return;
  const int warp = device::thread() / kLanes, lane = device::thread() % kLanes;
  const int count = tiles_of(head.vocab);
  const int first = split * kTilesOfBlock, last = first + kTilesOfBlock < count ? first + kTilesOfBlock : count;
  const char* const logits = row_at<kType>(head.logits, row, head.stride);
  const Exponent<kType> exponent(rate_of(temperature_of(head, row), kType));
  for (int tile = first + warp; tile < last; tile += kWarps) {
    Tile<kType> z;
    const uint32_t rest = z.template read_for_columns<false>(logits, head.vocab, tile, lane);
    z.to_columns(rest, logits, head.vocab, tile, lane);
    const TileStats stats = z.stats(exponent);
    if (lane == 0) tiles[row * count + tile] = stats;
  }
}

// What the tiles of a row give, one row a warp.
template <Dtype kType>
CAPO_KERNEL(kThreads, 4)
results_of_rows(const Head head, const Live live, const TileStats* tiles, const RowResults results) {
  const int64_t row = device::block() * kWarps + device::thread() / kLanes;
  const int lane = device::thread() % kLanes;
  if (row >= head.rows) return;
  Row result = {};
  if (is_live(live, row)) {
    const double rate = rate_of(temperature_of(head, row), kType);
    const int64_t count = tiles_of(head.vocab), label = head.labels[row];
    const bool known = label >= 0 && label < head.vocab;
    result.stats = put_together(tiles + row * count, count, rate, lane);
    if (known)
      result.at_label = Format<kType>::load(row_at<kType>(head.logits, row, head.stride), label);
    else
      result.at_label = head.partial ? -infinity() : not_a_number();
    finish_row(result, rate);
  }
  if (lane != 0) return;
  if (results.logprobs != nullptr) {
    results.logprobs[row] = result.logp;
    results.entropy[row] = result.entropy;
  }
  if (results.stats != nullptr) {
    double* const stats = results.stats + row * kRowStats;
    stats[0] = result.stats.top;
    stats[1] = result.stats.sum;
    stats[2] = result.stats.centred;
    stats[3] = 0.0;
    stats[4] = result.at_label;
  }
}

CAPO_KERNEL(kThreads, 4)
logprobs_of_stats(const Head head, const double* stats, float* logprobs, float* entropy) {
  const int64_t row = device::block() * kThreads + device::thread();
  if (row >= head.rows) return;
  Row result = row_of(stats + row * kRowStats);
  finish_row(result, rate_of(temperature_of(head, row), head.dtype));
  logprobs[row] = result.logp;
  entropy[row] = result.entropy;
}

// Gradient in some tiles of one row.
template <Dtype kType>
CAPO_KERNEL(kThreads, kType == Dtype::kFloat32 ? 3 : 4)
gradient_of_rows(const RowGrads a, int64_t splits) {
  const Head& head = a.head;
  const int64_t target = device::block() / splits;
  const int split = static_cast<int>(device::block() % splits);
  const int64_t row = a.rows == nullptr ? target : a.rows[target];
  const int warp = device::thread() / kLanes, lane = device::thread() % kLanes;
  const int count = tiles_of(head.vocab);
  const int first = split * kTilesOfBlock, last = first + kTilesOfBlock < count ? first + kTilesOfBlock : count;
  char* const grad = row_at<kType>(a.grad, target, a.grad_stride);
  GradFactors* const shared = reinterpret_cast<GradFactors*>(device::block_memory());
  if (device::thread() == 0) {
    GradFactors how = {};
    how.zero = true;
    const double weight = a.weights == nullptr ? 1.0 : a.weights[row];
    if (weight != 0.0) {
      const float temperature = temperature_of(head, row);
      const double scale = a.active == nullptr ? 1.0 : 1.0 / static_cast<double>(*a.active);
      const double h = a.entropy_slopes == nullptr ? -a.entropy_coef * (weight * scale) : a.entropy_slopes[row];
      Row read = row_of(a.stats + row * kRowStats);
      finish_row(read, rate_of(temperature, kType));
      how = grad_factors(read, a.slopes[row], h, temperature, head.labels[row]);
    }
    *shared = how;
  }
  device::sync_block();
  const GradFactors how = *shared;
  if (how.zero) return write_zeros<kType>(grad, first + warp, last, kWarps, head.vocab, lane);
  const char* const logits = row_at<kType>(head.logits, row, head.stride);
  const double rate = rate_of(temperature_of(head, row), kType);
  Exponent<kType> exponent(rate);
  exponent.set_top(how.top);
  for (int tile = last - 1 - warp; tile >= first; tile -= kWarps) {
    if (is_whole<kType>(logits, grad, head.vocab, tile)) {
      Tile<kType> z;
      z.template read<false>(logits, tile, Format<kType>::shift_of(grad), lane);
      write_gradient(z, grad, tile, exponent, how, shared->label, shared->label_grad, lane);
    } else {
      write_gradient_in_part<kType>(logits, grad, head.vocab, tile, rate_of(temperature_of(head, row), kType), shared);
    }
  }
}

CAPO_DEVICE TokenTerms terms_of(const LossTerms& a, int64_t row, float ratio) {
  const TokenTerms terms = token_terms(token_input(a.values, row, a.logprobs[row], a.entropy[row], ratio), a.rule);
  a.loss[row] = terms.loss;
  a.kl[row] = terms.kl;
  a.clipped[row] = terms.clipped;
  return terms;
}

CAPO_DEVICE double scale_of(const unsigned long long* active) {
  return active == nullptr ? 1.0 : 1.0 / static_cast<double>(*active);
}

// Tokens whose ratio is their own.
CAPO_KERNEL(kThreads, 4)
terms_of_tokens(const LossTerms a) {
  const int64_t row = device::block() * kThreads + device::thread();
  if (row >= a.rows || (!a.all_live && a.weights[row] == 0.0)) return;
  const TokenTerms terms = terms_of(a, row, own_log_ratio(a.values, row, a.logprobs[row]));
  const double weight = a.weights[row] * scale_of(a.active);
  a.slopes[row] = (static_cast<double>(terms.through_ratio) + terms.through_logp) * weight;
}

// Sum over the threads of a block, in an order of their own; `memory` holds one number a warp.
CAPO_DEVICE double sum_of_block(double x, double* memory) {
  const int warp = device::thread() / kLanes, lane = device::thread() % kLanes;
#pragma unroll
  for (int mask = kLanes / 2; mask > 0; mask /= 2) x += device::shuffle_xor(x, mask);
  device::sync_block();
  if (lane == 0) memory[warp] = x;
  device::sync_block();
  double total = 0.0;
#pragma unroll
  for (int i = 0; i < kWarps; ++i) total += memory[i];
  return total;
}

// Tokens of one response, whose ratio is that of all of them.
CAPO_KERNEL(kThreads, 4)
terms_of_responses(const LossTerms a) {
  double* const memory = reinterpret_cast<double*>(device::block_memory());
  const int64_t begin = a.cu_seqlens[device::block()], end = a.cu_seqlens[device::block() + 1];
  const int64_t first = (begin > 0 ? begin : 0) + device::thread(), last = end < a.rows ? end : a.rows;
  const double scale = scale_of(a.active);
  const auto live = [&](int64_t row) { return a.all_live || a.weights[row] != 0.0; };
  double total = 0.0, number = 0.0;
  for (int64_t row = first; row < last; row += kThreads)
    if (live(row)) total += own_log_ratio(a.values, row, a.logprobs[row]), number += 1.0;
  total = sum_of_block(total, memory);
  number = sum_of_block(number, memory);
  const float mean = static_cast<float>(total / number);
  const bool shared = a.rule.ratio == Ratio::kSequence;
  double through_ratio = 0.0;
  for (int64_t row = first; row < last; row += kThreads) {
    if (!live(row)) continue;
    const TokenTerms terms = terms_of(a, row, mean);
    const double weight = a.weights[row] * scale;
    double slope = terms.through_logp * weight;
    if (shared)
      through_ratio += terms.through_ratio * weight;
    else
      slope += terms.through_ratio * weight;
    a.slopes[row] = slope;
  }
  if (!shared) return;
  through_ratio = sum_of_block(through_ratio, memory) / number;
  for (int64_t row = first; row < last; row += kThreads)
    if (live(row) && a.logprobs[row] != -infinity()) a.slopes[row] += through_ratio;
}

int64_t blocks_of(int64_t items, int64_t each) { return (items + each - 1) / each; }

// Calls run.template operator()<kType>().
template <typename Run>
int by_dtype(Dtype dtype, const Run& run) {
  switch (dtype) {
    case Dtype::kFloat32:
      return run.template operator()<Dtype::kFloat32>();
    case Dtype::kBFloat16:
      return run.template operator()<Dtype::kBFloat16>();
    default:
      return run.template operator()<Dtype::kFloat16>();
  }
}

}  // namespace

size_t size_of_tiles(int64_t rows, int64_t vocab) {
  return static_cast<size_t>(rows) * static_cast<size_t>(tiles_of(vocab)) * sizeof(TileStats);
}

int read_rows(const Head& head, const Live& live, const RowResults& results, void* tiles, Stream stream) {
  const auto on = static_cast<cudaStream_t>(stream);
  const int64_t splits = splits_of(head.vocab);
  auto* const stats = static_cast<TileStats*>(tiles);
  return by_dtype(head.dtype, [&]<Dtype kType>() -> int {
    const cudaError_t error =
        device::launch(tiles_of_rows<kType>, {head.rows * splits, kThreads, 0, 1, on}, head, live, stats, splits);
    if (error != cudaSuccess) return error;
    return device::launch(results_of_rows<kType>, {blocks_of(head.rows, kWarps), kThreads, 0, 1, on}, head, live, stats,
                          results);
  });
}

int row_logprobs(const Head& head, const double* stats, float* logprobs, float* entropy, Stream stream) {
  return device::launch(logprobs_of_stats,
                        {blocks_of(head.rows, kThreads), kThreads, 0, 1, static_cast<cudaStream_t>(stream)}, head,
                        stats, logprobs, entropy);
}

int row_grads(const RowGrads& args, Stream stream) {
  const int64_t splits = splits_of(args.head.vocab);
  return by_dtype(args.head.dtype, [&]<Dtype kType>() -> int {
    return device::launch(gradient_of_rows<kType>,
                          {args.count * splits, kThreads, sizeof(GradFactors), 1, static_cast<cudaStream_t>(stream)},
                          args, splits);
  });
}

int loss_terms(const LossTerms& args, Stream stream) {
  const auto on = static_cast<cudaStream_t>(stream);
  if (args.rule.ratio == Ratio::kToken)
    return device::launch(terms_of_tokens, {blocks_of(args.rows, kThreads), kThreads, 0, 1, on}, args);
  return device::launch(terms_of_responses,
                        {args.responses, kThreads, kWarps * static_cast<int>(sizeof(double)), 1, on}, args);
}

}  // namespace capo::cuda
