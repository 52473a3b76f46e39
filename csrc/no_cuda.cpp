// In place of the .cu files where no nvcc compiled it: every call says why.
#include <stdexcept>

#include "../kernels/launch.h"

#ifndef PG_NO_CUDA
#define PG_NO_CUDA "unknown reason"
#endif

namespace pyguide {

void cuda_step(const StepArgs&, const Placement&, bool, const MomentsArgs*, const QuantileArgs*, bool) {
  throw std::runtime_error(cuda_reason());
}
void cuda_normals(int, void*, void*, Type, int64_t, int64_t, uint64_t, uint32_t, uint32_t) {
  throw std::runtime_error(cuda_reason());
}
void cuda_classifier_grad(const ClassifierGradArgs&, int, void*) { throw std::runtime_error(cuda_reason()); }
std::string cuda_reason() { return std::string("built without CUDA: ") + PG_NO_CUDA; }
std::string cuda_build() { return std::string("not built: ") + PG_NO_CUDA; }
std::vector<std::string> cuda_archs() { return {}; }

}  // namespace pyguide
