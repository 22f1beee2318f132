// What warps do with a row of logits: statistics of its tiles, and its gradient.
//
// A tile is 1,024 columns wherever the row lies in memory and whoever reads it. A warp finds its maximum, its sum of
// 2^t and its sum of 2^t * t, in an order fixed by the columns; tiles are put together in their order, in float64. So
// the bits of a row depend neither on the number of blocks that share it nor on the alignment of its memory, and there
// is no bound on the vocabulary.
//
// Memory is read and written by 16 bytes at multiples of 16 wherever a row lies. Where it begins `shift` columns behind
// one, a warp has the vectors from `shift` columns before its tile on: the gradient is made of them as they are, for
// the sums the lanes move them to the columns.
#pragma once
#include "common/rows.h"
#include "cuda/device.cuh"

namespace capo {

using device::kLanes;
using device::Vector;

constexpr int kTile = 1024;  // columns

CAPO_HD int tiles_of(int64_t vocab) { return static_cast<int>((vocab + kTile - 1) / kTile); }

struct TileStats {
  float top;
  double sum, centred;
};

CAPO_DEVICE float infinity() { return device::bits_to_float(0x7f800000u); }
CAPO_DEVICE float not_a_number() { return device::bits_to_float(0x7fc00000u); }

template <typename T>
struct TypeIs {
  using Type = T;
};
template <Dtype kType>
struct SumOfLanes : TypeIs<float> {};
template <>
struct SumOfLanes<Dtype::kFloat32> : TypeIs<double> {};
template <Dtype kType>
struct BitsOfLogit : TypeIs<uint16_t> {};
template <>
struct BitsOfLogit<Dtype::kFloat32> : TypeIs<uint32_t> {};

template <Dtype kType>
struct Format {
  using Sum = typename SumOfLanes<kType>::Type;
  using Bits = typename BitsOfLogit<kType>::Type;
  static constexpr int kSize = kType == Dtype::kFloat32 ? 4 : 2;
  static constexpr int kWidth = 16 / kSize;                   // columns in a vector
  static constexpr int kVectors = kTile / (kLanes * kWidth);  // of a tile, in one lane
  static constexpr int kPerWord = 4 / kSize;

  CAPO_DEVICE static float value(const Vector& x, int i) {
    const uint32_t word = x.word[i / kPerWord];
    if constexpr (kType == Dtype::kFloat32) return device::bits_to_float(word);
    if constexpr (kType == Dtype::kBFloat16) return device::bits_to_float(i % 2 ? word & 0xffff0000u : word << 16);
    return device::half_to_float(static_cast<uint16_t>(i % 2 ? word >> 16 : word & 0xffffu));
  }
  CAPO_DEVICE static Vector pack(const float (&x)[kWidth]) {
    Vector result;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      if constexpr (kType == Dtype::kFloat32) result.word[i] = device::float_to_bits(x[i]);
      if constexpr (kType == Dtype::kBFloat16) result.word[i] = device::pack_bf16s(x[2 * i], x[2 * i + 1]);
      if constexpr (kType == Dtype::kFloat16) result.word[i] = device::pack_halves(x[2 * i], x[2 * i + 1]);
    }
    return result;
  }
  CAPO_DEVICE static float load(const void* row, int64_t column) {
    const uint32_t bits = load_bits(row, column);
    if constexpr (kType == Dtype::kFloat32) return device::bits_to_float(bits);
    if constexpr (kType == Dtype::kBFloat16) return device::bits_to_float(bits << 16);
    return device::half_to_float(static_cast<uint16_t>(bits));
  }
  // One column, in the lower bits.
  CAPO_DEVICE static uint32_t bits(float value) {
    const float one[kWidth] = {value};
    return pack(one).word[0];
  }
  CAPO_DEVICE static uint32_t load_bits(const void* row, int64_t column) {
    return device::load_element(static_cast<const Bits*>(row) + column);
  }
  CAPO_DEVICE static void store(void* row, int64_t column, float value) {
    device::store_element(static_cast<Bits*>(row) + column, static_cast<Bits>(bits(value)));
  }
  // Columns from the last multiple of 16 bytes to the beginning of the row.
  CAPO_DEVICE static int shift_of(const void* row) {
    return static_cast<int>(reinterpret_cast<uintptr_t>(row) % 16) / kSize;
  }
};

