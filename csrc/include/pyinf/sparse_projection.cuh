// Device code of sparse_projection. A block takes as many rows as 16 bytes hold of a coordinate (eight of 16 bits, four
// of 32) and walks over slices of 4096 coordinates. The buckets of a slice are drawn once for these rows, and the
// entries of each bucket are chained in shared memory: which thread adds an entry to a chain first does not matter,
// because the bucket's owner sorts it. Every bucket is owned by one thread, which keeps its sums in registers: no float
// atomics, and one order of additions. With few buckets each is split by position in the slice, so that chains stay
// short and all threads have work.
//
// The same walk serves gradients that are given by their factors: a slice is then a 64 × 64 tile of Σ_t g_t a_tᵀ, which
// is formed in shared memory and nowhere else.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>
#include <cstring>
#include <type_traits>

#include "pyinf/index_maps.h"
#include "pyinf/launch.cuh"
#include "pyinf/mma.cuh"
#include "pyinf/philox.h"

namespace pyinf::sparse_projection {

constexpr int kThreads = 512;
constexpr int kSlice = 4096;                // coordinates
constexpr int kOwned = 8;                   // chains a thread
constexpr int kChains = kThreads * kOwned;  // of a block
constexpr int kSide = 64;                   // kSlice as a square tile
template <typename T>
constexpr int kTokens = sizeof(T) == 2 ? 32 : 16;  // rows of g and a at a time
constexpr std::uint32_t kNone = 0x7FFF;            // end of a chain; an entry is its index, and 0x8000 for a minus sign
static_assert(kSide * kSide == kSlice && kSlice == kChains);

// Of values T: as many rows as fit into 16 bytes.
template <typename T>
constexpr int kRows = 16 / static_cast<int>(sizeof(T));

struct Memory {
  uint4 x[kSlice];  // the rows' values of a coordinate, next to each other
  std::uint32_t head[kChains];
  std::uint16_t next[kSlice];
};

template <typename T>
struct FactorMemory {
  Memory slice;
  T g[kTokens<T>][kSide + 16 / sizeof(T)], a[kTokens<T>][kSide + 16 / sizeof(T)];
};

struct Problem {
  float* out;  // [splits, rows, ld_out]
  const void* x;
  const void* a;                // the second factor
  const std::int64_t* offsets;  // of the factors
  std::int64_t ld_out, ld_x, ld_a, rows, d, d_in, k, nnz, slices_per_split;
  std::uint64_t seed;
  std::uint32_t stream;
  int pieces;  // a power of two: chains of one bucket
  float scale;
  bool pairs;  // two values of x can be read at once
};

// How many chains each of k buckets gets: as many as leave the chains of a slice at one entry on average.
PYINF_HOST_DEVICE int pieces_of(std::int64_t k) {
  int pieces = 1;
  while (2 * pieces * k <= kChains) pieces *= 2;
  return pieces;
}

template <typename T>
__device__ __forceinline__ std::uint32_t word_of(T value) {
  std::uint32_t word = 0;
  std::memcpy(&word, &value, sizeof(T));
  return word;
}

// Fills memory.x with coordinates first .. first + 4096 of the block's rows; zero outside.
template <typename T>
__device__ __forceinline__ void load_slice(Memory& memory, const Problem& p, std::int64_t row, std::int64_t first) {
  const T* x = static_cast<const T*>(p.x);
#pragma unroll 1
  for (int e = 2 * threadIdx.x; e < kSlice; e += 2 * kThreads) {
    std::uint32_t low[kRows<T>], high[kRows<T>];  // of 16-bit values, `low` holds both
#pragma unroll
    for (int r = 0; r < kRows<T>; ++r) {
      const T* from = x + (row + r) * p.ld_x + first + e;
      low[r] = high[r] = 0;
      if (row + r >= p.rows) continue;
      if (p.pairs && first + e + 1 < p.d) {
        if constexpr (sizeof(T) == 4) {
          const uint2 both = *reinterpret_cast<const uint2*>(from);
          low[r] = both.x, high[r] = both.y;
        } else {
          low[r] = *reinterpret_cast<const std::uint32_t*>(from);
        }
      } else {
        if (first + e < p.d) low[r] = word_of(from[0]);
        if (first + e + 1 < p.d) {
          if constexpr (sizeof(T) == 4) {
            high[r] = word_of(from[1]);
          } else {
            low[r] |= word_of(from[1]) << 16;
          }
        }
      }
    }
    if constexpr (sizeof(T) == 4) {
      memory.x[e] = {low[0], low[1], low[2], low[3]};
      memory.x[e + 1] = {high[0], high[1], high[2], high[3]};
    } else {
      constexpr unsigned kLow = 0x5410, kHigh = 0x7632;  // the lower or upper halves of two words
      memory.x[e] = {__byte_perm(low[0], low[1], kLow), __byte_perm(low[2], low[3], kLow),
                     __byte_perm(low[4], low[5], kLow), __byte_perm(low[6], low[7], kLow)};
      memory.x[e + 1] = {__byte_perm(low[0], low[1], kHigh), __byte_perm(low[2], low[3], kHigh),
                         __byte_perm(low[4], low[5], kHigh), __byte_perm(low[6], low[7], kHigh)};
    }
  }
}

// Rows first .. first + kTokens<T> of one factor, 64 columns from `column` on; zero outside.
template <typename T>
__device__ __forceinline__ void load_factor(T (*to)[kSide + 16 / sizeof(T)], const T* from, std::int64_t ld, int count,
                                            std::int64_t column, std::int64_t width) {
#pragma unroll
  for (int item = threadIdx.x; item < kTokens<T> * kSide; item += kThreads) {
    const int t = item / kSide, c = item % kSide;
    to[t][c] = t < count && column + c < width ? from[t * ld + column + c] : T(0.0f);
  }
}

// memory.slice.x = rows o .. o + 64, columns j .. j + 64 of Σ_t g_t a_tᵀ of four sequences, as float32.
template <typename T>
__device__ __forceinline__ void form_tile(FactorMemory<T>& memory, const Problem& p, std::int64_t row, std::int64_t o,
                                          std::int64_t j) {
  const T* g = static_cast<const T*>(p.x);
  const T* a = static_cast<const T*>(p.a);
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  float* to = reinterpret_cast<float*>(memory.slice.x);
  for (int r = 0; r < kRows<float>; ++r) {
    const std::int64_t begin = row + r < p.rows ? p.offsets[row + r] : 0;
    const std::int64_t end = row + r < p.rows ? p.offsets[row + r + 1] : 0;
    float acc[2][4] = {};  // 16-bit: 16 × 16 a warp; float32: one row of 8 a thread
    for (std::int64_t t = begin; t < end; t += kTokens<T>) {
      const int count = end - t < kTokens<T> ? static_cast<int>(end - t) : kTokens<T>;
      __syncthreads();  // nobody reads the tokens before these any more
      load_factor(memory.g, g + t * p.ld_x, p.ld_x, count, o, p.d / p.d_in);
      load_factor(memory.a, a + t * p.ld_a, p.ld_a, count, j, p.d_in);
      __syncthreads();
      if constexpr (sizeof(T) == 2) {
#pragma unroll
        for (int k = 0; k < kTokens<T>; k += 16) {
          std::uint32_t left[4], right[4];
          // gᵀ as rows of outputs: blocks (outputs 0–7, tokens 0–7), (8–15, 0–7), (0–7, 8–15), (8–15, 8–15).
          load_blocks_transposed(left, &memory.g[k + lane % 8 + lane / 16 * 8][warp / 4 * 16 + lane / 8 % 2 * 8]);
          load_blocks_transposed(right, &memory.a[k + lane % 16][warp % 4 * 16 + lane / 16 * 8]);
          mma_16<T>(acc[0], left, right[0], right[1]);
          mma_16<T>(acc[1], left, right[2], right[3]);
        }
      } else {
        for (int k = 0; k < count; ++k) {
          const float left = static_cast<float>(memory.g[k][threadIdx.x / 8]);
#pragma unroll
          for (int e = 0; e < 8; ++e)
            acc[e / 4][e % 4] = fmaf(left, static_cast<float>(memory.a[k][threadIdx.x % 8 + 8 * e]), acc[e / 4][e % 4]);
        }
      }
    }
#pragma unroll
    for (int n = 0; n < 2; ++n)
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        const bool halves = sizeof(T) == 2;
        const int at_row = halves ? warp / 4 * 16 + lane / 4 + e / 2 * 8 : threadIdx.x / 8;
        const int at_column = halves ? warp % 4 * 16 + n * 8 + lane % 4 * 2 + e % 2 : threadIdx.x % 8 + 8 * (4 * n + e);
        to[(at_row * kSide + at_column) * kRows<float> + r] = acc[n][e];
      }
  }
}

