// Pack<T, N>: N elements of a thread in registers, with the operations that step_formula, box_muller and exp_pair ask
// for (csrc/step.h, csrc/philox.h, csrc/exp.h). Host and device; every operation rounds once (nvcc -fmad=false,
// explicit fma), so that a float result has the bits of the CPU kernel's.
#pragma once
#include "../csrc/convert.h"
#include "../csrc/exp.h"
#include "../csrc/philox.h"

namespace pyguide {
namespace {

PG_INLINE float fused(float a, float b, float c) { return ::fmaf(a, b, c); }
PG_INLINE double fused(double a, double b, double c) { return ::fma(a, b, c); }
PG_INLINE float root(float a) { return ::sqrtf(a); }
PG_INLINE double root(double a) { return ::sqrt(a); }

template <class T, int N>
struct Pack {
  typedef T Scalar;
  static constexpr int width = N;
  T v[N];
  static PG_INLINE Pack set(T x) {
    Pack r;
    for (int i = 0; i < N; ++i) r.v[i] = x;
    return r;
  }
};
template <int N>
using Words = Pack<uint32_t, N>;
struct alignas(16) Words16 {  // as memory takes it
  uint32_t v[4];
};
struct alignas(8) Words8 {
  uint32_t v[2];
};

#define PG_PACK(NAME, PARAMETERS, EXPRESSION)          \
  template <class T, int N>                            \
  PG_INLINE Pack<T, N> NAME PARAMETERS {               \
    Pack<T, N> r;                                      \
    for (int i = 0; i < N; ++i) r.v[i] = (EXPRESSION); \
    return r;                                          \
  }
#define PG_P const Pack<T, N>&
PG_PACK(operator+, (PG_P a, PG_P b), a.v[i] + b.v[i])
PG_PACK(operator-, (PG_P a, PG_P b), a.v[i] - b.v[i])
PG_PACK(operator*, (PG_P a, PG_P b), a.v[i] * b.v[i])
PG_PACK(operator/, (PG_P a, PG_P b), a.v[i] / b.v[i])
PG_PACK(operator^, (PG_P a, PG_P b), a.v[i] ^ b.v[i])
PG_PACK(operator&, (PG_P a, PG_P b), a.v[i] & b.v[i])
PG_PACK(operator<<, (PG_P a, int n), a.v[i] << n)
PG_PACK(operator>>, (PG_P a, int n), a.v[i] >> n)
PG_PACK(fma, (PG_P a, PG_P b, PG_P c), fused(a.v[i], b.v[i], c.v[i]))
PG_PACK(sqrt, (PG_P a), root(a.v[i]))
PG_PACK(product_error, (PG_P a, PG_P b, PG_P product), fused(a.v[i], b.v[i], T(0) - product.v[i]))

// Comparisons with NaN are false: it stays. (The minimum and maximum of the hardware would drop it.)
template <class T>
PG_INLINE T clamp(T x, T lo, T hi) {
  const T y = lo > x ? lo : x;
  return hi < y ? hi : y;
}
PG_PACK(clamp, (PG_P x, PG_P lo, PG_P hi), clamp(x.v[i], lo.v[i], hi.v[i]))
#undef PG_PACK
#undef PG_P

template <int N>
PG_INLINE Pack<float, N> to_float(const Words<N>& a) {
  Pack<float, N> r;
  for (int i = 0; i < N; ++i) r.v[i] = float(int32_t(a.v[i]));
  return r;
}
template <int N>
PG_INLINE Pack<float, N> to_float_top24(const Words<N>& a) {  // exact
  Pack<float, N> r;
  for (int i = 0; i < N; ++i) r.v[i] = float(a.v[i] & 0xffffff00u);
  return r;
}
template <int N>
PG_INLINE Words<N> as_bits(const Pack<float, N>& a) {
  Words<N> r;
  for (int i = 0; i < N; ++i) r.v[i] = bits_of(a.v[i]);
  return r;
}
template <int N>
PG_INLINE Pack<float, N> as_float(const Words<N>& a) {
  Pack<float, N> r;
  for (int i = 0; i < N; ++i) r.v[i] = float_of(a.v[i]);
  return r;
}
template <int N>
PG_INLINE Pack<float, N> exp_sum(const Pack<float, N>& hi, const Pack<float, N>& lo) {
  return exp_pair<Words<N>>(hi, lo);
}
template <int N>
PG_INLINE Pack<double, N> exp_sum(const Pack<double, N>& hi, const Pack<double, N>& lo) {
  Pack<double, N> r;
  for (int i = 0; i < N; ++i) r.v[i] = exp_pair(hi.v[i], lo.v[i]);
  return r;
}
template <class T, int N>
PG_INLINE bool unfinite(const Pack<T, N>& a) {
  T sum = T(0);
  for (int i = 0; i < N; ++i) sum = fused(a.v[i], T(0), sum);  // 0 x is NaN exactly where x is not finite
  return sum != sum;
}

// ---- 16-bit floats, two to a word, the element of the lower index in the lower half ----
template <Type TYPE>
PG_INLINE uint32_t narrow_pair(float low, float high) {
#ifdef __CUDA_ARCH__  // NaN becomes 0x7fff in both types
  uint32_t r;
  if constexpr (TYPE == F16) {
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(r) : "f"(high), "f"(low));
  } else {
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(r) : "f"(high), "f"(low));
  }
  return r;
#else
  if constexpr (TYPE == F16) return f16_from_float(low) | uint32_t(f16_from_float(high)) << 16;
  return bf16_from_float(low) | uint32_t(bf16_from_float(high)) << 16;
#endif
}
template <Type TYPE>
PG_INLINE float widen_half(uint16_t h) {
  if constexpr (TYPE == BF16) return float_from_bf16(h);
#ifdef __CUDA_ARCH__
  float r;
  asm("cvt.f32.f16 %0, %1;" : "=f"(r) : "h"(h));
  return r;
#else
  return float_from_f16(h);
#endif
}
PG_INLINE float before_narrow(float x) { return x; }
PG_INLINE float before_narrow(double x) { return odd_float(x); }

