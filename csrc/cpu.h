// The CPU kernels behind one table of function pointers per instruction set, and the thread split over them.
#pragma once
#include "classifier_grad.h"
#include "moments.h"
#include "quantile.h"

namespace pyguide {

// Elements: the unit of the thread split and of the L1 scratch; a multiple of 4 (Philox).
constexpr int64_t BLOCK = 512;
// Groups: the unit of the thread split over them.
constexpr int64_t GROUP_TILE = 32;

struct Kernel {
  const char* name;
  // Elements [begin, end) of sample b, begin a multiple of BLOCK. With args.check: true if a written s'_0 is
  // not finite.
  bool (*step)(const StepArgs& args, int64_t b, int64_t begin, int64_t end, bool refresh);
  // Standard normals of elements [first, first + count) to `to` of type F32, F16, BF16 or F64.
  void (*normals)(void* to, Type type, int64_t first, int64_t count, uint64_t seed, uint32_t ordinal, uint32_t tag);
  // Sample b of the batch. With args.check: true if one of its logits is NaN or +inf.
  bool (*classifier_grad)(const ClassifierGradArgs& args, int64_t b);
  // The moments of a chunk of sample b, which acts, to its place in m.partial.
  void (*moments)(const StepArgs& args, const MomentsArgs& m, int64_t b, int64_t chunk);
  // Groups [first, last) of sample b: their part of m.guided, and of the method's own slots.
  void (*guided)(const StepArgs& args, const MomentsArgs& m, int64_t b, int64_t first, int64_t last);
  // Sample b's bound.
  void (*quantile)(const StepArgs& args, const QuantileArgs& q, int64_t b);
};

extern const Kernel kernel_baseline, kernel_avx2, kernel_avx512;

int kernel_count();              // instruction sets that this build has and this machine (with its system) runs
const Kernel* kernel_at(int i);  // slowest first
const Kernel* current_kernel();  // the fastest, unless one was chosen
void choose_kernel(const Kernel* kernel);
bool has_openmp();

// The step (or only the model inputs, with `refresh`) of the `count` samples listed in `active`, over threads;
// `philox` says that some of them draw normals.
void execute(const StepArgs& args, const int32_t* active, int64_t count, bool refresh, bool philox);
// What is due before the step of these samples: moments, programs and weights blocks, or the guided output by groups.
// `acting` lists those of `active` that act.
void execute(const StepArgs& args, const MomentsArgs& m, const int32_t* active, int64_t count, const int32_t* acting,
             int64_t acting_count);
// The bounds of these samples.
void execute(const StepArgs& args, const QuantileArgs& q, const int32_t* active, int64_t count);
// The classifier's gradient of all samples, over threads by sample.
void execute(const ClassifierGradArgs& args);

}  // namespace pyguide
