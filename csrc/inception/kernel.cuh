// One Inception module, a block's share of it. docs/cuda.md explains the tile, shared memory and why.
#pragma once

#include "primitives.cuh"

namespace googlenet_fused {

// Where the rows of a product come from: pixels of x, their 3x3 maxima, or a bottleneck seen through a tap.
enum class Source { kInput, kPooled, kBottleneck };

constexpr int kPoolStrip = 7; // pixels of a row that a thread pools: odd, so that neighbouring strips lie in other banks

// This block's part of the output, cut off at the image's and the batch's end.
struct Block {
  int split;
  std::int64_t image;
  int y, x; // its first pixel
  int images, rows, columns;
};

// Pixels around a block, cut off at the image's borders. A pixel's row in a product is (image * height + y) * width + x.
struct Region {
  int y, x; // its first pixel in the image
  int images, height, width;
  float per_height, per_width;
};

struct Pixel {
  int image, y, x;
};

DEVICE int least(int one, int other) { return one < other ? one : other; }
DEVICE int most(int one, int other) { return one > other ? one : other; }

// value / divisor of numbers below 2^21, by the divisor's reciprocal: half a unit is more than both roundings.
DEVICE int quotient(int value, float reciprocal) { return static_cast<int>((value + 0.5f) * reciprocal); }

DEVICE Pixel pixel_of(int row, const Region &region) {
  const int line = quotient(row, region.per_width);
  const int image = quotient(line, region.per_height);
  return {image, line - image * region.height, row - line * region.width};
}

DEVICE Block block_of(const Params &p, std::int64_t index) {
  const Plan &plan = p.plan;
  Block block;
  block.split = static_cast<int>(index % plan.tile.splits);
  index /= plan.tile.splits;
  block.x = static_cast<int>(index % plan.column_tiles) * plan.tile.columns;
  index /= plan.column_tiles;
  block.y = static_cast<int>(index % plan.row_tiles) * plan.tile.rows;
  block.image = index / plan.row_tiles * plan.tile.images;
  const std::int64_t images = p.batch - block.image;
  block.images = images < plan.tile.images ? static_cast<int>(images) : plan.tile.images;
  block.rows = least(plan.tile.rows, p.height - block.y);
  block.columns = least(plan.tile.columns, p.width - block.x);
  return block;
}

DEVICE Region region_around(const Params &p, const Block &block, int halo) {
  Region region;
  region.images = block.images;
  region.y = most(block.y - halo, 0);
  region.x = most(block.x - halo, 0);
  region.height = least(block.y + block.rows + halo, p.height) - region.y;
  region.width = least(block.x + block.columns + halo, p.width) - region.x;
  region.per_height = 1.0f / region.height;
  region.per_width = 1.0f / region.width;
  return region;
}

// The tile as if nothing were cut off, which is how rows of kPoolProj and of the spatial products are numbered.
DEVICE Region whole_tile(const Plan &plan, const Block &block) {
  const Tile &tile = plan.tile;
  return {block.y, block.x, tile.images, tile.rows, tile.columns, 1.0f / tile.rows, 1.0f / tile.columns};
}

DEVICE int rows_of(const Region &region) { return region.images * region.height * region.width; }

DEVICE bool holds(const Block &block, const Pixel &pixel) {
  return pixel.image < block.images && pixel.y < block.rows && pixel.x < block.columns;
}

DEVICE int halo_of(const Pass &pass) { return pass.product == kPoolProj ? 1 : pass.halo; }

// Where unit ``unit`` of a row of a stage lies: eight neighbouring rows at one unit, and any eight units that neighbouring threads
// write, lie in different banks.
DEVICE std::uint32_t unit_in_stage(int row, int unit) {
  return static_cast<std::uint32_t>(row * kStageBytes + ((unit ^ ((row >> 1) & 3)) * kUnitBytes));
}

// Starts copying a stage of a pass: its weights, then its pixels of x. Channels past the last are zeros, as in the weights.
template <class T>
DEVICE void load_stage(const Params &p, const Block &block, const Pass &pass, const Region &region, int stage,
                       std::uint32_t slot) {
  const Product &product = p.plan.products[pass.product];
  const int columns = columns_of(pass);
  const unsigned char *weights =
      p.weights + product.weights + (static_cast<std::int64_t>(stage) * product.columns + pass.column) * kStageBytes;
  const int units = least(columns, pass.end - pass.column) * kStageUnits;
  NO_UNROLL for (int i = thread_index(); i < columns * kStageUnits; i += kThreads) {
    copy_async(slot + i * kUnitBytes, weights + (i < units ? i * kUnitBytes : 0), i < units ? kUnitBytes : 0);
  }
  if (pass.product == kSpatial3 || pass.product == kSpatial5) return;
  const std::uint32_t rows = slot + columns * kStageBytes;
  const int first = pass.product == kPoolProj ? 0 : pass.row;
  const int count = pass.product == kPoolProj ? rows_of(region) : least(rows_of(region) - first, rows_of(pass));
  NO_UNROLL for (int i = thread_index(); i < count * kStageUnits; i += kThreads) {
    const int row = i / kStageUnits, unit = i % kStageUnits;
    const int channel = stage * T::kStageElements + unit * T::kUnitElements;
    const int bytes = most(least((p.in_channels - channel) * T::kBytes, kUnitBytes), 0);
    const Pixel pixel = pixel_of(first + row, region);
    const std::int64_t element = (block.image + pixel.image) * p.x_strides[0] + (region.y + pixel.y) * p.x_strides[1] +
                                 (region.x + pixel.x) * p.x_strides[2] + (bytes > 0 ? channel : 0);
    copy_async(rows + unit_in_stage(row, unit), p.x + element * T::kBytes, bytes);
  }
}

DEVICE int stages_of(const Product &product) { return (product.steps + 1) / 2; }

DEVICE std::uint32_t slot_bytes(const Plan &plan, const Pass &pass) {
  return pass.product == kPoolProj ? plan.pool_slot_bytes : plan.slot_bytes;
}

// Starts copying the stages of a pass that its ring holds ahead.
template <class T> DEVICE void begin_pass(const Params &p, const Block &block, const Pass &pass, std::uint32_t memory) {
  const Region region = region_around(p, block, halo_of(pass));
  const int stages = stages_of(p.plan.products[pass.product]);
  NO_UNROLL for (int stage = 0; stage < p.plan.tile.stages - 1; stage++) {
    if (stage < stages) load_stage<T>(p, block, pass, region, stage, memory + stage * slot_bytes(p.plan, pass));
    copy_commit();
  }
}

// Waits until the oldest of the stages copied ahead is there.
DEVICE void wait_for_stage(int stages) {
  if (stages == 2) {
    copy_wait<0>();
  } else if (stages == 3) {
    copy_wait<1>();
  } else {
    copy_wait<2>();
  }
}

template <class T> DEVICE Unit larger_unit(const Unit &one, const Unit &other) {
  Unit result;
  UNROLL for (int w = 0; w < 4; w++) result.words[w] = larger<T>(one.words[w], other.words[w]);
  return result;
}

// 3x3 maxima of a stage's pixels, from ``rows`` to ``pooled``. Pixels outside the image are none.
template <class T>
DEVICE void pool_stage(const Plan &plan, const Block &block, const Region &region, std::uint32_t rows, std::uint32_t pooled) {
  const int strips = (block.columns + kPoolStrip - 1) / kPoolStrip;
  const float per_strips = 1.0f / strips, per_rows = 1.0f / block.rows;
  NO_UNROLL for (int i = thread_index(); i < block.images * block.rows * strips * kStageUnits; i += kThreads) {
    const int unit = i % kStageUnits, strip = i / kStageUnits;
    const int line = quotient(strip, per_strips), image = quotient(line, per_rows);
    const int y = line - image * block.rows, begin = (strip - line * strips) * kPoolStrip;
    const int end = least(begin + kPoolStrip, block.columns);
    const int region_y = y + block.y - region.y, region_x = block.x - region.x;
    const int row = (image * region.height + region_y) * region.width + region_x;
    auto column = [&](int x) {
      Unit found = load_shared(rows + unit_in_stage(row + x, unit));
      if (region_y > 0) found = larger_unit<T>(found, load_shared(rows + unit_in_stage(row + x - region.width, unit)));
      if (region_y + 1 < region.height) {
        found = larger_unit<T>(found, load_shared(rows + unit_in_stage(row + x + region.width, unit)));
      }
      return found;
    };
    Unit here = column(begin), left = region_x + begin > 0 ? column(begin - 1) : here;
    NO_UNROLL for (int x = begin; x < end; x++) {
      const Unit right = region_x + x + 1 < region.width ? column(x + 1) : here;
      Unit found = larger_unit<T>(larger_unit<T>(left, here), right);
      if constexpr (T::kElement == Element::kTf32) {
        UNROLL for (int w = 0; w < 4; w++) found.words[w] = round_to_tf32(found.words[w]);
      }
      store_shared(pooled + unit_in_stage((image * plan.tile.rows + y) * plan.tile.columns + x, unit), found);
      left = here;
      here = right;
    }
  }
}

// A warp's place in a pass, and a lane's in its fragments.
struct Lane {
  int row, column; // of the warp tile in the pass
  int index;
};

template <int kRows> DEVICE Lane lane_of(const Pass &pass) {
  const int warp = uniform(thread_index() / 32);
  return {warp % pass.warp_rows * kRows * kFragmentRows, warp / pass.warp_rows * kWarpColumns, thread_index() % 32};
}

// Row ``row`` of ``count``, or in place of one past the last a row in the same banks, which unit_in_stage repeats every eight rows, so
// that it meets no other's.
DEVICE int row_or_alias(int row, int count) {
  if (row < count) return row;
  row %= 8;
  return row < count ? row : 0;
}

// The pixel that a row of a spatial product is, or the tile's first for rows past its last. One that is cut off has a place, too.
DEVICE Pixel ordered_pixel(const Plan &plan, const Region &tile, int branch, int row) {
  return row < rows_of(tile) ? pixel_of(plan.order[branch][row], tile) : Pixel{0, 0, 0};
}

// Steps through a bottleneck: channels of a tap, taps of a kernel row, rows. The offset is the same for every pixel. Without a
// branch, so that the next operands are loaded beside the products.
struct Tap {
  int steps, kernel;                     // of a tap, and taps of a kernel row
  std::uint32_t to_next_tap, to_next_row; // besides the step itself
  std::uint32_t offset = 0;
  int step = 0, column = 0;

