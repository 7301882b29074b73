#include "tile_plan.h"

#include <algorithm>
#include <array>
#include <optional>
#include <stdexcept>

#include "fill_params.h"
#include "tile_passes.h"

namespace googlenet_fused {
namespace {

using namespace planning;

constexpr std::int64_t kMaxBlocks = INT_MAX;
constexpr int kSmallestSlot = (64 + 64) * kStageBytes; // of a pass of 64 rows by 64 columns

// Rows of a spatial product in an order in which each eight are different pixels mod 8, as far as there are such. The first
// pixel is the last of its residue, since rows past the last read it.
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
  if (tile.images < 1 || tile.images > kMaxTilePixels) {
    refuse("a tile of %d images, must be 1 to %d", tile.images, kMaxTilePixels);
  }
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

double cycles_of(std::int64_t blocks, const Device &device, std::int64_t block_cycles) {
  return static_cast<double>(ceil_div(blocks, device.multiprocessors)) * static_cast<double>(block_cycles) + kCostModel.launch;
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
void for_each_tile(const Problem &problem, const Sizes &sizes, const Device &device, const std::vector<Cut> &cuts,
                   const Skip &skip, const Take &take) {
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
  return {sizes.weight_bytes, sizes.biases};
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
    refuse("the bottlenecks of a tile of %s need %.0f bytes of shared memory, and beside them %d stages of %d or more, "
           "of which a block may have %d",
           name.c_str(), double(cut.bottleneck_bytes), tile.stages, kSmallestSlot, device.shared_memory);
  }
  if (!covers.pool_fits()) {
    const int rows = static_cast<int>(round_up(cut.pixels, kFragmentRows * 8));
    refuse("pooling a tile of %s needs %d stages of %d bytes of shared memory and %d more, of which a block may have %d",
           name.c_str(), tile.stages, (cut.region_rows[1] + columns_of_warps(8)) * kStageBytes, rows * kStageBytes,
           device.shared_memory);
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
  constexpr const char *products[] = {"pool_proj", "shared", "ch3x3", "ch5x5"};
  const Tile &tile = plan.tile;
  const Cost cost = cost_of(problem, device, plan);
  std::string text;
  const auto line = [&](const std::string &one) { text += one + "\n"; };
  const char *element = elements[static_cast<int>(problem.element)];
  line(format("%s, batch %d, %dx%d, ", element, problem.batch, problem.height, problem.width) +
       format("%d channels to ch1x1 %d, ch3x3red %d, ch3x3 %d, ch5x5red %d, ", problem.in_channels, problem.ch1x1,
              problem.ch3x3red, problem.ch3x3, problem.ch5x5red) +
       format("ch5x5 %d (%dx%d), pool_proj %d", problem.ch5x5, problem.large_kernel, problem.large_kernel, problem.pool_proj));
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
      line(format("%5d  %-9s  %-11s  %-11s  %4dx%-4d  %3dx%d  %4d  %5d  %10.0f", split, products[pass.product],
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
