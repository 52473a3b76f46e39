// The step for everything that dense.cuh does not take: a float64 state, more branches or slots, strided or unaligned
// operands, mixed types, any length. See csrc/step.h for the formula and step.cu for the geometry.
//
// A thread works on a unit of elements (32 bytes of the state) at a time. It copies what the row reads of them into
// columns of shared memory that no other thread uses, where run-time branch and slot numbers may index them: registers
// cannot be indexed, and local memory would cost a second trip to memory. A column of 16-byte chunks, chunk i of all
// threads side by side, so that neither copies nor reads meet a bank conflict. Dense, aligned operands are copied 16
// bytes at a time, asynchronously; the others element by element, with one division a unit.
#pragma once
#include "control.cuh"

namespace pyguide {

constexpr int STAGED_THREADS = 128, STAGED_BLOCKS = 8;
constexpr int64_t CHUNK_BYTES = 16, UNIT_BYTES = 32;
constexpr int64_t STAGED_BYTES = 48 << 10;  // shared memory that a block has on every device without asking

// Elements of a unit.
PG_INLINE constexpr int unit_length(Type state) { return state == F64 ? 4 : 8; }
// How a model output lies in its column: as in memory, but float64 rounded to a float32 state on the way.
PG_INLINE Type staged_type(Type type, Type state) { return type == F64 ? state : type; }

// The first chunk of each column. Kernels get it as a parameter: offsets then cost no registers.
struct Columns {
  int noise, gradient, variance, denoised, input, slots, results, outputs, output_chunks, count;