  DEVICE Tap(const Bottleneck &bottleneck, int steps)
      : steps(steps), kernel(bottleneck.kernel), to_next_tap(bottleneck.pixel_bytes - steps * kStepBytes),
        to_next_row((bottleneck.row_pixels - bottleneck.kernel) * bottleneck.pixel_bytes) {}

  DEVICE void advance() {
    const bool tap_ends = ++step == steps;
    step = tap_ends ? 0 : step;
    column += tap_ends ? 1 : 0;
    const bool row_ends = column == kernel;
    column = row_ends ? 0 : column;
    offset += kStepBytes + (tap_ends ? to_next_tap : 0) + (row_ends ? to_next_row : 0);
  }
};

// sums = rows of the pass times its weights. Its first stages were begun; ends when no warp reads the ring any more.
template <class T, Source kSource, int kRows>
DEVICE void multiply_pass(const Params &p, const Block &block, const Pass &pass, std::uint32_t memory,
                          float (&sums)[kRows][4][4]) {
  const Plan &plan = p.plan;
  const Region region = region_around(p, block, halo_of(pass));
  const Product &product = plan.products[pass.product];
  const int branch = pass.product == kSpatial5;
  const Bottleneck &bottleneck = plan.bottlenecks[branch];
  const Lane lane = lane_of<kRows>(pass);

  std::uint32_t a_rows[kRows], b_rows[2];
  UNROLL for (int i = 0; i < kRows; i++) {
    const int row = lane.row + i * kFragmentRows + lane.index % 16, half = lane.index / 16;
    if constexpr (kSource == Source::kInput) {
      a_rows[i] = unit_in_stage(row_or_alias(row, rows_of(region) - pass.row), half);
    } else if constexpr (kSource == Source::kPooled) {
      a_rows[i] = unit_in_stage(row_or_alias(pass.row + row, rows_of(whole_tile(plan, block))), half);
    } else {
      const Pixel pixel = ordered_pixel(plan, whole_tile(plan, block), branch, pass.row + row);
      const int place = pixel.image * bottleneck.image_pixels + pixel.y * bottleneck.row_pixels + pixel.x;
      a_rows[i] = memory + bottleneck.begin + place * bottleneck.pixel_bytes + half * kUnitBytes;
    }
  }
  UNROLL for (int j = 0; j < 2; j++) {
    const int column = lane.column + j * 16 + lane.index / 16 * 8 + lane.index % 8;
    b_rows[j] = unit_in_stage(column, lane.index / 8 % 2);
  }
  UNROLL for (int i = 0; i < kRows; i++) {
    UNROLL for (int j = 0; j < 4; j++) {
      UNROLL for (int q = 0; q < 4; q++) sums[i][j][q] = 0.0f;
    }
  }

  auto step = [&](std::uint32_t a_xor, std::uint32_t a_offset, std::uint32_t b_xor, std::uint32_t b_offset) {
    std::uint32_t a[kRows][4], b[2][4];
    load_operands(a, a_rows, a_xor, a_offset, b, b_rows, b_xor, b_offset);
    if constexpr (T::kElement == Element::kTf32 && kSource == Source::kInput) {
      UNROLL for (int i = 0; i < kRows; i++) {
        UNROLL for (int q = 0; q < 4; q++) a[i][q] = round_to_tf32(a[i][q]);
      }
    }
    multiply_tile<T>(sums, a, b);
  };

  const int stages = stages_of(product), ring = plan.tile.stages;
  const std::uint32_t slot_size = slot_bytes(plan, pass), x_rows = columns_of(pass) * kStageBytes;
  Tap tap(bottleneck, bottleneck.padded_channels * T::kBytes / kStepBytes);
  int read = 0, write = ring - 1;
  NO_UNROLL for (int stage = 0; stage < product.steps / 2; stage++) {
    wait_for_stage(ring);
    sync_block();
    if (stage + ring - 1 < stages) load_stage<T>(p, block, pass, region, stage + ring - 1, memory + write * slot_size);
    copy_commit();
    const std::uint32_t slot = memory + read * slot_size;
    if constexpr (kSource == Source::kPooled) {
      pool_stage<T>(plan, block, region, slot + x_rows, memory + plan.pooled);
      sync_block();
    }
    UNROLL for (int half = 0; half < 2; half++) {
      const std::uint32_t other = half * kStepBytes;
      if constexpr (kSource == Source::kInput) {
        step(other, slot + x_rows, other, slot);
      } else if constexpr (kSource == Source::kPooled) {
        step(other, memory + plan.pooled, other, slot);
      } else {
        step(0, tap.offset, other, slot);
        tap.advance();
      }
    }
    read = read + 1 == ring ? 0 : read + 1;
    write = write + 1 == ring ? 0 : write + 1;
  }
  if constexpr (kSource == Source::kBottleneck) {
    if (product.steps % 2 != 0) { // outside of the loop, where a branch would keep ptxas from loading ahead
      copy_wait<0>();
      sync_block();
      step(0, tap.offset, 0, memory + read * slot_size);
    }
  }
  sync_block();
}

DEVICE float relu(float value) { return value <= 0.0f ? 0.0f : value; } // which keeps NaN

// Eight channels of a pixel, in one unit of halves or two of TF32 numbers.
template <class T> struct Octet {
  static constexpr int kUnits = 8 * T::kBytes / kUnitBytes;
  Unit units[kUnits];

  DEVICE std::uint32_t first() const { return units[0].words[0]; }

  DEVICE void drop_first() {
    UNROLL for (int word = 0; word < 4 * kUnits; word++) {
      std::uint32_t &bits = units[word / 4].words[word % 4];
      const std::uint32_t next = word + 1 < 4 * kUnits ? units[(word + 1) / 4].words[(word + 1) % 4] : 0;
      bits = T::kBytes == 4 ? next : bits >> 16 | next << 16;
    }
  }

  // Channels from ``count`` on become zero.
  DEVICE void keep(int count) {
    UNROLL for (int word = 0; word < 4 * kUnits; word++) {
      std::uint32_t &bits = units[word / 4].words[word % 4];
      if constexpr (T::kBytes == 4) {
        if (word >= count) bits = 0;
      } else {
        if (2 * word >= count) bits = 0;
        if (2 * word + 1 == count) bits &= 0xffffu;
      }
    }
  }
};

// Eight columns of a row of a warp tile, which lie in pairs in four lanes: columns 8 j + ... to the lane j of each four.
template <class T> DEVICE Octet<T> gather(const float (&pairs)[4][2]) {
  Octet<T> octet;
  if constexpr (T::kBytes == 2) {
    UNROLL for (int j = 0; j < 4; j++) octet.units[0].words[j] = pack_pair<T>(pairs[j][0], pairs[j][1]);
    transpose_words(octet.units[0].words);
  } else {
    std::uint32_t even[4], odd[4];
    UNROLL for (int j = 0; j < 4; j++) {
      even[j] = bits_of(pairs[j][0]);
      odd[j] = bits_of(pairs[j][1]);
    }
    transpose_words(even);
    transpose_words(odd);
    UNROLL for (int q = 0; q < 4; q++) {
      octet.units[q / 2].words[q % 2 * 2] = even[q];
      octet.units[q / 2].words[q % 2 * 2 + 1] = odd[q];
    }
  }
  return octet;
}

// Where eight columns of a product go: channels of the output, or of one of the bottlenecks.
struct Destination {
  int branch; // of the bottleneck, or -1
  int channel, count; // the first, and how many of the eight are wanted
};

DEVICE Destination destination_of(const Params &p, const Pass &pass, int column) {
  const Plan &plan = p.plan;
  const int product = pass.product;
  if (column >= pass.end) return {-1, 0, 0};
  if (product != kShared || column < plan.shared_ends[0]) {
    return {-1, p.out_offsets[product] + column, least(p.out_widths[product] - column, kUnitColumns)};
  }
  const int branch = column >= plan.shared_ends[1];
  const int channel = column - plan.shared_ends[branch];
  return {branch, channel, most(least(plan.bottlenecks[branch].channels - channel, kUnitColumns), 0)};
}

template <class T>
DEVICE void store_out(const Params &p, const Block &block, const Pixel &pixel, const Destination &to, bool wide,
                      const Octet<T> &octet) {
  const std::int64_t element = (block.image + pixel.image) * p.out_strides[0] + (block.y + pixel.y) * p.out_strides[1] +
                               (block.x + pixel.x) * p.out_strides[2] + to.channel * p.out_strides[3];
  unsigned char *out = p.out + element * T::kBytes;
  if (wide && to.count == kUnitColumns) {
    UNROLL for (int u = 0; u < Octet<T>::kUnits; u++) store_unit(out + u * kUnitBytes, octet.units[u]);
    return;
  }
  using Bits = std::conditional_t<T::kBytes == 2, std::uint16_t, std::uint32_t>;
  Octet<T> left = octet;
  NO_UNROLL for (int i = 0; i < to.count; i++) { // a loop, since code that is not run must be fetched all the same
    store_element(reinterpret_cast<Bits *>(out), static_cast<Bits>(left.first()));
    left.drop_first();
    out += p.out_strides[3] * T::kBytes;
  }
}

template <class T>
DEVICE void store_bottleneck(const Bottleneck &bottleneck, const Block &block, const Pixel &pixel, const Destination &to,
                             std::uint32_t memory, Octet<T> octet) {
  const int halo = bottleneck.halo;
  if (pixel.y < -halo || pixel.y >= block.rows + halo || pixel.x < -halo || pixel.x >= block.columns + halo) return;
  octet.keep(to.count); // 0 times infinity in a padding channel would be NaN
  const int place =
      pixel.image * bottleneck.image_pixels + (pixel.y + halo) * bottleneck.row_pixels + pixel.x + halo;
  const std::uint32_t address =
      memory + bottleneck.begin + place * bottleneck.pixel_bytes + to.channel * T::kBytes;
  UNROLL for (int u = 0; u < Octet<T>::kUnits; u++) {
    if constexpr (T::kElement == Element::kTf32) {
      UNROLL for (int w = 0; w < 4; w++) octet.units[u].words[w] = round_to_tf32(octet.units[u].words[w]);
    }
    store_shared(address + u * kUnitBytes, octet.units[u]);
  }
}

// Bias and ReLU, then to the output or a bottleneck.
template <class T, Source kSource, int kRows>
DEVICE void store_pass(const Params &p, const Block &block, const Pass &pass, std::uint32_t memory,
                       const float (&sums)[kRows][4][4]) {
  const Plan &plan = p.plan;
  const Product &product = plan.products[pass.product];
  const Lane lane = lane_of<kRows>(pass);
  const Region region = kSource == Source::kInput ? region_around(p, block, pass.halo) : whole_tile(plan, block);
  const Destination to = destination_of(p, pass, pass.column + lane.column + lane.index % 4 * kUnitColumns);

  float bias[4][2];
  UNROLL for (int j = 0; j < 4; j++) {
    const int column = pass.column + lane.column + j * kUnitColumns + lane.index % 4 * 2;
    UNROLL for (int q = 0; q < 2; q++) {
      bias[j][q] = column < pass.end ? load_number(p.bias + product.bias + column + q) : 0.0f;
    }
  }
  UNROLL for (int i = 0; i < kRows; i++) {
    UNROLL for (int half = 0; half < 2; half++) {
      float pairs[4][2];
      UNROLL for (int j = 0; j < 4; j++) {
        UNROLL for (int q = 0; q < 2; q++) pairs[j][q] = relu(sums[i][j][half * 2 + q] + bias[j][q]);
      }
      const Octet<T> octet = gather<T>(pairs);
      int row = pass.row + lane.row + i * kFragmentRows + half * 8 + lane.index / 4;
      if (row >= rows_of(region)) continue;
      if constexpr (kSource == Source::kBottleneck) row = plan.order[pass.product == kSpatial5][row];
      Pixel pixel = pixel_of(row, region);
      pixel.y += region.y - block.y;
      pixel.x += region.x - block.x;
      if (to.branch >= 0) {
        store_bottleneck<T>(plan.bottlenecks[to.branch], block, pixel, to, memory, octet);
      } else if (to.count > 0 && pixel.y >= 0 && pixel.x >= 0 && holds(block, pixel)) {
        store_out<T>(p, block, pixel, to, p.wide[pass.product], octet);
      }
    }
  }
}

DEVICE void fill_with_zeros(const Bottleneck &bottleneck, std::uint32_t memory) {
  const Unit zeros = {{0, 0, 0, 0}};
  for (int i = thread_index() * kUnitBytes; i < bottleneck.bytes; i += kThreads * kUnitBytes) {
    store_shared(memory + bottleneck.begin + i, zeros);
  }
}

template <class T, Source kSource, int kRows>
DEVICE void run_pass(const Params &p, const Block &block, int index, int end, std::uint32_t memory) {
  const Pass pass = p.plan.passes[index];
  float sums[kRows][4][4];
  multiply_pass<T, kSource, kRows>(p, block, pass, memory, sums);
  if (index + 1 < end) begin_pass<T>(p, block, p.plan.passes[index + 1], memory); // while this one's sums are stored
  store_pass<T, kSource, kRows>(p, block, pass, memory, sums);
}

template <class T, Source kSource>
DEVICE void run_pass(const Params &p, const Block &block, int index, int end, std::uint32_t memory) {
  switch (p.plan.passes[index].row_fragments) {
  case 7: return run_pass<T, kSource, 7>(p, block, index, end, memory);
  case 4: return run_pass<T, kSource, 4>(p, block, index, end, memory);
  case 2: return run_pass<T, kSource, 2>(p, block, index, end, memory);
  default: return run_pass<T, kSource, 1>(p, block, index, end, memory);
  }
}

template <class T> DEVICE void inception_block(const Params &p) {
  const Plan &plan = p.plan;
  const std::uint32_t memory = shared_memory();
  const Block block = block_of(p, block_index());
  const int begin = plan.pass_begin[block.split], end = plan.pass_begin[block.split + 1];
  if (begin == end) return;
  begin_pass<T>(p, block, plan.passes[begin], memory);
  bool pooling = true;
  NO_UNROLL for (int index = begin; index < end; index++) {
    const int product = plan.passes[index].product;
    if (pooling && product != kPoolProj) {
      pooling = false; // and what lay in the place of the bottlenecks is not read any more
      fill_with_zeros(plan.bottlenecks[0], memory);
      fill_with_zeros(plan.bottlenecks[1], memory);
    }
    if (product == kPoolProj) {
      run_pass<T, Source::kPooled>(p, block, index, end, memory);
    } else if (product == kShared) {
      run_pass<T, Source::kInput>(p, block, index, end, memory);
    } else {
      run_pass<T, Source::kBottleneck>(p, block, index, end, memory);
    }
  }
}

} // namespace googlenet_fused
