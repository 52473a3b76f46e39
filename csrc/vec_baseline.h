// Included by vec.h inside its namespace: 16-byte vectors by the compiler's vector extensions (SSE2, NEON, anything).
#ifdef __aarch64__
#define PG_ISA neon
#else
#define PG_ISA baseline
#endif
typedef float F4 __attribute__((vector_size(16)));
typedef double D2 __attribute__((vector_size(16)));
typedef uint32_t U4 __attribute__((vector_size(16)));
typedef int32_t I4 __attribute__((vector_size(16)));

template <class T, class X, int W>
struct Base {
  typedef T Scalar;
  static constexpr int width = W;
  X v;
  static PG_INLINE Base set(T x) {
    Base r;
    for (int i = 0; i < W; ++i) r.v[i] = x;
    return r;
  }
  static PG_INLINE Base load(const T* p) {
    Base r;
    memcpy(&r.v, p, sizeof(X));
    return r;
  }
  PG_INLINE void store(T* p) const { memcpy(p, &v, sizeof(X)); }
};
typedef Base<float, F4, 4> Float;
typedef Base<double, D2, 2> Double;
typedef Base<uint32_t, U4, 4> Word;

#define PG_INFIX(V, OP) \
  PG_INLINE V operator OP(const V& a, const V& b) { return {a.v OP b.v}; }
PG_INFIX(Float, +)
PG_INFIX(Float, -)
PG_INFIX(Float, *)
PG_INFIX(Float, /)
PG_INFIX(Double, +)
PG_INFIX(Double, -)
PG_INFIX(Double, *)
PG_INFIX(Double, /)
PG_INFIX(Word, +)
PG_INFIX(Word, -)
PG_INFIX(Word, ^)
PG_INFIX(Word, &)
PG_INLINE Word operator<<(const Word& a, int n) { return {a.v << n}; }
PG_INLINE Word operator>>(const Word& a, int n) { return {a.v >> n}; }

#ifdef __aarch64__
PG_INLINE Float fma(const Float& a, const Float& b, const Float& c) {
  return {(F4)vfmaq_f32((float32x4_t)c.v, (float32x4_t)a.v, (float32x4_t)b.v)};
}
PG_INLINE Double fma(const Double& a, const Double& b, const Double& c) {
  return {(D2)vfmaq_f64((float64x2_t)c.v, (float64x2_t)a.v, (float64x2_t)b.v)};
}
#else
PG_INLINE Float fma(const Float& a, const Float& b, const Float& c) { return {a.v * b.v + c.v}; }
PG_INLINE Double fma(const Double& a, const Double& b, const Double& c) { return {a.v * b.v + c.v}; }
#endif
PG_INLINE Float sqrt(const Float& a) {
  Float r;
  for (int i = 0; i < 4; ++i) r.v[i] = __builtin_sqrtf(a.v[i]);
  return r;
}
PG_INLINE Double sqrt(const Double& a) {
  Double r;
  for (int i = 0; i < 2; ++i) r.v[i] = __builtin_sqrt(a.v[i]);
  return r;
}
// comparisons with NaN are false: it stays
template <class V>
PG_INLINE V clamp(const V& x, const V& lo, const V& hi) {
  V r;
  r.v = x.v < lo.v ? lo.v : x.v;
  r.v = r.v > hi.v ? hi.v : r.v;
  return r;
}
template <class V>
PG_INLINE V weighed(const V& q, const V& x) {
  const V zero = V::set(0), product = q * x;
  V r;
  r.v = q.v != zero.v ? product.v : zero.v;
  return r;
}
PG_INLINE bool any_nan(const Float& a) {
  return a.v[0] != a.v[0] || a.v[1] != a.v[1] || a.v[2] != a.v[2] || a.v[3] != a.v[3];
}
PG_INLINE bool any_nan(const Double& a) { return a.v[0] != a.v[0] || a.v[1] != a.v[1]; }

PG_INLINE void mul_hilo(const Word& a, uint32_t m, Word& hi, Word& lo) {
  for (int i = 0; i < 4; ++i) {
    const uint64_t product = uint64_t(a.v[i]) * m;
    hi.v[i] = uint32_t(product >> 32);
    lo.v[i] = uint32_t(product);
  }
}
PG_INLINE Float to_float(const Word& a) { return {__builtin_convertvector((I4)a.v, F4)}; }
PG_INLINE Float to_float_top24(const Word& a) {  // exact: the halves do not overlap
  return to_float(a >> 16) * Float::set(65536.f) + to_float(a & Word::set(0xff00));
}
PG_INLINE Word as_bits(const Float& a) { return {(U4)a.v}; }
PG_INLINE Float as_float(const Word& a) { return {(F4)a.v}; }
PG_INLINE void store_interleaved(float* p, const Float z[4]) {
  for (int i = 0; i < 4; ++i) {
    for (int lane = 0; lane < 4; ++lane) p[4 * i + lane] = z[lane].v[i];
  }
}
PG_INLINE Float load_f16(const uint16_t* p) {
  return {F4{float_from_f16(p[0]), float_from_f16(p[1]), float_from_f16(p[2]), float_from_f16(p[3])}};
}
PG_INLINE void store_f16(uint16_t* p, const Float& a) {
  for (int i = 0; i < 4; ++i) p[i] = f16_from_float(a.v[i]);
}
PG_INLINE Float load_bf16(const uint16_t* p) { return {(F4)(U4{p[0], p[1], p[2], p[3]} << 16)}; }
PG_INLINE void store_bf16(uint16_t* p, const Float& a) {
  for (int i = 0; i < 4; ++i) p[i] = bf16_from_float(a.v[i]);
}
