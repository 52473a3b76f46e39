// Thin SIMD vectors, one instruction set per translation unit (PG_LEVEL 0 baseline, 1 AVX2 + FMA + F16C, 2 AVX-512
// F/BW/DQ/VL): Float, Double (arithmetic), Word (uint32), 16-bit conversions (round to nearest even, NaN stays NaN),
// Wide<V, U> (U vectors). fma is fused wherever the instruction set has it; the x86 baseline (SSE2) rounds twice.
#pragma once
#include <string.h>

#include "convert.h"
#include "exp.h"
#if PG_LEVEL > 0
#include <immintrin.h>
#elif defined(__aarch64__)
#include <arm_neon.h>
#endif

namespace pyguide {
namespace {

// ---- vectors ------------------------------------------------------------------------------------------------------
#define PG_OPERATORS(V, ADD, SUB, MUL, DIV)                                 \
  PG_INLINE V operator+(const V& a, const V& b) { return {ADD(a.v, b.v)}; } \
  PG_INLINE V operator-(const V& a, const V& b) { return {SUB(a.v, b.v)}; } \
  PG_INLINE V operator*(const V& a, const V& b) { return {MUL(a.v, b.v)}; } \
  PG_INLINE V operator/(const V& a, const V& b) { return {DIV(a.v, b.v)}; }

#if PG_LEVEL == 2
#define PG_ISA avx512
struct Float {
  typedef float Scalar;
  static constexpr int width = 16;
  __m512 v;
  static PG_INLINE Float set(float x) { return {_mm512_set1_ps(x)}; }
  static PG_INLINE Float load(const float* p) { return {_mm512_loadu_ps(p)}; }
  PG_INLINE void store(float* p) const { _mm512_storeu_ps(p, v); }
};
struct Double {
  typedef double Scalar;
  static constexpr int width = 8;
  __m512d v;
  static PG_INLINE Double set(double x) { return {_mm512_set1_pd(x)}; }
  static PG_INLINE Double load(const double* p) { return {_mm512_loadu_pd(p)}; }
  PG_INLINE void store(double* p) const { _mm512_storeu_pd(p, v); }
};
PG_OPERATORS(Float, _mm512_add_ps, _mm512_sub_ps, _mm512_mul_ps, _mm512_div_ps)
PG_OPERATORS(Double, _mm512_add_pd, _mm512_sub_pd, _mm512_mul_pd, _mm512_div_pd)
PG_INLINE Float fma(const Float& a, const Float& b, const Float& c) { return {_mm512_fmadd_ps(a.v, b.v, c.v)}; }
PG_INLINE Double fma(const Double& a, const Double& b, const Double& c) { return {_mm512_fmadd_pd(a.v, b.v, c.v)}; }
PG_INLINE Float sqrt(const Float& a) { return {_mm512_sqrt_ps(a.v)}; }
PG_INLINE Double sqrt(const Double& a) { return {_mm512_sqrt_pd(a.v)}; }
// min and max return their second operand when either is NaN
PG_INLINE Float clamp(const Float& x, const Float& lo, const Float& hi) {
  return {_mm512_min_ps(hi.v, _mm512_max_ps(lo.v, x.v))};
}
PG_INLINE Double clamp(const Double& x, const Double& lo, const Double& hi) {
  return {_mm512_min_pd(hi.v, _mm512_max_pd(lo.v, x.v))};
}
// q x, and 0 where q is 0, whatever x is
PG_INLINE Float weighed(const Float& q, const Float& x) {
  return {_mm512_maskz_mul_ps(_mm512_cmp_ps_mask(q.v, _mm512_setzero_ps(), _CMP_NEQ_UQ), q.v, x.v)};
}
PG_INLINE Double weighed(const Double& q, const Double& x) {
  return {_mm512_maskz_mul_pd(_mm512_cmp_pd_mask(q.v, _mm512_setzero_pd(), _CMP_NEQ_UQ), q.v, x.v)};
}
PG_INLINE bool any_nan(const Float& a) { return _mm512_cmp_ps_mask(a.v, a.v, _CMP_UNORD_Q) != 0; }
PG_INLINE bool any_nan(const Double& a) { return _mm512_cmp_pd_mask(a.v, a.v, _CMP_UNORD_Q) != 0; }

struct Word {
  __m512i v;
  static PG_INLINE Word set(uint32_t x) { return {_mm512_set1_epi32(int(x))}; }
  static PG_INLINE Word load(const uint32_t* p) { return {_mm512_loadu_si512(p)}; }
};
PG_INLINE Word operator+(const Word& a, const Word& b) { return {_mm512_add_epi32(a.v, b.v)}; }
PG_INLINE Word operator-(const Word& a, const Word& b) { return {_mm512_sub_epi32(a.v, b.v)}; }
PG_INLINE Word operator^(const Word& a, const Word& b) { return {_mm512_xor_si512(a.v, b.v)}; }
PG_INLINE Word operator&(const Word& a, const Word& b) { return {_mm512_and_si512(a.v, b.v)}; }
PG_INLINE Word operator<<(const Word& a, int n) { return {_mm512_slli_epi32(a.v, n)}; }
PG_INLINE Word operator>>(const Word& a, int n) { return {_mm512_srli_epi32(a.v, n)}; }
PG_INLINE void mul_hilo(const Word& a, uint32_t m, Word& hi, Word& lo) {
  const __m512i k = _mm512_set1_epi32(int(m)), even = _mm512_mul_epu32(a.v, k);
  const __m512i odd = _mm512_mul_epu32(_mm512_srli_epi64(a.v, 32), k);
  lo.v = _mm512_mask_shuffle_epi32(even, 0xaaaa, odd, _MM_PERM_ENUM(0xa0));
  hi.v = _mm512_mask_shuffle_epi32(odd, 0x5555, even, _MM_PERM_ENUM(0xf5));
}
PG_INLINE Float to_float(const Word& a) { return {_mm512_cvtepi32_ps(a.v)}; }
PG_INLINE Float to_float_top24(const Word& a) { return {_mm512_cvtepu32_ps((a & Word::set(0xffffff00)).v)}; }
PG_INLINE Word as_bits(const Float& a) { return {_mm512_castps_si512(a.v)}; }
PG_INLINE Float as_float(const Word& a) { return {_mm512_castsi512_ps(a.v)}; }
// z[lane] of 4 counters become 4 consecutive elements, with the counters in the order of `counter_order`
PG_INLINE void store_interleaved(float* p, const Float z[4]) {
  const __m512 a = _mm512_unpacklo_ps(z[0].v, z[1].v), b = _mm512_unpackhi_ps(z[0].v, z[1].v);
  const __m512 c = _mm512_unpacklo_ps(z[2].v, z[3].v), d = _mm512_unpackhi_ps(z[2].v, z[3].v);
  const __m512d ad = _mm512_castps_pd(a), bd = _mm512_castps_pd(b), cd = _mm512_castps_pd(c), dd = _mm512_castps_pd(d);
  _mm512_storeu_pd(p, _mm512_unpacklo_pd(ad, cd));
  _mm512_storeu_pd(p + 16, _mm512_unpackhi_pd(ad, cd));
  _mm512_storeu_pd(p + 32, _mm512_unpacklo_pd(bd, dd));
  _mm512_storeu_pd(p + 48, _mm512_unpackhi_pd(bd, dd));
}
PG_INLINE Float load_f16(const uint16_t* p) {
  return {_mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)))};
}
PG_INLINE void store_f16(uint16_t* p, const Float& a) {
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_cvtps_ph(a.v, _MM_FROUND_TO_NEAREST_INT));
}
PG_INLINE Float load_bf16(const uint16_t* p) {
  const __m256i h = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
  return as_float(Word{_mm512_slli_epi32(_mm512_cvtepu16_epi32(h), 16)});
}
PG_INLINE void store_bf16(uint16_t* p, const Float& a) {
  const Word u = as_bits(a), odd = (u >> 16) & Word::set(1);
  const Word rounded = u + Word::set(0x7fff) + odd;
  const __mmask16 nan = _mm512_cmp_ps_mask(a.v, a.v, _CMP_UNORD_Q);
  const __m512i kept = _mm512_mask_or_epi32(rounded.v, nan, u.v, _mm512_set1_epi32(0x400000));
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_cvtepi32_epi16(_mm512_srli_epi32(kept, 16)));
}

