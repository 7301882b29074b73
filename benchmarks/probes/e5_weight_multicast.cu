// Probe E5: how fast can weights stream from L2 to the shared memory of every multiprocessor, and does multicast help?
//
// Every block needs the whole weight stream, as the blocks of a convolution over different images do. A ring of shared-memory
// stages is filled by bulk tensor copies (128-byte swizzle) that complete on mbarriers. In a cluster of 2 or 4, each block
// fetches its half or quarter of every stage and multicasts it to all blocks of the cluster, so L2 is read once a cluster.
//
// Reported per configuration: bytes delivered to shared memory a second over the chip, and bytes read from L2 a second (by
// arithmetic: the former over the cluster size). Each cluster size is first checked: every delivered 16 bytes are
// compared with the weights at the place the swizzle formula says.
//
// Status 0: all delivered bytes were right.

#include <cuda.h>  // types only; the one driver function is looked up at run time

#include "probe.cuh"

namespace {

using namespace probe;

constexpr int STAGE_ROWS = 128;
constexpr int ROW_CHANNELS = 64;
constexpr int STAGE_BYTES = STAGE_ROWS * SWIZZLE_ROW_BYTES;
constexpr int ROW_CHUNKS = SWIZZLE_ROW_BYTES / CHUNK_BYTES;
constexpr int MAX_STAGES = 12;
constexpr int THREADS = 128;
constexpr int FIRST_CONSUMER = 32;  // warp 0 produces, the others consume
constexpr int CONSUMERS = THREADS - FIRST_CONSUMER;
constexpr int ONE_BLOCK_BYTES = 120 * 1024;  // more than half of a multiprocessor's shared memory: one block on each

template <int CLUSTER>
__device__ __forceinline__ void load_slice(uint32_t destination, const CUtensorMap* map, int row, uint32_t barrier) {
    if (CLUSTER == 1) {
        asm volatile(
            "cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1, {0, %2}], [%3];" ::"r"(
                destination),
            "l"(map), "r"(row), "r"(barrier)
            : "memory");
    } else {
        const uint16_t everyone = (1 << CLUSTER) - 1;
        asm volatile(
            "cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes.multicast::cluster [%0], "
            "[%1, {0, %2}], [%3], %4;" ::"r"(destination),
            "l"(map), "r"(row), "r"(barrier), "h"(everyone)
            : "memory");
    }
}

// Streams `tiles` stages of weights `passes` times through a ring of `stages` in every block. Each cluster begins `stagger`
// tiles after the one before it. With CHECKED every byte is compared with `weights`.
template <int CLUSTER, bool CHECKED>
__global__ void __launch_bounds__(THREADS, 1)
    stream_kernel(const __grid_constant__ CUtensorMap map, const uint4* weights, int tiles, int passes, int stages, int stagger,
                  int* wrong, int* trap) {
    extern __shared__ unsigned char dynamic[];
    __shared__ uint64_t full[MAX_STAGES], empty[MAX_STAGES];
    const uint32_t dynamic_address = shared_address(dynamic);
    const uint32_t padding = (SWIZZLE_ATOM_BYTES - dynamic_address % SWIZZLE_ATOM_BYTES) % SWIZZLE_ATOM_BYTES;
    const uint32_t ring = dynamic_address + padding;
    const int rank = CLUSTER == 1 ? 0 : static_cast<int>(cluster_rank());
    const int first = static_cast<int>(blockIdx.x / CLUSTER) * stagger % tiles;
    const int loads = tiles * passes;

    if (threadIdx.x == 0) {
        for (int s = 0; s < stages; ++s) {
            mbarrier_init(shared_address(&full[s]), 1);
            mbarrier_init(shared_address(&empty[s]), CLUSTER);
        }
        mbarrier_init_fence();
    }
    __syncthreads();
    cluster_barrier();

    if (threadIdx.x == 0) {
        int stage = 0, tile = first;
        uint32_t parity = 1;  // of the use before this one: a fresh barrier counts as having completed parity 1
        for (int i = 0; i < loads; ++i) {
            const uint32_t barrier = shared_address(&full[stage]);
            mbarrier_wait(shared_address(&empty[stage]), parity, trap);
            mbarrier_expect(barrier, STAGE_BYTES);
            constexpr int SLICE_ROWS = STAGE_ROWS / CLUSTER;
            load_slice<CLUSTER>(ring + stage * STAGE_BYTES + rank * SLICE_ROWS * SWIZZLE_ROW_BYTES, &map,
                                tile * STAGE_ROWS + rank * SLICE_ROWS, barrier);
            if (++tile == tiles) tile = 0;
            if (++stage == stages) {
                stage = 0;
                parity ^= 1;
            }
        }
    } else if (threadIdx.x >= FIRST_CONSUMER && (CHECKED || threadIdx.x == FIRST_CONSUMER)) {
        int stage = 0, tile = first;
        uint32_t parity = 0;
        bool right = true;
        for (int i = 0; i < loads; ++i) {
            mbarrier_wait(shared_address(&full[stage]), parity, trap);
            if (CHECKED) {
                const unsigned char* data = dynamic + padding + stage * STAGE_BYTES;
                for (int c = threadIdx.x - FIRST_CONSUMER; c < STAGE_ROWS * ROW_CHUNKS; c += CONSUMERS) {
                    const uint32_t offset = swizzle128_offset(c / ROW_CHUNKS, c % ROW_CHUNKS * CHUNK_CHANNELS);
                    const uint4 found = *reinterpret_cast<const uint4*>(data + offset);
                    const uint4 expected = weights[static_cast<size_t>(tile) * STAGE_ROWS * ROW_CHUNKS + c];
                    right &= found.x == expected.x && found.y == expected.y && found.z == expected.z && found.w == expected.w;
                }
                asm volatile("bar.sync 1, %0;" ::"n"(CONSUMERS) : "memory");
            }
            if (threadIdx.x == FIRST_CONSUMER) {
                for (int block = 0; block < CLUSTER; ++block) mbarrier_arrive_remote(shared_address(&empty[stage]), block);
            }
            if (++tile == tiles) tile = 0;
            if (++stage == stages) {
                stage = 0;
                parity ^= 1;
            }
        }
        if (!right) atomicExch(wrong, 1);
    }
    __syncthreads();
    cluster_barrier();  // no block may end while another can still write to its shared memory
}

using EncodeTiled = CUresult (*)(CUtensorMap*, CUtensorMapDataType, cuuint32_t, void*, const cuuint64_t*, const cuuint64_t*,
                                 const cuuint32_t*, const cuuint32_t*, CUtensorMapInterleave, CUtensorMapSwizzle,
                                 CUtensorMapL2promotion, CUtensorMapFloatOOBfill);

EncodeTiled encode_tiled() {
    void* function = nullptr;
    cudaDriverEntryPointQueryResult status;
#if CUDART_VERSION >= 12050
    CHECK(cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &function, 12000, cudaEnableDefault, &status));
#else
    CHECK(cudaGetDriverEntryPoint("cuTensorMapEncodeTiled", &function, cudaEnableDefault, &status));
#endif
    if (status != cudaDriverEntryPointSuccess || !function) skip("the driver has no cuTensorMapEncodeTiled");
    return reinterpret_cast<EncodeTiled>(function);
}

