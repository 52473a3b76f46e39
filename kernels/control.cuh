// What the threads of a block share: the program of their sample's row and where its operands lie. THREAD is a thread
// of a block: of CUDA (step.cu) or simulated on the host (tests/simulated), with
//
//   index(), count(), block()                of the thread, of threads in its block, of the block
//   sync()                                   barrier of the block
//   warp_sync(), warp_or(uint64_t)           of the warp
//   exchange(x, mask)                        the value of lane ^ mask, a power of two; all of the warp
//   neighbour(uint32_t)                      the value of lane ^ 1; all of the warp
//   load(p), load_sample(p), store(p, x)     one value, an ordinary access to global memory
//   load16(p), store16(p, w), store8(p, w)   bulk: 16 (8) aligned bytes, without a place in L1
//   copy16(to, from), copy8, copy4, wait()   from global to shared memory, there after wait(); copy16 is bulk
//   arrive(p, last)                          atomic: old value of *p, which goes up by 1, or from `last` to 0
//   fence()                                  between what the thread (and its block before a barrier) wrote and arrive
//   set_bits(p, mask)                        atomic
//   add(p, x)                                atomic on shared memory: old value of *p, which goes up by x
#pragma once
#include <math.h>

#include "../csrc/view.h"
#include "pack.h"

#ifdef __CUDACC__
#define PG_DEVICE __device__ __forceinline__
#else
#define PG_DEVICE inline
#endif

namespace pyguide {

constexpr int WARP = 32;
constexpr int DENSE_SLOTS = 4, DENSE_BRANCHES = 2;  // that the kernels of dense.cuh hold in registers

namespace {

// Operands of a sample that no branch and no slot has.
enum Extra { NOISE, GRADIENT, VARIANCE, DENOISED, EXTRAS };

// Where an operand that is known to be dense lies: instead of a View.
struct Address {
  char* data;
  Address() = default;
  PG_INLINE Address(const Operand& o, Type type, int64_t index, const StepArgs&)
      : data(static_cast<char*>(o.data) + index * o.batch_stride * size_of(type)) {}
};
// In shared memory. P: View or Address; K and S: the most branches and slots.
template <class T, class P, int K = MAX_BRANCHES, int S = MAX_SLOTS>
struct Control {
  Program<T> program;
  P at[EXTRAS + 2 * K + S];  // extras, outputs, slots, inputs; no data: absent
  uint64_t seed;
  uint32_t ordinal;
  bool active;
  bool unfinite;  // a written s'_0 is
  // a row, a guidance block and a bound as read
  static constexpr int raw_width = int(row_width(S) + weights_width(K, S, S) + 1);

