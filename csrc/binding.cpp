// The ops of torch.ops.googlenet_fused_cuda: checks of the arguments, and the way from tensors to a launch. Of torch only the
// stable ABI.
#include <algorithm>
#include <array>
#include <climits>
#include <cstdint>
#include <deque>
#include <map>
#include <memory>
#include <mutex>
#include <optional>
#include <sstream>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include <cuda_runtime_api.h>
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/tensor.h>

#include "inception/fill_params.h"
#include "inception/launch.h"
#include "inception/tile_plan.h"

// Weak, so that the library loads beside a torch built without CUDA, which lacks it.
#pragma weak aoti_torch_get_current_cuda_stream

namespace googlenet_fused {
namespace {

using torch::headeronly::DeviceType;
using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using Numbers = std::vector<std::int64_t>;

constexpr std::array kWidths = {"in_channels", "ch1x1", "ch3x3red", "ch3x3", "ch5x5red", "ch5x5", "pool_proj", "large_kernel"};
constexpr std::int64_t kMaxWidth = INT_MAX; // the planner has its own, smaller limit
constexpr Device kNominalDevice = {132, 227 * 1024}; // for meta tensors: an H100
constexpr std::size_t kPlansKept = 256;

template <class... Parts> [[noreturn]] void fail(const Parts &...parts) {
  std::ostringstream text;
  text << "googlenet_fused_cuda: ";
  ((text << parts), ...);
  throw std::runtime_error(text.str());
}

// Calls the planner; what it refuses, it says in words of its own.
template <class Call> auto asking(const Call &call) {
  try {
    return call();
  } catch (const std::invalid_argument &refusal) {
    fail(refusal.what());
  }
}

template <class Values> std::string list(const Values &values) {
  std::ostringstream text;
  const char *separator = "";
  for (const auto value : values) text << std::exchange(separator, ", ") << value;
  return "[" + text.str() + "]";
}

std::string name_of(ScalarType type) {
  switch (type) {
  case ScalarType::Half: return "float16";
  case ScalarType::BFloat16: return "bfloat16";
  case ScalarType::Float: return "float32";
  case ScalarType::Double: return "float64";
  case ScalarType::Byte: return "uint8";
  default: return torch::headeronly::toString(type);
  }
}

std::string name_of(const torch::stable::Device &device) {
  const std::string index = device.has_index() ? ":" + std::to_string(device.index()) : "";
  switch (device.type()) {
  case DeviceType::CUDA: return "cuda" + index;
  case DeviceType::CPU: return "cpu";
  case DeviceType::Meta: return "meta";
  default: return "another device" + index;
  }
}

Element element_of(const Tensor &x) {
  switch (x.scalar_type()) {
  case ScalarType::Half: return Element::kHalf;
  case ScalarType::BFloat16: return Element::kBFloat16;
  case ScalarType::Float: return Element::kTf32;
  default: fail("x is ", name_of(x.scalar_type()), "; it is to be float16, bfloat16 or float32");
  }
}

int to_int(const char *name, std::int64_t value, std::int64_t least, std::int64_t most) {
  if (value < least || value > most) fail(name, " is ", value, "; it is to be ", least, " to ", most);
  return static_cast<int>(value);
}

Problem problem_of(Element element, const std::int64_t (&sizes)[3], const Numbers &widths) {
  if (widths.size() != kWidths.size())
    fail("widths has ", widths.size(), " numbers, ", list(widths), "; it is to have ", kWidths.size(), ", ", list(kWidths));
  int checked[kWidths.size()];
  for (std::size_t i = 0; i < kWidths.size(); i++) checked[i] = to_int(kWidths[i], widths[i], 1, kMaxWidth);
  if (widths.back() != 3 && widths.back() != 5) fail("large_kernel is ", widths.back(), "; it is to be 3 or 5");
  const auto size = [&sizes](const char *name, int i) { return to_int(name, sizes[i], 0, INT_MAX); };
  const auto &[in_channels, ch1x1, ch3x3red, ch3x3, ch5x5red, ch5x5, pool_proj, large_kernel] = checked;
  return {element, size("the batch", 0), size("the height", 1), size("the width", 2), in_channels, ch1x1, ch3x3red, ch3x3,
          ch5x5red, ch5x5, pool_proj, large_kernel};
}

// None: the planner's choice.
std::optional<Tile> tile_of(const Numbers &tile) {
  if (tile.empty()) return std::nullopt;
  if (tile.size() != 5)
    fail("tile has ", tile.size(), " numbers, ", list(tile),
         "; it is to have 5, [images, rows, columns, splits, stages], or none");
  const auto number = [&tile](const char *name, int i) { return to_int(name, tile[i], 1, INT_MAX); };
  return Tile{number("tile's images", 0), number("tile's rows", 1), number("tile's columns", 2), number("tile's splits", 3),
              number("tile's stages", 4)};
}

void check_packed(const char *name, const Tensor &packed, ScalarType type, std::int64_t size) {
  if (packed.scalar_type() != type) fail(name, " is ", name_of(packed.scalar_type()), "; it is to be ", name_of(type));
  if (packed.dim() != 1 || packed.numel() != size)
    fail(name, " is ", list(packed.sizes()), "; packed for these widths it is to be [", size, "]");
  if (!packed.is_contiguous()) fail(name, " is not contiguous");
}

// The problem that the arguments pose, all checked but what the strides and the tile must be.
Problem check(const Tensor &x, const Tensor &weights, const Tensor &bias, const Numbers &widths, const Tensor &out) {
  const auto device = x.device();
  const auto check_device = [&](const char *name, const Tensor &tensor) {
    if (tensor.device() != device)
      fail(name, " is on ", name_of(tensor.device()), ", x on ", name_of(device), "; they are to be on one device");
  };
  check_device("weights", weights);
  check_device("bias", bias);
  check_device("out", out);
  const Element element = element_of(x);
  if (out.scalar_type() != x.scalar_type())
    fail("out is ", name_of(out.scalar_type()), ", x ", name_of(x.scalar_type()), "; they are to be of one dtype");
  if (x.dim() != 4) fail("x is ", list(x.sizes()), "; it is to be [n, in_channels, h, w]");
  const auto sizes = x.sizes();
  const Problem problem = problem_of(element, {sizes[0], sizes[2], sizes[3]}, widths);
  if (sizes[1] != problem.in_channels)
    fail("x is ", list(sizes), "; its channels are to be in_channels, ", problem.in_channels);
  const std::array wanted = {sizes[0], out_channels(problem), sizes[2], sizes[3]};
  const auto out_sizes = out.sizes();
  if (!std::equal(out_sizes.begin(), out_sizes.end(), wanted.begin(), wanted.end()))
    fail("out is ", list(out_sizes), "; for this x and these widths it is to be ", list(wanted));
  Problem of_one_pixel = problem; // weights do not depend on the input's size, which may be zero
  of_one_pixel.batch = of_one_pixel.height = of_one_pixel.width = 1;
  const PackedSizes packed = asking([&] { return packed_sizes(of_one_pixel); });
  check_packed("weights", weights, ScalarType::Byte, packed.weight_bytes);
  check_packed("bias", bias, ScalarType::Float, packed.biases);
  return problem;
}

// Plans are kept, because to plan a module takes longer than to run it.
class Plans {
public:
  std::shared_ptr<const Plan> get(const Problem &p, const Device &device, const std::optional<Tile> &tile) {
    const Tile t = tile.value_or(Tile{});
    const Key key = {static_cast<int>(p.element), p.batch, p.height, p.width, p.in_channels, p.ch1x1, p.ch3x3red, p.ch3x3,
                     p.ch5x5red, p.ch5x5, p.pool_proj, p.large_kernel, device.multiprocessors, device.shared_memory,
                     t.images, t.rows, t.columns, t.splits, t.stages};
    {
      const std::lock_guard lock(mutex_);
      if (const auto found = plans_.find(key); found != plans_.end()) return found->second;
    }
    const auto plan = std::make_shared<const Plan>(tile ? plan_tile(p, device, *tile) : plan_module(p, device));
    const std::lock_guard lock(mutex_);
    if (plans_.emplace(key, plan).second) order_.push_back(key);
    if (order_.size() > kPlansKept) {
      plans_.erase(order_.front());
      order_.pop_front();
    }
    return plan;
  }

private:
  using Key = std::array<int, 19>;
  std::mutex mutex_;
  std::map<Key, std::shared_ptr<const Plan>> plans_;
  std::deque<Key> order_; // the oldest first
};

Plans &plans() {
  static Plans *const kept = new Plans; // never destroyed: threads may outlive the destructors
  return *kept;
}

// The plan and the pointers as the kernel takes them.
Params params_of(const Problem &problem, const Device &device, const Tensor &x, const Tensor &weights, const Tensor &bias,
                 const std::optional<Tile> &tile, const Tensor &out) {
  Pointers pointers{};
  pointers.x = x.const_data_ptr();
  pointers.out = out.mutable_data_ptr();
  pointers.weights = weights.const_data_ptr();
  pointers.bias = static_cast<const float *>(bias.const_data_ptr());
  std::copy_n(x.strides().begin(), 4, pointers.x_strides);
  std::copy_n(out.strides().begin(), 4, pointers.out_strides);
  return asking([&] { return fill_params(problem, *plans().get(problem, device, tile), pointers); });
}

void check_cuda(int error, const char *what) {
  if (error == 0) return;
  cudaGetLastError(); // so that it is not taken for a later call's
  fail(what, " failed: ", error_text(error));
}

// What the planner is to know of a GPU, asked once.
Device device_facts(int index) {
  static std::mutex mutex;
  static auto *const known = new std::map<int, Device>;
  const std::lock_guard lock(mutex);
  if (const auto found = known->find(index); found != known->end()) return found->second;
  const auto attribute = [index](cudaDeviceAttr which) {
    int value = 0;
    check_cuda(cudaDeviceGetAttribute(&value, which, index), "cudaDeviceGetAttribute");
    return value;
  };
  const int major = attribute(cudaDevAttrComputeCapabilityMajor), minor = attribute(cudaDevAttrComputeCapabilityMinor);
  if (major < 8) fail("cuda:", index, " has compute capability ", major, ".", minor, "; 8.0 or later is needed");
  return (*known)[index] = {attribute(cudaDevAttrMultiProcessorCount), attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin)};
}

bool is_empty(const Problem &problem) { return problem.batch == 0 || problem.height == 0 || problem.width == 0; }

void inception_cuda(const Tensor &x, const Tensor &weights, const Tensor &bias, const Numbers &widths, const Numbers &tile,
                    const Tensor &out) {
  const Problem problem = check(x, weights, bias, widths, out);
  const std::optional<Tile> asked = tile_of(tile);
  if (is_empty(problem)) return;
  const int index = x.get_device_index();
  const torch::stable::accelerator::DeviceGuard guard(index);
  check_cuda(cudaSetDevice(index), "cudaSetDevice"); // of the CUDA runtime in this library, which is not torch's
  const Device device = device_facts(index);
  const Params params = params_of(problem, device, x, weights, bias, asked, out);
  void *stream = nullptr;
  if (aoti_torch_get_current_cuda_stream == nullptr) fail("this torch is built without CUDA");
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(index, &stream));
  check_cuda(launch_inception(problem.element, params, device.shared_memory, stream), "the launch");
}

