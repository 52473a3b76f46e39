// The step on a CPU, compiled once per instruction set (PG_LEVEL). See step.h for the formula.
//
// The vector body sees only full vectors of the state's type behind contiguous pointers. Operands that are so already are
// read and written in place over long runs. The others (16-bit, strided, the tail of a sample, Philox noise) pass through a
// block of scratch that stays in L1. So body and tail share one polynomial, nothing past an operand is touched, and an
// element's bits depend on nothing but its own values.
#include "cpu.h"
#include "philox.h"
#include "vec.h"

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

inline int64_t size_of(Type type) { return type == F32 ? 4 : type == F64 || type == I64 ? 8 : 2; }

// ---- dense conversions --------------------------------------------------------------------------------------------
template <class T>
inline T convert_in(uint16_t h, Type type) {
  return T(type == F16 ? float_from_f16(h) : float_from_bf16(h));
}
inline float narrow(float x) { return x; }
inline float narrow(double x) { return odd_float(x); }

inline void widen(float* to, const void* from, Type type, int64_t n) {
  if (type == F32) {
    memcpy(to, from, size_t(n) * 4);
  } else if (type == F64) {
    for (int64_t i = 0; i < n; ++i) to[i] = float(static_cast<const double*>(from)[i]);
  } else {
    const uint16_t* p = static_cast<const uint16_t*>(from);
    int64_t i = 0;
    for (; i + Float::width <= n; i += Float::width) (type == F16 ? load_f16(p + i) : load_bf16(p + i)).store(to + i);
    for (; i < n; ++i) to[i] = convert_in<float>(p[i], type);
  }
}
inline void widen(double* to, const void* from, Type type, int64_t n) {
  if (type == F64) {
    memcpy(to, from, size_t(n) * 8);
  } else if (type == F32) {
    for (int64_t i = 0; i < n; ++i) to[i] = static_cast<const float*>(from)[i];
  } else {
    for (int64_t i = 0; i < n; ++i) to[i] = convert_in<double>(static_cast<const uint16_t*>(from)[i], type);
  }
}
template <class T>
inline void narrow_scalar(uint16_t* to, const T* from, Type type, int64_t i, int64_t n) {
  for (; i < n; ++i) to[i] = type == F16 ? f16_from_float(narrow(from[i])) : bf16_from_float(narrow(from[i]));
}
inline void narrow(void* to, const float* from, Type type, int64_t n) {
  if (type == F32) {
    memcpy(to, from, size_t(n) * 4);
  } else if (type == F64) {
    for (int64_t i = 0; i < n; ++i) static_cast<double*>(to)[i] = from[i];
  } else {
    uint16_t* p = static_cast<uint16_t*>(to);
    int64_t i = 0;
    for (; i + Float::width <= n; i += Float::width) {
      const Float x = Float::load(from + i);
      type == F16 ? store_f16(p + i, x) : store_bf16(p + i, x);
    }
    narrow_scalar(p, from, type, i, n);
  }
}
inline void narrow(void* to, const double* from, Type type, int64_t n) {
  if (type == F64) {
    memcpy(to, from, size_t(n) * 8);
  } else if (type == F32) {
    for (int64_t i = 0; i < n; ++i) static_cast<float*>(to)[i] = float(from[i]);
  } else {
    narrow_scalar(static_cast<uint16_t*>(to), from, type, 0, n);
  }
}

// ---- views --------------------------------------------------------------------------------------------------------
// One sample of an operand: rows of `inner` elements, merged where the strides allow it.
struct View {
  char* data;
  Type type;
  int64_t inner, row_stride, stride;

