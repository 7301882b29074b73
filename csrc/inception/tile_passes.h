// How the products of a tile are covered with passes, and their columns shared among splits, at the least cost.
#pragma once

#include <algorithm>
#include <array>
#include <limits>
#include <vector>

#include "tile_cuts.h"
#include "tile_plan.h"

namespace googlenet_fused::planning {

constexpr int kWarpRows[] = {2, 4, 8};
constexpr int kShapes = 3;       // of passes: as many as kWarpRows
constexpr int kMaxRowUnits = 41; // the region of a tile of 1x256 pixels and 2 around it: 1300 rows in units of 32
constexpr int kMaxGroups = 64;   // of columns that splits are made of
constexpr int kAnyRows = INT_MAX / 2;
constexpr std::int64_t kNever = std::numeric_limits<std::int64_t>::max() / 8;

constexpr int columns_of_warps(int warp_rows) { return kWarps / warp_rows * kWarpColumns; }

inline Pass pass_of(int product, int fragments, int warp_rows, int halo, int row, int column, int end) {
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
      const std::array<int, 2> breaks = {(end - sizes_.shared_ends[0]) / kUnitColumns,
                                         (end - sizes_.shared_ends[1]) / kUnitColumns};
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
      for (int last = first + 1; last <= groups_; last++) {
        cycles[first * (groups_ + 1) + last] = covers.cycles(share(first, last));
      }
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

} // namespace googlenet_fused::planning
