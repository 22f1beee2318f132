// One vector of floats, as wide as the instruction set this file is compiled for. Everything a row kernel needs and no
// more.
#pragma once
#include <cstdint>
#include <cstring>
#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace capo::CAPO_ISA {

struct bf16 {
  uint16_t bits;
};
struct fp16 {
  uint16_t bits;
};

#if defined(__AVX512F__)
constexpr int kLanes = 16;
#elif defined(__AVX2__)
constexpr int kLanes = 8;
#else
constexpr int kLanes = 4;
#endif

// Vector extensions of GCC and Clang give arithmetic, comparison and selection on every machine; intrinsics below stand
// only where a compiler does not find the instruction by itself.
typedef float vf __attribute__((vector_size(kLanes * 4)));
typedef int32_t vi __attribute__((vector_size(kLanes * 4)));
typedef uint32_t vu __attribute__((vector_size(kLanes * 4)));
typedef uint16_t vh __attribute__((vector_size(kLanes * 2)));

template <typename To, typename From>
inline To bit_cast(const From& from) {
  static_assert(sizeof(To) == sizeof(From));
  To to;
  std::memcpy(&to, &from, sizeof(to));
  return to;
}

inline vf splat(float x) { return vf{} + x; }

// max(a, b) lane by lane; b where either is NaN.
inline vf max(vf a, vf b) {
#if defined(__AVX512F__)
  return bit_cast<vf>(_mm512_max_ps(bit_cast<__m512>(a), bit_cast<__m512>(b)));
#elif defined(__AVX2__)
  return bit_cast<vf>(_mm256_max_ps(bit_cast<__m256>(a), bit_cast<__m256>(b)));
#else
  return a > b ? a : b;
#endif
}

// a * b + c with one rounding where the instruction set has it: kFused says so.
#if defined(__AVX512F__) || (defined(__AVX2__) && defined(__FMA__))
constexpr bool kFused = true;
#else
constexpr bool kFused = false;
#endif

inline vf multiply_add(vf a, vf b, vf c) {
#if defined(__AVX512F__)
  return bit_cast<vf>(_mm512_fmadd_ps(bit_cast<__m512>(a), bit_cast<__m512>(b), bit_cast<__m512>(c)));
#elif defined(__AVX2__) && defined(__FMA__)
  return bit_cast<vf>(_mm256_fmadd_ps(bit_cast<__m256>(a), bit_cast<__m256>(b), bit_cast<__m256>(c)));
#else
  return a * b + c;
#endif
}

inline vf round(vf x) {
#if defined(__AVX512F__)
  return bit_cast<vf>(_mm512_roundscale_ps(bit_cast<__m512>(x), 0));
#elif defined(__AVX2__)
  return bit_cast<vf>(_mm256_round_ps(bit_cast<__m256>(x), _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
#else
  const vf magic = splat(12582912.f);  // 1.5 * 2^23: adding it leaves no bits for a fraction
  return (x + magic) - magic;
#endif
}

// x * 2^n for integer n in [-126, 127].
inline vf scale_by_power_of_two(vf x, vf n) {
#if defined(__AVX512F__)
  return bit_cast<vf>(_mm512_scalef_ps(bit_cast<__m512>(x), bit_cast<__m512>(n)));
#else
  return x * bit_cast<vf>((__builtin_convertvector(n, vi) + 127) << 23);
#endif
}

inline float horizontal_max(vf x) {
  float lanes[kLanes];
  std::memcpy(lanes, &x, sizeof(x));
  float result = lanes[0];
  for (int i = 1; i < kLanes; ++i) result = lanes[i] > result ? lanes[i] : result;
  return result;
}

// Sums of floats that go on in float64.
struct DoubleSum {
  typedef float half_vf __attribute__((vector_size(kLanes * 2)));
  typedef double half_vd __attribute__((vector_size(kLanes * 4)));
  half_vd low = {}, high = {};

  void add(vf x) {
    half_vf halves[2];
    std::memcpy(halves, &x, sizeof(x));
    low += __builtin_convertvector(halves[0], half_vd);
    high += __builtin_convertvector(halves[1], half_vd);
  }

  double total() const {
    const half_vd both = low + high;
    double result = 0.0;
    for (int i = 0; i < kLanes / 2; ++i) result += both[i];
    return result;
  }
};

// ---- two vectors at a time. Element i of memory is in lane i / 2 of the even or odd vector for bf16, where that
// spares the unpacking; otherwise the first vector holds the first kLanes elements. Sums do not care and stores undo
// it.

inline void load_pair(const float* p, vf& a, vf& b) {
  std::memcpy(&a, p, sizeof(a));
  std::memcpy(&b, p + kLanes, sizeof(b));
}

inline void load_pair(const bf16* p, vf& even, vf& odd) {
  vu both;
  std::memcpy(&both, p, sizeof(both));
  even = bit_cast<vf>(both << 16);
  odd = bit_cast<vf>(both & 0xffff0000u);
}

inline vf load_half(const fp16* p) {
#if defined(__AVX512F__)
  return bit_cast<vf>(_mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p))));
