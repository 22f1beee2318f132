// One vector of floats, as wide as the instruction set this file is compiled for. Everything a row kernel needs and no more.
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

// Vector extensions of GCC and Clang give arithmetic, comparison and selection on every machine; intrinsics below stand only
// where a compiler does not find the instruction by itself.
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

inline double horizontal_sum(vf x) {
  float lanes[kLanes];
  std::memcpy(lanes, &x, sizeof(x));
  double result = 0;
  for (int i = 0; i < kLanes; ++i) result += lanes[i];
  return result;
}

// ---- loads and stores, one vector from any address

inline vf load(const float* p) {
  vf x;
  std::memcpy(&x, p, sizeof(x));
  return x;
}

inline vu widen(const uint16_t* p) {
  vh x;
  std::memcpy(&x, p, sizeof(x));
#if defined(__AVX512F__)
  return bit_cast<vu>(_mm512_cvtepu16_epi32(bit_cast<__m256i>(x)));
#elif defined(__AVX2__)
  return bit_cast<vu>(_mm256_cvtepu16_epi32(bit_cast<__m128i>(x)));
#else
  return __builtin_convertvector(x, vu);
#endif
}

inline vf load(const bf16* p) { return bit_cast<vf>(widen(&p->bits) << 16); }

inline vf load(const fp16* p) {
#if defined(__AVX512F__)
  return bit_cast<vf>(_mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p))));
#elif defined(__F16C__)
  return bit_cast<vf>(_mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))));
#else
  // The exponent is rebiased by a multiplication, which also normalises subnormal halves; infinity and NaN are patched.
  const vu h = widen(&p->bits);
  const vu magnitude = (h & 0x7fffu) << 13;
  const vf value = bit_cast<vf>(magnitude) * 0x1p112f;
  const vu special = bit_cast<vu>((vi)(magnitude >= (0x7c00u << 13)));
  const vu bits = (special & (magnitude | 0x7f800000u)) | (~special & bit_cast<vu>(value));
  return bit_cast<vf>(bits | ((h & 0x8000u) << 16));
#endif
}

inline float load_one(const float* p) { return *p; }
inline float load_one(const bf16* p) { return bit_cast<float>(uint32_t{p->bits} << 16); }
inline float load_one(const fp16* p) {
  const uint32_t magnitude = (p->bits & 0x7fffu) << 13;
  uint32_t bits = bit_cast<uint32_t>(bit_cast<float>(magnitude) * 0x1p112f);
  if (magnitude >= (0x7c00u << 13)) bits = magnitude | 0x7f800000u;
  return bit_cast<float>(bits | (p->bits & 0x8000u) << 16);
}

inline void store(float* p, vf x) { std::memcpy(p, &x, sizeof(x)); }

// Round to nearest, ties to even. A NaN would need care: gradients of rows with NaN are written as a constant instead.
inline vh to_bf16_bits(vf x) {
  const vu u = bit_cast<vu>(x);
  const vu rounded = (u + 0x7fffu + ((u >> 16) & 1u)) >> 16;
#if defined(__AVX512F__)
  return bit_cast<vh>(_mm512_cvtepi32_epi16(bit_cast<__m512i>(rounded)));
#else
  return __builtin_convertvector(rounded, vh);
#endif
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

inline void store(bf16* p, vf x) {
  const vh bits = to_bf16_bits(x);
  std::memcpy(p, &bits, sizeof(bits));
}

inline void store(fp16* p, vf x) {
#if defined(__AVX512F__)
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p),
                      _mm512_cvtps_ph(bit_cast<__m512>(x), _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
#elif defined(__F16C__)
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm256_cvtps_ph(bit_cast<__m256>(x), _MM_FROUND_TO_NEAREST_INT));
#else
  for (int i = 0; i < kLanes; ++i) p[i].bits = to_fp16_bits(x[i]);
#endif
}

inline void store_one(float* p, float x) { *p = x; }
inline void store_one(bf16* p, float x) {
  const uint32_t u = bit_cast<uint32_t>(x);
  p->bits = static_cast<uint16_t>(x != x ? 0x7fc0u : (u + 0x7fffu + ((u >> 16) & 1u)) >> 16);
}
inline void store_one(fp16* p, float x) { p->bits = to_fp16_bits(x); }

// ---- exponentials

// 2^x for x in [-126, 127], NaN for NaN. Relative error by degree: 3: 1.0e-4, 4: 2.8e-6, 5: 9e-8, before rounding.
// Coefficients: least maximal relative error on [-1/2, 1/2] with constant term 1.
template <int kDegree>
inline vf exp2(vf x) {
  const vf n = round(x);
  const vf f = x - n;
  vf p;
  if constexpr (kDegree == 3) {
    p = splat(0.05500893294811249f);
    p = p * f + 0.24221095442771912f;
    p = p * f + 0.6932829022407532f;
  } else if constexpr (kDegree == 4) {
    p = splat(0.009582852944731712f);
    p = p * f + 0.055906426161527634f;
    p = p * f + 0.24024099111557007f;
    p = p * f + 0.6931241750717163f;
  } else {
    static_assert(kDegree == 5);
    p = splat(0.001326472731307149f);
    p = p * f + 0.009671512991189957f;
    p = p * f + 0.05550733581185341f;
    p = p * f + 0.24022242426872253f;
    p = p * f + 0.6931470036506653f;
  }
  p = p * f + 1.f;
  return scale_by_power_of_two(p, n);
}

// e^x for x in [-87, 88], NaN for NaN, to about one unit in the last place.
inline vf exp(vf x) {
  const vf n = round(x * 1.44269504088896341f);
  vf f = x - n * 0.693359375f;       // ln 2 in two parts: the product with the first is exact
  f = f + n * 2.12194440054690583e-4f;
  vf p = splat(0.0013843653723597527f);
  p = p * f + 0.00837415549904108f;
  p = p * f + 0.04166800156235695f;
  p = p * f + 0.16666431725025177f;
  p = p * f + 0.4999999403953552f;
  p = p * f + 1.f;
  p = p * f + 1.f;
  return scale_by_power_of_two(p, n);
}

}  // namespace capo::CAPO_ISA
