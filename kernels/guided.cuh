// Guidance by groups of a sample's elements (csrc/moments.h, `reduce` > 0): the moments of each group, its program, and
// with its weights the guided output and the method's own slots, in place. See moments.cu for the geometry. THREAD as
// in control.cuh.
//
// A block has some groups of one sample. Teams of lanes go through them: of several neighbours where the elements of a
// group are neighbours too (inner = 1), else of one lane, so that neighbouring lanes have neighbouring elements. Then
// one thread for each group runs the program, with registers side by side in shared memory, and the teams go through
// the elements once more. The order of a group's sums follows from `reduce` and `inner` alone.
#pragma once
#include "moments.cuh"

namespace pyguide {

constexpr int GUIDED_THREADS = 128;
constexpr int GUIDED_BYTES = 32 << 10;  // of shared memory for registers where that leaves a warp of groups

struct GuidedGeometry {
  int team, groups;     // lanes of a team, groups of a block
  int threads;          // of a block
  int64_t parts;        // blocks of a sample
  int registers;        // of a group
  int64_t shared;       // bytes of dynamic shared memory: [registers][groups] doubles
  bool aligned_groups;  // pieces of a group lie as 16-byte accesses of the outputs need them

  GuidedGeometry() = default;
  GuidedGeometry(const StepArgs& a, const MomentsArgs& m) {
    team = 1;
    while (m.inner == 1 && team < WARP && team * LANE_TERMS < m.reduce) team *= 2;
    const WeightsProgram& p = m.program;
    registers = moments_count(p.vectors) + p.parameters + p.operations;
    groups = team < 4 ? GUIDED_THREADS / team : WARP;
    while (groups > WARP && groups * registers * 8 > GUIDED_BYTES) groups /= 2;
    threads = groups * team < GUIDED_THREADS ? groups * team : GUIDED_THREADS;
    parts = (m.outer * m.inner + groups - 1) / groups;
    shared = int64_t(groups) * registers * 8;
    const bool half = a.output_type == F16 || a.output_type == BF16;
    aligned_groups = m.inner == 1 && (half ? team > 1 && m.reduce % 8 == 0 : m.reduce % 4 == 0);
  }
};

namespace {

template <class T>
struct GuidedShared {
  Places places;
  double inverse;  // 1 / inner, of the groups
  T columns[LANE_TERMS][GUIDED_THREADS];
  int16_t from[weights_width(MAX_VECTORS, MAX_SLOTS, MAX_SLOTS)];  // the register of a place of the block, -1: 0
};

template <class T, int N, class THREAD>
struct GuidedBlock {
  static constexpr int W = vector_length(N, sizeof(T)), LENGTH = Pieces<W>::LENGTH, COUNT = Pieces<W>::COUNT;

  const THREAD& thread;
  const StepArgs& a;
  const MomentsArgs& m;
  const GuidedGeometry& g;
  GuidedShared<T>& shared;
  double* const registers;
  const int64_t b, first;  // the sample, the first of the block's groups

  PG_DEVICE GuidedBlock(const THREAD& thread, const StepArgs& a, const MomentsArgs& m, const GuidedGeometry& g,
                        GuidedShared<T>& shared, double* registers)
      : thread(thread),
        a(a),
        m(m),
        g(g),
        shared(shared),
        registers(registers),
        b(thread.block() / uint32_t(g.parts)),
        first(int64_t(thread.block() % uint32_t(g.parts)) * g.groups) {}

  // f(group of the block, pieces) for each W of the elements that the lane has in its team's groups; all lanes of a
  // warp as often as each other. `begin(group)` and `end(group)`: before and after the pieces of a group.
  template <class BEGIN, class F>
  PG_DEVICE void each_piece(bool bulk, const BEGIN& begin, const F& f) const {
    const int team = thread.index() / g.team, lane = thread.index() % g.team, teams = thread.count() / g.team;
    PG_ROLLED
    for (int group = team; group < g.groups; group += teams) {
      const int64_t index = first + group, outer = m.inner == 1 ? index : quotient(index, m.inner, shared.inverse);
      const bool there = index < m.outer * m.inner;
      const int64_t base = outer * m.reduce * m.inner + (index - outer * m.inner);
      begin(group);
      PG_ROLLED
      for (int64_t r = 0; r < m.reduce; r += g.team * LANE_TERMS) {
        PG_ROLLED
        for (int before = 0; before < LANE_TERMS; before += W) {
          Pieces<W> at;
          at.step = m.inner;
          at.bulk = bulk;
          for (int h = 0; h < COUNT; ++h) {
            const int mine = before + h * LENGTH;  // of the lane's elements
            const int64_t element = r + mine / 4 * 4 * g.team + lane * 4 + mine % 4, left = m.reduce - element;
            at.first[h] = base + element * m.inner;
            at.count[h] = !there || left < 0 ? 0 : left < LENGTH ? int(left) : LENGTH;
          }
          if (bulk) {
            bool partly = false;
            for (int h = 0; h < COUNT; ++h) partly |= at.count[h] > 0 && at.count[h] < LENGTH;
            at.bulk = thread.warp_or(partly) == 0;
          }
          f(group, at);
        }
      }
    }
  }
  PG_DEVICE Reader<T, THREAD> reader() const {
    return {thread, a, shared.places, &shared.columns[0][thread.index()], GUIDED_THREADS};
  }
  PG_DEVICE double& reg(int i, int group) const { return registers[i * g.groups + group]; }

