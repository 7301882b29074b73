// Small kernels for the tests of the simulation itself.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "../inception/params.h"
#include "simulator.h"

namespace googlenet_fused::sim {

// a [16, k] times b [k, 32] by one warp, through shared memory, with sums that begin at 0: bits of halves, or of floats, with
// k such that rows take kStepBytes.
std::vector<float> multiply_fragments(Element element, const void *a, const void *b_transposed);

// Registers of a warp, a row a lane. All throw std::invalid_argument for other sizes.
// words [32, 4] to the same.
std::vector<std::uint32_t> transpose_lanes(const std::vector<std::uint32_t> &words);
// 16 bytes a lane, in shared memory one after another, to what ldmatrix.x4 gives of them: [32, 4] to the same.
std::vector<std::uint32_t> load_lanes(const std::vector<std::uint32_t> &rows);
// a [32, 4] and b [32, 8], two words for each of four mma, to sums [32, 16], four numbers for each.
std::vector<float> multiply_lanes(Element element, const std::vector<std::uint32_t> &a, const std::vector<std::uint32_t> &b);

std::uint32_t rounded_to_tf32(std::uint32_t bits);
std::uint32_t larger_of(Element element, std::uint32_t one, std::uint32_t other);
std::uint32_t packed_pair(Element element, float low, float high); // of halves

// Copies 16 bytes a lane from and to rows ``pitch`` bytes apart, loads them, stores them there and side by side to an output,
// and reads them by ldmatrix: as a, rows of that pitch; as b, one row by all lanes.
Counters touch_rows(int pitch);

// Threads of two warps by when they begin, then by when they go on after a barrier.
std::vector<int> turns(const Modes &modes);

// Runs a kernel with the fault of that name, or with none: "sound". Throws std::invalid_argument for another name.
Counters provoke(const std::string &fault, const Modes &modes);
std::vector<std::string> faults();

} // namespace googlenet_fused::sim
