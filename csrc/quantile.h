// The exact quantile of a sample's denoised estimate, for dynamic thresholding: the per-sample bound b of the step
// (step.h), for sample b of the batch standing at its row. With D = a_x s_0 + a_g G in the step's own bits, before any
// clip, over the N elements of the sample, and |D|_(0) <= |D|_(1) <= .. <= |D|_(N-1) their sizes in order:
//
// clang-format off
//   p = q (N - 1),  i = floor(p),  f = p - i
//   Q = |D|_(i) + (|D|_(i+1) - |D|_(i)) f        |D|_(i) where f = 0 or both are equal (infinite ones too)
//   bound = min(max(Q, least), limit)            NaN if any D is
// clang-format on
//
// p, f, Q and the bound are double, every operation rounded once, and the bound is rounded once to the state's type.
// A sample at a row that needs no D, or in the prologue (row 0), has the bound 0, which is none; one at its end keeps
// what it has.
//
// The order statistics are exact: those of |D| are those of its bits without the sign, as unsigned integers, so a radix
// select finds one from its highest bits down, by counts of DIGIT bits at a time (31 bits of a float32: 3 digits; 63 of
// a float64: 6). Counts are integers, so no order of threads and elements changes the result. They have 32 bits: N <
// 2^32.
#pragma once
#include <math.h>

#include "step.h"

namespace pyguide {

struct QuantileArgs {
  double quantile;      // q in [0, 1]
  double least, limit;  // 0 < least
  void* bound;          // [batch] of the state's type
};

constexpr int DIGIT = 11;  // bits
constexpr int BINS = 1 << DIGIT;

namespace {

// The bits of |x| as an integer: as x orders them, NaN above infinity.
template <class T>
struct Key;
template <>
struct Key<float> {
  typedef uint32_t Bits;
  static constexpr int bits = 31;
  static constexpr Bits infinity = 0x7f800000u;
};
template <>
struct Key<double> {
  typedef uint64_t Bits;
  static constexpr int bits = 63;
  static constexpr Bits infinity = 0x7ff0000000000000u;
};

// Where the quantile lies among N elements: i, which is also i + 1 where f = 0, and f.
struct Position {
  int64_t index;
  double fraction;
  PG_INLINE Position(double quantile, int64_t elements) {
    const double p = quantile * double(elements - 1);
    index = int64_t(p);
    fraction = p - double(index);
  }
};

// The bound from the order statistics |D|_(i) and |D|_(i+1), neither of them NaN.
template <class T>
PG_INLINE T bound_of(const QuantileArgs& q, T low, T high, double fraction) {
  double value = double(low);
  if (fraction != 0.0 && low != high) {
    const double step = (double(high) - value) * fraction;
    value = value + step;
  }
  if (value < q.least) value = q.least;
  return T(value > q.limit ? q.limit : value);
}

}  // namespace
}  // namespace pyguide
