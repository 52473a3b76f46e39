// The moments of a sample (csrc/moments.h), its program and its weights block, by blocks of MOMENT_LANES threads. See
// moments.cu for the geometry. THREAD as in control.cuh.
//
// Each thread is a lane of a chunk: it has LANE_TERMS elements of it, a few quads or pairs, and adds the products of
// each in the state's type. The lanes' sums of some moments at a time go to shared memory, where each of the block's
// warps adds those of one moment: every 32nd lane in order, then these 32 by pairs. The chunks of a sample are joined
// in the same way. An element's lane follows from its index alone, so how operands lie and who has which chunk changes
// no bit.
#pragma once
#include "reduce.cuh"
#include "vectors.cuh"

namespace pyguide {

constexpr int MOMENT_LANES = int(CHUNK) / LANE_TERMS;
constexpr int FUSED_CHUNKS = 4;  // of a sample, at most, where one block makes the moments and the step (moments.cu)
constexpr int64_t FUSED_ELEMENTS = FUSED_CHUNKS * CHUNK;
constexpr int FUSED_TURNS = 8;             // that the threads of such a block take at most, for a step of staged.cuh
constexpr int64_t FUSED_BYTES = 96 << 10;  // of its shared memory, which every device has for a block that asks

// Terms of a moment that a thread adds up in the state's type before they are a double. The same for all kernels of up
// to 4 vectors: a sample may be one of moments, or of a fused launch, with the same bits.
PG_INLINE constexpr int terms_of(int vectors, int64_t size) { return size == 4 ? 4 : vectors > 4 ? 1 : 2; }
// Elements that a thread has in registers at a time.
PG_INLINE constexpr int vector_length(int vectors, int64_t size) {
  return terms_of(vectors, size) * (vectors > 2 ? 1 : 2);
}
// Moments whose lanes are in shared memory at a time: 32 kB of them at most.
PG_INLINE constexpr int moments_at_once(int vectors, int64_t size) {
  const int most = int((32 << 10) / (MOMENT_LANES * size)), count = moments_count(vectors);
  return count < most ? count : most;
}

namespace {

template <class T, int N>
struct MomentsShared {
  T lanes[moments_at_once(N, sizeof(T)) > LANE_TERMS ? moments_at_once(N, sizeof(T)) : LANE_TERMS][MOMENT_LANES];
  double registers[MAX_REGISTERS];
  double chunks[FUSED_CHUNKS][moments_count(N)];
  Places places;
  Space<T> space;
  uint32_t ticket;
};

struct Total {
  double value;
  template <class THREAD>
  PG_DEVICE void join(const THREAD& thread, int mask) {
    value += thread.exchange(value, mask);
  }
};
// sum of f(i) for i < count, in the order of the numbers 0 .. count alone; one warp, each lane gets it.
template <class THREAD, class F>
PG_DEVICE double sum_by_warp(const THREAD& thread, int64_t count, const F& f) {
  double sum = 0;
  for (int64_t i = thread.index() % WARP; i < count; i += WARP) sum += f(i);
  return over_warp(thread, Total{sum}).value;
}

// A sample that is due: its row, which the step will advance, is past the prologue.
PG_DEVICE bool is_due(const Sample& sample) { return sample.row > 0 && sample.row < sample.end; }

template <class T, class THREAD>
PG_DEVICE Space<T> space_of(const THREAD& thread, const double* parameters) {
  const double factors[OWN] = {1.0, thread.load(parameters + P_X), thread.load(parameters + P_M)};
  return Space<T>(factors);
}

template <class T, int N, class THREAD>
struct MomentsBlock {
  static constexpr int TERMS = terms_of(N, sizeof(T)), W = vector_length(N, sizeof(T)), LENGTH = Pieces<W>::LENGTH,
                       COUNT = Pieces<W>::COUNT;
  static constexpr int AT_ONCE = moments_at_once(N, sizeof(T));

  const THREAD& thread;
  const StepArgs& a;
  const MomentsArgs& m;
  MomentsShared<T, N>& shared;
  const uint32_t b;
  const int count;  // moments

  PG_DEVICE MomentsBlock(const THREAD& thread, const StepArgs& a, const MomentsArgs& m, MomentsShared<T, N>& shared,
                         uint32_t b)
      : thread(thread), a(a), m(m), shared(shared), b(b), count(moments_count(m.program.vectors)) {}