  static constexpr int SLOTS = EXTRAS + K, INPUTS = SLOTS + S;
  PG_DEVICE const P& extra(Extra which) const { return at[which]; }
  PG_DEVICE const P& output(int k) const { return at[EXTRAS + k]; }
  PG_DEVICE const P& slot(int i) const { return at[SLOTS + i]; }
  PG_DEVICE const P& input(int k) const { return at[INPUTS + k]; }
};

template <class THREAD>
struct WarpTeam {
  static constexpr int lanes = WARP;
  const THREAD& thread;
  int lane;
  PG_DEVICE uint64_t all_or(uint64_t mask) const { return thread.warp_or(mask); }
};

template <class T, class THREAD>
PG_DEVICE void write_time(const THREAD& thread, const StepArgs& a, void* time, int64_t index, T timestep) {
  if (a.time_type == F32) thread.store(static_cast<float*>(time) + index, float(timestep));
  if (a.time_type == F64) thread.store(static_cast<double*>(time) + index, double(timestep));
  if (a.time_type == I64) thread.store(static_cast<int64_t*>(time) + index, int64_t(llround(double(timestep))));
}

// The part of a launch that a block has: elements of sample b, part `index` of `count`.
struct Part {
  int64_t b;
  uint32_t index, count;
  bool refresh;
};

template <class T, class THREAD>
PG_DEVICE void copy_number(const THREAD& thread, T* to, const T* from) {
  if constexpr (sizeof(T) == 8) {
    thread.copy8(to, from);
  } else {
    thread.copy4(to, from);
  }
}

// A warp's part of the preparation: the program of the sample's row. `raw` takes Control::raw_width numbers.
template <class T, class THREAD>
PG_DEVICE void write_program(const THREAD& thread, Program<T>& program, T* raw, const StepArgs& a, const Part& part,
                             const Sample& sample, int lane) {
  const int64_t row = launch_row(sample, part.refresh);
  const T *head = table_row<T>(a, sample, row), *block = weights_block<T>(a, sample, row, part.refresh);
  const int width = int(row_width(sample.slots));
  const int both = width + (block ? int(weights_width(a.branches, a.slots, a.guidance_slots)) : 0);
  PG_ROLLED
  for (int i = lane; i < both; i += WARP) copy_number(thread, raw + i, i < width ? head + i : block + (i - width));
  if (lane == 0 && a.bound) copy_number(thread, raw + both, static_cast<const T*>(a.bound) + part.b);
  thread.wait();
  thread.warp_sync();
  build(WarpTeam<THREAD>{thread, lane}, program, a, sample, raw, block ? raw + width : nullptr,
        a.bound ? raw + both : nullptr, part.refresh);
}

// Another warp's, at the same time: where the operands of the sample lie, whether or not the row touches them, and
// timesteps.
template <class T, class P, int K, int S, class THREAD>
PG_DEVICE void write_places(const THREAD& thread, Control<T, P, K, S>& c, const StepArgs& a, const Part& part,
                            const Sample& sample, int lane) {
  const int64_t row = launch_row(sample, part.refresh), N = a.channels * a.inner;
  PG_ROLLED
  for (int i = lane; i < c.INPUTS + K; i += WARP) {
    const int k = i - EXTRAS, slot = i - c.SLOTS, input = i - c.INPUTS;
    const bool is_output = k >= 0 && k < a.branches, is_slot = slot >= 0 && slot < a.slots;
    const bool is_input = input >= 0 && input < a.branches, routed = is_output || is_input || i == VARIANCE;
    const int32_t* routes = is_input ? a.target : a.source;
    int64_t index = is_slot ? slot * a.batch + part.b : part.b;
    if (routed) {
      index = -1;
      const int branch = is_output ? k : is_input ? input : a.variance_branch;
      if (routes) index = thread.load(route(a, routes, part.b, row) + branch);
    }
    Operand operand{is_slot ? a.state : nullptr, N, a.inner, 1};
    if (is_output) operand = a.output[k];
    if (is_input) operand = a.input[input];
    if (i == NOISE) operand = a.noise;
    if (i == GRADIENT) operand = a.gradient;
    if (i == VARIANCE) operand = a.variance;
    if (i == DENOISED) operand = a.denoised;
    const Type type = is_input ? a.input_type : routed ? a.output_type : a.state_type;
    P place(operand, type, index, a);
    if (!operand.data || index < 0) place.data = nullptr;
    c.at[i] = place;
    const bool due = part.refresh || sample.row + 1 < sample.end;
    if (is_input && due && index >= 0 && part.index == 0 && a.time[input]) {
      write_time(thread, a, a.time[input], index, thread.load(table_row<T>(a, sample, row) + TIMESTEP));
    }
  }
}

// Prepares a block by its first two warps (or one, if it has no more): false if its sample is idle.
template <class T, class P, int K, int S, class THREAD>
PG_DEVICE bool setup(const THREAD& thread, Control<T, P, K, S>& c, T* raw, const StepArgs& a, const Part& part) {
  const int warp = thread.index() / WARP, lane = thread.index() % WARP;
  if (warp < 2) {
    const Sample sample = thread.load_sample(a.samples + part.b);
    const bool active = sample.row >= (part.refresh ? 1 : 0) && sample.row < sample.end;
    if (warp == 0 && lane == 0) {
      c.seed = sample.seed;
      c.ordinal = uint32_t(sample.row);
      c.active = active;
      c.unfinite = false;
    }
    if (active && warp == (thread.count() > WARP ? 1 : 0)) write_places(thread, c, a, part, sample, lane);
    if (active && warp == 0) write_program(thread, c.program, raw, a, part, sample, lane);
  }
  thread.sync();
  return c.active;
}

// The row of a sample advances while its elements are worked on: each block takes a ticket once the row that it read
// has led to addresses (step_staged: at its end, for want of a register), and the last one stores row + 1. No fence is
// needed: rows and tickets are all that blocks of one launch tell each other, a value that was used is not read again,
// and the next launch begins after the end of this one (with programmatic dependent launch: its accesses do).
template <class THREAD>
PG_DEVICE uint32_t take_ticket(const THREAD& thread, const StepArgs& a, const Part& part) {
  if (part.refresh || thread.index() != 0) return part.count;
  return thread.arrive(&a.samples[part.b].ticket, part.count - 1);
}
template <class THREAD>
PG_DEVICE void advance_row(const THREAD& thread, const StepArgs& a, const Part& part, uint32_t ordinal) {
  thread.store(&a.samples[part.b].row, int32_t(ordinal + 1));
}

// At a block's end, once for all of it: where all of a sample is not finite, an atomic on one word for each element
// would take longer than the step. In shared memory until then: step_dense<4> has no register left.
template <class C, class THREAD>
PG_DEVICE void report_unfinite(const THREAD& thread, const C& c, const StepArgs& a, const Part& part) {
  if (!a.check) return;
  thread.sync();
  if (thread.index() == 0 && c.unfinite) thread.set_bits(&a.samples[part.b].flags, NONFINITE);
}

PG_INLINE bool aligned(const void* p, int64_t bytes) { return (reinterpret_cast<uintptr_t>(p) & (bytes - 1)) == 0; }

}  // namespace
}  // namespace pyguide
