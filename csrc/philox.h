// Counter-based noise: Philox4x32-10 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011), normals.
//
// clang-format off
//   key = seed (lo, hi), counter = (q lo, q hi, ordinal, tag), q = element / 4, lane = element % 4
//   u = (x_even + 1/2) 2^-32, v = (x_odd + 1/2) 2^-32, r = sqrt(-2 log u), z = r cos(2 pi v), r sin(2 pi v)
// clang-format on
//
// U is a vector (or one) of uint32 with +, ^ and mul_hilo; F of float. In float |z - z*| <= 4 * 2^-24 r: the uniform
// keeps all 33 bits as an unevaluated pair, and the angle is reduced exactly in integers.
#pragma once
#include <math.h>

#include "step.h"

namespace pyguide {

enum Tag : uint32_t { TAG_INITIAL = 0x70796701, TAG_STEP, TAG_CHURN, TAG_INPAINT, TAG_USER };

namespace {

PG_INLINE void mul_hilo(uint32_t a, uint32_t m, uint32_t& hi, uint32_t& lo) {
  const uint64_t product = uint64_t(a) * m;
  hi = uint32_t(product >> 32);
  lo = uint32_t(product);
}
PG_INLINE uint32_t splat(uint32_t, uint32_t x) { return x; }

template <class U>
PG_INLINE void philox4x32(U c[4], uint32_t k0, uint32_t k1, int rounds = 10) {
  for (int i = 0; i < rounds; ++i) {
    U hi0, lo0, hi1, lo1;
    mul_hilo(c[0], 0xD2511F53u, hi0, lo0);
    mul_hilo(c[2], 0xCD9E8D57u, hi1, lo1);
    c[0] = hi1 ^ c[1] ^ splat(c[0], k0);
    c[1] = lo1;
    c[2] = hi0 ^ c[3] ^ splat(c[0], k1);
    c[3] = lo0;
    k0 += 0x9E3779B9u;
    k1 += 0xBB67AE85u;
  }
}

// Two uniforms as integers -> two normals, float. Polynomials: Cephes logf; for sin and cos of (pi/4) a least squares,
// 0.03 * 2^-24.
template <class F, class U>
PG_INLINE void box_muller(U x, U y, F& cosine, F& sine) {
  // x + 1/2 = sum + error exactly: 24 bits, then the other 8 and the half.
  const F top = to_float_top24(x), low = to_float(x & U::set(0xff)) + F::set(0.5f);
  const F sum = top + low, error = low - (sum - top);
  // sum = 2^e (1 + t), sqrt(1/2) <= 1 + t < sqrt(2). Where u is near 1, t is all of log u: its relative accuracy stays.
  const U bits = as_bits(sum) + U::set(0x3f800000u - 0x3f3504f3u), exponent = bits >> 23;
  const F e = to_float(exponent) - F::set(127.f + 32.f);
  const F scale = as_float((U::set(254) - exponent) << 23);
  const F t = fma(error, scale, as_float((bits & U::set(0x007fffffu)) + U::set(0x3f3504f3u)) - F::set(1.f));
  const F t2 = t * t;
  F p = fma(F::set(7.0376836292e-2f), t, F::set(-1.1514610310e-1f));
  p = fma(p, t, F::set(1.1676998740e-1f));
  p = fma(p, t, F::set(-1.2420140846e-1f));
  p = fma(p, t, F::set(1.4249322787e-1f));
  p = fma(p, t, F::set(-1.6668057665e-1f));
  p = fma(p, t, F::set(2.0000714765e-1f));
  p = fma(p, t, F::set(-2.4999993993e-1f));
  p = fma(p, t, F::set(3.3333331174e-1f)) * t * t2;
  p = fma(e, F::set(-2.12194440e-4f), p);
  p = fma(F::set(-0.5f), t2, p);
  const F log_u = fma(e, F::set(0.693359375f), t + p);
  const F r = sqrt(F::set(-2.f) * log_u);
  // 2 pi (y + 1/2) 2^-32 = (pi / 2) quadrant + (pi / 4) a, |a| <= 1
  const U quadrant = (y + U::set(0x20000000u)) >> 30;
  const F a = (to_float(y - (quadrant << 30)) + F::set(0.5f)) * F::set(0x1p-29f);
  const F a2 = a * a;
  F s = fma(F::set(-3.5935103e-5f), a2, F::set(2.4899836e-3f));
  s = fma(s, a2, F::set(-8.0745430e-2f));
  s = fma(s, a2, F::set(-2.1855694e-8f));
  s = fma(F::set(0.78539819f), a, s * a);
  F c = fma(F::set(3.531154e-6f), a2, F::set(-3.2594163e-4f));
  c = fma(c, a2, F::set(1.5854327e-2f));
  c = fma(c, a2, F::set(-3.0842513e-1f));
  c = fma(c, a2, F::set(1.f));
  const U sign_cos = ((quadrant + U::set(1)) & U::set(2)) << 30, sign_sin = (quadrant & U::set(2)) << 30;
  const U swap = U::set(0) - (quadrant & U::set(1));
  const U bits_s = as_bits(s), bits_c = as_bits(c), differ = (bits_s ^ bits_c) & swap;
  cosine = r * as_float((bits_c ^ differ) ^ sign_cos);
  sine = r * as_float((bits_s ^ differ) ^ sign_sin);
}

// The same in double with libm.
PG_INLINE void box_muller(uint32_t x, uint32_t y, double& cosine, double& sine) {
  const double t = (double(uint32_t(~x)) + 0.5) * 0x1p-32;
  const double r = sqrt(-2.0 * (x >= 0xB504F334u ? log1p(-t) : log((double(x) + 0.5) * 0x1p-32)));
  const uint32_t quadrant = (y + 0x20000000u) >> 30;
  const double turn = (double(int32_t(y - (quadrant << 30))) + 0.5) * 0x1p-32;
#ifdef __CUDA_ARCH__  // sin and cos there keep the digits of 2 / pi, for large arguments, in local memory
  double c = cospi(2 * turn), s = sinpi(2 * turn);
#else
  const double a = turn * 6.283185307179586476925;
  double c = cos(a), s = sin(a);
#endif
  if (quadrant & 1) {
    const double swap = c;
    c = s;
    s = swap;
  }
  cosine = (quadrant + 1) & 2 ? -r * c : r * c;
  sine = quadrant & 2 ? -r * s : r * s;
}

}  // namespace
}  // namespace pyguide
