// The bound of dynamic thresholding on a CUDA device: one launch of the kernel of quantile.cuh. See csrc/quantile.h for
// the formula.
//
// Launch: a block for each sample, of 128 to 1,024 threads: one for every 16 bytes of its state in one slot, as far as
// that goes. Rows, weights and routes are read on the device, so that a captured launch serves every row.
//
// Bytes of a sample: what D is made of (CFG: two outputs and x, 12 bytes an element in float32), once up to 20,480
// elements of float32 (10,240 of float64), whose keys stay in shared memory; beyond, twice where the keys that share
// their first digit with the quantile are that few, else once for every digit. One multiprocessor reads a sample: what
// it takes from L2 in a time bounds large ones. Accesses are 16 bytes wide (8 to outputs of 16 bits) where operands are
// contiguous and aligned, else one element each.
//
// Arithmetic: that of the step for D, then integers. Registers: at most 64, no spills, no local memory, on compute
// capabilities 8.0 to 12.0. Shared memory of a block: 13,696 B (16,360 B for float64 states) and the keys, in all at
// most 98,280 B, for more than 48 KiB of which the launch has to ask. Barriers: four for a digit, two more.
#include "quantile.cuh"

#include "cuda.cuh"

namespace pyguide {

template <class T>
__global__ void __launch_bounds__(QUANTILE_THREADS, 1)
    quantile(const __grid_constant__ StepArgs args, const __grid_constant__ QuantileArgs q, int64_t capacity) {
  extern __shared__ __align__(16) char shared[];
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
  quantile_sample<T>(CudaThread(), args, q, capacity, shared);
}

void launch_quantile(const StepArgs& on_device, const QuantileArgs& q, void* stream, bool dependent) {
  if (on_device.batch == 0) return;
  const bool wide = on_device.state_type == F64;
  const int64_t N = on_device.channels * on_device.inner;
  const void* kernel = reinterpret_cast<const void*>(wide ? &quantile<double> : &quantile<float>);
  QuantileGeometry g = wide ? quantile_geometry<double>(N) : quantile_geometry<float>(N);
  StepArgs a = quantile_args(on_device);
  QuantileArgs to = q;
  void* arguments[] = {&a, &to, &g.capacity};
  launch(kernel, a.batch, g.threads, g.shared, stream, dependent, arguments);
}

}  // namespace pyguide
