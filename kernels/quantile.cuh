// The bound of one sample by one block. See csrc/quantile.h for the formula and quantile.cu for the geometry. THREAD as
// in control.cuh.
//
// A pass over the elements forms D in registers, from operands read as the step reads them and by its own functions,
// and counts a digit of the keys that are left in shared memory. Where those keys fit there too, they stay, and the
// passes that follow read them: of a sample that fits as a whole D is formed once, of others as a rule twice.
#pragma once
#include "../csrc/quantile.h"
#include "reduce.cuh"
#include "vectors.cuh"

namespace pyguide {

constexpr int QUANTILE_THREADS = 1024;        // of a block at most
constexpr int64_t QUANTILE_BYTES = 80 << 10;  // of keys in shared memory at most: 20,480 of float32

namespace {

template <class Bits>
struct Least {
  Bits key;
  static PG_DEVICE Least none() { return {~Bits(0)}; }
  template <class THREAD>
  PG_DEVICE void join(const THREAD& thread, int mask) {
    const Bits other = thread.exchange(key, mask);
    key = other < key ? other : key;
  }
};

// In shared memory; the keys follow.
template <class T>
struct QuantileShared {
  StagedControl<T> control;
  union {
    T raw[StagedControl<T>::raw_width];
    uint32_t counts[BINS];
  };
  Least<typename Key<T>::Bits> above[QUANTILE_THREADS / WARP];
  uint32_t totals[QUANTILE_THREADS / WARP];
  uint32_t bin, before, left, kept;
  bool nan;
};

// Threads of a block, so that they divide BINS, keys that stay in shared memory, and its bytes.
struct QuantileGeometry {
  int threads;
  int64_t capacity, shared;
};
template <class T>
QuantileGeometry quantile_geometry(int64_t elements) {
  constexpr int64_t unit = 16 / int64_t(sizeof(T)), most = QUANTILE_BYTES / int64_t(sizeof(T));
  QuantileGeometry g;
  g.threads = 128;
  while (g.threads < QUANTILE_THREADS && g.threads * unit < elements) g.threads *= 2;
  g.capacity = elements < most ? elements : most;
  g.shared = int64_t(sizeof(QuantileShared<T>) + sizeof(T) - 1) / int64_t(sizeof(T)) + g.capacity;
  g.shared *= int64_t(sizeof(T));
  return g;
}
// What the kernel takes: the step's own arguments, but no bound is read.
inline StepArgs quantile_args(StepArgs a) {
  a.bound = nullptr;
  return a;
}

// Neighbours that are 16 bytes of the state's type, from memory where they lie densely and aligned.
template <class THREAD>
PG_DEVICE Pack<float, 4> load_unit(const THREAD& thread, Type type, const char* at, float) {
  if (type == F32) return quad_of(thread.load16(at));
  const Words8 w = thread.load(reinterpret_cast<const Words8*>(at));
  return widen(type, w.v[0], w.v[1]);
}
template <class THREAD>
PG_DEVICE Pack<double, 2> load_unit(const THREAD& thread, Type type, const char* at, double) {
  if (type == F64) {
    const Words16 w = thread.load16(at);
    return {{double_of(w.v[0], w.v[1]), double_of(w.v[2], w.v[3])}};
  }
  return {{load_element<double>(thread, type, at), load_element<double>(thread, type, at + size_of(type))}};
}

template <class T, class THREAD>
struct QuantileBlock {
  static constexpr int W = 16 / int(sizeof(T));
  typedef Pack<T, W> V;
  typedef typename Key<T>::Bits Bits;

  const THREAD& thread;
  const StepArgs& a;
  QuantileShared<T>& shared;
  Bits* const kept;
  const int64_t capacity, N = a.channels * a.inner;
  Needs needs;
  uint32_t bulk;  // operands to be read 16 bytes at a time: bit k is output k's, bit 16 + c slot c's
  // The select: keys whose bits from `shift` on are `prefix` are left, `left` of them; it counts the `width` bits
  // below.
  Bits prefix = 0, above = ~Bits(0);  // above: the least key beyond those that are left, of those the thread saw
  int shift = Key<T>::bits, width = DIGIT;
  uint32_t left = uint32_t(N), stored = 0;  // stored: keys in `kept`, among them all that are left