  // The pass-th W of a lane's elements: quads that lie a quad of each lane apart.
  PG_DEVICE Pieces<W> pieces(int64_t chunk, int pass) const {
    const int64_t elements = a.channels * a.inner;
    Pieces<W> at;
    at.step = 1;
    at.bulk = true;
    for (int h = 0; h < COUNT; ++h) {
      const int before = pass * W + h * LENGTH;  // elements of the lane
      const int64_t warp = chunk * CHUNK + before / 4 * 4 * MOMENT_LANES + thread.index() / WARP * 4 * WARP;
      at.first[h] = warp + thread.index() % WARP * 4 + before % 4;
      const int64_t left = elements - at.first[h];
      at.count[h] = left < 0 ? 0 : left < LENGTH ? int(left) : LENGTH;
      at.bulk &= warp + 4 * WARP <= elements || warp >= elements;
    }
    return at;
  }
  // The sums of one chunk to `to`, there after the barrier that this ends with. All of the block.
  PG_DEVICE void add_chunk(int64_t chunk, double* to) const {
    const int vectors = m.program.vectors;
    const Reader<T, THREAD> reader{thread, a, shared.places, &shared.lanes[0][thread.index()], MOMENT_LANES};
    if (thread.index() < count) to[thread.index()] = 0;
    PG_ROLLED
    for (int pass = 0; pass < LANE_TERMS / W; ++pass) {
      Pieces<W> at = pieces(chunk, pass);
      at.bulk &= shared.places.all_bulk(a);
      Pack<T, W> y[N];
      load_vectors<true>(reader, shared.space, vectors, at, y);
      each<W / TERMS>(0, [&](auto part) PG_LAMBDA { add_lanes<decltype(part){} * TERMS>(y, to); });
    }
  }
  // From the lanes' terms from their element FIRST on. All of the block.
  template <int FIRST>
  PG_DEVICE void add_lanes(const Pack<T, W> (&y)[N], double* to) const {
    const int vectors = m.program.vectors, warp = thread.index() / WARP, lane = thread.index() % WARP;
    PG_ROLLED
    for (int first = 0; first < count; first += AT_ONCE) {
      each_moment<TERMS>(y, FIRST, vectors, m.program.sums, [&](int i, const auto& sum) PG_LAMBDA {
        if (i >= first && i < first + AT_ONCE) shared.lanes[i - first][thread.index()] = sum();
      });
      thread.sync();
      const int end = count - first < AT_ONCE ? count - first : AT_ONCE;
      PG_ROLLED
      for (int i = warp; i < end; i += MOMENT_LANES / WARP) {
        if (!m.program.sums && first + i < vectors) continue;
        const T* lanes = shared.lanes[i];
        const double sum = sum_by_warp(thread, MOMENT_LANES, [&](int64_t k) PG_LAMBDA { return double(lanes[k]); });
        if (lane == 0) to[first + i] += sum;
      }
      thread.sync();
    }
  }
  // The moments of the sample, to the program's registers, from those of its chunks: f(chunk, i).
  template <class F>
  PG_DEVICE void join_chunks(int64_t chunks, const F& f) const {
    const int warp = thread.index() / WARP, lane = thread.index() % WARP;
    PG_ROLLED
    for (int i = warp; i < count; i += MOMENT_LANES / WARP) {
      const double sum = sum_by_warp(thread, chunks, [&](int64_t chunk) PG_LAMBDA { return f(chunk, i); });
      if (lane == 0) shared.registers[i] = sum;
    }
  }
  // This block's chunk to memory; whether it was the sample's last one.
  PG_DEVICE bool hand_over(uint32_t chunk, uint32_t chunks) const {
    if (thread.index() < count) {
      thread.store(m.partial + (int64_t(b) * chunks + chunk) * count + thread.index(),
                   shared.chunks[0][thread.index()]);
    }
    thread.sync();
    if (thread.index() == 0) {
      thread.fence();
      shared.ticket = thread.arrive(&a.samples[b].ticket, chunks - 1);
      thread.fence();
    }
    thread.sync();
    return shared.ticket == chunks - 1;
  }
  // After join_chunks: the program and its block.
  PG_DEVICE void finish() const {
    const WeightsProgram& p = m.program;
    const double* parameters = parameters_of(m, b, thread.load(&a.samples[b].row));
    const int i = thread.index();  // of parameters, places and results, which are fewer than threads
    if (i < p.parameters) shared.registers[count + i] = thread.load(parameters + i);
    thread.sync();
    if (m.moments && i < count) thread.store(m.moments + int64_t(b) * count + i, shared.registers[i]);
    if (p.results == 0) return;
    if (thread.index() == 0) run_program(p, shared.registers);
    T* block = weights_of(thread.load(&a.samples[b].weights));
    if (i < width()) thread.store(block + i, T(0));
    thread.sync();
    if (i < p.results) thread.store(block + p.result[i].place, T(shared.registers[p.result[i].from]));
  }
  static_assert(weights_width(MAX_VECTORS, MAX_SLOTS, MAX_VECTORS) <= MOMENT_LANES && MAX_RESULTS <= MOMENT_LANES &&
                MAX_PARAMETERS <= MOMENT_LANES && MAX_MOMENTS <= MOMENT_LANES);
  PG_DEVICE int64_t width() const { return weights_width(a.branches, a.slots, a.guidance_slots); }
  PG_DEVICE T* weights_of(int64_t offset) const { return static_cast<T*>(const_cast<void*>(a.weights)) + offset; }
  PG_DEVICE void copy_plain(const Sample& sample) const {
    const T* from = static_cast<const T*>(a.weights) + plain_block(m, b, sample.row);
    T* to = weights_of(sample.weights);
    const int i = thread.index();
    if (i < width()) thread.store(to + i, thread.load(from + i));
  }

