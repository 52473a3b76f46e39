// The gradient that seeds a classifier's backward pass: of scale log p(y | x) by the logits l_k, k < classes. For
// sample b with its scale s and p = softmax(l):
//
// clang-format off
//   labels Y        log_prob = log sum_{y in Y} p_y     grad_k = s ([k in Y] p_k / sum_{y in Y} p_y - p_k)
//   distribution q  log_prob = sum_k q_k log p_k        grad_k = s (q_k - p_k sum_j q_j)
//
//   E = sum_k exp(l_k - m),  m = max_k l_k              p_k = exp(l_k - m) / E
//   F = sum_{y in Y} exp(l_y - n),  n = max_Y l_y       log_prob = (n - m) + (log F - log E)
// clang-format on
//
// Y is one to `width` labels, of which negative ones are none and repeated ones count once. A q_k of 0 is not read, so
// that l_k may be -inf there: a class that cannot be. Each softmax subtracts its own maximum, so that any finite logits
// will do. Grad and log_prob of a sample are NaN where a logit is NaN or +inf, a label is not below `classes`, no label
// is left, or all that are name classes that cannot be; a label is compared before it is used as an index.
//
// A sample that is idle (its row is at its end) gets zeros, and its logits, target and scale are not read.
//
// Bytes of a sample: its logits and gradient once each, its distribution twice. Where the classes are more than a
// kernel holds in registers, passes after the first find the logits in a cache. Arithmetic: float (double for F64
// logits), exponentials within 2 ulp, sums compensated: 21,841 terms in float alone could cost 4e-5. So grad is within
// 1e-6 |s| (of a distribution 1e-6 |s| sum_k |q_k|) before its one rounding to the type of the logits. The order of
// every sum depends on the number of classes alone: a sample's bits are the same in any batch, at any index, for any
// number of threads.
#pragma once
#include <math.h>

#include "step.h"

namespace pyguide {

struct ClassifierGradArgs {
  int64_t batch, classes, width;
  int64_t first;                       // index of sample 0 in samples, target, scale and log_prob
  Type logits_type, scale_type;        // any float; F32 or F64
  const void* logits;                  // [batch][classes]
  int64_t batch_stride, class_stride;  // elements
  const void* target;                  // int64 labels [first + batch][width], or scale_type [first + batch][classes]
  int64_t target_stride;               // elements
  int32_t distribution;                // 0: labels
  const void* scale;                   // [rows][first + batch], rows scale_stride elements apart
  int64_t scale_stride;
  Sample* samples;  // [first + batch]; null: every sample at row 0
  void* grad;       // [batch][classes] of logits_type
  void* log_prob;   // [first + batch] of scale_type, null: not written
  int32_t check;    // set NONFINITE_LOGITS in a sample's flags where a logit is NaN or +inf
  int32_t threads;
};

namespace {

// A sum and what its roundings left out. T: a number or a vector of numbers.
template <class T>
struct Sum {
  T sum, error;
  PG_INLINE void add(const T& x) {
    T total, lost;
    two_sum(sum, x, total, lost);
    sum = total;
    error = error + lost;
  }
  PG_INLINE void add(const Sum& other) {  // in either order
    T total, lost;
    two_sum(sum, other.sum, total, lost);
    sum = total;
    error = (error + other.error) + lost;
  }
  PG_INLINE T value() const {  // an infinite sum has lost NaN
    const T total = sum + error;
    return total == total ? total : sum;
  }
};

PG_INLINE bool is_active(int32_t row, int32_t end) { return row >= 0 && row < end; }
PG_INLINE bool is_class(int64_t label, int64_t classes) { return label >= 0 && label < classes; }

// What a softmax subtracts: its maximum, but 0 where no class can be, so that only NaN and +inf make its sum NaN.
template <class T>
PG_INLINE T subtrahend(T maximum) {
  return maximum == -T(INFINITY) ? T(0) : maximum;
}
// grad_k from exp(l_k - m), 1 / E, and what p_k is compared with: [k in Y] p_k / sum p, or q_k and sum q.
template <class V>
PG_INLINE V grad_element(const V& scale, const V& wanted, const V& exponential, const V& inverse, const V& total) {
  return scale * (wanted - exponential * inverse * total);
}
template <class T>
PG_INLINE T log_prob_of_labels(T n, T m, T F, T E) {
  return (n - m) + (::log(F) - ::log(E));
}
template <class T>
PG_INLINE T log_prob_of_distribution(T sum_q_shifted, T sum_q, T E) {  // sum_k q_k (l_k - m), sum_k q_k
  return sum_q_shifted - sum_q * ::log(E);
}

}  // namespace
}  // namespace pyguide
