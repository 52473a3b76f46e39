// The step for a float32 state whose operands are all dense and aligned, in registers: K <= 2 branches, up to S slots,
// model operands of float32 or of one 16-bit type. See csrc/step.h for the formula and step.cu for the geometry.
//
// A thread has a quad (4 elements) of a tile, neighbours neighbouring quads: their float32 accesses are 16 bytes each
// and fill whole lines. 16 bytes of a 16-bit operand are the 8 elements of a pair of lanes, whose even lane reads and
// writes those of branch 0, the odd one of branch 1; then they swap the halves that are the other's.
#pragma once
#include "control.cuh"

namespace pyguide {

constexpr int DENSE_THREADS = 128;
constexpr int64_t DENSE_TILE = 4 * DENSE_THREADS;
// Blocks that a multiprocessor holds at least, so many that their loads keep its memory busy.
PG_INLINE constexpr int dense_blocks(int slots) { return slots == 1 ? 9 : 8; }

namespace {

typedef Pack<float, 4> Quad;
typedef Control<float, Address, DENSE_BRANCHES, DENSE_SLOTS> DenseControl;

PG_DEVICE Quad quad_of(const Words16& w) {
  return {{float_of(w.v[0]), float_of(w.v[1]), float_of(w.v[2]), float_of(w.v[3])}};
}
template <Type TYPE>
PG_DEVICE Quad widen_as(uint32_t low, uint32_t high) {
  return {{widen_half<TYPE>(uint16_t(low)), widen_half<TYPE>(uint16_t(low >> 16)), widen_half<TYPE>(uint16_t(high)),
           widen_half<TYPE>(uint16_t(high >> 16))}};
}
PG_DEVICE Quad widen(Type type, uint32_t low, uint32_t high) {
  return type == F16 ? widen_as<F16>(low, high) : widen_as<BF16>(low, high);
}
PG_DEVICE void narrow(Type type, const Quad& x, uint32_t& low, uint32_t& high) {
  if (type == F16) {
    low = narrow_pair<F16>(x.v[0], x.v[1]);
    high = narrow_pair<F16>(x.v[2], x.v[3]);
  } else {
    low = narrow_pair<BF16>(x.v[0], x.v[1]);
    high = narrow_pair<BF16>(x.v[2], x.v[3]);
  }
}

// The model operands of a thread's quad, as step_formula indexes them.
template <bool HALF>
struct Branches {
  Quad m[DENSE_BRANCHES];
  PG_DEVICE const Quad& operator[](int k) const { return m[k]; }
};
template <>
struct Branches<true> {
  uint32_t low[DENSE_BRANCHES], high[DENSE_BRANCHES];
  Type type;
  PG_DEVICE Quad operator[](int k) const { return widen(type, low[k], high[k]); }

