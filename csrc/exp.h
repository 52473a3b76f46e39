// exp(hi + lo), |lo| small: the learned variance's, whose logarithm one number of the type would round too far.
#pragma once
#include <float.h>
#include <math.h>

#include "step.h"

namespace pyguide {
namespace {

// F a vector of float, U of uint32. Within 2 * 2^-24 relative. Cephes expf with the low part added to the reduced
// argument.
template <class U, class F>
PG_INLINE F exp_pair(const F& hi, const F& lo) {
  const F x = clamp(hi, F::set(-150.f), F::set(130.f)), magic = F::set(12582912.f);
  const F shifted = fma(x, F::set(1.44269504f), magic), n = shifted - magic;
  F r = fma(F::set(0.f) - n, F::set(0.693359375f), x);
  r = fma(n, F::set(2.12194440e-4f), r) + lo;
  F p = fma(F::set(1.9875691500e-4f), r, F::set(1.3981999507e-3f));
  p = fma(p, r, F::set(8.3334519073e-3f));
  p = fma(p, r, F::set(4.1665795894e-2f));
  p = fma(p, r, F::set(1.6666665459e-1f));
  p = fma(p, r, F::set(5.0000001201e-1f));
  p = fma(p, r * r, r) + F::set(1.f);
  // 2^n in two factors, so that neither leaves the exponent range
  const U k = as_bits(shifted) - as_bits(magic) + U::set(512), first = k >> 1, second = k - first;
  return p * as_float((first + U::set(127u - 256u)) << 23) * as_float((second + U::set(127u - 256u)) << 23);
}
PG_INLINE double exp_pair(double hi, double lo) {
  const double scale = ::exp(hi);
  return lo == lo && scale < DBL_MAX ? scale + scale * lo : scale;
}

}  // namespace
}  // namespace pyguide
