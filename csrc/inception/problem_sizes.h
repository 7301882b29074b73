// What a problem is in the kernel's units, and how the planner refuses one.
#pragma once

#include <climits>
#include <cstdio>
#include <stdexcept>
#include <string>

#include "cost_model.h"

namespace googlenet_fused::planning {

constexpr int kMaxWidth = 1 << 24; // of a convolution, so that bytes of K fit in 32 bits
constexpr int kMaxSide = 1 << 30;  // of an image

template <class... Values> std::string format(const char *pattern, Values... values) {
  const int length = std::snprintf(nullptr, 0, pattern, values...);
  std::string text(length + 1, '\0');
  std::snprintf(text.data(), text.size(), pattern, values...);
  text.pop_back();
  return text;
}

template <class... Values> [[noreturn]] void refuse(const char *pattern, Values... values) {
  throw std::invalid_argument(format(pattern, values...));
}

inline std::int64_t round_up(std::int64_t value, std::int64_t unit) { return ceil_div(value, unit) * unit; }

struct Sizes {
  int bytes; // of an element
  Product products[kProducts];
  int shared_ends[3];
  Bottleneck bottlenecks[2]; // channels, padded_channels, kernel, halo and pixel_bytes
  std::int64_t weight_bytes;
  int biases;
  double wanted; // products an output pixel
};

inline void check(const Problem &p) {
  const struct {
    const char *name;
    int value, most;
  } fields[] = {
      {"batch", p.batch, INT_MAX},
      {"height", p.height, kMaxSide},
      {"width", p.width, kMaxSide},
      {"in_channels", p.in_channels, kMaxWidth},
      {"ch1x1", p.ch1x1, kMaxWidth},
      {"ch3x3red", p.ch3x3red, kMaxWidth},
      {"ch3x3", p.ch3x3, kMaxWidth},
      {"ch5x5red", p.ch5x5red, kMaxWidth},
      {"ch5x5", p.ch5x5, kMaxWidth},
      {"pool_proj", p.pool_proj, kMaxWidth},
  };
  for (const auto &field : fields) {
    if (field.value < 1 || field.value > field.most) {
      refuse("%s is %d, must be 1 to %d", field.name, field.value, field.most);
    }
  }
  if (p.large_kernel != 3 && p.large_kernel != 5) refuse("large_kernel is %d, must be 3 or 5", p.large_kernel);
}

inline void check(const Device &device) {
  if (device.multiprocessors < 1) refuse("a device of %d multiprocessors", device.multiprocessors);
  if (device.shared_memory < 0) refuse("a device of %d bytes of shared memory", device.shared_memory);
}

inline Sizes sizes_of(const Problem &p) {
  check(p);
  Sizes sizes = {};
  sizes.bytes = element_bytes(p.element);
  const int step = kStepBytes / sizes.bytes;
  const int reduced[] = {p.ch3x3red, p.ch5x5red}, kernels[] = {3, p.large_kernel};
  for (int branch = 0; branch < 2; branch++) {
    Bottleneck &bottleneck = sizes.bottlenecks[branch];
    bottleneck.channels = reduced[branch];
    bottleneck.padded_channels = static_cast<int>(round_up(reduced[branch], step));
    bottleneck.kernel = kernels[branch];
    bottleneck.halo = kernels[branch] / 2;
    bottleneck.pixel_bytes = bottleneck.padded_channels * sizes.bytes + kUnitBytes;
  }
  sizes.shared_ends[0] = static_cast<int>(round_up(p.ch1x1, kUnitColumns));
  sizes.shared_ends[1] = sizes.shared_ends[0] + sizes.bottlenecks[0].padded_channels;
  sizes.shared_ends[2] = sizes.shared_ends[1] + sizes.bottlenecks[1].padded_channels;

  const std::int64_t input_steps = 2 * ceil_div(std::int64_t{p.in_channels} * sizes.bytes, kStageBytes);
  const std::int64_t columns[kProducts] = {p.pool_proj, sizes.shared_ends[2], p.ch3x3, p.ch5x5};
  std::int64_t steps[kProducts] = {input_steps, input_steps, 0, 0};
  for (int branch = 0; branch < 2; branch++) {
    const Bottleneck &bottleneck = sizes.bottlenecks[branch];
    steps[kSpatial3 + branch] = std::int64_t{bottleneck.kernel} * bottleneck.kernel * (bottleneck.padded_channels / step);
  }
  for (int i = 0; i < kProducts; i++) {
    Product &product = sizes.products[i];
    product.weights = sizes.weight_bytes;
    product.bias = sizes.biases;
    product.columns = static_cast<int>(round_up(columns[i], kUnitColumns));
    product.steps = static_cast<int>(steps[i]);
    sizes.weight_bytes += ceil_div(steps[i], 2) * product.columns * kStageBytes;
    sizes.biases += product.columns;
  }
  sizes.wanted = static_cast<double>(p.in_channels) * (double{1} * p.ch1x1 + p.ch3x3red + p.ch5x5red + p.pool_proj) +
                 9.0 * p.ch3x3red * p.ch3x3 + 1.0 * p.large_kernel * p.large_kernel * p.ch5x5red * p.ch5x5;
  return sizes;
}

} // namespace googlenet_fused::planning