PG_INLINE double double_of(uint32_t low, uint32_t high) {
  const uint64_t bits = low | uint64_t(high) << 32;
  double x;
  memcpy(&x, &bits, 8);
  return x;
}
PG_INLINE uint64_t bits_of(double x) {
  uint64_t bits;
  memcpy(&bits, &x, 8);
  return bits;
}

// ---- memory whose bytes are written as one type and read as another, at a multiple of the type's alignment ----
template <class X>
PG_INLINE X get(const char* at) {
  X x;
  memcpy(&x, __builtin_assume_aligned(at, alignof(X)), sizeof x);
  return x;
}
template <class X>
PG_INLINE void put(char* at, const X& x) {
  memcpy(__builtin_assume_aligned(at, alignof(X)), &x, sizeof x);
}

// ---- noise ----
PG_INLINE void normal_pair(uint32_t x, uint32_t y, float& cosine, float& sine) {
  Pack<float, 1> c, s;
  box_muller(Words<1>{{x}}, Words<1>{{y}}, c, s);
  cosine = c.v[0];
  sine = s.v[0];
}
PG_INLINE void normal_pair(uint32_t x, uint32_t y, double& cosine, double& sine) { box_muller(x, y, cosine, sine); }
// Normals of elements 4 quad .. 4 quad + 3 of a sample's stream: one Philox call.
PG_INLINE Pack<float, 4> normal_quad(uint64_t quad, uint64_t seed, uint32_t ordinal, uint32_t tag) {
  uint32_t c[4] = {uint32_t(quad), uint32_t(quad >> 32), ordinal, tag};
  philox4x32(c, uint32_t(seed), uint32_t(seed >> 32));
  Pack<float, 2> cosine, sine;
  box_muller(Words<2>{{c[0], c[2]}}, Words<2>{{c[1], c[3]}}, cosine, sine);
  return {{cosine.v[0], sine.v[0], cosine.v[1], sine.v[1]}};
}
}  // namespace
}  // namespace pyguide
