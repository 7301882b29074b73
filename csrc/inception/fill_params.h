// From tensors as pointers, sizes and strides to a kernel's parameters.
#pragma once

#include "params.h"

namespace googlenet_fused {

struct Pointers {
  const void *x;
  void *out;
  const void *weights;
  const float *bias;
  std::int64_t x_strides[4];   // in elements: image, channel, row, pixel, as torch has them for [n, c, h, w]
  std::int64_t out_strides[4];
};

inline std::int64_t out_channels(const Problem &problem) {
  return std::int64_t{problem.ch1x1} + problem.ch3x3 + problem.ch5x5 + problem.pool_proj;
}

// Throws std::invalid_argument if x's channels are not adjacent, its pixels do not lie on 16 bytes, or out's elements overlap or
// interleave.
Params fill_params(const Problem &problem, const Plan &plan, const Pointers &pointers);

// Sizes of the packed weights and biases, in bytes and in numbers: what Plan::products refer to.
struct PackedSizes {
  std::int64_t weight_bytes;
  int biases;
};
PackedSizes packed_sizes(const Problem &problem);

} // namespace googlenet_fused
