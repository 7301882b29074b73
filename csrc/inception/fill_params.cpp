#include "fill_params.h"

#include <algorithm>
#include <array>
#include <cstdint>
#include <stdexcept>
#include <string>
#include <utility>

namespace googlenet_fused {
namespace {

std::int64_t address_of(const void *pointer) { return static_cast<std::int64_t>(reinterpret_cast<std::uintptr_t>(pointer)); }

void check_alignment(const char *name, const void *pointer) {
  if (address_of(pointer) % kUnitBytes != 0) {
    throw std::invalid_argument(std::string(name) + " must begin on " + std::to_string(kUnitBytes) + " bytes");
  }
}

// Strides of dimensions of one element are never used, and may be anything.
void check_x(const Problem &problem, const Pointers &pointers) {
  check_alignment("x", pointers.x);
  const std::int64_t *strides = pointers.x_strides;
  if (problem.in_channels > 1 && strides[1] != 1) {
    throw std::invalid_argument("x has a stride of " + std::to_string(strides[1]) +
                                " from channel to channel, must be 1: make it channels_last");
  }
  const int unit = kUnitBytes / element_bytes(problem.element);
  const struct {
    const char *name;
    std::int64_t size, stride;
  } dimensions[] = {
      {"image", problem.batch, strides[0]}, {"row", problem.height, strides[2]}, {"pixel", problem.width, strides[3]}};
  for (const auto &dimension : dimensions) {
    if (dimension.size > 1 && dimension.stride % unit != 0) {
      throw std::invalid_argument(std::string("x has a stride of ") + std::to_string(dimension.stride) + " elements from " +
                                  dimension.name + " to " + dimension.name + ", must be a multiple of " + std::to_string(unit));
    }
  }
}

// An element of its own for every thread that writes: an axis steps over all that lies along those of smaller strides.
void check_out(const Problem &problem, const Pointers &pointers) {
  const std::int64_t sizes[] = {problem.batch, out_channels(problem), problem.height, problem.width};
  std::array<std::pair<std::int64_t, std::int64_t>, 4> axes; // stride and size
  for (int i = 0; i < 4; i++) axes[i] = {pointers.out_strides[i], sizes[i]};
  std::sort(axes.begin(), axes.end());
  std::int64_t spanned = 1; // elements from the first to the last along the axes of smaller strides
  for (const auto &[stride, size] : axes) {
    if (size == 1) continue;
    if (stride < spanned) {
      const auto number = [&](int i) { return std::to_string(pointers.out_strides[i]); };
      throw std::invalid_argument("out has strides of " + number(0) + ", " + number(1) + ", " + number(2) + " and " + number(3) +
                                  " elements, by which its elements overlap or interleave; each axis is to step over all of those "
                                  "of smaller strides");
    }
    spanned += (size - 1) * stride;
  }
}

} // namespace

Params fill_params(const Problem &problem, const Plan &plan, const Pointers &pointers) {
  check_x(problem, pointers);
  check_out(problem, pointers);
  check_alignment("weights", pointers.weights);
  Params params = {};
  params.x = static_cast<const unsigned char *>(pointers.x);
  params.out = static_cast<unsigned char *>(pointers.out);
  params.weights = static_cast<const unsigned char *>(pointers.weights);
  params.bias = pointers.bias;
  params.batch = problem.batch;
  params.height = problem.height;
  params.width = problem.width;
  params.in_channels = problem.in_channels;
  params.plan = plan;

  const std::int64_t *x = pointers.x_strides, *out = pointers.out_strides;
  const std::int64_t x_strides[] = {x[0], x[2], x[3]}, out_strides[] = {out[0], out[2], out[3], out[1]};
  const int sizes[] = {problem.batch, problem.height, problem.width};
  for (int i = 0; i < 3; i++) params.x_strides[i] = sizes[i] > 1 ? x_strides[i] : 0;
  for (int i = 0; i < 4; i++) params.out_strides[i] = out_strides[i];

  const int widths[kProducts] = {problem.pool_proj, problem.ch1x1, problem.ch3x3, problem.ch5x5};
  const int spatial = problem.ch1x1 + problem.ch3x3;
  const int offsets[kProducts] = {spatial + problem.ch5x5, 0, problem.ch1x1, spatial};
  const std::int64_t unit = kUnitBytes / element_bytes(problem.element);
  bool pixels_aligned = out[1] == 1;
  for (int i = 0; i < 3; i++) pixels_aligned = pixels_aligned && (sizes[i] == 1 || out_strides[i] % unit == 0);
  for (int product = 0; product < kProducts; product++) {
    params.out_widths[product] = widths[product];
    params.out_offsets[product] = offsets[product];
    const std::int64_t first = address_of(pointers.out) + std::int64_t{offsets[product]} * element_bytes(problem.element);
    params.wide[product] = pixels_aligned && first % kUnitBytes == 0;
  }
  return params;
}

} // namespace googlenet_fused
