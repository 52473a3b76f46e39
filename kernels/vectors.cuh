// The operands of a guidance method (csrc/moments.h) for a few elements of a thread, in registers: the branches'
// outputs as numbers of the state's type, and slots. THREAD as in control.cuh.
//
// A thread has W elements at a time, in pieces of at most 4 neighbours. Where outputs are of the state's float32 or of
// 16 bits, contiguous and aligned, a piece is read 16 bytes at a time: those of a 16-bit operand are the pieces of a
// pair of lanes, as in dense.cuh. All else is read element by element, with the same values: what is made of them does
// not depend on how they lie.
#pragma once
#include "../csrc/moments.h"
#include "dense.cuh"
#include "staged.cuh"

namespace pyguide {
namespace {

// a / b for 0 <= a < 2^52, without the call and the registers of a division: inverse is 1 / b, which leaves one more or
// less.
PG_DEVICE int64_t quotient(int64_t a, int64_t b, double inverse) {
  const int64_t near = int64_t(double(a) * inverse), left = a - near * b;
  return near + (left < 0 ? -1 : left >= b ? 1 : 0);
}

// In shared memory: where the operands of a sample are. No data: absent, read as NaN.
struct Places {
  View output[MAX_VECTORS], slot[MAX_SLOTS];
  bool bulk[MAX_VECTORS];  // whether an output can be read 16 bytes at a time
  double inverse;          // 1 / inner, where a view is of several rows

  // Every thread of the block; there after the next barrier.
  template <class THREAD>
  PG_DEVICE void find(const THREAD& thread, const StepArgs& a, int64_t b, int64_t row) {
    const int i = thread.index(), slot_index = i - a.branches;
    if (i == 0) inverse = 1.0 / double(a.inner);
    if (i < a.branches) {
      const int32_t index = a.source ? thread.load(route(a, a.source, b, row) + i) : -1;
      View view(a.output[i], a.output_type, index, a);
      if (!a.output[i].data || index < 0) view.data = nullptr;
      output[i] = view;
      bulk[i] = !view.data || (a.output_type != F64 && view.contiguous() && aligned(view.data, 16));
    } else if (slot_index < a.slots) {
      const Operand state{a.state, a.channels * a.inner, a.inner, 1};
      slot[slot_index] = View(state, a.state_type, slot_index * a.batch + b, a);
    }
  }
  // Whether all outputs and slots can.
  PG_DEVICE bool all_bulk(const StepArgs& a) const {
    bool all = a.state_type == F32 && aligned(slot[0].data, 16) && a.channels * a.inner % 4 == 0;
    PG_ROLLED
    for (int k = 0; k < a.branches; ++k) all &= bulk[k];
    return all;
  }
};

// Elements first[h], first[h] + step, .. of a sample, `count[h]` of them there.
template <int W>
struct Pieces {
  static constexpr int LENGTH = W < 4 ? W : 4, COUNT = W / LENGTH;
  int64_t first[COUNT], step;
  int count[COUNT];
  bool bulk;  // the same for all of a warp: its pieces are whole or not there, and lie as 16-byte accesses need them
};

// One number, read as `type`.
template <class T, class THREAD>
PG_DEVICE T load_element(const THREAD& thread, Type type, const char* at) {
  if (type == F32) return T(thread.load(reinterpret_cast<const float*>(at)));
  if (type == F64) return T(thread.load(reinterpret_cast<const double*>(at)));
  const uint16_t h = thread.load(reinterpret_cast<const uint16_t*>(at));
  return T(type == F16 ? widen_half<F16>(h) : widen_half<BF16>(h));
}
template <int W>
PG_DEVICE void set_piece(Pack<float, W>& x, int h, const Quad& piece) {
  for (int u = 0; u < 4; ++u) x.v[4 * h + u] = piece.v[u];
}
template <int W>
PG_DEVICE Quad piece_of(const Pack<float, W>& x, int h) {
  return {{x.v[4 * h], x.v[4 * h + 1], x.v[4 * h + 2], x.v[4 * h + 3]}};
}

// Reads operands. `column`: W numbers of shared memory for each thread, `pitch` apart, that no other thread uses: what
// is read element by element goes through it, so that one loop without an array in registers will do.
template <class T, class THREAD>
struct Reader {
  const THREAD& thread;
  const StepArgs& a;
  const Places& places;
  T* const column;
  const int pitch;

