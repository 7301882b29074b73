#include "simulator.h"

#include <algorithm>
#include <cstring>
#include <mutex>
#include <numeric>
#include <set>
#include <thread>

namespace googlenet_fused::sim {

Counters &Counters::operator+=(const Counters &other) {
  products += other.products;
  barriers += other.barriers;
  copied_bytes += other.copied_bytes;
  ldmatrix_a += other.ldmatrix_a;
  ldmatrix_b += other.ldmatrix_b;
  shared_loads += other.shared_loads;
  shared_stores += other.shared_stores;
  copy_writes += other.copy_writes;
  global_reads += other.global_reads;
  global_writes += other.global_writes;
  return *this;
}

Output::Output(void *data, const std::array<std::int64_t, 4> &sizes, const std::array<std::int64_t, 4> &strides,
               int element_bytes)
    : data_(static_cast<unsigned char *>(data)), sizes_(sizes), strides_(strides), element_bytes_(element_bytes) {
  std::iota(by_stride_.begin(), by_stride_.end(), 0);
  std::stable_sort(by_stride_.begin(), by_stride_.end(), [&](int a, int b) { return strides[a] > strides[b]; });
  written_.resize(sizes[0] * sizes[1] * sizes[2] * sizes[3]);
}

std::int64_t Output::index_of(std::int64_t offset) const {
  if (offset < 0) return -1;
  std::array<std::int64_t, 4> place{};
  for (const int axis : by_stride_) {
    if (sizes_[axis] == 1) continue;
    place[axis] = offset / strides_[axis];
    offset -= place[axis] * strides_[axis];
    if (place[axis] >= sizes_[axis]) return -1;
  }
  if (offset != 0) return -1;
  return ((place[0] * sizes_[1] + place[1]) * sizes_[2] + place[2]) * sizes_[3] + place[3];
}

void Output::note_store(const void *to, int bytes) {
  const std::int64_t begin = static_cast<const unsigned char *>(to) - data_;
  for (std::int64_t byte = begin; byte < begin + bytes; byte += element_bytes_) {
    const std::int64_t index = byte % element_bytes_ == 0 ? index_of(byte / element_bytes_) : -1;
    if (index < 0) throw SimulationError("a store outside of the output, " + std::to_string(byte) + " bytes from its first");
    std::atomic_ref<std::uint8_t> count(written_[index]);
    if (count.fetch_add(1) != 0) throw SimulationError("output element " + std::to_string(index) + " is written twice");
  }
}

void Output::check_complete() const {
  const auto missing = std::find(written_.begin(), written_.end(), 0);
  if (missing == written_.end()) return;
  const auto count = std::count(written_.begin(), written_.end(), 0);
  throw SimulationError(std::to_string(count) + " output elements are never written, the first of them " +
                        std::to_string(missing - written_.begin()));
}

Block::Block(const Launch &launch, const std::function<void()> &kernel)
    : launch_(launch), kernel_(kernel), threads_(launch.threads), warps_(launch.threads / kLanes) {}

int Block::random(int count) { // xorshift64*, whose upper bits are the better ones
  state_ ^= state_ >> 12;
  state_ ^= state_ << 25;
  state_ ^= state_ >> 27;
  return static_cast<int>((state_ * 0x2545f4914f6cdd1dull >> 33) % count);
}

void Block::fail(const std::string &what) const {
  throw SimulationError(what + " (block " + std::to_string(index_) + ", thread " + std::to_string(thread_) + ", after " +
                        std::to_string(epoch_) + " barriers)");
}

void Block::run(std::int64_t index) {
  index_ = index;
  epoch_ = waiting_ = 0;
  state_ = (launch_.modes.seed + 1) * 0x9e3779b97f4a7c15ull + static_cast<std::uint64_t>(index) * 0xbf58476d1ce4e5b9ull + 1;
  error_.clear();
  memory_.assign(launch_.shared_bytes + 128, launch_.modes.poison ? 0xff : 0);
  shared_ = memory_.data() + (128 - reinterpret_cast<std::uintptr_t>(memory_.data()) % 128) % 128;
  shadow_.assign(launch_.modes.races ? launch_.shared_bytes / 16 + 1 : 0, Shadow());
  warps_.assign(warps_.size(), Warp());
  for (Thread &thread : threads_) {
    thread.copies.clear();
    thread.group = 0;
    thread.fiber.start(&Block::enter, this);
  }
  const bool reversed = launch_.modes.order == Order::kReversed;
  for (Warp &warp : warps_) warp.resume = pick(~0u, reversed ? 0 : kLanes - 1);
  const int first = next_warp(reversed ? 0 : static_cast<int>(warps_.size()) - 1);
  block = this;
  thread_ = first * kLanes + warps_[first].resume;
  main_.switch_to(threads_[thread_].fiber);
  block = nullptr;
  if (!error_.empty()) throw SimulationError(error_);
}

void Block::enter(void *argument) {
  Block &self = *static_cast<Block *>(argument);
  try {
    self.kernel_();
    self.finish();
  } catch (const SimulationError &error) {
    self.error_ = error.what();
  }
  self.threads_[self.thread_].fiber.leave_for(self.main_);
}

// Ends a thread: on to another, or back when it was the last.
void Block::finish() {
  Thread &thread = threads_[thread_];
  if (!thread.copies.empty()) {
    const Copy &copy = thread.copies.back();
    const char *what = copy.group == thread.group ? "committed" : "waited for";
    fail("a copy to " + std::to_string(copy.shared) + " is not " + what + " at the end");
  }
  Warp &warp = warps_[thread_ / kLanes];
  const int lane = thread_ % kLanes;
  warp.done |= 1u << lane;
  int next = -1;
  if (warp.done != ~0u) {
    if (warp.arrived != 0) fail("a thread ends while lanes of its warp wait for it");
    next = thread_ / kLanes * kLanes + pick(~warp.done, lane);
    warp.resume = next % kLanes;
  } else {
    if (waiting_ > 0) fail("a warp ends while others wait at a barrier");
    if (launch_.modes.count) flush_accesses(warp);
    const int other = next_warp(thread_ / kLanes);
    if (other >= 0) next = other * kLanes + warps_[other].resume;
  }
  if (next < 0) return;
  Fiber &here = thread.fiber;
  thread_ = next;
  here.leave_for(threads_[next].fiber);
}

void Block::go_to(int thread) {
  Fiber &here = threads_[thread_].fiber;
  const int me = thread_;
  thread_ = thread;
  here.switch_to(threads_[thread].fiber);
  thread_ = me;
}

// One of the lanes of the mask, as the order has it.
int Block::pick(std::uint32_t among, int after) {
  if (launch_.modes.order == Order::kShuffled) {
    int skip = random(std::popcount(among));
    while (skip-- > 0) among &= among - 1;
    return std::countr_zero(among);
  }
  if (launch_.modes.order == Order::kForward) {
    const std::uint32_t above = after == kLanes - 1 ? 0 : among & ~0u << (after + 1);
    return std::countr_zero(above != 0 ? above : among);
  }
  const std::uint32_t below = among & ((1u << after) - 1);
  return kLanes - 1 - std::countl_zero(below != 0 ? below : among);
}

// A warp that can run, or -1.
int Block::next_warp(int after) {
  const int count = static_cast<int>(warps_.size());
  const bool shuffled = launch_.modes.order == Order::kShuffled;
  const int begin = shuffled ? random(count) : after;
  for (int i = 1; i <= count; i++) {
    const int step = launch_.modes.order == Order::kReversed ? count - i : i;
    const int warp = (begin + step) % count;
    if (warps_[warp].done != ~0u && !warps_[warp].at_barrier) return warp;
  }
  return -1;
}

void Block::barrier(const void *site) {
  collective(site, nullptr, [&](const auto &) {
    Warp &warp = warps_[thread_ / kLanes];
    if (std::any_of(warps_.begin(), warps_.end(), [](const Warp &each) { return each.done == ~0u; })) {
      fail("a barrier after a warp of the block has ended");
    }
    // A site is an address: a barrier that the compiler copies into both sides of a branch counts as two.
    if (waiting_ > 0 && barrier_ != site) fail("warps of one block are at different barriers");
    barrier_ = site;
    warp.at_barrier = true;
    warp.resume = thread_ % kLanes;
    if (++waiting_ == static_cast<int>(warps_.size())) {
      for (Warp &each : warps_) each.at_barrier = false;
      waiting_ = 0;
      epoch_++;
      counters_.barriers++;
      if (launch_.modes.order != Order::kShuffled) return;
    }
    const int next = next_warp(thread_ / kLanes);
    go_to(next * kLanes + warps_[next].resume);
  });
}

unsigned char *Block::shared(std::uint32_t address, int bytes) {
  if (address % bytes != 0) fail("a misaligned access to shared memory, " + std::to_string(bytes) + " bytes at " + std::to_string(address));
  if (std::uint64_t{address} + bytes > static_cast<std::uint64_t>(launch_.shared_bytes)) {
    fail("an access outside of shared memory, at " + std::to_string(address) + " of " + std::to_string(launch_.shared_bytes));
  }
  return shared_ + address;
}

void Block::fail_race(std::uint32_t address, const std::string &what) const {
  fail("a race at " + std::to_string(address) + ": " + what);
}

void Block::note_read(std::uint32_t address, int thread) {
  if (!launch_.modes.races) return;
  Shadow &shadow = shadow_[address / 16];
  const bool others = shadow.write_thread != thread;
  if (shadow.pending) fail_race(address, "read before the copy to it was waited for");
  if (shadow.write_epoch == epoch_ && others) fail_race(address, "read after another thread's write, no barrier between");
  if (shadow.landed_epoch == epoch_ && others) fail_race(address, "another thread's copy read, no barrier after its wait");
  if (shadow.read_epoch == epoch_ && shadow.read_thread != thread) {
    shadow.read_thread = -2; // several
  } else {
    shadow.read_epoch = epoch_;
    shadow.read_thread = thread;
  }
}

void Block::note_write(std::uint32_t address) {
  if (!launch_.modes.races) return;
  Shadow &shadow = shadow_[address / 16];
  const bool others = shadow.write_thread != thread_;
  if (shadow.pending) fail_race(address, "written while a copy to it is under way");
  if (shadow.read_epoch == epoch_ && shadow.read_thread != thread_) {
    fail_race(address, "written after another thread's read, no barrier between");
  }
  if (shadow.write_epoch == epoch_ && others) fail_race(address, "written by two threads, no barrier between");
  if (shadow.landed_epoch == epoch_ && others) fail_race(address, "written over another thread's copy, no barrier between");
  shadow.write_epoch = epoch_;
  shadow.write_thread = thread_;
  shadow.landed_epoch = -1;
}

void Block::check_read(const void *from, int bytes) const {
  const auto begin = reinterpret_cast<std::intptr_t>(from);
  std::int64_t least = INT64_MAX;
  std::string nearest;
  for (const Array &array : launch_.readable) {
    const std::int64_t before = reinterpret_cast<std::intptr_t>(array.data) - begin, after = bytes - array.bytes - before;
    if (before <= 0 && after <= 0) return;
    const std::int64_t away = std::max(before, after);
    if (away >= least) continue;
    least = away;
    nearest = ", " + std::to_string(away) + " bytes " + (before > after ? "before " : "beyond ") + array.name;
  }
  fail("a read of " + std::to_string(bytes) + " bytes outside of every input" + nearest);
}

void Block::store(void *to, const void *from, int bytes, const void *site) {
  if (reinterpret_cast<std::uintptr_t>(to) % bytes != 0) fail("a misaligned store of " + std::to_string(bytes) + " bytes");
  try {
    if (launch_.output != nullptr) launch_.output->note_store(to, bytes);
  } catch (const SimulationError &error) {
    fail(error.what());
  }
  note_access(Access::kGlobalWrite, site, reinterpret_cast<std::uintptr_t>(to), bytes);
  std::memcpy(to, from, bytes);
}

void Block::copy(std::uint32_t address, const void *source, int bytes, const void *site) {
  unsigned char *const to = shared(address, 16);
  if (bytes < 0 || bytes > 16) fail("a copy of " + std::to_string(bytes) + " bytes");
  if (bytes > 0 && reinterpret_cast<std::uintptr_t>(source) % 16 != 0) fail("a copy from a misaligned address");
  if (bytes > 0) check_read(source, bytes);
  note_write(address);
  if (launch_.modes.races) shadow_[address / 16].pending = true;
  counters_.copied_bytes += bytes;
  note_access(Access::kCopyWrite, site, address, 16);
  if (bytes > 0) note_access(Access::kGlobalRead, site, reinterpret_cast<std::uintptr_t>(source), bytes);
  Thread &thread = threads_[thread_];
  thread.copies.push_back({address, source, bytes, thread.group});
  if (launch_.modes.eager) {
    std::memset(to, 0, 16);
    if (bytes > 0) std::memcpy(to, source, bytes);
  }
}

void Block::commit() { threads_[thread_].group++; }

void Block::land(const Copy &copy) {
  if (!launch_.modes.eager) {
    std::memset(shared_ + copy.shared, 0, 16);
    if (copy.bytes > 0) std::memcpy(shared_ + copy.shared, copy.source, copy.bytes);
  }
  if (!launch_.modes.races) return;
  Shadow &shadow = shadow_[copy.shared / 16];
  shadow.pending = false;
  shadow.landed_epoch = epoch_;
}

void Block::wait(int left) {
  Thread &thread = threads_[thread_];
  const auto still = [&](const Copy &copy) { return copy.group >= thread.group - left; };
  const auto end = std::find_if(thread.copies.begin(), thread.copies.end(), still);
  std::for_each(thread.copies.begin(), end, [&](const Copy &copy) { land(copy); });
  thread.copies.erase(thread.copies.begin(), end);
}

void Block::note_access(Access kind, const void *site, std::uint64_t address, int bytes) {
  if (!launch_.modes.count) return;
  Warp &warp = warps_[thread_ / kLanes];
  const std::pair<int, const void *> what(static_cast<int>(kind), site);
  const int lane = thread_ % kLanes, ordinal = warp.ordinals[lane][what]++;
  warp.accesses[{what, ordinal}].push_back({lane, address, bytes});
}

void Block::flush_accesses(Warp &warp) {
  for (const auto &[key, accesses] : warp.accesses) {
    const auto kind = static_cast<Access>(key.first.first);
    if (kind == Access::kGlobalRead || kind == Access::kGlobalWrite) {
      std::set<std::uint64_t> sectors;
      std::int64_t bytes = 0;
      for (const auto &accessed : accesses) {
        sectors.insert(accessed.address / 32);
        sectors.insert((accessed.address + accessed.bytes - 1) / 32);
        bytes += accessed.bytes;
      }
      Ratio &ratio = kind == Access::kGlobalRead ? counters_.global_reads : counters_.global_writes;
      ratio += {static_cast<std::int64_t>(sectors.size()), (bytes + 31) / 32};
      continue;
    }
    Ratio &ratio = kind == Access::kSharedLoad    ? counters_.shared_loads
                   : kind == Access::kSharedStore ? counters_.shared_stores
                                                  : counters_.copy_writes;
    for (int lanes = 0; lanes < kLanes; lanes += kBankUnits) { // eight lanes of 16 bytes at once
      std::array<std::set<std::uint64_t>, kBankUnits> units;
      for (const auto &accessed : accesses) {
        if (accessed.lane / kBankUnits == lanes / kBankUnits) units[accessed.address / 16 % kBankUnits].insert(accessed.address);
      }
      std::size_t most = 0;
      for (const auto &unit : units) most = std::max(most, unit.size());
      if (most > 0) ratio += {static_cast<std::int64_t>(most), 1};
    }
  }
  warp.accesses.clear();
  for (auto &ordinals : warp.ordinals) ordinals.clear();
}

void Block::count_matrix(const std::array<std::uint32_t, 8> &rows, bool of_a) {
  int most = 0;
  std::array<int, kBankUnits> units{};
  for (int i = 0; i < 8; i++) {
    if (std::find(rows.begin(), rows.begin() + i, rows[i]) != rows.begin() + i) continue; // the same row is read once
    most = std::max(most, ++units[rows[i] / 16 % kBankUnits]);
  }
  (of_a ? counters_.ldmatrix_a : counters_.ldmatrix_b) += {most, 1};
}

Counters run(const Launch &launch, const std::function<void()> &kernel) {
  std::atomic<std::int64_t> next{0};
  std::atomic<bool> failed{false};
  std::mutex mutex;
  Counters counters;
  std::string error;
  const auto work = [&] {
    Block block(launch, kernel);
    try {
      for (std::int64_t i; !failed && (i = next++) < launch.blocks;) {
        block.run(launch.modes.order == Order::kForward ? i : launch.blocks - 1 - i);
      }
    } catch (const SimulationError &found) {
      const std::lock_guard lock(mutex);
      if (!failed.exchange(true)) error = found.what();
    }
    const std::lock_guard lock(mutex);
    counters += block.counters();
  };
  std::vector<std::jthread> threads; // joined, too, if another cannot be started
  for (std::int64_t i = 1; i < std::min<std::int64_t>(launch.modes.threads, launch.blocks); i++) threads.emplace_back(work);
  work();
  for (std::jthread &thread : threads) thread.join();
  if (failed) throw SimulationError(error);
  if (launch.output != nullptr) launch.output->check_complete();
  return counters;
}

} // namespace googlenet_fused::sim