template <Dtype kType>
CAPO_DEVICE const char* row_at(const void* base, int64_t row, int64_t stride) {
  return static_cast<const char*>(base) + row * stride * Format<kType>::kSize;
}
template <Dtype kType>
CAPO_DEVICE char* row_at(void* base, int64_t row, int64_t stride) {
  return static_cast<char*>(base) + row * stride * Format<kType>::kSize;
}

// A vector that may not be in the row as a whole: what is beside it is -inf, and not read. `aligned`: it begins at a
// multiple of 16 bytes.
template <Dtype kType>
CAPO_SLOW Vector load_some(const char* row, int64_t first, int64_t vocab, bool aligned) {
  using F = Format<kType>;
  if (aligned && first >= 0 && first + F::kWidth <= vocab) return device::load_once(row + first * F::kSize);
  float x[F::kWidth];
#pragma unroll
  for (int i = 0; i < F::kWidth; ++i)
    x[i] = first + i >= 0 && first + i < vocab ? F::load(row, first + i) : -infinity();
  return F::pack(x);
}

template <Dtype kType>
CAPO_SLOW void store_some(char* row, int64_t first, int64_t vocab, Vector x) {
  using F = Format<kType>;
  if (first >= 0 && first + F::kWidth <= vocab) return device::store_once(row + first * F::kSize, x);
#pragma unroll
  for (int i = 0; i < F::kWidth; ++i)
    if (first + i >= 0 && first + i < vocab) F::store(row, first + i, F::value(x, i));
}

// Exponents t = (z - top) * rate, held at -200, where t * 2^t is 0; NaN stays.
template <Dtype kType>
struct Exponent {
  float rate, rest, lowest, top;

  CAPO_DEVICE explicit Exponent(double exact)
      : rate(static_cast<float>(exact)), rest(static_cast<float>(exact - rate)), lowest(-200.f / rate), top(0.f) {}
  // A tile of nothing but -inf has sums of 0, one with +inf or NaN has those of NaN.
  CAPO_DEVICE void set_top(float x) { top = x == -infinity() ? 0.f : x; }
  // 2^t and t. For rows of 32 bits what rounding t leaves out is put right in the power.
  CAPO_DEVICE float operator()(float z, float& t) const {
    const float d = device::larger_or_nan(z - top, lowest);
    t = d * rate;
    const float e = device::power_of_two(t);
    if constexpr (kType != Dtype::kFloat32) return e;
    const float left_out = fmaf(d, rest, fmaf(d, rate, -t));
    return fmaf(e * static_cast<float>(kLn2), left_out, e);
  }
};

// A lane's part of a tile. Columns beyond the row are -inf.
template <Dtype kType>
struct Tile {
  using F = Format<kType>;
  using Sum = typename F::Sum;
  static constexpr int kStep = kLanes * F::kWidth;  // columns from a lane's vector to its next
  Vector data[F::kVectors];

  CAPO_DEVICE static int64_t column(int tile, int k, int lane) {
    return static_cast<int64_t>(tile) * kTile + (k * kStep + lane * F::kWidth);
  }
  // Whether those columns that are `shift` before those of the tile are all in the row.
  CAPO_DEVICE static bool whole(int64_t vocab, int tile, int shift) {
    return column(tile, 0, 0) >= shift && column(tile + 1, 0, 0) - shift <= vocab;
  }

  // The same, and none is left behind the last tile.
  CAPO_DEVICE static bool whole_to_end(int64_t vocab, int tile, int shift) {
    const int64_t end = column(tile + 1, 0, 0);
    return whole(vocab, tile, shift) && (end < vocab || end - shift == vocab);
  }

