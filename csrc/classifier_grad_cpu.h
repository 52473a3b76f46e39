// The classifier's gradient of one sample on a CPU, included by cpu.cpp once per instruction set. See classifier_grad.h
// for the formula.
//
// Three passes over blocks of classes: maximum, sums, gradient. Float32 and float64 logits that are dense are read in
// place, all others and a sample's last block through scratch in L1, padded with -inf; the exponentials of the second
// pass wait in the gradient's own memory for the third, unless that is of a 16-bit type. Sums have 16 lanes on every
// instruction set, so that those with a fused multiply-add agree in every bit.
#pragma once
#include "classifier_grad.h"
#include "staging.h"

namespace pyguide {
namespace {

constexpr int64_t LANES = 16;
template <class T>
using Lanes = Wide<typename Native<T>::V, int(LANES / Native<T>::V::width)>;

inline float exp_of(float x) {
  float lanes[Float::width];
  exp_sum(Float::set(x), Float::set(0.f)).store(lanes);
  return lanes[0];
}
inline double exp_of(double x) { return exp_pair(x, 0.0); }

template <class T>
inline T number_at(const void* p, Type type, int64_t i) {
  T x;
  widen(&x, static_cast<const char*>(p) + i * size_of(type), type, 1);
  return x;
}
template <class T>
inline void put_number(void* p, Type type, int64_t i, T x) {
  narrow(static_cast<char*>(p) + i * size_of(type), &x, type, 1);
}

inline View class_view(const void* data, Type type, int64_t classes, int64_t stride) {
  View v;
  v.data = static_cast<char*>(const_cast<void*>(data));
  v.type = type;
  v.inner = classes;
  v.row_stride = 0;
  v.stride = stride;
  v.whole = true;
  return v;
}

// Classes [e, e + n), `pad` from there to a multiple of LANES: where they are, or in `scratch`.
template <class T>
inline const T* class_block(const View& view, int64_t e, int64_t n, T pad, T* scratch) {
  if (n % LANES == 0 && view.dense(Native<T>::type)) return reinterpret_cast<const T*>(view.at(e));
  gather(scratch, view, e, n);
  for (; n % LANES; ++n) scratch[n] = pad;
  return scratch;
}

template <class T>
inline Lanes<T> every(T x) {
  return Lanes<T>::set(x);
}
template <class T>
inline T total(const Sum<Lanes<T>>& lanes) {
  T sum[LANES], error[LANES];
  lanes.sum.store(sum);
  lanes.error.store(error);
  Sum<T> all{sum[0], error[0]};
  for (int i = 1; i < LANES; ++i) all.add(Sum<T>{sum[i], error[i]});
  return all.value();
}

// One sample. DIRECT: its gradient is of type T, so that exponentials can wait in it.
template <class T, bool DIRECT>
struct ClassifierSample {
  typedef Lanes<T> V;
  const ClassifierGradArgs& a;
  const int64_t classes = a.classes;
  const View logits, q, grad;
  const int64_t* const labels;
  alignas(64) T scratch[3][BLOCK];

  ClassifierSample(const ClassifierGradArgs& a, int64_t b)
      : a(a),
        logits(class_view(static_cast<const char*>(a.logits) + b * a.batch_stride * size_of(a.logits_type),
                          a.logits_type, a.classes, a.class_stride)),
        q(class_view(static_cast<const char*>(a.target) + (a.first + b) * a.target_stride * size_of(a.scale_type),
                     a.scale_type, a.classes, 1)),
        grad(class_view(static_cast<char*>(a.grad) + b * a.classes * size_of(a.logits_type), a.logits_type, a.classes,
                        1)),
        labels(static_cast<const int64_t*>(a.target) + (a.first + b) * a.target_stride) {}

  // f(first class, how many, padded to LANES) over the blocks.
  template <class F>
  PG_INLINE void blocks(const F& f) const {
    for (int64_t e = 0; e < classes; e += BLOCK) {
      const int64_t n = classes - e < BLOCK ? classes - e : BLOCK;
      f(e, n, (n + LANES - 1) / LANES * LANES);
    }
  }
  T logit(int64_t k) const { return number_at<T>(logits.data, a.logits_type, k * logits.stride); }
  // Where a block of results goes, and how it gets from there to the gradient.
  T* results(int64_t e, int64_t n) { return DIRECT && n % LANES == 0 ? reinterpret_cast<T*>(grad.at(e)) : scratch[2]; }
  void keep(int64_t e, int64_t n, const T* from) const {
    if (from == scratch[2]) narrow(grad.at(e), from, a.logits_type, n);
  }
  template <class F>
  PG_INLINE void each_class(const F& f) const {  // that a label names
    for (int64_t j = 0; j < a.width; ++j) {
      if (is_class(labels[j], classes)) f(labels[j]);
    }
  }

  T maximum() {
    V top = every(-T(INFINITY));
    const V limit = every(T(INFINITY));
    blocks([&](int64_t e, int64_t n, int64_t padded) PG_LAMBDA {
      const T* x = class_block(logits, e, n, -T(INFINITY), scratch[0]);
      for (int64_t i = 0; i < padded; i += LANES) top = clamp(V::load(x + i), top, limit);  // may lose a NaN
    });
    T lanes[LANES], most = -T(INFINITY);
    top.store(lanes);
    for (T x : lanes) most = x > most ? x : most;
    return most;
  }

