// The step on a CUDA device: launches of the kernels of dense.cuh and staged.cuh, and their errors. See csrc/step.h for
// the formula: one launch runs, for every sample, the row that the sample stands at.
//
// step_dense<S, HALF>  K <= 2 branches, up to S = 1, 2, 4 slots, a float32 state, model operands of float32 or (HALF)
// of
//                      one 16-bit type, everything dense and aligned to 16 bytes: operands stay in registers.
// step_staged<T>       all the rest, for a state of T: operands pass through shared memory.
// normals<T>           initial noise.
//
// Where weights or bounds come of the operands themselves, the kernels of moments.cu and quantile.cu run before, or
// with small samples one of moments.cu in the place of the step's.
//
// Which one is decided from sizes, types and addresses (geometry.h); rows, coefficients, seeds and routes are read on
// the device, so that a captured launch serves every row.
//
// Bytes per element: what the row reads and writes, once each (DDIM, K = 2: 24 in float32, 16 with a 16-bit model).
// Launch: blocks of 128 threads (step_staged: fewer where columns are many), `parts` of them for each sample, as many
// as the device holds at once or several times that; a block works on every parts-th tile of its sample. One warp
// writes the row's program to shared memory while another finds the operands; a block of an idle sample ends there. The
// ticket that a block then takes advances the row (control.cuh). With programmatic dependent launch a kernel starts
// while the one before it ends, and waits for that end before its first access to memory; it does not let its own
// successor start early, for a model's kernels do not wait. Accumulation: the state's type, every operation rounded
// once (-fmad=false and explicit fma): a float32 result has the bits of the CPU kernel. Registers: at most 64
// (step_dense<1>: 56, nine blocks on a multiprocessor; the others eight), no spills, no local memory, on compute
// capabilities 8.0 to 12.0. Shared memory of a block: 3 kB, step_staged up to 53,840 B, for more than 48 KiB of which
// the launch has to ask (cudaFuncSetAttribute).
//
// In machine code: bulk accesses carry the hint to keep out of L1 (LDG.E.NA.128, STG.E.NA.128), all of them 128 bits
// wide in step_dense; what has no hint (LDG.E, LDG.E.64, STG.E, LDGSTS.E, atomics) reads or writes a sample, its row,
// weights, bound, routes and timesteps, once a block. step_staged also copies 128 bits at a time (LDGSTS.E.BYPASS.128);
// its narrow accesses are those of strided and unaligned operands and of 2 to 8 bytes of float64 states.
#include <algorithm>
#include <atomic>
#include <memory>

#include "cuda.cuh"

#ifndef PG_CUDA_ARCHS
#define PG_CUDA_ARCHS ""  // compute capabilities with machine code, as "80;90"
#endif
#ifndef PG_CUDA_PTX
#define PG_CUDA_PTX 1000  // that of the PTX, from which the driver makes code for later ones
#endif

