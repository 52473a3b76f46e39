// Moments, and the guided output by groups, of one sample on a CPU; included by cpu.cpp once per instruction set. See
// moments.h for the formula.
//
// Sums have 16 lanes on every instruction set, so that those with a fused multiply-add agree in every bit: lane l of a
// run of elements has those at l, l + 16, .. Groups whose elements lie side by side (inner = 1) are such runs;
// otherwise neighbouring groups are the lanes. Operands that are dense and of the state's type are read in place, all
// others, and the ends of runs, through scratch in L1, with zeros behind them, which add nothing. Programs run for
// GROUPS at once.
//
// On a Zen 4 core with AVX-512, at 1 x 4 x 64 x 64 in float32 with K = 2, moments and step take 1.2 times as long as
// the step (model space, no sums) to 1.8 times (denoised space, with sums); 40 operations for each of 4,096 tokens: 35
// us.
#pragma once
#include "classifier_grad_cpu.h"  // Lanes
#include "moments.h"

namespace pyguide {
namespace {

constexpr int64_t GROUPS = GROUP_TILE;              // whose programs run at once
constexpr int64_t BATCH = LANES * LANE_TERMS;       // elements of a run between two additions to doubles
constexpr int OPERANDS = MAX_BRANCHES + MAX_SLOTS;  // branch k: k, slot c: K + c
static_assert(GROUPS % LANES == 0 && BLOCK % BATCH == 0 && CHUNK % BATCH == 0 && BLOCK % (LANE_TERMS * GROUPS) == 0);

// ---- sums of products ---------------------------------------------------------------------------------------------
template <class T>
struct Basis {
  Space<T> space;
  int branches, vectors;  // K, n
  bool sums;
  const T* at[MAX_VECTORS + 1];  // what y_0 .. y_{n-1} are read from, and s_0
};

// y_0. Without a fused multiply-add the error of the second product counts too, and that of the sum.
template <class T, class V>
PG_INLINE V reference(const Space<T>& f, const V& s, const V& m_0) {
#if PG_LEVEL > 0 || defined(__aarch64__)
  return f.reference(s, m_0);
#else
  const V x = V::set(f.x), m = V::set(f.m), a = x * s, b = m * m_0;
  V sum, error;
  two_sum(a, b, sum, error);
  const V low = V::set(f.x_low) * s + V::set(f.m_low) * m_0;
  return sum + (error + product_error(x, s, a) + product_error(m, m_0, b) + low);
#endif
}
constexpr int pair_row(int n, int p) {
  int i = 0;
  for (; p >= n - i; ++i) p -= n - i;
  return i;
}
constexpr int pair_column(int n, int p) {
  int i = 0;
  for (; p >= n - i; ++i) p -= n - i;
  return i + p;
}

// Adds to `to` [count][pitch] the moments by lane: term t of lane l is element t * stride + l of the operands.
// n = K + SG vectors, K of them branches. RUN: stride and lanes are LANES.
template <int K, int SG, bool SUMS, bool MODEL, bool RUN, class T>
__attribute__((noinline)) void accumulate(const Basis<T>& basis, int64_t terms, int64_t given_stride,
                                          int64_t given_lanes, double* to, int64_t given_pitch) {
  const int64_t stride = RUN ? LANES : given_stride, lanes = RUN ? LANES : given_lanes,
                pitch = RUN ? LANES : given_pitch;
  typedef typename Native<T>::V V;
  constexpr int n = K + SG, pairs = n * (n + 1) / 2;
  const Basis<T> f = basis;
  const V zero = V::set(T(0));
  for (int64_t t = 0; t < terms; t += LANE_TERMS) {
    for (int64_t l = 0; l < lanes; l += V::width) {
      V sum[n], product[pairs];
      unrolled<n>([&](auto i) PG_LAMBDA { sum[i] = zero; });
      unrolled<pairs>([&](auto p) PG_LAMBDA { product[p] = zero; });
      const auto add = [&](int64_t e) PG_LAMBDA {
        V y[n];
        const V m_0 = V::load(f.at[0] + e);
        if constexpr (MODEL) {
          y[0] = m_0;
        } else {
          y[0] = reference(f.space, V::load(f.at[n] + e), m_0);
        }
        unrolled<n - 1>([&](auto i) PG_LAMBDA {
          const V x = V::load(f.at[i + 1] + e);
          y[i + 1] = i + 1 < K ? x - m_0 : x;
        });
        if constexpr (SUMS) unrolled<n>([&](auto i) PG_LAMBDA { sum[i] = sum[i] + y[i]; });
        unrolled<pairs>([&](auto p) PG_LAMBDA {
          constexpr int i = pair_row(n, p), j = pair_column(n, p);
          product[p] = fma(y[i], y[j], product[p]);
        });
      };
      const int64_t first = t * stride + l, left = terms - t;
      if (left >= LANE_TERMS) {
        unrolled<LANE_TERMS>([&](auto j) PG_LAMBDA { add(first + j * stride); });
      } else {
        for (int64_t j = 0; j < left; ++j) add(first + j * stride);
      }
      if constexpr (SUMS) unrolled<n>([&](auto i) PG_LAMBDA { add_to(to + i * pitch + l, sum[i]); });
      unrolled<pairs>([&](auto p) PG_LAMBDA { add_to(to + (n + p) * pitch + l, product[p]); });
    }
  }
}
// Any number of vectors, which live in memory.
template <class T>
__attribute__((noinline)) void accumulate_any(const Basis<T>& f, int64_t terms, int64_t stride, int64_t lanes,
                                              double* to, int64_t pitch) {
  typedef typename Native<T>::V V;
  const int n = f.vectors;
  const V zero = V::set(T(0));
  for (int64_t t = 0; t < terms; t += LANE_TERMS) {
    const int64_t count = terms - t < LANE_TERMS ? terms - t : LANE_TERMS;
    for (int64_t l = 0; l < lanes; l += V::width) {
      V y[MAX_VECTORS][LANE_TERMS];
      for (int64_t j = 0; j < count; ++j) {
        const int64_t e = (t + j) * stride + l;
        const V m_0 = V::load(f.at[0] + e);
        y[0][j] = f.space.model ? m_0 : reference(f.space, V::load(f.at[n] + e), m_0);
        for (int i = 1; i < n; ++i) {
          const V x = V::load(f.at[i] + e);
          y[i][j] = i < f.branches ? x - m_0 : x;
        }
      }
      double* row = to + l;
      for (int i = 0; i < n; ++i, row += pitch) {
        if (!f.sums) continue;
        V sum = zero;
        for (int64_t t = 0; t < count; ++t) sum = sum + y[i][t];
        add_to(row, sum);
      }
      for (int i = 0; i < n; ++i) {
        for (int j = i; j < n; ++j, row += pitch) {
          V sum = zero;
          for (int64_t t = 0; t < count; ++t) sum = fma(y[i][t], y[j][t], sum);
          add_to(row, sum);
        }
      }
    }
  }
}
template <class T>
using Accumulate = void (*)(const Basis<T>&, int64_t, int64_t, int64_t, double*, int64_t);
template <bool RUN, int K, int SG>
inline Accumulate<float> accumulate_of(bool sums, bool model) {
  if (sums) return model ? accumulate<K, SG, true, true, RUN, float> : accumulate<K, SG, true, false, RUN, float>;
  return model ? accumulate<K, SG, false, true, RUN, float> : accumulate<K, SG, false, false, RUN, float>;
}
template <bool RUN>
inline Accumulate<float> accumulate_of(const Basis<float>& f) {
  if (f.branches == 2 && f.vectors == 2) return accumulate_of<RUN, 2, 0>(f.sums, f.space.model);
  if (f.branches == 2 && f.vectors == 3) return accumulate_of<RUN, 2, 1>(f.sums, f.space.model);
  if (f.branches == 3 && f.vectors == 3) return accumulate_of<RUN, 3, 0>(f.sums, f.space.model);
  return accumulate_any<float>;
}
template <bool RUN>
inline Accumulate<double> accumulate_of(const Basis<double>&) {
  return accumulate_any<double>;
}

inline double tree(const double* lanes) {
  double x[LANES];
  for (int i = 0; i < LANES; ++i) x[i] = lanes[i];
  for (int half = LANES / 2; half > 0; half /= 2) {
    for (int i = 0; i < half; ++i) x[i] = x[i] + x[i + half];
  }
  return x[0];
}

// ---- one sample ---------------------------------------------------------------------------------------------------
template <class T>
struct Operands {
  const StepArgs& a;
  const int64_t b, N = a.channels * a.inner, row = a.samples[b].row;
  View view[OPERANDS];
  const T* at[OPERANDS];
  alignas(64) T scratch[OPERANDS][BLOCK];

