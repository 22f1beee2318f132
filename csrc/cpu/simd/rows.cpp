// Row kernels: one pass for the statistics of a row of logits, one for its gradient while the row is still in the cache.
#include "cpu/rows.h"

#include <cmath>
#include <limits>

#include "cpu/simd/vec.h"

namespace capo::CAPO_ISA {
namespace {

constexpr float kInfinity = std::numeric_limits<float>::infinity();
constexpr float kLog2e = 1.44269504088896341f;
// Below e^-80 of the largest term nothing changes a float32 sum; the limit keeps exponents in range and -inf out of products.
constexpr float kLowest = -80.f;

// Elements summed before their partial sums are added to the row's: short runs keep float32 rounding small.
constexpr int64_t kTile = 2048;

template <typename T>
struct Exp {  // for the sum: float32 accuracy
  static vf sum(vf d) { return exp2<5>(d * kLog2e); }
  static vf grad(vf d) { return exp2<4>(d * kLog2e); }  // its result is rounded to 16 bits
};
template <>
struct Exp<float> {
  static vf sum(vf d) { return exp(d); }
  static vf grad(vf d) { return exp(d); }
};
template <>
struct Exp<bf16> : Exp<void> {
  static vf grad(vf d) { return exp2<3>(d * kLog2e); }  // 8 bits remain
};

// The last, incomplete vector of a row, padded with -inf, which adds nothing to any sum.
template <typename T>
vf load_tail(const T* p, int64_t count) {
  float lanes[kLanes];
  for (int i = 0; i < kLanes; ++i) lanes[i] = i < count ? load_one(p + i) : -kInfinity;
  return load(lanes);
}

struct Sums {
  vf sum, centred;
};

// Sums over `count` elements against the maximum m; four independent chains hide the latency of the additions.
template <typename T>
Sums tile_sums(const T* z, int64_t count, float m, float s) {
  constexpr int kChains = 4;
  vf sum[kChains], centred[kChains];
  for (int c = 0; c < kChains; ++c) sum[c] = centred[c] = splat(0.f);
  const vf lowest = splat(kLowest);
  const auto add = [&](vf x, int c) {
    const vf d = max(lowest, (x - m) * s);  // this order keeps NaN
    const vf e = Exp<T>::sum(d);
    sum[c] += e;
    centred[c] += e * d;
  };
  int64_t i = 0;
  for (; i + kChains * kLanes <= count; i += kChains * kLanes)
    for (int c = 0; c < kChains; ++c) add(load(z + i + c * kLanes), c);
  for (; i + kLanes <= count; i += kLanes) add(load(z + i), 0);
  if (i < count) add(load_tail(z + i, count - i), 0);
  return {(sum[0] + sum[1]) + (sum[2] + sum[3]), (centred[0] + centred[1]) + (centred[2] + centred[3])};
}

template <typename T>
float tile_max(const T* z, int64_t count) {
  constexpr int kChains = 4;
  vf best[kChains];
  for (int c = 0; c < kChains; ++c) best[c] = splat(-kInfinity);
  int64_t i = 0;
  for (; i + kChains * kLanes <= count; i += kChains * kLanes)
    for (int c = 0; c < kChains; ++c) best[c] = max(load(z + i + c * kLanes), best[c]);  // this order drops NaN
  for (; i + kLanes <= count; i += kLanes) best[0] = max(load(z + i), best[0]);
  if (i < count) best[0] = max(load_tail(z + i, count - i), best[0]);
  return horizontal_max(max(max(best[0], best[1]), max(best[2], best[3])));
}

template <typename T>
bool has_nan(const T* z, int64_t count) {
  for (int64_t i = 0; i < count; ++i)
    if (std::isnan(load_one(z + i))) return true;
  return false;
}

template <typename T>
RowStats stats(const void* row, int64_t size, float s) {
  const T* z = static_cast<const T*>(row);
  float m = -kInfinity;
  vf sum = splat(0.f), centred = splat(0.f);
  for (int64_t first = 0; first < size; first += kTile) {
    const int64_t count = size - first < kTile ? size - first : kTile;
    const float tile = tile_max(z + first, count);
    if (tile > m) {
      if (m != -kInfinity) {  // what was summed against the old maximum is rescaled to the new one
        const float shift = (m - tile) * s;
        const float factor = std::exp(shift);
        centred = factor == 0.f ? splat(0.f) : (centred + sum * shift) * factor;
        sum = sum * factor;
      }
      m = tile;
    } else if (m == -kInfinity) {  // nothing but -inf so far, or NaN
      if (has_nan(z + first, count)) return {m, std::nanf(""), std::nanf("")};
      continue;
    }
    const Sums part = tile_sums(z + first, count, m, s);
    sum += part.sum;
    centred += part.centred;
  }
  return {m, static_cast<float>(horizontal_sum(sum)), static_cast<float>(horizontal_sum(centred))};
}

template <typename T>
void stream_or_store(T* p, vf low, vf high, bool stream) {
#if defined(__AVX512F__)
  if (stream) {
    if constexpr (sizeof(T) == 4) {
      _mm512_stream_ps(reinterpret_cast<float*>(p), bit_cast<__m512>(low));
      _mm512_stream_ps(reinterpret_cast<float*>(p) + kLanes, bit_cast<__m512>(high));
    } else {
      alignas(64) T both[2 * kLanes];
      store(both, low);
      store(both + kLanes, high);
      _mm512_stream_si512(reinterpret_cast<__m512i*>(p), _mm512_load_si512(both));
    }
    return;
  }
#elif defined(__AVX2__)
  if (stream) {
    alignas(32) T both[2 * kLanes];
    store(both, low);
    store(both + kLanes, high);
    for (size_t i = 0; i < sizeof(both) / 32; ++i)
      _mm256_stream_si256(reinterpret_cast<__m256i*>(p) + i, _mm256_load_si256(reinterpret_cast<__m256i*>(both) + i));
    return;
  }
#else
  (void)stream;
#endif
  store(p, low);
  store(p + kLanes, high);
}

template <typename T, bool kCentred>
void grad_row(const T* z, T* out, int64_t size, const RowGrad& how, const T* next) {
  const vf m = splat(how.max), s = splat(how.inverse_temperature), lowest = splat(kLowest);
  const auto grad = [&](vf x) {
    const vf d = (x - m) * s;
    const vf held = max(lowest, d);
    const vf e = Exp<T>::grad(held);
    vf factor = splat(how.alpha);
    if constexpr (kCentred) factor = factor + held * how.beta;
    return d < lowest ? splat(0.f) : e * factor;
  };
  const auto one = [&](int64_t i) {
    float lanes[kLanes];
    store(lanes, grad(splat(load_one(z + i))));
    store_one(out + i, lanes[0]);
  };
  constexpr int64_t kStride = 2 * kLanes;
  constexpr size_t kLine = 64;
  int64_t i = 0;
  if (how.stream)  // streaming stores need aligned addresses
    for (; i < size && reinterpret_cast<uintptr_t>(out + i) % kLine != 0; ++i) one(i);
  for (; i + kStride <= size; i += kStride) {
    if (next != nullptr) __builtin_prefetch(reinterpret_cast<const char*>(next + i), 0, 2);
    stream_or_store(out + i, grad(load(z + i)), grad(load(z + i + kLanes)), how.stream);
  }
  for (; i < size; ++i) one(i);
  store_one(out + how.label, how.label_grad);
}

template <typename T>
void grad(const void* row, void* out, int64_t size, const RowGrad& how, const void* next) {
  const auto run = how.beta != 0.f ? grad_row<T, true> : grad_row<T, false>;
  run(static_cast<const T*>(row), static_cast<T*>(out), size, how, static_cast<const T*>(next));
}

template <typename T>
void fill(void* out, int64_t size, float value) {
  T* p = static_cast<T*>(out);
  if (value == 0.f) {
    std::memset(p, 0, size * sizeof(T));
    return;
  }
  for (int64_t i = 0; i < size; ++i) store_one(p + i, value);
}

template <typename T>
void scale(void* values, int64_t size, float factor) {
  T* p = static_cast<T*>(values);
  int64_t i = 0;
  for (; i + kLanes <= size; i += kLanes) store(p + i, load(p + i) * factor);
  for (; i < size; ++i) store_one(p + i, load_one(p + i) * factor);
}

template <typename T>
float load_at(const void* row, int64_t index) {
  return load_one(static_cast<const T*>(row) + index);
}

}  // namespace

#define CAPO_STRING(x) #x
#define CAPO_NAME(x) CAPO_STRING(x)
extern const RowKernels kRowKernels;
const RowKernels kRowKernels = {CAPO_NAME(CAPO_ISA),
                                {stats<float>, stats<bf16>, stats<fp16>},
                                {grad<float>, grad<bf16>, grad<fp16>},
                                {fill<float>, fill<bf16>, fill<fp16>},
                                {scale<float>, scale<bf16>, scale<fp16>},
                                {load_at<float>, load_at<bf16>, load_at<fp16>}};

}  // namespace capo::CAPO_ISA
