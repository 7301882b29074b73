// What the planner decides, the launcher passes on and the kernel reads. Plain data: no torch, no CUDA.
#pragma once

#include <cstdint>

namespace googlenet_fused {

constexpr int kWarps = 8;
constexpr int kThreads = 32 * kWarps;
constexpr int kUnitBytes = 16;      // what a thread copies, loads and stores at a time
constexpr int kStepBytes = 32;      // of K in one mma: 16 halves or 8 TF32 numbers
constexpr int kStageBytes = 64;     // of K in one stage of the ring, two steps
constexpr int kStageUnits = kStageBytes / kUnitBytes;
constexpr int kUnitColumns = 8;     // N of one mma
constexpr int kWarpColumns = 32;    // of a warp tile: four mma
constexpr int kFragmentRows = 16;   // M of one mma
constexpr int kMaxTilePixels = 256; // so that a byte names a pixel of a tile
constexpr int kMaxSplits = 16;
constexpr int kMaxPasses = 160;

enum class Element : int { kHalf, kBFloat16, kTf32 };

constexpr int element_bytes(Element element) { return element == Element::kTf32 ? 4 : 2; }

// One module's call. Widths have the names of InceptionSpec.
struct Problem {
  Element element;
  int batch, height, width;
  int in_channels, ch1x1, ch3x3red, ch3x3, ch5x5red, ch5x5, pool_proj, large_kernel;
};

struct Device {
  int multiprocessors;
  int shared_memory; // bytes that a block may have
};

// How the output is cut among blocks: whole images, or rows and columns of pixels of one; its channels into splits.
struct Tile {
  int images, rows, columns;
  int splits;
  int stages; // of the ring through which weights and input stream
};

// The four products of a module. kShared is the three 1x1 convolutions that read the input, one beside the other.
enum ProductIndex : int { kPoolProj, kShared, kSpatial3, kSpatial5, kProducts };

// Weights of a product: [stages of K][columns][kStageBytes], unit u of column n at u ^ ((n >> 1) & 3). Zeros pad K and columns.
struct Product {
  std::int64_t weights; // bytes from the start of the packed weights
  int bias;             // numbers from the start of the packed biases
  int columns;          // a multiple of kUnitColumns
  int steps;            // of K
};

// The reduced channels of one branch in shared memory: every pixel of the tile and its halo, zeros around the image. A pixel takes
// an odd number of units, and neighbouring rows and images share their zeros.
struct Bottleneck {
  int channels, padded_channels; // a multiple of kStepBytes in bytes
  int kernel, halo;
  int pixel_bytes;
  int row_pixels;   // from a row to the next
  int image_pixels; // from an image to the next
  int begin, bytes; // in shared memory
};

// A product of some rows of a tile by some columns: kWarps warps, warp_rows of them below one another, each with a tile of
// row_fragments * kFragmentRows by kWarpColumns.
struct Pass {
  std::uint8_t product;
  std::uint8_t row_fragments;
  std::uint8_t warp_rows; // 2, 4 or 8
  std::uint8_t halo;      // around the tile, of the rows of kShared
  std::int32_t row, column;
  std::int32_t end; // columns from here on are other passes': zeros, and not stored
};

constexpr int rows_of(const Pass &pass) { return pass.row_fragments * kFragmentRows * pass.warp_rows; }
constexpr int columns_of(const Pass &pass) { return kWarps / pass.warp_rows * kWarpColumns; }

struct Plan {
  Tile tile;
  int row_tiles, column_tiles, image_tiles; // blocks: their product times tile.splits
  Product products[kProducts];
  int shared_ends[3]; // columns of kShared where ch1x1, ch3x3red and ch5x5red end, padding included
  Bottleneck bottlenecks[2];
  int slot_bytes, pool_slot_bytes; // of the ring, which begins shared memory: of kPoolProj passes, which hold a halo, the latter
  int pooled;         // where the pooled rows of a stage lie, in the place of the bottlenecks
  int shared_bytes;
  std::uint8_t pass_begin[kMaxSplits + 1]; // passes of a split; in the order of ProductIndex
  Pass passes[kMaxPasses];
  // Which pixel of the tile each row of a spatial product is: an order in which ldmatrix meets no bank conflict.
  std::uint8_t order[2][kMaxTilePixels];
};

struct Params {
  const unsigned char *x;       // [batch, height, width, in_channels], channels adjacent, pixels on 16 bytes
  unsigned char *out;           // [batch, height, width, ch1x1 + ch3x3 + ch5x5 + pool_proj]
  const unsigned char *weights; // packed, on 16 bytes
  const float *bias;            // packed: each product's, padded as its columns
  std::int64_t x_strides[3];    // in elements: image, row, pixel
  std::int64_t out_strides[4];  // in elements: image, row, pixel, channel
  int out_offsets[kProducts];   // of the first output channel of each product; kShared's is ch1x1's
  int out_widths[kProducts];    // output channels of each product; kShared's are ch1x1's
  bool wide[kProducts];         // whether 8 output channels of it that begin at a multiple of 8 can be stored at once
  int batch, height, width, in_channels;
  Plan plan;
};
static_assert(sizeof(Params) <= 4096, "kernel parameters");

} // namespace googlenet_fused