#elif PG_LEVEL == 1
#define PG_ISA avx2
struct Float {
  typedef float Scalar;
  static constexpr int width = 8;
  __m256 v;
  static PG_INLINE Float set(float x) { return {_mm256_set1_ps(x)}; }
  static PG_INLINE Float load(const float* p) { return {_mm256_loadu_ps(p)}; }
  PG_INLINE void store(float* p) const { _mm256_storeu_ps(p, v); }
};
struct Double {
  typedef double Scalar;
  static constexpr int width = 4;
  __m256d v;
  static PG_INLINE Double set(double x) { return {_mm256_set1_pd(x)}; }
  static PG_INLINE Double load(const double* p) { return {_mm256_loadu_pd(p)}; }
  PG_INLINE void store(double* p) const { _mm256_storeu_pd(p, v); }
};
PG_OPERATORS(Float, _mm256_add_ps, _mm256_sub_ps, _mm256_mul_ps, _mm256_div_ps)
PG_OPERATORS(Double, _mm256_add_pd, _mm256_sub_pd, _mm256_mul_pd, _mm256_div_pd)
PG_INLINE Float fma(const Float& a, const Float& b, const Float& c) { return {_mm256_fmadd_ps(a.v, b.v, c.v)}; }
PG_INLINE Double fma(const Double& a, const Double& b, const Double& c) { return {_mm256_fmadd_pd(a.v, b.v, c.v)}; }
PG_INLINE Float sqrt(const Float& a) { return {_mm256_sqrt_ps(a.v)}; }
PG_INLINE Double sqrt(const Double& a) { return {_mm256_sqrt_pd(a.v)}; }
PG_INLINE Float clamp(const Float& x, const Float& lo, const Float& hi) {
  return {_mm256_min_ps(hi.v, _mm256_max_ps(lo.v, x.v))};
}
PG_INLINE Double clamp(const Double& x, const Double& lo, const Double& hi) {
  return {_mm256_min_pd(hi.v, _mm256_max_pd(lo.v, x.v))};
}
PG_INLINE Float weighed(const Float& q, const Float& x) {
  return {_mm256_and_ps(_mm256_cmp_ps(q.v, _mm256_setzero_ps(), _CMP_NEQ_UQ), _mm256_mul_ps(q.v, x.v))};
}
PG_INLINE Double weighed(const Double& q, const Double& x) {
  return {_mm256_and_pd(_mm256_cmp_pd(q.v, _mm256_setzero_pd(), _CMP_NEQ_UQ), _mm256_mul_pd(q.v, x.v))};
}
PG_INLINE bool any_nan(const Float& a) { return _mm256_movemask_ps(_mm256_cmp_ps(a.v, a.v, _CMP_UNORD_Q)) != 0; }
PG_INLINE bool any_nan(const Double& a) { return _mm256_movemask_pd(_mm256_cmp_pd(a.v, a.v, _CMP_UNORD_Q)) != 0; }

