// The classifier's gradient of one sample by one block. See csrc/classifier_grad.h for the formula and
// classifier_grad.cu for the geometry. THREAD as in control.cuh.
//
// A thread has units of 16 bytes (8 of float64) of the logits: its first one stays in registers from the maximum to the
// gradient, as logits, then as exponentials; those that follow, where classes are more than a block's first units, are
// read again by each pass. Labels are spread over the threads.
#pragma once
#include <type_traits>

#include "../csrc/classifier_grad.h"
#include "reduce.cuh"

namespace pyguide {

constexpr int CLASS_THREADS = 1024;  // of a block at most
// Classes of a unit. Two of float64 would be 16 bytes too, but more registers than there are.
PG_INLINE constexpr int class_unit(Type type) { return type == F32 ? 4 : type == F64 ? 1 : 8; }
// Threads of a block: the number of classes alone decides, and with it the order of the sums.
inline int class_threads(Type type, int64_t classes) {
  const int64_t each = class_unit(type) * WARP, warps = (classes + each - 1) / each;
  return int(warps * WARP < CLASS_THREADS ? warps * WARP : CLASS_THREADS);
}

namespace {

template <Type TYPE>
using Real = std::conditional_t<TYPE == F64, double, float>;

PG_INLINE float larger(float a, float b) { return ::fmaxf(a, b); }
PG_INLINE double larger(double a, double b) { return ::fmax(a, b); }

// What a block's threads find: maxima, then sums. join: with those of the lane ^ mask, which gets the same bits.
enum Found : uint32_t { A_CLASS = 1, NO_CLASS = 2 };  // among the labels
template <class T>
struct Tops {
  T all, named;
  uint32_t labels;
  static PG_DEVICE Tops none() { return {-T(INFINITY), -T(INFINITY), 0}; }
  template <class THREAD>
  PG_DEVICE void join(const THREAD& thread, int mask) {
    all = larger(all, thread.exchange(all, mask));
    named = larger(named, thread.exchange(named, mask));
    labels |= thread.exchange(labels, mask);
  }
};
template <class T>
struct Sums {
  Sum<T> all, share, weighted;  // exponentials; those of the labels' classes, or q; q (l - m)
  static PG_DEVICE Sums none() { return {}; }
  template <class THREAD>
  static PG_DEVICE Sum<T> of_lane(const THREAD& thread, const Sum<T>& x, int mask) {
    return {thread.exchange(x.sum, mask), thread.exchange(x.error, mask)};
  }
  template <class THREAD>
  PG_DEVICE void join(const THREAD& thread, int mask) {
    all.add(of_lane(thread, all, mask));
    share.add(of_lane(thread, share, mask));
    weighted.add(of_lane(thread, weighted, mask));
  }
};
template <class T>
struct ClassShared {
  Tops<T> tops[CLASS_THREADS / WARP];
  Sums<T> sums[CLASS_THREADS / WARP];
};

// ---- memory ---------------------------------------------------------------------------------------------------------
template <Type TYPE, class THREAD>
PG_DEVICE Real<TYPE> load_class(const THREAD& thread, const char* data, int64_t element) {
  if constexpr (TYPE == F64) return thread.load(reinterpret_cast<const double*>(data) + element);
  if constexpr (TYPE == F32) return thread.load(reinterpret_cast<const float*>(data) + element);
  if constexpr (TYPE == F16 || TYPE == BF16)
    return widen_half<TYPE>(thread.load(reinterpret_cast<const uint16_t*>(data) + element));
}
template <Type TYPE, class THREAD>
PG_DEVICE void store_class(const THREAD& thread, char* data, int64_t element, Real<TYPE> x) {
  if constexpr (TYPE == F64) thread.store(reinterpret_cast<double*>(data) + element, x);
  if constexpr (TYPE == F32) thread.store(reinterpret_cast<float*>(data) + element, x);
  if constexpr (TYPE == F16 || TYPE == BF16)
    thread.store(reinterpret_cast<uint16_t*>(data) + element, uint16_t(narrow_pair<TYPE>(x, 0.f)));
}
template <Type TYPE>
using Classes = Pack<Real<TYPE>, class_unit(TYPE)>;

// `dense`: contiguous and aligned to 16 bytes. Behind the last class -inf.
template <Type TYPE, class THREAD>
PG_DEVICE Classes<TYPE> load_classes(const THREAD& thread, const char* data, int64_t stride, bool dense, int64_t first,
                                     int64_t classes) {
  constexpr int W = class_unit(TYPE);
  Classes<TYPE> x;
  if constexpr (W > 1) {
    if (dense && first + W <= classes) {
      const Words16 w = thread.load16(data + first * (16 / W));
      for (int i = 0; i < W; ++i) {
        if constexpr (TYPE == F32) x.v[i] = float_of(w.v[i]);
        if constexpr (TYPE != F32) x.v[i] = widen_half<TYPE>(uint16_t(w.v[i / 2] >> 16 * (i % 2)));
      }
      return x;
    }
  }
  for (int i = 0; i < W; ++i) {
    x.v[i] = -Real<TYPE>(INFINITY);
    if (first + i < classes) x.v[i] = load_class<TYPE>(thread, data, (first + i) * stride);
  }
  return x;
}
template <Type TYPE, class THREAD>
PG_DEVICE void store_classes(const THREAD& thread, char* data, bool dense, int64_t first, int64_t classes,
                             const Classes<TYPE>& x) {
  constexpr int W = class_unit(TYPE);
  if constexpr (W > 1) {
    if (dense && first + W <= classes) {
      Words16 w;
      for (int i = 0; i < 4; ++i) {
        if constexpr (TYPE == F32) w.v[i] = bits_of(x.v[i]);
        if constexpr (TYPE != F32) w.v[i] = narrow_pair<TYPE>(x.v[2 * i], x.v[2 * i + 1]);
      }
      thread.store16(data + first * (16 / W), w);
      return;
    }
  }
  for (int i = 0; i < W; ++i) {
    if (first + i < classes) store_class<TYPE>(thread, data, first + i, x.v[i]);
  }
}
// A number of F32 or F64.
template <class T, class THREAD>
PG_DEVICE T load_number(const THREAD& thread, const void* data, Type type, int64_t element) {
  if (type == F64) return T(thread.load(static_cast<const double*>(data) + element));
  return T(thread.load(static_cast<const float*>(data) + element));
}

// ---- the sample -----------------------------------------------------------------------------------------------------
template <Type TYPE, class THREAD>
struct ClassifierBlock {
  static constexpr int W = class_unit(TYPE);
  typedef Real<TYPE> T;
  typedef Classes<TYPE> V;

