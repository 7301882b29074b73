// What the CUDA probes share: error checks, the JSON line, timing, and thin wrappers of the PTX they measure. sm_90a only.
#pragma once

#include <cuda_bf16.h>
#include <cuda_runtime.h>

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <string>
#include <vector>

#include "layout.h"

namespace probe {

// A JSON object in the making; keys keep their order, values are written at once.
class Json {
  public:
    Json& add(const char* key, const std::string& value) { return raw(key, quote(value)); }
    Json& add(const char* key, const char* value) { return raw(key, quote(value)); }
    Json& add(const char* key, bool value) { return raw(key, value ? "true" : "false"); }
    Json& add(const char* key, int value) { return raw(key, std::to_string(value)); }
    Json& add(const char* key, long long value) { return raw(key, std::to_string(value)); }
    Json& add(const char* key, double value) {
        char text[32];
        std::snprintf(text, sizeof text, "%.6g", value);
        return raw(key, value == value && value - value == 0 ? text : "null");  // JSON knows neither NaN nor infinity
    }
    Json& add(const char* key, const std::vector<int>& values) {
        std::string list;
        for (int value : values) list += (list.empty() ? "" : ", ") + std::to_string(value);
        return raw(key, "[" + list + "]");
    }
    Json& add(const char* key, const std::vector<Json>& values) {
        std::string list;
        for (const Json& value : values) list += (list.empty() ? "" : ", ") + value.text();
        return raw(key, "[" + list + "]");
    }
    std::string text() const { return "{" + body_ + "}"; }

