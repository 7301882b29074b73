// Probe E1: may the pixel operand of wgmma start at any pixel, and how fast is wgmma then?
//
// A convolution over a tile in shared memory is one matrix product for every tap, and the taps differ only in which pixel the
// operand starts at. D[64 output channels][N pixels] = W[64][64 channels] x X[pixels + shift][64 channels]^T, for every shift
// in a list, in these layouts of X:
//   swizzle128  rows of 128 bytes (64 channels), 128-byte swizzle, the start moved by whole rows. The descriptor's base offset
//               is either always 0 or (start >> 7) & 7.
//   planes      [channel / 8][pixel][8 channels] without swizzle, the start moved by 16 bytes a pixel. The descriptor's two
//               strides are given in either order: "channels_first" means leading = next 8 channels, stride = next 8 pixels
//               (what the PTX manual says), "pixels_first" the other way round.
// W is stored with the 128-byte swizzle, or as planes. The inputs are small whole numbers, so every sum is exact and the
// comparison with the host's is for equality.
//
// Then a 3x3 convolution (9 taps, 64 channels, 36 wgmma a tile, back to back) on every multiprocessor, on random fractions,
// gives the rate of each layout, and its result is checked too.
//
// Status 0: layout "planes" is right at every shift with one order of strides, "swizzle128" is right without a shift, and the
// convolutions of the layouts that were right are right. That a shifted swizzle128 is wrong is a finding, not an error.

#include "probe.cuh"

