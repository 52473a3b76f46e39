// The classifier's gradient on a CUDA device: one launch of the kernel of classifier_grad.cuh. See
// csrc/classifier_grad.h for the formula.
//
// Launch: a block for each sample, of 32 to 1,024 threads: one for every 16 bytes of its logits (8 of float64 ones), as
// far as that goes. Rows and scales are read on the device, so that a captured launch serves every row.
//
// Bytes of a sample: logits and gradient once each up to 4,096 classes of float32 (8,192 of 16 bits, 1,024 of float64),
// which stay in registers; beyond, what a thread has besides its first 16 bytes three times, twice of them from L2
// (21,841 classes of float32: 87 kB). A distribution twice. Accesses to logits and gradient are 16 bytes wide where a
// sample's row of them is contiguous and aligned to 16 bytes, else one element each.
//
// Arithmetic: float (double for F64 logits), every operation rounded once (-fmad=false and explicit fma). Sums: a
// thread's classes in order, then lanes, then warps, by pairs; compensated. Registers: at most 64, no spills, no local
// memory, on compute capabilities 8.0 to 12.0. Shared memory of a block: 1,152 B (2,304 B for F64 logits). Two
// barriers, a third where there are labels. In machine code: as in step.cu, accesses of 128 bits to logits and gradient
// carry the hint to keep out of L1.
#include "classifier_grad.cuh"

#include "cuda.cuh"
#include "launch.h"

namespace pyguide {

template <Type TYPE>
__global__ void __launch_bounds__(CLASS_THREADS, 1) classifier_grad(const __grid_constant__ ClassifierGradArgs args) {
  __shared__ ClassShared<Real<TYPE>> shared;
  classifier_grad_sample<TYPE>(CudaThread(), args, shared);
}

void cuda_classifier_grad(const ClassifierGradArgs& args, int device, void* stream) {
  if (args.batch == 0) return;
  const Guard guard(device);
  const auto address = [](auto* kernel) { return reinterpret_cast<const void*>(kernel); };
  const Type type = args.logits_type;
  const void* kernel = address(type == F32    ? classifier_grad<F32>
                               : type == F16  ? classifier_grad<F16>
                               : type == BF16 ? classifier_grad<BF16>
                                              : classifier_grad<F64>);
  ClassifierGradArgs a = args;
  void* arguments[] = {&a};
  launch(kernel, a.batch, class_threads(type, a.classes), 0, stream, false, arguments);
}

}  // namespace pyguide
