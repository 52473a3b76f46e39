// The step: the one formula between two model calls, for sample b standing at its row. K branches m_k, S slots s_c of
// which the first M are the solver's (s_0 is the noisy x) and the last Sg the guidance method's own. Per element:
//
// clang-format off
//   G    = sum_k w_k m_k + sum_c o_c s_c                               guided output
//   U    = G, or sum_k v_k m_k with the flag SEPARATE
//   D    = clip(a_x s_0 + a_g G, lo, hi), or clamp(a_x s_0 + a_g G, -b, b) / b with a per-sample bound b != 0
//   Sig  = 1, or exp(var_lo + (var_hi - var_lo) (v + 1) / 2)           learned variance v
//   s'_r = sum_c T_rc s_c + d_r D + e_r U + sum_k b_rk m_k + n_r sqrt(Sig) z + q_r Sig g    solver slots r < M
//   s'_r = h_r s_r + sum_k b_rk m_k                                                         guidance slots r >= S - Sg
//   model input = c_in s'_0, one rounding to its type;  denoised output = D
// clang-format on
//
// A coefficient that is exactly 0 means "not read": no product with it is formed, so its operand may be NaN or absent.
// Row 0 (the prologue) reads no model output and no weights. Slots without coefficients are not written (slot 0 is:
// with zeros), nor those whose only coefficient is T_rr = 1. All loads of an element come before its stores: slots are
// updated in place.
//
// Bytes per element: what the row reads and writes, once each (DDIM with K = 2 in float32: 3 reads + 3 writes = 24
// bytes). Accumulation: the state's type (float or double), fused multiply-adds, terms in the order of the formula.
//
// No framework, CUDA or ONNX Runtime header here. V is a vector of T (a few elements of a thread on a GPU) with
// V::set(T), +, *, /, fma(a, b, c), sqrt, clamp (which propagates NaN), product_error(a, b, a * b) and
// exp_sum(hi, lo) = exp(hi + lo).
#pragma once
#include <stdint.h>

#ifdef __CUDACC__
#define PG_INLINE __host__ __device__ __forceinline__
#define PG_LAMBDA
#define PG_ROLLED _Pragma("unroll 1")
#else
#define PG_INLINE inline __attribute__((always_inline))
#define PG_LAMBDA __attribute__((always_inline))
#define PG_ROLLED
#endif