struct Word {
  __m256i v;
  static PG_INLINE Word set(uint32_t x) { return {_mm256_set1_epi32(int(x))}; }
  static PG_INLINE Word load(const uint32_t* p) { return {_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p))}; }
};
PG_INLINE Word operator+(const Word& a, const Word& b) { return {_mm256_add_epi32(a.v, b.v)}; }
PG_INLINE Word operator-(const Word& a, const Word& b) { return {_mm256_sub_epi32(a.v, b.v)}; }
PG_INLINE Word operator^(const Word& a, const Word& b) { return {_mm256_xor_si256(a.v, b.v)}; }
PG_INLINE Word operator&(const Word& a, const Word& b) { return {_mm256_and_si256(a.v, b.v)}; }
PG_INLINE Word operator<<(const Word& a, int n) { return {_mm256_slli_epi32(a.v, n)}; }
PG_INLINE Word operator>>(const Word& a, int n) { return {_mm256_srli_epi32(a.v, n)}; }
PG_INLINE void mul_hilo(const Word& a, uint32_t m, Word& hi, Word& lo) {
  const __m256i k = _mm256_set1_epi32(int(m)), even = _mm256_mul_epu32(a.v, k);
  const __m256i odd = _mm256_mul_epu32(_mm256_srli_epi64(a.v, 32), k);
  lo.v = _mm256_blend_epi32(even, _mm256_slli_epi64(odd, 32), 0xaa);
  hi.v = _mm256_blend_epi32(_mm256_srli_epi64(even, 32), odd, 0xaa);
}
PG_INLINE Float to_float(const Word& a) { return {_mm256_cvtepi32_ps(a.v)}; }
PG_INLINE Float to_float_top24(const Word& a) {  // exact: the halves do not overlap
  const Float hi{_mm256_cvtepi32_ps((a >> 16).v)}, lo{_mm256_cvtepi32_ps((a & Word::set(0xff00)).v)};
  return hi * Float::set(65536.f) + lo;
}
PG_INLINE Word as_bits(const Float& a) { return {_mm256_castps_si256(a.v)}; }
PG_INLINE Float as_float(const Word& a) { return {_mm256_castsi256_ps(a.v)}; }
PG_INLINE void store_interleaved(float* p, const Float z[4]) {
  const __m256 a = _mm256_unpacklo_ps(z[0].v, z[1].v), b = _mm256_unpackhi_ps(z[0].v, z[1].v);
  const __m256 c = _mm256_unpacklo_ps(z[2].v, z[3].v), d = _mm256_unpackhi_ps(z[2].v, z[3].v);
  const __m256d ad = _mm256_castps_pd(a), bd = _mm256_castps_pd(b), cd = _mm256_castps_pd(c), dd = _mm256_castps_pd(d);
  _mm256_storeu_ps(p, _mm256_castpd_ps(_mm256_unpacklo_pd(ad, cd)));
  _mm256_storeu_ps(p + 8, _mm256_castpd_ps(_mm256_unpackhi_pd(ad, cd)));
  _mm256_storeu_ps(p + 16, _mm256_castpd_ps(_mm256_unpacklo_pd(bd, dd)));
  _mm256_storeu_ps(p + 24, _mm256_castpd_ps(_mm256_unpackhi_pd(bd, dd)));
}
PG_INLINE Float load_f16(const uint16_t* p) {
  return {_mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)))};
}
PG_INLINE void store_f16(uint16_t* p, const Float& a) {
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm256_cvtps_ph(a.v, _MM_FROUND_TO_NEAREST_INT));
}
PG_INLINE Float load_bf16(const uint16_t* p) {
  const __m128i h = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
  return as_float(Word{_mm256_slli_epi32(_mm256_cvtepu16_epi32(h), 16)});
}
PG_INLINE void store_bf16(uint16_t* p, const Float& a) {
  const Word u = as_bits(a), rounded = u + Word::set(0x7fff) + ((u >> 16) & Word::set(1));
  const __m256i nan = _mm256_castps_si256(_mm256_cmp_ps(a.v, a.v, _CMP_UNORD_Q));
  const __m256i kept = _mm256_blendv_epi8(rounded.v, _mm256_or_si256(u.v, _mm256_set1_epi32(0x400000)), nan);
  const __m256i high = _mm256_srli_epi32(kept, 16);
  const __m256i packed = _mm256_permute4x64_epi64(_mm256_packus_epi32(high, high), 0xd8);
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm256_castsi256_si128(packed));
}

