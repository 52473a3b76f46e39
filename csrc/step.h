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
// No framework, CUDA or ONNX Runtime header here. V is a vector of T (scalar per thread on a GPU) with V::set(T), +, *,
// /, fma(a, b, c), sqrt, clamp (which propagates NaN), product_error(a, b, a * b) and exp_sum(hi, lo) = exp(hi + lo).
#pragma once
#include <stdint.h>

#ifdef __CUDACC__
#define PG_INLINE __host__ __device__ __forceinline__
#define PG_LAMBDA
#else
#define PG_INLINE inline __attribute__((always_inline))
#define PG_LAMBDA __attribute__((always_inline))
#endif

namespace pyguide {

constexpr int ABI = 1;
constexpr int MAX_BRANCHES = 16;
constexpr int MAX_SLOTS = 16;

enum Type : int32_t { F32 = 0, F16 = 1, BF16 = 2, F64 = 3, I64 = 4 };
enum Flag : int32_t { SEPARATE = 1, NONFINITE = 2 };

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
  int32_t flags, reserved;
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
  Sample* samples;                              // [B]
  const int32_t *source, *target;               // [B][K], -1: absent
  Operand output[MAX_BRANCHES];                 // output_type, batch index source[b][k]
  Operand input[MAX_BRANCHES];                  // input_type, batch index target[b][k]
  void* time[MAX_BRANCHES];                     // time_type, index target[b][k]
  Operand gradient, variance, noise, denoised;  // state_type (variance: output_type, source[b][variance_branch])
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
    for (int i = 0; i < n; ++i) f(i);
  }
}

// Bits of Program::terms: T_rc in bit c, b_rk in bit 32 + k.
enum Term { TERM_D = 16, TERM_E = 17, TERM_N = 18, TERM_Q = 19, TERM_B = 32 };

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
  bool guided, separate, denoised;  // G, U apart from G, D are needed
  bool reads_x, reads_g;            // by D: a_x, a_g are not 0
  bool clip, bounded, variance, noise, gradient, input;
  bool plain;  // none of: o, v, b terms, bound, variance, gradient
};

template <class T>
PG_INLINE void two_sum(T a, T b, T& s, T& error) {
  s = a + b;
  T bb = s - a;
  error = (a - (s - bb)) + (b - bb);
}

template <class T>
PG_INLINE uint32_t copy_nonzero(T* to, const T* from, int count) {
  uint32_t mask = 0;
  for (int i = 0; i < count; ++i) {
    to[i] = from[i];
    mask |= uint32_t(from[i] != T(0)) << i;
  }
  return mask;
}

// The program of sample b. With `refresh` that of writing only the model input that is due (the row executed last).
template <class T>
PG_INLINE void build(Program<T>& p, const StepArgs& a, int64_t b, bool refresh) {
  const Sample& sample = a.samples[b];
  const int K = a.branches, S = a.slots, M = sample.slots, Sg = a.guidance_slots;
  const int64_t row = sample.row - (refresh ? 1 : 0);
  const T* head = static_cast<const T*>(a.tables) + sample.table + row * row_width(M);
  const T *t = head + HEAD, *d = t + M * M, *e = d + M, *n = e + M, *q = n + M;
  p.branches = K;
  p.slots = S;
  p.c_in = head[C_IN];
  p.timestep = head[TIMESTEP];
  p.w_mask = p.v_mask = p.o_mask = p.reads_m = p.reads_s = p.writes = 0;
  p.plain = true;
  p.guided = p.separate = p.denoised = p.clip = p.bounded = p.variance = p.noise = p.gradient = false;
  p.input = refresh || row + 1 < sample.end;
  for (int r = 0; r < S; ++r) p.terms[r] = 0;
  if (refresh) {
    p.reads_s = 1;
    return;
  }
  const T* weights = nullptr;
  if (row > 0) {
    weights =
        static_cast<const T*>(a.weights) + sample.weights + (sample.method == 0 ? row * weights_width(K, S, Sg) : 0);
  }
  uint64_t any = 0;
  for (int r = 0; r < M; ++r) {
    uint64_t terms = copy_nonzero(p.t[r], t + r * M, M);
    if (weights) terms |= uint64_t(copy_nonzero(p.b[r], weights + 2 * K + S + r * K, K)) << TERM_B;
    p.d[r] = d[r];
    p.e[r] = e[r];
    p.n[r] = n[r];
    p.q[r] = q[r];
    terms |= uint64_t(d[r] != T(0)) << TERM_D | uint64_t(e[r] != T(0)) << TERM_E | uint64_t(n[r] != T(0)) << TERM_N |
             uint64_t(q[r] != T(0)) << TERM_Q;
    const bool kept = terms == uint64_t(1) << r && p.t[r][r] == T(1);
    if (kept || (terms == 0 && r > 0)) continue;
    p.terms[r] = terms;
    p.writes |= 1u << r;
    any |= terms;
  }
  if (weights) {
    for (int r = S - Sg; r < S; ++r) {
      p.t[r][r] = weights[2 * K + S + S * K + r - (S - Sg)];
      const uint64_t h = uint64_t(p.t[r][r] != T(0)) << r;
      const uint64_t terms = h | uint64_t(copy_nonzero(p.b[r], weights + 2 * K + S + r * K, K)) << TERM_B;
      if (terms == 0 || (terms == h && p.t[r][r] == T(1))) continue;
      p.terms[r] = terms;
      p.writes |= 1u << r;
      any |= terms;
    }
  }
  p.reads_s = uint32_t(any & 0xffff);
  p.reads_m = uint32_t(any >> TERM_B & 0xffff);
  p.noise = any >> TERM_N & 1;
  p.gradient = any >> TERM_Q & 1;
  p.denoised = (any >> TERM_D & 1) || a.denoised.data;
  const bool combined = any >> TERM_E & 1;  // U is needed
  p.a_x = head[A_X];
  p.a_g = head[A_G];
  p.reads_x = p.a_x != T(0);
  p.reads_g = p.a_g != T(0);
  if (p.denoised) {
    p.bound = a.bound ? static_cast<const T*>(a.bound)[b] : T(0);
    p.bounded = p.bound != T(0);
    p.lo = p.bounded ? -p.bound : head[CLIP_LO];
    p.hi = p.bounded ? p.bound : head[CLIP_HI];
    p.clip = p.bounded || p.lo - p.lo == T(0) || p.hi - p.hi == T(0);
    p.reads_s |= p.reads_x;
  }
  if (weights) {
    p.separate = combined && (sample.flags & SEPARATE);
    p.guided = (combined && !p.separate) || (p.denoised && p.a_g != T(0));
    if (p.guided) {
      p.w_mask = copy_nonzero(p.w, weights, K);
      p.o_mask = copy_nonzero(p.o, weights + 2 * K, S);
    }
    if (p.separate) p.v_mask = copy_nonzero(p.v, weights + K, K);
    p.reads_m |= p.w_mask | p.v_mask;
    p.reads_s |= p.o_mask;
  }
  if ((p.noise || p.gradient) && (head[VAR_LO] != T(0) || head[VAR_HI] != T(0))) {
    p.variance = true;
    T width, width_lo, error;
    two_sum(head[VAR_HI], -head[VAR_LO], width, width_lo);
    p.half = width / 2;
    p.half_lo = width_lo / 2;
    two_sum(head[VAR_LO], p.half, p.mid, error);
    p.mid_lo = error + p.half_lo;
  }
  if (p.input && p.c_in != T(0) && !(p.writes & 1)) p.reads_s |= 1;
  p.plain = !(p.o_mask || p.separate || p.bounded || p.variance || p.gradient || (any >> TERM_B & 0xffff));
}

