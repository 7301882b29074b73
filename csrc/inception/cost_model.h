// What a pass costs, in cycles of a multiprocessor: a model to choose tiles by. Nothing in it was measured. Integers, so that
// every machine decides alike.
#pragma once

#include <algorithm>

#include "params.h"

namespace googlenet_fused {

struct CostModel {
  int mma = 2;             // cycles of a 16x8 product a step: 1024 products of halves a cycle by mma.sync, half as many of TF32
  int shared_bytes = 128;  // a cycle: 32 banks of 4 bytes
  int port_bytes = 64;     // a cycle, from L2 to one multiprocessor: the width of its port
  int l2_bytes = 24;       // a cycle and multiprocessor when all read: an H100's 5.5 TB/s at 1.755 GHz, over 132
  int latency = 700;       // from cp.async until the bytes are there: an L2 hit takes 270, more under load
  int barrier = 60;        // a stage: waiting, a barrier, and the first operands from shared memory
  int pass = 1000;         // a pass: its first stage is waited for, its last products are; addresses
  int epilogue = 400;      // a row of fragments: 200 instructions of a warp, two warps a scheduler, counted in the source
  int pooled_reads_x7 = 27; // units that a strip of 7 pixels reads: 9 columns of 3
  int block = 2500;        // parameters, the first bytes from memory, the last stores
  int launch = 3500;       // 2 µs
};

inline constexpr CostModel kCostModel;

constexpr std::int64_t ceil_div(std::int64_t value, std::int64_t divisor) { return (value + divisor - 1) / divisor; }

// Cycles, were nothing else to do but the products, shared memory's accesses, and loads through L2; and by the clock.
struct Work {
  std::int64_t mma = 0, shared = 0, l2 = 0, cycles = 0;

  Work &operator+=(const Work &other) {
    mma += other.mma;
    shared += other.shared;
    l2 += other.l2;
    cycles += other.cycles;
    return *this;
  }
};

// What passes of one launch have in common.
struct Pace {
  int stages;      // of the ring
  int l2_bytes;    // a cycle for each block
};

// Bytes a cycle that L2 has for each of ``blocks``, in few steps, so that few different models are looked at.
constexpr int l2_bytes_of(std::int64_t blocks, int multiprocessors) {
  const std::int64_t active = std::min<std::int64_t>(blocks, multiprocessors);
  const std::int64_t share = std::int64_t{kCostModel.l2_bytes} * multiprocessors / active;
  for (int step : {64, 48, 32}) {
    if (step <= share && step <= kCostModel.port_bytes) return step;
  }
  return kCostModel.l2_bytes;
}

// ``input_rows``: pixels of x that a stage of it loads. ``pooled_rows``: pixels that it pools.
constexpr Work work_of(const Pass &pass, int steps, int input_rows, int pooled_rows, const Pace &pace) {
  constexpr const CostModel &model = kCostModel;
  const std::int64_t stages = ceil_div(steps, 2);
  const std::int64_t loaded = std::int64_t{columns_of(pass) + input_rows} * kStageBytes;
  const std::int64_t mma = rows_of(pass) / kFragmentRows * (columns_of(pass) / kUnitColumns) * model.mma * 2;
  const std::int64_t reads = kWarps * (pass.row_fragments + 2) * 512 / model.shared_bytes * 2;
  const std::int64_t writes = loaded / model.shared_bytes;
  const std::int64_t pooling =
      std::int64_t{pooled_rows} * kStageBytes * (model.pooled_reads_x7 + 7) / 7 / model.shared_bytes;
  const std::int64_t l2 = loaded / pace.l2_bytes;

  Work work;
  work.mma = mma * steps / 2;
  work.shared = (reads * steps / 2) + (writes + pooling) * stages;
  work.l2 = l2 * stages;
  const std::int64_t computing = std::max(mma, reads + writes) + (pooled_rows > 0 ? pooling + model.barrier : 0);
  const std::int64_t stage = std::max({computing, l2, std::int64_t{model.latency / (pace.stages - 1)}}) + model.barrier;
  work.cycles = stage * steps / 2 + model.pass + model.epilogue * pass.row_fragments;
  return work;
}

} // namespace googlenet_fused