namespace {

using namespace probe;

constexpr int CHANNELS = 64;
constexpr int OUTPUTS = 64;        // rows of wgmma
constexpr int STEP_CHANNELS = 16;  // K of one wgmma
constexpr int STEPS = CHANNELS / STEP_CHANNELS;
constexpr int PIXELS = 280;        // of the tile: the widest N, 216, and the largest shift, 62, with room to a multiple of 8
constexpr int TAPS = 9;
constexpr int WARPGROUP = 128;
constexpr int MAX_WARPGROUPS = 2;

constexpr uint32_t PIXEL_BYTES = PIXELS * CHANNELS * ELEMENT_BYTES;
constexpr uint32_t WEIGHT_BYTES = OUTPUTS * CHANNELS * ELEMENT_BYTES;  // of one tap
constexpr uint32_t PIXEL_PLANE = PIXELS * CHUNK_BYTES;
constexpr uint32_t WEIGHT_PLANE = OUTPUTS * CHUNK_BYTES;
constexpr uint32_t ALIGNMENT = SWIZZLE_ATOM_BYTES;
constexpr uint32_t CONVOLUTION_BYTES = PIXEL_BYTES + MAX_WARPGROUPS * TAPS * WEIGHT_BYTES + ALIGNMENT;
static_assert(PIXEL_BYTES % ALIGNMENT == 0 && WEIGHT_BYTES % ALIGNMENT == 0, "operands start where the swizzle pattern does");

// With the strides in the wrong order wgmma reads at most this far from the start of the pixels: it has to stay inside the
// block's shared memory, which holds ordinary numbers everywhere.
constexpr uint32_t FARTHEST_READ = (216 / 8 + CHANNELS / 8) * PIXEL_PLANE + 62 * CHUNK_BYTES + 2 * CORE_BYTES;

enum class Store { SWIZZLE128, PLANES };
enum class Base { ZERO, START };
enum class Order { CHANNELS_FIRST, PIXELS_FIRST };

struct Policy {
    Store pixels;
    Store weights;
    Base base;
    Order order;
};

constexpr Policy POLICIES[] = {
    {Store::SWIZZLE128, Store::SWIZZLE128, Base::ZERO, Order::CHANNELS_FIRST},
    {Store::SWIZZLE128, Store::SWIZZLE128, Base::START, Order::CHANNELS_FIRST},
    {Store::PLANES, Store::SWIZZLE128, Base::ZERO, Order::CHANNELS_FIRST},
    {Store::PLANES, Store::SWIZZLE128, Base::ZERO, Order::PIXELS_FIRST},
    {Store::PLANES, Store::PLANES, Base::ZERO, Order::CHANNELS_FIRST},
    {Store::PLANES, Store::PLANES, Base::ZERO, Order::PIXELS_FIRST},
};
constexpr int POLICY_COUNT = sizeof POLICIES / sizeof POLICIES[0];

__device__ __forceinline__ uint32_t offset_in(Store store, uint32_t row, uint32_t channel, uint32_t rows) {
    return store == Store::SWIZZLE128 ? swizzle128_offset(row, channel) : planes_offset(row, channel, rows);
}

// Copies a [rows][64] matrix from global to shared memory in the given layout, 16 bytes at a time.
__device__ void store_matrix(unsigned char* shared, const __nv_bfloat16* matrix, uint32_t rows, Store store) {
    const uint4* chunks = reinterpret_cast<const uint4*>(matrix);
    for (uint32_t i = threadIdx.x; i < rows * (CHANNELS / CHUNK_CHANNELS); i += blockDim.x) {
        const uint32_t row = i / (CHANNELS / CHUNK_CHANNELS), channel = i % (CHANNELS / CHUNK_CHANNELS) * CHUNK_CHANNELS;
        *reinterpret_cast<uint4*>(shared + offset_in(store, row, channel, rows)) = chunks[i];
    }
}

__device__ unsigned char* aligned_shared() {
    extern __shared__ unsigned char dynamic[];
    const uint32_t address = shared_address(dynamic);
    return dynamic + (ALIGNMENT - address % ALIGNMENT) % ALIGNMENT;
}

// The descriptor of an operand whose first row is `start`; `plane` is the distance of two planes of it.
__device__ __forceinline__ uint64_t descriptor(Store store, uint32_t start, uint32_t plane, uint32_t base_offset, Order order) {
    if (store == Store::SWIZZLE128) return wgmma_descriptor(start, CHUNK_BYTES, SWIZZLE_ATOM_BYTES, base_offset, SWIZZLE_128B);
    return order == Order::CHANNELS_FIRST ? wgmma_descriptor(start, plane, CORE_BYTES, 0, SWIZZLE_NONE)
                                          : wgmma_descriptor(start, CORE_BYTES, plane, 0, SWIZZLE_NONE);
}

__host__ __device__ constexpr uint32_t row_bytes(Store store) {
    return store == Store::SWIZZLE128 ? SWIZZLE_ROW_BYTES : CHUNK_BYTES;
}
// How far one wgmma's 16 channels move the start.
__host__ __device__ constexpr uint32_t step_bytes(Store store, uint32_t plane) {
    return store == Store::SWIZZLE128 ? STEP_CHANNELS * ELEMENT_BYTES : STEP_CHANNELS / CHUNK_CHANNELS * plane;
}

// One block computes one shift: out[blockIdx.x][64][N].
template <int N>
__global__ void __launch_bounds__(WARPGROUP, 1)
    shift_kernel(const __nv_bfloat16* pixels, const __nv_bfloat16* weights, const int* shifts, Policy policy, float* out,
                 uint32_t shared_bytes) {
    unsigned char* shared = aligned_shared();
    for (uint32_t i = threadIdx.x * 16; i + 16 + ALIGNMENT <= shared_bytes; i += blockDim.x * 16) {
        *reinterpret_cast<uint4*>(shared + i) = make_uint4(0x3F803F80, 0x3F803F80, 0x3F803F80, 0x3F803F80);
    }
    __syncthreads();
    store_matrix(shared, pixels, PIXELS, policy.pixels);
    store_matrix(shared + PIXEL_BYTES, weights, OUTPUTS, policy.weights);
    fence_proxy_async();
    __syncthreads();

    const uint32_t pixel_start = shared_address(shared) + shifts[blockIdx.x] * row_bytes(policy.pixels);
    const uint32_t weight_start = shared_address(shared) + PIXEL_BYTES;
    const uint32_t base_offset = policy.base == Base::START ? base_offset_of_start(pixel_start) : 0;
    float sums[N / 2];
#pragma unroll
    for (int i = 0; i < N / 2; ++i) sums[i] = 0;
    const uint64_t pixel_descriptor = descriptor(policy.pixels, pixel_start, PIXEL_PLANE, base_offset, policy.order);
    const uint64_t weight_descriptor = descriptor(policy.weights, weight_start, WEIGHT_PLANE, 0, policy.order);
    const uint64_t pixel_step = step_bytes(policy.pixels, PIXEL_PLANE) / 16;
    const uint64_t weight_step = step_bytes(policy.weights, WEIGHT_PLANE) / 16;
    wgmma_fence();
#pragma unroll
    for (int step = 0; step < STEPS; ++step) {
        Wgmma<N>::multiply(sums, weight_descriptor + step * weight_step, pixel_descriptor + step * pixel_step, step > 0);
    }
    wgmma_commit();
    wgmma_wait<0>();
    float* result = out + static_cast<size_t>(blockIdx.x) * OUTPUTS * N;
#pragma unroll
    for (int i = 0; i < N / 2; ++i) {
        result[accumulator_row(threadIdx.x, i) * N + accumulator_column(threadIdx.x, i)] = sums[i];
    }
}

// A 3x3 convolution over a flat tile whose image rows are PITCH pixels apart, `tiles` times; every warpgroup has its own 64
// output channels. out[block][warpgroup][64][N] is the last tile's result, cycles[block] how long all tiles took.
template <int N, int PITCH, Store PIXEL_STORE, Store WEIGHT_STORE, Base BASE>
__global__ void __launch_bounds__(MAX_WARPGROUPS* WARPGROUP, 1)
    convolution_kernel(const __nv_bfloat16* pixels, const __nv_bfloat16* weights, Order order, int tiles, float* out,
                       long long* cycles) {
    static_assert(N + 2 * PITCH + 2 <= PIXELS, "the last tap reads inside the tile");
    unsigned char* shared = aligned_shared();
    store_matrix(shared, pixels, PIXELS, PIXEL_STORE);
    const int warpgroup = __shfl_sync(0xFFFFFFFF, threadIdx.x / WARPGROUP, 0);
    const int warpgroups = blockDim.x / WARPGROUP;
    for (int i = 0; i < warpgroups * TAPS; ++i) {
        store_matrix(shared + PIXEL_BYTES + i * WEIGHT_BYTES, weights + i * OUTPUTS * CHANNELS, OUTPUTS, WEIGHT_STORE);
    }
    fence_proxy_async();
    __syncthreads();

    const uint32_t pixel_start = shared_address(shared);
    const uint32_t weight_start = pixel_start + PIXEL_BYTES + warpgroup * TAPS * WEIGHT_BYTES;
    uint64_t pixel_descriptor = descriptor(PIXEL_STORE, pixel_start, PIXEL_PLANE, 0, order);
    uint64_t weight_descriptor = descriptor(WEIGHT_STORE, weight_start, WEIGHT_PLANE, 0, order);
    float sums[N / 2];
#pragma unroll
    for (int i = 0; i < N / 2; ++i) sums[i] = 0;
    const long long begin = clock64();
#pragma unroll 1
    for (int tile = 0; tile < tiles; ++tile) {
        // Opaque, so that the compiler does not keep all 72 descriptors in registers over the loop.
        asm volatile("" : "+l"(pixel_descriptor), "+l"(weight_descriptor));
        wgmma_fence();
#pragma unroll
        for (int tap = 0; tap < TAPS; ++tap) {
#pragma unroll
            for (int step = 0; step < STEPS; ++step) {
                const int shift = tap / 3 * PITCH + tap % 3;
                const uint32_t pixel_bytes = shift * row_bytes(PIXEL_STORE) + step * step_bytes(PIXEL_STORE, PIXEL_PLANE);
                const uint32_t weight_bytes = tap * WEIGHT_BYTES + step * step_bytes(WEIGHT_STORE, WEIGHT_PLANE);
                // The tile starts on 1024 bytes, so the start's own pattern position is the shift modulo 8.
                const uint64_t base_offset = PIXEL_STORE == Store::SWIZZLE128 && BASE == Base::START ? shift % CORE_ROWS : 0;
                Wgmma<N>::multiply(sums, weight_descriptor + weight_bytes / 16,
                                   pixel_descriptor + pixel_bytes / 16 + (base_offset << 49), tap + step > 0);
            }
        }
        wgmma_commit();
        wgmma_wait<1>();
    }
    wgmma_wait<0>();
    const long long end = clock64();
    if (threadIdx.x == 0) cycles[blockIdx.x] = end - begin;
    float* result = out + (static_cast<size_t>(blockIdx.x) * warpgroups + warpgroup) * OUTPUTS * N;
#pragma unroll
    for (int i = 0; i < N / 2; ++i) {
        const int thread = threadIdx.x % WARPGROUP;
        result[accumulator_row(thread, i) * N + accumulator_column(thread, i)] = sums[i];
    }
}

const char* name_of(Store store) { return store == Store::SWIZZLE128 ? "swizzle128" : "planes"; }
const char* name_of(Base base) { return base == Base::ZERO ? "zero" : "start"; }
const char* name_of(Order order) { return order == Order::CHANNELS_FIRST ? "channels_first" : "pixels_first"; }

// A [rows][64] matrix of bf16 and the same numbers as floats.
struct Matrix {
    std::vector<__nv_bfloat16> values;
    std::vector<float> floats;
};

template <typename Draw>
Matrix random_matrix(int rows, Draw draw) {
    Matrix matrix;
    for (int i = 0; i < rows * CHANNELS; ++i) {
        const __nv_bfloat16 value = __float2bfloat16(draw());
        matrix.values.push_back(value);
        matrix.floats.push_back(__bfloat162float(value));
    }
    return matrix;
}

double dot(const float* a, const float* b) {
    double sum = 0;
    for (int c = 0; c < CHANNELS; ++c) sum += static_cast<double>(a[c]) * b[c];
    return sum;
}

// Which shifts of each policy are wrong.
template <int N>
std::vector<std::vector<int>> wrong_shifts(const std::vector<int>& shifts, uint32_t shared_bytes) {
    Random random(N);
    const auto draw = [&] { return random.nonzero_integer(15); };
    const Matrix pixels = random_matrix(PIXELS, draw), weights = random_matrix(OUTPUTS, draw);
    std::vector<float> product(static_cast<size_t>(OUTPUTS) * PIXELS);
    for (int m = 0; m < OUTPUTS; ++m) {
        for (int p = 0; p < PIXELS; ++p) {
            product[m * PIXELS + p] = static_cast<float>(dot(&weights.floats[m * CHANNELS], &pixels.floats[p * CHANNELS]));
        }
    }
    __nv_bfloat16* device_pixels = device_copy(pixels.values);
    __nv_bfloat16* device_weights = device_copy(weights.values);
    int* device_shifts = device_copy(shifts);
    const size_t count = shifts.size() * OUTPUTS * N;
    float* device_out = device_array<float>(count);
    CHECK(cudaFuncSetAttribute(shift_kernel<N>, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(shared_bytes)));

    std::vector<std::vector<int>> wrong;
    for (const Policy& policy : POLICIES) {
        CHECK(cudaMemset(device_out, 0xFF, count * sizeof(float)));  // NaN
        shift_kernel<N><<<static_cast<unsigned>(shifts.size()), WARPGROUP, shared_bytes>>>(
            device_pixels, device_weights, device_shifts, policy, device_out, shared_bytes);
        synchronize();
        const std::vector<float> out = host_copy(device_out, count);
        wrong.emplace_back();
        for (size_t s = 0; s < shifts.size(); ++s) {
            int mismatches = 0;
            for (int m = 0; m < OUTPUTS; ++m) {
                for (int n = 0; n < N; ++n) {
                    mismatches += !(out[(s * OUTPUTS + m) * N + n] == product[m * PIXELS + n + shifts[s]]);
                }
            }
            if (mismatches) wrong.back().push_back(shifts[s]);
        }
    }
    for (void* pointer : {static_cast<void*>(device_pixels), static_cast<void*>(device_weights),
                          static_cast<void*>(device_shifts), static_cast<void*>(device_out)}) {
        CHECK(cudaFree(pointer));
    }
    return wrong;
}

struct Rate {
    Json json;
    bool right;
};

// The rate of one layout and whether the convolution was right.
template <int N, int PITCH, Store PIXEL_STORE, Store WEIGHT_STORE, Base BASE>
Rate rate(Order order, int warpgroups, bool quick) {
    const int blocks = quick ? 2 : current().device.multiProcessorCount;
    const int tiles = quick ? 2 : 1000;  // long enough that launching and filling shared memory are under 2 % of the time
    Random random(1000 + N);
    const auto draw = [&] { return random.uniform(); };
    const Matrix pixels = random_matrix(PIXELS, draw), weights = random_matrix(warpgroups * TAPS * OUTPUTS, draw);
    __nv_bfloat16* device_pixels = device_copy(pixels.values);
    __nv_bfloat16* device_weights = device_copy(weights.values);
    const size_t block_count = static_cast<size_t>(warpgroups) * OUTPUTS * N, count = blocks * block_count;
    float* device_out = device_array<float>(count);
    CHECK(cudaMemset(device_out, 0xFF, count * sizeof(float)));
    long long* device_cycles = device_array<long long>(blocks);
    const auto kernel = convolution_kernel<N, PITCH, PIXEL_STORE, WEIGHT_STORE, BASE>;
    CHECK(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(CONVOLUTION_BYTES)));
    const double ms = median_ms(nullptr, quick ? 1 : 15, [&] {
        kernel<<<blocks, warpgroups * WARPGROUP, CONVOLUTION_BYTES>>>(device_pixels, device_weights, order, tiles, device_out,
                                                                      device_cycles);
    });
    synchronize();

