// The simulation and the planner for Python: ``googlenet_fused.backends.cuda._host_sim``.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "checks.h"
#include "simulate.h"

namespace py = pybind11;

namespace googlenet_fused::sim {
namespace {

[[noreturn]] void refuse(const std::string &what) { throw py::value_error(what); }

template <class Value> Value field_of(const py::dict &from, const char *whose, const char *name, const char *what) {
  if (!from.contains(name)) refuse(std::string(whose) + " lacks " + name);
  try {
    return from[name].cast<Value>();
  } catch (const py::cast_error &) {
    refuse(std::string(whose) + "'s " + name + " is " + py::repr(from[name]).cast<std::string>() + "; it is to be " + what);
  }
}

int number(const py::dict &from, const char *whose, const char *name) {
  return field_of<int>(from, whose, name, "an integer of 32 bits");
}

Element element_of(const std::string &name) {
  if (name == "fp16") return Element::kHalf;
  if (name == "bf16") return Element::kBFloat16;
  if (name == "tf32") return Element::kTf32;
  refuse("element is '" + name + "'; it is to be fp16, bf16 or tf32");
}

Problem problem_of(const py::dict &from) {
  const auto field = [&](const char *name) { return number(from, "problem", name); };
  const auto element = field_of<std::string>(from, "problem", "element", "fp16, bf16 or tf32");
  return {element_of(element), field("batch"), field("height"), field("width"),
          field("in_channels"), field("ch1x1"), field("ch3x3red"), field("ch3x3"), field("ch5x5red"), field("ch5x5"),
          field("pool_proj"), field("large_kernel")};
}

Device device_of(const py::dict &from) {
  return {number(from, "device", "multiprocessors"), number(from, "device", "shared_memory")};
}

std::optional<Tile> tile_of(const std::optional<py::dict> &from) {
  if (!from) return std::nullopt;
  const auto field = [&](const char *name) { return number(*from, "tile", name); };
  return Tile{field("images"), field("rows"), field("columns"), field("splits"), field("stages")};
}

py::dict as_dict(const Tile &tile) {
  py::dict found;
  found["images"] = tile.images;
  found["rows"] = tile.rows;
  found["columns"] = tile.columns;
  found["splits"] = tile.splits;
  found["stages"] = tile.stages;
  return found;
}

Plan plan_of(const Problem &problem, const Device &device, const std::optional<Tile> &tile) {
  return tile ? plan_tile(problem, device, *tile) : plan_module(problem, device);
}

py::dict as_dict(const Problem &problem, const Device &device, const Plan &plan) {
  py::dict found;
  found["tile"] = as_dict(plan.tile);
  found["row_tiles"] = plan.row_tiles;
  found["column_tiles"] = plan.column_tiles;
  found["image_tiles"] = plan.image_tiles;
  py::list products, bottlenecks, passes, orders;
  for (const Product &product : plan.products) {
    py::dict each;
    each["weights"] = product.weights;
    each["bias"] = product.bias;
    each["columns"] = product.columns;
    each["steps"] = product.steps;
    products.append(each);
  }
  for (const Bottleneck &bottleneck : plan.bottlenecks) {
    py::dict each;
    each["channels"] = bottleneck.channels;
    each["padded_channels"] = bottleneck.padded_channels;
    each["kernel"] = bottleneck.kernel;
    each["halo"] = bottleneck.halo;
    each["pixel_bytes"] = bottleneck.pixel_bytes;
    each["row_pixels"] = bottleneck.row_pixels;
    each["image_pixels"] = bottleneck.image_pixels;
    each["begin"] = bottleneck.begin;
    each["bytes"] = bottleneck.bytes;
    bottlenecks.append(each);
  }
  const int splits = plan.tile.splits;
  for (int i = 0; i < plan.pass_begin[splits]; i++) {
    const Pass &pass = plan.passes[i];
    py::dict each;
    each["product"] = static_cast<int>(pass.product);
    each["row_fragments"] = static_cast<int>(pass.row_fragments);
    each["warp_rows"] = static_cast<int>(pass.warp_rows);
    each["halo"] = static_cast<int>(pass.halo);
    each["row"] = pass.row;
    each["column"] = pass.column;
    each["end"] = pass.end;
    each["rows"] = rows_of(pass);
    each["columns"] = columns_of(pass);
    passes.append(each);
  }
  const int pixels = plan.tile.images * plan.tile.rows * plan.tile.columns;
  for (const auto &order : plan.order) {
    py::list each;
    for (int i = 0; i < pixels; i++) each.append(static_cast<int>(order[i]));
    orders.append(each);
  }
  py::list begins;
  for (int split = 0; split <= splits; split++) begins.append(static_cast<int>(plan.pass_begin[split]));
  found["products"] = products;
  found["shared_ends"] = std::vector<int>(std::begin(plan.shared_ends), std::end(plan.shared_ends));
  found["bottlenecks"] = bottlenecks;
  found["slot_bytes"] = plan.slot_bytes;
  found["pool_slot_bytes"] = plan.pool_slot_bytes;
  found["pooled"] = plan.pooled;
  found["shared_bytes"] = plan.shared_bytes;
  found["pass_begin"] = begins;
  found["passes"] = passes;
  found["order"] = orders;
  const Cost cost = cost_of(problem, device, plan);
  py::dict costs;
  costs["cycles"] = cost.cycles;
  costs["block_cycles"] = cost.block_cycles;
  costs["waves"] = cost.waves;
  costs["mma"] = cost.mma;
  costs["shared"] = cost.shared;
  costs["l2"] = cost.l2;
  costs["padding"] = cost.padding;
  found["cost"] = costs;
  return found;
}

py::dict as_dict(const Counters &counters) {
  py::dict found;
  found["products"] = counters.products;
  found["barriers"] = counters.barriers;
  found["copied_bytes"] = counters.copied_bytes;
  const auto ratio = [&](const char *name, const Ratio &value) { found[name] = py::make_tuple(value.taken, value.least); };
  ratio("ldmatrix_a", counters.ldmatrix_a);
  ratio("ldmatrix_b", counters.ldmatrix_b);
  ratio("shared_loads", counters.shared_loads);
  ratio("shared_stores", counters.shared_stores);
  ratio("copy_writes", counters.copy_writes);
  ratio("global_reads", counters.global_reads);
  ratio("global_writes", counters.global_writes);
  return found;
}

Modes modes_of(const std::string &order, std::uint64_t seed, bool eager, bool races, bool poison, bool count, int threads) {
  Modes modes;
  if (order == "reversed") {
    modes.order = Order::kReversed;
  } else if (order == "shuffled") {
    modes.order = Order::kShuffled;
  } else if (order != "forward") {
    refuse("order is '" + order + "'; it is to be forward, reversed or shuffled");
  }
  modes.seed = seed;
  modes.eager = eager;
  modes.races = races;
  modes.poison = poison;
  modes.count = count;
  if (threads < 1) refuse("threads are " + std::to_string(threads) + "; at least 1");
  modes.threads = threads;
  return modes;
}

std::string shape_of(const py::array &array) { return py::str(array.attr("shape")).cast<std::string>(); }

void check_dtype(const char *name, const py::array &array, const py::dtype &wanted) {
  if (array.dtype().is(wanted) || array.dtype().equal(wanted)) return;
  refuse(std::string(name) + " is " + py::str(array.dtype()).cast<std::string>() + "; it is to be " +
         py::str(wanted).cast<std::string>());
}

// Strides in elements of an array [n, c, h, w] of that shape.
void take_image(const char *name, const py::array &array, const Problem &problem, std::int64_t channels,
                std::int64_t (&strides)[4]) {
  check_dtype(name, array, problem.element == Element::kTf32 ? py::dtype::of<float>() : py::dtype::of<std::uint16_t>());
  const std::int64_t wanted[] = {problem.batch, channels, problem.height, problem.width};
  bool fits = array.ndim() == 4;
  for (int axis = 0; fits && axis < 4; axis++) fits = array.shape(axis) == wanted[axis];
  if (!fits) {
    refuse(std::string(name) + " is " + shape_of(array) + "; it is to be (" + std::to_string(wanted[0]) + ", " +
           std::to_string(wanted[1]) + ", " + std::to_string(wanted[2]) + ", " + std::to_string(wanted[3]) + ")");
  }
  for (int axis = 0; axis < 4; axis++) {
    if (array.strides(axis) < 0 || array.strides(axis) % array.itemsize() != 0) {
      refuse(std::string(name) + " has a stride of " + std::to_string(array.strides(axis)) + " bytes; none may be negative");
    }
    strides[axis] = array.strides(axis) / array.itemsize();
  }
}

Array extent_of(const char *name, const py::array &array) {
  std::int64_t bytes = array.itemsize();
  for (py::ssize_t axis = 0; axis < array.ndim(); axis++) bytes += (array.shape(axis) - 1) * array.strides(axis);
  return {name, array.data(), array.size() == 0 ? 0 : bytes};
}

template <class Number> void check_packed(const char *name, const py::array &array, std::int64_t size) {
  check_dtype(name, array, py::dtype::of<Number>());
  if (array.ndim() != 1 || array.shape(0) != size || array.strides(0) != array.itemsize()) {
    refuse(std::string(name) + " is " + shape_of(array) + "; packed for these widths it is to be (" + std::to_string(size) +
           ",), contiguous");
  }
}

py::dict simulate_arrays(const py::dict &problem, const py::dict &device, const std::optional<py::dict> &tile,
                         const py::array &x, const py::array &weights, const py::array &bias, py::array &out,
                         const std::string &order, std::uint64_t seed, bool eager, bool races, bool poison, bool count,
                         int threads) {
  const Problem p = problem_of(problem);
  const Device d = device_of(device);
  const std::optional<Tile> t = tile_of(tile);
  Pointers pointers{};
  take_image("x", x, p, p.in_channels, pointers.x_strides);
  take_image("out", out, p, out_channels(p), pointers.out_strides);
  const PackedSizes sizes = packed_sizes(p);
  check_packed<std::uint8_t>("weights", weights, sizes.weight_bytes);
  check_packed<float>("bias", bias, sizes.biases);
  if (!out.writeable()) refuse("out is not writeable");
  pointers.x = x.data();
  pointers.out = out.mutable_data();
  pointers.weights = weights.data();
  pointers.bias = static_cast<const float *>(bias.data());
  const Extents extents = {extent_of("x", x), extent_of("weights", weights), extent_of("bias", bias)};
  const Modes modes = modes_of(order, seed, eager, races, poison, count, threads);
  Counters counters;
  {
    const py::gil_scoped_release release;
    counters = simulate(p, d, t, pointers, extents, modes);
  }
  return as_dict(counters);
}

py::array_t<float> multiply_arrays(const std::string &element, const py::array &a, const py::array &b_transposed) {
  const Element kind = element_of(element);
  const int k = kStepBytes / element_bytes(kind);
  const auto check = [&](const char *name, const py::array &array, int rows) {
    check_dtype(name, array, kind == Element::kTf32 ? py::dtype::of<float>() : py::dtype::of<std::uint16_t>());
    const bool contiguous = (array.flags() & py::array::c_style) != 0;
    if (array.ndim() == 2 && array.shape(0) == rows && array.shape(1) == k && contiguous) return;
    refuse(std::string(name) + " is " + shape_of(array) + "; it is to be (" + std::to_string(rows) + ", " + std::to_string(k) + ")");
  };
  check("a", a, kFragmentRows);
  check("b_transposed", b_transposed, kWarpColumns);
  const std::vector<float> result = multiply_fragments(kind, a.data(), b_transposed.data());
  py::array_t<float> found({kFragmentRows, kWarpColumns});
  std::copy(result.begin(), result.end(), found.mutable_data());
  return found;
}

} // namespace
} // namespace googlenet_fused::sim

