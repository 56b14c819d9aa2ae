// Device code of accumulate_squared_gradients. One block owns a 128 × 128 tile of Λ and walks over all sequences: the
// product gᵀa of the running sequence and the running sum of squares both live in registers, g and a stream through a
// ring of shared-memory stages filled by asynchronous copies that run across sequence boundaries.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_pipeline_primitives.h>
#include <mma.h>

#include <cstdint>

#include "pyinf/index_maps.h"

namespace pyinf::squared_gradients {

constexpr int kTile = 128;     // rows and columns of Λ per block
constexpr int kThreads = 256;  // 8 warps
constexpr int kGroup = 8;      // rows of tiles walked together, for the L2 cache

struct Problem {
  float* lam;
  const void* g;
  const void* a;
  const std::int64_t* offsets;
  std::int64_t ld_lam, ld_g, ld_a, sequences, d_out, d_in;
};

// Per element type: rows a chunk, stages in the ring, and padding that keeps shared-memory rows off the same banks.
template <typename T>
struct Ring {
  static constexpr int kVector = 16 / static_cast<int>(sizeof(T));
  static constexpr int kChunk = sizeof(T) == 4 ? 16 : 32;
  static constexpr int kStages = 4;
  static constexpr int kStride = kTile + kVector;
  T g[kStages][kChunk][kStride];
  T a[kStages][kChunk][kStride];
};

// Copies `count` rows of 128 columns into one stage; rows beyond `count` and columns beyond `width` become zero.
// kVectorised: rows start on 16 bytes and `width` is whole vectors, so the copy can be asynchronous.
template <typename T, bool kVectorised>
__device__ __forceinline__ void load_chunk(T (*stage)[Ring<T>::kStride], const T* rows, std::int64_t stride, int count,
                                           std::int64_t column, std::int64_t width) {
  constexpr int kStep = kVectorised ? Ring<T>::kVector : 1;
  constexpr int kPerRow = kTile / kStep;
#pragma unroll
  for (int item = threadIdx.x; item < Ring<T>::kChunk * kPerRow; item += kThreads) {
    const int row = item / kPerRow;
    const int offset = item % kPerRow * kStep;
    const bool inside = row < count && column + offset < width;
    const T* source = inside ? rows + row * stride + column + offset : rows;
    if constexpr (kVectorised) {
      __pipeline_memcpy_async(&stage[row][offset], source, 16, inside ? 0 : 16);
    } else {
      stage[row][offset] = inside ? *source : T(0.0f);
    }
  }
}

// 16-bit inputs: each warp owns 64 × 32 of the tile as 4 × 2 tensor-core fragments.
template <typename T>
struct TensorCoreTile {
  static constexpr int kFragment = 16;
  using Gradient = nvcuda::wmma::fragment<nvcuda::wmma::matrix_a, 16, 16, 16, T, nvcuda::wmma::col_major>;
  using Input = nvcuda::wmma::fragment<nvcuda::wmma::matrix_b, 16, 16, 16, T, nvcuda::wmma::row_major>;
  using Accumulator = nvcuda::wmma::fragment<nvcuda::wmma::accumulator, 16, 16, 16, float>;

  Accumulator product[4][2], sum[4][2];
  int row, column;  // of this warp's part within the tile

  __device__ __forceinline__ TensorCoreTile() : row(threadIdx.x / 32 / 4 * 64), column(threadIdx.x / 32 % 4 * 32) {
#pragma unroll
    for (int i = 0; i < 4; ++i)
#pragma unroll
      for (int j = 0; j < 2; ++j) {
        nvcuda::wmma::fill_fragment(product[i][j], 0.0f);
        nvcuda::wmma::fill_fragment(sum[i][j], 0.0f);
      }
  }

  __device__ __forceinline__ void multiply(const Ring<T>& ring, int stage) {
    Gradient left[4];
    Input right[2];
#pragma unroll
    for (int k = 0; k < Ring<T>::kChunk; k += kFragment) {
#pragma unroll
      for (int i = 0; i < 4; ++i)
        nvcuda::wmma::load_matrix_sync(left[i], &ring.g[stage][k][row + i * kFragment], Ring<T>::kStride);
#pragma unroll
      for (int j = 0; j < 2; ++j)
        nvcuda::wmma::load_matrix_sync(right[j], &ring.a[stage][k][column + j * kFragment], Ring<T>::kStride);
#pragma unroll
      for (int i = 0; i < 4; ++i)
#pragma unroll
        for (int j = 0; j < 2; ++j) nvcuda::wmma::mma_sync(product[i][j], left[i], right[j], product[i][j]);
    }
  }

  __device__ __forceinline__ void square() {
#pragma unroll
    for (int i = 0; i < 4; ++i)
#pragma unroll
      for (int j = 0; j < 2; ++j)
#pragma unroll
        for (int e = 0; e < product[i][j].num_elements; ++e) {
          sum[i][j].x[e] += product[i][j].x[e] * product[i][j].x[e];
          product[i][j].x[e] = 0.0f;
        }
  }