  // Those columns of a whole tile.
  template <bool kKeep>
  CAPO_DEVICE void read(const char* row, int tile, int shift, int lane) {
    const char* const from = row + (column(tile, 0, lane) - shift) * F::kSize;
#pragma unroll
    for (int k = 0; k < F::kVectors; ++k)
      data[k] = kKeep ? device::load_and_keep(from + k * kLanes * 16) : device::load_once(from + k * kLanes * 16);
  }

  // For to_columns: those for the shift of the row if that is a whole tile, else the columns of the tile. Gives in lane
  // i column i of the last `shift` ones.
  template <bool kKeep>
  CAPO_DEVICE uint32_t read_for_columns(const char* row, int64_t vocab, int tile, int lane) {
    const int shift = F::shift_of(row);
    if (whole(vocab, tile, shift)) {
      const int64_t end = column(tile + 1, 0, 0) - shift + lane;
      const uint32_t rest = lane < shift && end < vocab ? F::load_bits(row, end) : F::bits(-infinity());
      read<kKeep>(row, tile, shift, lane);
      return rest;
    }
    const int64_t first = column(tile, 0, lane);
    const int count = vocab - first < kTile ? static_cast<int>(vocab - first) : kTile;
    const auto bits_of = [&](int i) { return i < count ? F::load_bits(row, first + i) : F::bits(-infinity()); };
#pragma unroll
    for (int k = 0; k < F::kVectors; ++k)
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const int place = k * kStep + i * F::kPerWord;
        data[k].word[i] = bits_of(place);
        if constexpr (F::kPerWord == 2) data[k].word[i] |= bits_of(place + 1) << 16;
      }
    return 0;
  }

  CAPO_DEVICE void to_columns(uint32_t rest, const char* row, int64_t vocab, int tile, int lane) {
    const int shift = F::shift_of(row);
    if (shift == 0 || !whole(vocab, tile, shift)) return;
    if constexpr (F::kPerWord == 2) rest |= device::shuffle_xor(rest, 1) << 16;  // two columns in every other lane
    const int bytes = shift * F::kSize;
    switch (bytes / 4) {
      case 0:
        return to_columns<0>(rest, bytes % 4 * 8, lane);
      case 1:
        return to_columns<1>(rest, bytes % 4 * 8, lane);
      case 2:
        return to_columns<2>(rest, bytes % 4 * 8, lane);
      default:
        return to_columns<3>(rest, bytes % 4 * 8, lane);
    }
  }

  // In shared memory a tile lies as its lanes have it.
  CAPO_DEVICE void put(char* memory, int lane) const {
#pragma unroll
    for (int k = 0; k < F::kVectors; ++k) reinterpret_cast<Vector*>(memory)[k * kLanes + lane] = data[k];
  }
  CAPO_DEVICE void get(const char* memory, int lane) {
#pragma unroll
    for (int k = 0; k < F::kVectors; ++k) data[k] = reinterpret_cast<const Vector*>(memory)[k * kLanes + lane];
  }

  CAPO_DEVICE TileStats stats(Exponent<kType> exponent) const {
    float top = -infinity();
#pragma unroll
    for (int k = 0; k < F::kVectors; ++k)
#pragma unroll
      for (int i = 0; i < F::kWidth; ++i) top = fmaxf(top, F::value(data[k], i));  // drops NaN
#pragma unroll
    for (int mask = kLanes / 2; mask > 0; mask /= 2) top = fmaxf(top, device::shuffle_xor(top, mask));
    exponent.set_top(top);
    float sum[F::kVectors], centred[F::kVectors];
#pragma unroll
    for (int k = 0; k < F::kVectors; ++k) {
      float e[F::kWidth], m[F::kWidth];
#pragma unroll
      for (int i = 0; i < F::kWidth; ++i) {
        float t;
        e[i] = exponent(F::value(data[k], i), t);
        m[i] = e[i] * t;
      }
      sum[k] = pairwise(e);
      centred[k] = pairwise(m);
    }
    Sum total = pairwise(sum), total_centred = pairwise(centred);
#pragma unroll
    for (int mask = kLanes / 2; mask > 0; mask /= 2) {
      total += device::shuffle_xor(total, mask);
      total_centred += device::shuffle_xor(total_centred, mask);
    }
    return {top, total, total_centred};
  }

 private:
  // Each vector becomes the four words from `bits` behind its word kFrom on, which go on in that of the next lane.
  template <int kFrom>
  CAPO_DEVICE void to_columns(uint32_t rest, int bits, int lane) {
#pragma unroll
    for (int k = 0; k < F::kVectors; ++k) {
      uint32_t x[8] = {data[k].word[0], data[k].word[1], data[k].word[2], data[k].word[3]};
#pragma unroll
      for (int i = 0; i < kFrom + F::kPerWord - 1; ++i) {
        const uint32_t below = k + 1 < F::kVectors ? data[k + 1].word[i] : device::shuffle(rest, i * F::kPerWord);
        x[4 + i] = device::shuffle(lane == 0 ? below : x[i], (lane + 1) % kLanes);
      }
#pragma unroll
      for (int i = 0; i < 4; ++i) data[k].word[i] = device::shift_right(x[kFrom + i], x[kFrom + i + 1], bits);
    }
  }

  template <int kCount>
  CAPO_DEVICE static float pairwise(float (&x)[kCount]) {
#pragma unroll
    for (int distance = kCount / 2; distance > 0; distance /= 2)
#pragma unroll
      for (int i = 0; i < distance; ++i) x[i] += x[i + distance];
    return x[0];
  }
};

