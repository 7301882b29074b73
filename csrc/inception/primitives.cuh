// Everything that is PTX or the hardware's. The simulation has the same functions in host_sim/primitives.h; the kernel uses no other.
#pragma once

#include <cstddef>
#include <cstdint>

#include "traits.h"

#ifndef __CUDACC__
#include "../host_sim/primitives.h"
#else

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#define DEVICE __device__ __forceinline__
#define UNROLL _Pragma("unroll")
#define NO_UNROLL _Pragma("unroll 1")

namespace googlenet_fused {

struct alignas(16) Unit {
  std::uint32_t words[4];
};

DEVICE int thread_index() { return threadIdx.x; }
DEVICE std::int64_t block_index() { return blockIdx.x; }

// A value that is the same in all lanes of a warp, told to the compiler.
DEVICE int uniform(int value) { return __shfl_sync(0xffffffffu, value, 0); }

DEVICE void sync_block() { __syncthreads(); }

// Addresses of shared memory are offsets from this.
DEVICE std::uint32_t shared_memory() {
  extern __shared__ __align__(128) unsigned char memory[];
  return static_cast<std::uint32_t>(__cvta_generic_to_shared(memory));
}

// Copies the first ``bytes`` (0 to 16) from ``source``, on 16 bytes, and zeros the rest of 16. Nothing is read for 0.
DEVICE void copy_async(std::uint32_t shared, const void *source, int bytes) {
  asm volatile("cp.async.cg.shared.global.L2::128B [%0], [%1], 16, %2;" ::"r"(shared), "l"(source), "r"(bytes) : "memory");
}

DEVICE void copy_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }

// Waits for the calling thread's groups but the ``kLeft`` latest.
template <int kLeft> DEVICE void copy_wait() { asm volatile("cp.async.wait_group %0;" ::"n"(kLeft) : "memory"); }

DEVICE void load_matrices(std::uint32_t (&to)[4], std::uint32_t address) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(to[0]), "=r"(to[1]), "=r"(to[2]), "=r"(to[3])
               : "r"(address)
               : "memory");
}

// The operands of a step: from (a_rows[i] ^ a_xor) + a_offset and (b_rows[j] ^ b_xor) + b_offset, four 8x8 matrices of 16 bits each.
template <int kA, int kB>
DEVICE void load_operands(std::uint32_t (&a)[kA][4], const std::uint32_t (&a_rows)[kA], std::uint32_t a_xor,
                          std::uint32_t a_offset, std::uint32_t (&b)[kB][4], const std::uint32_t (&b_rows)[kB],
                          std::uint32_t b_xor, std::uint32_t b_offset) {
  UNROLL for (int j = 0; j < kB; j++) load_matrices(b[j], (b_rows[j] ^ b_xor) + b_offset);
  UNROLL for (int i = 0; i < kA; i++) load_matrices(a[i], (a_rows[i] ^ a_xor) + a_offset);
}

template <class T>
DEVICE void multiply(float (&sum)[4], const std::uint32_t (&a)[4], std::uint32_t b0, std::uint32_t b1) {
#define GOOGLENET_FUSED_MMA(types)                                                                                             \
  asm volatile("mma.sync.aligned." types " {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"                    \
               : "+f"(sum[0]), "+f"(sum[1]), "+f"(sum[2]), "+f"(sum[3])                                                        \
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1))
  if constexpr (T::kElement == Element::kHalf) {
    GOOGLENET_FUSED_MMA("m16n8k16.row.col.f32.f16.f16.f32");
  } else if constexpr (T::kElement == Element::kBFloat16) {
    GOOGLENET_FUSED_MMA("m16n8k16.row.col.f32.bf16.bf16.f32");
  } else {
    GOOGLENET_FUSED_MMA("m16n8k8.row.col.f32.tf32.tf32.f32");
  }
#undef GOOGLENET_FUSED_MMA
}

