// What the .cu files share: a thread of a block as the kernels of the .cuh files see it (control.cuh), and on the host
// errors, the current device and launches.
#pragma once
#include <cuda.h>
#include <cuda_runtime.h>

#include <stdexcept>
#include <string>

#include "geometry.h"

namespace pyguide {

// Launches of the other .cu files, for cuda_step; all addresses are the device's, `dependent`: with programmatic
// dependent launch. moments: the moments and weights blocks, or the guided output of groups.
void launch_moments(const StepArgs& on_device, const MomentsArgs& m, void* stream, bool dependent);
void launch_moments_step(const StepArgs& on_device, const MomentsArgs& m, const Geometry& g, const FusedGeometry& f,
                         void* stream, bool dependent);
void launch_quantile(const StepArgs& on_device, const QuantileArgs& q, void* stream, bool dependent);

namespace {

struct CudaThread {
  __device__ __forceinline__ int index() const { return int(threadIdx.x); }
  __device__ __forceinline__ int count() const { return int(blockDim.x); }
  __device__ __forceinline__ uint32_t block() const { return blockIdx.x; }
  __device__ __forceinline__ void sync() const { __syncthreads(); }

  __device__ __forceinline__ void warp_sync() const { __syncwarp(); }
  __device__ __forceinline__ uint64_t warp_or(uint64_t x) const {
    return __reduce_or_sync(~0u, uint32_t(x)) | uint64_t(__reduce_or_sync(~0u, uint32_t(x >> 32))) << 32;
  }
  template <class X>
  __device__ __forceinline__ X exchange(X x, int mask) const {
    return __shfl_xor_sync(~0u, x, mask);
  }
  __device__ __forceinline__ uint32_t neighbour(uint32_t x) const { return exchange(x, 1); }
  template <class X>
  __device__ __forceinline__ X load(const X* p) const {
    __builtin_assume(__isGlobal(p));
    return *p;
  }
  template <class X>
  __device__ __forceinline__ void store(X* p, X x) const {
    __builtin_assume(__isGlobal(p));
    *p = x;
  }
  // All of it at once: the compiler would load the rest only behind the branch on the row.
  __device__ __forceinline__ Sample load_sample(const Sample* p) const {
    uint64_t w[6];
    for (int i = 0; i < 6; ++i) {
      asm volatile("ld.global.u64 %0, [%1];" : "=l"(w[i]) : "l"(__cvta_generic_to_global(p) + 8 * i));
    }
    return {int64_t(w[0]), int64_t(w[1]),       w[2],          int32_t(w[3]),      int32_t(w[3] >> 32),
            int32_t(w[4]), int32_t(w[4] >> 32), int32_t(w[5]), int32_t(w[5] >> 32)};
  }
  __device__ __forceinline__ Words16 load16(const void* p) const {
    Words16 w;
    asm volatile("ld.global.L1::no_allocate.v4.u32 {%0, %1, %2, %3}, [%4];"
                 : "=r"(w.v[0]), "=r"(w.v[1]), "=r"(w.v[2]), "=r"(w.v[3])
                 : "l"(__cvta_generic_to_global(p)));
    return w;
  }
  __device__ __forceinline__ void store16(void* p, const Words16& w) const {
    asm volatile("st.global.L1::no_allocate.v4.u32 [%0], {%1, %2, %3, %4};" ::"l"(__cvta_generic_to_global(p)),
                 "r"(w.v[0]), "r"(w.v[1]), "r"(w.v[2]), "r"(w.v[3])
                 : "memory");
  }
  __device__ __forceinline__ void store8(void* p, const Words16& w) const {
    asm volatile("st.global.L1::no_allocate.v2.u32 [%0], {%1, %2};" ::"l"(__cvta_generic_to_global(p)), "r"(w.v[0]),
                 "r"(w.v[1])
                 : "memory");
  }
  __device__ __forceinline__ void copy16(void* to, const void* from) const {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(shared(to)), "l"(__cvta_generic_to_global(from))
                 : "memory");
  }
  __device__ __forceinline__ void copy8(void* to, const void* from) const {
    asm volatile("cp.async.ca.shared.global [%0], [%1], 8;" ::"r"(shared(to)), "l"(__cvta_generic_to_global(from))
                 : "memory");
  }
  __device__ __forceinline__ void copy4(void* to, const void* from) const {
    asm volatile("cp.async.ca.shared.global [%0], [%1], 4;" ::"r"(shared(to)), "l"(__cvta_generic_to_global(from))
                 : "memory");
  }
  __device__ static __forceinline__ uint32_t shared(void* p) { return uint32_t(__cvta_generic_to_shared(p)); }
  __device__ __forceinline__ void wait() const { asm volatile("cp.async.wait_all;" ::: "memory"); }
  __device__ __forceinline__ uint32_t arrive(int32_t* p, uint32_t last) const {
    return atomicInc(reinterpret_cast<unsigned*>(p), last);
  }
  __device__ __forceinline__ void fence() const { __threadfence(); }
  __device__ __forceinline__ void set_bits(int32_t* p, int32_t mask) const { atomicOr(p, mask); }
  __device__ __forceinline__ uint32_t add(uint32_t* p, uint32_t x) const { return atomicAdd(p, x); }
};

[[noreturn]] void fail(const char* call, cudaError_t error) {
  cudaGetLastError();  // not for the next call to report
  throw std::runtime_error(std::string(call) + ": " + cudaGetErrorName(error) + ": " + cudaGetErrorString(error));
}
void check(const char* call, cudaError_t error) {
  if (error != cudaSuccess) fail(call, error);
}
#define PG_CUDA(CALL, ...) check(#CALL, CALL(__VA_ARGS__))

// Whether a device is in use: to make one current that is not would create a context on it, with its memory.
bool in_use(int device) {
  typedef CUresult (*DeviceGet)(CUdevice*, int);
  typedef CUresult (*GetState)(CUdevice, unsigned*, int*);
  const auto find = [](const char* name) {  // in the driver, without a link to it; null if it is not there
    void* function = nullptr;
#if CUDART_VERSION >= 12050
    const auto error = cudaGetDriverEntryPointByVersion(name, &function, 7000, cudaEnableDefault, nullptr);
#elif CUDART_VERSION >= 11030
    const auto error = cudaGetDriverEntryPoint(name, &function, cudaEnableDefault);
#else
    const auto error = cudaErrorNotSupported;
#endif
    if (error != cudaSuccess) cudaGetLastError();  // not for the next call to report
    return error == cudaSuccess ? function : nullptr;
  };
  static const DeviceGet device_get = reinterpret_cast<DeviceGet>(find("cuDeviceGet"));
  static const GetState get_state = reinterpret_cast<GetState>(find("cuDevicePrimaryCtxGetState"));
  CUdevice handle;
  unsigned flags;
  int active;
  if (!device_get || !get_state || device_get(&handle, device) != CUDA_SUCCESS) return true;
  return get_state(handle, &flags, &active) != CUDA_SUCCESS || active;
}

// Makes a device current for as long as it lives; then the one before it, if that is in use.
struct Guard {
  int before = 0;
  bool changed;
  explicit Guard(int device) {
    PG_CUDA(cudaGetDevice, &before);
    changed = before != device;
    if (changed) PG_CUDA(cudaSetDevice, device);
  }
  ~Guard() {
    if (changed && in_use(before)) cudaSetDevice(before);
  }
};

// One launch of `kernel`: its error names cudaLaunchKernelExC.
void launch(const void* kernel, int64_t blocks, int threads, int64_t shared, void* stream, bool dependent,
            void** arguments) {
  if (blocks > INT32_MAX) {
    throw std::invalid_argument("batch: needs " + std::to_string(blocks) + " blocks, more than a launch has");
  }
  if (shared > STAGED_BYTES) {
    PG_CUDA(cudaFuncSetAttribute, kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, int(shared));
  }
  cudaLaunchAttribute overlap{};
  overlap.id = cudaLaunchAttributeProgrammaticStreamSerialization;
  overlap.val.programmaticStreamSerializationAllowed = 1;
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(unsigned(blocks));
  config.blockDim = dim3(unsigned(threads));
  config.dynamicSmemBytes = size_t(shared);
  config.stream = static_cast<cudaStream_t>(stream);
  config.attrs = &overlap;
  config.numAttrs = dependent ? 1 : 0;
  PG_CUDA(cudaLaunchKernelExC, &config, kernel, arguments);
}

}  // namespace
}  // namespace pyguide
