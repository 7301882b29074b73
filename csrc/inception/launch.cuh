// The kernel's entry and its launch, for one type of numbers.
#pragma once

#include "kernel.cuh"
#include "launch.h"

namespace googlenet_fused {

// One block a multiprocessor: without the 1 ptxas keeps to half the registers, and spills.
template <Element element> __global__ void __launch_bounds__(kThreads, 1) googlenet_fused_inception(const __grid_constant__ Params p) {
  inception_block<Traits<element>>(p);
}

template <Element element> int launch(const Params &params, void *stream) {
  const Plan &plan = params.plan;
  const auto kernel = googlenet_fused_inception<element>;
  const cudaError_t error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, plan.shared_bytes);
  if (error != cudaSuccess) return error;
  const unsigned blocks = static_cast<unsigned>(plan.image_tiles) * plan.row_tiles * plan.column_tiles * plan.tile.splits;
  kernel<<<blocks, kThreads, plan.shared_bytes, static_cast<cudaStream_t>(stream)>>>(params);
  return cudaGetLastError();
}

extern template int launch<Element::kHalf>(const Params &, void *);
extern template int launch<Element::kBFloat16>(const Params &, void *);
extern template int launch<Element::kTf32>(const Params &, void *);

} // namespace googlenet_fused