// exp(mid + half v), the exponent carried as a pair so that |log Sig| does not cost accuracy.
template <class V, class T>
PG_INLINE V row_variance(const Program<T>& p, const V& v) {
  const V half = V::set(p.half), mid = V::set(p.mid);
  const V product = half * v;
  V sum, error;
  sum = mid + product;
  const V back = sum - mid;
  error = (mid - (sum - back)) + (product - back);
  return exp_sum(sum, error + product_error(half, v, product) + fma(V::set(p.half_lo), v, V::set(p.mid_lo)));
}

// One vector of elements: m[K], s[S] as loaded; z(), g(), v() load noise, gradient and variance where they are used.
// Calls write(r, s'_r) for every r in p.writes; D is set where p.denoised. PLAIN compiles away what most rows do not
// have (Program::plain): without it the rare paths cost the common one its registers, 2.6 times the time at
// K = 2, S = 1.
template <int K, int S, bool PLAIN, class V, class T, class NOISE, class GRADIENT, class VARIANCE, class WRITE>
PG_INLINE void step_formula(const Program<T>& p, const V* m, const V* s, const NOISE& z, const GRADIENT& g,
                            const VARIANCE& v, V& D, const WRITE& write) {
  V G = V::set(T(0));
  if (p.guided) {
    each<K>(p.branches, [&](auto k) PG_LAMBDA {
      if (p.w_mask >> k & 1) G = fma(V::set(p.w[k]), m[k], G);
    });
    if (!PLAIN && p.o_mask) {
      each<S>(p.slots, [&](auto c) PG_LAMBDA {
        if (p.o_mask >> c & 1) G = fma(V::set(p.o[c]), s[c], G);
      });
    }
  }
  V U = G;
  if (!PLAIN && p.separate) {
    U = V::set(T(0));
    each<K>(p.branches, [&](auto k) PG_LAMBDA {
      if (p.v_mask >> k & 1) U = fma(V::set(p.v[k]), m[k], U);
    });
  }
  if (p.denoised) {
    D = V::set(T(0));
    if (p.reads_x) D = V::set(p.a_x) * s[0];
    if (p.reads_g) D = fma(V::set(p.a_g), G, D);
    if (p.clip) D = clamp(D, V::set(p.lo), V::set(p.hi));
    if (!PLAIN && p.bounded) D = D / V::set(p.bound);
  }
  V variance = V::set(T(1)), deviation = variance;
  if (!PLAIN && p.variance) {
    variance = row_variance(p, v());
    deviation = sqrt(variance);
  }
  each<S>(p.slots, [&](auto r) PG_LAMBDA {
    if (p.writes >> r & 1) {
      const uint64_t terms = p.terms[r];
      V sum = V::set(T(0));
      each<S>(p.slots, [&](auto c) PG_LAMBDA {
        if (terms >> c & 1) sum = fma(V::set(p.t[r][c]), s[c], sum);
      });
      if (terms >> TERM_D & 1) sum = fma(V::set(p.d[r]), D, sum);
      if (terms >> TERM_E & 1) sum = fma(V::set(p.e[r]), U, sum);
      if (!PLAIN && (terms >> TERM_B & 0xffff)) {
        each<K>(p.branches, [&](auto k) PG_LAMBDA {
          if (terms >> (TERM_B + k) & 1) sum = fma(V::set(p.b[r][k]), m[k], sum);
        });
      }
      if (terms >> TERM_N & 1) sum = fma(V::set(p.n[r]), PLAIN ? z() : deviation * z(), sum);
      if (!PLAIN && (terms >> TERM_Q & 1)) sum = fma(V::set(p.q[r]), variance * g(), sum);
      write(r, sum);
    }
  });
}

}  // namespace
}  // namespace pyguide
