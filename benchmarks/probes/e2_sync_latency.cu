// Probe E2: what one synchronisation costs: a barrier over the whole grid, a barrier over a cluster, and the hand-over from one
// kernel to the next in a CUDA graph with and without programmatic dependent launch.
//
// Every figure is a difference: (time of many - time of few) / (many - few), so that launches and set-up cancel. Each mechanism
// is checked first with real data flowing through it: a block reads what another block wrote before the synchronisation.
//
// Status 0: all data arrived.

#include "probe.cuh"

namespace {

using namespace probe;

constexpr int THREADS = 256;
constexpr int CHAIN_THREADS = 128;
// More than half of a multiprocessor's 228 KB, so that each one holds one block, as a kernel that fills shared memory would.
constexpr int ONE_BLOCK_BYTES = 120 * 1024;

struct GridState {
    unsigned arrived;  // blocks so far, over all barriers of the launch
    int wrong;
};

__device__ __forceinline__ unsigned load_acquire(const unsigned* address) {
    unsigned value;
    asm volatile("ld.acquire.gpu.global.u32 %0, [%1];" : "=r"(value) : "l"(address) : "memory");
    return value;
}

// `goal` is the number of arrivals after which this barrier opens: blocks * (how many barriers so far, this one included).
__device__ __forceinline__ void grid_barrier(GridState* state, unsigned goal, int* trap) {
    __syncthreads();
    if (threadIdx.x == 0) {
        asm volatile("red.release.gpu.global.add.u32 [%0], 1;" ::"l"(&state->arrived) : "memory");
        const long long begin = clock64();
        while (load_acquire(&state->arrived) < goal) {
            if (clock64() - begin > WAIT_LIMIT_CYCLES) give_up(trap, TRAP_WAIT_TOO_LONG);
        }
    }
    __syncthreads();
}

// With CHECKED, slots[2][blocks] carry the round's number from every block to another; two sets, because a fast block may be
// one barrier ahead of the reader.
template <bool CHECKED>
__global__ void __launch_bounds__(THREADS, 1) grid_kernel(GridState* state, volatile int* slots, int rounds, int* trap) {
    const unsigned blocks = gridDim.x;
    for (int round = 1; round <= rounds; ++round) {
        volatile int* set = slots + (round & 1) * blocks;
        if (CHECKED && threadIdx.x == 0) set[blockIdx.x] = round;
        grid_barrier(state, blocks * round, trap);
        if (CHECKED && threadIdx.x == THREADS - 1) {
            if (set[(blockIdx.x + 1 + round * 7u) % blocks] != round) atomicExch(&state->wrong, 1);
        }
    }
}

template <bool CHECKED>
__global__ void __launch_bounds__(THREADS, 1) cluster_kernel(int rounds, int size, int* wrong) {
    __shared__ int slots[2];
    cluster_barrier();
    for (int round = 1; round <= rounds; ++round) {
        if (CHECKED && threadIdx.x == 0) *reinterpret_cast<volatile int*>(&slots[round & 1]) = round;
        if (CHECKED) __syncwarp();
        cluster_barrier();
        if (CHECKED && threadIdx.x == THREADS - 1) {
            const uint32_t peer = (cluster_rank() + 1 + round % (size - 1)) % size;
            uint32_t found;
            asm volatile(
                "{\n.reg .b32 remote;\nmapa.shared::cluster.u32 remote, %1, %2;\nld.shared::cluster.u32 %0, [remote];\n}\n"
                : "=r"(found)
                : "r"(shared_address(&slots[round & 1])), "r"(peer)
                : "memory");
            if (found != static_cast<uint32_t>(round)) atomicExch(wrong, 1);
        }
        if (CHECKED) __syncwarp();
    }
    cluster_barrier();  // no block may end while another reads its shared memory
}

enum class Trigger { NONE, EARLY, LATE };

// One link of a chain: to[b] = from[b + 1] + 1. With a trigger it is launched while its predecessor may still run.
template <Trigger TRIGGER>
__global__ void __launch_bounds__(CHAIN_THREADS) link_kernel(const int* from, int* to) {
    if (TRIGGER == Trigger::EARLY) launch_dependents();
    if (TRIGGER != Trigger::NONE) wait_for_prerequisites();
    if (threadIdx.x == 0) {
        // Volatile: the value was written while this kernel may already have been running.
        to[blockIdx.x] = *reinterpret_cast<const volatile int*>(&from[(blockIdx.x + 1) % gridDim.x]) + 1;
    }
    if (TRIGGER == Trigger::LATE) {
        __syncthreads();
        launch_dependents();
    }
}

cudaLaunchConfig_t configuration(int blocks, int threads, size_t shared_bytes, cudaStream_t stream,
                                 cudaLaunchAttribute* attribute) {
    cudaLaunchConfig_t config{};
    config.gridDim = dim3(blocks);
    config.blockDim = dim3(threads);
    config.dynamicSmemBytes = shared_bytes;
    config.stream = stream;
    config.attrs = attribute;
    config.numAttrs = attribute ? 1 : 0;
    return config;
}

template <bool CHECKED>
void launch_grid(int blocks, GridState* state, int* slots, int rounds) {
    CHECK(cudaMemsetAsync(state, 0, sizeof(GridState), nullptr));
    cudaLaunchAttribute attribute{};
    attribute.id = cudaLaunchAttributeCooperative;
    attribute.val.cooperative = 1;
    const cudaLaunchConfig_t config = configuration(blocks, THREADS, ONE_BLOCK_BYTES, nullptr, &attribute);
    CHECK(cudaLaunchKernelEx(&config, grid_kernel<CHECKED>, state, static_cast<volatile int*>(slots), rounds, current().trap));
}

template <typename Kernel>
void allow_one_block(Kernel kernel) {
    CHECK(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, ONE_BLOCK_BYTES));
}

