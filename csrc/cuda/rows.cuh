// What warps do with a row of logits: statistics of its tiles, and its gradient.
//
// A tile is 1,024 columns wherever the row lies in memory and whoever reads it. A warp finds its maximum, its sum of
// 2^t and its sum of 2^t * t, in an order fixed by the columns; tiles are put together in their order, in float64. So
// the bits of a row depend neither on the number of blocks that share it nor on the alignment of its memory, and there
// is no bound on the vocabulary.
#pragma once
#include "common/rows.h"
#include "cuda/device.cuh"

namespace capo {

using device::kLanes;
using device::Vector;

constexpr int kTile = 1024;  // columns

CAPO_HD int64_t tiles_of(int64_t vocab) { return (vocab + kTile - 1) / kTile; }

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
struct Format {
  using Sum = typename SumOfLanes<kType>::Type;
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
    if constexpr (kType == Dtype::kFloat32) return static_cast<const float*>(row)[column];
    const uint32_t bits = static_cast<const uint16_t*>(row)[column];
    if constexpr (kType == Dtype::kBFloat16) return device::bits_to_float(bits << 16);
    return device::half_to_float(static_cast<uint16_t>(bits));
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

// Vectors at the end of a row, or in one that does not begin at a multiple of 16 bytes: column by column.
template <Dtype kType>
CAPO_SLOW Vector load_part(const char* row, int64_t first, int64_t vocab) {
  using F = Format<kType>;
  float x[F::kWidth];
#pragma unroll
  for (int i = 0; i < F::kWidth; ++i) x[i] = first + i < vocab ? F::load(row, first + i) : -infinity();
  return F::pack(x);
}

template <Dtype kType>
CAPO_SLOW void store_part(char* row, int64_t first, int64_t vocab, Vector x) {
  using F = Format<kType>;
#pragma unroll
  for (int i = 0; i < F::kWidth; ++i) {
    if (first + i >= vocab) break;
    const uint32_t word = x.word[i / F::kPerWord];
    if constexpr (kType == Dtype::kFloat32)
      reinterpret_cast<uint32_t*>(row)[first + i] = word;
    else
      reinterpret_cast<uint16_t*>(row)[first + i] = static_cast<uint16_t>(i % 2 ? word >> 16 : word);
  }
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
  Vector data[F::kVectors];

  CAPO_DEVICE static int64_t column(int64_t tile, int k, int lane) {
    return tile * kTile + (k * kLanes + lane) * F::kWidth;
  }
  CAPO_DEVICE static bool direct(const void* row, int64_t tile, int64_t vocab) {
    return (tile + 1) * kTile <= vocab && reinterpret_cast<uintptr_t>(row) % 16 == 0;
  }

  template <bool kKeep>
  CAPO_DEVICE void read(const char* row, int64_t tile, int64_t vocab, int lane) {
    if (direct(row, tile, vocab)) {
      const char* const from = row + column(tile, 0, lane) * F::kSize;
#pragma unroll
      for (int k = 0; k < F::kVectors; ++k)
        data[k] = kKeep ? device::load_and_keep(from + k * kLanes * 16) : device::load_once(from + k * kLanes * 16);
    } else {
#pragma unroll
      for (int k = 0; k < F::kVectors; ++k) data[k] = load_part<kType>(row, column(tile, k, lane), vocab);
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
CAPO_DEVICE void write_vector(char* row, int64_t first, int64_t vocab, bool direct, const Vector& x) {
  if (direct)
    device::store_once(row + first * Format<kType>::kSize, x);
  else
    store_part<kType>(row, first, vocab, x);
}

template <Dtype kType>
CAPO_DEVICE void write_zeros(char* row, int64_t tile, int64_t vocab, int lane) {
  using F = Format<kType>;
  const bool direct = Tile<kType>::direct(row, tile, vocab);
  const Vector zeros = {};
#pragma unroll
  for (int k = 0; k < F::kVectors; ++k)
    write_vector<kType>(row, Tile<kType>::column(tile, k, lane), vocab, direct, zeros);
}

template <Dtype kType>
CAPO_DEVICE void write_gradient(const Tile<kType>& z, char* row, int64_t tile, int64_t vocab,
                                const Exponent<kType>& exponent, const GradFactors& how, int lane) {
  using F = Format<kType>;
  const bool direct = Tile<kType>::direct(row, tile, vocab);
#pragma unroll
  for (int k = 0; k < F::kVectors; ++k) {
    const int64_t first = Tile<kType>::column(tile, k, lane);
    float x[F::kWidth];
#pragma unroll
    for (int i = 0; i < F::kWidth; ++i) {
      float t;
      const float e = exponent(F::value(z.data[k], i), t);
      x[i] = e * fmaf(how.beta, t, how.alpha);
    }
    write_vector<kType>(row, first, vocab, direct, F::pack(x));
  }
  // Over what the same lane just wrote.
  const uint64_t place = static_cast<uint64_t>(how.label - tile * kTile);
  if (place < kTile && static_cast<int>(place / F::kWidth % kLanes) == lane) {
    const float own[F::kWidth] = {how.label_grad};
    store_part<kType>(row + how.label * F::kSize, 0, 1, F::pack(own));
  }
}

// Zeros in the tiles first, first + step ... below last.
template <Dtype kType>
CAPO_DEVICE void write_zeros(char* row, int64_t first, int64_t last, int64_t step, int64_t vocab, int lane) {
  for (int64_t tile = first; tile < last; tile += step) write_zeros<kType>(row, tile, vocab, lane);
}

}  // namespace capo