  private:
    Json& raw(const char* key, const std::string& value) {
        body_ += (body_.empty() ? "" : ", ") + quote(key) + ": " + value;
        return *this;
    }
    static std::string quote(const std::string& value) {
        std::string text = "\"";
        for (char c : value) {
            if (c == '"' || c == '\\') text += '\\';
            text += static_cast<unsigned char>(c) < 32 ? ' ' : c;
        }
        return text + "\"";
    }
    std::string body_;
};

enum Exit : int { RIGHT = 0, WRONG = 1, CANNOT_RUN = 2 };

// Why a kernel gave up, written by the kernel into page-locked host memory just before it traps, so that it outlives the trap.
enum Trap : int { NO_TRAP = 0, TRAP_WAIT_TOO_LONG = 1 };

struct Probe {
    const char* name;
    cudaDeviceProp device;
    volatile int* trap_host;  // page-locked
    int* trap;                // the same word, as the device sees it
    int max_clock_khz;
};

inline Probe& current() {
    static Probe probe{};
    return probe;
}

inline Json header() {
    const cudaDeviceProp& device = current().device;
    Json json;
    json.add("probe", current().name).add("device", device.name);
    json.add("arch", "sm_" + std::to_string(device.major) + std::to_string(device.minor));
    json.add("multiprocessors", device.multiProcessorCount).add("max_sm_clock_mhz", current().max_clock_khz / 1e3);
    return json;
}

[[noreturn]] inline void finish(const Json& json, Exit status) {
    std::printf("%s\n", json.text().c_str());
    std::fflush(stdout);
    std::exit(status);
}

[[noreturn]] inline void skip(const std::string& reason) {
    finish(Json().add("probe", current().name).add("ok", false).add("skipped", reason), CANNOT_RUN);
}

[[noreturn]] inline void fail(const std::string& reason) {
    std::string text = reason;
    if (current().trap_host && *current().trap_host == TRAP_WAIT_TOO_LONG) text += "; a wait in a kernel ran past its limit";
    std::fprintf(stderr, "%s: %s\n", current().name, text.c_str());
    finish(header().add("ok", false).add("error", text), WRONG);
}

inline void check(cudaError_t error, const char* what, int line) {
    if (error == cudaSuccess) return;
    fail(std::string(what) + " at line " + std::to_string(line) + ": " + cudaGetErrorName(error) + ", " +
         cudaGetErrorString(error));
}
#define CHECK(call) ::probe::check((call), #call, __LINE__)

// Reads the arguments and chooses device 0. The only option is --quick (one tiny configuration, for compute-sanitizer), and
// whether it was given is returned. Ends the program with status 2 where the probe cannot run.
inline bool start(const char* name, int argc, char** argv) {
    Probe& probe = current();
    probe.name = name;
    bool quick = false;
    for (int i = 1; i < argc; ++i) {
        if (std::strcmp(argv[i], "--quick") != 0) skip(std::string("unknown argument ") + argv[i] + ", use --quick");
        quick = true;
    }
    int count = 0;
    const cudaError_t error = cudaGetDeviceCount(&count);
    if (error != cudaSuccess) skip(std::string("no usable CUDA device: ") + cudaGetErrorString(error));
    if (count == 0) skip("no CUDA device");
    CHECK(cudaSetDevice(0));
    CHECK(cudaGetDeviceProperties(&probe.device, 0));
    if (probe.device.major != 9 || probe.device.minor != 0) {
        skip(std::string("compiled for sm_90a, and ") + probe.device.name + " is sm_" + std::to_string(probe.device.major) +
             std::to_string(probe.device.minor));
    }
    CHECK(cudaDeviceGetAttribute(&probe.max_clock_khz, cudaDevAttrClockRate, 0));
    void* host = nullptr;
    CHECK(cudaHostAlloc(&host, sizeof(int), cudaHostAllocMapped));
    std::memset(host, 0, sizeof(int));
    probe.trap_host = static_cast<volatile int*>(host);
    void* device = nullptr;
    CHECK(cudaHostGetDevicePointer(&device, host, 0));
    probe.trap = static_cast<int*>(device);
    return quick;
}

template <typename T>
T* device_array(size_t count) {
    void* pointer = nullptr;
    CHECK(cudaMalloc(&pointer, count * sizeof(T)));
    return static_cast<T*>(pointer);
}

template <typename T>
T* device_copy(const std::vector<T>& values) {
    T* pointer = device_array<T>(values.size());
    CHECK(cudaMemcpy(pointer, values.data(), values.size() * sizeof(T), cudaMemcpyHostToDevice));
    return pointer;
}

template <typename T>
std::vector<T> host_copy(const T* pointer, size_t count) {
    std::vector<T> values(count);
    CHECK(cudaMemcpy(values.data(), pointer, count * sizeof(T), cudaMemcpyDeviceToHost));
    return values;
}

inline void synchronize() {
    CHECK(cudaGetLastError());
    CHECK(cudaDeviceSynchronize());
}

// Milliseconds `work` takes on `stream`, by events: the median of `repeats` runs after one that is not counted.
inline double median_ms(cudaStream_t stream, int repeats, const std::function<void()>& work) {
    cudaEvent_t begin, end;
    CHECK(cudaEventCreate(&begin));
    CHECK(cudaEventCreate(&end));
    std::vector<float> times;
    for (int i = 0; i <= repeats; ++i) {
        CHECK(cudaEventRecord(begin, stream));
        work();
        CHECK(cudaEventRecord(end, stream));
        CHECK(cudaEventSynchronize(end));
        float ms = 0;
        CHECK(cudaEventElapsedTime(&ms, begin, end));
        if (i) times.push_back(ms);
    }
    CHECK(cudaEventDestroy(begin));
    CHECK(cudaEventDestroy(end));
    std::nth_element(times.begin(), times.begin() + times.size() / 2, times.end());
    return times[times.size() / 2];
}

// xorshift64*: the same numbers everywhere.
class Random {
  public:
    explicit Random(uint64_t seed) : state_(seed * 2654435761u + 88172645463325252u) {}
    uint32_t next() {
        state_ ^= state_ >> 12;
        state_ ^= state_ << 25;
        state_ ^= state_ >> 27;
        return static_cast<uint32_t>(state_ * 2685821657736338717u >> 32);
    }
    float uniform() { return next() * (2.0f / 4294967296.0f) - 1.0f; }
    // A whole number, 1..limit in magnitude, of either sign: sums of products of such are exact in fp32 while under 2^24.
    float nonzero_integer(int limit) {
        const int magnitude = static_cast<int>(next() % limit) + 1;
        return static_cast<float>(next() & 1 ? magnitude : -magnitude);
    }

