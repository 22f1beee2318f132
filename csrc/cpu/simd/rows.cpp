// Row kernels: one pass for the statistics of a row of logits, one for its gradient while the row is still in the
// cache.
#include "cpu/rows.h"

#include <algorithm>
#include <cmath>
#include <limits>

#include "cpu/simd/vec.h"

namespace capo::CAPO_ISA {
namespace {

constexpr float kInfinity = std::numeric_limits<float>::infinity();
constexpr int64_t kPair = 2 * kLanes;
constexpr int64_t kLine = 64;  // bytes in a cache line

// Elements summed in float32 before their sums go on in float64.
constexpr int64_t kTile = 256 * kPair;

// Degree of the polynomial for gradients of this type: its error stays well below the rounding to that type.
template <typename T>
constexpr int kGradDegree = 5;
template <>
constexpr int kGradDegree<bf16> = 3;
template <>
constexpr int kGradDegree<fp16> = 4;

// The last, incomplete pair of vectors of a row, padded with -inf.
template <typename T>
void load_part(const T* p, int64_t count, vf& a, vf& b) {
  T elements[kPair];
  for (int i = 0; i < kPair; ++i) {
    if (i < count)
      elements[i] = p[i];
    else
      store_one(elements + i, -kInfinity);
  }
  load_pair(elements, a, b);
}

template <typename T>
void store_part(T* p, int64_t count, vf a, vf b) {
  T elements[kPair];
  store_pair(elements, a, b, false);
  std::memcpy(p, elements, count * sizeof(T));
}

template <typename T>
float max_of(const T* z, int64_t size) {
  vf best[4];
  for (vf& x : best) x = splat(-kInfinity);
  vf a, b;
  int64_t i = 0;
  for (; i + 2 * kPair <= size; i += 2 * kPair)
    for (int c = 0; c < 2; ++c) {
      load_pair(z + i + c * kPair, a, b);
      best[2 * c] = max(a, best[2 * c]);  // this order drops NaN
      best[2 * c + 1] = max(b, best[2 * c + 1]);
    }
  for (; i < size; i += kPair) {
    load_part(z + i, size - i, a, b);
    best[0] = max(max(a, best[0]), max(b, best[0]));
  }
  return horizontal_max(max(max(best[0], best[1]), max(best[2], best[3])));
}

// Sums over a row for a given offset. kInfinite: exponents are held in range, which changes nothing for finite ones.
template <typename T, bool kInfinite>
RowStats sums(const T* z, int64_t size, float rate, float offset) {
  constexpr int kChains = 4;  // hide the latency of the additions
  const Exp2<5> exp2;
  RowStats result = {offset, 0.0, 0.0, kInfinite};
  for (int64_t first = 0; first < size; first += kTile) {
    const int64_t last = size - first < kTile ? size : first + kTile;
    vf sum[kChains], centred[kChains];
    for (int c = 0; c < kChains; ++c) sum[c] = centred[c] = splat(0.f);
    const auto add = [&](vf t, int c) {
      const vf e = exp2(t);
      sum[c] += e;
      centred[c] += e * t;
    };
    const auto exponent = [&](vf x) {
      const vf t = x * rate - offset;
      return kInfinite || !kAnyExponent ? held(t) : t;
    };
    vf a, b;
    int64_t i = first;
    for (; i + 2 * kPair <= last; i += 2 * kPair)
      for (int c = 0; c < kChains; c += 2) {
        load_pair(z + i + c * kLanes, a, b);
        add(exponent(a), c);
        add(exponent(b), c + 1);
      }
    for (; i < last; i += kPair) {
      load_part(z + i, last - i, a, b);
      add(held(a * rate - offset), 0);
      add(held(b * rate - offset), 1);
    }
    result.sum += horizontal_sum((sum[0] + sum[1]) + (sum[2] + sum[3]));
    result.centred += horizontal_sum((centred[0] + centred[1]) + (centred[2] + centred[3]));
  }
  return result;
}

template <typename T>
RowStats sums(const T* z, int64_t size, float rate, float offset, bool infinite) {
  if (!infinite) {
    const RowStats result = sums<T, false>(z, size, rate, offset);
    if (!std::isnan(result.sum + result.centred)) return result;
  }
  return sums<T, true>(z, size, rate, offset);
}

template <typename T>
RowStats stats(const void* row, int64_t size, float rate, int64_t label, bool infinite) {
  const T* z = static_cast<const T*>(row);
  // The largest of a few and the label, which was sampled, is as good as the largest of all unless the sum says
  // otherwise.
  constexpr int64_t kFew = 1024;
  float top = max_of(z, size < kFew ? size : kFew);
  const float at_label = load_one(z + label);
  if (at_label > top) top = at_label;
  if (std::isfinite(top)) {
    const RowStats result = sums(z, size, rate, top * rate, infinite);
    if (result.sum > 0.0 && result.sum < 0x1p24) return result;
  }
  top = max_of(z, size);
  if (top == -kInfinity) return {top, std::nan(""), std::nan(""), true};
  return sums(z, size, rate, top * rate, infinite);
}

template <typename T, bool kInfinite, bool kCentred>
void grad_row(const T* z, T* out, int64_t size, const RowGrad& how) {
  const Exp2<kGradDegree<T>> exp2(kCentred ? 1.f : how.alpha);
  const auto grad = [&](vf x) {
    const vf t = x * how.rate - how.offset;
    const vf inside = kInfinite || !kAnyExponent ? held(t) : t;  // what becomes of padding is not stored
    vf g = exp2(inside);
    if constexpr (kCentred) g = g * (inside * how.beta + how.alpha);
    if constexpr (!kAnyExponent) g = t < kLowestExponent ? splat(0.f) : g;
    return g;
  };
  const auto part = [&](int64_t i, int64_t count) {
    vf a, b;
    load_part(z + i, count, a, b);
    store_part(out + i, count, grad(a), grad(b));
  };
  int64_t i = 0;
  if (how.stream) {  // whole cache lines only
    const int64_t beyond = static_cast<int64_t>(reinterpret_cast<uintptr_t>(out) % kLine);
    const int64_t head = beyond == 0 ? 0 : std::min(size, (kLine - beyond) / static_cast<int64_t>(sizeof(T)));
    for (; i < head; i += kPair) part(i, std::min(head - i, kPair));
    i = head;
  }
  for (; i + kPair <= size; i += kPair) {
    vf a, b;
    load_pair(z + i, a, b);
    store_pair(out + i, grad(a), grad(b), how.stream);
  }
  if (i < size) part(i, size - i);
  store_one(out + how.label, how.label_grad);
#if defined(__x86_64__)
  if (how.stream) _mm_sfence();
#endif
}

template <typename T>
void grad(const void* row, void* out, int64_t size, const RowGrad& how) {
  const bool centred = how.beta != 0.f;
  const auto run = how.infinite ? (centred ? grad_row<T, true, true> : grad_row<T, true, false>)
                                : (centred ? grad_row<T, false, true> : grad_row<T, false, false>);
  run(static_cast<const T*>(row), static_cast<T*>(out), size, how);
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
                                {load_at<float>, load_at<bf16>, load_at<fp16>}};

}  // namespace capo::CAPO_ISA