  View() {}
  View(const Operand& o, Type type, int64_t index, const StepArgs& a) : type(type) {
    data = static_cast<char*>(o.data) + index * o.batch_stride * size_of(type);
    inner = a.inner;
    row_stride = o.channel_stride;
    stride = o.inner_stride;
    if (inner == 1) {
      stride = row_stride;
      inner = a.channels;
    } else if (a.channels == 1 || row_stride == inner * stride) {
      inner *= a.channels;
    }
    whole = inner == a.channels * a.inner;
  }
  bool whole;  // one row
  bool dense(Type compute) const { return type == compute && whole && stride == 1; }
  char* at(int64_t element) const { return data + element * size_of(type); }
};

template <class X>
inline void copy_strided(X* to, int64_t to_stride, const X* from, int64_t from_stride, int64_t n) {
  for (int64_t i = 0; i < n; ++i) to[i * to_stride] = from[i * from_stride];
}
inline void copy_strided(void* to, int64_t to_stride, const void* from, int64_t from_stride, int64_t n, int64_t size) {
  if (size == 2)
    copy_strided(static_cast<uint16_t*>(to), to_stride, static_cast<const uint16_t*>(from), from_stride, n);
  else if (size == 4)
    copy_strided(static_cast<uint32_t*>(to), to_stride, static_cast<const uint32_t*>(from), from_stride, n);
  else
    copy_strided(static_cast<uint64_t*>(to), to_stride, static_cast<const uint64_t*>(from), from_stride, n);
}

// Calls f(pointer to element, elements until the row ends or n, offset from e) for the pieces of [e, e + n).
template <class F>
PG_INLINE void pieces(const View& v, int64_t e, int64_t n, const F& f) {
  int64_t row = v.whole ? 0 : e / v.inner, i = e - row * v.inner;
  for (int64_t done = 0; done < n; ++row, i = 0) {
    const int64_t count = n - done < v.inner - i ? n - done : v.inner - i;
    f(v.data + (row * v.row_stride + i * v.stride) * size_of(v.type), count, done);
    done += count;
  }
}
template <class T>
inline void gather(T* to, const View& v, int64_t e, int64_t n) {
  if (v.stride == 1 || n == 1) {
    pieces(v, e, n, [&](char* p, int64_t count, int64_t done) { widen(to + done, p, v.type, count); });
  } else {
    alignas(64) char raw[BLOCK * 8];
    const int64_t size = size_of(v.type);
    pieces(v, e, n, [&](char* p, int64_t count, int64_t done) {
      copy_strided(raw + done * size, 1, p, v.stride, count, size);
    });
    widen(to, raw, v.type, n);
  }
}
template <class T>
inline void scatter(const View& v, int64_t e, int64_t n, const T* from) {
  if (v.stride == 1 || n == 1) {
    pieces(v, e, n, [&](char* p, int64_t count, int64_t done) { narrow(p, from + done, v.type, count); });
  } else {
    alignas(64) char raw[BLOCK * 8];
    const int64_t size = size_of(v.type);
    narrow(raw, from, v.type, n);
    pieces(v, e, n, [&](char* p, int64_t count, int64_t done) {
      copy_strided(p, v.stride, raw + done * size, 1, count, size);
    });
  }
}