  private:
    uint64_t state_;
};

#ifdef __CUDACC__

constexpr long long WAIT_LIMIT_CYCLES = 8'000'000'000;  // some 4 s, far above any wait that ends, also under compute-sanitizer

__device__ __forceinline__ void give_up(int* trap, Trap reason) {
    *reinterpret_cast<volatile int*>(trap) = reason;
    __threadfence_system();
    __trap();
}

__device__ __forceinline__ uint32_t shared_address(const void* pointer) {
    return static_cast<uint32_t>(__cvta_generic_to_shared(pointer));
}

// Makes this thread's ordinary stores to shared memory visible to wgmma and to the copy engine; a barrier must follow.
__device__ __forceinline__ void fence_proxy_async() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }

// wgmma: D[64][N] (+)= A[64][16] x B[N][16]^T, both K-major in shared memory, bf16 in and fp32 out.
__device__ __forceinline__ void wgmma_fence() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
__device__ __forceinline__ void wgmma_commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }
template <int PENDING>
__device__ __forceinline__ void wgmma_wait() {
    asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(PENDING) : "memory");
}

template <int N>
struct Wgmma;  // for N = 64, 128 and 216

template <>
struct Wgmma<64> {
    static __device__ __forceinline__ void multiply(float (&d)[32], uint64_t a, uint64_t b, int accumulate) {
        asm volatile(
            "{\n.reg .pred p;\n"
            "setp.ne.b32 p, %34, 0;\n"
            "wgmma.mma_async.sync.aligned.m64n64k16.f32.bf16.bf16 {"
            "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, "
            "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31}, "
            "%32, %33, p, 1, 1, 0, 0;\n}\n"
            : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3]), "+f"(d[4]), "+f"(d[5]), "+f"(d[6]), "+f"(d[7]),
              "+f"(d[8]), "+f"(d[9]), "+f"(d[10]), "+f"(d[11]), "+f"(d[12]), "+f"(d[13]), "+f"(d[14]), "+f"(d[15]),
              "+f"(d[16]), "+f"(d[17]), "+f"(d[18]), "+f"(d[19]), "+f"(d[20]), "+f"(d[21]), "+f"(d[22]), "+f"(d[23]),
              "+f"(d[24]), "+f"(d[25]), "+f"(d[26]), "+f"(d[27]), "+f"(d[28]), "+f"(d[29]), "+f"(d[30]), "+f"(d[31])
            : "l"(a), "l"(b), "r"(accumulate));
    }
};