#elif defined(__F16C__)
  return bit_cast<vf>(_mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))));
#else
  // The exponent is rebiased by a multiplication, which also normalises subnormal halves; infinity and NaN are patched.
  vh x;
  std::memcpy(&x, p, sizeof(x));
  const vu h = __builtin_convertvector(x, vu);
  const vu magnitude = (h & 0x7fffu) << 13;
  const vf value = bit_cast<vf>(magnitude) * 0x1p112f;
  const vu special = bit_cast<vu>((vi)(magnitude >= (0x7c00u << 13)));
  const vu bits = (special & (magnitude | 0x7f800000u)) | (~special & bit_cast<vu>(value));
  return bit_cast<vf>(bits | ((h & 0x8000u) << 16));
#endif
}

inline void load_pair(const fp16* p, vf& a, vf& b) {
  a = load_half(p);
  b = load_half(p + kLanes);
}

inline float load_one(const float* p) { return *p; }
inline float load_one(const bf16* p) { return bit_cast<float>(uint32_t{p->bits} << 16); }
inline float load_one(const fp16* p) {
  const uint32_t magnitude = (p->bits & 0x7fffu) << 13;
  uint32_t bits = bit_cast<uint32_t>(bit_cast<float>(magnitude) * 0x1p112f);
  if (magnitude >= (0x7c00u << 13)) bits = magnitude | 0x7f800000u;
  return bit_cast<float>(bits | (p->bits & 0x8000u) << 16);
}

// Writes whole vectors, past the caches if asked to; the address is then a multiple of the vector's size.
template <typename Vector>
inline void put(void* p, const Vector& x, [[maybe_unused]] bool stream) {
#if defined(__AVX512F__)
  if (stream) return _mm512_stream_si512(reinterpret_cast<__m512i*>(p), bit_cast<__m512i>(x));
#elif defined(__AVX2__)
  if (stream) return _mm256_stream_si256(reinterpret_cast<__m256i*>(p), bit_cast<__m256i>(x));
#endif
  std::memcpy(p, &x, sizeof(x));
}

inline void store_pair(float* p, vf a, vf b, bool stream) {
  put(p, a, stream);
  put(p + kLanes, b, stream);
}

// Round to nearest, ties away from zero. Finite values only: a row with NaN is filled with a constant instead.
inline void store_pair(bf16* p, vf even, vf odd, bool stream) {
  const vu low = (bit_cast<vu>(even) + 0x8000u) >> 16;
  const vu high = (bit_cast<vu>(odd) + 0x8000u) & 0xffff0000u;
  put(p, low | high, stream);
}

inline uint16_t to_fp16_bits(float x) {
  const uint32_t u = bit_cast<uint32_t>(x);
  const uint32_t sign = (u >> 16) & 0x8000u, magnitude = u & 0x7fffffffu;
  if (magnitude > 0x7f800000u) return static_cast<uint16_t>(sign | 0x7e00u);
  if (magnitude >= 0x477ff000u) return static_cast<uint16_t>(sign | 0x7c00u);  // 65520 and more
  if (magnitude < 0x38800000u) {                                               // subnormal half: let the FPU round it
    const float shifted = bit_cast<float>(magnitude) + 0.5f;
    return static_cast<uint16_t>(sign | (bit_cast<uint32_t>(shifted) - 0x3f000000u));
  }
  const uint32_t rebiased = magnitude - (112u << 23);
  return static_cast<uint16_t>(sign | ((rebiased + 0xfffu + ((rebiased >> 13) & 1u)) >> 13));
}

