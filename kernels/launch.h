// The step, the noise and the classifier's gradient on a GPU, as the bindings in csrc see them: no CUDA header here.
// kernels/step.cu and classifier_grad.cu implement it, csrc/no_cuda.cpp in a build without nvcc, and tests/simulated
// runs the same kernels on the host.
#pragma once
#include <string>
#include <vector>

#include "../csrc/classifier_grad.h"
#include "../csrc/moments.h"
#include "../csrc/quantile.h"
#include "../csrc/step.h"

namespace pyguide {

// Where a launch runs, and the device addresses of what StepArgs holds on the host for the checks.
struct Placement {
  int device = -1;  // ordinal, -1: the CPU
  void* stream = nullptr;
  bool dependent_launch = false;  // programmatic dependent launch, where the code that runs was made for it (9.0)
  Sample* samples = nullptr;
  const void *tables = nullptr, *weights = nullptr, *bound = nullptr;
  const int32_t *source = nullptr, *target = nullptr;

  bool placed() const { return device >= 0; }
};

// Each enqueues its launches and throws std::runtime_error "<call>: <cudaErrorName>: <text>". The calling thread's
// current device is what it was, if that device was in use: to return to one that was not would create a context on it.
// First the moments and the quantile, where they are given, with the device's addresses in them; then the step, or with
// step = false nothing more.
void cuda_step(const StepArgs& args, const Placement& placement, bool refresh, const MomentsArgs* moments,
               const QuantileArgs* quantile, bool step = true);
// Standard normals of elements [first, first + count) of one sample's stream to `to`, of type F32, F16, BF16 or F64.
void cuda_normals(int device, void* stream, void* to, Type type, int64_t first, int64_t count, uint64_t seed,
                  uint32_t ordinal, uint32_t tag);
// The classifier's gradient of a batch; all addresses are the device's.
void cuda_classifier_grad(const ClassifierGradArgs& args, int device, void* stream);

std::string cuda_reason();              // "" if this build has kernels for a GPU of this machine, else why not
std::string cuda_build();               // nvcc's version, or why it did not compile
std::vector<std::string> cuda_archs();  // compute capabilities that this build has code for

}  // namespace pyguide
