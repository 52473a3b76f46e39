// Chooses the instruction set at run time and splits a launch over OpenMP threads: the step by (sample, block range),
// as it is elementwise, the classifier's gradient by sample. Neither the number of threads nor the split changes a bit.
#include "cpu.h"

#ifdef _OPENMP
#include <omp.h>
#endif
#if defined(__x86_64__)
#include <cpuid.h>
#endif

namespace pyguide {
namespace {

// Elements for each thread below which another one does not pay. On two idle Zen 4 cores two threads break even at
// 8,100 elements of a DDIM row (2 us), but at 16,000 they save 1 us at best, and where the cores have other work a
// barrier costs a time slice: 8 ms a row at 16,000 elements with two busy neighbours, against 11 us with one thread.
constexpr int64_t ELEMENTS_PER_THREAD = 32768;
constexpr int64_t PHILOX_WORK = 4, EXP_WORK = 2;

struct Available {
  const Kernel* kernels[3];
  int count = 0;
  Available() {
    kernels[count++] = &kernel_baseline;
#if defined(__x86_64__)
    unsigned a, b, c = 0, d;
    __builtin_cpu_init();
    const bool f16c = __get_cpuid(1, &a, &b, &c, &d) && (c >> 29 & 1);  // older compilers do not know "f16c"
    // __builtin_cpu_supports also asks whether the system saves the wide registers
    const bool avx2 = f16c && __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
#ifdef PG_HAVE_AVX2
    if (avx2) kernels[count++] = &kernel_avx2;
#endif
#ifdef PG_HAVE_AVX512
    if (avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
        __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl"))
      kernels[count++] = &kernel_avx512;
#endif
#endif
  }
};

const Available& available() {
  static const Available found;
  return found;
}

const Kernel* chosen = nullptr;

}  // namespace

int kernel_count() { return available().count; }
const Kernel* kernel_at(int i) { return available().kernels[i]; }
const Kernel* current_kernel() {
  const Kernel* kernel = __atomic_load_n(&chosen, __ATOMIC_RELAXED);
  return kernel ? kernel : available().kernels[available().count - 1];
}
void choose_kernel(const Kernel* kernel) { __atomic_store_n(&chosen, kernel, __ATOMIC_RELAXED); }

bool has_openmp() {
#ifdef _OPENMP
  return true;
#else
  return false;
#endif
}

// Units are (sample, block) pairs in order; a thread takes [first, last) of them.
static void run_units(const Kernel& kernel, const StepArgs& args, const int32_t* active, int64_t blocks, int64_t first,
                      int64_t last, bool refresh) {
  const int64_t N = args.channels * args.inner;
  while (first < last) {
    const int64_t i = first / blocks, block = first - i * blocks;
    const int64_t stop = block + (last - first) < blocks ? block + (last - first) : blocks;
    const int64_t end = stop * BLOCK < N ? stop * BLOCK : N;
    const int32_t b = active[i];
    if (kernel.step(args, b, block * BLOCK, end, refresh)) {
      __atomic_fetch_or(&args.samples[b].flags, NONFINITE, __ATOMIC_RELAXED);
    }
    first += stop - block;
  }
}

void execute(const StepArgs& args, const int32_t* active, int64_t count, bool refresh, bool philox) {
  const Kernel& kernel = *current_kernel();
  const int64_t blocks = (args.channels * args.inner + BLOCK - 1) / BLOCK, units = blocks * count;
  if (units == 0) return;
#ifdef _OPENMP
  int64_t threads = args.threads > 0 ? args.threads : omp_get_max_threads();
  if (args.threads <= 0) {
    const int64_t paying = units * BLOCK * (philox ? PHILOX_WORK : 1) / ELEMENTS_PER_THREAD;
    if (threads > paying) threads = paying;
  }
  if (threads > units) threads = units;
  if (threads > 1) {
#pragma omp parallel num_threads(int(threads))
    {
      const int64_t n = omp_get_num_threads(), t = omp_get_thread_num();
      run_units(kernel, args, active, blocks, units * t / n, units * (t + 1) / n, refresh);
    }
    return;
  }
#endif
  run_units(kernel, args, active, blocks, 0, units, refresh);
}

static void run_samples(const Kernel& kernel, const ClassifierGradArgs& args, int64_t first, int64_t last) {
  for (int64_t b = first; b < last; ++b) {
    if (kernel.classifier_grad(args, b)) {
      __atomic_fetch_or(&args.samples[args.first + b].flags, NONFINITE_LOGITS, __ATOMIC_RELAXED);
    }
  }
}

void execute(const ClassifierGradArgs& args) {
  const Kernel& kernel = *current_kernel();
#ifdef _OPENMP
  int64_t threads = args.threads > 0 ? args.threads : omp_get_max_threads();
  if (args.threads <= 0) {
    const int64_t paying = args.batch * args.classes * EXP_WORK / ELEMENTS_PER_THREAD;
    if (threads > paying) threads = paying;
  }
  if (threads > args.batch) threads = args.batch;
  if (threads > 1) {
#pragma omp parallel num_threads(int(threads))
    {
      const int64_t n = omp_get_num_threads(), t = omp_get_thread_num();
      run_samples(kernel, args, args.batch * t / n, args.batch * (t + 1) / n);
    }
    return;
  }
#endif
  run_samples(kernel, args, 0, args.batch);
}

}  // namespace pyguide
