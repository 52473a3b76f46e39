// What the CPU kernel stages: strided and 16-bit operands to and from dense blocks of the state's type, and noise.
#pragma once
#include "cpu.h"
#include "philox.h"
#include "vec.h"
#include "view.h"

namespace pyguide {
namespace {

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

// ---- strided operands ----------------------------------------------------------------------------------------------
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
    pieces(v, e, n,
           [&](char* p, int64_t count, int64_t done) { copy_strided(raw + done * size, 1, p, v.stride, count, size); });
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
    pieces(v, e, n,
           [&](char* p, int64_t count, int64_t done) { copy_strided(p, v.stride, raw + done * size, 1, count, size); });
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

}  // namespace
}  // namespace pyguide
