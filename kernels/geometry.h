// Which kernel a launch takes and how many blocks, chosen on the host from sizes, types and addresses alone: rows live
// on the device. Shared with tests/simulated.
#pragma once
#include <algorithm>

#include "dense.cuh"
#include "guided.cuh"
#include "launch.h"
#include "moments.cuh"
#include "staged.cuh"

namespace pyguide {

struct Processors {  // of a device: its multiprocessors
  int count;
  int64_t shared, reserved;  // bytes of shared memory of each, and what every block takes of them besides its own
};

struct Geometry {
  int dense_slots = 0;  // S of the kernel of dense.cuh, 0: that of staged.cuh
  bool half = false;    // its model operands are of a 16-bit type
  int threads;          // of a block
  uint32_t parts;       // blocks of a sample
  int64_t shared = 0;   // bytes of dynamic shared memory
  Columns columns;      // of staged.cuh
};

// Of a launch that makes a sample's moments and its step in one block of MOMENT_LANES threads.
struct FusedGeometry {
  bool fits = false;
  int vectors;         // N of the kernel
  int workers = 0;     // threads that have columns, of staged.cuh
  int64_t shared = 0;  // bytes of dynamic shared memory
};

namespace {

// The arguments as the device sees them.
inline StepArgs on_device(StepArgs a, const Placement& placement) {
  a.samples = placement.samples;
  a.tables = placement.tables;
  a.weights = placement.weights;
  a.bound = placement.bound;
  a.source = placement.source;
  a.target = placement.target;
  return a;
}

// Every sample of the operand begins at a multiple of 16 bytes and is contiguous.
inline bool dense_operand(const StepArgs& a, const Operand& o, Type type) {
  if (!o.data) return true;
  return View(o, type, 0, a).contiguous() && aligned(o.data, 16) && o.batch_stride * size_of(type) % 16 == 0;
}
inline bool dense_launch(const StepArgs& a) {
  const bool half = a.output_type == F16 || a.output_type == BF16;
  if (a.state_type != F32 || a.output_type != a.input_type || a.output_type == F64) return false;
  if (a.branches > DENSE_BRANCHES || a.slots > DENSE_SLOTS) return false;
  if (a.channels * a.inner % (half ? 8 : 4) || !aligned(a.state, 16)) return false;
  for (int k = 0; k < a.branches; ++k) {
    if (!dense_operand(a, a.output[k], a.output_type) || !dense_operand(a, a.input[k], a.input_type)) return false;
  }
  return dense_operand(a, a.gradient, F32) && dense_operand(a, a.noise, F32) && dense_operand(a, a.denoised, F32) &&
         dense_operand(a, a.variance, a.output_type);
}

// Blocks of each sample, where the device holds `resident` blocks at a time. A block that works on many tiles pays once
// for its program, so there are as many as fit at once and none that would wait to run alone; where samples are so many
// that rounding down would leave blocks idle, several short waves, of which the last one hardly counts.
inline uint32_t parts_of(int64_t batch, int64_t elements, int64_t tile, int64_t resident) {
  const int64_t tiles = (elements + tile - 1) / tile, most = INT32_MAX / batch;
  const int64_t fair = batch * 8 <= resident ? resident / batch : (8 * resident + batch - 1) / batch;
  const int64_t parts = tiles < fair ? tiles : fair;
  return uint32_t(parts < 1 ? 1 : parts < most ? parts : most);
}

inline Geometry geometry_of(const StepArgs& a, const Processors& processors) {
  Geometry g;
  const int64_t N = a.channels * a.inner;
  if (dense_launch(a)) {
    g.dense_slots = a.slots == 3 ? 4 : a.slots;
    g.half = a.output_type != F32;
    g.threads = DENSE_THREADS;
    g.parts = parts_of(a.batch, N, DENSE_TILE, int64_t(processors.count) * dense_blocks(g.dense_slots));
    return g;
  }
  g.columns = Columns(a);
  const bool wide = a.state_type == F64;
  const int64_t control = wide ? control_bytes<double>() : control_bytes<float>();
  const int64_t raw = StagedControl<float>::raw_width * (wide ? 8 : 4), chunks = g.columns.count;
  g.threads = STAGED_THREADS;
  while (g.threads > WARP && control + chunks * CHUNK_BYTES * g.threads > STAGED_BYTES) g.threads /= 2;
  const int64_t columns = chunks * CHUNK_BYTES * g.threads;
  g.shared = control + (raw > columns ? raw : columns);
  const int64_t tile = g.threads * unit_length(a.state_type);
  const int64_t fit = processors.shared / (g.shared + processors.reserved);
  const int64_t each = fit < 1 ? 1 : fit < STAGED_BLOCKS ? fit : STAGED_BLOCKS;
  g.parts = parts_of(a.batch, N, tile, processors.count * each);
  return g;
}

// Vectors of the kernels of moments.cuh and guided.cuh that take so many.
inline int vectors_of(int vectors) { return vectors <= 2 ? 2 : vectors <= 4 ? 4 : 8; }

// `g`: that of the step alone. See moments.cu for the reasons.
inline FusedGeometry fused_of(const StepArgs& a, const MomentsArgs& m, const Geometry& g) {
  FusedGeometry f;
  const int64_t N = a.channels * a.inner;
  f.vectors = g.dense_slots == 1 ? 2 : 4;
  if (m.reduce > 0 || m.program.vectors > f.vectors || N > FUSED_ELEMENTS) return f;
  if (g.dense_slots) {
    f.fits = true;
    return f;
  }
  const bool wide = a.state_type == F64;
  const int64_t control = wide ? control_bytes<double>() : control_bytes<float>();
  const int64_t first = wide ? sizeof(MomentsShared<double, 4>) : sizeof(MomentsShared<float, 4>);
  const auto columns = [&] { return control + int64_t(g.columns.count) * CHUNK_BYTES * f.workers; };
  f.workers = MOMENT_LANES;
  while (f.workers > WARP && columns() > FUSED_BYTES) f.workers /= 2;
  f.shared = std::max({columns(), first, control + StagedControl<float>::raw_width * (wide ? 8 : 4)});
  f.fits = f.shared <= FUSED_BYTES && N <= FUSED_TURNS * f.workers * unit_length(a.state_type);
  return f;
}

inline int64_t normals_blocks(int64_t count, const Processors& processors) {
  return parts_of(1, count + 3, STAGED_THREADS * 4, int64_t(processors.count) * STAGED_BLOCKS);
}

}  // namespace
}  // namespace pyguide
