// The step on a CPU, compiled once per instruction set (PG_LEVEL). See step.h for the formula.
//
// The vector body sees only full vectors of the state's type behind contiguous pointers. Operands that are so already
// are read and written in place over long runs. The others (16-bit, strided, the tail of a sample, Philox noise) pass
// through a block of scratch that stays in L1. So body and tail share one polynomial, nothing past an operand is
// touched, and an element's bits depend on nothing but its own values.
#include "cpu.h"
#include "staging.h"

#if PG_LEVEL == 2
#define PG_LEVEL_NAME avx512
#elif PG_LEVEL == 1
#define PG_LEVEL_NAME avx2
#else
#define PG_LEVEL_NAME baseline
#endif
#define PG_CAT_(a, b) a##b
#define PG_CAT(a, b) PG_CAT_(a, b)
#define PG_STRING_(a) #a
#define PG_STRING(a) PG_STRING_(a)

namespace pyguide {
namespace {

constexpr int64_t GRAIN = 64;  // elements: every body width divides it

template <class T>
struct Native;
template <>
struct Native<float> {
  typedef Float V;
  static constexpr Type type = F32;
};
template <>
struct Native<double> {
  typedef Double V;
  static constexpr Type type = F64;
};

// ---- the body -----------------------------------------------------------------------------------------------------
template <class T>
struct Pointers {
  const void* m[MAX_BRANCHES];
  const T *s[MAX_SLOTS], *z, *g, *v;
  T *s_out[MAX_SLOTS], *denoised;
  void* in[MAX_BRANCHES];
  int inputs;
};

// n elements, a multiple of GRAIN; m and in behind pointers to IO. True if a written s'_0 is not finite.
template <int K, int S, int U, bool PLAIN, Type IO, class T>
__attribute__((noinline)) bool body(const Program<T>& p, const Pointers<T>& at, int64_t n) {
  typedef Wide<typename Native<T>::V, U> V;
  constexpr int KA = K ? K : MAX_BRANCHES, SA = S ? S : MAX_SLOTS;
  const uint32_t reads_m = p.reads_m, reads_s = p.reads_s;
  const int inputs = at.inputs;
  const bool scaled = inputs && p.c_in != T(0), kept = scaled && !(p.writes & 1);
  const V zero = V::set(T(0)), c_in = V::set(p.c_in);
  V unfinite = zero, D = zero;
  for (int64_t i = 0; i < n; i += V::width) {
    V m[KA], s[SA], x = zero;
    each<K>(p.branches, [&](auto k) PG_LAMBDA {
      if (reads_m >> k & 1) m[k] = load_as<IO>(zero, at.m[k], i);
    });
    each<S>(p.slots, [&](auto c) PG_LAMBDA {
      if (reads_s >> c & 1) s[c] = V::load(at.s[c] + i);
    });
    if (kept) x = c_in * s[0];
    step_formula<K, S, PLAIN>(
        p, m, s, [&]() PG_LAMBDA { return V::load(at.z + i); }, [&]() PG_LAMBDA { return V::load(at.g + i); },
        [&]() PG_LAMBDA { return V::load(at.v + i); }, D,
        [&](auto r, const V& value) PG_LAMBDA {
          value.store(at.s_out[r] + i);
          if (r == 0) {
            unfinite = fma(value, zero, unfinite);  // 0 * x is NaN exactly where x is not finite
            if (scaled) x = c_in * value;
          }
        });
    each<K>(p.branches, [&](auto k) PG_LAMBDA {
      if (k < inputs) store_as<IO>(x, at.in[k], i);
    });
    if (at.denoised) D.store(at.denoised + i);
  }
  return any_nan(unfinite);
}

// The specialised shapes; everything else goes through the one with run-time K and S, whose vectors live in memory.
inline bool specialised(const Program<float>& p) {
  return p.branches <= 2 && (p.slots <= 3 || (p.slots == 4 && p.needs.plain()));
}

template <int K, Type IO>
inline bool plain_body(const Program<float>& p, const Pointers<float>& at, int64_t n) {
  if (p.slots == 1) return body<K, 1, UNROLL, true, IO>(p, at, n);
  if (p.slots == 2) return body<K, 2, UNROLL, true, IO>(p, at, n);
  if constexpr (IO == F32) {
    if (p.slots == 4) return body<K, 4, UNROLL / 2, true, IO>(p, at, n);
  }
  return body<K, 3, UNROLL, true, IO>(p, at, n);
}
template <int K>
inline bool any_body(const Program<float>& p, const Pointers<float>& at, Type io, int64_t n) {
  if (io == F16) return plain_body<K, F16>(p, at, n);
  if (io == BF16) return plain_body<K, BF16>(p, at, n);
  if (p.needs.plain()) return plain_body<K, F32>(p, at, n);
  if (p.slots == 1) return body<K, 1, 2, false, F32>(p, at, n);
  if (p.slots == 2) return body<K, 2, 2, false, F32>(p, at, n);
  return body<K, 3, 2, false, F32>(p, at, n);
}
inline bool run_body(const Program<float>& p, const Pointers<float>& at, Type io, int64_t n) {
  if (!specialised(p)) return body<0, 0, 2, false, F32>(p, at, n);
  return p.branches == 1 ? any_body<1>(p, at, io, n) : any_body<2>(p, at, io, n);
}
inline bool run_body(const Program<double>& p, const Pointers<double>& at, Type, int64_t n) {
  return body<0, 0, 2, false, F64>(p, at, n);
}
// The type behind which the model's operands are read and written directly where they are dense.
inline Type direct_type(const Program<float>& p, const StepArgs& a) {
  const bool half = a.output_type == a.input_type && (a.output_type == F16 || a.output_type == BF16);
  return half && p.needs.plain() && p.branches <= 2 && p.slots <= 3 ? a.output_type : F32;
}
inline Type direct_type(const Program<double>&, const StepArgs&) { return F64; }

// ---- one sample's range -------------------------------------------------------------------------------------------
template <class T>
struct Scratch {
  alignas(64) T block[MAX_BRANCHES + MAX_SLOTS + 5][BLOCK];
};

template <class T>
struct Range {
  const StepArgs& a;
  const int64_t b, N = a.channels * a.inner;
  Program<T> p;
  View m[MAX_BRANCHES], in[MAX_BRANCHES], z, g, v, denoised;
  T* s[MAX_SLOTS];
  int inputs = 0;
  bool direct = true, inputs_dense = true, interleaved = false, philox = false;
  Type io;  // of the model's operands where the body reads and writes them directly
  Scratch<T> scratch;

