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

// words [32, 4], a row a lane.
std::vector<std::uint32_t> transpose_lanes(const std::vector<std::uint32_t> &words);

std::uint32_t rounded_to_tf32(std::uint32_t bits);
std::uint32_t larger_of(Element element, std::uint32_t one, std::uint32_t other);

// Reads rows of 16 bytes, ``pitch`` bytes apart, by ldmatrix and by 16-byte loads of a warp, and counts.
Counters read_rows(int pitch);

// Runs a kernel with the fault of that name, or with none: "sound". Throws std::invalid_argument for another name.
Counters provoke(const std::string &fault, const Modes &modes);
std::vector<std::string> faults();

} // namespace googlenet_fused::sim
