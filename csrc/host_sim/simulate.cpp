#include "simulate.h"

#include "../inception/kernel.cuh"

#ifndef HOST_SIM_ELEMENTS // a bit for each of Element that is compiled
#define HOST_SIM_ELEMENTS 7
#endif

namespace googlenet_fused::sim {
namespace {

template <Element element> void run_block(const Params &params) {
  if constexpr ((HOST_SIM_ELEMENTS >> static_cast<int>(element) & 1) != 0) {
    inception_block<Traits<element>>(params);
  } else {
    block->fail("this simulation was built without the element asked for");
  }
}

} // namespace

Counters simulate(const Problem &problem, const Device &device, const std::optional<Tile> &tile, const Pointers &pointers,
                  const Extents &extents, const Modes &modes) {
  const Plan plan = tile ? plan_tile(problem, device, *tile) : plan_module(problem, device);
  const Params params = fill_params(problem, plan, pointers);
  const std::int64_t *strides = pointers.out_strides;
  Output output(pointers.out, {problem.batch, out_channels(problem), problem.height, problem.width},
                {strides[0], strides[1], strides[2], strides[3]}, element_bytes(problem.element));
  Launch launch;
  launch.blocks = std::int64_t{plan.image_tiles} * plan.row_tiles * plan.column_tiles * plan.tile.splits;
  launch.threads = kThreads;
  launch.shared_bytes = plan.shared_bytes;
  launch.modes = modes;
  launch.readable = {extents.weights, extents.x, extents.bias};
  launch.output = &output;
  return run(launch, [&] {
    switch (problem.element) {
    case Element::kHalf: return run_block<Element::kHalf>(params);
    case Element::kBFloat16: return run_block<Element::kBFloat16>(params);
    case Element::kTf32: return run_block<Element::kTf32>(params);
    }
  });
}

} // namespace googlenet_fused::sim