  Range(const StepArgs& a, int64_t b, bool refresh) : a(a), b(b) {
    constexpr Type compute = Native<T>::type;
    build(p, a, b, refresh);
    io = direct_type(p, a);
    for (int c = 0; c < a.slots; ++c) s[c] = static_cast<T*>(a.state) + (c * a.batch + b) * N;
    const int64_t row = launch_row(a.samples[b], refresh);
    const int32_t *source = route(a, a.source, b, row), *target = route(a, a.target, b, row);
    for (int k = 0; k < a.branches; ++k) {
      if (p.reads_m >> k & 1) {
        m[k] = View(a.output[k], a.output_type, source[k], a);
        direct &= m[k].dense(io);
        interleaved |= m[k].interleaved();
      }
      if (p.needs.input() && target[k] >= 0) {
        in[inputs] = View(a.input[k], a.input_type, target[k], a);
        direct &= in[inputs].dense(io);
        inputs_dense &= in[inputs].dense(compute);
        interleaved |= in[inputs++].interleaved();
      }
    }
    if (p.needs.noise()) {
      philox = !a.noise.data;
      if (!philox) z = View(a.noise, a.state_type, b, a);
      direct &= !philox && z.dense(compute);
    }
    if (p.needs.gradient()) {
      g = View(a.gradient, a.state_type, b, a);
      direct &= g.dense(compute);
    }
    if (p.needs.variance()) {
      v = View(a.variance, a.output_type, source[a.variance_branch], a);
      direct &= v.dense(compute);
    }
    if (writes_denoised()) {
      denoised = View(a.denoised, a.state_type, b, a);
      direct &= denoised.dense(compute);
    }
  }
  bool writes_denoised() const { return p.needs.denoised() && a.denoised.data; }

  bool run(int64_t begin, int64_t end) {
    bool unfinite = false;
    if (direct) {
      const int64_t whole = (end - begin) / GRAIN * GRAIN;
      if (whole) unfinite |= block(begin, whole);
      begin += whole;
    }
    // Interleaved channels share cache lines: all of them for one stretch of positions before the next (a third off the
    // time at [4096, 64]). Short stretches where there are many channels, so that the lines are still in L1.
    const int64_t stretch = a.channels < 16 ? BLOCK : GRAIN;
    const int64_t first = (begin + a.inner - 1) / a.inner, last = end / a.inner;
    if (interleaved && last - first > 1 && !(philox && a.inner % 4)) {
      unfinite |= blocks(begin, first * a.inner);
      for (int64_t i = 0; i < a.inner; i += stretch) {
        const int64_t n = a.inner - i < stretch ? a.inner - i : stretch;
        for (int64_t c = first; c < last; ++c) unfinite |= block(c * a.inner + i, n);
      }
      begin = last * a.inner;
    }
    return unfinite | blocks(begin, end);
  }
  bool blocks(int64_t begin, int64_t end) {
    bool unfinite = false;
    for (; begin < end; begin += BLOCK) unfinite |= block(begin, end - begin < BLOCK ? end - begin : BLOCK);
    return unfinite;
  }