  // Chunks `chunk` .. `chunk` + `mine` of the sample's `chunks`.
  PG_DEVICE void run(uint32_t chunk, uint32_t mine, uint32_t chunks) const {
    {
      const Sample sample = thread.load_sample(a.samples + b);
      if (!is_due(sample)) return;
      const double* parameters = parameters_of(m, b, sample.row);
      if (thread.load(parameters + ACTING) == 0.0) {
        if (chunk == 0) copy_plain(sample);
        return;
      }
      if (thread.index() == 0) shared.space = space_of<T>(thread, parameters);
      shared.places.find(thread, a, b, sample.row);
    }
    thread.sync();
    PG_ROLLED
    for (uint32_t i = 0; i < mine; ++i) add_chunk(chunk + i, shared.chunks[i]);
    if (mine < chunks) {
      if (!hand_over(chunk, chunks)) return;
      const double* partial = m.partial + int64_t(b) * chunks * count;
      join_chunks(chunks, [&](int64_t c, int i) PG_LAMBDA { return thread.load(partial + c * count + i); });
    } else {
      join_chunks(chunks, [&](int64_t c, int i) PG_LAMBDA { return shared.chunks[c][i]; });
    }
    finish();
  }
};

}  // namespace

// A block for each chunk of each sample.
template <class T, int N, class THREAD>
PG_DEVICE void moments_chunk(const THREAD& thread, const StepArgs& a, const MomentsArgs& m,
                             MomentsShared<T, N>& shared) {
  const uint32_t chunks = uint32_t(chunks_of(a.channels * a.inner));
  MomentsBlock<T, N, THREAD>(thread, a, m, shared, thread.block() / chunks).run(thread.block() % chunks, 1, chunks);
}

// A block for each sample: all of its chunks, then its step.
template <int S, bool HALF, int N, class THREAD>
PG_DEVICE void dense_moments_step(const THREAD& thread, const StepArgs& a, const MomentsArgs& m,
                                  MomentsShared<float, N>& shared, DenseControl& c, float* raw) {
  const uint32_t chunks = uint32_t(chunks_of(a.channels * a.inner));
  MomentsBlock<float, N, THREAD>(thread, a, m, shared, thread.block()).run(0, chunks, chunks);
  thread.sync();
  dense_step<S, HALF, MOMENT_LANES>(thread, a, 1, false, c, raw);
}
// `workers` of the block's threads have columns of shared memory.
template <class T, int N, class THREAD>
PG_DEVICE void staged_moments_step(const THREAD& thread, const StepArgs& a, const MomentsArgs& m, const Columns& at,
                                   int workers, char* bytes) {
  const uint32_t chunks = uint32_t(chunks_of(a.channels * a.inner));
  MomentsShared<T, N>& shared = *reinterpret_cast<MomentsShared<T, N>*>(bytes);
  MomentsBlock<T, N, THREAD>(thread, a, m, shared, thread.block()).run(0, chunks, chunks);
  thread.sync();
  staged_step<T, false>(thread, a, at, 1, false, bytes, workers);
}

}  // namespace pyguide