// The map of [rows][64] bf16 with boxes of box_rows x 64.
CUtensorMap tensor_map(void* weights, int rows, int box_rows) {
    CUtensorMap map;
    const cuuint64_t sizes[] = {ROW_CHANNELS, static_cast<cuuint64_t>(rows)};
    const cuuint64_t strides[] = {SWIZZLE_ROW_BYTES};
    const cuuint32_t box[] = {ROW_CHANNELS, static_cast<cuuint32_t>(box_rows)};
    const cuuint32_t element_strides[] = {1, 1};
    const CUresult result =
        encode_tiled()(&map, CU_TENSOR_MAP_DATA_TYPE_BFLOAT16, 2, weights, sizes, strides, box, element_strides,
                       CU_TENSOR_MAP_INTERLEAVE_NONE, CU_TENSOR_MAP_SWIZZLE_128B, CU_TENSOR_MAP_L2_PROMOTION_L2_256B,
                       CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
    if (result != CUDA_SUCCESS) fail("cuTensorMapEncodeTiled gave error " + std::to_string(static_cast<int>(result)));
    return map;
}

struct Stream {
    const uint4* weights;
    int tiles;
    int* wrong;
};

// What a launch of `kernel` in clusters needs; `attribute` has to outlive the configuration.
template <int CLUSTER, typename Kernel>
cudaLaunchConfig_t configure(Kernel kernel, int blocks, int stages, cudaLaunchAttribute& attribute) {
    attribute = {};
    attribute.id = cudaLaunchAttributeClusterDimension;
    attribute.val.clusterDim.x = CLUSTER;
    attribute.val.clusterDim.y = attribute.val.clusterDim.z = 1;
    cudaLaunchConfig_t config{};
    config.gridDim = dim3(blocks);
    config.blockDim = dim3(THREADS);
    config.dynamicSmemBytes = std::max(stages * STAGE_BYTES + SWIZZLE_ATOM_BYTES, ONE_BLOCK_BYTES);
    config.attrs = &attribute;
    config.numAttrs = 1;
    CHECK(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(config.dynamicSmemBytes)));
    return config;
}