  Operands(const StepArgs& a, int64_t b) : a(a), b(b) {}

  // These operands are read from now on; true if all of them can be in place.
  bool open(uint32_t mask) {
    const int32_t* source = route(a, a.source, b, row);
    bool direct = true;
    for (int i = 0; i < a.branches + a.slots; ++i) {
      if (!(mask >> i & 1)) continue;
      if (i < a.branches) {
        view[i] = View(a.output[i], a.output_type, source[i], a);
        direct &= view[i].dense(Native<T>::type);
      } else {
        view[i] = class_view(slot(i - a.branches), Native<T>::type, N, 1);
      }
    }
    return direct;
  }
  T* slot(int c) const { return static_cast<T*>(a.state) + (c * a.batch + b) * N; }

  void point(uint32_t mask, int64_t e) {
    for (int i = 0; mask >> i; ++i) {
      if (mask >> i & 1) at[i] = reinterpret_cast<const T*>(view[i].at(e));
    }
  }
  // Elements [e, e + n) and zeros up to `padded` of them, from `to` on in the scratch.
  void stage(uint32_t mask, int64_t e, int64_t n, int64_t padded, int64_t to) {
    for (int i = 0; mask >> i; ++i) {
      if (!(mask >> i & 1)) continue;
      gather(scratch[i] + to, view[i], e, n);
      for (int64_t j = n; j < padded; ++j) scratch[i][to + j] = T(0);
      at[i] = scratch[i];
    }
  }
};

PG_INLINE int64_t padded_to_lanes(int64_t n) { return (n + LANES - 1) / LANES * LANES; }

template <class T>
struct MomentsOf {
  const MomentsArgs& m;
  Operands<T> from;
  const int count = moments_count(m.program.vectors);
  Basis<T> basis;
  uint32_t reads;
  bool direct;
  Accumulate<T> of_run, of_rows;  // whose lanes are those of a run, or neighbouring groups
  alignas(64) double lanes[MAX_MOMENTS][LANES];