    double squares = 0, error_squares = 0;
    const std::vector<float> out = host_copy(device_out, count);
    for (size_t i = 0; i < block_count; ++i) {
        const int row = static_cast<int>(i / N), n = static_cast<int>(i % N);
        double sum = 0;
        for (int tap = 0; tap < TAPS; ++tap) {
            const int weight_row = (row / OUTPUTS * TAPS + tap) * OUTPUTS + row % OUTPUTS;
            const int pixel = n + tap / 3 * PITCH + tap % 3;
            sum += dot(&weights.floats[weight_row * CHANNELS], &pixels.floats[pixel * CHANNELS]);
        }
        for (int block = 0; block < blocks; ++block) {
            const double error = out[block * block_count + i] - sum;
            error_squares += error * error;
            squares += sum * sum;
        }
    }
    const double relative = std::sqrt(error_squares / squares);
    std::vector<long long> cycles = host_copy(device_cycles, blocks);
    std::sort(cycles.begin(), cycles.end());
    const double products = static_cast<double>(tiles) * TAPS * STEPS * warpgroups;  // wgmma on one multiprocessor
    Rate result;
    result.right = relative < 1e-4;  // false for NaN as well
    result.json.add("pixels", name_of(PIXEL_STORE)).add("weights", name_of(WEIGHT_STORE));
    if (PIXEL_STORE == Store::SWIZZLE128) result.json.add("base_offset", name_of(BASE));
    if (PIXEL_STORE == Store::PLANES) result.json.add("strides", name_of(order));
    result.json.add("n", N).add("row_pitch", PITCH).add("warpgroups", warpgroups).add("right", result.right);
    result.json.add("relative_error", relative).add("ms", ms);
    result.json.add("tflop_per_s", products * blocks * 2.0 * OUTPUTS * N * STEP_CHANNELS / (ms * 1e9));
    result.json.add("cycles_per_wgmma", cycles[cycles.size() / 2] / products).add("least_cycles_per_wgmma", N / 2.0);
    for (void* pointer : {static_cast<void*>(device_pixels), static_cast<void*>(device_weights), static_cast<void*>(device_out),
                          static_cast<void*>(device_cycles)}) {
        CHECK(cudaFree(pointer));
    }
    return result;
}

