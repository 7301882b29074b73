// A GPU's block of threads on a CPU. Each thread is a fiber and runs until it must wait for others: at a collective for the lanes
// of its warp, at a barrier for the block. What a real GPU would let pass, or do wrong once in a while, is an error here.
#pragma once

#include <array>
#include <atomic>
#include <bit>
#include <cstdint>
#include <functional>
#include <map>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include "fiber.h"

namespace googlenet_fused::sim {

constexpr int kLanes = 32;
constexpr int kBankUnits = 8; // 16-byte units that shared memory serves at once
constexpr int kWholeWarp = -1; // in place of a thread that reads: other lanes than the one that names the address get of it

// What is wrong with the program that is simulated.
struct SimulationError : std::runtime_error {
  using std::runtime_error::runtime_error;
};

enum class Order { kForward, kReversed, kShuffled };

struct Modes {
  Order order = Order::kForward; // in which lanes, warps and blocks take their turns
  std::uint64_t seed = 0;        // of kShuffled
  bool eager = false;  // copies are made when they are issued: an overwritten slot shows. Else when they are waited for: a missing wait does
  bool races = true;   // two threads, even of one warp, at the same 16 bytes and no barrier between are an error, if one writes
  bool poison = true;  // shared memory begins as NaN
  bool count = false;  // wavefronts and sectors, which takes time
  int threads = 2;     // of the CPU
};

// How often a group of addresses was accessed at once, and how often that would have been without a conflict.
struct Ratio {
  std::int64_t taken = 0, least = 0;

  Ratio &operator+=(const Ratio &other) {
    taken += other.taken;
    least += other.least;
    return *this;
  }
};

struct Counters {
  std::int64_t products = 0; // mma instructions
  std::int64_t barriers = 0;
  std::int64_t copied_bytes = 0;
  Ratio ldmatrix_a, ldmatrix_b;                   // wavefronts of shared memory
  Ratio shared_loads, shared_stores, copy_writes; // the same, of 16 bytes a thread
  Ratio global_reads, global_writes;              // sectors of 32 bytes

  Counters &operator+=(const Counters &other);
};

// Memory of the host that the program may read.
struct Array {
  const char *name;
  const void *data;
  std::int64_t bytes;
};

// The output, every element of which must be written once. An axis's stride must step over all that lies along the axes of
// smaller strides, as fill_params has it.
class Output {
public:
  Output() = default;
  Output(void *data, const std::array<std::int64_t, 4> &sizes, const std::array<std::int64_t, 4> &strides, int element_bytes);

  void note_store(const void *to, int bytes); // throws SimulationError if it is not inside
  void check_complete() const;                // throws SimulationError if an element was not written, or twice

private:
  std::int64_t index_of(std::int64_t offset) const; // -1: none of its elements

  unsigned char *data_ = nullptr;
  std::array<std::int64_t, 4> sizes_{}, strides_{};
  std::array<int, 4> by_stride_{}; // axes, the largest stride first
  int element_bytes_ = 1;
  std::vector<std::uint8_t> written_;
};

// One launch: what is the same for all of its blocks.
struct Launch {
  std::int64_t blocks = 1;
  int threads = kLanes; // of a block
  int shared_bytes = 0;
  Modes modes;
  std::vector<Array> readable;
  Output *output = nullptr;
};

// Runs ``kernel`` in every thread of every block. Throws the first SimulationError of any.
Counters run(const Launch &launch, const std::function<void()> &kernel);

class Block {
public:
  Block(const Launch &launch, const std::function<void()> &kernel);

  void run(std::int64_t index);
  const Counters &counters() const { return counters_; }

  int thread() const { return thread_; }
  std::int64_t index() const { return index_; }

  [[noreturn]] void fail(const std::string &what) const;

  // Waits for all lanes of the warp, of which the last one runs ``execute(deposits)``; all must come from the same ``site``.
  template <class Execute> void collective(const void *site, void *deposit, const Execute &execute);
  void barrier(const void *site);