  MomentsOf(const StepArgs& a, const MomentsArgs& m, int64_t b)
      : m(m),
        from(a, b),
        basis{Space<T>(parameters_of(m, b, a.samples[b].row)), a.branches, m.program.vectors, m.program.sums != 0, {}} {
    reads = ((1u << a.branches) - 1) | (basis.space.model ? 0 : 1u << a.branches);
    for (int j = a.branches; j < basis.vectors; ++j) reads |= 1u << operand(j);
    direct = from.open(reads);
    of_run = accumulate_of<true>(basis);
    of_rows = accumulate_of<false>(basis);
  }
  int operand(int vector) const {
    return vector < basis.branches ? vector : vector + from.a.slots - from.a.guidance_slots;
  }

  const Basis<T>& pointed() {
    for (int i = 0; i < basis.vectors; ++i) basis.at[i] = from.at[operand(i)];
    basis.at[basis.vectors] = from.at[basis.branches];
    return basis;
  }
  // The moments of the run [e, e + n), at most a chunk, to to[0], to[pitch], ..
  void run(int64_t e, int64_t n, double* to, int64_t pitch, bool more) {
    memset(lanes, 0, size_t(count) * sizeof(lanes[0]));
    int64_t done = !direct ? 0 : n % LANES ? n / BATCH * BATCH : n;
    if (done) {
      from.point(reads, e);
      of_run(pointed(), done / LANES, LANES, LANES, lanes[0], LANES);
    }
    for (; done < n; done += BLOCK) {
      const int64_t left = n - done < BLOCK ? n - done : BLOCK, padded = padded_to_lanes(left);
      from.stage(reads, e + done, left, padded, 0);
      of_run(pointed(), padded / LANES, LANES, LANES, lanes[0], LANES);
    }
    const int unread = basis.sums ? 0 : basis.vectors;
    for (int i = 0; i < unread; ++i) to[i * pitch] = 0;
    for (int i = unread; i < count; ++i) {
      to[i * pitch] = more ? to[i * pitch] + tree(lanes[i]) : tree(lanes[i]);
    }
  }
  void chunk(int64_t c) {
    const int64_t e = c * CHUNK, n = from.N - e < CHUNK ? from.N - e : CHUNK;
    run(e, n, m.partial + (from.b * chunks_of(from.N) + c) * count, 1, false);
  }
  // Those of `n` groups from `group` on, which have one place in `outer` if inner > 1, to `to` [count][GROUPS].
  void groups(int64_t group, int64_t n, double* to) {
    memset(to, 0, size_t(count * GROUPS) * sizeof(double));  // also of groups that a short tile lacks
    if (m.inner == 1) {
      for (int64_t g = 0; g < n; ++g) {
        for (int64_t i = 0; i < m.reduce; i += CHUNK) {
          run((group + g) * m.reduce + i, m.reduce - i < CHUNK ? m.reduce - i : CHUNK, to + g, GROUPS, i > 0);
        }
      }
      return;
    }
    const int64_t e = group / m.inner * m.reduce * m.inner + group % m.inner, width = padded_to_lanes(n);
    if (direct && width == n) {
      from.point(reads, e);
      of_rows(pointed(), m.reduce, m.inner, width, to, GROUPS);
      return;
    }
    constexpr int64_t ROWS = BLOCK / GROUPS;
    for (int64_t r = 0; r < m.reduce; r += ROWS) {
      const int64_t rows = m.reduce - r < ROWS ? m.reduce - r : ROWS;
      for (int64_t i = 0; i < rows; ++i) from.stage(reads, e + (r + i) * m.inner, n, width, i * width);
      of_rows(pointed(), rows, width, width, to, GROUPS);
    }
  }
};

template <class T>
void moments_as(const StepArgs& a, const MomentsArgs& m, int64_t b, int64_t chunk) {
  MomentsOf<T>(a, m, b).chunk(chunk);
}
void moments(const StepArgs& a, const MomentsArgs& m, int64_t b, int64_t chunk) {
  (a.state_type == F64 ? moments_as<double> : moments_as<float>)(a, m, b, chunk);
}

}  // namespace
}  // namespace pyguide