  PG_DEVICE void add_groups(const double* parameters, bool bulk) const {
    const WeightsProgram& p = m.program;
    const int vectors = p.vectors, count = moments_count(vectors);
    const bool leads = thread.index() % g.team == 0;
    const double factors[OWN] = {1.0, thread.load(parameters + P_X), thread.load(parameters + P_M)};
    const Space<T> space(factors);
    for (int i = thread.index(); i < p.parameters * g.groups; i += thread.count()) {
      registers[count * g.groups + i] = thread.load(parameters + i / g.groups);
    }
    const auto begin = [&](int group) PG_LAMBDA {
      PG_ROLLED
      for (int i = 0; leads && i < count; ++i) reg(i, group) = 0;
    };
    each_piece(bulk, begin, [&](int group, const Pieces<W>& at) PG_LAMBDA {
      Pack<T, W> y[N];
      load_vectors<false>(reader(), space, vectors, at, y);
      each_moment<W>(y, 0, vectors, p.sums, [&](int i, const auto& sum) PG_LAMBDA {
        const double of_team = over_team(thread, Total{double(sum())}, g.team).value;
        if (leads) reg(i, group) += of_team;
      });
    });
    thread.sync();
    PG_ROLLED
    for (int group = thread.index(); group < g.groups; group += thread.count()) {
      PG_ROLLED
      for (int i = 0; i < p.operations; ++i) {
        const Operation o = p.operation[i];
        reg(count + p.parameters + i, group) =
            operation_result(o.code, reg(o.a, group), reg(o.b, group), reg(o.c, group));
      }
    }
    thread.sync();
  }
  // guided and, of a sample that acts, the slots: weight(place, group) is the block's number at `place`.
  template <class F>
  PG_DEVICE void write(bool bulk, bool acting, const F& weight) const {
    const int K = a.branches, S = a.slots, Sg = acting ? a.guidance_slots : 0;
    T* guided = static_cast<T*>(m.guided) + b * a.channels * a.inner;
    const bool bulk_guided = aligned(guided, 16);
    each_piece(
        bulk, [](int) {},
        [&](int group, const Pieces<W>& at) PG_LAMBDA {
          // sum + sum_i weight(first_place + i) x_i; what no lane of the warp needs is not read
          const auto add = [&](int first_place, int count, const View* views, Pack<T, W> sum) PG_LAMBDA {
            PG_ROLLED
            for (int i = 0; i < count; ++i) {
              const T w = weight(first_place + i, group);
              if (!thread.warp_or(w != T(0))) continue;
              const Pack<T, W> x = reader().load(views[i], at);
              if (w != T(0)) sum = fma(Pack<T, W>::set(w), x, sum);
            }
            return sum;
          };
          const Pack<T, W> zero = Pack<T, W>::set(T(0));
          const Places& p = shared.places;
          store_pieces(thread, guided, at, bulk_guided, add(2 * K, S, p.slot, add(0, K, p.output, zero)));
          PG_ROLLED
          for (int j = 0; j < Sg; ++j) {
            const int r = S - Sg + j, h = 2 * K + S + S * K + j, b_r = 2 * K + S + r * K;
            bool kept = weight(h, group) == T(0) || weight(h, group) == T(1);  // not written, as in the step
            PG_ROLLED
            for (int k = 0; k < K; ++k) kept &= weight(b_r + k, group) == T(0);
            if (!thread.warp_or(!kept)) continue;
            const Pack<T, W> sum = add(b_r, K, p.output, add(h, 1, p.slot + r, zero));
            Pieces<W> to = at;
            for (int piece = 0; piece < COUNT; ++piece) to.count[piece] = kept ? 0 : at.count[piece];
            store_pieces(thread, reinterpret_cast<T*>(p.slot[r].data), to, true, sum);
          }
        });
  }

  PG_DEVICE void run() const {
    const Sample sample = thread.load_sample(a.samples + b);
    if (!is_due(sample)) return;
    const double* parameters = parameters_of(m, b, sample.row);
    const bool acting = thread.load(parameters + ACTING) != 0.0;
    const int width = int(weights_width(a.branches, a.slots, a.guidance_slots));
    shared.places.find(thread, a, b, sample.row);
    if (thread.index() == 0) shared.inverse = 1.0 / double(m.inner);
    for (int i = thread.index(); i < width; i += thread.count()) shared.from[i] = -1;
    thread.sync();
    for (int i = thread.index(); i < m.program.results; i += thread.count()) {
      shared.from[m.program.result[i].place] = int16_t(m.program.result[i].from);
    }
    const bool bulk = g.aligned_groups && shared.places.all_bulk(a);
    if (!acting) {
      thread.sync();
      const T* block = static_cast<const T*>(a.weights) + plain_block(m, b, sample.row);
      write(bulk, false, [&](int place, int) PG_LAMBDA { return thread.load(block + place); });
      return;
    }
    add_groups(parameters, bulk);
    write(bulk, true, [&](int place, int group) PG_LAMBDA {
      const int from = shared.from[place];
      return from < 0 ? T(0) : T(reg(from, group));
    });
  }
};

}  // namespace

// g.parts blocks for each sample, one after another. `bytes`: g.shared of them.
template <class T, int N, class THREAD>
PG_DEVICE void guided_groups(const THREAD& thread, const StepArgs& a, const MomentsArgs& m, const GuidedGeometry& g,
                             GuidedShared<T>& shared, char* bytes) {
  GuidedBlock<T, N, THREAD>(thread, a, m, g, shared, reinterpret_cast<double*>(bytes)).run();
}

}  // namespace pyguide