// Chains every entry of the slice to its bucket (those of this block), then puts each chain in order.
template <typename Coordinate>
__device__ __forceinline__ void chain(Memory& memory, const Problem& p, std::uint32_t s, std::int64_t bucket0,
                                      Coordinate coordinate) {
#pragma unroll
  for (int c = threadIdx.x; c < kChains; c += kThreads) memory.head[c] = kNone;
  __syncthreads();
#pragma unroll 1
  for (int e = threadIdx.x; e < kSlice; e += kThreads) {
    const std::int64_t i = coordinate(e);
    if (i < 0) continue;
    const SparseEntry entry =
        philox_sparse(p.seed, p.stream, static_cast<std::uint64_t>(i), s, static_cast<std::uint32_t>(p.k));
    const std::int64_t bucket = entry.bucket - bucket0;
    if (bucket < 0 || bucket >= kChains / p.pieces) continue;
    const int piece = e / (kSlice / p.pieces);
    const std::uint32_t me = static_cast<std::uint32_t>(e) | (entry.negative ? 0x8000u : 0u);
    memory.next[e] = static_cast<std::uint16_t>(atomicExch(&memory.head[bucket * p.pieces + piece], me));
  }
  __syncthreads();
#pragma unroll 1
  for (int o = 0; o < kOwned; ++o) {  // an insertion sort of this thread's chains, which nobody else touches
    std::uint32_t sorted = kNone;
    std::uint32_t rest = memory.head[o * kThreads + threadIdx.x];
    while (rest != kNone) {
      const std::uint32_t me = rest;
      rest = memory.next[me & kNone];
      if (sorted == kNone || (me & kNone) < (sorted & kNone)) {
        memory.next[me & kNone] = static_cast<std::uint16_t>(sorted);
        sorted = me;
        continue;
      }
      std::uint32_t before = sorted;
      for (;;) {
        const std::uint32_t after = memory.next[before & kNone];
        if (after == kNone || (me & kNone) < (after & kNone)) {
          memory.next[me & kNone] = static_cast<std::uint16_t>(after);
          memory.next[before & kNone] = static_cast<std::uint16_t>(me);
          break;
        }
        before = after;
      }
    }
    memory.head[o * kThreads + threadIdx.x] = sorted;
  }
}

