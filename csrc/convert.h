// 16-bit floats in integers: round to nearest even, NaN stays NaN.
#pragma once
#include <math.h>
#include <string.h>

#include "step.h"

namespace pyguide {
namespace {

PG_INLINE uint32_t bits_of(float x) {
  uint32_t u;
  memcpy(&u, &x, 4);
  return u;
}
PG_INLINE float float_of(uint32_t u) {
  float x;
  memcpy(&x, &u, 4);
  return x;
}
PG_INLINE float float_from_f16(uint16_t h) {
  const uint32_t sign = uint32_t(h & 0x8000) << 16, rest = h & 0x7fff;
  if (rest >= 0x7c00) return float_of(sign | 0x7f800000 | (rest & 0x3ff) << 13 | (rest > 0x7c00 ? 0x400000 : 0));
  const float magnitude = rest >= 0x400 ? float_of((rest << 13) + (112u << 23)) : float(rest) * 0x1p-24f;
  return float_of(sign | bits_of(magnitude));
}
PG_INLINE uint16_t f16_from_float(float x) {
  const uint32_t u = bits_of(x), sign = u >> 16 & 0x8000, rest = u & 0x7fffffff;
  if (rest > 0x7f800000) return uint16_t(sign | 0x7e00 | (rest >> 13 & 0x3ff));
  if (rest >= 0x477ff000) return uint16_t(sign | 0x7c00);  // 65520 and above round to infinity
  if (rest < 0x38800000)
    return uint16_t(sign | (bits_of(float_of(rest) + 0.5f) - 0x3f000000));  // subnormal: ulp(1/2) = 2^-24
  return uint16_t(sign | (rest - (112u << 23) + 0xfff + (rest >> 13 & 1)) >> 13);
}
PG_INLINE float float_from_bf16(uint16_t h) { return float_of(uint32_t(h) << 16); }
PG_INLINE uint16_t bf16_from_float(float x) {
  const uint32_t u = bits_of(x);
  if ((u & 0x7fffffff) > 0x7f800000) return uint16_t(u >> 16 | 0x40);
  return uint16_t((u + 0x7fff + (u >> 16 & 1)) >> 16);
}
// double -> float rounded to odd: a second rounding to 16 bits then gives what one rounding would.
PG_INLINE float odd_float(double x) {
  const float f = float(x);
  if (double(f) == x || x != x) return f;
  return float_of((bits_of(f) - (fabs(double(f)) > fabs(x) ? 1 : 0)) | 1);
}

}  // namespace
}  // namespace pyguide
