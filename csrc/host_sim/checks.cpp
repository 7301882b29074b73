#include "checks.h"

#include <cstring>
#include <map>

#include "primitives.h"

namespace googlenet_fused::sim {
namespace {

Launch one_block(int warps, int shared_bytes, const Modes &modes = {}) {
  Launch launch;
  launch.threads = warps * kLanes;
  launch.shared_bytes = shared_bytes;
  launch.modes = modes;
  return launch;
}

Unit unit_of(const void *from) {
  Unit unit;
  std::memcpy(&unit, from, sizeof unit);
  return unit;
}

template <class T> std::vector<float> multiply_by(const void *a, const void *b) {
  constexpr int kPitch = kStepBytes + kUnitBytes;
  std::vector<float> result(kFragmentRows * kWarpColumns);
  run(one_block(1, 64 * kPitch), [&] {
    const int lane = thread_index();
    const auto copy = [&](const void *from, int row, std::uint32_t to) {
      for (int unit = 0; unit < 2; unit++) {
        const auto *bytes = static_cast<const unsigned char *>(from) + row * kStepBytes + unit * kUnitBytes;
        store_shared(to + row * kPitch + unit * kUnitBytes, unit_of(bytes));
      }
    };
    const std::uint32_t b_begin = kFragmentRows * kPitch;
    if (lane < kFragmentRows) copy(a, lane, 0);
    copy(b, lane, b_begin);
    sync_block();
    std::uint32_t a_words[1][4], b_words[2][4], a_rows[1], b_rows[2];
    a_rows[0] = lane % 16 * kPitch + lane / 16 * kUnitBytes;
    for (int j = 0; j < 2; j++) {
      b_rows[j] = b_begin + (j * 16 + lane / 16 * 8 + lane % 8) * kPitch + lane / 8 % 2 * kUnitBytes;
    }
    load_operands(a_words, a_rows, 0, 0, b_words, b_rows, 0, 0);
    float sums[1][4][4] = {};
    multiply_tile<T>(sums, a_words, b_words);
    for (int j = 0; j < 4; j++) {
      for (int q = 0; q < 4; q++) {
        result[(lane / 4 + q / 2 * 8) * kWarpColumns + j * 8 + lane % 4 * 2 + q % 2] = sums[0][j][q];
      }
    }
  });
  return result;
}

// Two warps, 1 KiB of shared memory, one input and one output of 64 units.
struct Bench {
  alignas(16) unsigned char input[1024];
  alignas(16) unsigned char output[1024];
};

using Kernel = void (*)(Bench &);

void write_then_read_of_other_warp(bool with_barrier, Bench &bench) {
  store_shared(thread_index() * 16, unit_of(bench.input));
  if (with_barrier) sync_block();
  store_unit(bench.output + thread_index() * 16, load_shared((thread_index() ^ 32) * 16));
}

void copy_then_read(bool with_wait, Bench &bench) {
  copy_async(thread_index() * 16, bench.input + thread_index() * 16, 16);
  copy_commit();
  if (with_wait) copy_wait<0>();
  sync_block();
  store_unit(bench.output + thread_index() * 16, load_shared((thread_index() ^ 32) * 16));
}

void write_own(Bench &bench) { store_unit(bench.output + thread_index() * 16, unit_of(bench.input)); }

const std::map<std::string, Kernel> &kernels() {
  static const std::map<std::string, Kernel> known = {
      {"sound", [](Bench &bench) { write_then_read_of_other_warp(true, bench); }},
      {"sound copy", [](Bench &bench) { copy_then_read(true, bench); }},
      {"missing barrier", [](Bench &bench) { write_then_read_of_other_warp(false, bench); }},
      {"missing wait", [](Bench &bench) { copy_then_read(false, bench); }},
      {"missing barrier after the wait",
       [](Bench &bench) {
         copy_async(thread_index() * 16, bench.input, 16);
         copy_commit();
         copy_wait<0>();
         store_unit(bench.output + thread_index() * 16, load_shared((thread_index() ^ 32) * 16));
       }},
      {"early overwrite",
       [](Bench &bench) {
         store_shared(thread_index() * 16, unit_of(bench.input));
         sync_block();
         const Unit found = load_shared(thread_index() * 16);
         copy_async((thread_index() ^ 32) * 16, bench.input, 16); // which another warp still reads
         copy_commit();
         copy_wait<0>();
         store_unit(bench.output + thread_index() * 16, found);
       }},
      {"write under a copy",
       [](Bench &bench) {
         copy_async(thread_index() * 16, bench.input, 16);
         copy_commit();
         store_shared(thread_index() * 16, unit_of(bench.input));
         copy_wait<0>();
         write_own(bench);
       }},
      {"write over a copy that landed",
       [](Bench &bench) {
         copy_async(thread_index() * 16, bench.input, 16);
         copy_commit();
         sync_block();
         copy_wait<0>();
         store_shared((thread_index() ^ 32) * 16, unit_of(bench.input));
         write_own(bench);
       }},
      {"uncommitted copy",
       [](Bench &bench) {
         copy_async(thread_index() * 16, bench.input, 16);
         write_own(bench);
       }},
      {"divergent barrier",
       [](Bench &bench) {
         if (thread_index() != 5) sync_block();
         write_own(bench);
       }},
      {"divergent collective",
       [](Bench &bench) {
         std::uint32_t words[4] = {};
         if (thread_index() % 2 == 0) {
           transpose_words(words);
         } else {
           sync_block();
         }
         write_own(bench);
       }},
      {"one warp at a barrier",
       [](Bench &bench) {
         if (thread_index() < 32) sync_block();
         write_own(bench);
         if (thread_index() < 32) sync_block();
         if (thread_index() >= 32) return;
         sync_block();
         store_unit(bench.output, unit_of(bench.input)); // twice: that of thread 0
       }},
      {"not uniform", [](Bench &bench) {
         uniform(thread_index());
         write_own(bench);
       }},
      {"shared memory out of range",
       [](Bench &bench) {
         store_shared(64 * 16 + thread_index() * 16, unit_of(bench.input));
         write_own(bench);
       }},
      {"misaligned shared memory",
       [](Bench &bench) {
         store_shared(thread_index() * 16 + 8, unit_of(bench.input));
         write_own(bench);
       }},
      {"misaligned copy",
       [](Bench &bench) {
         copy_async(thread_index() * 16, bench.input + 8, 16);
         copy_commit();
         copy_wait<0>();
         write_own(bench);
       }},
      {"stray read",
       [](Bench &bench) {
         copy_async(thread_index() * 16, bench.input + 1024, 16);
         copy_commit();
         copy_wait<0>();
         write_own(bench);
       }},
      {"stray store", [](Bench &bench) { store_unit(bench.output + 16 + thread_index() * 16, unit_of(bench.input)); }},
      {"misaligned store", [](Bench &bench) { store_unit(bench.output + 4 + thread_index() * 4, unit_of(bench.input)); }},
      {"written twice",
       [](Bench &bench) {
         write_own(bench);
         if (thread_index() == 0) store_unit(bench.output + 16, unit_of(bench.input));
       }},
      {"never written", [](Bench &bench) {
         if (thread_index() != 7) write_own(bench);
       }},
  };
  return known;
}

} // namespace

std::vector<float> multiply_fragments(Element element, const void *a, const void *b) {
  switch (element) {
  case Element::kHalf: return multiply_by<Traits<Element::kHalf>>(a, b);
  case Element::kBFloat16: return multiply_by<Traits<Element::kBFloat16>>(a, b);
  default: return multiply_by<Traits<Element::kTf32>>(a, b);
  }
}

std::vector<std::uint32_t> transpose_lanes(const std::vector<std::uint32_t> &words) {
  std::vector<std::uint32_t> result(words.size());
  run(one_block(1, 0), [&] {
    std::uint32_t mine[4];
    std::memcpy(mine, &words[thread_index() * 4], sizeof mine);
    transpose_words(mine);
    std::memcpy(&result[thread_index() * 4], mine, sizeof mine);
  });
  return result;
}

std::uint32_t rounded_to_tf32(std::uint32_t bits) { return round_to_tf32(bits); }

std::uint32_t larger_of(Element element, std::uint32_t one, std::uint32_t other) {
  switch (element) {
  case Element::kHalf: return larger<Traits<Element::kHalf>>(one, other);
  case Element::kBFloat16: return larger<Traits<Element::kBFloat16>>(one, other);
  default: return larger<Traits<Element::kTf32>>(one, other);
  }
}

Counters read_rows(int pitch) {
  Modes modes;
  modes.count = true;
  return run(one_block(1, 32 * pitch + 16, modes), [&] {
    const std::uint32_t row = thread_index() * pitch;
    std::uint32_t a[1][4], b[1][4];
    const std::uint32_t rows[1] = {row};
    load_operands(a, rows, 0, 0, b, rows, 0, 0);
    load_shared(row);
    sync_block();
  });
}

Counters provoke(const std::string &fault, const Modes &modes) {
  const auto kernel = kernels().find(fault);
  if (kernel == kernels().end()) throw std::invalid_argument("there is no fault " + fault);
  Bench bench = {};
  Output output(bench.output, {1, 1, 1, 512}, {512, 512, 512, 1}, 2);
  Launch launch = one_block(2, 1024, modes);
  launch.readable = {{bench.input, sizeof bench.input}};
  launch.output = &output;
  return run(launch, [&] { kernel->second(bench); });
}

std::vector<std::string> faults() {
  std::vector<std::string> names;
  for (const auto &[name, kernel] : kernels()) names.push_back(name);
  return names;
}

} // namespace googlenet_fused::sim