template <typename T>
__device__ __forceinline__ void add_chains(const Memory& memory, float (&sum)[kOwned][kRows<T>]) {
#pragma unroll
  for (int o = 0; o < kOwned; ++o) {
    std::uint32_t at = memory.head[o * kThreads + threadIdx.x];
    while (at != kNone) {
      const uint4 words = memory.x[at & kNone];
      T value[kRows<T>];
      std::memcpy(static_cast<void*>(value), &words, 16);
      const float sign = at & 0x8000u ? -1.0f : 1.0f;
#pragma unroll
      for (int r = 0; r < kRows<T>; ++r) sum[o][r] = fmaf(sign, static_cast<float>(value[r]), sum[o][r]);
      at = memory.next[at & kNone];
    }
  }
}

// Adds the chains of each bucket in order and writes the sums, four rows at a time.
template <int kAll>
__device__ __forceinline__ void finish(Memory& memory, const Problem& p, std::int64_t row, std::int64_t bucket0,
                                       const float (&sum)[kOwned][kAll]) {
  const int buckets = kChains / p.pieces;
  float4* sums = reinterpret_cast<float4*>(memory.x);
  const float* from = reinterpret_cast<const float*>(memory.x);
  float* out = p.out + blockIdx.z * p.rows * p.ld_out;
#pragma unroll
  for (int r0 = 0; r0 < kAll; r0 += 4) {
    __syncthreads();  // nobody reads x any more
#pragma unroll
    for (int o = 0; o < kOwned; ++o)
      sums[o * kThreads + threadIdx.x] = make_float4(sum[o][r0], sum[o][r0 + 1], sum[o][r0 + 2], sum[o][r0 + 3]);
    __syncthreads();
    for (int item = threadIdx.x; item < buckets * 4; item += kThreads) {
      const int r = item / buckets, bucket = item % buckets;
      if (row + r0 + r >= p.rows || bucket0 + bucket >= p.k) continue;
      float total = 0.0f;
      for (int piece = 0; piece < p.pieces; ++piece) total += from[(bucket * p.pieces + piece) * 4 + r];
      out[(row + r0 + r) * p.ld_out + bucket0 + bucket] = total * p.scale;
    }
  }
}