bool probe_grid(bool quick, Json& json) {
    if (!current().device.cooperativeLaunch) skip("the device cannot launch a cooperative grid");
    const int blocks = quick ? 4 : current().device.multiProcessorCount;
    const int few = quick ? 2 : 100, many = quick ? 10 : 2100;
    allow_one_block(grid_kernel<true>);
    allow_one_block(grid_kernel<false>);
    GridState* state = device_array<GridState>(1);
    int* slots = device_array<int>(2 * blocks);
    CHECK(cudaMemset(slots, 0, 2 * blocks * sizeof(int)));
    launch_grid<true>(blocks, state, slots, few);
    synchronize();
    const GridState found = host_copy(state, 1)[0];
    const bool right = found.wrong == 0 && found.arrived == static_cast<unsigned>(blocks * few);
    const int repeats = quick ? 1 : 15;
    const double few_ms = median_ms(nullptr, repeats, [&] { launch_grid<false>(blocks, state, slots, few); });
    const double many_ms = median_ms(nullptr, repeats, [&] { launch_grid<false>(blocks, state, slots, many); });
    synchronize();
    json.add("grid_barrier_right", right).add("grid_barrier_blocks", blocks);
    json.add("grid_barrier_ns", (many_ms - few_ms) * 1e6 / (many - few));
    CHECK(cudaFree(state));
    CHECK(cudaFree(slots));
    return right;
}

template <bool CHECKED>
void launch_cluster(int clusters, int size, int rounds, int* wrong) {
    cudaLaunchAttribute attribute{};
    attribute.id = cudaLaunchAttributeClusterDimension;
    attribute.val.clusterDim.x = size;
    attribute.val.clusterDim.y = attribute.val.clusterDim.z = 1;
    const cudaLaunchConfig_t config = configuration(clusters * size, THREADS, ONE_BLOCK_BYTES, nullptr, &attribute);
    CHECK(cudaLaunchKernelEx(&config, cluster_kernel<CHECKED>, rounds, size, wrong));
}

bool probe_clusters(bool quick, Json& json) {
    allow_one_block(cluster_kernel<true>);
    allow_one_block(cluster_kernel<false>);
    int* wrong = device_array<int>(1);
    CHECK(cudaMemset(wrong, 0, sizeof(int)));
    const int few = quick ? 2 : 100, many = quick ? 10 : 5100;
    std::vector<Json> rows;
    bool all_right = true;
    for (int size : quick ? std::vector<int>{2} : std::vector<int>{2, 4, 8}) {
        cudaLaunchAttribute attribute{};
        attribute.id = cudaLaunchAttributeClusterDimension;
        attribute.val.clusterDim.x = size;
        attribute.val.clusterDim.y = attribute.val.clusterDim.z = 1;
        const cudaLaunchConfig_t config = configuration(size, THREADS, ONE_BLOCK_BYTES, nullptr, &attribute);
        int resident = 0;
        CHECK(cudaOccupancyMaxActiveClusters(&resident, cluster_kernel<false>, &config));
        if (resident < 1) fail("no cluster of " + std::to_string(size) + " blocks fits on the device");
        const int clusters = quick ? 1 : resident;
        launch_cluster<true>(clusters, size, few, wrong);
        synchronize();
        const bool right = host_copy(wrong, 1)[0] == 0;
        const int repeats = quick ? 1 : 15;
        const double few_ms = median_ms(nullptr, repeats, [&] { launch_cluster<false>(clusters, size, few, wrong); });
        const double many_ms = median_ms(nullptr, repeats, [&] { launch_cluster<false>(clusters, size, many, wrong); });
        synchronize();
        rows.emplace_back();
        rows.back().add("size", size).add("resident_clusters", resident).add("right", right);
        rows.back().add("barrier_ns", (many_ms - few_ms) * 1e6 / (many - few));
        all_right = all_right && right;
    }
    json.add("cluster_barriers", rows);
    CHECK(cudaFree(wrong));
    return all_right;
}

