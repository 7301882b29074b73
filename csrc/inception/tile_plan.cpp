#include "tile_plan.h"

#include <algorithm>
#include <array>
#include <climits>
#include <cstdio>
#include <limits>
#include <optional>
#include <stdexcept>

#include "cost_model.h"
#include "fill_params.h"

namespace googlenet_fused {
namespace {

constexpr int kWarpRows[] = {2, 4, 8};
constexpr int kShapes = 3;                  // of passes: as many as kWarpRows
constexpr int kMaxWidth = 1 << 24;          // of a convolution, so that bytes of K fit in 32 bits
constexpr int kMaxSide = 1 << 30;           // of an image
constexpr int kMaxRowUnits = 41;            // the region of a tile of 1x256 pixels and 2 around it: 1300 rows in units of 32
constexpr int kMaxGroups = 64;              // of columns that splits are made of
constexpr int kMostConflicts = 5;           // per cent of wavefronts that are not worth more memory
constexpr std::int64_t kNever = std::numeric_limits<std::int64_t>::max() / 8;
constexpr int kAnyRows = INT_MAX / 2;

constexpr const char *kProductNames[] = {"pool_proj", "shared", "ch3x3", "ch5x5"};

template <class... Values> std::string format(const char *pattern, Values... values) {
  const int length = std::snprintf(nullptr, 0, pattern, values...);
  std::string text(length + 1, '\0');
  std::snprintf(text.data(), text.size(), pattern, values...);
  text.pop_back();
  return text;
}

template <class... Values> [[noreturn]] void refuse(const char *pattern, Values... values) {
  throw std::invalid_argument(format(pattern, values...));
}

std::int64_t round_up(std::int64_t value, std::int64_t unit) { return ceil_div(value, unit) * unit; }

int columns_of_warps(int warp_rows) { return kWarps / warp_rows * kWarpColumns; }

struct Sizes {
  int bytes; // of an element
  Product products[kProducts];
  int shared_ends[3];
  Bottleneck bottlenecks[2]; // channels, padded_channels, kernel, halo and pixel_bytes
  std::int64_t weight_bytes;
  std::int64_t biases;
  double wanted; // products an output pixel
};

void check(const Problem &p) {
  const struct {
    const char *name;
    int value, most;
  } fields[] = {
      {"batch", p.batch, INT_MAX},           {"height", p.height, kMaxSide},        {"width", p.width, kMaxSide},
      {"in_channels", p.in_channels, kMaxWidth}, {"ch1x1", p.ch1x1, kMaxWidth},     {"ch3x3red", p.ch3x3red, kMaxWidth},
      {"ch3x3", p.ch3x3, kMaxWidth},         {"ch5x5red", p.ch5x5red, kMaxWidth},   {"ch5x5", p.ch5x5, kMaxWidth},
      {"pool_proj", p.pool_proj, kMaxWidth},
  };
  for (const auto &field : fields) {
    if (field.value < 1 || field.value > field.most) {
      refuse("%s is %d, must be 1 to %d", field.name, field.value, field.most);
    }
  }
  if (p.large_kernel != 3 && p.large_kernel != 5) refuse("large_kernel is %d, must be 3 or 5", p.large_kernel);
}

void check(const Device &device) {
  if (device.multiprocessors < 1) refuse("a device of %d multiprocessors", device.multiprocessors);
  if (device.shared_memory < 0) refuse("a device of %d bytes of shared memory", device.shared_memory);
}

Sizes sizes_of(const Problem &p) {
  check(p);
  Sizes sizes = {};
  sizes.bytes = element_bytes(p.element);
  const int step = kStepBytes / sizes.bytes;
  const int reduced[] = {p.ch3x3red, p.ch5x5red}, kernels[] = {3, p.large_kernel};
  for (int branch = 0; branch < 2; branch++) {
    Bottleneck &bottleneck = sizes.bottlenecks[branch];
    bottleneck.channels = reduced[branch];
    bottleneck.padded_channels = static_cast<int>(round_up(reduced[branch], step));
    bottleneck.kernel = kernels[branch];
    bottleneck.halo = kernels[branch] / 2;
    bottleneck.pixel_bytes = bottleneck.padded_channels * sizes.bytes + kUnitBytes;
  }
  sizes.shared_ends[0] = static_cast<int>(round_up(p.ch1x1, kUnitColumns));
  sizes.shared_ends[1] = sizes.shared_ends[0] + sizes.bottlenecks[0].padded_channels;
  sizes.shared_ends[2] = sizes.shared_ends[1] + sizes.bottlenecks[1].padded_channels;

  const std::int64_t input_steps = 2 * ceil_div(std::int64_t{p.in_channels} * sizes.bytes, kStageBytes);
  const std::int64_t columns[kProducts] = {p.pool_proj, sizes.shared_ends[2], p.ch3x3, p.ch5x5};
  std::int64_t steps[kProducts] = {input_steps, input_steps, 0, 0};
  for (int branch = 0; branch < 2; branch++) {
    const Bottleneck &bottleneck = sizes.bottlenecks[branch];
    steps[kSpatial3 + branch] = std::int64_t{bottleneck.kernel} * bottleneck.kernel * (bottleneck.padded_channels / step);
  }
  for (int i = 0; i < kProducts; i++) {
    Product &product = sizes.products[i];
    product.weights = sizes.weight_bytes;
    product.bias = static_cast<int>(sizes.biases);
    product.columns = static_cast<int>(round_up(columns[i], kUnitColumns));
    product.steps = static_cast<int>(steps[i]);
    sizes.weight_bytes += ceil_div(steps[i], 2) * product.columns * kStageBytes;
    sizes.biases += product.columns;
  }
  sizes.wanted = static_cast<double>(p.in_channels) * (double{1} * p.ch1x1 + p.ch3x3red + p.ch5x5red + p.pool_proj) +
                 9.0 * p.ch3x3red * p.ch3x3 + 1.0 * p.large_kernel * p.large_kernel * p.ch5x5red * p.ch5x5;
  return sizes;
}

struct Cut {
  int images, rows, columns; // of a tile
  int image_tiles, row_tiles, column_tiles;
  int pixels;         // of a tile
  int region_rows[3]; // pixels of a tile with 0, 1 and 2 around it, of the largest, cut off at the image's borders
  Bottleneck bottlenecks[2]; // begin counted from the end of the ring
  std::int64_t bottleneck_bytes;