// All but the launch, as if on the nominal device.
void inception_meta(const Tensor &x, const Tensor &weights, const Tensor &bias, const Numbers &widths, const Numbers &tile,
                    const Tensor &out) {
  const Problem problem = check(x, weights, bias, widths, out);
  const std::optional<Tile> asked = tile_of(tile);
  if (!is_empty(problem)) params_of(problem, kNominalDevice, x, weights, bias, asked, out);
}

void inception_cpu(const Tensor &, const Tensor &, const Tensor &, const Numbers &, const Numbers &, const Tensor &) {
  fail("x is on cpu; inception runs on CUDA devices only");
}

// problem: dtype (0 float16, 1 bfloat16, 2 float32), batch, height, width, then the widths. device: its multiprocessors, and
// the bytes of shared memory that a block may have.
std::string plan(const Numbers &problem, const Numbers &device, const Numbers &tile) {
  if (problem.size() != 4 + kWidths.size())
    fail("problem has ", problem.size(), " numbers; it is to have ", 4 + kWidths.size(),
         ": dtype, batch, height, width and the widths");
  if (device.size() != 2)
    fail("device has ", device.size(), " numbers; it is to have 2: multiprocessors and bytes of shared memory");
  const auto element = static_cast<Element>(to_int("the dtype", problem[0], 0, 2));
  const Problem asked = problem_of(element, {problem[1], problem[2], problem[3]}, Numbers(problem.begin() + 4, problem.end()));
  if (is_empty(asked)) fail("there is no plan for an empty output");
  const Device on = {to_int("multiprocessors", device[0], 1, INT_MAX), to_int("shared memory", device[1], 0, INT_MAX)};
  const std::optional<Tile> wanted = tile_of(tile);
  return asking([&] { return describe(asked, on, *plans().get(asked, on, wanted)); });
}