  const THREAD& thread;
  const ClassifierGradArgs& a;
  const int64_t i;  // of the sample
  const char* const logits;
  char* const grad;
  const int64_t* const labels;
  const bool dense, dense_grad;

  PG_DEVICE ClassifierBlock(const THREAD& thread, const ClassifierGradArgs& a)
      : thread(thread),
        a(a),
        i(a.first + thread.block()),
        logits(static_cast<const char*>(a.logits) + thread.block() * a.batch_stride * size_of(TYPE)),
        grad(static_cast<char*>(a.grad) + thread.block() * a.classes * size_of(TYPE)),
        labels(static_cast<const int64_t*>(a.target) + i * a.target_stride),
        dense(a.class_stride == 1 && aligned(logits, 16)),
        dense_grad(aligned(grad, 16)) {}

  // f(first class) of each of the thread's units but the first.
  template <class F>
  PG_DEVICE void more(const F& f) const {
    const int64_t step = int64_t(thread.count()) * W;
    PG_ROLLED
    for (int64_t k = thread.index() * W + step; k < a.classes; k += step) f(k);
  }
  // f(number of the label, label) of those that name a class, each to one thread.
  template <class F>
  PG_DEVICE void each_label(const F& f) const {
    PG_ROLLED
    for (int64_t j = thread.index(); j < a.width; j += thread.count()) {
      const int64_t y = thread.load(labels + j);
      if (is_class(y, a.classes)) f(j, y);
    }
  }
  PG_DEVICE V load(int64_t k) const { return load_classes<TYPE>(thread, logits, a.class_stride, dense, k, a.classes); }
  PG_DEVICE T logit(int64_t y) const { return load_class<TYPE>(thread, logits, y * a.class_stride); }
  PG_DEVICE T share(int64_t k) const {  // q_k
    return k < a.classes ? load_number<T>(thread, a.target, a.scale_type, i * a.target_stride + k) : T(0);
  }
  static PG_DEVICE V exponentials(const V& x, T m) { return exp_sum(x - V::set(m), V::set(T(0))); }
  static PG_DEVICE T exponential(T x) { return exp_sum(Pack<T, 1>{{x}}, Pack<T, 1>{{T(0)}}).v[0]; }