// Every layout at one N; `right` has one entry a policy.
template <int N, int PITCH>
bool rates(const std::vector<bool>& right, Order order, bool quick, std::vector<Json>& rows) {
    bool good = true;
    const auto keep = [&](const Rate& rate, bool expected) {
        rows.push_back(rate.json);
        good &= rate.right || !expected;
    };
    const bool in_order = order == Order::CHANNELS_FIRST;
    for (int warpgroups = quick ? MAX_WARPGROUPS : 1; warpgroups <= MAX_WARPGROUPS; ++warpgroups) {
        keep(rate<N, PITCH, Store::SWIZZLE128, Store::SWIZZLE128, Base::ZERO>(order, warpgroups, quick), right[0]);
        keep(rate<N, PITCH, Store::SWIZZLE128, Store::SWIZZLE128, Base::START>(order, warpgroups, quick), right[1]);
        keep(rate<N, PITCH, Store::PLANES, Store::SWIZZLE128, Base::ZERO>(order, warpgroups, quick), right[in_order ? 2 : 3]);
        keep(rate<N, PITCH, Store::PLANES, Store::PLANES, Base::ZERO>(order, warpgroups, quick), right[in_order ? 4 : 5]);
    }
    return good;
}

}  // namespace

int main(int argc, char** argv) {
    const bool quick = start("E1", argc, argv);
    const uint32_t shared_bytes = static_cast<uint32_t>(current().device.sharedMemPerBlockOptin);
    if (shared_bytes < CONVOLUTION_BYTES || shared_bytes < FARTHEST_READ + ALIGNMENT) {
        skip("needs " + std::to_string(std::max(CONVOLUTION_BYTES, FARTHEST_READ + ALIGNMENT)) +
             " bytes of shared memory a block, has " + std::to_string(shared_bytes));
    }
    const std::vector<int> shifts = quick ? std::vector<int>{0, 1, 31}
                                          : std::vector<int>{0, 1, 2, 3, 4, 5, 6, 7, 8, 14, 15, 16, 17, 30, 31, 32, 60, 61, 62};

    std::vector<Json> layouts;
    std::vector<bool> right(POLICY_COUNT, true), right_unshifted(POLICY_COUNT, true);
    const auto judge = [&](int n, const std::vector<std::vector<int>>& wrong) {
        for (int p = 0; p < POLICY_COUNT; ++p) {
            const Policy& policy = POLICIES[p];
            Json json;
            json.add("pixels", name_of(policy.pixels)).add("weights", name_of(policy.weights));
            if (policy.pixels == Store::SWIZZLE128) json.add("base_offset", name_of(policy.base));
            if (policy.pixels == Store::PLANES) json.add("strides", name_of(policy.order));
            layouts.push_back(json.add("n", n).add("right", wrong[p].empty()).add("wrong_shifts_pixels", wrong[p]));
            right[p] = right[p] && wrong[p].empty();
            right_unshifted[p] = right_unshifted[p] && (wrong[p].empty() || wrong[p].front() != 0);
        }
    };
    judge(216, wrong_shifts<216>(shifts, shared_bytes));
    if (!quick) {
        judge(128, wrong_shifts<128>(shifts, shared_bytes));
        judge(64, wrong_shifts<64>(shifts, shared_bytes));
    }
    // Strides in both orders can only both be right where the two strides are equal, which no layout here has.
    const Order order = right[3] && !right[2] ? Order::PIXELS_FIRST : Order::CHANNELS_FIRST;
    const bool planes_right = right[2] || right[3];

    std::vector<Json> rows;
    bool convolutions_right = rates<216, 30>(right, order, quick, rows);
    if (!quick) {
        convolutions_right &= rates<128, 16>(right, order, quick, rows);
        convolutions_right &= rates<64, 9>(right, order, quick, rows);
    }

    const bool ok = planes_right && right_unshifted[0] && convolutions_right;
    Json json = header();
    json.add("ok", ok).add("quick", quick).add("dtype", "bf16").add("shifts_pixels", shifts);
    json.add("swizzle128_shift_right_base_offset",
             right[0] && right[1] ? "either" : right[0] ? "zero" : right[1] ? "start" : "neither");
    json.add("planes_right_strides", right[2] ? "channels_first" : right[3] ? "pixels_first" : "neither");
    json.add("layouts", layouts).add("rates", rows);
    finish(json, ok ? RIGHT : WRONG);
}
