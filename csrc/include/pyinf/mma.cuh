// Tensor-core instructions on registers, and how their operands come into and from shared memory: mma.sync, which every
// architecture from sm_80 on has (wgmma of sm_90a is not used). Lane l of a warp has g = l / 4 and t = l % 4.
//
// A (16 × 32 bytes): register r holds the 4 bytes at row g + 8 (r % 2), byte 4t + 16 (r / 2).
// B (8 columns × 32 bytes, a column's bytes next to each other): register r holds column g, byte 4t + 16 r.
// C (16 × 8): element e is row g + 8 (e / 2), column 2t + e % 2.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>

namespace pyinf {

#define PYINF_MMA(shape_and_types, kind)                                                                    \
  asm volatile("mma.sync.aligned." shape_and_types " {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};" \
               : kind(c[0]), kind(c[1]), kind(c[2]), kind(c[3])                                             \
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1))

// c += a · b over 16 products of 16-bit floats, in float32.
template <typename T>
__device__ __forceinline__ void mma_16(float (&c)[4], const std::uint32_t (&a)[4], std::uint32_t b0, std::uint32_t b1);
template <>
__device__ __forceinline__ void mma_16<__half>(float (&c)[4], const std::uint32_t (&a)[4], std::uint32_t b0,
                                               std::uint32_t b1) {
  PYINF_MMA("m16n8k16.row.col.f32.f16.f16.f32", "+f");
}
template <>
__device__ __forceinline__ void mma_16<__nv_bfloat16>(float (&c)[4], const std::uint32_t (&a)[4], std::uint32_t b0,
                                                      std::uint32_t b1) {
  PYINF_MMA("m16n8k16.row.col.f32.bf16.bf16.f32", "+f");
}

// c += a · b over 32 products of int8, in int32.
__device__ __forceinline__ void mma_int8(std::int32_t (&c)[4], const std::uint32_t (&a)[4], std::uint32_t b0,
                                         std::uint32_t b1) {
  PYINF_MMA("m16n8k32.row.col.s32.s8.s8.s32", "+r");
}

// c += the number of bits, of 256, that are set in both a and b.
__device__ __forceinline__ void mma_bits(std::int32_t (&c)[4], const std::uint32_t (&a)[4], std::uint32_t b0,
                                         std::uint32_t b1) {
  PYINF_MMA("m16n8k256.row.col.s32.b1.b1.s32.and.popc", "+r");
}

#undef PYINF_MMA

// Starts a copy of kSize bytes (4 or 16, both sides aligned to it) of which the first `count` are read and the rest
// become zero. As __pipeline_memcpy_async, which branches over every possible count. The whole 128 bytes around a
// 16-byte piece are fetched into the L2 cache: the next stage reads on from there.
template <int kSize>
__device__ __forceinline__ void copy_async(void* to, const void* from, int count) {
  static_assert(kSize == 4 || kSize == 16);
  const auto at = static_cast<unsigned>(__cvta_generic_to_shared(to));
  if constexpr (kSize == 16) {
    asm volatile("cp.async.cg.shared.global.L2::128B [%0], [%1], 16, %2;" ::"r"(at), "l"(from), "r"(count) : "memory");
  } else {
    asm volatile("cp.async.ca.shared.global [%0], [%1], 4, %2;" ::"r"(at), "l"(from), "r"(count) : "memory");
  }
}

// Four 8 × 16-byte blocks of shared memory; lane l gives the address of row l % 8 of block l / 8 (16-byte aligned).
// Register r of lane l gets the 4 bytes of row g at 4t of block r.
__device__ __forceinline__ void load_blocks(std::uint32_t (&r)[4], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(static_cast<unsigned>(__cvta_generic_to_shared(row)))
               : "memory");
}

// The same, each block transposed as 8 × 8 elements of 16 bits: rows 2t and 2t + 1, column g.
__device__ __forceinline__ void load_blocks_transposed(std::uint32_t (&r)[4], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(static_cast<unsigned>(__cvta_generic_to_shared(row)))
               : "memory");
}

}  // namespace pyinf
