// How images are cut into tiles of pixels, and where the pixels of a tile lie in the bottlenecks.
#pragma once

#include <algorithm>
#include <vector>

#include "problem_sizes.h"

namespace googlenet_fused::planning {

constexpr int kMostConflicts = 5; // per cent of wavefronts that are not worth more memory

struct Cut {
  int images, rows, columns; // of a tile
  int image_tiles, row_tiles, column_tiles;
  int pixels;         // of a tile
  int region_rows[3]; // pixels of a tile with 0, 1 and 2 around it, of the largest, cut off at the image's borders
  Bottleneck bottlenecks[2]; // begin counted from the end of the ring
  std::int64_t bottleneck_bytes;

  // Of the whole batch, or 2^50 if they are more.
  std::int64_t tiles() const {
    const double all = static_cast<double>(image_tiles) * row_tiles * column_tiles;
    return static_cast<std::int64_t>(std::min(all, 0x1p50));
  }
};

// The longest stretch of one dimension that a tile and its halo cover within the image.
inline int longest(int tile, int tiles, int side, int halo) {
  std::int64_t found = 0;
  const auto look = [&](std::int64_t index) {
    const std::int64_t begin = std::max<std::int64_t>(index * tile - halo, 0);
    const std::int64_t end = std::min<std::int64_t>((index + 1) * tile + halo, side);
    found = std::max(found, end - begin);
  };
  for (int i = 0; i < std::min(tiles, 4); i++) look(i);
  for (int i = std::max(tiles - 4, 0); i < tiles; i++) look(i);
  return static_cast<int>(found);
}

// Wavefronts in which ldmatrix reads a tile's pixels once, whatever the tap: eight at a time, each with another index mod 8.
inline int wavefronts(const Cut &cut, const Bottleneck &bottleneck) {
  int of_line[8] = {}, of_image[8] = {}, counts[8] = {};
  for (int x = 0; x < std::min(cut.columns, 8); x++) of_line[x] = (cut.columns - x + 7) / 8;
  const auto add = [](int(&to)[8], const int(&from)[8], int times, int step) {
    for (int i = 0; i < times; i++) {
      for (int residue = 0; residue < 8; residue++) to[(residue + i * step) % 8] += from[residue];
    }
  };
  add(of_image, of_line, cut.rows, bottleneck.row_pixels % 8);
  add(counts, of_image, cut.images, bottleneck.image_pixels % 8);
  const int eights = static_cast<int>(ceil_div(cut.pixels, 8)), last = cut.pixels - (eights - 1) * 8;
  int most = eights, in_last = 0; // which has fewer than eight places
  for (int count : counts) {
    most = std::max(most, count);
    in_last += std::max(count - (eights - 1), 0);
  }
  return std::max(most, in_last > last ? eights + 1 : eights);
}

// Of a bottleneck, up to the last of the last image's halo.
inline int pixels_of(const Cut &cut, const Bottleneck &bottleneck) {
  const int borders = 2 * bottleneck.halo;
  return (cut.images - 1) * bottleneck.image_pixels + (cut.rows - 1 + borders) * bottleneck.row_pixels + cut.columns + borders;
}

// Distances of rows and images: those that take the least memory among those that take few wavefronts.
inline void set_distances(const Cut &cut, Bottleneck &bottleneck) {
  const int halo = bottleneck.halo, shared = cut.column_tiles == 1 ? 1 : 2;
  Bottleneck tried = bottleneck;
  int least_waves = INT_MAX, least_pixels = INT_MAX;
  for (int row = 0; row < 8; row++) {
    tried.row_pixels = cut.columns + shared * halo + row;
    if (tried.row_pixels % 8 == 0) continue;
    for (int image = 0; image < (cut.images > 1 ? 8 : 1); image++) {
      tried.image_pixels = (cut.rows + halo) * tried.row_pixels + image;
      const int pixels = pixels_of(cut, tried);
      const int few = static_cast<int>(ceil_div(cut.pixels, 8)) * (100 + kMostConflicts) / 100;
      const int waves = std::max(wavefronts(cut, tried), few);
      if (waves > least_waves || (waves == least_waves && pixels >= least_pixels)) continue;
      least_waves = waves;
      least_pixels = pixels;
      bottleneck.row_pixels = tried.row_pixels;
      bottleneck.image_pixels = tried.image_pixels;
    }
  }
}

inline Cut cut_of(const Problem &problem, const Sizes &sizes, int images, int rows, int columns) {
  Cut cut = {};
  cut.images = images;
  cut.rows = rows;
  cut.columns = columns;
  cut.image_tiles = static_cast<int>(ceil_div(problem.batch, images));
  cut.row_tiles = static_cast<int>(ceil_div(problem.height, rows));
  cut.column_tiles = static_cast<int>(ceil_div(problem.width, columns));
  cut.pixels = images * rows * columns;
  for (int halo = 0; halo < 3; halo++) {
    cut.region_rows[halo] = images * longest(rows, cut.row_tiles, problem.height, halo) *
                            longest(columns, cut.column_tiles, problem.width, halo);
  }
  for (int branch = 0; branch < 2; branch++) {
    Bottleneck bottleneck = sizes.bottlenecks[branch];
    set_distances(cut, bottleneck);
    const std::int64_t bytes = std::int64_t{pixels_of(cut, bottleneck)} * bottleneck.pixel_bytes;
    bottleneck.begin = static_cast<int>(std::min<std::int64_t>(round_up(cut.bottleneck_bytes, 128), INT_MAX));
    bottleneck.bytes = static_cast<int>(std::min<std::int64_t>(bytes, INT_MAX));
    cut.bottleneck_bytes = round_up(cut.bottleneck_bytes, 128) + bytes;
    cut.bottlenecks[branch] = bottleneck;
  }
  return cut;
}

// Lengths into which a side can be cut, the longest first: of those that make as many tiles the shortest.
inline std::vector<int> lengths(int side) {
  std::vector<int> found;
  for (int length = std::min(side, kMaxTilePixels); length > 0; length--) {
    if (ceil_div(side, ceil_div(side, length)) == length) found.push_back(length);
  }
  return found;
}

inline std::vector<Cut> cuts_of(const Problem &problem, const Sizes &sizes) {
  std::vector<Cut> cuts;
  const std::int64_t image = std::int64_t{problem.height} * problem.width;
  for (std::int64_t images = std::min<std::int64_t>(kMaxTilePixels / image, problem.batch); images > 1; images--) {
    if (images > 8 && images % 8 != 0 && images != kMaxTilePixels / image) continue;
    if (ceil_div(problem.batch, ceil_div(problem.batch, images)) != images) continue;
    cuts.push_back(cut_of(problem, sizes, static_cast<int>(images), problem.height, problem.width));
  }
  for (int rows : lengths(problem.height)) {
    for (int columns : lengths(problem.width)) {
      if (rows * columns <= kMaxTilePixels) cuts.push_back(cut_of(problem, sizes, 1, rows, columns));
    }
  }
  return cuts;
}

} // namespace googlenet_fused::planning
