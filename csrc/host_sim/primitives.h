// What inception/primitives.cuh has for a GPU, for the simulation: the same functions, exactly.
#pragma once

#include <immintrin.h>

#include <array>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <type_traits>

#include "../inception/traits.h"
#include "simulator.h"

#define DEVICE inline
#define UNROLL
#define NO_UNROLL
#define HOST_SIM_HERE __attribute__((always_inline)) inline // so that a call's site is the kernel's line
#define HOST_SIM_APART __attribute__((noinline))

namespace googlenet_fused {

struct alignas(16) Unit {
  std::uint32_t words[4];
};

namespace sim {

// Somewhere in the code that calls: where it is inlined, the kernel's own.
__attribute__((always_inline)) inline const void *here() {
  const void *address;
  asm volatile("lea (%%rip), %0" : "=r"(address));
  return address;
}

using Deposits = std::array<void *, kLanes>;

inline float from_bits(std::uint32_t bits) { return std::bit_cast<float>(bits); }
inline std::uint32_t to_bits(float number) { return std::bit_cast<std::uint32_t>(number); }

template <class T> float half_number(std::uint32_t bits) {
  if constexpr (T::kElement == Element::kHalf) return _cvtsh_ss(static_cast<unsigned short>(bits));
  return from_bits(bits << 16);
}

template <class T> std::uint32_t half_bits(float number) {
  if (std::isnan(number)) return 0x7fff; // the one NaN that a GPU makes
  if constexpr (T::kElement == Element::kHalf) return _cvtss_sh(number, _MM_FROUND_TO_NEAREST_INT);
  const std::uint32_t bits = to_bits(number);
  return (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
}

constexpr std::uint32_t kTf32Mask = 0xffffe000; // the bits of TF32 that an mma reads

} // namespace sim

inline int thread_index() { return sim::block->thread(); }
inline std::int64_t block_index() { return sim::block->index(); }

HOST_SIM_APART inline int uniform(int value) {
  sim::block->collective(__builtin_return_address(0), &value, [](const sim::Deposits &deposits) {
    for (void *deposit : deposits) {
      if (*static_cast<int *>(deposit) != *static_cast<int *>(deposits[0])) sim::block->fail("a uniform value differs");
    }
  });
  return value;
}

HOST_SIM_APART inline void sync_block() { sim::block->barrier(__builtin_return_address(0)); }

inline std::uint32_t shared_memory() { return 0; }

HOST_SIM_HERE void copy_async(std::uint32_t shared, const void *source, int bytes) {
  sim::block->copy(shared, source, bytes, sim::here());
}

inline void copy_commit() { sim::block->commit(); }

template <int kLeft> void copy_wait() { sim::block->wait(kLeft); }

namespace sim {

struct Operands {
  const std::uint32_t *a_rows, *b_rows;
  std::uint32_t a_xor, a_offset, b_xor, b_offset;
  std::uint32_t (*a)[4], (*b)[4];
};

// ldmatrix.x4: lane l gives the address of row l % 8 of matrix l / 8, and gets of each matrix word l % 4 of row l / 4.
template <class AddressOf, class ResultOf>
void load_four(const Deposits &deposits, bool of_a, const AddressOf &address_of, const ResultOf &result_of) {
  for (int matrix = 0; matrix < 4; matrix++) {
    std::array<std::uint32_t, 8> rows;
    const unsigned char *memory[8];
    for (int row = 0; row < 8; row++) {
      rows[row] = address_of(*static_cast<Operands *>(deposits[matrix * 8 + row]));
      memory[row] = block->shared(rows[row], 16);
      block->note_read(rows[row], kWholeWarp);
    }
    block->count_matrix(rows, of_a);
    for (int lane = 0; lane < kLanes; lane++) {
      std::memcpy(&result_of(*static_cast<Operands *>(deposits[lane]))[matrix], memory[lane / 4] + lane % 4 * 4, 4);
    }
  }
}

} // namespace sim

template <int kA, int kB>
HOST_SIM_APART void load_operands(std::uint32_t (&a)[kA][4], const std::uint32_t (&a_rows)[kA], std::uint32_t a_xor,
                                  std::uint32_t a_offset, std::uint32_t (&b)[kB][4], const std::uint32_t (&b_rows)[kB],
                                  std::uint32_t b_xor, std::uint32_t b_offset) {
  sim::Operands mine{a_rows, b_rows, a_xor, a_offset, b_xor, b_offset, a, b};
  sim::block->collective(__builtin_return_address(0), &mine, [](const sim::Deposits &deposits) {
    for (int j = 0; j < kB; j++) {
      sim::load_four(
          deposits, false, [j](const sim::Operands &o) { return (o.b_rows[j] ^ o.b_xor) + o.b_offset; },
          [j](const sim::Operands &o) -> std::uint32_t(&)[4] { return o.b[j]; });
    }
    for (int i = 0; i < kA; i++) {
      sim::load_four(
          deposits, true, [i](const sim::Operands &o) { return (o.a_rows[i] ^ o.a_xor) + o.a_offset; },
          [i](const sim::Operands &o) -> std::uint32_t(&)[4] { return o.a[i]; });
    }
  });
}

namespace sim {

struct Factors {
  float (*sums)[4][4];
  const std::uint32_t (*a)[4];
  const std::uint32_t (*b)[4];
};

// Fragments of mma.m16n8k16 (halves) and m16n8k8 (TF32), with g = lane / 4 and t = lane % 4. Of a, register q holds row g + q % 2 * 8
// and, of K, the t-th word of half q / 2; of b, register q column g and the t-th word of half q; of the sums, register q row
// g + q / 2 * 8 and column 2 t + q % 2.
template <class T, int kRows> void multiply_deposits(const Deposits &deposits) {
  constexpr int kK = kStepBytes / T::kBytes;
  alignas(32) float a[kRows * kFragmentRows][kK], b[kK][kWarpColumns], sums[kFragmentRows][kWarpColumns];
  const auto spread = [](std::uint32_t word, int word_index, auto &&put) {
    if constexpr (T::kBytes == 2) {
      put(word_index * 2, half_number<T>(word & 0xffff));
      put(word_index * 2 + 1, half_number<T>(word >> 16));
    } else {
      put(word_index, from_bits(word & kTf32Mask));
    }
  };
  for (int lane = 0; lane < kLanes; lane++) {
    const auto &factors = *static_cast<Factors *>(deposits[lane]);
    const int g = lane / 4, t = lane % 4;
    for (int i = 0; i < kRows; i++) {
      for (int q = 0; q < 4; q++) {
        float *row = a[i * kFragmentRows + g + q % 2 * 8];
        spread(factors.a[i][q], q / 2 * 4 + t, [row](int k, float value) { row[k] = value; });
      }
    }
    for (int j = 0; j < 4; j++) {
      for (int q = 0; q < 2; q++) {
        const int column = j * kUnitColumns + g;
        spread(factors.b[j / 2][j % 2 * 2 + q], q * 4 + t, [&b, column](int k, float value) { b[k][column] = value; });
      }
    }
  }
  for (int i = 0; i < kRows; i++) {
    const auto each_sum = [&](auto &&visit) {
      for (int lane = 0; lane < kLanes; lane++) {
        auto &mine = static_cast<Factors *>(deposits[lane])->sums[i];
        for (int j = 0; j < 4; j++) {
          for (int q = 0; q < 4; q++) visit(mine[j][q], sums[lane / 4 + q / 2 * 8][j * 8 + lane % 4 * 2 + q % 2]);
        }
      }
    };
    each_sum([](float &mine, float &sum) { sum = mine; });
    for (int row = 0; row < kFragmentRows; row++) {
      __m256 total[4];
      for (int j = 0; j < 4; j++) total[j] = _mm256_load_ps(&sums[row][j * 8]);
      for (int k = 0; k < kK; k++) {
        const __m256 factor = _mm256_set1_ps(a[i * kFragmentRows + row][k]);
        for (int j = 0; j < 4; j++) total[j] = _mm256_fmadd_ps(factor, _mm256_load_ps(&b[k][j * 8]), total[j]);
      }
      for (int j = 0; j < 4; j++) _mm256_store_ps(&sums[row][j * 8], total[j]);
    }
    each_sum([](float &mine, float &sum) { mine = sum; });
  }
  block->counters_.products += 4 * kRows;
}

} // namespace sim

template <class T, int kRows>
HOST_SIM_APART void multiply_tile(float (&sums)[kRows][4][4], const std::uint32_t (&a)[kRows][4],
                                  const std::uint32_t (&b)[2][4]) {
  sim::Factors mine{sums, a, b};
  sim::block->collective(__builtin_return_address(0), &mine, sim::multiply_deposits<T, kRows>);
}

HOST_SIM_APART inline void transpose_words(std::uint32_t (&words)[4]) {
  sim::block->collective(__builtin_return_address(0), words, [](const sim::Deposits &deposits) {
    for (int first = 0; first < sim::kLanes; first += 4) {
      std::uint32_t *lanes[4];
      for (int lane = 0; lane < 4; lane++) lanes[lane] = static_cast<std::uint32_t *>(deposits[first + lane]);
      for (int lane = 0; lane < 4; lane++) {
        for (int word = 0; word < lane; word++) std::swap(lanes[lane][word], lanes[word][lane]);
      }
    }
  });
}

HOST_SIM_HERE void store_shared(std::uint32_t address, const Unit &unit) {
  unsigned char *const to = sim::block->shared(address, 16);
  sim::block->note_write(address);
  sim::block->note_access(sim::Block::Access::kSharedStore, sim::here(), address, 16);
  std::memcpy(to, &unit, 16);
}

HOST_SIM_HERE Unit load_shared(std::uint32_t address) {
  Unit unit;
  const unsigned char *const from = sim::block->shared(address, 16);
  sim::block->note_read(address);
  sim::block->note_access(sim::Block::Access::kSharedLoad, sim::here(), address, 16);
  std::memcpy(&unit, from, 16);
  return unit;
}

inline float load_number(const float *from) {
  sim::block->check_read(from, sizeof *from);
  return *from;
}

HOST_SIM_HERE void store_unit(void *to, const Unit &unit) { sim::block->store(to, &unit, 16, sim::here()); }
HOST_SIM_HERE void store_element(std::uint16_t *to, std::uint16_t bits) { sim::block->store(to, &bits, 2, sim::here()); }
HOST_SIM_HERE void store_element(std::uint32_t *to, std::uint32_t bits) { sim::block->store(to, &bits, 4, sim::here()); }

template <class T> std::uint32_t pack_pair(float low, float high) {
  return sim::half_bits<T>(low) | sim::half_bits<T>(high) << 16;
}

inline std::uint32_t bits_of(float number) { return sim::to_bits(number); }

inline std::uint32_t round_to_tf32(std::uint32_t bits) {
  constexpr std::uint32_t kExponent = 0x7f800000;
  if ((bits & kExponent) == kExponent) return bits & 0x7fffff ? 0x7fffffff : bits;
  return (bits + 0x1000) & sim::kTf32Mask;
}

template <class T> std::uint32_t larger(std::uint32_t one, std::uint32_t other) {
  const auto larger_number = [](float a, float b) {
    if (std::isnan(a) || std::isnan(b)) return sim::from_bits(0x7fffffff);
    return a > b || (a == b && !std::signbit(a)) ? a : b; // +0 is larger than -0
  };
  if constexpr (T::kBytes == 4) {
    return sim::to_bits(larger_number(sim::from_bits(one), sim::from_bits(other)));
  } else {
    std::uint32_t result = 0;
    for (int shift = 0; shift < 32; shift += 16) {
      const float a = sim::half_number<T>(one >> shift & 0xffff), b = sim::half_number<T>(other >> shift & 0xffff);
      result |= sim::half_bits<T>(larger_number(a, b)) << shift;
    }
    return result;
  }
}

} // namespace googlenet_fused