  // n, and F; false unless all labels name classes and one of those can be. Writes the gradient: several labels mark
  // their classes there, so that a repeated one counts once.
  bool softmax_of_labels(T& n, T& F) {
    n = -T(INFINITY);
    F = T(0);
    for (int64_t j = 0; j < a.width; ++j) {
      if (labels[j] >= classes) return false;
    }
    const bool several = a.width > 1;
    each_class([&](int64_t y) PG_LAMBDA {
      const T x = logit(y);
      n = x > n ? x : n;
      if (several) put_number(grad.data, a.logits_type, y, T(0));
    });
    if (n == -T(INFINITY)) return false;
    Sum<T> sum{T(0), T(0)};
    each_class([&](int64_t y) PG_LAMBDA {
      if (several) {
        if (number_at<T>(grad.data, a.logits_type, y) != T(0)) return;
        put_number(grad.data, a.logits_type, y, T(1));
      }
      sum.add(exp_of(logit(y) - n));
    });
    F = sum.value();
    return true;
  }

  // E, and of a distribution sum q and sum q (l - m).
  template <bool DISTRIBUTION>
  void sums(T m, T& E, T& sum_q, T& sum_q_shifted) {
    const V zero = every(T(0)), shift = every(m);
    Sum<V> exponentials{zero, zero}, weights{zero, zero}, weighted{zero, zero};
    blocks([&](int64_t e, int64_t n, int64_t padded) PG_LAMBDA {
      const T* x = class_block(logits, e, n, -T(INFINITY), scratch[0]);
      const T* weight = DISTRIBUTION ? class_block(q, e, n, T(0), scratch[1]) : nullptr;
      T* to = results(e, n);
      for (int64_t i = 0; i < padded; i += LANES) {
        const V shifted = V::load(x + i) - shift, exponential = exp_sum(shifted, zero);
        exponentials.add(exponential);
        if (DIRECT) exponential.store(to + i);
        if (DISTRIBUTION) {
          const V share = V::load(weight + i);
          weights.add(share);
          weighted.add(weighed(share, shifted));
        }
      }
      if (DIRECT) keep(e, n, to);
    });
    E = total<T>(exponentials);
    sum_q = DISTRIBUTION ? total<T>(weights) : T(1);
    sum_q_shifted = DISTRIBUTION ? total<T>(weighted) : T(0);
  }

  template <bool DISTRIBUTION>
  void gradient(T scale, T m, T inverse, T sum_q) {
    const V zero = every(T(0)), shift = every(m), by = every(scale), over = every(inverse), sum = every(sum_q);
    blocks([&](int64_t e, int64_t n, int64_t padded) PG_LAMBDA {
      const T* x = class_block(DIRECT ? grad : logits, e, n, -T(INFINITY), scratch[0]);
      const T* weight = DISTRIBUTION ? class_block(q, e, n, T(0), scratch[1]) : nullptr;
      T* to = results(e, n);
      for (int64_t i = 0; i < padded; i += LANES) {
        const V read = V::load(x + i), exponential = DIRECT ? read : exp_sum(read - shift, zero);
        grad_element(by, DISTRIBUTION ? V::load(weight + i) : zero, exponential, over, sum).store(to + i);
      }
      keep(e, n, to);
    });
  }

  // True if a logit is NaN or +inf.
  bool run(T scale, T& log_prob) {
    const T m = subtrahend(maximum());
    T n = T(0), F = T(1), E, sum_q, sum_q_shifted;
    const bool known = a.distribution || softmax_of_labels(n, F);
    a.distribution ? sums<true>(m, E, sum_q, sum_q_shifted) : sums<false>(m, E, sum_q, sum_q_shifted);
    log_prob = a.distribution ? log_prob_of_distribution(sum_q_shifted, sum_q, E) : log_prob_of_labels(n, m, F, E);
    if (!known) scale = log_prob = T(NAN);
    const T inverse = T(1) / E;
    a.distribution ? gradient<true>(scale, m, inverse, sum_q) : gradient<false>(scale, m, inverse, sum_q);
    if (!a.distribution) {
      const T share = T(1) / F;
      each_class([&](int64_t y) PG_LAMBDA {
        const T x = logit(y);
        put_number(grad.data, a.logits_type, y,
                   grad_element(scale, exp_of(x - n) * share, exp_of(x - m), inverse, T(1)));
      });
    }
    return E != E;
  }
};

template <class T, bool DIRECT>
bool classifier_grad_of(const ClassifierGradArgs& a, int64_t b, T scale, T& log_prob) {
  return ClassifierSample<T, DIRECT>(a, b).run(scale, log_prob);
}
template <class T>
bool classifier_grad_as(const ClassifierGradArgs& a, int64_t b) {
  const int64_t i = a.first + b;
  int64_t row = 0;
  T log_prob = T(0);
  bool unfinite = false;
  if (a.samples) row = is_active(a.samples[i].row, a.samples[i].end) ? a.samples[i].row : -1;
  if (row < 0) {
    const size_t bytes = size_t(a.classes * size_of(a.logits_type));
    memset(static_cast<char*>(a.grad) + size_t(b) * bytes, 0, bytes);
  } else {
    const T scale = number_at<T>(a.scale, a.scale_type, row * a.scale_stride + i);
    unfinite = a.logits_type == Native<T>::type ? classifier_grad_of<T, true>(a, b, scale, log_prob)
                                                : classifier_grad_of<T, false>(a, b, scale, log_prob);
  }
  if (a.log_prob) put_number(a.log_prob, a.scale_type, i, log_prob);
  return unfinite && a.check;
}
bool classifier_grad(const ClassifierGradArgs& a, int64_t b) {
  return a.logits_type == F64 ? classifier_grad_as<double>(a, b) : classifier_grad_as<float>(a, b);
}

}  // namespace
}  // namespace pyguide