template <Trigger TRIGGER>
void launch_link(int blocks, cudaStream_t stream, const int* from, int* to) {
    cudaLaunchAttribute attribute{};
    attribute.id = cudaLaunchAttributeProgrammaticStreamSerialization;
    attribute.val.programmaticStreamSerializationAllowed = 1;
    const cudaLaunchConfig_t config =
        configuration(blocks, CHAIN_THREADS, 0, stream, TRIGGER == Trigger::NONE ? nullptr : &attribute);
    CHECK(cudaLaunchKernelEx(&config, link_kernel<TRIGGER>, from, to));
}

// A chain of `links` kernels that pass buffers[2][blocks] back and forth, launched into `stream`.
template <Trigger TRIGGER>
void launch_chain(int links, int blocks, cudaStream_t stream, int* buffers) {
    for (int i = 0; i < links; ++i) {
        launch_link<TRIGGER>(blocks, stream, buffers + i % 2 * blocks, buffers + (i + 1) % 2 * blocks);
    }
}

struct Graph {
    cudaGraphExec_t executable;
    int programmatic_edges;  // -1 where this CUDA version cannot tell
};

template <Trigger TRIGGER>
Graph capture(int links, int blocks, cudaStream_t stream, int* buffers) {
    Graph result{nullptr, -1};
    cudaGraph_t graph;
    CHECK(cudaStreamBeginCapture(stream, cudaStreamCaptureModeThreadLocal));
    launch_chain<TRIGGER>(links, blocks, stream, buffers);
    CHECK(cudaStreamEndCapture(stream, &graph));
#if CUDART_VERSION >= 13000
    size_t count = links;  // a chain has fewer edges than nodes
    std::vector<cudaGraphNode_t> from(count), to(count);
    std::vector<cudaGraphEdgeData> data(count);
    CHECK(cudaGraphGetEdges(graph, from.data(), to.data(), data.data(), &count));
    result.programmatic_edges = 0;
    for (size_t i = 0; i < count; ++i) result.programmatic_edges += data[i].type == cudaGraphDependencyTypeProgrammatic;
#endif
    CHECK(cudaGraphInstantiate(&result.executable, graph, 0));
    CHECK(cudaGraphDestroy(graph));
    return result;
}

template <Trigger TRIGGER>
bool probe_chain(const char* name, int blocks, bool quick, std::vector<Json>& rows) {
    const int few = quick ? 2 : 20, many = quick ? 6 : 220, repeats = quick ? 1 : 25;
    cudaStream_t stream;
    CHECK(cudaStreamCreateWithFlags(&stream, cudaStreamNonBlocking));
    int* buffers = device_array<int>(2 * blocks);
    const Graph small = capture<TRIGGER>(few, blocks, stream, buffers);
    const Graph large = capture<TRIGGER>(many, blocks, stream, buffers);

    std::vector<int> first(2 * blocks, -1);
    for (int b = 0; b < blocks; ++b) first[b] = 1000 * b + 17;
    CHECK(cudaMemcpy(buffers, first.data(), first.size() * sizeof(int), cudaMemcpyHostToDevice));
    CHECK(cudaGraphLaunch(large.executable, stream));
    CHECK(cudaStreamSynchronize(stream));
    const std::vector<int> last = host_copy(buffers + many % 2 * blocks, blocks);
    bool right = true;
    for (int b = 0; b < blocks; ++b) right = right && last[b] == first[(b + many) % blocks] + many;

    const double few_ms = median_ms(stream, repeats, [&] { CHECK(cudaGraphLaunch(small.executable, stream)); });
    const double many_ms = median_ms(stream, repeats, [&] { CHECK(cudaGraphLaunch(large.executable, stream)); });
    const double stream_ms = median_ms(stream, repeats, [&] { launch_chain<TRIGGER>(many, blocks, stream, buffers); });
    synchronize();
    rows.emplace_back();
    rows.back().add("launch", name).add("blocks", blocks).add("kernels", many).add("right", right);
    rows.back().add("programmatic_edges", large.programmatic_edges);
    rows.back().add("graph_ns_per_kernel", (many_ms - few_ms) * 1e6 / (many - few));
    rows.back().add("stream_ns_per_kernel", stream_ms * 1e6 / many);
    CHECK(cudaGraphExecDestroy(small.executable));
    CHECK(cudaGraphExecDestroy(large.executable));
    CHECK(cudaStreamDestroy(stream));
    CHECK(cudaFree(buffers));
    return right;
}

}  // namespace

int main(int argc, char** argv) {
    const bool quick = start("E2", argc, argv);
    Json json = header();
    std::vector<Json> chains;
    bool ok = probe_grid(quick, json);
    ok &= probe_clusters(quick, json);
    for (int blocks : quick ? std::vector<int>{3} : std::vector<int>{1, 32, current().device.multiProcessorCount}) {
        ok &= probe_chain<Trigger::NONE>("plain", blocks, quick, chains);
        ok &= probe_chain<Trigger::EARLY>("programmatic, trigger before the wait", blocks, quick, chains);
        ok &= probe_chain<Trigger::LATE>("programmatic, trigger after the store", blocks, quick, chains);
    }
    json.add("ok", ok).add("quick", quick).add("kernel_chains", chains);
    finish(json, ok ? RIGHT : WRONG);
}