std::string driver_text() { return driver_fault(); }

} // namespace
} // namespace googlenet_fused

STABLE_TORCH_LIBRARY(googlenet_fused_cuda, m) {
  m.def("inception(Tensor x, Tensor weights, Tensor bias, int[] widths, int[] tile, Tensor(a!) out) -> ()");
  m.def("plan(int[] problem, int[] device, int[] tile=[]) -> str");
  m.def("driver_fault() -> str");
}

STABLE_TORCH_LIBRARY_IMPL(googlenet_fused_cuda, CUDA, m) { m.impl("inception", TORCH_BOX(&googlenet_fused::inception_cuda)); }

STABLE_TORCH_LIBRARY_IMPL(googlenet_fused_cuda, Meta, m) { m.impl("inception", TORCH_BOX(&googlenet_fused::inception_meta)); }

STABLE_TORCH_LIBRARY_IMPL(googlenet_fused_cuda, CPU, m) { m.impl("inception", TORCH_BOX(&googlenet_fused::inception_cpu)); }

STABLE_TORCH_LIBRARY_IMPL(googlenet_fused_cuda, CompositeExplicitAutograd, m) {
  m.impl("plan", TORCH_BOX(&googlenet_fused::plan));
  m.impl("driver_fault", TORCH_BOX(&googlenet_fused::driver_text));
}
