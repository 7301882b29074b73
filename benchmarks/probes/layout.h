// Index arithmetic of the probes, for host and device. It needs no CUDA header, so a plain C++ compiler builds its test.
//
// Sources: PTX ISA, "Asynchronous warpgroup level matrix shared memory layout" (descriptor, canonical layouts, swizzling) and
// "Matrix fragments for wgmma.mma_async.m64nNk16" (accumulator).
#pragma once

#include <cstdint>

#ifdef __CUDACC__
#define PROBE_HD __host__ __device__ __forceinline__
#else
#define PROBE_HD inline
#endif

namespace probe {

constexpr int ELEMENT_BYTES = 2;                                      // bf16
constexpr int CHUNK_CHANNELS = 8;                                     // 16 bytes, the unit both layouts keep together
constexpr int CHUNK_BYTES = CHUNK_CHANNELS * ELEMENT_BYTES;           // one row of a core matrix
constexpr int CORE_ROWS = 8;                                          // rows of a core matrix
constexpr int CORE_BYTES = CORE_ROWS * CHUNK_BYTES;                   // 128
constexpr int SWIZZLE_ROW_BYTES = 128;                                // one row (pixel or output channel) of 64 channels
constexpr int SWIZZLE_ATOM_BYTES = CORE_ROWS * SWIZZLE_ROW_BYTES;     // 1024, after which the swizzle pattern repeats

enum SwizzleMode : uint32_t { SWIZZLE_NONE = 0, SWIZZLE_128B = 1, SWIZZLE_64B = 2, SWIZZLE_32B = 3 };

// Byte offset of (row, channel), channel < 64, in a tile of 128-byte rows whose base is a multiple of 1024: bits 4-6 of the
// address (which 16-byte chunk of the row) are XORed with bits 7-9 (the row modulo 8).
PROBE_HD constexpr uint32_t swizzle128_offset(uint32_t row, uint32_t channel) {
    const uint32_t chunk = channel / CHUNK_CHANNELS;
    return row * SWIZZLE_ROW_BYTES + ((chunk ^ (row % CORE_ROWS)) * CHUNK_BYTES) + channel % CHUNK_CHANNELS * ELEMENT_BYTES;
}

// Byte offset of (row, channel) in planes [channel / 8][row][8 channels] of `rows` rows each.
PROBE_HD constexpr uint32_t planes_offset(uint32_t row, uint32_t channel, uint32_t rows) {
    return (channel / CHUNK_CHANNELS * rows + row) * CHUNK_BYTES + channel % CHUNK_CHANNELS * ELEMENT_BYTES;
}

// The 64-bit wgmma matrix descriptor. All of start, leading and stride are bytes, multiples of 16 under 2^18.
PROBE_HD constexpr uint64_t wgmma_descriptor(uint32_t start, uint32_t leading, uint32_t stride, uint32_t base_offset,
                                             SwizzleMode mode) {
    return uint64_t((start & 0x3FFFF) >> 4) | uint64_t((leading & 0x3FFFF) >> 4) << 16 |
           uint64_t((stride & 0x3FFFF) >> 4) << 32 | uint64_t(base_offset & 7) << 49 | uint64_t(mode) << 62;
}

// Base offset by the rule "(address >> 7) & 7", applied to the start address itself.
PROBE_HD constexpr uint32_t base_offset_of_start(uint32_t start) { return start >> 7 & 7; }

// Row (output channel, 0..63) and column (pixel, 0..N-1) of accumulator register i of a thread (0..127) of the warpgroup.
PROBE_HD constexpr int accumulator_row(int thread, int i) { return thread / 32 * 16 + thread % 32 / 4 + i / 2 % 2 * 8; }
PROBE_HD constexpr int accumulator_column(int thread, int i) { return i / 4 * 8 + thread % 4 * 2 + i % 2; }

}  // namespace probe