inline void store_pair(fp16* p, vf a, vf b, bool stream) {
#if defined(__AVX512F__)
  const __m256i low = _mm512_cvtps_ph(bit_cast<__m512>(a), _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
  const __m256i high = _mm512_cvtps_ph(bit_cast<__m512>(b), _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
  put(p, _mm512_inserti64x4(_mm512_castsi256_si512(low), high, 1), stream);
#elif defined(__F16C__)
  const __m128i low = _mm256_cvtps_ph(bit_cast<__m256>(a), _MM_FROUND_TO_NEAREST_INT);
  const __m128i high = _mm256_cvtps_ph(bit_cast<__m256>(b), _MM_FROUND_TO_NEAREST_INT);
  put(p, _mm256_set_m128i(high, low), stream);
#else
  (void)stream;
  for (int i = 0; i < kLanes; ++i) {
    p[i].bits = to_fp16_bits(a[i]);
    p[kLanes + i].bits = to_fp16_bits(b[i]);
  }
#endif
}

inline void store_one(float* p, float x) { *p = x; }
inline void store_one(bf16* p, float x) {
  p->bits = static_cast<uint16_t>(x != x ? 0x7fc0u : (bit_cast<uint32_t>(x) + 0x8000u) >> 16);
}
inline void store_one(fp16* p, float x) { p->bits = to_fp16_bits(x); }

// ---- exponential

// c0 + c1 f + ... with c0 2^f on [-1/2, 1/2]: least maximal relative error, which is 1.0e-4, 2.8e-6, 9e-8 for degree 3,
// 4, 5.
template <int kDegree>
struct Exp2 {
  vf c[kDegree + 1];

  explicit Exp2(float factor = 1.f) {
    static_assert(kDegree >= 3 && kDegree <= 5);
    constexpr float kThree[] = {1.f, 0.6932829022407532f, 0.24221095442771912f, 0.05500893294811249f};
    constexpr float kFour[] = {1.f, 0.6931241750717163f, 0.24024099111557007f, 0.055906426161527634f,
                               0.009582852944731712f};
    constexpr float kFive[] = {1.f,
                               0.6931470036506653f,
                               0.24022242426872253f,
                               0.05550733581185341f,
                               0.009671512991189957f,
                               0.001326472731307149f};
    const float* table = kDegree == 3 ? kThree : kDegree == 4 ? kFour : kFive;
    for (int i = 0; i <= kDegree; ++i) c[i] = splat(table[i] * factor);
  }

  // factor * 2^t for t in [-126, 127], NaN for NaN; with AVX-512 for any t but -inf, which gives NaN.
  vf operator()(vf t) const {
    const vf n = round(t);
    return power(t - n, n);
  }

  // The same for t = d * (rate + low), to float32 accuracy however large t is.
  vf operator()(vf d, vf t, vf rate, vf low) const {
    const vf n = round(t);
    return power((d * rate - n) + d * low, n);
  }

 private:
  vf power(vf f, vf n) const {
    vf p = c[kDegree];
    for (int i = kDegree - 1; i >= 0; --i) p = p * f + c[i];
    return scale_by_power_of_two(p, n);
  }
};

// With AVX-512 any finite exponent may be given to Exp2; elsewhere exponents have to be held in range.
#if defined(__AVX512F__)
constexpr bool kAnyExponent = true;
constexpr float kLowestExponent = -160.f;  // 2^-160 is 0 in float32
#else
constexpr bool kAnyExponent = false;
constexpr float kLowestExponent = -126.f;
#endif
constexpr float kHighestExponent = 127.f;

// x between two bounds, NaN for NaN.
inline vf hold(vf x, vf lowest, vf highest) {
  x = max(lowest, x);
  return kAnyExponent ? x : -max(-highest, -x);
}

}  // namespace capo::CAPO_ISA
