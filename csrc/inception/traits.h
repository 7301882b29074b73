// What the kernel takes from the type of its numbers.
#pragma once

#include "params.h"

namespace googlenet_fused {

template <Element element> struct Traits {
  static constexpr Element kElement = element;
  static constexpr int kBytes = element_bytes(element);
  static constexpr int kUnitElements = kUnitBytes / kBytes;
  static constexpr int kStageElements = kStageBytes / kBytes;
};

} // namespace googlenet_fused