  const T* load(const View& view, int64_t e, int64_t n, int64_t padded, T* to) {
    if (n == padded && view.dense(Native<T>::type)) return reinterpret_cast<const T*>(view.at(e));
    gather(to, view, e, n);
    for (int64_t i = n; i < padded; ++i) to[i] = T(0);
    return to;
  }

  // Elements [e, e + n): at most BLOCK of them unless everything is direct and GRAIN divides n.
  bool block(int64_t e, int64_t n) {
    constexpr Type compute = Native<T>::type;
    const int64_t padded = (n + GRAIN - 1) / GRAIN * GRAIN;
    const bool full = n == padded, raw = full && direct;
    Pointers<T> at;
    T(*next)[BLOCK] = scratch.block;
    for (int k = 0; k < p.branches; ++k) {
      if (p.reads_m >> k & 1) at.m[k] = raw ? m[k].at(e) : static_cast<const void*>(load(m[k], e, n, padded, *next++));
    }
    for (int c = 0; c < p.slots; ++c) {
      at.s[c] = at.s_out[c] = s[c] + e;
      if (!full && ((p.reads_s | p.writes) >> c & 1)) {
        at.s[c] = at.s_out[c] = *next++;
        for (int64_t i = 0; i < padded; ++i) at.s_out[c][i] = i < n ? s[c][e + i] : T(0);
      }
    }
    if (philox) {
      fill_normals(*next, e, padded, a.samples[b].seed, uint32_t(a.samples[b].row), TAG_STEP);
      at.z = *next++;
    } else if (p.needs.noise()) {
      at.z = load(z, e, n, padded, *next++);
    }
    if (p.needs.gradient()) at.g = load(g, e, n, padded, *next++);
    if (p.needs.variance()) at.v = load(v, e, n, padded, *next++);
    T* staged_input = nullptr;
    at.inputs = inputs;
    if (raw || (full && inputs_dense)) {
      for (int j = 0; j < inputs; ++j) at.in[j] = in[j].at(e);
    } else if (inputs) {
      at.inputs = 1;
      at.in[0] = staged_input = *next++;
    }
    at.denoised = nullptr;
    bool staged_denoised = false;
    if (writes_denoised()) {
      staged_denoised = !(full && denoised.dense(compute));
      at.denoised = staged_denoised ? *next++ : reinterpret_cast<T*>(denoised.at(e));
    }
    const bool unfinite = run_body(p, at, raw ? io : compute, padded);
    if (!full) {
      for (int r = 0; r < p.slots; ++r) {
        if (p.writes >> r & 1) memcpy(s[r] + e, at.s_out[r], size_t(n) * sizeof(T));
      }
    }
    if (staged_input) {
      for (int j = 0; j < inputs; ++j) scatter(in[j], e, n, staged_input);
    }
    if (staged_denoised) scatter(denoised, e, n, at.denoised);
    return unfinite;
  }
};

bool step(const StepArgs& a, int64_t b, int64_t begin, int64_t end, bool refresh) {
  bool unfinite;
  if (a.state_type == F64) {
    Range<double> range(a, b, refresh);
    unfinite = range.run(begin, end);
  } else {
    Range<float> range(a, b, refresh);
    unfinite = range.run(begin, end);
  }
  return unfinite && a.check;
}

template <class T>
void normals_of(void* to, Type type, int64_t first, int64_t count, uint64_t seed, uint32_t ordinal, uint32_t tag) {
  alignas(64) T z[BLOCK + 64];
  const int64_t end = first + count, size = size_of(type);
  for (int64_t e = first; e < end;) {
    const int64_t start = e / 4 * 4, n = end - start < BLOCK ? end - start : BLOCK;
    fill_normals(z, start, n, seed, ordinal, tag);
    narrow(static_cast<char*>(to) + (e - first) * size, z + (e - start), type, start + n - e);
    e = start + n;
  }
}
void normals(void* to, Type type, int64_t first, int64_t count, uint64_t seed, uint32_t ordinal, uint32_t tag) {
  (type == F64 ? normals_of<double> : normals_of<float>)(to, type, first, count, seed, ordinal, tag);
}

}  // namespace
}  // namespace pyguide

#include "classifier_grad_cpu.h"  // on Native
#include "groups_cpu.h"
#include "moments_cpu.h"
#include "quantile_cpu.h"

namespace pyguide {

extern const Kernel PG_CAT(kernel_, PG_LEVEL_NAME) = {PG_STRING(PG_ISA), step,   normals, classifier_grad,
                                                      moments,           guided, quantile};

}  // namespace pyguide