#else
#include "vec_baseline.h"
#endif

#if PG_LEVEL == 2 || defined(__aarch64__)
constexpr int UNROLL = 4;  // vectors per operand that 32 registers hold for the common rows
#else
constexpr int UNROLL = 2;
#endif

// ---- on top of them -----------------------------------------------------------------------------------------------
#if PG_LEVEL > 0 || defined(__aarch64__)
template <class V>
PG_INLINE V product_error(const V& a, const V& b, const V& product) {
  return fma(a, b, V::set(0) - product);
}
#else
// Dekker: without a fused multiply-add the factors are split into halves whose products are exact.
template <class V>
PG_INLINE V product_error(const V& a, const V& b, const V& product) {
  const V factor = V::set(sizeof(typename V::Scalar) == 4 ? 4097 : 134217729);
  const V ta = factor * a, tb = factor * b, ah = ta - (ta - a), bh = tb - (tb - b), al = a - ah, bl = b - bh;
  return ((ah * bh - product) + ah * bl + al * bh) + al * bl;
}
#endif

// to[lane] += a[lane]
PG_INLINE void add_to(double* to, const Double& a) { (Double::load(to) + a).store(to); }
#if PG_LEVEL == 2
PG_INLINE void add_to(double* to, const Float& a) {
  add_to(to, Double{_mm512_cvtps_pd(_mm512_castps512_ps256(a.v))});
  add_to(to + 8, Double{_mm512_cvtps_pd(_mm512_extractf32x8_ps(a.v, 1))});
}
#elif PG_LEVEL == 1
PG_INLINE void add_to(double* to, const Float& a) {
  add_to(to, Double{_mm256_cvtps_pd(_mm256_castps256_ps128(a.v))});
  add_to(to + 4, Double{_mm256_cvtps_pd(_mm256_extractf128_ps(a.v, 1))});
}
#else
PG_INLINE void add_to(double* to, const Float& a) {
  for (int i = 0; i < Float::width; ++i) to[i] += double(a.v[i]);
}
#endif

PG_INLINE Word splat(const Word&, uint32_t x) { return Word::set(x); }

PG_INLINE Float exp_sum(const Float& hi, const Float& lo) { return exp_pair<Word>(hi, lo); }
PG_INLINE Double exp_sum(const Double& hi, const Double& lo) {
  double a[Double::width], b[Double::width];
  hi.store(a);
  lo.store(b);
  for (int i = 0; i < Double::width; ++i) a[i] = exp_pair(a[i], b[i]);
  return Double::load(a);
}