  std::int64_t tiles() const { return std::int64_t{image_tiles} * row_tiles * column_tiles; }
};

// The longest stretch of one dimension that a tile and its halo cover within the image.
int longest(int tile, int tiles, int side, int halo) {
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

// Wavefronts in which ldmatrix reads a tile's pixels, whatever the tap and however they are ordered: eight at a time, each of which
// has another index mod 8.
int wavefronts(const Cut &cut, const Bottleneck &bottleneck) {
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

// Distances of rows and images: those that take the least memory among those that take few wavefronts.
void set_distances(const Cut &cut, Bottleneck &bottleneck) {
  const int halo = bottleneck.halo, shared = cut.column_tiles == 1 ? 1 : 2;
  Bottleneck tried = bottleneck;
  int least_waves = INT_MAX, least_pixels = INT_MAX;
  for (int row = 0; row < 8; row++) {
    tried.row_pixels = cut.columns + shared * halo + row;
    if (tried.row_pixels % 8 == 0) continue;
    for (int image = 0; image < (cut.images > 1 ? 8 : 1); image++) {
      tried.image_pixels = (cut.rows + halo) * tried.row_pixels + image;
      const int pixels = (cut.images - 1) * tried.image_pixels + (cut.rows - 1 + 2 * halo) * tried.row_pixels + cut.columns + 2 * halo;
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

Cut cut_of(const Problem &problem, const Sizes &sizes, int images, int rows, int columns) {
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
    const std::int64_t pixels = std::int64_t{images - 1} * bottleneck.image_pixels +
                                (rows - 1 + 2 * bottleneck.halo) * bottleneck.row_pixels + columns + 2 * bottleneck.halo;
    const std::int64_t bytes = pixels * bottleneck.pixel_bytes;
    bottleneck.begin = static_cast<int>(std::min<std::int64_t>(round_up(cut.bottleneck_bytes, 128), INT_MAX));
    bottleneck.bytes = static_cast<int>(std::min<std::int64_t>(bytes, INT_MAX));
    cut.bottleneck_bytes = round_up(cut.bottleneck_bytes, 128) + bytes;
    cut.bottlenecks[branch] = bottleneck;
  }
  return cut;
}

Pass pass_of(int product, int fragments, int warp_rows, int halo, int row, int column, int end) {
  const auto byte = [](int value) { return static_cast<std::uint8_t>(value); };
  return {byte(product), byte(fragments), byte(warp_rows), byte(halo), row, column, end};
}

// Rows covered from the first with passes of one width. ``cycles`` and ``fragments`` by how many units of rows are left: what
// covers them costs, and the first pass of it.
struct RowCover {
  int units = 0;
  std::array<std::int64_t, kMaxRowUnits + 1> cycles;
  std::array<std::uint8_t, kMaxRowUnits + 1> fragments;

  std::int64_t all() const { return cycles[units]; }
};

// ``most_rows``: where the last pass must end. ``cost(fragments, begin)``: of a pass, kNever if it is not allowed.
template <class Cost> RowCover cover_rows(int rows, int warp_rows, int most_rows, const Cost &cost) {
  const int unit = kFragmentRows * warp_rows;
  RowCover cover;
  cover.units = static_cast<int>(ceil_div(rows, unit));
  cover.cycles[0] = 0;
  for (int left = 1; left <= cover.units; left++) {
    const int begin = (cover.units - left) * unit;
    cover.cycles[left] = kNever;
    cover.fragments[left] = 0;
    for (int fragments : kRowFragments) {
      if (begin + fragments * unit > most_rows) continue;
      const std::int64_t total = cost(fragments, begin) + cover.cycles[std::max(left - fragments, 0)];
      if (total < cover.cycles[left]) {
        cover.cycles[left] = total;
        cover.fragments[left] = static_cast<std::uint8_t>(fragments);
      }
    }
  }
  return cover;
}

// Columns covered from the first with strips as wide as passes, by how many units of columns are left: what covers them costs,
// the first strip, and what that leaves.
struct ColumnCover {
  std::vector<std::int64_t> cycles;
  std::vector<std::uint8_t> shapes;
  std::vector<int> after;

  // ``strip(shape, left, after)``: cycles of a strip's passes. ``breaks``: what may be left of a strip cut short.
  template <class Strip> void fill(int units, int unit_columns, const std::array<int, 2> &breaks, const Strip &strip) {
    cycles.assign(units + 1, kNever);
    shapes.assign(units + 1, 0);
    after.assign(units + 1, 0);
    cycles[0] = 0;
    for (int left = 1; left <= units; left++) {
      for (int shape = 0; shape < kShapes; shape++) {
        const int full = std::max(left - columns_of_warps(kWarpRows[shape]) / unit_columns, 0);
        for (int stop : {full, breaks[0], breaks[1]}) {
          if (stop < full || stop >= left) continue;
          const std::int64_t total = strip(shape, left, stop) + cycles[stop];
          if (total < cycles[left]) {
            cycles[left] = total;
            shapes[left] = static_cast<std::uint8_t>(shape);
            after[left] = stop;
          }
        }
      }
    }
  }
};

// A split's share of the output columns of each product, in numbers of kWarpColumns: kShared's are ch1x1's.
struct Share {
  int begin[kProducts], end[kProducts];

  int count(int product) const { return end[product] - begin[product]; }
  bool needs(int branch) const { return count(kSpatial3 + branch) > 0; }
};

// The cheapest passes for any share of the columns, for one cut, ring and rate of loads.
class Covers {
public:
  Covers(const Problem &problem, const Sizes &sizes, const Cut &cut, const Device &device, const Pace &pace)
      : sizes_(sizes), cut_(cut), pace_(pace) {
    counts_[kPoolProj] = static_cast<int>(ceil_div(sizes.products[kPoolProj].columns, kWarpColumns));
    counts_[kShared] = static_cast<int>(ceil_div(sizes.shared_ends[0], kWarpColumns));
    counts_[kSpatial3] = static_cast<int>(ceil_div(problem.ch3x3, kWarpColumns));
    counts_[kSpatial5] = static_cast<int>(ceil_div(problem.ch5x5, kWarpColumns));
    slot_limit_ = (device.shared_memory - cut.bottleneck_bytes) / pace.stages;
    if (slot_limit_ < 0) slot_limit_ = 0;
    cover_pool(device.shared_memory);
    cover_shared();
    for (int branch = 0; branch < 2; branch++) {
      const int product = kSpatial3 + branch;
      for (int shape = 0; shape < kShapes; shape++) {
        spatial_rows_[branch][shape] = cover(product, shape, cut.pixels, kAnyRows);
      }
      fill_columns(product, [&](int shape, int, int) { return spatial_rows_[branch][shape].all(); });
    }
    fixed_ = kCostModel.block + cut.bottleneck_bytes / kCostModel.shared_bytes;
  }

  int count(int product) const { return counts_[product]; }
  int total() const { return counts_[0] + counts_[1] + counts_[2] + counts_[3]; }

  // Whether there is a ring that pooling has place for, and one beside the bottlenecks.
  bool pool_fits() const { return columns_[kPoolProj].cycles.back() < kNever; }
  bool rest_fits() const { return run_[1].cycles.back() < kNever && columns_[kSpatial3].cycles.back() < kNever; }

  std::int64_t cycles(const Share &share) const {
    std::int64_t sum = fixed_;
    for (int product : {kPoolProj, kSpatial3, kSpatial5}) sum += columns_[product].cycles[share.count(product)];
    if (share.needs(0) || share.needs(1)) {
      const int branch = share.needs(1);
      sum += run_[branch].cycles[(sizes_.shared_ends[1 + branch] - run_begin(share)) / kUnitColumns];
    } else {
      sum += columns_[kShared].cycles[share.count(kShared)];
    }
    return std::min(sum, kNever);
  }

  template <class Take> void passes(const Share &share, const Take &take) const {
    const auto strips = [&](int product, const RowCover(&rows)[kShapes]) {
      const ColumnCover &cover = columns_[product];
      const int columns = product == kShared ? sizes_.shared_ends[0] : sizes_.products[product].columns;
      for (int left = share.count(product); left > 0; left = cover.after[left]) {
        const int column = (share.end[product] - left) * kWarpColumns;
        const int end = std::min((share.end[product] - cover.after[left]) * kWarpColumns, columns);
        emit(product, rows[cover.shapes[left]], cover.shapes[left], 0, column, end, take);
      }
    };
    strips(kPoolProj, pool_rows_);
    if (share.needs(0) || share.needs(1)) {
      const int branch = share.needs(1), end = sizes_.shared_ends[1 + branch];
      const ColumnCover &cover = run_[branch];
      for (int left = (end - run_begin(share)) / kUnitColumns; left > 0; left = cover.after[left]) {
        const int stop = end - cover.after[left] * kUnitColumns, halo = halo_before(stop), shape = cover.shapes[left];
        emit(kShared, shared_rows_[halo][shape], shape, halo, end - left * kUnitColumns, stop, take);
      }
    } else {
      strips(kShared, shared_rows_[0]);
    }
    strips(kSpatial3, spatial_rows_[0]);
    strips(kSpatial5, spatial_rows_[1]);
  }

private:
  template <class Strip> void fill_columns(int product, const Strip &strip) {
    columns_[product].fill(counts_[product], kWarpColumns, {-1, -1}, strip);
  }

  // Where the columns of kShared that a split needs begin, if it needs a bottleneck. They are always side by side.
  int run_begin(const Share &share) const {
    if (share.count(kShared) > 0) return share.begin[kShared] * kWarpColumns;
    return share.needs(0) ? sizes_.shared_ends[0] : sizes_.shared_ends[1];
  }

  // Of the columns of kShared that end at ``end``.
  int halo_before(int end) const {
    if (end <= sizes_.shared_ends[0]) return 0;
    return sizes_.bottlenecks[end > sizes_.shared_ends[1] ? 1 : 0].halo;
  }

  RowCover cover(int product, int shape, int rows, int most_rows) const {
    const int warp_rows = kWarpRows[shape];
    const int input = product == kPoolProj ? cut_.region_rows[1] : 0, pooled = product == kPoolProj ? cut_.pixels : 0;
    return cover_rows(rows, warp_rows, most_rows, [&](int fragments, int begin) {
      const Pass pass = pass_of(product, fragments, warp_rows, 0, begin, 0, 0);
      if (product != kPoolProj && slot_bytes(pass) > slot_limit_) return kNever;
      const int loaded = product == kShared ? std::min(rows - begin, rows_of(pass)) : input;
      return work_of(pass, sizes_.products[product].steps, loaded, pooled, pace_).cycles;
    });
  }

  static std::int64_t slot_bytes(const Pass &pass) {
    return std::int64_t{columns_of(pass) + (pass.product == kShared ? rows_of(pass) : 0)} * kStageBytes;
  }

  // The widest strips whose ring leaves place for the pooled rows of a stage.
  void cover_pool(std::int64_t shared_memory) {
    int widest = 0;
    std::int64_t most_rows = 0;
    for (; widest < kShapes; widest++) {
      const std::int64_t slot = std::int64_t{columns_of_warps(kWarpRows[widest]) + cut_.region_rows[1]} * kStageBytes;
      most_rows = (shared_memory - round_up(slot * pace_.stages, 128)) / kStageBytes;
      if (most_rows >= round_up(cut_.pixels, kFragmentRows * kWarpRows[widest])) break;
    }
    for (int shape = widest; shape < kShapes; shape++) {
      pool_rows_[shape] = cover(kPoolProj, shape, cut_.pixels, static_cast<int>(std::min<std::int64_t>(most_rows, kAnyRows)));
    }
    fill_columns(kPoolProj, [&](int shape, int, int) { return shape < widest ? kNever : pool_rows_[shape].all(); });
  }

  void cover_shared() {
    for (int halo = 0; halo < 3; halo++) {
      for (int shape = 0; shape < kShapes; shape++) {
        const bool same = halo > 0 && cut_.region_rows[halo] == cut_.region_rows[halo - 1];
        shared_rows_[halo][shape] =
            same ? shared_rows_[halo - 1][shape] : cover(kShared, shape, cut_.region_rows[halo], kAnyRows);
      }
    }
    fill_columns(kShared, [&](int shape, int, int) { return shared_rows_[0][shape].all(); });
    for (int branch = 0; branch < 2; branch++) {
      const int end = sizes_.shared_ends[1 + branch];
      const std::array<int, 2> breaks = {(end - sizes_.shared_ends[0]) / kUnitColumns, (end - sizes_.shared_ends[1]) / kUnitColumns};
      run_[branch].fill(end / kUnitColumns, kUnitColumns, breaks, [&](int shape, int, int after) {
        return shared_rows_[halo_before(end - after * kUnitColumns)][shape].all();
      });
    }
  }

  template <class Take>
  void emit(int product, const RowCover &rows, int shape, int halo, int column, int end, const Take &take) const {
    const int warp_rows = kWarpRows[shape];
    int row = 0;
    for (int left = rows.units; left > 0;) {
      const int fragments = rows.fragments[left];
      take(pass_of(product, fragments, warp_rows, halo, row, column, end));
      row += fragments * kFragmentRows * warp_rows;
      left -= fragments;
    }
  }

  const Sizes &sizes_;
  const Cut &cut_;
  Pace pace_;
  std::int64_t slot_limit_, fixed_;
  int counts_[kProducts];
  RowCover pool_rows_[kShapes], shared_rows_[3][kShapes], spatial_rows_[2][kShapes];
  ColumnCover columns_[kProducts]; // kShared's are ch1x1's, alone
  ColumnCover run_[2];             // of kShared, up to the end of ch3x3red and of ch5x5red
};

// The columns of all products as one row of groups, and the best places to cut it.
class Splits {
public:
  explicit Splits(const Covers &covers) : covers_(covers) {
    width_ = static_cast<int>(ceil_div(covers.total(), kMaxGroups - kProducts));
    for (int product = 0; product < kProducts; product++) {
      begin_[product] = groups_;
      groups_ += static_cast<int>(ceil_div(covers.count(product), width_));
    }
    std::vector<std::int64_t> cycles(static_cast<std::size_t>(groups_) * (groups_ + 1));
    for (int first = 0; first < groups_; first++) {
      for (int last = first + 1; last <= groups_; last++) cycles[first * (groups_ + 1) + last] = covers.cycles(share(first, last));
    }
    for (int last = 0; last <= groups_; last++) worst_[0][last] = last == 0 ? 0 : kNever;
    for (int splits = 1; splits <= most(); splits++) {
      for (int last = 0; last <= groups_; last++) {
        worst_[splits][last] = kNever;
        for (int first = splits - 1; first < last; first++) {
          const std::int64_t worst = std::max(worst_[splits - 1][first], cycles[first * (groups_ + 1) + last]);
          if (worst < worst_[splits][last]) {
            worst_[splits][last] = worst;
            cut_[splits][last] = static_cast<std::uint8_t>(first);
          }
        }
      }
    }
  }

  int most() const { return std::min(groups_, kMaxSplits); }

  // Of the slowest of so many splits.
  std::int64_t cycles(int splits) const { return worst_[splits][groups_]; }

  std::vector<Share> shares(int splits) const {
    std::vector<Share> found(splits);
    for (int last = groups_; splits > 0; splits--) {
      const int first = cut_[splits][last];
      found[splits - 1] = share(first, last);
      last = first;
    }
    return found;
  }

private:
  Share share(int first, int last) const {
    Share share;
    for (int product = 0; product < kProducts; product++) {
      const int count = covers_.count(product);
      share.begin[product] = std::clamp((first - begin_[product]) * width_, 0, count);
      share.end[product] = std::clamp((last - begin_[product]) * width_, 0, count);
    }
    return share;
  }

  const Covers &covers_;
  int groups_ = 0, width_;
  int begin_[kProducts];
  std::int64_t worst_[kMaxSplits + 1][kMaxGroups + 1];
  std::uint8_t cut_[kMaxSplits + 1][kMaxGroups + 1];
};

// Rows of a spatial product in an order in which each eight are different pixels mod 8, as far as there are such. The first pixel
// is the last of its residue, since rows past the last read it.
void set_order(const Cut &cut, const Bottleneck &bottleneck, std::uint8_t (&order)[kMaxTilePixels]) {
  std::array<std::array<std::uint8_t, kMaxTilePixels>, 8> residues;
  int counts[8] = {}, taken[8] = {};
  for (int pixel = 0; pixel < cut.pixels; pixel++) {
    const int line = pixel / cut.columns, image = line / cut.rows;
    const int place = image * bottleneck.image_pixels + line % cut.rows * bottleneck.row_pixels + pixel % cut.columns;
    residues[place % 8][counts[place % 8]++] = static_cast<std::uint8_t>(pixel);
  }
  for (int row = 0; row < cut.pixels;) {
    bool used[8] = {};
    for (const int end = std::min(row + 8, cut.pixels); row < end; row++) {
      int best = -1;
      for (int residue = 0; residue < 8; residue++) {
        const int left = counts[residue] - taken[residue];
        if (left == 0) continue;
        const bool better = best < 0 || used[best] > used[residue] ||
                            (used[best] == used[residue] && left > counts[best] - taken[best]);
        if (better) best = residue;
      }
      used[best] = true;
      order[row] = residues[best][counts[best] - ++taken[best]];
    }
  }
}

std::string number_of(int count, const char *what) { return format("%d %s%s", count, what, count == 1 ? "" : "s"); }

std::string name_of(const Tile &tile) {
  const std::string pixels = format("%dx%d pixels", tile.rows, tile.columns);
  return tile.images == 1 ? pixels : format("%d images of ", tile.images) + pixels;
}

void check(const Problem &problem, const Tile &tile) {
  if (tile.images < 1 || tile.images > kMaxTilePixels) refuse("a tile of %d images, must be 1 to %d", tile.images, kMaxTilePixels);
  if (tile.rows < 1 || tile.rows > problem.height) {
    refuse("a tile of %d rows, must be 1 to the image's %d", tile.rows, problem.height);
  }
  if (tile.columns < 1 || tile.columns > problem.width) {
    refuse("a tile of %d columns, must be 1 to the image's %d", tile.columns, problem.width);
  }
  if (tile.images > 1 && (tile.rows < problem.height || tile.columns < problem.width)) {
    refuse("a tile of %s is not made of whole images of %dx%d", name_of(tile).c_str(), problem.height, problem.width);
  }
  const std::int64_t lines = std::int64_t{tile.images} * tile.rows;
  if (lines > kMaxTilePixels || lines * tile.columns > kMaxTilePixels) {
    refuse("a tile of %s has %.0f pixels, at most %d", name_of(tile).c_str(), double(lines) * tile.columns, kMaxTilePixels);
  }
  if (tile.splits < 1 || tile.splits > kMaxSplits) refuse("%d splits, must be 1 to %d", tile.splits, kMaxSplits);
  if (tile.stages < 2 || tile.stages > 4) refuse("%d stages, must be 2 to 4", tile.stages);
}

// More passes than this are needed for the widths alone.
void check_widths(const Sizes &sizes) {
  std::int64_t passes = 0;
  for (const Product &product : sizes.products) passes += ceil_div(product.columns, columns_of_warps(2));
  if (passes > kMaxPasses) refuse("the passes of these widths are at least %.0f, at most %d", double(passes), kMaxPasses);
}

void set_memory(const Cut &cut, Plan &plan, int passes) {
  int covered = 0;
  for (int i = 0; i < passes; i++) {
    const Pass &pass = plan.passes[i];
    if (pass.product == kPoolProj) {
      plan.pool_slot_bytes = std::max(plan.pool_slot_bytes, (columns_of(pass) + cut.region_rows[1]) * kStageBytes);
      covered = std::max(covered, pass.row + rows_of(pass));
    } else {
      const int rows = pass.product == kShared ? rows_of(pass) : 0;
      plan.slot_bytes = std::max(plan.slot_bytes, (columns_of(pass) + rows) * kStageBytes);
    }
  }
  for (int branch = 0; branch < 2; branch++) {
    plan.bottlenecks[branch] = cut.bottlenecks[branch];
    plan.bottlenecks[branch].begin += plan.tile.stages * plan.slot_bytes;
  }
  plan.pooled = static_cast<int>(round_up(plan.tile.stages * plan.pool_slot_bytes, 128));
  plan.shared_bytes = std::max(plan.bottlenecks[1].begin + plan.bottlenecks[1].bytes, plan.pooled + covered * kStageBytes);
}

// The plan of a cut and a number of splits, or none if its passes are too many; their number is then in ``passes``.
std::optional<Plan> make_plan(const Sizes &sizes, const Cut &cut, const Covers &covers, const Splits &splits, const Tile &tile,
                              int &passes) {
  Plan plan = {};
  plan.tile = tile;
  plan.image_tiles = cut.image_tiles;
  plan.row_tiles = cut.row_tiles;
  plan.column_tiles = cut.column_tiles;
  std::copy(std::begin(sizes.products), std::end(sizes.products), plan.products);
  std::copy(std::begin(sizes.shared_ends), std::end(sizes.shared_ends), plan.shared_ends);
  passes = 0;
  const std::vector<Share> shares = splits.shares(tile.splits);
  for (int split = 0; split < tile.splits; split++) {
    covers.passes(shares[split], [&](const Pass &pass) {
      if (passes < kMaxPasses) plan.passes[passes] = pass;
      passes++;
    });
    plan.pass_begin[split + 1] = static_cast<std::uint8_t>(std::min(passes, kMaxPasses));
  }
  if (passes > kMaxPasses) return std::nullopt;
  set_memory(cut, plan, passes);
  return plan;
}

void set_orders(const Cut &cut, Plan &plan) {
  for (int branch = 0; branch < 2; branch++) set_order(cut, plan.bottlenecks[branch], plan.order[branch]);
}

constexpr std::int64_t kMaxBlocks = INT_MAX;

double cycles_of(std::int64_t blocks, const Device &device, std::int64_t block_cycles) {
  return static_cast<double>(ceil_div(blocks, device.multiprocessors)) * static_cast<double>(block_cycles) + kCostModel.launch;
}

// Lengths into which a side can be cut, the longest first: of those that make as many tiles the shortest.
std::vector<int> lengths(int side) {
  std::vector<int> found;
  for (int length = std::min(side, kMaxTilePixels); length > 0; length--) {
    if (ceil_div(side, ceil_div(side, length)) == length) found.push_back(length);
  }
  return found;
}

std::vector<Cut> cuts_of(const Problem &problem, const Sizes &sizes) {
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

// Cycles that tensor cores need for a cut's products, however they are shared out and however well everything else goes.
double least_cycles(const Problem &problem, const Sizes &sizes, const Cut &cut, const Device &device) {
  const double a_cycle = 16.0 * 8 * (kStepBytes / sizes.bytes) / kCostModel.mma;
  double products = cut.pixels * sizes.wanted;
  for (const Bottleneck &bottleneck : sizes.bottlenecks) {
    products += double(cut.region_rows[bottleneck.halo] - cut.pixels) * problem.in_channels * bottleneck.channels;
  }
  return products / a_cycle * cut.tiles() / device.multiprocessors;
}

// Every tile with what it costs; none of a cut that ``skip(cut)`` does without.
template <class Skip, class Take>
void for_each_tile(const Problem &problem, const Sizes &sizes, const Device &device, const std::vector<Cut> &cuts, const Skip &skip,
                   const Take &take) {
  for (const Cut &cut : cuts) {
    if (cut.tiles() > kMaxBlocks || cut.bottleneck_bytes >= device.shared_memory || skip(cut)) continue;
    for (int stages = 4; stages >= 2; stages--) {
      std::optional<Covers> covers;
      std::optional<Splits> splits;
      int l2_bytes = 0;
      for (int count = 1; count <= kMaxSplits; count++) {
        const std::int64_t blocks = cut.tiles() * count;
        if (blocks > kMaxBlocks) break;
        if (const int now = l2_bytes_of(blocks, device.multiprocessors); now != l2_bytes) {
          l2_bytes = now;
          covers.emplace(problem, sizes, cut, device, Pace{stages, l2_bytes});
          if (!covers->pool_fits() || !covers->rest_fits()) break;
          splits.emplace(*covers);
        }
        if (count > splits->most()) break;
        const Tile tile = {cut.images, cut.rows, cut.columns, count, stages};
        take(tile, cut, *covers, *splits, cycles_of(blocks, device, splits->cycles(count)));
      }
    }
  }
}

// Says why no cut fits: of those that are few enough blocks, what the one with the smallest bottlenecks wants.
[[noreturn]] void refuse_all(const Problem &problem, const Device &device, const std::vector<Cut> &cuts) {
  std::int64_t fewest = std::numeric_limits<std::int64_t>::max();
  const Cut *smallest = nullptr;
  for (const Cut &cut : cuts) {
    fewest = std::min(fewest, cut.tiles());
    if (cut.tiles() <= kMaxBlocks && (!smallest || cut.bottleneck_bytes < smallest->bottleneck_bytes)) smallest = &cut;
  }
  if (!smallest) {
    refuse("%d images of %dx%d pixels are %.0f blocks or more, at most %d", problem.batch, problem.height, problem.width,
           double(fewest), INT_MAX);
  }
  plan_tile(problem, device, {smallest->images, smallest->rows, smallest->columns, 1, 2});
  throw std::logic_error("a tile was overlooked");
}

} // namespace

PackedSizes packed_sizes(const Problem &problem) {
  const Sizes sizes = sizes_of(problem);
  if (sizes.biases > INT_MAX) refuse("the widths add up to %.0f, at most %d", double(sizes.biases), INT_MAX);
  return {sizes.weight_bytes, static_cast<int>(sizes.biases)};
}

Plan plan_tile(const Problem &problem, const Device &device, const Tile &tile) {
  const Sizes sizes = sizes_of(problem);
  check(device);
  check(problem, tile);
  check_widths(sizes);
  const Cut cut = cut_of(problem, sizes, tile.images, tile.rows, tile.columns);
  const std::string name = name_of(tile);
  if (cut.tiles() > kMaxBlocks / tile.splits) {
    refuse("tiles of %s in %s are %.0f blocks, at most %d", name.c_str(), number_of(tile.splits, "split").c_str(),
           double(cut.tiles()) * tile.splits, INT_MAX);
  }
  if (cut.bottleneck_bytes >= device.shared_memory) {
    refuse("the bottlenecks of a tile of %s need %.0f bytes of shared memory, of which a block may have %d", name.c_str(),
           double(cut.bottleneck_bytes), device.shared_memory);
  }
  const Pace pace = {tile.stages, l2_bytes_of(cut.tiles() * tile.splits, device.multiprocessors)};
  const Covers covers(problem, sizes, cut, device, pace);
  if (!covers.rest_fits()) {
    refuse("the bottlenecks of a tile of %s need %.0f bytes of shared memory, and %d stages of a ring do not fit beside them in %d",
           name.c_str(), double(cut.bottleneck_bytes), tile.stages, device.shared_memory);
  }
  if (!covers.pool_fits()) {
    refuse("pooling a tile of %s needs %d stages of %d bytes of shared memory, of which a block may have %d", name.c_str(),
           tile.stages, (cut.region_rows[1] + columns_of_warps(8)) * kStageBytes, device.shared_memory);
  }
  const Splits splits(covers);
  if (tile.splits > splits.most()) refuse("%d splits of %d groups of columns", tile.splits, splits.most());
  int passes = 0;
  std::optional<Plan> plan = make_plan(sizes, cut, covers, splits, tile, passes);
  if (!plan) {
    refuse("the passes of a tile of %s in %s are %d, at most %d", name.c_str(), number_of(tile.splits, "split").c_str(), passes,
           kMaxPasses);
  }
  set_orders(cut, *plan);
  return *plan;
}

Plan plan_module(const Problem &problem, const Device &device) {
  const Sizes sizes = sizes_of(problem);
  check(device);
  check_widths(sizes);
  std::vector<Cut> cuts = cuts_of(problem, sizes);
  const auto bound = [&](const Cut &cut) { return least_cycles(problem, sizes, cut, device); };
  std::stable_sort(cuts.begin(), cuts.end(), [&](const Cut &one, const Cut &other) { return bound(one) < bound(other); });
  std::optional<Plan> best;
  const Cut *best_cut = nullptr;
  double best_cycles = 0;
  for_each_tile(
      problem, sizes, device, cuts, [&](const Cut &cut) { return best && bound(cut) > best_cycles; },
      [&](const Tile &tile, const Cut &cut, const Covers &covers, const Splits &splits, double cycles) {
        if (best && cycles > best_cycles) return;
        int passes = 0;
        const std::optional<Plan> plan = make_plan(sizes, cut, covers, splits, tile, passes);
        if (!plan) return;
        if (best && cycles == best_cycles) {
          if (plan->shared_bytes > best->shared_bytes) return;
          if (plan->shared_bytes == best->shared_bytes && tile.splits >= best->tile.splits) return;
        }
        best = plan;
        best_cut = &cut;
        best_cycles = cycles;
      });
  if (!best) refuse_all(problem, device, cuts);
  set_orders(*best_cut, *best);
  return *best;
}

std::vector<Tile> tiles_of(const Problem &problem, const Device &device) {
  const Sizes sizes = sizes_of(problem);
  check(device);
  check_widths(sizes);
  std::vector<Tile> found;
  for_each_tile(
      problem, sizes, device, cuts_of(problem, sizes), [](const Cut &) { return false; },
      [&](const Tile &tile, const Cut &cut, const Covers &covers, const Splits &splits, double) {
        int passes = 0;
        if (make_plan(sizes, cut, covers, splits, tile, passes)) found.push_back(tile);
      });
  return found;
}

namespace {

Work work_of_split(const Cut &cut, const Plan &plan, const Pace &pace, int split) {
  Work sum;
  sum.cycles = kCostModel.block + cut.bottleneck_bytes / kCostModel.shared_bytes;
  for (int i = plan.pass_begin[split]; i < plan.pass_begin[split + 1]; i++) {
    const Pass &pass = plan.passes[i];
    const bool pooling = pass.product == kPoolProj;
    int input = pooling ? cut.region_rows[1] : 0;
    if (pass.product == kShared) input = std::min(cut.region_rows[pass.halo] - pass.row, rows_of(pass));
    sum += work_of(pass, plan.products[pass.product].steps, input, pooling ? cut.pixels : 0, pace);
  }
  return sum;
}

} // namespace

Cost cost_of(const Problem &problem, const Device &device, const Plan &plan) {
  const Sizes sizes = sizes_of(problem);
  check(device);
  const Tile &tile = plan.tile;
  const Cut cut = cut_of(problem, sizes, tile.images, tile.rows, tile.columns);
  const std::int64_t blocks = cut.tiles() * tile.splits;
  const Pace pace = {tile.stages, l2_bytes_of(blocks, device.multiprocessors)};
  Work slowest;
  double products = 0;
  for (int split = 0; split < tile.splits; split++) {
    const Work work = work_of_split(cut, plan, pace, split);
    if (work.cycles > slowest.cycles) slowest = work;
    for (int i = plan.pass_begin[split]; i < plan.pass_begin[split + 1]; i++) {
      const Pass &pass = plan.passes[i];
      products += static_cast<double>(rows_of(pass)) * columns_of(pass) * plan.products[pass.product].steps *
                  (kStepBytes / sizes.bytes);
    }
  }
  Cost cost = {};
  cost.block_cycles = static_cast<double>(slowest.cycles);
  cost.waves = static_cast<int>(ceil_div(blocks, device.multiprocessors));
  cost.cycles = cycles_of(blocks, device, slowest.cycles);
  cost.mma = static_cast<double>(slowest.mma);
  cost.shared = static_cast<double>(slowest.shared);
  cost.l2 = static_cast<double>(slowest.l2);
  cost.padding = products * cut.tiles() / (sizes.wanted * problem.batch * problem.height * problem.width);
  return cost;
}

std::string describe(const Problem &problem, const Device &device, const Plan &plan) {
  constexpr const char *elements[] = {"fp16", "bf16", "tf32"};
  const Tile &tile = plan.tile;
  const Cost cost = cost_of(problem, device, plan);
  std::string text;
  const auto line = [&](const std::string &one) { text += one + "\n"; };
  line(format("%s, batch %d, %dx%d, %d channels to ch1x1 %d, ch3x3red %d, ch3x3 %d, ch5x5red %d, ch5x5 %d (%dx%d), pool_proj %d",
              elements[static_cast<int>(problem.element)], problem.batch, problem.height, problem.width, problem.in_channels,
              problem.ch1x1, problem.ch3x3red, problem.ch3x3, problem.ch5x5red, problem.ch5x5, problem.large_kernel,
              problem.large_kernel, problem.pool_proj));
  line(format("%d multiprocessors, %d bytes of shared memory a block", device.multiprocessors, device.shared_memory));
  line(format("tile: %s of %dx%d pixels, %s, a ring of %d stages", number_of(tile.images, "image").c_str(), tile.rows,
              tile.columns, number_of(tile.splits, "split").c_str(), tile.stages));
  const std::int64_t tiles = std::int64_t{plan.image_tiles} * plan.row_tiles * plan.column_tiles;
  line(format("grid: %d x %d x %d tiles of images, rows and columns, %s: %.0f blocks, %s", plan.image_tiles, plan.row_tiles,
              plan.column_tiles, number_of(tile.splits, "split").c_str(), double(tiles) * tile.splits,
              number_of(cost.waves, "wave").c_str()));
  line(format("shared memory: %d bytes", plan.shared_bytes));
  const auto memory = [&](int begin, int end, const std::string &what) { line(format("  %7d - %7d  ", begin, end) + what); };
  memory(0, tile.stages * plan.slot_bytes, format("ring, slots of %d", plan.slot_bytes));
  for (int branch = 0; branch < 2; branch++) {
    const Bottleneck &one = plan.bottlenecks[branch];
    memory(one.begin, one.begin + one.bytes,
           format("%s, pixels of %d, rows of %d, images of %d pixels", branch == 0 ? "ch3x3red" : "ch5x5red", one.pixel_bytes,
                  one.row_pixels, one.image_pixels));
  }
  memory(0, tile.stages * plan.pool_slot_bytes, format("ring while pooling, slots of %d", plan.pool_slot_bytes));
  memory(plan.pooled, plan.pooled + tile.images * tile.rows * tile.columns * kStageBytes, "pooled rows of a stage");
  line("split  product    rows         columns      warp tile  warps  halo  steps  mma cycles");
  for (int split = 0; split < tile.splits; split++) {
    for (int i = plan.pass_begin[split]; i < plan.pass_begin[split + 1]; i++) {
      const Pass &pass = plan.passes[i];
      const int steps = plan.products[pass.product].steps;
      const auto span = [](int begin, int length) { return format("%d-%d", begin, begin + length); };
      line(format("%5d  %-9s  %-11s  %-11s  %4dx%-4d  %3dx%d  %4d  %5d  %10.0f", split, kProductNames[pass.product],
                  span(pass.row, rows_of(pass)).c_str(), span(pass.column, columns_of(pass)).c_str(),
                  pass.row_fragments * kFragmentRows, kWarpColumns, pass.warp_rows, kWarps / pass.warp_rows, pass.halo, steps,
                  double(work_of(pass, steps, 0, 0, {tile.stages, kCostModel.l2_bytes}).mma)));
    }
  }
  line(format("cost by the model: %.0f cycles, of the slowest block %.0f: tensor cores %.0f, shared memory %.0f, L2 %.0f; %.2f "
              "products computed for each wanted",
              cost.cycles, cost.block_cycles, cost.mma, cost.shared, cost.l2, cost.padding));
  return text;
}

} // namespace googlenet_fused
