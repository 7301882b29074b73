#include "launch.cuh"

namespace googlenet_fused {

int launch_inception(Element element, const Params &params, int most_shared_bytes, void *stream) {
  switch (element) {
  case Element::kHalf: return launch<Element::kHalf>(params, most_shared_bytes, stream);
  case Element::kBFloat16: return launch<Element::kBFloat16>(params, most_shared_bytes, stream);
  case Element::kTf32: return launch<Element::kTf32>(params, most_shared_bytes, stream);
  }
  return cudaErrorInvalidValue;
}

const char *driver_fault() {
  int driver = 0;
  const cudaError_t error = cudaDriverGetVersion(&driver);
  if (error != cudaSuccess) return cudaGetErrorString(static_cast<cudaError_t>(taken(error)));
  if (driver / 1000 >= CUDART_VERSION / 1000) return "";
  return "the driver is older than the CUDA that the library was built with: update the driver, or build with an older nvcc";
}

const char *error_text(int error) { return cudaGetErrorString(static_cast<cudaError_t>(error)); }

} // namespace googlenet_fused