  // An output or slot; behind the last element 0. All lanes of a warp.
  template <int W>
  PG_DEVICE Pack<T, W> load(const View& view, const Pieces<W>& at) const {
    Pack<T, W> x;
    if constexpr (sizeof(T) == 4) {
      if (at.bulk) {
        if (view.type == F32) {
          x = load_quads(view.data, at);
        } else {
          x = widened(load_halves(view.data, at), view.type, at);
        }
        return x;
      }
    }
    return load_slowly(view, at);
  }
  template <int W>
  PG_DEVICE Pack<T, W> load_slowly(const View& view, const Pieces<W>& at) const {
    Pack<T, W> x;
    load_elements(view, at);
    for (int i = 0; i < W; ++i) x.v[i] = column[i * pitch];
    return x;
  }
  // With at.bulk: 16 bytes of an operand, 0 where the piece is not there; no data: NaN, which all ones are in any type.
  PG_DEVICE Words16 load16(const char* data, int64_t byte, bool there) const {
    if (there && data) return thread.load16(data + byte);
    const uint32_t bits = there ? ~0u : 0u;
    return {{bits, bits, bits, bits}};
  }
  template <int W>
  PG_DEVICE Pack<float, W> load_quads(const char* data, const Pieces<W>& at) const {
    Pack<float, W> x;
    for (int h = 0; h < Pieces<W>::COUNT; ++h) {
      set_piece(x, h, quad_of(load16(data, 4 * at.first[h], at.count[h] > 0)));
    }
    return x;
  }
  // Of 16 bits: of two pieces, the pair's first ones by its even lane, its second ones by the odd one, else both by the
  // even one; then what they are for the lane.
  template <int W>
  PG_DEVICE Words16 load_halves(const char* data, const Pieces<W>& at) const {
    const bool odd = thread.index() & 1;
    if constexpr (Pieces<W>::COUNT == 1) {
      if (odd) return Words16{};
      return load16(data, 2 * at.first[0], at.count[0] > 0);
    }
    constexpr int SECOND = W / 4 - 1;
    const int64_t first = odd ? at.first[SECOND] : at.first[0];
    return load16(data, 2 * (first & ~int64_t(7)), (odd ? at.count[SECOND] : at.count[0]) > 0);
  }
  template <int W>
  PG_DEVICE Pack<float, W> widened(const Words16& w, Type type, const Pieces<W>&) const {
    const bool odd = thread.index() & 1;
    Pack<float, W> x;
    if constexpr (Pieces<W>::COUNT == 1) {
      const uint32_t low = thread.neighbour(w.v[2]), high = thread.neighbour(w.v[3]);
      set_piece(x, 0, widen(type, odd ? low : w.v[0], odd ? high : w.v[1]));
    } else {
      Branches<true> pieces;
      pieces.type = type;
      pieces.swap(thread, w, odd);
      for (int h = 0; h < 2; ++h) set_piece(x, h, pieces[h]);
    }
    return x;
  }
  template <int W>
  PG_DEVICE void load_elements(const View& view, const Pieces<W>& at) const {
    constexpr int L = Pieces<W>::LENGTH;
    PG_ROLLED
    for (int h = 0; h < W / L; ++h) {
      const int64_t first = h ? at.first[W / L - 1] : at.first[0];
      const int count = h ? at.count[W / L - 1] : at.count[0];
      T* to = column + h * L * pitch;
      if (!view.data || count < L || !view.whole) {
        PG_ROLLED
        for (int u = 0; u < L; ++u) {
          T value = u < count ? T(NAN) : T(0);
          if (u < count && view.data) {
            const int64_t e = first + u * at.step, row = view.whole ? 0 : quotient(e, view.inner, places.inverse);
            const int64_t element = row * view.row_stride + (e - row * view.inner) * view.stride;
            value = load_element<T>(thread, view.type, view.at(element));
          }
          to[u * pitch] = value;
        }
      } else if (view.type == F32) {
        load_together<L, float>(view, first, at.step, to, [](float x) { return T(x); });
      } else if (view.type == F64) {
        load_together<L, double>(view, first, at.step, to, [](double x) { return T(x); });
      } else {
        const bool half = view.type == F16;
        load_together<L, uint16_t>(view, first, at.step, to, [&](uint16_t h) PG_LAMBDA {
          return T(half ? widen_half<F16>(h) : widen_half<BF16>(h));
        });
      }
    }
  }
  // L elements of a view that is one row: all loads before the first store.
  template <int L, class X, class F>
  PG_DEVICE void load_together(const View& view, int64_t first, int64_t step, T* to, const F& number) const {
    const X* from = reinterpret_cast<const X*>(view.data) + first * view.stride;
    X x[L];
    each<L>(0, [&](auto u) PG_LAMBDA { x[u] = thread.load(from + u * (step * view.stride)); });
    each<L>(0, [&](auto u) PG_LAMBDA { to[u * pitch] = number(x[u]); });
  }
};
// To `to`, [N] of the state's type; `bulk` as for at.bulk, but of where this goes.
template <int W, class T, class THREAD>
PG_DEVICE void store_pieces(const THREAD& thread, T* to, const Pieces<W>& at, bool bulk, const Pack<T, W>& x) {
  constexpr int L = Pieces<W>::LENGTH;
  if constexpr (sizeof(T) == 4) {
    if (at.bulk && bulk) {
      each<Pieces<W>::COUNT>(0, [&](auto h) PG_LAMBDA {
        if (at.count[h] > 0) thread.store16(to + at.first[h], words_of(piece_of(x, h)));
      });
      return;
    }
  }
  each<W>(0, [&](auto i) PG_LAMBDA {
    const int u = i % L;
    if (u < at.count[i / L]) thread.store(to + at.first[i / L] + u * at.step, x.v[i]);
  });
}

// The vectors y of a sample or group (csrc/moments.h), from K outputs and own slots; N >= `vectors`, which are both.
// With TOGETHER all bulk loads come before the first use, at the cost of registers.
template <bool TOGETHER, int N, int W, class T, class THREAD>
PG_DEVICE void load_vectors(const Reader<T, THREAD>& reader, const Space<T>& space, int vectors, const Pieces<W>& at,
                            Pack<T, W> (&y)[N]) {
  const StepArgs& a = reader.a;
  const Places& places = reader.places;
  const int K = a.branches;
  const auto view_of = [&](int i) PG_LAMBDA -> const View& {
    return i < K ? places.output[i] : places.slot[a.slots - vectors + i];
  };
  Pack<T, W> s;
  bool loaded = false;
  if constexpr (TOGETHER && sizeof(T) == 4) {
    loaded = at.bulk;
    if (at.bulk) {
      if (!space.model) s = reader.load_quads(places.slot[0].data, at);
      if (a.output_type == F32) {
        each<N>(0, [&](auto i) PG_LAMBDA {
          if (i < vectors) y[i] = reader.load_quads(view_of(i).data, at);
        });
      } else {
        Words16 words[N];
        each<N>(0, [&](auto i) PG_LAMBDA {
          if (i < K) words[i] = reader.load_halves(places.output[i].data, at);
          if (i >= K && i < vectors) y[i] = reader.load_quads(view_of(i).data, at);
        });
        each<N>(0, [&](auto i) PG_LAMBDA {
          if (i < K) y[i] = reader.widened(words[i], a.output_type, at);
        });
      }
    }
  }
  if (!loaded) {
    each<N>(0, [&](auto i) PG_LAMBDA {
      if (i < vectors) y[i] = TOGETHER ? reader.load_slowly(view_of(i), at) : reader.load(view_of(i), at);
    });
    if (!space.model) s = TOGETHER ? reader.load_slowly(places.slot[0], at) : reader.load(places.slot[0], at);
  }
  each<N>(0, [&](auto i) PG_LAMBDA {
    if (i > 0 && i < K) y[i] = y[i] - y[0];
  });
  if (!space.model) y[0] = space.reference(s, y[0]);
}

// f(number of the moment in the program's order, a function that adds up TERMS terms of it from element `first` on) for
// the moments of `vectors` <= N of them.
template <int TERMS, int N, int W, class T, class F>
PG_DEVICE void each_moment(const Pack<T, W> (&y)[N], int first, int vectors, bool sums, const F& f) {
  each<N>(0, [&](auto i) PG_LAMBDA {
    if (i >= vectors) return;
    const auto sum = [&]() PG_LAMBDA {
      T total = y[i].v[first];
      for (int u = 1; u < TERMS; ++u) total = total + y[i].v[first + u];
      return total;
    };
    if (sums) f(int(i), sum);
    const int row = vectors + i * vectors - i * (i - 1) / 2 - i;  // Q_ij at row + j
    each<N>(0, [&](auto j) PG_LAMBDA {
      const auto product = [&]() PG_LAMBDA {
        T total = y[i].v[first] * y[j].v[first];
        for (int u = 1; u < TERMS; ++u) total = fused(y[i].v[first + u], y[j].v[first + u], total);
        return total;
      };
      if (j >= i && j < vectors) f(row + j, product);
    });
  });
}

}  // namespace
}  // namespace pyguide