namespace pyguide {

template <int S, bool HALF>
__global__ void __launch_bounds__(DENSE_THREADS, dense_blocks(S))
    step_dense(const __grid_constant__ StepArgs args, uint32_t parts, bool refresh) {
  __shared__ DenseControl control;
  __shared__ float raw[DenseControl::raw_width];
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
  dense_step<S, HALF>(CudaThread(), args, parts, refresh, control, raw);
}

template <class T>
__global__ void __launch_bounds__(STAGED_THREADS, STAGED_BLOCKS)
    step_staged(const __grid_constant__ StepArgs args, const __grid_constant__ Columns columns, uint32_t parts,
                bool refresh) {
  extern __shared__ __align__(16) char shared[];
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
  staged_step<T>(CudaThread(), args, columns, parts, refresh, shared, int(blockDim.x));
}

template <class T>
__global__ void __launch_bounds__(STAGED_THREADS, STAGED_BLOCKS)
    normals(void* to, Type type, int64_t first, int64_t count, uint64_t seed, uint32_t ordinal, uint32_t tag) {
  normals_pairs<T>(CudaThread(), to, type, first, count, seed, ordinal, tag, int64_t(gridDim.x) * blockDim.x);
}
namespace {

int attribute(cudaDeviceAttr which, int device) {
  int value = 0;
  PG_CUDA(cudaDeviceGetAttribute, &value, which, device);
  return value;
}
int capability_of(int device) {
  return attribute(cudaDevAttrComputeCapabilityMajor, device) * 10 +
         attribute(cudaDevAttrComputeCapabilityMinor, device);
}

Processors processors_of(int device) {
  static std::atomic<const Processors*> known[64];  // each kept for ever
  const bool cached = device >= 0 && device < 64;
  const Processors* found = cached ? known[device].load(std::memory_order_acquire) : nullptr;
  if (found) return *found;
  const Processors asked{attribute(cudaDevAttrMultiProcessorCount, device),
                         attribute(cudaDevAttrMaxSharedMemoryPerMultiprocessor, device),
                         attribute(cudaDevAttrReservedSharedMemoryPerBlock, device)};
  if (cached) {
    auto mine = std::make_unique<const Processors>(asked);
    if (known[device].compare_exchange_strong(found, mine.get(), std::memory_order_acq_rel)) mine.release();
  }
  return asked;
}

// Whether the code that runs on the current `device` waits for the launch before it: __CUDA_ARCH__ was 900 or more when
// its PTX was made. On a newer device than the build was made for, that is not the device's own number. All kernels of
// a build have code for the same architectures.
bool waits(const void* kernel, int device) {
  static std::atomic<int> known[64];  // ptxVersion
  const bool cached = device >= 0 && device < 64;
  int version = cached ? known[device].load(std::memory_order_relaxed) : 0;
  if (!version) {
    cudaFuncAttributes attributes;
    PG_CUDA(cudaFuncGetAttributes, &attributes, kernel);
    version = attributes.ptxVersion;
    if (cached) known[device].store(version, std::memory_order_relaxed);
  }
  return version >= 90;
}

const void* kernel_of(const StepArgs& a, const Geometry& g) {
  const auto address = [](auto* kernel) { return reinterpret_cast<const void*>(kernel); };
  if (g.dense_slots == 1) return address(g.half ? step_dense<1, true> : step_dense<1, false>);
  if (g.dense_slots == 2) return address(g.half ? step_dense<2, true> : step_dense<2, false>);
  if (g.dense_slots == 4) return address(g.half ? step_dense<4, true> : step_dense<4, false>);
  return address(a.state_type == F64 ? step_staged<double> : step_staged<float>);
}

// Whether machine code or PTX of this build runs on a device: code does on the same major number from its minor one on.
bool runs_on(int capability) {
  for (const std::string& arch : cuda_archs()) {
    const int built = std::stoi(arch);
    if (built / 10 == capability / 10 && built <= capability) return true;
  }
  return capability >= PG_CUDA_PTX;
}

}  // namespace

void cuda_step(const StepArgs& args, const Placement& placement, bool refresh, const MomentsArgs* moments,
               const QuantileArgs* quantile, bool step) {
  if (args.batch == 0) return;
  const Guard guard(placement.device);
  const Processors processors = processors_of(placement.device);
  StepArgs a = on_device(args, placement);
  Geometry g = geometry_of(a, processors);
  const void* kernel = kernel_of(a, g);
  const bool dependent = placement.dependent_launch && waits(kernel, placement.device);
  if (moments && !refresh) {
    const FusedGeometry f = fused_of(a, *moments, g);
    if (f.fits && step && !quantile) return launch_moments_step(a, *moments, g, f, placement.stream, dependent);
    launch_moments(a, *moments, placement.stream, dependent);
    if (moments->reduce > 0) {
      a = step_of_guided(a, *moments);
      g = geometry_of(a, processors);
      kernel = kernel_of(a, g);
    }
  }
  if (!step) return;
  if (quantile && !refresh) {
    launch_quantile(a, *quantile, placement.stream, dependent);
    a.bound = quantile->bound;
  }
  void *dense[] = {&a, &g.parts, &refresh}, *staged[] = {&a, &g.columns, &g.parts, &refresh};
  launch(kernel, a.batch * g.parts, g.threads, g.shared, placement.stream, dependent, g.dense_slots ? dense : staged);
}

void cuda_normals(int device, void* stream, void* to, Type type, int64_t first, int64_t count, uint64_t seed,
                  uint32_t ordinal, uint32_t tag) {
  if (count == 0) return;
  const Guard guard(device);
  const int64_t blocks = normals_blocks(count, processors_of(device));
  void* arguments[] = {&to, &type, &first, &count, &seed, &ordinal, &tag};
  launch(reinterpret_cast<const void*>(type == F64 ? &normals<double> : &normals<float>), blocks, STAGED_THREADS, 0,
         stream, false, arguments);
}

std::string cuda_reason() {
  int count = 0;
  try {
    PG_CUDA(cudaGetDeviceCount, &count);
    std::string found;
    for (int i = 0; i < count; ++i) {
      const int capability = capability_of(i);
      if (runs_on(capability)) return "";
      found += (i ? ", " : "") + std::to_string(capability / 10) + "." + std::to_string(capability % 10);
    }
    if (count == 0) return "cudaGetDeviceCount: no device";
    return "no code in this build for compute capability " + found +
           ": it was built for PYGUIDE_CUDA_ARCHS=" + PG_CUDA_ARCHS;
  } catch (const std::exception& error) {
    return error.what();
  }
}

std::string cuda_build() {
  return "nvcc " + std::to_string(__CUDACC_VER_MAJOR__) + "." + std::to_string(__CUDACC_VER_MINOR__) + "." +
         std::to_string(__CUDACC_VER_BUILD__);
}

std::vector<std::string> cuda_archs() {
  std::vector<std::string> archs;
  std::string list = PG_CUDA_ARCHS;
  for (size_t start = 0, end; start < list.size(); start = end + 1) {
    end = std::min(list.find(';', start), list.size());
    archs.push_back(list.substr(start, end - start));
  }
  return archs;
}

}  // namespace pyguide