PYBIND11_MODULE(_host_sim, m) {
  using namespace googlenet_fused;
  using namespace googlenet_fused::sim;
  using namespace pybind11::literals;

  m.doc() = "The CUDA kernel's source, simulated on a CPU, and the planner of its tiles.";
  py::register_exception<SimulationError>(m, "SimulationError", PyExc_RuntimeError);

  m.def("simulate", &simulate_arrays,
        "Runs a module: x [n, in_channels, h, w] and weights and biases as packed, to out [n, out_channels, h, w], in place. fp16 and "
        "bf16 are uint16. Returns what was counted; pairs are what it took and the least possible.",
        "problem"_a, "device"_a, "tile"_a.none(true), "x"_a, "weights"_a, "bias"_a, "out"_a, py::kw_only(), "order"_a = "forward",
        "seed"_a = 0, "eager"_a = false, "races"_a = true, "poison"_a = true, "count"_a = false, "threads"_a = 2);

  m.def(
      "plan",
      [](const py::dict &problem, const py::dict &device, const std::optional<py::dict> &tile) {
        const Problem p = problem_of(problem);
        const Device d = device_of(device);
        return as_dict(p, d, plan_of(p, d, tile_of(tile)));
      },
      "struct Plan, with what it costs by the model.", "problem"_a, "device"_a, "tile"_a = py::none());
  m.def(
      "tiles",
      [](const py::dict &problem, const py::dict &device) {
        py::list found;
        for (const Tile &tile : tiles_of(problem_of(problem), device_of(device))) found.append(as_dict(tile));
        return found;
      },
      "All tiles that the planner weighs.", "problem"_a, "device"_a);
  m.def(
      "describe",
      [](const py::dict &problem, const py::dict &device, const std::optional<py::dict> &tile) {
        const Problem p = problem_of(problem);
        const Device d = device_of(device);
        return describe(p, d, plan_of(p, d, tile_of(tile)));
      },
      "A plan for people.", "problem"_a, "device"_a, "tile"_a = py::none());
  m.def(
      "packed_sizes",
      [](const py::dict &problem) {
        const PackedSizes sizes = packed_sizes(problem_of(problem));
        return py::make_tuple(sizes.weight_bytes, sizes.biases);
      },
      "Bytes of the packed weights and numbers of the packed biases.", "problem"_a);

  m.def("multiply_fragments", &multiply_arrays, "a [16, k] times b [k, 32], given transposed, by one warp: a step of K.",
        "element"_a, "a"_a, "b_transposed"_a);
  m.def("transpose_words", &transpose_lanes, "128 words, four a lane.", "words"_a);
  m.def("load_matrices", &load_lanes, "What ldmatrix.x4 gives, four words a lane, of 16 bytes of each lane.", "rows"_a);
  m.def(
      "multiply_words",
      [](const std::string &element, const std::vector<std::uint32_t> &a, const std::vector<std::uint32_t> &b) {
        return multiply_lanes(element_of(element), a, b);
      },
      "Four mma of a warp on registers: four words a lane of a, two for each mma of b, four sums for each.", "element"_a, "a"_a,
      "b"_a);
  m.def("round_to_tf32", &rounded_to_tf32, "Of the bits of a float.", "bits"_a);
  m.def(
      "larger",
      [](const std::string &element, std::uint32_t one, std::uint32_t other) {
        return larger_of(element_of(element), one, other);
      },
      "Of each two numbers in a word.", "element"_a, "one"_a, "other"_a);
  m.def(
      "pack_pair",
      [](const std::string &element, float low, float high) { return packed_pair(element_of(element), low, high); },
      "Two numbers in a word.", "element"_a, "low"_a, "high"_a);
  m.def(
      "touch_rows", [](int pitch) { return as_dict(touch_rows(pitch)); },
      "What it takes to copy, load and store 32 rows of 16 bytes and to read them by ldmatrix.", "pitch"_a);
  m.def(
      "turns",
      [](const std::string &order, std::uint64_t seed) { return turns(modes_of(order, seed, false, true, true, false, 1)); },
      "64 threads by when they begin, then by when they go on after a barrier.", py::kw_only(), "order"_a = "forward",
      "seed"_a = 0);
  m.def("faults", &faults, "Names for ``provoke``.");
  m.def(
      "provoke",
      [](const std::string &fault, const std::string &order, std::uint64_t seed, bool eager, bool races, bool poison) {
        return as_dict(provoke(fault, modes_of(order, seed, eager, races, poison, false, 1)));
      },
      "Runs a small kernel with that fault.", "fault"_a, py::kw_only(), "order"_a = "forward", "seed"_a = 0, "eager"_a = false,
      "races"_a = true, "poison"_a = true);
}