  PG_DEVICE QuantileBlock(const THREAD& thread, const StepArgs& a, QuantileShared<T>& shared, Bits* kept,
                          int64_t capacity)
      : thread(thread), a(a), shared(shared), kept(kept), capacity(capacity), needs(shared.control.program.needs) {
    const int lane = thread.index() % WARP;
    const View& view = lane < MAX_BRANCHES ? shared.control.output(lane) : shared.control.slot(lane - MAX_BRANCHES);
    const bool there = lane < MAX_BRANCHES ? lane < a.branches : lane - MAX_BRANCHES < a.slots;
    bulk = uint32_t(thread.warp_or(uint64_t(there && in_bulk(view)) << lane));
  }
  static PG_DEVICE bool in_bulk(const View& v) {
    return v.data && v.contiguous() && size_of(v.type) <= int64_t(sizeof(T)) && aligned(v.data, W * size_of(v.type));
  }

  // Elements e .. e + W; behind the sample's last one that one again. Absent: NaN.
  PG_DEVICE V load(const View& view, Type type, bool in_bulk, int64_t e) const {
    const int64_t n = N - e;
    if (in_bulk && n >= W) return load_unit(thread, type, view.data + e * size_of(type), T(0));
    V x = V::set(T(NAN));
    if (!view.data) return x;
    each_element<W>(view, Unit{e, int(n < W ? n : W)}, W,
                    [&](auto u, const char* at) PG_LAMBDA { x.v[u] = load_element<T>(thread, type, at); });
    return x;
  }
  // As the formula indexes them.
  struct Outputs {
    const QuantileBlock& q;
    int64_t e;
    PG_DEVICE V operator[](int k) const {
      return q.load(q.shared.control.output(k), q.a.output_type, q.bulk >> k & 1, e);
    }
  };
  struct Slots {
    const QuantileBlock& q;
    int64_t e;
    PG_DEVICE V operator[](int c) const {
      return q.load(q.shared.control.slot(c), q.a.state_type, q.bulk >> (MAX_BRANCHES + c) & 1, e);
    }
  };
  PG_DEVICE V denoised(int64_t e) const {
    const Program<T>& p = shared.control.program;
    const Slots s{*this, e};
    V G = V::set(T(0));
    if (needs.reads_g()) G = guided_output<0, 0, false, V>(p, needs, Outputs{*this, e}, s);
    return unclipped(p, needs, s, G);
  }

