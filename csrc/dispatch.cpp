// Chooses the instruction set at run time and splits a launch over OpenMP threads: the step by (sample, block range),
// as it is elementwise, moments by (sample, chunk) or (sample, groups), quantiles and the classifier's gradient by
// sample. Neither the number of threads nor the split changes a bit.
#include "cpu.h"

#include <string.h>

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
constexpr int64_t PHILOX_WORK = 4, EXP_WORK = 2, QUANTILE_WORK = 4;

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

// f(first, last) of `units`, on as many threads as asked for, or as `work` (in elements) pays for.
template <class F>
static void split([[maybe_unused]] int64_t asked, int64_t units, [[maybe_unused]] int64_t work, const F& f) {
#ifdef _OPENMP
  int64_t threads = asked > 0 ? asked : omp_get_max_threads();
  if (asked <= 0 && threads > work / ELEMENTS_PER_THREAD) threads = work / ELEMENTS_PER_THREAD;
  if (threads > units) threads = units;
  if (threads > 1) {
#pragma omp parallel num_threads(int(threads))
    {
      const int64_t n = omp_get_num_threads(), t = omp_get_thread_num();
      f(units * t / n, units * (t + 1) / n);
    }
    return;
  }
#endif
  if (units > 0) f(0, units);
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
  split(args.threads, units, units * BLOCK * (philox ? PHILOX_WORK : 1),
        [&](int64_t first, int64_t last) { run_units(kernel, args, active, blocks, first, last, refresh); });
}

// The moments of sample b from those of its chunks, its program, and the weights block that comes of them.
template <class T>
static void weigh(const StepArgs& args, const MomentsArgs& m, int64_t b) {
  const Sample& sample = args.samples[b];
  T* const weights = static_cast<T*>(const_cast<void*>(args.weights));
  const int64_t width = weights_width(args.branches, args.slots, args.guidance_slots);
  const WeightsProgram& p = m.program;
  if (!acts(m, b, sample.row)) {
    memmove(weights + sample.weights, weights + plain_block(m, b, sample.row), size_t(width) * sizeof(T));
    return;
  }
  double registers[MAX_REGISTERS];
  const int count = moments_count(p.vectors);
  const int64_t chunks = chunks_of(args.channels * args.inner);
  const double* partial = m.partial + b * chunks * count;
  for (int i = 0; i < count; ++i) registers[i] = partial[i];
  for (int64_t c = 1; c < chunks; ++c) {
    for (int i = 0; i < count; ++i) registers[i] += partial[c * count + i];
  }
  if (m.moments) memcpy(m.moments + b * count, registers, size_t(count) * sizeof(double));
  if (p.results == 0) return;
  memcpy(registers + count, parameters_of(m, b, sample.row), size_t(p.parameters) * sizeof(double));
  run_program(p, registers);
  write_block(p, registers, weights + sample.weights, width);
}

void execute(const StepArgs& args, const MomentsArgs& m, const int32_t* active, int64_t count, const int32_t* acting,
             int64_t acting_count) {
  const Kernel& kernel = *current_kernel();
  const int64_t N = args.channels * args.inner;
  if (m.reduce > 0) {
    const int64_t groups = m.outer * m.inner, tiles = (groups + GROUP_TILE - 1) / GROUP_TILE;
    split(args.threads, tiles * count, N * count, [&](int64_t first, int64_t last) {
      while (first < last) {
        const int64_t i = first / tiles, tile = first - i * tiles;
        const int64_t stop = tile + (last - first) < tiles ? tile + (last - first) : tiles;
        const int64_t end = stop * GROUP_TILE < groups ? stop * GROUP_TILE : groups;
        if (args.samples[active[i]].row > 0) kernel.guided(args, m, active[i], tile * GROUP_TILE, end);
        first += stop - tile;
      }
    });
    return;
  }
  const int64_t chunks = chunks_of(N);
  split(args.threads, chunks * acting_count, N * acting_count, [&](int64_t first, int64_t last) {
    for (; first < last; ++first) kernel.moments(args, m, acting[first / chunks], first % chunks);
  });
  for (int64_t i = 0; i < count; ++i) {
    if (args.samples[active[i]].row == 0) continue;
    args.state_type == F64 ? weigh<double>(args, m, active[i]) : weigh<float>(args, m, active[i]);
  }
}

void execute(const StepArgs& args, const QuantileArgs& q, const int32_t* active, int64_t count) {
  const Kernel& kernel = *current_kernel();
  split(args.threads, count, args.channels * args.inner * count * QUANTILE_WORK, [&](int64_t first, int64_t last) {
    for (; first < last; ++first) kernel.quantile(args, q, active[first]);
  });
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
  split(args.threads, args.batch, args.batch * args.classes * EXP_WORK,
        [&](int64_t first, int64_t last) { run_samples(kernel, args, first, last); });
}

}  // namespace pyguide