namespace pyguide {

constexpr int ABI = 4;
constexpr int MAX_BRANCHES = 16;
constexpr int MAX_SLOTS = 16;

enum Type : int32_t { F32 = 0, F16 = 1, BF16 = 2, F64 = 3, I64 = 4 };
enum Flag : int32_t { SEPARATE = 1, NONFINITE = 2, NONFINITE_LOGITS = 4 };

// Row: head, T[M][M], d[M], e[M], n[M], q[M].
enum Head { A_X, A_G, CLIP_LO, CLIP_HI, C_IN, TIMESTEP, VAR_LO, VAR_HI, HEAD };
// Weights block: w[K], v[K], o[S], b[S][K], h[Sg].
PG_INLINE constexpr int64_t row_width(int64_t slots) { return HEAD + slots * slots + 4 * slots; }
PG_INLINE constexpr int64_t weights_width(int64_t branches, int64_t slots, int64_t guidance_slots) {
  return 2 * branches + slots + slots * branches + guidance_slots;
}

struct Sample {
  int64_t table;    // element offset of its plan's row 0 in `tables`
  int64_t weights;  // element offset of its guidance block in `weights`
  uint64_t seed;
  int32_t row, end;  // row == end: idle
  int32_t slots;     // M of its plan
  int32_t method;    // 0: one weights block per row
  int32_t flags;
  int32_t ticket;  // GPU: blocks of the running launch that have read the row; 0 between launches
};
static_assert(sizeof(Sample) == 48, "mirrored by pyguide.layout.SAMPLE");

struct Operand {
  void* data;
  int64_t batch_stride, channel_stride, inner_stride;  // elements
};

struct StepArgs {
  int64_t batch, channels, inner;  // N = channels * inner elements per sample, logical index channel * inner + i
  int32_t branches, slots, guidance_slots, variance_branch;
  Type state_type, output_type, input_type, time_type;
  void* state;  // [S][B][N]
  const void *tables, *weights, *bound;
  Sample* samples;                 // [B]
  const int32_t *source, *target;  // [row][B][K], rows route_stride elements apart (0: one for all), -1: absent
  int64_t route_stride;
  Operand output[MAX_BRANCHES];                 // output_type, batch index source[row][b][k]
  Operand input[MAX_BRANCHES];                  // input_type, batch index target[row][b][k]
  void* time[MAX_BRANCHES];                     // time_type, index target[row][b][k]
  Operand gradient, variance, noise, denoised;  // state_type (variance: output_type, source[row][b][variance_branch])
  int32_t check, threads;
};

// Every translation unit its own copy: the same name compiled for two instruction sets must never be merged.
namespace {

template <int I>
struct Int {
  PG_INLINE constexpr operator int() const { return I; }
};
template <int N, int I = 0, class F>
PG_INLINE void unrolled(const F& f) {
  if constexpr (I < N) {
    f(Int<I>{});
    unrolled<N, I + 1>(f);
  }
}
// N compile-time iterations, so that arrays of vectors stay in registers, or n of them if N is 0.
template <int N, class F>
PG_INLINE void each(int n, const F& f) {
  if constexpr (N > 0) {
    unrolled<N>(f);
  } else {
    PG_ROLLED
    for (int i = 0; i < n; ++i) f(i);
  }
}

// Bits of Program::terms: T_rc in bit c, b_rk in bit 32 + k.
enum Term { TERM_D = 16, TERM_E = 17, TERM_N = 18, TERM_Q = 19, TERM_B = 32 };

// What a row needs, in one word: a GPU reads it once.
struct Needs {
  static constexpr uint32_t GUIDED = 1 << 0;                     // G
  static constexpr uint32_t SEPARATE = 1 << 1;                   // U apart from G
  static constexpr uint32_t DENOISED = 1 << 2;                   // D
  static constexpr uint32_t READS_X = 1 << 3, READS_G = 1 << 4;  // by D: a_x, a_g are not 0
  static constexpr uint32_t CLIP = 1 << 5, BOUNDED = 1 << 6;
  static constexpr uint32_t VARIANCE = 1 << 7, NOISE = 1 << 8, GRADIENT = 1 << 9;
  static constexpr uint32_t INPUT = 1 << 10;  // a model input is written
  static constexpr uint32_t PLAIN = 1 << 11;  // none of: o, v, b terms, bound, variance, gradient
  uint32_t bits;
  PG_INLINE bool guided() const { return bits & GUIDED; }
  PG_INLINE bool separate() const { return bits & SEPARATE; }
  PG_INLINE bool denoised() const { return bits & DENOISED; }
  PG_INLINE bool reads_x() const { return bits & READS_X; }
  PG_INLINE bool reads_g() const { return bits & READS_G; }
  PG_INLINE bool clip() const { return bits & CLIP; }
  PG_INLINE bool bounded() const { return bits & BOUNDED; }
  PG_INLINE bool variance() const { return bits & VARIANCE; }
  PG_INLINE bool noise() const { return bits & NOISE; }
  PG_INLINE bool gradient() const { return bits & GRADIENT; }
  PG_INLINE bool input() const { return bits & INPUT; }
  PG_INLINE bool plain() const { return bits & PLAIN; }
};

// The coefficients of one sample's row in the state's type T, with bit masks of the non-zero ones.
template <class T>
struct Program {
  T w[MAX_BRANCHES], v[MAX_BRANCHES], o[MAX_SLOTS];
  T a_x, a_g, lo, hi, bound, c_in, timestep;
  T mid, mid_lo, half, half_lo;  // log Sig = mid + half v, each a pair of T: one T would lose |log Sig| ulps
  T t[MAX_SLOTS][MAX_SLOTS], d[MAX_SLOTS], e[MAX_SLOTS], n[MAX_SLOTS], q[MAX_SLOTS], b[MAX_SLOTS][MAX_BRANCHES];
  uint64_t terms[MAX_SLOTS];
  uint32_t w_mask, v_mask, o_mask;
  uint32_t reads_m, reads_s, writes;  // branches and slots loaded, slots stored
  int branches, slots;
  Needs needs;
};

template <class T>
PG_INLINE void two_sum(T a, T b, T& s, T& error) {
  s = a + b;
  T bb = s - a;
  error = (a - (s - bb)) + (b - bb);
}

// The row that a launch runs for a sample; with `refresh` the one executed last, whose model input is due.
PG_INLINE int64_t launch_row(const Sample& sample, bool refresh) { return sample.row - (refresh ? 1 : 0); }
// Where branches go for sample b at that row: [K] of `routes`, a.source or a.target.
PG_INLINE const int32_t* route(const StepArgs& a, const int32_t* routes, int64_t b, int64_t row) {
  return routes + row * a.route_stride + b * a.branches;
}
template <class T>
PG_INLINE const T* table_row(const StepArgs& a, const Sample& sample, int64_t row) {
  return static_cast<const T*>(a.tables) + sample.table + row * row_width(sample.slots);
}
// Null where no weights are read: in the prologue and by a refresh.
template <class T>
PG_INLINE const T* weights_block(const StepArgs& a, const Sample& sample, int64_t row, bool refresh) {
  if (refresh || row == 0) return nullptr;
  const int64_t block = sample.method == 0 ? row * weights_width(a.branches, a.slots, a.guidance_slots) : 0;
  return static_cast<const T*>(a.weights) + sample.weights + block;
}

// Who builds a program: one lane (a CPU), or a warp's, which share the slots and know what all of them found.
struct Alone {
  static constexpr int lane = 0, lanes = 1;
  PG_INLINE uint64_t all_or(uint64_t mask) const { return mask; }
};

// f(i) for a lane's share of 0 .. count, which is 16 at most.
template <class TEAM, class F>
PG_INLINE void share(const TEAM& team, int count, const F& f) {
  static_assert(MAX_BRANCHES <= 16 && MAX_SLOTS <= 16);
  if constexpr (TEAM::lanes >= 16) {
    if (team.lane < count) f(team.lane);
  } else {
    static_assert(TEAM::lanes == 1);
    PG_ROLLED
    for (int i = 0; i < count; ++i) f(i);
  }
}
template <class TEAM, class T>
PG_INLINE uint32_t copy_nonzero(const TEAM& team, T* to, const T* from, int count) {
  uint32_t mask = 0;
  share(team, count, [&](int i) PG_LAMBDA {
    const T x = from[i];
    to[i] = x;
    mask |= uint32_t(x != T(0)) << i;
  });
  return mask;
}

// The program of a sample at the row that begins at `head`, with its block of weights (or null) and its bound (or
// null). With `refresh` that of writing only the model input that is due. Every lane of the team calls this with the
// same arguments; `p` is complete once they have all returned.
template <class TEAM, class T>
PG_INLINE void build(const TEAM& team, Program<T>& p, const StepArgs& a, const Sample& sample, const T* head,
                     const T* weights, const T* bound, bool refresh) {
  const int K = a.branches, S = a.slots, M = sample.slots, Sg = a.guidance_slots;
  const bool input = refresh || sample.row + 1 < sample.end, first = team.lane == 0;
  const T c_in = head[C_IN];
  if (first) {
    p.branches = K;
    p.slots = S;
    p.c_in = c_in;
    p.timestep = head[TIMESTEP];
  }
  if (refresh) {
    share(team, S, [&](int r) PG_LAMBDA { p.terms[r] = 0; });
    if (first) {
      p.w_mask = p.v_mask = p.o_mask = p.reads_m = p.writes = 0;
      p.reads_s = 1;
      p.needs.bits = Needs::INPUT | Needs::PLAIN;
    }
    return;
  }
  uint64_t any = 0, masks = 0;  // of all terms, and which slots are written in the upper 16 bits; of w, v, o
  share(team, S, [&](int r) PG_LAMBDA {
    const bool solver = r < M, own = weights && r >= S - Sg;
    const uint64_t itself = uint64_t(1) << r;
    uint64_t terms = 0;
    if (solver) {
      const T* column = head + HEAD + M * M + r;
      const T d = column[0], e = column[M], n = column[2 * M], q = column[3 * M];
      terms = copy_nonzero(Alone{}, p.t[r], head + HEAD + r * M, M);
      p.d[r] = d;
      p.e[r] = e;
      p.n[r] = n;
      p.q[r] = q;
      terms |= uint64_t(d != T(0)) << TERM_D | uint64_t(e != T(0)) << TERM_E | uint64_t(n != T(0)) << TERM_N |
               uint64_t(q != T(0)) << TERM_Q;
    } else if (own) {
      const T h = weights[2 * K + S + S * K + r - (S - Sg)];
      p.t[r][r] = h;
      if (h != T(0)) terms = itself;
    }
    if (weights && (solver || own)) {
      terms |= uint64_t(copy_nonzero(Alone{}, p.b[r], weights + 2 * K + S + r * K, K)) << TERM_B;
    }
    const bool kept = terms == itself && p.t[r][r] == T(1);
    const bool written = !kept && (terms != 0 || r == 0);
    p.terms[r] = written ? terms : 0;
    if (written) any |= terms | itself << 48;
  });
  if (weights) {
    masks = copy_nonzero(team, p.w, weights, K);
    masks |= uint64_t(copy_nonzero(team, p.v, weights + K, K)) << 16;
    masks |= uint64_t(copy_nonzero(team, p.o, weights + 2 * K, S)) << 32;
  }
  any = team.all_or(any);
  masks = team.all_or(masks);
  if (!first) return;
  p.writes = uint32_t(any >> 48);
  const bool combined = any >> TERM_E & 1;  // U is needed
  const bool denoised = (any >> TERM_D & 1) || a.denoised.data, reads_g = head[A_G] != T(0);
  const bool separate = weights && combined && (sample.flags & SEPARATE);
  const bool guided = weights && ((combined && !separate) || (denoised && reads_g));
  const uint32_t b_mask = uint32_t(any >> TERM_B & 0xffff);
  p.w_mask = guided ? uint32_t(masks & 0xffff) : 0;
  p.v_mask = separate ? uint32_t(masks >> 16 & 0xffff) : 0;
  p.o_mask = guided ? uint32_t(masks >> 32) : 0;
  uint32_t needs = (guided ? Needs::GUIDED : 0) | (separate ? Needs::SEPARATE : 0) | (input ? Needs::INPUT : 0) |
                   (any >> TERM_N & 1 ? Needs::NOISE : 0) | (any >> TERM_Q & 1 ? Needs::GRADIENT : 0);
  if (denoised) {
    needs |= Needs::DENOISED | (head[A_X] != T(0) ? Needs::READS_X : 0) | (reads_g ? Needs::READS_G : 0);
    const T limit = bound ? *bound : T(0);
    const bool bounded = limit != T(0);
    const T lo = bounded ? -limit : head[CLIP_LO], hi = bounded ? limit : head[CLIP_HI];
    p.a_x = head[A_X];
    p.a_g = head[A_G];
    p.bound = limit;
    p.lo = lo;
    p.hi = hi;
    if (bounded || lo - lo == T(0) || hi - hi == T(0)) needs |= Needs::CLIP;
    if (bounded) needs |= Needs::BOUNDED;
  }
  const T var_lo = head[VAR_LO], var_hi = head[VAR_HI];
  if (needs & (Needs::NOISE | Needs::GRADIENT) && (var_lo != T(0) || var_hi != T(0))) {
    needs |= Needs::VARIANCE;
    T width, width_lo, mid, error;
    two_sum(var_hi, -var_lo, width, width_lo);
    const T half = width / 2, half_lo = width_lo / 2;
    two_sum(var_lo, half, mid, error);
    p.half = half;
    p.half_lo = half_lo;
    p.mid = mid;
    p.mid_lo = error + half_lo;
  }
  p.reads_m = b_mask | p.w_mask | p.v_mask;
  p.reads_s = uint32_t(any & 0xffff) | p.o_mask | (needs & Needs::READS_X ? 1 : 0) |
              (input && c_in != T(0) && !(any >> 48 & 1) ? 1 : 0);
  const bool rare = needs & (Needs::SEPARATE | Needs::BOUNDED | Needs::VARIANCE | Needs::GRADIENT);
  p.needs.bits = needs | (rare || p.o_mask || b_mask ? 0 : Needs::PLAIN);
}

// The same by one lane, from memory as it is.
template <class T>
PG_INLINE void build(Program<T>& p, const StepArgs& a, int64_t b, bool refresh) {
  const Sample& sample = a.samples[b];
  const int64_t row = launch_row(sample, refresh);
  build(Alone{}, p, a, sample, table_row<T>(a, sample, row), weights_block<T>(a, sample, row, refresh),
        a.bound ? static_cast<const T*>(a.bound) + b : nullptr, refresh);
}

// exp(mid + half v), the exponent carried as a pair so that |log Sig| does not cost accuracy.
template <class V, class T>
PG_INLINE V row_variance(const Program<T>& p, const V& v) {
  const V half = V::set(p.half), mid = V::set(p.mid);
  const V product = half * v;
  const V sum = mid + product, back = sum - mid;
  const V error = (mid - (sum - back)) + (product - back);
  return exp_sum(sum, error + product_error(half, v, product) + fma(V::set(p.half_lo), v, V::set(p.mid_lo)));
}

// sum + sum_i x_i y[i] over the bits of `mask`: N of them at compile time, or `count` if N is 0.
template <int N, class V, class T, class Y>
PG_INLINE V add_terms(int count, uint32_t mask, const T* x, const Y& y, V sum) {
  each<N>(count, [&](auto i) PG_LAMBDA {
    if (mask >> i & 1) sum = fma(V::set(x[i]), y[i], sum);
  });
  return sum;
}
// G, or 0 where the row needs none. `needs`, those of p, are registers of the caller: read again here, they spill.
template <int K, int S, bool PLAIN, class V, class T, class M, class SLOTS>
PG_INLINE V guided_output(const Program<T>& p, const Needs& needs, const M& m, const SLOTS& s) {
  V G = V::set(T(0));
  if (needs.guided()) {
    G = add_terms<K>(p.branches, p.w_mask, p.w, m, G);
    if (!PLAIN && p.o_mask) G = add_terms<S>(p.slots, p.o_mask, p.o, s, G);
  }
  return G;
}
// D before the clip.
template <class V, class T, class SLOTS>
PG_INLINE V unclipped(const Program<T>& p, const Needs& needs, const SLOTS& s, const V& G) {
  V D = V::set(T(0));
  if (needs.reads_x()) D = V::set(p.a_x) * s[0];
  if (needs.reads_g()) D = fma(V::set(p.a_g), G, D);
  return D;
}

// One vector of elements: m[k], s[c] as loaded; z(), g(), v() load noise, gradient and variance where they are used
// (with PLAIN perhaps more than once).
// Calls write(r, s'_r) for every r in p.writes; D is set where p.denoised. PLAIN compiles away what most rows do not
// have (Needs::PLAIN): without it the rare paths cost the common one its registers, 2.6 times the time at
// K = 2, S = 1.
template <int K, int S, bool PLAIN, class V, class T, class M, class SLOTS, class NOISE, class GRADIENT, class VARIANCE,
          class WRITE>
PG_INLINE void step_formula(const Program<T>& p, const M& m, const SLOTS& s, const NOISE& z, const GRADIENT& g,
                            const VARIANCE& v, V& D, const WRITE& write) {
  const Needs needs = p.needs;
  V variance, noise, gradient;  // Sig, sqrt(Sig) z, Sig g
  if (!PLAIN) {
    if (needs.variance()) variance = row_variance(p, v());
    if (needs.noise()) noise = z();
    if (needs.noise() && needs.variance()) noise = sqrt(variance) * noise;
    if (needs.gradient()) gradient = g();
    if (needs.gradient() && needs.variance()) gradient = variance * gradient;
  }
  const V G = guided_output<K, S, PLAIN, V>(p, needs, m, s);
  V U = G;
  if (!PLAIN && needs.separate()) U = add_terms<K>(p.branches, p.v_mask, p.v, m, V::set(T(0)));
  if (needs.denoised()) {
    D = unclipped(p, needs, s, G);
    if (needs.clip()) D = clamp(D, V::set(p.lo), V::set(p.hi));
    if (!PLAIN && needs.bounded()) D = D / V::set(p.bound);
  }
  each<S>(p.slots, [&](auto r) PG_LAMBDA {
    if (p.writes >> r & 1) {
      const uint64_t terms = p.terms[r];
      V sum = add_terms<S>(p.slots, uint32_t(terms), p.t[r], s, V::set(T(0)));
      if (terms >> TERM_D & 1) sum = fma(V::set(p.d[r]), D, sum);
      if (terms >> TERM_E & 1) sum = fma(V::set(p.e[r]), U, sum);
      if (!PLAIN && terms >> TERM_B) sum = add_terms<K>(p.branches, uint32_t(terms >> TERM_B), p.b[r], m, sum);
      if (terms >> TERM_N & 1) sum = fma(V::set(p.n[r]), PLAIN ? z() : noise, sum);
      if (!PLAIN && (terms >> TERM_Q & 1)) sum = fma(V::set(p.q[r]), gradient, sum);
      write(r, sum);
    }
  });
}

}  // namespace
}  // namespace pyguide