template <>
struct Wgmma<128> {
    static __device__ __forceinline__ void multiply(float (&d)[64], uint64_t a, uint64_t b, int accumulate) {
        asm volatile(
            "{\n.reg .pred p;\n"
            "setp.ne.b32 p, %66, 0;\n"
            "wgmma.mma_async.sync.aligned.m64n128k16.f32.bf16.bf16 {"
            "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, "
            "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31, "
            "%32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, "
            "%48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63}, "
            "%64, %65, p, 1, 1, 0, 0;\n}\n"
            : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3]), "+f"(d[4]), "+f"(d[5]), "+f"(d[6]), "+f"(d[7]),
              "+f"(d[8]), "+f"(d[9]), "+f"(d[10]), "+f"(d[11]), "+f"(d[12]), "+f"(d[13]), "+f"(d[14]), "+f"(d[15]),
              "+f"(d[16]), "+f"(d[17]), "+f"(d[18]), "+f"(d[19]), "+f"(d[20]), "+f"(d[21]), "+f"(d[22]), "+f"(d[23]),
              "+f"(d[24]), "+f"(d[25]), "+f"(d[26]), "+f"(d[27]), "+f"(d[28]), "+f"(d[29]), "+f"(d[30]), "+f"(d[31]),
              "+f"(d[32]), "+f"(d[33]), "+f"(d[34]), "+f"(d[35]), "+f"(d[36]), "+f"(d[37]), "+f"(d[38]), "+f"(d[39]),
              "+f"(d[40]), "+f"(d[41]), "+f"(d[42]), "+f"(d[43]), "+f"(d[44]), "+f"(d[45]), "+f"(d[46]), "+f"(d[47]),
              "+f"(d[48]), "+f"(d[49]), "+f"(d[50]), "+f"(d[51]), "+f"(d[52]), "+f"(d[53]), "+f"(d[54]), "+f"(d[55]),
              "+f"(d[56]), "+f"(d[57]), "+f"(d[58]), "+f"(d[59]), "+f"(d[60]), "+f"(d[61]), "+f"(d[62]), "+f"(d[63])
            : "l"(a), "l"(b), "r"(accumulate));
    }
};

template <>
struct Wgmma<216> {
    static __device__ __forceinline__ void multiply(float (&d)[108], uint64_t a, uint64_t b, int accumulate) {
        asm volatile(
            "{\n.reg .pred p;\n"
            "setp.ne.b32 p, %110, 0;\n"
            "wgmma.mma_async.sync.aligned.m64n216k16.f32.bf16.bf16 {"
            "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, "
            "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31, "
            "%32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, "
            "%48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63, "
            "%64, %65, %66, %67, %68, %69, %70, %71, %72, %73, %74, %75, %76, %77, %78, %79, "
            "%80, %81, %82, %83, %84, %85, %86, %87, %88, %89, %90, %91, %92, %93, %94, %95, "
            "%96, %97, %98, %99, %100, %101, %102, %103, %104, %105, %106, %107}, "
            "%108, %109, p, 1, 1, 0, 0;\n}\n"
            : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3]), "+f"(d[4]), "+f"(d[5]), "+f"(d[6]), "+f"(d[7]),
              "+f"(d[8]), "+f"(d[9]), "+f"(d[10]), "+f"(d[11]), "+f"(d[12]), "+f"(d[13]), "+f"(d[14]), "+f"(d[15]),
              "+f"(d[16]), "+f"(d[17]), "+f"(d[18]), "+f"(d[19]), "+f"(d[20]), "+f"(d[21]), "+f"(d[22]), "+f"(d[23]),
              "+f"(d[24]), "+f"(d[25]), "+f"(d[26]), "+f"(d[27]), "+f"(d[28]), "+f"(d[29]), "+f"(d[30]), "+f"(d[31]),
              "+f"(d[32]), "+f"(d[33]), "+f"(d[34]), "+f"(d[35]), "+f"(d[36]), "+f"(d[37]), "+f"(d[38]), "+f"(d[39]),
              "+f"(d[40]), "+f"(d[41]), "+f"(d[42]), "+f"(d[43]), "+f"(d[44]), "+f"(d[45]), "+f"(d[46]), "+f"(d[47]),
              "+f"(d[48]), "+f"(d[49]), "+f"(d[50]), "+f"(d[51]), "+f"(d[52]), "+f"(d[53]), "+f"(d[54]), "+f"(d[55]),
              "+f"(d[56]), "+f"(d[57]), "+f"(d[58]), "+f"(d[59]), "+f"(d[60]), "+f"(d[61]), "+f"(d[62]), "+f"(d[63]),
              "+f"(d[64]), "+f"(d[65]), "+f"(d[66]), "+f"(d[67]), "+f"(d[68]), "+f"(d[69]), "+f"(d[70]), "+f"(d[71]),
              "+f"(d[72]), "+f"(d[73]), "+f"(d[74]), "+f"(d[75]), "+f"(d[76]), "+f"(d[77]), "+f"(d[78]), "+f"(d[79]),
              "+f"(d[80]), "+f"(d[81]), "+f"(d[82]), "+f"(d[83]), "+f"(d[84]), "+f"(d[85]), "+f"(d[86]), "+f"(d[87]),
              "+f"(d[88]), "+f"(d[89]), "+f"(d[90]), "+f"(d[91]), "+f"(d[92]), "+f"(d[93]), "+f"(d[94]), "+f"(d[95]),
              "+f"(d[96]), "+f"(d[97]), "+f"(d[98]), "+f"(d[99]), "+f"(d[100]), "+f"(d[101]), "+f"(d[102]), "+f"(d[103]),
              "+f"(d[104]), "+f"(d[105]), "+f"(d[106]), "+f"(d[107])
            : "l"(a), "l"(b), "r"(accumulate));
    }
};