// Vectors behind a pointer to another type: the model's.
template <Type TYPE>
PG_INLINE Float load_as(const Float&, const void* p, int64_t i) {
  if constexpr (TYPE == F32) return Float::load(static_cast<const float*>(p) + i);
  if constexpr (TYPE == F16) return load_f16(static_cast<const uint16_t*>(p) + i);
  if constexpr (TYPE == BF16) return load_bf16(static_cast<const uint16_t*>(p) + i);
}
template <Type TYPE>
PG_INLINE void store_as(const Float& a, void* p, int64_t i) {
  if constexpr (TYPE == F32) a.store(static_cast<float*>(p) + i);
  if constexpr (TYPE == F16) store_f16(static_cast<uint16_t*>(p) + i, a);
  if constexpr (TYPE == BF16) store_bf16(static_cast<uint16_t*>(p) + i, a);
}
template <Type TYPE>
PG_INLINE Double load_as(const Double&, const void* p, int64_t i) {
  static_assert(TYPE == F64, "other types are staged");
  return Double::load(static_cast<const double*>(p) + i);
}
template <Type TYPE>
PG_INLINE void store_as(const Double& a, void* p, int64_t i) {
  static_assert(TYPE == F64, "other types are staged");
  a.store(static_cast<double*>(p) + i);
}

// U vectors as one: uniform branches on coefficients are paid once for U vectors.
template <class V, int N>
struct Wide {
  typedef typename V::Scalar Scalar;
  static constexpr int width = V::width * N;
  V v[N];
  static PG_INLINE Wide set(Scalar x) {
    Wide r;
    const V one = V::set(x);
    unrolled<N>([&](auto i) PG_LAMBDA { r.v[i] = one; });
    return r;
  }
  static PG_INLINE Wide load(const Scalar* p) {
    Wide r;
    unrolled<N>([&](auto i) PG_LAMBDA { r.v[i] = V::load(p + i * V::width); });
    return r;
  }
  PG_INLINE void store(Scalar* p) const {
    unrolled<N>([&](auto i) PG_LAMBDA { v[i].store(p + i * V::width); });
  }
};
template <Type TYPE, class V, int N>
PG_INLINE Wide<V, N> load_as(const Wide<V, N>& like, const void* p, int64_t i) {
  Wide<V, N> r;
  unrolled<N>([&](auto j) PG_LAMBDA { r.v[j] = load_as<TYPE>(like.v[j], p, i + j * V::width); });
  return r;
}
template <Type TYPE, class V, int N>
PG_INLINE void store_as(const Wide<V, N>& a, void* p, int64_t i) {
  unrolled<N>([&](auto j) PG_LAMBDA { store_as<TYPE>(a.v[j], p, i + j * V::width); });
}
#define PG_WIDE(NAME, PARAMETERS, EXPRESSION)                    \
  template <class V, int N>                                      \
  PG_INLINE Wide<V, N> NAME PARAMETERS {                         \
    Wide<V, N> r;                                                \
    unrolled<N>([&](auto i) PG_LAMBDA { r.v[i] = EXPRESSION; }); \
    return r;                                                    \
  }
#define PG_W const Wide<V, N>&
PG_WIDE(operator+, (PG_W a, PG_W b), a.v[i] + b.v[i])
PG_WIDE(operator-, (PG_W a, PG_W b), a.v[i] - b.v[i])
PG_WIDE(operator*, (PG_W a, PG_W b), a.v[i] * b.v[i])
PG_WIDE(operator/, (PG_W a, PG_W b), a.v[i] / b.v[i])
PG_WIDE(fma, (PG_W a, PG_W b, PG_W c), fma(a.v[i], b.v[i], c.v[i]))
PG_WIDE(sqrt, (PG_W a), sqrt(a.v[i]))
PG_WIDE(clamp, (PG_W a, PG_W b, PG_W c), clamp(a.v[i], b.v[i], c.v[i]))
PG_WIDE(weighed, (PG_W a, PG_W b), weighed(a.v[i], b.v[i]))
PG_WIDE(product_error, (PG_W a, PG_W b, PG_W c), product_error(a.v[i], b.v[i], c.v[i]))
PG_WIDE(exp_sum, (PG_W a, PG_W b), exp_sum(a.v[i], b.v[i]))
template <class V, int N>
PG_INLINE bool any_nan(PG_W a) {
  bool r = false;
  unrolled<N>([&](auto i) PG_LAMBDA { r |= any_nan(a.v[i]); });
  return r;
}

}  // namespace
}  // namespace pyguide
