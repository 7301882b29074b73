// The kernel's entry and its launch, for one type of numbers.
#pragma once

#include "kernel.cuh"
#include "launch.h"

namespace googlenet_fused {

// One block a multiprocessor: without the 1 ptxas keeps to half the registers, and spills.
template <Element element> __global__ void __launch_bounds__(kThreads, 1) googlenet_fused_inception(const __grid_constant__ Params p) {
  inception_block<Traits<element>>(p);
}

// The error, which is then forgotten: it must not be taken for a later call's.
inline int taken(cudaError_t error) {
  if (error != cudaSuccess) cudaGetLastError();
  return error;
}

template <Element element> int launch(const Params &params, int most_shared_bytes, void *stream) {
  const Plan &plan = params.plan;
  const auto kernel = googlenet_fused_inception<element>;
  // The same for every plan: a lower limit would hold for launches of other threads too.
  const cudaError_t error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, most_shared_bytes);
  if (error != cudaSuccess) return taken(error);
  cudaLaunchConfig_t config = {};
  config.gridDim = static_cast<unsigned>(plan.image_tiles) * plan.row_tiles * plan.column_tiles * plan.tile.splits;
  config.blockDim = kThreads;
  config.dynamicSmemBytes = plan.shared_bytes;
  config.stream = static_cast<cudaStream_t>(stream);
  return taken(cudaLaunchKernelEx(&config, kernel, params));
}

extern template int launch<Element::kHalf>(const Params &, int, void *);
extern template int launch<Element::kBFloat16>(const Params &, int, void *);
extern template int launch<Element::kTf32>(const Params &, int, void *);

} // namespace googlenet_fused