  PG_DEVICE Tops<T> tops(const V& kept) const {
    Tops<T> t = Tops<T>::none();
    const auto add = [&](const V& x) PG_LAMBDA {
      for (int u = 0; u < W; ++u) t.all = larger(t.all, x.v[u]);
    };
    add(kept);
    more([&](int64_t k) PG_LAMBDA { add(load(k)); });
    if (a.distribution) return t;
    PG_ROLLED
    for (int64_t j = thread.index(); j < a.width; j += thread.count()) {
      const int64_t y = thread.load(labels + j);
      if (y >= a.classes) t.labels |= NO_CLASS;
      if (!is_class(y, a.classes)) continue;
      t.labels |= A_CLASS;
      t.named = larger(t.named, logit(y));
    }
    return t;
  }
  PG_DEVICE bool repeated(int64_t j, int64_t y) const {
    bool found = false;
    PG_ROLLED
    for (int64_t before = 0; before < j; ++before) found |= thread.load(labels + before) == y;
    return found;
  }
  // Makes exponentials of the kept logits.
  PG_DEVICE Sums<T> sums(V& kept, T m, T n) const {
    Sums<T> s = Sums<T>::none();
    const auto add = [&](const V& x, const V& e, int64_t k) PG_LAMBDA {
      for (int u = 0; u < W; ++u) s.all.add(e.v[u]);
      if (!a.distribution) return;
      for (int u = 0; u < W; ++u) {
        const T q = share(k + u);
        s.share.add(q);
        if (q != T(0)) s.weighted.add(q * (x.v[u] - m));
      }
    };
    const V e = exponentials(kept, m);
    add(kept, e, thread.index() * W);
    kept = e;
    more([&](int64_t k) PG_LAMBDA {
      const V x = load(k);
      add(x, exponentials(x, m), k);
    });
    if (a.distribution) return s;
    each_label([&](int64_t j, int64_t y) PG_LAMBDA {
      if (!repeated(j, y)) s.share.add(exponential(logit(y) - n));
    });
    return s;
  }
  PG_DEVICE void write(int64_t k, const V& e, T scale, T inverse, T sum_q) const {
    V g;
    for (int u = 0; u < W; ++u) {
      const T q = a.distribution ? share(k + u) : T(0);
      g.v[u] = grad_element(scale, q, e.v[u], inverse, sum_q);
    }
    store_classes<TYPE>(thread, grad, dense_grad, k, a.classes, g);
  }
  PG_DEVICE void write_log_prob(T x) const {
    if (thread.index() != 0 || !a.log_prob) return;
    if (a.scale_type == F64) {
      thread.store(static_cast<double*>(a.log_prob) + i, double(x));
    } else {
      thread.store(static_cast<float*>(a.log_prob) + i, float(x));
    }
  }

  PG_DEVICE void run(ClassShared<T>& shared) const {
    const int64_t first = thread.index() * W;
    int64_t row = 0;
    if (a.samples) {
      row = thread.load(&a.samples[i].row);
      if (!is_active(int32_t(row), thread.load(&a.samples[i].end))) {
        write_log_prob(T(0));
        const V zero = V::set(T(0));
        store_classes<TYPE>(thread, grad, dense_grad, first, a.classes, zero);
        more([&](int64_t k) PG_LAMBDA { store_classes<TYPE>(thread, grad, dense_grad, k, a.classes, zero); });
        return;
      }
    }
    V kept = load(first);
    T scale = load_number<T>(thread, a.scale, a.scale_type, row * a.scale_stride + i);
    const Tops<T> top = over_block(thread, tops(kept), shared.tops);
    const T m = subtrahend(top.all), n = top.named;
    const Sums<T> sum = over_block(thread, sums(kept, m, n), shared.sums);
    const T E = sum.all.value(), F = sum.share.value(), inverse = T(1) / E, sum_q = a.distribution ? F : T(1);
    const bool known = a.distribution || (top.labels == A_CLASS && n != -T(INFINITY));
    if (!known) scale = T(NAN);
    if (thread.index() == 0) {
      T log_prob =
          a.distribution ? log_prob_of_distribution(sum.weighted.value(), F, E) : log_prob_of_labels(n, m, F, E);
      write_log_prob(known ? log_prob : T(NAN));
      if (a.check && E != E) thread.set_bits(&a.samples[i].flags, NONFINITE_LOGITS);
    }
    write(first, kept, scale, inverse, sum_q);
    more([&](int64_t k) PG_LAMBDA { write(k, exponentials(load(k), m), scale, inverse, sum_q); });
    if (a.distribution) return;
    thread.sync();  // the labels' classes once more, by other threads
    const T over = T(1) / F;
    each_label([&](int64_t, int64_t y) PG_LAMBDA {
      const T x = logit(y);
      store_class<TYPE>(thread, grad, y,
                        grad_element(scale, exponential(x - n) * over, exponential(x - m), inverse, T(1)));
    });
  }
};

template <Type TYPE, class THREAD>
PG_DEVICE void classifier_grad_sample(const THREAD& thread, const ClassifierGradArgs& a,
                                      ClassShared<Real<TYPE>>& shared) {
  ClassifierBlock<TYPE, THREAD>(thread, a).run(shared);
}

}  // namespace
}  // namespace pyguide