// What a slice holds: the input's values, or float32 tiles of gradients.
template <typename T, bool kFactors>
using Held = std::conditional_t<kFactors, float, T>;

// Grid: groups of rows, groups of buckets, splits of the slices. kFactors: x is g [N, d_out] and p.a is [N, d_in].
template <typename T, bool kFactors>
__global__ __launch_bounds__(kThreads, 1) void sparse_projection_kernel(Problem p) {
  PYINF_SHARED_MEMORY(shared);
  Memory& memory = *reinterpret_cast<Memory*>(shared);  // the first member of FactorMemory
  const std::int64_t row = static_cast<std::int64_t>(blockIdx.x) * kRows<Held<T, kFactors>>;
  const std::int64_t bucket0 = static_cast<std::int64_t>(blockIdx.y) * (kChains / p.pieces);
  const std::int64_t d_out = kFactors ? p.d / p.d_in : 1, across = kFactors ? ceil_div(p.d_in, kSide) : 1;
  const std::int64_t slices = kFactors ? ceil_div(d_out, kSide) * across : ceil_div(p.d, kSlice);
  const std::int64_t first = blockIdx.z * p.slices_per_split;
  const std::int64_t last = first + p.slices_per_split < slices ? first + p.slices_per_split : slices;
  float sum[kOwned][kRows<Held<T, kFactors>>] = {};
  for (std::int64_t slice = first; slice < last; ++slice) {
    const std::int64_t o = slice / across * kSide, j = slice % across * kSide;
    const auto coordinate = [&](int e) -> std::int64_t {
      if constexpr (kFactors) {
        const std::int64_t at_row = o + e / kSide, at_column = j + e % kSide;
        return at_row < d_out && at_column < p.d_in ? at_row * p.d_in + at_column : -1;
      } else {
        const std::int64_t i = slice * kSlice + e;
        return i < p.d ? i : -1;
      }
    };
    __syncthreads();  // nobody reads the slice before this one any more
    if constexpr (kFactors) {
      form_tile(*reinterpret_cast<FactorMemory<T>*>(shared), p, row, o, j);
    } else {
      load_slice<T>(memory, p, row, slice * kSlice);
    }
    for (std::int64_t s = 0; s < p.nnz; ++s) {
      chain(memory, p, static_cast<std::uint32_t>(s), bucket0, coordinate);
      add_chains<Held<T, kFactors>>(
          memory, sum);  // x has arrived: chain() holds two barriers, and clears its own chains before them
    }
  }
  finish(memory, p, row, bucket0, sum);
}

}  // namespace pyinf::sparse_projection