// ---- noise --------------------------------------------------------------------------------------------------------
// At least `n` normals from element `first` (a multiple of 4); writes up to the next multiple of 4 * Float::width.
inline void fill_normals(float* to, int64_t first, int64_t n, uint64_t seed, uint32_t ordinal, uint32_t tag) {
  alignas(64) uint32_t order[Float::width];  // the counters' order that makes store_interleaved cheap
  for (int k = 0; k < 4; ++k) {
    for (int j = 0; j < Float::width / 4; ++j) order[4 * j + k] = uint32_t(Float::width / 4 * k + j);
  }
  const Word lanes = Word::load(order);
  uint64_t counter = uint64_t(first) / 4;
  for (int64_t i = 0; i < n; i += 4 * Float::width, counter += Float::width) {
    Word c[4];
    Float z[4];
    if (uint32_t(counter) <= 0xffffffffu - Float::width) {
      c[0] = Word::set(uint32_t(counter)) + lanes;
      c[1] = Word::set(uint32_t(counter >> 32));
    } else {  // the low word wraps within this vector
      uint32_t lo[Float::width], hi[Float::width];
      for (int j = 0; j < Float::width; ++j) {
        lo[j] = uint32_t(counter + order[j]);
        hi[j] = uint32_t((counter + order[j]) >> 32);
      }
      c[0] = Word::load(lo);
      c[1] = Word::load(hi);
    }
    c[2] = Word::set(ordinal);
    c[3] = Word::set(tag);
    philox4x32(c, uint32_t(seed), uint32_t(seed >> 32));
    box_muller(c[0], c[1], z[0], z[1]);
    box_muller(c[2], c[3], z[2], z[3]);
    store_interleaved(to + i, z);
  }
}
inline void fill_normals(double* to, int64_t first, int64_t n, uint64_t seed, uint32_t ordinal, uint32_t tag) {
  uint64_t counter = uint64_t(first) / 4;
  for (int64_t i = 0; i < n; i += 4, ++counter) {
    uint32_t c[4] = {uint32_t(counter), uint32_t(counter >> 32), ordinal, tag};
    philox4x32(c, uint32_t(seed), uint32_t(seed >> 32));
    box_muller(c[0], c[1], to[i], to[i + 1]);
    box_muller(c[2], c[3], to[i + 2], to[i + 3]);
  }
}

// ---- the body -----------------------------------------------------------------------------------------------------
template <class T>
struct Pointers {
  const T *m[MAX_BRANCHES], *z, *g, *v;
  const T* s[MAX_SLOTS];
  T *s_out[MAX_SLOTS], *in[MAX_BRANCHES], *denoised;
  int inputs;
};

// n elements, a multiple of GRAIN; true if a written s'_0 is not finite.
template <int K, int S, int U, bool PLAIN, class T>
__attribute__((noinline)) bool body(const Program<T>& p, const Pointers<T>& at, int64_t n) {
  typedef Wide<typename Native<T>::V, U> V;
  constexpr int KA = K ? K : MAX_BRANCHES, SA = S ? S : MAX_SLOTS;
  const uint32_t reads_m = p.reads_m, reads_s = p.reads_s;
  const int inputs = at.inputs;
  const bool scaled = inputs && p.c_in != T(0), kept = scaled && !(p.writes & 1);
  const V zero = V::set(T(0)), c_in = V::set(p.c_in);
  V unfinite = zero, D = zero;
  for (int64_t i = 0; i < n; i += V::width) {
    V m[KA], s[SA], z = zero, g = zero, v = zero, x = zero;
    each<K>(p.branches, [&](auto k) PG_LAMBDA {
      if (reads_m >> k & 1) m[k] = V::load(at.m[k] + i);
    });
    each<S>(p.slots, [&](auto c) PG_LAMBDA {
      if (reads_s >> c & 1) s[c] = V::load(at.s[c] + i);
    });
    if (!PLAIN && p.noise) z = V::load(at.z + i);
    if (!PLAIN && p.gradient) g = V::load(at.g + i);
    if (!PLAIN && p.variance) v = V::load(at.v + i);
    if (kept) x = c_in * s[0];
    step_formula<K, S, PLAIN>(p, m, s, z, g, v, D, [&](auto r, const V& value) PG_LAMBDA {
      value.store(at.s_out[r] + i);
      if (r == 0) {
        unfinite = fma(value, zero, unfinite);  // 0 * x is NaN exactly where x is not finite
        if (scaled) x = c_in * value;
      }
    });
    each<K>(p.branches, [&](auto k) PG_LAMBDA {
      if (k < inputs) x.store(at.in[k] + i);
    });
    if (!PLAIN && at.denoised) D.store(at.denoised + i);
  }
  return any_nan(unfinite);
}