// sums[i][j] += a[i] * b[j]: kRows fragments of 16 rows by four of 8 columns, a step of K.
template <class T, int kRows>
DEVICE void multiply_tile(float (&sums)[kRows][4][4], const std::uint32_t (&a)[kRows][4], const std::uint32_t (&b)[2][4]) {
  UNROLL for (int j = 0; j < 4; j++) {
    UNROLL for (int i = 0; i < kRows; i++) multiply<T>(sums[i][j], a[i], b[j / 2][j % 2 * 2], b[j / 2][j % 2 * 2 + 1]);
  }
}

// Among each four neighbouring lanes: word w of lane l becomes word l of lane w.
DEVICE void transpose_words(std::uint32_t (&words)[4]) {
  const int lane = threadIdx.x & 3;
  UNROLL for (int mask = 1; mask <= 2; mask *= 2) {
    UNROLL for (int low = 0; low < 4; low++) {
      if (low & mask) continue;
      const bool upper = (lane & mask) != 0;
      const std::uint32_t sent = upper ? words[low] : words[low | mask];
      const std::uint32_t received = __shfl_xor_sync(0xffffffffu, sent, mask);
      if (upper) {
        words[low] = received;
      } else {
        words[low | mask] = received;
      }
    }
  }
}

DEVICE void store_shared(std::uint32_t address, const Unit &unit) {
  asm volatile("st.shared.v4.b32 [%0], {%1, %2, %3, %4};" ::"r"(address), "r"(unit.words[0]), "r"(unit.words[1]),
               "r"(unit.words[2]), "r"(unit.words[3])
               : "memory");
}

DEVICE Unit load_shared(std::uint32_t address) {
  Unit unit;
  asm volatile("ld.shared.v4.b32 {%0, %1, %2, %3}, [%4];"
               : "=r"(unit.words[0]), "=r"(unit.words[1]), "=r"(unit.words[2]), "=r"(unit.words[3])
               : "r"(address)
               : "memory");
  return unit;
}

DEVICE float load_number(const float *from) {
  float number;
  asm("ld.global.nc.f32 %0, [%1];" : "=f"(number) : "l"(from)); // narrow: a bias, read once a pass
  return number;
}

DEVICE void store_unit(void *to, const Unit &unit) { *static_cast<Unit *>(to) = unit; }
DEVICE void store_element(std::uint16_t *to, std::uint16_t bits) { *to = bits; } // narrow: where strides or widths allow no more
DEVICE void store_element(std::uint32_t *to, std::uint32_t bits) { *to = bits; } // narrow: where strides or widths allow no more

// Two numbers in the low and the high half of a word.
template <class T> DEVICE std::uint32_t pack_pair(float low, float high) {
  if constexpr (T::kElement == Element::kHalf) {
    const __half2 pair = __floats2half2_rn(low, high);
    return reinterpret_cast<const std::uint32_t &>(pair);
  } else {
    const __nv_bfloat162 pair = __floats2bfloat162_rn(low, high);
    return reinterpret_cast<const std::uint32_t &>(pair);
  }
}

DEVICE std::uint32_t bits_of(float number) { return __float_as_uint(number); }

// To the nearest TF32, ties away from zero; NaN and infinity stay.
DEVICE std::uint32_t round_to_tf32(std::uint32_t bits) {
  std::uint32_t rounded;
  asm("cvt.rna.tf32.f32 %0, %1;" : "=r"(rounded) : "r"(bits));
  return rounded;
}

// The larger of each two numbers, NaN if one is.
template <class T> DEVICE std::uint32_t larger(std::uint32_t one, std::uint32_t other) {
  std::uint32_t result;
  if constexpr (T::kElement == Element::kHalf) {
    asm("max.NaN.f16x2 %0, %1, %2;" : "=r"(result) : "r"(one), "r"(other));
  } else if constexpr (T::kElement == Element::kBFloat16) {
    asm("max.NaN.bf16x2 %0, %1, %2;" : "=r"(result) : "r"(one), "r"(other));
  } else {
    float found;
    asm("max.NaN.f32 %0, %1, %2;" : "=f"(found) : "f"(__uint_as_float(one)), "f"(__uint_as_float(other)));
    result = __float_as_uint(found);
  }
  return result;
}

} // namespace googlenet_fused

#endif