  PG_DEVICE void count(Bits key, bool keep) {
    const Bits top = key >> shift;
    if (top == prefix) {
      thread.add(&shared.counts[uint32_t(key >> (shift - width)) & ((1u << width) - 1)], 1u);
      if (keep) kept[thread.add(&shared.kept, 1u)] = key;
    } else if (top > prefix && key < above) {
      above = key;
    }
  }
  // One digit of all keys.
  PG_DEVICE void pass() {
    const bool first = shift == Key<T>::bits, keep = !stored && left <= capacity;
    PG_ROLLED
    for (int i = thread.index(); i < BINS; i += thread.count()) shared.counts[i] = 0;
    if (thread.index() == 0) shared.kept = 0;
    thread.sync();
    if (stored) {
      PG_ROLLED
      for (uint32_t i = uint32_t(thread.index()); i < stored; i += uint32_t(thread.count())) count(kept[i], false);
    } else {
      bool nan = false;
      PG_ROLLED
      for (int64_t e = thread.index() * W; e < N; e += thread.count() * W) {
        const V D = denoised(e);
        each<W>(0, [&](auto u) PG_LAMBDA {
          if (e + u >= N) return;
          const Bits key = Bits(bits_of(D.v[u])) & ~Bits(0) >> 1;
          nan |= key > Key<T>::infinity;
          count(key, keep && !first);
          if (keep && first) kept[e + u] = key;
        });
      }
      if (nan) shared.nan = true;
    }
    thread.sync();
    if (keep) stored = left;
  }
  // The bin of the key that `index` others precede, which then counts within that bin.
  PG_DEVICE void choose(uint32_t& index) {
    const int share = BINS / thread.count(), first = thread.index() * share;
    const int warp = thread.index() / WARP, lane = thread.index() % WARP;
    uint32_t own = 0, before = 0;
    PG_ROLLED
    for (int i = 0; i < share; ++i) own += shared.counts[first + i];
    uint32_t total = own;  // of 1, 2, 4 .. lanes
    PG_ROLLED
    for (int mask = 1; mask < WARP; mask *= 2) {
      const uint32_t other = thread.exchange(total, mask);
      if (lane & mask) before += other;
      total += other;
    }
    if (lane == 0) shared.totals[warp] = total;
    thread.sync();
    PG_ROLLED
    for (int i = 0; i < warp; ++i) before += shared.totals[i];
    if (index >= before && index - before < own) {
      int bin = first;
      uint32_t n = shared.counts[bin];
      PG_ROLLED
      while (index - before >= n) {
        before += n;
        n = shared.counts[++bin];
      }
      shared.bin = uint32_t(bin);
      shared.before = before;
      shared.left = n;
    }
    thread.sync();
    index -= shared.before;
    left = shared.left;
    prefix = prefix << width | Bits(shared.bin);
    shift -= width;
  }
  // |D|_(i) and |D|_(i+1); false if there is a NaN. The same for all threads.
  PG_DEVICE bool select(uint32_t index, T& low, T& high) {
    if (thread.index() == 0) shared.nan = false;
    PG_ROLLED
    while (shift > 0) {
      width = shift < DIGIT ? shift : DIGIT;
      pass();
      if (shared.nan) return false;
      choose(index);
    }
    Bits next = prefix;
    if (index + 1 == left) {  // the last of its value
      const int share = BINS / thread.count(), first = thread.index() * share;
      PG_ROLLED
      for (int i = share - 1; i >= 0; --i) {
        const Bits key = prefix + Bits(first + i - int(shared.bin));
        if (first + i > int(shared.bin) && shared.counts[first + i]) above = key;
      }
      next = over_block(thread, Least<Bits>{above}, shared.above).key;
    }
    memcpy(&low, &prefix, sizeof low);
    memcpy(&high, &next, sizeof high);
    return true;
  }
};

}  // namespace

// Sample `thread.block()`. `area`: of QuantileGeometry::shared bytes, aligned to 16.
template <class T, class THREAD>
PG_DEVICE void quantile_sample(const THREAD& thread, const StepArgs& a, const QuantileArgs& q, int64_t capacity,
                               char* area) {
  QuantileShared<T>& shared = *reinterpret_cast<QuantileShared<T>*>(area);
  typedef typename Key<T>::Bits Bits;
  static_assert(sizeof(QuantileShared<T>) % sizeof(Bits) == 0, "the keys follow");
  // not the first part of its sample: no timestep is written
  if (!setup(thread, shared.control, shared.raw, a, Part{int64_t(thread.block()), 1, 2, false})) return;
  T bound = T(0);
  if (shared.control.ordinal > 0 && shared.control.program.needs.denoised()) {
    Bits* const kept = reinterpret_cast<Bits*>(area + sizeof(QuantileShared<T>));
    const Position at(q.quantile, a.channels * a.inner);
    T low, high;
    QuantileBlock<T, THREAD> block(thread, a, shared, kept, capacity);
    bound = block.select(uint32_t(at.index), low, high) ? bound_of(q, low, high, at.fraction) : T(NAN);
  }
  if (thread.index() == 0) thread.store(static_cast<T*>(q.bound) + thread.block(), bound);
}

}  // namespace pyguide