  Columns() = default;
  explicit Columns(const StepArgs& a) {
    const int length = unit_length(a.state_type), state = chunks(length, a.state_type);
    output_chunks = chunks(length, staged_type(a.output_type, a.state_type));
    count = 0;
    noise = take(state);
    gradient = take(a.gradient.data ? state : 0);
    variance = take(a.variance.data ? output_chunks : 0);
    denoised = take(a.denoised.data ? state : 0);
    input = take(chunks(length, a.input_type));  // as it is written
    slots = take(state * a.slots);
    results = take(a.slots);  // of the part that is worked on
    outputs = take(output_chunks * a.branches);
  }
  static int chunks(int length, Type type) { return int((length * size_of(type) + CHUNK_BYTES - 1) / CHUNK_BYTES); }
  int take(int chunks) {
    count += chunks;
    return count - chunks;
  }
};

namespace {

template <class T>
using StagedControl = Control<T, View>;

// Shared memory: a StagedControl<T>, then the columns, where the row's raw numbers are before there are any.
template <class T>
PG_INLINE constexpr int64_t control_bytes() {
  return int64_t(sizeof(StagedControl<T>) + CHUNK_BYTES - 1) / CHUNK_BYTES * CHUNK_BYTES;
}

// A thread's columns.
struct Own {
  char* base;
  int pitch;  // bytes from chunk to chunk
  PG_DEVICE char* chunk(int i) const { return base + i * pitch; }
  // Element `i` of the column that begins at chunk `first`, of `size` bytes.
  PG_DEVICE char* element(int first, int i, int size) const {
    const int byte = i * size;
    return chunk(first + byte / int(CHUNK_BYTES)) + byte % int(CHUNK_BYTES);
  }
};

// Elements e .. e + n of a sample.
struct Unit {
  int64_t e;
  int n;
};

PG_DEVICE int64_t quotient(int64_t a, int64_t b) {  // both >= 0; 64-bit division is slow where it is not needed
  return (a | b) >> 32 ? int64_t(uint64_t(a) / uint64_t(b)) : int64_t(uint32_t(a) / uint32_t(b));
}

// Calls f(u, address) for u = 0 .. count, behind the unit's last element with that one's address again. With N, which
// is then count, u is a compile-time number.
template <int N = 0, class F>
PG_DEVICE void each_element(const View& view, const Unit& unit, int count, const F& f) {
  const int64_t size = size_of(view.type), row = view.whole ? 0 : quotient(unit.e, view.inner);
  int64_t i = unit.e - row * view.inner;
  char* at = view.data + (row * view.row_stride + i * view.stride) * size;
  each<N>(count, [&](auto u) PG_LAMBDA {
    f(u, at);
    if (u + 1 >= unit.n) return;
    at += view.stride * size;
    if (++i == view.inner) {
      i = 0;
      at += (view.row_stride - view.inner * view.stride) * size;
    }
  });
}

template <class T>
PG_DEVICE bool in_bulk(const View& view, const Unit& unit) {
  const int64_t length = UNIT_BYTES / int64_t(sizeof(T)), bytes = length * size_of(view.type);
  return view.contiguous() && unit.n == length && aligned(view.at(unit.e), bytes < CHUNK_BYTES ? bytes : CHUNK_BYTES);
}

// Memory -> the column at chunk `to`; behind the sample's last element, that one again.
template <class T, class THREAD>
PG_DEVICE void stage(const THREAD& thread, const View& view, const Unit& unit, const Own& own, int to) {
  const int64_t bytes = UNIT_BYTES / int64_t(sizeof(T)) * size_of(view.type);
  const bool rounds = sizeof(T) == 4 && view.type == F64;  // a rare pair: element by element
  if (!rounds && in_bulk<T>(view, unit)) {
    const char* from = view.at(unit.e);
    if (bytes < CHUNK_BYTES) {
      thread.copy8(own.chunk(to), from);
    } else {
      PG_ROLLED
      for (int i = 0; i < bytes / CHUNK_BYTES; ++i) thread.copy16(own.chunk(to + i), from + CHUNK_BYTES * i);
    }
    return;
  }
  constexpr int LENGTH = int(UNIT_BYTES / sizeof(T));
  if (size_of(view.type) == 2) {  // too short for an asynchronous copy: all loads before the first store
    uint16_t h[LENGTH];
    each_element<LENGTH>(view, unit, LENGTH, [&](auto u, const char* from) PG_LAMBDA {
      h[u] = thread.load(reinterpret_cast<const uint16_t*>(from));
    });
    each<LENGTH>(0, [&](auto u) PG_LAMBDA { put(own.element(to, u, 2), h[u]); });
    return;
  }
  each_element(view, unit, LENGTH, [&](int u, const char* from) PG_LAMBDA {
    if (rounds) {
      put(own.element(to, u, 4), float(thread.load(reinterpret_cast<const double*>(from))));
    } else if (view.type == F64) {
      thread.copy8(own.element(to, u, 8), from);
    } else {
      thread.copy4(own.element(to, u, 4), from);
    }
  });
}

// One number as bits of `type`.
template <class T>
PG_DEVICE uint64_t bits_as(Type type, T x) {
  if (type == F64) return bits_of(double(x));
  if (type == F32) return bits_of(float(x));
  return (type == F16 ? narrow_pair<F16>(before_narrow(x), 0.f) : narrow_pair<BF16>(before_narrow(x), 0.f)) & 0xffff;
}
template <class THREAD>
PG_DEVICE void store_bits(const THREAD& thread, char* to, int size, uint64_t bits) {
  if (size == 8) {
    thread.store(reinterpret_cast<uint64_t*>(to), bits);
  } else if (size == 4) {
    thread.store(reinterpret_cast<uint32_t*>(to), uint32_t(bits));
  } else {
    thread.store(reinterpret_cast<uint16_t*>(to), uint16_t(bits));
  }
}

// A column -> memory, both of the operand's type.
template <class T, class THREAD>
PG_DEVICE void unstage(const THREAD& thread, const Own& own, int from, const View& view, const Unit& unit) {
  const int size = int(size_of(view.type));
  if (in_bulk<T>(view, unit)) {
    const int bytes = int(UNIT_BYTES / sizeof(T)) * size;
    char* to = view.at(unit.e);
    PG_ROLLED
    for (int i = 0; i < bytes; i += int(CHUNK_BYTES)) {
      const Words16 w = get<Words16>(own.chunk(from + i / int(CHUNK_BYTES)));
      if (bytes < CHUNK_BYTES) {
        thread.store8(to, w);
      } else {
        thread.store16(to + i, w);
      }
    }
    return;
  }
  each_element(view, unit, unit.n, [&](int u, char* to) PG_LAMBDA {
    const char* at = own.element(from, u, size);
    if (size == 8) {
      thread.store(reinterpret_cast<uint64_t*>(to), get<uint64_t>(at));
    } else if (size == 4) {
      thread.store(reinterpret_cast<uint32_t*>(to), get<uint32_t>(at));
    } else {
      thread.store(reinterpret_cast<uint16_t*>(to), get<uint16_t>(at));
    }
  });
}

// Part of a column, as the formula takes it: 4 elements of a float32 state, 1 of a float64 one.
PG_DEVICE void read(const Own& own, int first, Type type, int part, Pack<float, 4>& to) {
  if (type == F32) {
    const Words16 w = get<Words16>(own.chunk(first + part));
    for (int i = 0; i < 4; ++i) to.v[i] = float_of(w.v[i]);
  } else {
    const Words8 w = get<Words8>(own.chunk(first) + 8 * part);
    for (int i = 0; i < 4; ++i) {
      const uint16_t h = uint16_t(w.v[i / 2] >> 16 * (i % 2));
      to.v[i] = type == F16 ? widen_half<F16>(h) : widen_half<BF16>(h);
    }
  }
}
PG_DEVICE void read(const Own& own, int first, Type type, int part, Pack<double, 1>& to) {
  if (type == F64) {
    to.v[0] = get<double>(own.element(first, part, 8));
  } else if (type == F32) {
    to.v[0] = get<float>(own.element(first, part, 4));
  } else {
    const uint16_t h = get<uint16_t>(own.element(first, part, 2));
    to.v[0] = type == F16 ? widen_half<F16>(h) : widen_half<BF16>(h);
  }
}
PG_DEVICE Words16 words_of(const Pack<float, 4>& x) {
  return {{bits_of(x.v[0]), bits_of(x.v[1]), bits_of(x.v[2]), bits_of(x.v[3])}};
}
PG_DEVICE Words16 words_of(double a, double b) {
  const uint64_t low = bits_of(a), high = bits_of(b);
  return {{uint32_t(low), uint32_t(low >> 32), uint32_t(high), uint32_t(high >> 32)}};
}
// Part of a column, rounded to `type`.
PG_DEVICE void write(const Own& own, int first, Type type, int part, const Pack<float, 4>& x) {
  if (type == F32) {
    put(own.chunk(first + part), words_of(x));
  } else if (type == F64) {
    put(own.chunk(first + 2 * part), words_of(double(x.v[0]), double(x.v[1])));
    put(own.chunk(first + 2 * part + 1), words_of(double(x.v[2]), double(x.v[3])));
  } else {
    Words8 w;
    for (int i = 0; i < 2; ++i) {
      w.v[i] =
          type == F16 ? narrow_pair<F16>(x.v[2 * i], x.v[2 * i + 1]) : narrow_pair<BF16>(x.v[2 * i], x.v[2 * i + 1]);
    }
    put(own.chunk(first) + 8 * part, w);
  }
}
PG_DEVICE void write(const Own& own, int first, Type type, int part, const Pack<double, 1>& x) {
  if (type == F64) {
    put(own.element(first, part, 8), bits_of(x.v[0]));
  } else if (type == F32) {
    put(own.element(first, part, 4), float(x.v[0]));
  } else {
    put(own.element(first, part, 2), uint16_t(bits_as(type, x.v[0])));
  }
}

// Columns as step_formula indexes them.
template <class V>
struct Read {
  const Own& own;
  int first, chunks;
  Type type;
  int part;
  PG_DEVICE V operator[](int i) const {
    V r;
    read(own, first + i * chunks, type, part, r);
    return r;
  }
};

// The normals of a unit to its column: one Philox call for four.
PG_DEVICE void write_normals(const Own& own, int first, int64_t e, uint64_t seed, uint32_t ordinal, float) {
  PG_ROLLED
  for (int part = 0; part < 2; ++part) {
    write(own, first, F32, part, normal_quad(uint64_t(e) / 4 + part, seed, ordinal, TAG_STEP));
  }
}
PG_DEVICE void write_normals(const Own& own, int first, int64_t e, uint64_t seed, uint32_t ordinal, double) {
  uint32_t c[4] = {uint32_t(uint64_t(e) / 4), uint32_t(uint64_t(e) / 4 >> 32), ordinal, TAG_STEP};
  philox4x32(c, uint32_t(seed), uint32_t(seed >> 32));
  PG_ROLLED
  for (int part = 0; part < 4; part += 2) {
    double cosine, sine;
    normal_pair(c[0], c[1], cosine, sine);
    put(own.chunk(first + part / 2), words_of(cosine, sine));
    c[0] = c[2];
    c[1] = c[3];
  }
}

// One unit.
template <class T, class THREAD>
PG_DEVICE void staged_elements(const THREAD& thread, StagedControl<T>& c, const StepArgs& a, const Columns& at,
                               const Own& own, const Unit& unit) {
  constexpr int W = sizeof(T) == 4 ? 4 : 1, LENGTH = int(UNIT_BYTES / sizeof(T));
  typedef Pack<T, W> V;
  const Program<T>& p = c.program;
  const Type state = a.state_type, model = staged_type(a.output_type, state);
  const bool drawn = p.needs.noise() && !c.extra(NOISE).data;
  PG_ROLLED
  for (int i = 0; i < DENOISED + a.branches + a.slots; ++i) {  // the extras that are read, outputs, slots
    const int k = i - DENOISED, slot = k - a.branches;
    bool read;
    int from, to;
    if (k < 0) {
      read = i == NOISE ? p.needs.noise() && !drawn : i == GRADIENT ? p.needs.gradient() : p.needs.variance();
      from = i;
      to = i == NOISE ? at.noise : i == GRADIENT ? at.gradient : at.variance;
    } else {
      read = slot < 0 ? p.reads_m >> k & 1 : p.reads_s >> slot & 1;
      from = slot < 0 ? EXTRAS + k : c.SLOTS + slot;
      to = slot < 0 ? at.outputs + k * at.output_chunks : at.slots + 2 * slot;
    }
    if (!read) continue;
    if (c.at[from].data) {
      stage<T>(thread, c.at[from], unit, own, to);
    } else if (i >= DENOISED ||
               (i == VARIANCE && a.variance.data)) {  // absent, and no host looked (enqueue): NaN in any type
      PG_ROLLED
      for (int chunk = 0; chunk < at.output_chunks; ++chunk) put(own.chunk(to + chunk), Words16{{~0u, ~0u, ~0u, ~0u}});
    }
  }
  if (drawn) write_normals(own, at.noise, unit.e, c.seed, c.ordinal, T(0));
  thread.wait();
  PG_ROLLED
  for (int part = 0; part < LENGTH / W; ++part) {
    const Read<V> m{own, at.outputs, at.output_chunks, model, part}, s{own, at.slots, 2, state, part};
    const Read<V> z{own, at.noise, 0, state, part}, g{own, at.gradient, 0, state, part};
    const Read<V> v{own, at.variance, 0, model, part};
    V D;
    step_formula<0, 0, false>(
        p, m, s, [&]() PG_LAMBDA { return z[0]; }, [&]() PG_LAMBDA { return g[0]; }, [&]() PG_LAMBDA { return v[0]; },
        D,
        [&](auto r, const V& value) PG_LAMBDA {
          write(own, at.results + r, state, 0, value);  // its slot may be read by those that follow
          bool bad = false;
          for (int i = 0; i < W; ++i) bad |= part * W + i < unit.n && unfinite(Pack<T, 1>{{value.v[i]}});
          if (a.check && r == 0 && bad) c.unfinite = true;
        });
    if (p.needs.denoised() && c.extra(DENOISED).data) write(own, at.denoised, state, part, D);
    PG_ROLLED
    for (int r = 0; r < a.slots; ++r) {
      if (p.writes >> r & 1) write(own, at.slots + 2 * r, state, part, Read<V>{own, at.results, 1, state, 0}[r]);
    }
    if (p.needs.input()) {
      V x = V::set(T(0));
      if (p.c_in != T(0)) x = V::set(p.c_in) * s[0];
      write(own, at.input, a.input_type, part, x);
    }
  }
  PG_ROLLED
  for (int i = DENOISED; i < EXTRAS + a.slots + a.branches; ++i) {  // denoised, slots, inputs
    const int slot = i - EXTRAS, k = slot - a.slots;
    const bool written = slot < 0 ? p.needs.denoised() : k < 0 ? p.writes >> slot & 1 : p.needs.input();
    const View& view = slot < 0 ? c.extra(DENOISED) : k < 0 ? c.slot(slot) : c.input(k);
    if (!written || !view.data) continue;
    unstage<T>(thread, own, slot < 0 ? at.denoised : k < 0 ? at.slots + 2 * slot : at.input, view, unit);
  }
}

}  // namespace

// `parts` blocks for each sample, one after another; they share its units. Only the first `workers` of a block's
// threads have columns. `shared`: control_bytes, then the columns.
template <class T, bool ALL = true, class THREAD>
PG_DEVICE void staged_step(const THREAD& thread, const StepArgs& a, const Columns& at, uint32_t parts, bool refresh,
                           char* shared, int workers) {
  StagedControl<T>& c = *reinterpret_cast<StagedControl<T>*>(shared);
  char* area = shared + control_bytes<T>();
  const Part part{int64_t(thread.block() / parts), thread.block() % parts, parts, refresh};
  if (!setup(thread, c, reinterpret_cast<T*>(area), a, part)) return;
  const Own own{area + thread.index() * CHUNK_BYTES, workers * int(CHUNK_BYTES)};
  constexpr int LENGTH = int(UNIT_BYTES / sizeof(T));
  const int64_t N = a.channels * a.inner, step = int64_t(parts) * workers * LENGTH;
  const bool works = ALL || thread.index() < workers;
  for (int64_t e = (int64_t(part.index) * workers + thread.index()) * LENGTH; works && e < N; e += step) {
    const Unit unit{e, int(N - e < LENGTH ? N - e : LENGTH)};
    staged_elements<T>(thread, c, a, at, own, unit);
  }
  report_unfinite(thread, c, a, part);
  if (take_ticket(thread, a, part) == parts - 1) advance_row(thread, a, part, c.ordinal);
}

// Normals of elements [first, first + count) of one sample's stream to `to` of `type`; a pair of them from half a
// Philox call at a time.
template <class T, class THREAD>
PG_DEVICE void normals_pairs(const THREAD& thread, void* to, Type type, int64_t first, int64_t count, uint64_t seed,
                             uint32_t ordinal, uint32_t tag, int64_t threads) {
  const int64_t end = first + count, size = size_of(type);
  const int64_t begin = first / 4 * 4 + (int64_t(thread.block()) * thread.count() + thread.index()) * 4;
  for (int64_t quad = begin; quad < end; quad += threads * 4) {
    uint32_t c[4] = {uint32_t(uint64_t(quad) / 4), uint32_t(uint64_t(quad) / 4 >> 32), ordinal, tag};
    philox4x32(c, uint32_t(seed), uint32_t(seed >> 32));
    PG_ROLLED
    for (int64_t e = quad; e < quad + 4; e += 2) {
      T cosine, sine;
      normal_pair(c[0], c[1], cosine, sine);
      char* at = static_cast<char*>(to) + (e - first) * size;
      if (e >= first && e < end) store_bits(thread, at, int(size), bits_as(type, cosine));
      if (e + 1 >= first && e + 1 < end) store_bits(thread, at + size, int(size), bits_as(type, sine));
      c[0] = c[2];
      c[1] = c[3];
    }
  }
}

}  // namespace pyguide