  void copy(std::uint32_t shared, const void *source, int bytes, const void *site);
  void commit();
  void wait(int left);

  unsigned char *shared(std::uint32_t address, int bytes);
  void note_read(std::uint32_t address) { note_read(address, thread_); }
  void note_read(std::uint32_t address, int thread);
  void note_write(std::uint32_t address);
  void check_read(const void *from, int bytes) const;
  void store(void *to, const void *from, int bytes, const void *site);

  enum class Access { kSharedLoad, kSharedStore, kCopyWrite, kGlobalRead, kGlobalWrite };
  // Counts an access of this lane beside those of its warp's other lanes at the same site.
  void note_access(Access kind, const void *site, std::uint64_t address, int bytes);
  void count_matrix(const std::array<std::uint32_t, 8> &rows, bool of_a);

  Counters counters_;

private:
  struct Copy {
    std::uint32_t shared;
    const void *source;
    int bytes, group;
  };
  struct Thread {
    Fiber fiber;
    std::vector<Copy> copies; // not waited for
    int group = 0;            // that is being filled
  };
  struct Warp {
    std::uint32_t arrived = 0, done = 0; // a bit a lane
    std::uint64_t generation = 0;
    const void *site = nullptr;
    std::array<void *, kLanes> deposits{};
    bool at_barrier = false;
    int resume = 0;
    using Key = std::pair<std::pair<int, const void *>, int>; // kind, site and how many before, of the same lane
    struct Accessed {
      int lane;
      std::uint64_t address;
      int bytes;
    };
    std::map<Key, std::vector<Accessed>> accesses;
    std::array<std::map<std::pair<int, const void *>, int>, kLanes> ordinals;
  };
  // Who touched 16 bytes of shared memory last, and since which barrier.
  struct Shadow {
    int write_epoch = -1, write_thread = -1, read_epoch = -1, read_thread = -1, landed_epoch = -1;
    bool pending = false;
  };

  static void enter(void *self);
  [[noreturn]] void fail_race(std::uint32_t address, const std::string &what) const;
  void finish();
  int pick(std::uint32_t among, int after);
  int next_warp(int after);
  void go_to(int thread);
  void land(const Copy &copy);
  void flush_accesses(Warp &warp);
  int random(int count);

  const Launch &launch_;
  const std::function<void()> &kernel_;
  std::vector<Thread> threads_;
  std::vector<Warp> warps_;
  std::vector<unsigned char> memory_;
  unsigned char *shared_ = nullptr;
  std::vector<Shadow> shadow_;
  Fiber main_;
  std::int64_t index_ = 0;
  int thread_ = 0, epoch_ = 0, waiting_ = 0;
  const void *barrier_ = nullptr; // at which they wait
  std::uint64_t state_ = 0;
  std::string error_;
};

inline thread_local Block *block = nullptr; // the one that runs on this thread of the CPU

template <class Execute> void Block::collective(const void *site, void *deposit, const Execute &execute) {
  const int lane = thread_ % kLanes;
  Warp &warp = warps_[thread_ / kLanes];
  if (warp.done != 0) fail("a collective after lanes of the warp have ended");
  if (warp.arrived == 0) warp.site = site;
  if (warp.site != site) fail("lanes of one warp are at different collectives");
  warp.deposits[lane] = deposit;
  warp.arrived |= 1u << lane;
  if (warp.arrived == ~0u) {
    if (launch_.modes.count) flush_accesses(warp);
    warp.arrived = 0;
    warp.generation++;
    execute(warp.deposits);
    if (launch_.modes.order == Order::kShuffled) go_to(thread_ / kLanes * kLanes + pick(~0u, lane));
    return;
  }
  const std::uint64_t generation = warp.generation;
  go_to(thread_ / kLanes * kLanes + pick(~(warp.arrived | warp.done), lane));
  if (warp.generation == generation) fail("lanes wait for one that never comes");
}

} // namespace googlenet_fused::sim