// Stats of a row from those of its tiles, by one warp: the same in all lanes.
CAPO_SLOW RowStats put_together(const TileStats* tiles, int64_t count, double rate, int lane) {
  float top = -infinity();
  for (int64_t i = lane; i < count; i += kLanes) top = fmaxf(top, tiles[i].top);
#pragma unroll
  for (int mask = kLanes / 2; mask > 0; mask /= 2) top = fmaxf(top, device::shuffle_xor(top, mask));
  double sum = 0.0, centred = 0.0;
  for (int64_t i = lane; i < count; i += kLanes) {
    const TileStats tile = tiles[i];
    const bool empty = tile.top == -infinity();
    const double shift = empty ? 0.0 : (static_cast<double>(tile.top) - top) * rate;
    const double scale = empty ? 1.0 : exp2(shift);
    sum += tile.sum * scale;
    centred += (tile.centred + (empty ? 0.0 : tile.sum * shift)) * scale;
  }
#pragma unroll
  for (int mask = kLanes / 2; mask > 0; mask /= 2) {
    sum += device::shuffle_xor(sum, mask);
    centred += device::shuffle_xor(centred, mask);
  }
  if (top == -infinity()) {  // nothing but -inf, or NaN besides: whoever adds up parts of a row has to know
    if (isnan(sum)) top = not_a_number();
    sum = centred = static_cast<double>(not_a_number());
  }
  return {top, sum, centred, false};
}

// How a block of a row writes its gradient; factors in float32.
struct GradFactors {
  float top, alpha, beta;
  float label_grad;
  bool zero;
  int64_t label;
};

CAPO_SLOW GradFactors grad_factors(const Row& row, double g, double h, float temperature, int64_t label) {
  const RowFactors exact = row_factors(row, g, h, temperature);
  GradFactors how = {row.stats.top,
                     static_cast<float>(exact.alpha),
                     static_cast<float>(exact.beta),
                     exact.label_grad,
                     g == 0.0 && h == 0.0,
                     label};
  const bool finite = isfinite(exact.alpha) && isfinite(exact.beta) && isfinite(exact.label_grad);
  if (!finite && !how.zero) how.alpha = how.label_grad = not_a_number();
  return how;
}

