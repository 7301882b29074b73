#include "launch.cuh"

namespace googlenet_fused {

int launch_inception(Element element, const Params &params, void *stream) {
  switch (element) {
  case Element::kHalf: return launch<Element::kHalf>(params, stream);
  case Element::kBFloat16: return launch<Element::kBFloat16>(params, stream);
  case Element::kTf32: return launch<Element::kTf32>(params, stream);
  }
  return cudaErrorInvalidValue;
}

const char *error_text(int error) { return cudaGetErrorString(static_cast<cudaError_t>(error)); }

} // namespace googlenet_fused