template <int K>
inline bool body_of(const Program<float>& p, const Pointers<float>& at, int64_t n) {
  switch (p.slots) {
    case 1:
      return p.plain ? body<K, 1, UNROLL, true>(p, at, n) : body<K, 1, 2, false>(p, at, n);
    case 2:
      return p.plain ? body<K, 2, UNROLL, true>(p, at, n) : body<K, 2, 2, false>(p, at, n);
    case 3:
      return p.plain ? body<K, 3, UNROLL, true>(p, at, n) : body<K, 3, 2, false>(p, at, n);
    default:
      return body<0, 0, 2, false>(p, at, n);
  }
}
inline bool run_body(const Program<float>& p, const Pointers<float>& at, int64_t n) {
  if (p.branches == 1) return body_of<1>(p, at, n);
  if (p.branches == 2) return body_of<2>(p, at, n);
  return body<0, 0, 2, false>(p, at, n);
}
inline bool run_body(const Program<double>& p, const Pointers<double>& at, int64_t n) {
  return body<0, 0, 2, false>(p, at, n);
}

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
  bool direct = true, inputs_direct = true, philox = false;
  Scratch<T> scratch;

  Range(const StepArgs& a, int64_t b, bool refresh) : a(a), b(b) {
    constexpr Type compute = Native<T>::type;
    build(p, a, b, refresh);
    for (int c = 0; c < a.slots; ++c) s[c] = static_cast<T*>(a.state) + (c * a.batch + b) * N;
    const int32_t *source = a.source + b * a.branches, *target = a.target + b * a.branches;
    for (int k = 0; k < a.branches; ++k) {
      if (p.reads_m >> k & 1) {
        m[k] = View(a.output[k], a.output_type, source[k], a);
        direct &= m[k].dense(compute);
      }
      if (p.input && target[k] >= 0) {
        in[inputs] = View(a.input[k], a.input_type, target[k], a);
        inputs_direct &= in[inputs++].dense(compute);
      }
    }
    direct &= inputs_direct;
    if (p.noise) {
      philox = !a.noise.data;
      if (!philox) z = View(a.noise, a.state_type, b, a);
      direct &= !philox && z.dense(compute);
    }
    if (p.gradient) {
      g = View(a.gradient, a.state_type, b, a);
      direct &= g.dense(compute);
    }
    if (p.variance) {
      v = View(a.variance, a.output_type, source[a.variance_branch], a);
      direct &= v.dense(compute);
    }
    if (writes_denoised()) {
      denoised = View(a.denoised, a.state_type, b, a);
      direct &= denoised.dense(compute);
    }
  }
  bool writes_denoised() const { return p.denoised && a.denoised.data; }

  bool run(int64_t begin, int64_t end) {
    bool unfinite = false;
    if (direct) {
      const int64_t whole = (end - begin) / GRAIN * GRAIN;
      if (whole) unfinite |= block(begin, whole);
      begin += whole;
    }
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
    const bool full = n == padded;
    Pointers<T> at;
    T(*next)[BLOCK] = scratch.block;
    for (int k = 0; k < p.branches; ++k) {
      if (p.reads_m >> k & 1) at.m[k] = load(m[k], e, n, padded, *next++);
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
    } else if (p.noise) {
      at.z = load(z, e, n, padded, *next++);
    }
    if (p.gradient) at.g = load(g, e, n, padded, *next++);
    if (p.variance) at.v = load(v, e, n, padded, *next++);
    at.inputs = inputs;
    T* staged_input = nullptr;
    if (inputs && full && inputs_direct) {
      for (int j = 0; j < inputs; ++j) at.in[j] = reinterpret_cast<T*>(in[j].at(e));
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
    const bool unfinite = run_body(p, at, padded);
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

extern const Kernel PG_CAT(kernel_, PG_LEVEL_NAME) = {PG_STRING(PG_ISA), step, normals};

}  // namespace pyguide
