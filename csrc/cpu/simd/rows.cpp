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
constexpr int64_t kLine = 64;     // bytes in a cache line
constexpr int64_t kAhead = 4096;  // bytes; the hardware's own prefetching stops at the end of a page

// Elements summed in float32 before their sums go on in float64: few, as beside a 1 they lose digits.
constexpr int64_t kTile = 64 * kPair;

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

// Powers of two of the logits of a row: 2^t with t = (x - top) * rate. kHeld: t is held in range, which changes nothing
// in the result for finite x.
template <typename T, int kDegree, bool kHeld>
struct Powers {
  const Exp2<kDegree> exp2;
  const vf top, rate, low, lowest, highest;

  Powers(float factor, float largest, double r)
      : exp2(factor),
        top(splat(largest)),
        rate(splat(static_cast<float>(r))),
        low(splat(static_cast<float>(r - static_cast<float>(r)))),
        lowest(splat(static_cast<float>(kLowestExponent / r))),
        highest(splat(static_cast<float>(kHighestExponent / r))) {}

  vf operator()(vf x, vf& t) const {
    vf d = x - top;  // exactly 0 at the top: confident rows stay exact
    if constexpr (kHeld || !kAnyExponent) d = hold(d, lowest, highest);
    t = d * rate;
    if constexpr (sizeof(T) == 4) return exp2(d, t, rate, low);
    return exp2(t);
  }
};

template <typename T, bool kInfinite>
RowStats sums(const T* z, int64_t size, double rate, float top) {
  constexpr int kChains = 4;  // hide the latency of the additions
  const Powers<T, 5, kInfinite> power(1.f, top, rate);
  const Powers<T, 5, true> power_of_part(1.f, top, rate);
  DoubleSum total, total_centred;
  for (int64_t first = 0; first < size; first += kTile) {
    const int64_t last = size - first < kTile ? size : first + kTile;
    vf sum[kChains], centred[kChains];
    for (int c = 0; c < kChains; ++c) sum[c] = centred[c] = splat(0.f);
    const auto add = [&](const auto& power_of, vf x, int c) {
      vf t;
      const vf e = power_of(x, t);
      sum[c] += e;
      centred[c] += e * t;
    };
    vf a, b;
    int64_t i = first;
    for (; i + 2 * kPair <= last; i += 2 * kPair)
      for (int c = 0; c < kChains; c += 2) {
        __builtin_prefetch(reinterpret_cast<const char*>(z + i + c * kLanes) + kAhead);
        load_pair(z + i + c * kLanes, a, b);
        add(power, a, c);
        add(power, b, c + 1);
      }
    for (; i < last; i += kPair) {
      load_part(z + i, last - i, a, b);
      add(power_of_part, a, 0);
      add(power_of_part, b, 1);
    }
    total.add((sum[0] + sum[1]) + (sum[2] + sum[3]));
    total_centred.add((centred[0] + centred[1]) + (centred[2] + centred[3]));
  }
  return {top, total.total(), total_centred.total(), kInfinite};
}

template <typename T>
RowStats sums(const T* z, int64_t size, double rate, float top, bool infinite) {
  if (!infinite) {
    const RowStats result = sums<T, false>(z, size, rate, top);
    if (!std::isnan(result.sum + result.centred)) return result;
  }
  return sums<T, true>(z, size, rate, top);
}

template <typename T>
RowStats stats(const void* row, int64_t size, double rate, int64_t label, bool infinite) {
  const T* z = static_cast<const T*>(row);
  // The largest of a few and the label, which was sampled, is as good as the largest of all unless the sum says
  // otherwise.
  constexpr int64_t kFew = 1024;
  float top = max_of(z, size < kFew ? size : kFew);
  const float at_label = load_one(z + label);
  if (at_label > top) top = at_label;
  if (std::isfinite(top)) {
    const RowStats result = sums(z, size, rate, top, infinite);
    if (result.sum > 0.0 && result.sum < 0x1p24) return result;
  }
  top = max_of(z, size);
  if (top == -kInfinity) return {top, std::nan(""), std::nan(""), true};
  return sums(z, size, rate, top, infinite);
}

template <typename T, bool kInfinite, bool kCentred>
void grad_row(const T* z, T* out, int64_t size, const RowGrad& how) {
  // In 16 bits t is made in one multiply-add: what rounding top * rate shifts all exponents by is known and put right
  // in the factors.
  constexpr bool kShifted = sizeof(T) == 2 && kFused;
  const float rate = static_cast<float>(how.rate);
  const float offset = how.top * rate;
  const double shift = kShifted ? static_cast<double>(how.top) * rate - offset : 0.0;
  const double back = std::exp2(-shift);
  const float alpha = static_cast<float>((how.alpha - how.beta * shift) * back);
  const float beta = static_cast<float>(how.beta * back);
  const Powers<T, kGradDegree<T>, kInfinite> power(kCentred ? 1.f : alpha, how.top, how.rate);
  const auto grad = [&](vf x) {
    vf t, g;
    if constexpr (kShifted) {
      t = multiply_add(x, splat(rate), splat(-offset));
      if constexpr (kInfinite || !kAnyExponent) t = hold(t, splat(kLowestExponent), splat(kHighestExponent));
      g = power.exp2(t);
    } else {
      g = power(x, t);
    }
    if constexpr (kCentred) g = g * (t * beta + alpha);
    if constexpr (!kAnyExponent) g = t < kLowestExponent + 1.f ? splat(0.f) : g;
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
  if (how.label >= 0) store_one(out + how.label, how.label_grad);
#if defined(__x86_64__)
  if (how.stream) _mm_sfence();
#endif
}

template <typename T>
void grad(const void* row, void* out, int64_t size, const RowGrad& how) {
  const bool centred = how.beta != 0.0;
  const auto run = how.infinite ? (centred ? grad_row<T, true, true> : grad_row<T, true, false>)
                                : (centred ? grad_row<T, false, true> : grad_row<T, false, false>);
  run(static_cast<const T*>(row), static_cast<T*>(out), size, how);
}

template <typename T>
void fill(void* out, int64_t size, float value, bool stream) {
  constexpr int64_t kWhole = kLanes * 4 / sizeof(T);  // elements in one vector
  T element, elements[kWhole];
  store_one(&element, value);
  std::fill(elements, elements + kWhole, element);
  vf whole;
  std::memcpy(&whole, elements, sizeof(whole));
  T* p = static_cast<T*>(out);
  if (size < kWhole) {
    for (int64_t i = 0; i < size; ++i) p[i] = element;
    return;
  }
  // The first and the last vector may overlap with those between them, which are aligned.
  put(p, whole, false);
  put(p + size - kWhole, whole, false);
  const auto misplaced = static_cast<int64_t>(reinterpret_cast<uintptr_t>(p) % sizeof(whole) / sizeof(T));
  for (int64_t i = kWhole - misplaced; i + kWhole <= size; i += kWhole) put(p + i, whole, stream);
#if defined(__x86_64__)
  if (stream) _mm_sfence();
#endif
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
