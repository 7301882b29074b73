// The kernel run by the simulator.
#pragma once

#include <optional>

#include "../inception/fill_params.h"
#include "../inception/tile_plan.h"
#include "simulator.h"

namespace googlenet_fused::sim {

// What the arrays behind the pointers hold.
struct Extents {
  Array x, weights, bias;
};

// Runs a module as a GPU would; no tile: the planner's choice. Throws std::invalid_argument for what cannot be planned, and
// SimulationError for what the kernel does wrong.
Counters simulate(const Problem &problem, const Device &device, const std::optional<Tile> &tile, const Pointers &pointers,
                  const Extents &extents, const Modes &modes);

} // namespace googlenet_fused::sim
