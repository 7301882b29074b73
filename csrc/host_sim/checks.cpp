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

template <class T> void multiply_registers(const std::uint32_t *a, const std::uint32_t *b, float *sums) {
  run(one_block(1, 0), [=] {
    std::uint32_t a_words[1][4], b_words[2][4];
    float mine[1][4][4] = {};
    std::memcpy(a_words, a + thread_index() * 4, sizeof a_words);
    std::memcpy(b_words, b + thread_index() * 8, sizeof b_words);
    multiply_tile<T>(mine, a_words, b_words);
    std::memcpy(sums + thread_index() * 16, mine, sizeof mine);
  });
}

void check_words(const char *name, const std::vector<std::uint32_t> &words, std::size_t wanted) {
  if (words.size() == wanted) return;
  throw std::invalid_argument(std::string(name) + " are " + std::to_string(words.size()) + "; they are to be " +
                              std::to_string(wanted));
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
      {"missing barrier in a warp",
       [](Bench &bench) {
         store_shared(thread_index() * 16, unit_of(bench.input));
         store_unit(bench.output + thread_index() * 16, load_shared((thread_index() ^ 1) * 16));
       }},
      {"missing barrier after the wait in a warp",
       [](Bench &bench) {
         copy_async(thread_index() * 16, bench.input, 16);
         copy_commit();
         copy_wait<0>();
         std::uint32_t words[4] = {};
         transpose_words(words);
         store_unit(bench.output + thread_index() * 16, load_shared((thread_index() ^ 1) * 16));
       }},
      {"early overwrite in a warp",
       [](Bench &bench) {
         store_shared(thread_index() * 16, unit_of(bench.input));
         sync_block();
         const Unit found = load_shared(thread_index() * 16);
         store_shared((thread_index() ^ 1) * 16, found);
         store_unit(bench.output + thread_index() * 16, found);
       }},
      {"ldmatrix without a barrier in a warp",
       [](Bench &bench) {
         store_shared(thread_index() * 16, unit_of(bench.input));
         const std::uint32_t rows[1] = {static_cast<std::uint32_t>(thread_index()) * 16}; // its own, but others get of it
         std::uint32_t a[1][4], b[1][4];
         load_operands(a, rows, 0, 0, b, rows, 0, 0);
         write_own(bench);
       }},
      {"wait for too few",
       [](Bench &bench) {
         copy_async(thread_index() * 16, bench.input, 16);
         copy_commit();
         copy_wait<1>();
         sync_block();
         store_unit(bench.output + thread_index() * 16, load_shared(thread_index() * 16));
         copy_wait<0>();
       }},
      {"copy not waited for",
       [](Bench &bench) {
         copy_async(thread_index() * 16, bench.input, 16);
         copy_commit();
         write_own(bench);
       }},
      {"stray number",
       [](Bench &bench) {
         load_number(reinterpret_cast<const float *>(bench.input + sizeof bench.input));
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
       }},
      {"warps at two barriers",
       [](Bench &bench) {
         if (thread_index() < 32) {
           sync_block();
           write_own(bench);
         } else {
           write_own(bench);
           sync_block();
         }
       }},
      {"end beside a collective",
       [](Bench &bench) {
         write_own(bench);
         if (thread_index() == 5) return;
         std::uint32_t words[4] = {};
         transpose_words(words);
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
  check_words("words", words, kLanes * 4);
  std::vector<std::uint32_t> result(words.size());
  run(one_block(1, 0), [&] {
    std::uint32_t mine[4];
    std::memcpy(mine, &words[thread_index() * 4], sizeof mine);
    transpose_words(mine);
    std::memcpy(&result[thread_index() * 4], mine, sizeof mine);
  });
  return result;
}

std::vector<std::uint32_t> load_lanes(const std::vector<std::uint32_t> &rows) {
  check_words("rows' words", rows, kLanes * 4);
  std::vector<std::uint32_t> result(rows.size());
  run(one_block(1, kLanes * kUnitBytes), [&] {
    const std::uint32_t mine[1] = {static_cast<std::uint32_t>(thread_index() * kUnitBytes)};
    store_shared(mine[0], unit_of(&rows[thread_index() * 4]));
    sync_block();
    std::uint32_t a[1][4], b[1][4];
    load_operands(a, mine, 0, 0, b, mine, 0, 0);
    std::memcpy(&result[thread_index() * 4], a[0], sizeof a[0]);
  });
  return result;
}

std::vector<float> multiply_lanes(Element element, const std::vector<std::uint32_t> &a, const std::vector<std::uint32_t> &b) {
  check_words("a's words", a, kLanes * 4);
  check_words("b's words", b, kLanes * 8);
  std::vector<float> sums(kLanes * 16);
  switch (element) {
  case Element::kHalf: multiply_registers<Traits<Element::kHalf>>(a.data(), b.data(), sums.data()); break;
  case Element::kBFloat16: multiply_registers<Traits<Element::kBFloat16>>(a.data(), b.data(), sums.data()); break;
  default: multiply_registers<Traits<Element::kTf32>>(a.data(), b.data(), sums.data());
  }
  return sums;
}

std::uint32_t rounded_to_tf32(std::uint32_t bits) { return round_to_tf32(bits); }

std::uint32_t larger_of(Element element, std::uint32_t one, std::uint32_t other) {
  switch (element) {
  case Element::kHalf: return larger<Traits<Element::kHalf>>(one, other);
  case Element::kBFloat16: return larger<Traits<Element::kBFloat16>>(one, other);
  default: return larger<Traits<Element::kTf32>>(one, other);
  }
}

std::uint32_t packed_pair(Element element, float low, float high) {
  if (element == Element::kTf32) throw std::invalid_argument("tf32 numbers are not packed in pairs");
  return element == Element::kHalf ? pack_pair<Traits<Element::kHalf>>(low, high)
                                   : pack_pair<Traits<Element::kBFloat16>>(low, high);
}

Counters touch_rows(int pitch) {
  if (pitch < kUnitBytes || pitch > 4096 || pitch % kUnitBytes != 0) {
    throw std::invalid_argument("pitch is " + std::to_string(pitch) + "; it is to be a multiple of 16 from 16 to 4096");
  }
  struct alignas(32) Sector {
    unsigned char bytes[32];
  };
  std::vector<Sector> input(kLanes * pitch / sizeof(Sector)), out(kLanes * kUnitBytes / sizeof(Sector));
  constexpr std::int64_t kHalves = kLanes * kUnitBytes / 2;
  Output output(out.data(), {1, 1, 1, kHalves}, {kHalves, kHalves, kHalves, 1}, 2);
  Modes modes;
  modes.count = true;
  Launch launch = one_block(1, kLanes * pitch, modes);
  launch.readable = {{"input", input.data(), static_cast<std::int64_t>(input.size() * sizeof(Sector))}};
  launch.output = &output;
  return run(launch, [&] {
    const std::uint32_t row = thread_index() * pitch;
    copy_async(row, input[0].bytes + row, kUnitBytes);
    copy_commit();
    copy_wait<0>();
    sync_block();
    const Unit unit = load_shared(row);
    store_shared(row, unit);
    store_unit(out[0].bytes + thread_index() * kUnitBytes, unit);
    sync_block();
    std::uint32_t a[1][4], b[1][4];
    const std::uint32_t a_rows[1] = {row}, b_rows[1] = {0};
    load_operands(a, a_rows, 0, 0, b, b_rows, 0, 0);
    const std::uint32_t b_words[2][4] = {};
    float sums[1][4][4] = {};
    multiply_tile<Traits<Element::kHalf>>(sums, a, b_words);
  });
}

std::vector<int> turns(const Modes &modes) {
  std::vector<int> found;
  run(one_block(2, 0, modes), [&] {
    found.push_back(thread_index());
    sync_block();
    found.push_back(thread_index());
  });
  return found;
}

Counters provoke(const std::string &fault, const Modes &modes) {
  const auto kernel = kernels().find(fault);
  if (kernel == kernels().end()) throw std::invalid_argument("there is no fault " + fault);
  Bench bench = {};
  Output output(bench.output, {1, 1, 1, 512}, {512, 512, 512, 1}, 2);
  Launch launch = one_block(2, 1024, modes);
  launch.readable = {{"input", bench.input, sizeof bench.input}};
  launch.output = &output;
  return run(launch, [&] { kernel->second(bench); });
}

std::vector<std::string> faults() {
  std::vector<std::string> names;
  for (const auto &[name, kernel] : kernels()) names.push_back(name);
  return names;
}

} // namespace googlenet_fused::sim