  // `w`: 8 elements of branch 0 on an even lane, of branch 1 on an odd one.
  template <class THREAD>
  PG_DEVICE void swap(const THREAD& thread, const Words16& w, bool odd) {
    for (int i = 0; i < 2; ++i) {
      const uint32_t got = thread.neighbour(odd ? w.v[i] : w.v[2 + i]);
      uint32_t* const mine = i ? high : low;
      mine[0] = odd ? got : w.v[i];
      mine[1] = odd ? w.v[2 + i] : got;
    }
  }
};
// A pair's 8 elements in a row, from the quads of its lanes.
template <class THREAD>
PG_DEVICE Words16 join_pair(const THREAD& thread, uint32_t low, uint32_t high, bool odd) {
  const uint32_t other_low = thread.neighbour(low), other_high = thread.neighbour(high);
  return {{odd ? other_low : low, odd ? other_high : high, odd ? low : other_low, odd ? high : other_high}};
}

// One tile.
template <int S, bool HALF, class THREAD>
PG_DEVICE void dense_elements(const THREAD& thread, DenseControl& c, const StepArgs& a, int64_t tile) {
  constexpr int K = DENSE_BRANCHES;
  const Program<float>& p = c.program;
  const Type type = a.output_type;
  const bool odd = thread.index() & 1;
  const int64_t e = tile + thread.index() * 4, pair = e & ~int64_t(7);
  const bool there = e < a.channels * a.inner;  // with its pair, if there are 16-bit operands
  // An absent operand that the row reads nevertheless (no host looked: enqueue) is NaN, which all ones are in any type.
  const auto load = [&](const void* from, bool wanted) {
    return wanted && there ? thread.load16(from) : Words16{{~0u, ~0u, ~0u, ~0u}};
  };
  const auto load_quad = [&](const char* data) {
    return quad_of(load(reinterpret_cast<const float*>(data) + e, data));
  };
  const auto store_quad = [&](char* data, const Quad& x) {
    const Words16 w{{bits_of(x.v[0]), bits_of(x.v[1]), bits_of(x.v[2]), bits_of(x.v[3])}};
    if (there) thread.store16(reinterpret_cast<float*>(data) + e, w);
  };
  const auto load_pair = [&](const char* data, bool wanted) { return load(data + 2 * pair, wanted && data); };
  Branches<HALF> m;
  Quad s[S], D;
  Words16 words;
  if constexpr (HALF) {
    m.type = type;
    if (p.reads_m) words = load_pair(c.output(odd).data, p.reads_m >> odd & 1);
  } else {
    each<K>(0, [&](auto k) PG_LAMBDA {
      if (p.reads_m >> k & 1) m.m[k] = load_quad(c.output(k).data);
    });
  }
  each<S>(0, [&](auto i) PG_LAMBDA {
    if (p.reads_s >> i & 1) s[i] = load_quad(c.slot(i).data);
  });
  const auto noise = [&]() PG_LAMBDA {
    const char* data = c.extra(NOISE).data;
    return data ? load_quad(data) : normal_quad(uint64_t(e) / 4, c.seed, c.ordinal, TAG_STEP);
  };
  const auto gradient = [&]() PG_LAMBDA { return load_quad(c.extra(GRADIENT).data); };
  const auto variance = [&]() PG_LAMBDA {
    const char* data = c.extra(VARIANCE).data;
    if constexpr (!HALF) return load_quad(data);
    Branches<true> v;
    v.type = type;
    v.swap(thread, load_pair(data, !odd), odd);
    return v[0];
  };
  const auto write_inputs = [&](const Quad& s_0) PG_LAMBDA {
    const Quad x = p.c_in != 0.f ? Quad::set(p.c_in) * s_0 : Quad::set(0.f);
    if constexpr (HALF) {
      uint32_t low, high;
      narrow(type, x, low, high);
      const Words16 w = join_pair(thread, low, high, odd);
      char* data = int(odd) < p.branches ? c.input(odd).data : nullptr;
      if (there && data) thread.store16(data + 2 * pair, w);
    } else {
      each<K>(0, [&](auto k) PG_LAMBDA {
        if (k < p.branches && c.input(k).data) store_quad(c.input(k).data, x);
      });
    }
  };
  if constexpr (HALF) {
    if (p.reads_m) m.swap(thread, words, odd);
  }
  if (p.needs.input() && !(p.writes & 1)) write_inputs(s[0]);
  step_formula<K, S, false>(p, m, s, noise, gradient, variance, D, [&](auto r, const Quad& value) PG_LAMBDA {
    store_quad(c.slot(r).data, value);
    if (r == 0) {
      if (p.needs.input()) write_inputs(value);
      if (a.check && there && unfinite(value)) c.unfinite = true;
    }
  });
  if (p.needs.denoised() && c.extra(DENOISED).data) store_quad(c.extra(DENOISED).data, D);
}

}  // namespace

// `parts` blocks of THREADS threads for each sample, one after another; they share its tiles.
template <int S, bool HALF, int THREADS = DENSE_THREADS, class THREAD>
PG_DEVICE void dense_step(const THREAD& thread, const StepArgs& a, uint32_t parts, bool refresh, DenseControl& c,
                          float* raw) {
  const Part part{int64_t(thread.block() / parts), thread.block() % parts, parts, refresh};
  if (!setup(thread, c, raw, a, part)) return;
  const uint32_t ticket = take_ticket(thread, a, part);
  constexpr int64_t TILE = 4 * THREADS;
  const int64_t N = a.channels * a.inner, step = parts * TILE;
  for (int64_t tile = part.index * TILE; tile < N; tile += step) {
    dense_elements<S, HALF>(thread, c, a, tile);
  }
  report_unfinite(thread, c, a, part);
  if (ticket == parts - 1) advance_row(thread, a, part, c.ordinal);
}

}  // namespace pyguide
