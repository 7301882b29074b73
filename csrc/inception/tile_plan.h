// Chooses how a module is cut into blocks and passes. Host code, pure: the same question has the same answer everywhere.
#pragma once

#include <string>
#include <vector>

#include "params.h"

namespace googlenet_fused {

// Warp tiles that the kernel has, in fragments of 16 rows.
constexpr int kRowFragments[] = {7, 4, 2, 1};

struct Cost {
  double cycles;         // of the whole launch, by the model
  double block_cycles;   // of the slowest split
  int waves;
  double mma, shared, l2; // cycles of the slowest block on tensor cores, shared memory, and L2
  double padding;        // products computed over those wanted, all blocks
};

// The plan of least cost. Throws std::invalid_argument that says what does not fit, if nothing does.
Plan plan_module(const Problem &problem, const Device &device);

// The plan for a given tile. Throws std::invalid_argument that names what does not fit.
Plan plan_tile(const Problem &problem, const Device &device, const Tile &tile);

Cost cost_of(const Problem &problem, const Device &device, const Plan &plan);

// All tiles that the planner weighs.
std::vector<Tile> tiles_of(const Problem &problem, const Device &device);

// What a plan is, for people: tile, blocks, shared memory, and a line a pass.
std::string describe(const Problem &problem, const Device &device, const Plan &plan);

} // namespace googlenet_fused