template <Dtype kType>
CAPO_DEVICE float gradient(float logit, const Exponent<kType>& exponent, const GradFactors& how) {
  float t;
  const float e = exponent(logit, t);
  return e * fmaf(how.beta, t, how.alpha);
}

template <Dtype kType>
CAPO_DEVICE Vector gradient(const Vector& logits, const Exponent<kType>& exponent, const GradFactors& how) {
  using F = Format<kType>;
  float x[F::kWidth];
#pragma unroll
  for (int i = 0; i < F::kWidth; ++i) x[i] = gradient(F::value(logits, i), exponent, how);
  return F::pack(x);
}

// The gradient is written tile by tile, each from shift_of(grad) columns before it on, the last one up to the end of
// the row. Whether such a tile is one of `Tile`:
template <Dtype kType>
CAPO_DEVICE bool is_whole(const char* logits, const char* grad, int64_t vocab, int tile) {
  const int shift = Format<kType>::shift_of(grad);
  return Format<kType>::shift_of(logits) == shift && Tile<kType>::whole_to_end(vocab, tile, shift);
}

template <Dtype kType>
CAPO_DEVICE void write_gradient(const Tile<kType>& z, char* grad, int tile, const Exponent<kType>& exponent,
                                const GradFactors& how, int64_t label, float label_grad, int lane) {
  using F = Format<kType>;
  const int shift = F::shift_of(grad);
  char* const to = grad + (Tile<kType>::column(tile, 0, lane) - shift) * F::kSize;
#pragma unroll
  for (int k = 0; k < F::kVectors; ++k) device::store_once(to + k * kLanes * 16, gradient(z.data[k], exponent, how));
  // Over what the same lane just wrote.
  const uint64_t place = static_cast<uint64_t>(label + shift - Tile<kType>::column(tile, 0, 0));
  if (place < kTile && static_cast<int>(place / F::kWidth % kLanes) == lane) F::store(grad, label, label_grad);
}

// The same where the tile is not whole.
template <Dtype kType>
CAPO_SLOW void write_gradient_in_part(const char* logits, char* grad, int64_t vocab, int tile, double rate,
                                      const GradFactors* factors) {
  using F = Format<kType>;
  const GradFactors how = *factors;
  const int lane = device::thread() % kLanes;
  Exponent<kType> exponent(rate);
  exponent.set_top(how.top);
  const int shift = F::shift_of(grad);
  const bool together = F::shift_of(logits) == shift;
  for (int k = 0; k < F::kVectors + (tile + 1 == tiles_of(vocab)); ++k) {
    const int64_t first = Tile<kType>::column(tile, k, lane) - shift;
    if (first >= vocab) break;
    const Vector z = load_some<kType>(logits, first, vocab, together);
    store_some<kType>(grad, first, vocab, gradient(z, exponent, how));
    const uint64_t place = static_cast<uint64_t>(how.label - first);
    if (place < F::kWidth && how.label < vocab) F::store(grad, how.label, how.label_grad);
  }
}

// Zeros in the tiles first, first + step ... below last.
template <Dtype kType>
CAPO_DEVICE void write_zeros(char* grad, int first, int last, int step, int64_t vocab, int lane) {
  using F = Format<kType>;
  const int shift = F::shift_of(grad);
  for (int tile = first; tile < last; tile += step) {
    if (Tile<kType>::whole_to_end(vocab, tile, shift)) {
      char* const to = grad + (Tile<kType>::column(tile, 0, lane) - shift) * F::kSize;
#pragma unroll
      for (int k = 0; k < F::kVectors; ++k) device::store_once(to + k * kLanes * 16, Vector{});
    } else {
      for (int k = 0; k < F::kVectors + (tile + 1 == tiles_of(vocab)); ++k)
        store_some<kType>(grad, Tile<kType>::column(tile, k, lane) - shift, vocab, Vector{});
    }
  }
}

}  // namespace capo