// mbarrier
__device__ __forceinline__ void mbarrier_init(uint32_t barrier, uint32_t arrivals) {
    asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(barrier), "r"(arrivals) : "memory");
}
// Makes initialised barriers visible to the copy engine and to the other blocks of the cluster; a cluster barrier must follow.
__device__ __forceinline__ void mbarrier_init_fence() { asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory"); }
__device__ __forceinline__ void mbarrier_expect(uint32_t barrier, uint32_t bytes) {
    asm volatile("mbarrier.arrive.expect_tx.release.cta.shared::cta.b64 _, [%0], %1;" ::"r"(barrier), "r"(bytes) : "memory");
}
// Arrives at the barrier at the same place in the shared memory of block `rank` of the cluster.
__device__ __forceinline__ void mbarrier_arrive_remote(uint32_t barrier, uint32_t rank) {
    asm volatile(
        "{\n.reg .b32 remote;\n"
        "mapa.shared::cluster.u32 remote, %0, %1;\n"
        "mbarrier.arrive.release.cluster.shared::cluster.b64 _, [remote];\n}\n" ::"r"(barrier),
        "r"(rank)
        : "memory");
}
__device__ __forceinline__ bool mbarrier_try_wait(uint32_t barrier, uint32_t parity) {
    uint32_t done;
    asm volatile(
        "{\n.reg .pred p;\n"
        "mbarrier.try_wait.parity.acquire.cluster.shared::cta.b64 p, [%1], %2;\n"
        "selp.u32 %0, 1, 0, p;\n}\n"
        : "=r"(done)
        : "r"(barrier), "r"(parity)
        : "memory");
    return done != 0;
}
__device__ __forceinline__ void mbarrier_wait(uint32_t barrier, uint32_t parity, int* trap) {
    if (mbarrier_try_wait(barrier, parity)) return;
    const long long begin = clock64();
    while (!mbarrier_try_wait(barrier, parity)) {
        if (clock64() - begin > WAIT_LIMIT_CYCLES) give_up(trap, TRAP_WAIT_TOO_LONG);
    }
}

// Clusters
__device__ __forceinline__ uint32_t cluster_rank() {
    uint32_t rank;
    asm volatile("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
    return rank;
}
__device__ __forceinline__ void cluster_barrier() {
    asm volatile("barrier.cluster.arrive.release.aligned;\nbarrier.cluster.wait.acquire.aligned;" ::: "memory");
}

// Programmatic dependent launch
__device__ __forceinline__ void launch_dependents() { asm volatile("griddepcontrol.launch_dependents;" ::: "memory"); }
__device__ __forceinline__ void wait_for_prerequisites() { asm volatile("griddepcontrol.wait;" ::: "memory"); }

#endif  // __CUDACC__

}  // namespace probe