template <int CLUSTER, bool CHECKED>
void launch(const CUtensorMap& map, const Stream& stream, int blocks, int passes, int stages, int stagger) {
    cudaLaunchAttribute attribute;
    const auto kernel = stream_kernel<CLUSTER, CHECKED>;
    const cudaLaunchConfig_t config = configure<CLUSTER>(kernel, blocks, stages, attribute);
    CHECK(cudaLaunchKernelEx(&config, kernel, map, stream.weights, stream.tiles, passes, stages, stagger, stream.wrong,
                             current().trap));
}

// How many blocks the device holds at once in clusters, one a multiprocessor.
template <int CLUSTER>
int resident_blocks(int stages) {
    cudaLaunchAttribute attribute;
    const auto kernel = stream_kernel<CLUSTER, false>;
    const cudaLaunchConfig_t config = configure<CLUSTER>(kernel, CLUSTER, stages, attribute);
    int clusters = 0;
    CHECK(cudaOccupancyMaxActiveClusters(&clusters, kernel, &config));
    if (clusters < 1) fail("no cluster of " + std::to_string(CLUSTER) + " blocks fits on the device");
    return clusters * CLUSTER;
}

template <int CLUSTER>
bool probe_cluster(uint4* weights, int all_tiles, int* wrong, bool quick, std::vector<Json>& rows) {
    const CUtensorMap map = tensor_map(weights, all_tiles * STAGE_ROWS, STAGE_ROWS / CLUSTER);
    CHECK(cudaMemset(wrong, 0, sizeof(int)));
    const int check_tiles = std::min(all_tiles, quick ? 5 : 64);
    const int check_blocks = quick ? CLUSTER : resident_blocks<CLUSTER>(3);
    launch<CLUSTER, true>(map, {weights, check_tiles, wrong}, check_blocks, 2, 3, 1);
    synchronize();
    const bool right = host_copy(wrong, 1)[0] == 0;

    for (int stages : quick ? std::vector<int>{4} : std::vector<int>{4, 8, MAX_STAGES}) {
        const int blocks = quick ? CLUSTER : resident_blocks<CLUSTER>(stages);
        for (int tiles : quick ? std::vector<int>{8} : std::vector<int>{64, all_tiles}) {
            for (int stagger : quick ? std::vector<int>{0} : std::vector<int>{0, 7}) {
                const int passes = quick ? 1 : std::max(1, 2048 / tiles);
                const double ms = median_ms(nullptr, quick ? 1 : 11, [&] {
                    launch<CLUSTER, false>(map, {weights, tiles, wrong}, blocks, passes, stages, stagger);
                });
                synchronize();
                const double delivered = static_cast<double>(blocks) * tiles * passes * STAGE_BYTES;
                rows.emplace_back();
                rows.back().add("cluster", CLUSTER).add("blocks", blocks).add("stages", stages).add("stage_bytes", STAGE_BYTES);
                rows.back().add("stream_mib", tiles * (STAGE_BYTES / 1048576.0)).add("stagger_stages", stagger);
                rows.back().add("right", right).add("ms", ms).add("delivered_tb_per_s", delivered / (ms * 1e9));
                rows.back().add("l2_read_tb_per_s", delivered / CLUSTER / (ms * 1e9));
            }
        }
    }
    return right;
}

}  // namespace

int main(int argc, char** argv) {
    const bool quick = start("E5", argc, argv);
    const int all_tiles = quick ? 16 : 896;  // 14 MiB, the weights of the whole network in 16 bits
    const int needed = MAX_STAGES * STAGE_BYTES + SWIZZLE_ATOM_BYTES + 1024;
    if (current().device.sharedMemPerBlockOptin < static_cast<size_t>(needed)) {
        skip("needs " + std::to_string(needed) + " bytes of shared memory a block, has " +
             std::to_string(current().device.sharedMemPerBlockOptin));
    }
    Random random(5);
    std::vector<uint4> values(static_cast<size_t>(all_tiles) * STAGE_ROWS * ROW_CHUNKS);
    for (uint4& value : values) value = make_uint4(random.next(), random.next(), random.next(), random.next());
    uint4* weights = device_copy(values);
    int* wrong = device_array<int>(1);
    std::vector<Json> rows;
    bool ok = probe_cluster<1>(weights, all_tiles, wrong, quick, rows);
    ok &= probe_cluster<2>(weights, all_tiles, wrong, quick, rows);
    ok &= probe_cluster<4>(weights, all_tiles, wrong, quick, rows);
    Json json = header();
    json.add("ok", ok).add("quick", quick).add("l2_mib", current().device.l2CacheSize / 1048576.0).add("streams", rows);
    finish(json, ok ? RIGHT : WRONG);
}