  // Which element of a fragment a lane holds is not specified, so fragments go through this warp's own 16 × 16 of
  // shared memory.
  __device__ __forceinline__ void add_to(const Problem& p, Tile tile, void* shared) {
    float* staging = static_cast<float*>(shared) + threadIdx.x / 32 * kFragment * kFragment;
    const int lane = threadIdx.x % 32;
#pragma unroll
    for (int i = 0; i < 4; ++i)
#pragma unroll
      for (int j = 0; j < 2; ++j) {
        __syncwarp();
        nvcuda::wmma::store_matrix_sync(staging, sum[i][j], kFragment, nvcuda::wmma::mem_row_major);
        __syncwarp();
        const std::int64_t column_at = tile.column * kTile + column + j * kFragment + lane % kFragment;
#pragma unroll
        for (int r = lane / kFragment; r < kFragment; r += 2) {
          const std::int64_t row_at = tile.row * kTile + row + i * kFragment + r;
          if (row_at < p.d_out && column_at < p.d_in)
            p.lam[row_at * p.ld_lam + column_at] += staging[r * kFragment + lane % kFragment];
        }
      }
  }
};

// float32 inputs: each thread owns 8 × 8 of the tile, as four 4 × 4 corners 64 apart so that vector reads of shared
// memory do not collide.
struct PlainTile {
  float product[8][8], sum[8][8];
  int row, column;

  __device__ __forceinline__ PlainTile() : row(threadIdx.x / 16 * 4), column(threadIdx.x % 16 * 4) {
#pragma unroll
    for (int i = 0; i < 8; ++i)
#pragma unroll
      for (int j = 0; j < 8; ++j) product[i][j] = sum[i][j] = 0.0f;
  }

  __device__ __forceinline__ static void read(float (&out)[8], const float* row) {
    const float4 low = *reinterpret_cast<const float4*>(row);
    const float4 high = *reinterpret_cast<const float4*>(row + 64);
    out[0] = low.x, out[1] = low.y, out[2] = low.z, out[3] = low.w;
    out[4] = high.x, out[5] = high.y, out[6] = high.z, out[7] = high.w;
  }

  __device__ __forceinline__ void multiply(const Ring<float>& ring, int stage) {
    float left[8], right[8];
#pragma unroll
    for (int k = 0; k < Ring<float>::kChunk; ++k) {
      read(left, &ring.g[stage][k][row]);
      read(right, &ring.a[stage][k][column]);
#pragma unroll
      for (int i = 0; i < 8; ++i)
#pragma unroll
        for (int j = 0; j < 8; ++j) product[i][j] = fmaf(left[i], right[j], product[i][j]);
    }
  }

  __device__ __forceinline__ void square() {
#pragma unroll
    for (int i = 0; i < 8; ++i)
#pragma unroll
      for (int j = 0; j < 8; ++j) {
        sum[i][j] = fmaf(product[i][j], product[i][j], sum[i][j]);
        product[i][j] = 0.0f;
      }
  }

  __device__ __forceinline__ void add_to(const Problem& p, Tile tile, void*) {
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      const std::int64_t row_at = tile.row * kTile + row + i / 4 * 64 + i % 4;
      if (row_at >= p.d_out) continue;
#pragma unroll
      for (int j = 0; j < 8; ++j) {
        const std::int64_t column_at = tile.column * kTile + column + j / 4 * 64 + j % 4;
        if (column_at < p.d_in) p.lam[row_at * p.ld_lam + column_at] += sum[i][j];
      }
    }
  }
};

template <typename T>
struct TileOf {
  using type = TensorCoreTile<T>;
};
template <>
struct TileOf<float> {
  using type = PlainTile;
};

template <typename T, bool kVectorised>
__global__ __launch_bounds__(kThreads) void accumulate_squared_gradients_kernel(Problem p) {
  extern __shared__ __align__(128) unsigned char shared[];
  Ring<T>& ring = *reinterpret_cast<Ring<T>*>(shared);
  constexpr int kStages = Ring<T>::kStages;
  const Tile tile = grouped_tile(blockIdx.x, ceil_div(p.d_out, kTile), ceil_div(p.d_in, kTile), kGroup);
  const T* g = static_cast<const T*>(p.g);
  const T* a = static_cast<const T*>(p.a);

  ChunkCursor<Ring<T>::kChunk> ahead(p.offsets, p.sequences);
  const auto fetch = [&](int stage) {
    if (ahead.valid()) {
      load_chunk<T, kVectorised>(ring.g[stage], g + ahead.row * p.ld_g, p.ld_g, ahead.count(), tile.row * kTile,
                                 p.d_out);
      load_chunk<T, kVectorised>(ring.a[stage], a + ahead.row * p.ld_a, p.ld_a, ahead.count(), tile.column * kTile,
                                 p.d_in);
      ahead.next();
    }
    __pipeline_commit();  // also when there is nothing left, so that the count of batches in flight stays the same
  };
  for (int stage = 0; stage < kStages - 1; ++stage) fetch(stage);

  typename TileOf<T>::type work;
  int stage = 0;
  for (ChunkCursor<Ring<T>::kChunk> now(p.offsets, p.sequences); now.valid(); now.next()) {
    __pipeline_wait_prior(kStages - 2);
    __syncthreads();  // this stage has arrived, and nobody reads the one before it any more
    fetch(stage == 0 ? kStages - 1 : stage - 1);
    work.multiply(ring, stage);
    if (now.last_of_sequence()) work.square();
    stage = stage + 1 == kStages ? 0 : stage + 1;
  }
  __pipeline_wait_prior(0);
  __syncthreads();  // the ring becomes the staging area
  work.add_to(p, tile, shared);
}

}  // namespace pyinf::squared_gradients
