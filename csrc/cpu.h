// The CPU kernels behind one table of function pointers per instruction set, and the thread split over them.
#pragma once
#include "classifier_grad.h"
#include "step.h"

namespace pyguide {

// Elements: the unit of the thread split and of the L1 scratch; a multiple of 4 (Philox).
constexpr int64_t BLOCK = 512;

struct Kernel {
  const char* name;
  // Elements [begin, end) of sample b, begin a multiple of BLOCK. With args.check: true if a written s'_0 is
  // not finite.
  bool (*step)(const StepArgs& args, int64_t b, int64_t begin, int64_t end, bool refresh);
  // Standard normals of elements [first, first + count) to `to` of type F32, F16, BF16 or F64.
  void (*normals)(void* to, Type type, int64_t first, int64_t count, uint64_t seed, uint32_t ordinal, uint32_t tag);
  // Sample b of the batch. With args.check: true if one of its logits is NaN or +inf.
  bool (*classifier_grad)(const ClassifierGradArgs& args, int64_t b);
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
// The classifier's gradient of all samples, over threads by sample.
void execute(const ClassifierGradArgs& args);

}  // namespace pyguide
