// The weights of a guidance method on a CUDA device: launches of the kernels of moments.cuh and guided.cuh. See
// csrc/moments.h for the formulas.
//
// moments<T, N>              up to N = 2, 4, 8 vectors, a state of T: a block of 512 threads for each chunk of 4,096
//                            elements of each sample. The last block of a sample to arrive joins its chunks, runs the
//                            program and writes the sample's weights block. It knows by the ticket in Sample, which the
//                            step uses in the same way afterwards. A sample that does not act: one block copies.
// moments_step_dense<S, HALF>, moments_step_staged<T>    moments and step in one launch, a block for each sample, which
//                            does its chunks, the program, and then the step of dense.cuh or staged.cuh.
// guided<T, N>               by groups: blocks of up to 128 threads, each for 32 groups of a sample or more.
//
// One launch or two: one where a sample has at most FUSED_ELEMENTS = 16,384 elements (a latent of 4 x 64 x 64) and 4
// vectors. One multiprocessor moves some 100 GB/s to and from L2 (64 bytes a cycle), so that the 32 bytes an element of
// K = 2 in float32 take a block 5 us at 16,384 elements; two launches over all of a device take 2 to 3 us each and the
// host 4 us or more to enqueue each of them. With more elements two launches win, with fewer one does. (Estimates: the
// limit was not measured.) A step of staged.cuh also has to get by with FUSED_TURNS turns of the threads for which
// FUSED_BYTES have columns. The bits are the same either way.
//
// Bytes per element: each operand once for moments, and a second time, from L2 as a rule, for the step; by groups a
// second time for the guided output. In machine code: as in step.cu, bulk accesses carry the hint to keep out of L1 and
// are 128 bits wide; those of strided and unaligned operands, of float64 and of groups along an inner dimension are of
// one element.
//
// Arithmetic: products and differences in the state's type, sums of 4 terms at most in it, all else in double.
// Registers: at most 64 for moments<T, 2>, two blocks on a multiprocessor; 128 for the others of 512 threads, 96 for
// guided; no spills, no local memory, on compute capabilities 8.0 to 12.0. Shared memory of a block: up to 37 kB,
// moments_step_staged up to 96 KiB, guided up to 72 kB.
#include "moments.cuh"

#include "cuda.cuh"
#include "guided.cuh"

namespace pyguide {

template <class T, int N>
__global__ void __launch_bounds__(MOMENT_LANES, N == 2 ? 2 : 1)
    moments(const __grid_constant__ StepArgs args, const __grid_constant__ MomentsArgs m) {
  __shared__ MomentsShared<T, N> shared;
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
  moments_chunk<T, N>(CudaThread(), args, m, shared);
}

template <int S, bool HALF>
__global__ void __launch_bounds__(MOMENT_LANES, 1)
    moments_step_dense(const __grid_constant__ StepArgs args, const __grid_constant__ MomentsArgs m) {
  __shared__ MomentsShared<float, S == 1 ? 2 : 4> shared;
  __shared__ DenseControl control;
  __shared__ float raw[DenseControl::raw_width];
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
  dense_moments_step<S, HALF>(CudaThread(), args, m, shared, control, raw);
}

template <class T>
__global__ void __launch_bounds__(MOMENT_LANES, 1)
    moments_step_staged(const __grid_constant__ StepArgs args, const __grid_constant__ MomentsArgs m,
                        const __grid_constant__ Columns columns, int workers) {
  extern __shared__ __align__(16) char shared[];
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
  staged_moments_step<T, 4>(CudaThread(), args, m, columns, workers, shared);
}

template <class T, int N>
__global__ void __launch_bounds__(GUIDED_THREADS, 5)
    guided(const __grid_constant__ StepArgs args, const __grid_constant__ MomentsArgs m,
           const __grid_constant__ GuidedGeometry geometry) {
  extern __shared__ __align__(16) char registers[];
  __shared__ GuidedShared<T> shared;
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
  guided_groups<T, N>(CudaThread(), args, m, geometry, shared, registers);
}

namespace {

template <class... X>
const void* address(void (*kernel)(X...)) {
  return reinterpret_cast<const void*>(kernel);
}
template <class T>
const void* moments_kernel(int vectors) {
  return vectors == 2 ? address(moments<T, 2>) : vectors == 4 ? address(moments<T, 4>) : address(moments<T, 8>);
}
template <class T>
const void* guided_kernel(int vectors) {
  return vectors <= 4 ? address(guided<T, 4>) : address(guided<T, 8>);
}
template <bool HALF>
const void* dense_kernel(int slots) {
  return slots == 1   ? address(moments_step_dense<1, HALF>)
         : slots == 2 ? address(moments_step_dense<2, HALF>)
                      : address(moments_step_dense<4, HALF>);
}

}  // namespace

void launch_moments(const StepArgs& on_device, const MomentsArgs& given, void* stream, bool dependent) {
  StepArgs a = on_device;
  MomentsArgs m = given;
  const int vectors = vectors_of(m.program.vectors);
  const bool wide = a.state_type == F64;
  if (m.reduce > 0) {
    GuidedGeometry g(a, m);
    void* arguments[] = {&a, &m, &g};
    const void* kernel = wide ? guided_kernel<double>(vectors) : guided_kernel<float>(vectors);
    if (g.shared > GUIDED_BYTES) {  // with its static shared memory perhaps more than a block has without asking
      PG_CUDA(cudaFuncSetAttribute, kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, int(g.shared));
    }
    launch(kernel, a.batch * g.parts, g.threads, g.shared, stream, dependent, arguments);
    return;
  }
  void* arguments[] = {&a, &m};
  launch(wide ? moments_kernel<double>(vectors) : moments_kernel<float>(vectors),
         a.batch * chunks_of(a.channels * a.inner), MOMENT_LANES, 0, stream, dependent, arguments);
}

void launch_moments_step(const StepArgs& on_device, const MomentsArgs& given, const Geometry& g, const FusedGeometry& f,
                         void* stream, bool dependent) {
  StepArgs a = on_device;
  MomentsArgs m = given;
  Columns columns = g.columns;
  int workers = f.workers;
  void *dense[] = {&a, &m}, *staged[] = {&a, &m, &columns, &workers};
  const void* kernel = g.dense_slots ? g.half ? dense_kernel<true>(g.dense_slots) : dense_kernel<false>(g.dense_slots)
                       : a.state_type == F64 ? address(moments_step_staged<double>)
                                             : address(moments_step_staged<float>);
  launch(kernel, a.batch, MOMENT_LANES, f.shared, stream, dependent, g.dense_slots ? dense : staged);
}

}  // namespace pyguide
