// Device code of scan_topk. A block holds a few queries and streams a strip of the store past them, 128 rows at a time,
// through a ring of shared-memory stages of 64 bytes a row; tensor cores form the 128 × queries scores in registers:
// float products, int8 products, or for sign bits the number of bits set in both (differing = set here + set there −
// 2 · set in both). A score that beats its query's threshold goes to the query's candidates in shared memory; when they
// are full they are sorted, the best k stay, and the k-th becomes the threshold. A second kernel merges the strips.
//
// A candidate is one 64-bit key: the score's bits made to order like integers, then the complement of the row, so that
// of equal scores the lower row is greater. Keys are distinct: the best k do not depend on the order they came in.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_pipeline_primitives.h>

#include <cstdint>
#include <cstring>

#include "pyinf/index_maps.h"
#include "pyinf/launch.cuh"
#include "pyinf/mma.cuh"

namespace pyinf::scan_topk {

using Key = unsigned long long;

constexpr int kThreads = 256;  // 8 warps, 16 rows each
constexpr int kRows = 128;     // rows of the store a tile
constexpr int kQueries = 64;   // at most, a block
constexpr int kBytes = 64;     // of a row of the store a stage
constexpr int kStride = kBytes + 16;
constexpr int kStages = 3;
constexpr int kMerged = 2048;  // keys that the merge sorts at a time

enum Kind : int { kBits, kInt8, kFloats, kInt8Floats };

// How rows and queries meet: T is the type of the queries (and of the rows, but for kInt8Floats).
template <Kind kKind, typename T>
struct Rule {
  using Sum = std::int32_t;
  static constexpr int kQueryBytes = kBytes;
};
template <typename T>
struct Rule<kFloats, T> {
  using Sum = float;
  static constexpr int kQueryBytes = kBytes;
};
template <typename T>
struct Rule<kInt8Floats, T> {
  using Sum = float;
  static constexpr int kQueryBytes = kBytes * static_cast<int>(sizeof(T));
};

struct Problem {
  const unsigned char* queries;
  const unsigned char* rows;
  const float* scale;                                 // [n], or null
  Key* partials;                                      // [count, strips, k]
  std::int64_t part_stride, ld_queries, ld_rows;      // in bytes
  std::int64_t count, n, width, bits, strip, strips;  // width: bytes of a row
  int k, parts, block_queries, capacity, query_grain, row_grain;
};

PYINF_HOST_DEVICE int capacity_of(int k) {
  int capacity = 64;
  while (capacity < 2 * k) capacity *= 2;
  return capacity;
}

// Bytes of shared memory of a block.
PYINF_HOST_DEVICE int shared_bytes(int parts, int block_queries, int capacity, int query_bytes) {
  return kStages * (kRows * kStride + parts * block_queries * (query_bytes + 16)) +
         block_queries * (capacity * 8 + 8 + 4 + 4);
}

PYINF_HOST_DEVICE std::uint32_t order_bits(float score) {
  score += 0.0f;  // −0 is 0
  std::uint32_t u;
  std::memcpy(&u, &score, 4);
  if (score != score) return 0xFFFFFFFFu;  // not a number comes first, as in torch.sort
  return u & 0x80000000u ? ~u : u | 0x80000000u;
}

PYINF_HOST_DEVICE Key join_key(std::uint32_t order, std::int64_t row) {
  return static_cast<Key>(order) << 32 | (0xFFFFFFFFu - static_cast<std::uint32_t>(row));
}

PYINF_HOST_DEVICE Key make_key(float score, std::int64_t row) { return join_key(order_bits(score), row); }

PYINF_HOST_DEVICE float key_score(Key key) {
  const std::uint32_t order = static_cast<std::uint32_t>(key >> 32);
  const std::uint32_t u = order & 0x80000000u ? order & 0x7FFFFFFFu : ~order;
  float score;
  std::memcpy(&score, &u, 4);
  return score;
}

PYINF_HOST_DEVICE std::int64_t key_row(Key key) { return 0xFFFFFFFFu - static_cast<std::uint32_t>(key); }

// Step (size, stride) of a descending bitonic sort for pair number i.
__device__ __forceinline__ void compare(Key* keys, int i, int size, int stride) {
  const int low = i / stride * 2 * stride + i % stride, high = low + stride;
  const bool falling = (low & size) == 0;
  const Key x = keys[low], y = keys[high];
  if ((x < y) == falling) keys[low] = y, keys[high] = x;
}

// By one warp: sorts a query's candidates, keeps the best k, sets the threshold.
__device__ __forceinline__ void prune(Key* keys, int* count, Key* threshold, int capacity, int k) {
  const int lane = threadIdx.x % 32;
  const int have = *count < capacity ? *count : capacity;
  __syncwarp();
  for (int i = have + lane; i < capacity; i += 32) keys[i] = 0;
  __syncwarp();
  for (int size = 2; size <= capacity; size *= 2)
    for (int stride = size / 2; stride > 0; stride /= 2) {
      for (int i = lane; i < capacity / 2; i += 32) compare(keys, i, size, stride);
      __syncwarp();
    }
  if (lane == 0) {
    *count = have < k ? have : k;
    if (have >= k) *threshold = keys[k - 1];
  }
  __syncwarp();
}

// 64 · bytes of `total` rows into shared memory, zero where the row is null or past the width. from(row): its address.
template <int kWidth, typename From>
__device__ __forceinline__ void load_rows(unsigned char* to, int total, std::int64_t offset, std::int64_t width,
                                          int grain, From from) {
  const auto inside = [&](int at, int size) {
    const std::int64_t left = width - offset - at;
    return left < 0 ? 0 : left < size ? static_cast<int>(left) : size;
  };
  if (grain == 16) {
    for (int item = threadIdx.x; item < total * (kWidth / 16); item += kThreads) {
      const int row = item / (kWidth / 16), at = item % (kWidth / 16) * 16;
      const unsigned char* source = from(row);
      const int count = source ? inside(at, 16) : 0;
      copy_async<16>(to + row * (kWidth + 16) + at, count ? source + offset + at : from(0), count);
    }
  } else if (grain == 4) {
    for (int item = threadIdx.x; item < total * (kWidth / 4); item += kThreads) {
      const int row = item / (kWidth / 4), at = item % (kWidth / 4) * 4;
      const unsigned char* source = from(row);
      const int count = source ? inside(at, 4) : 0;
      copy_async<4>(to + row * (kWidth + 16) + at, count ? source + offset + at : from(0), count);
    }
  } else {
    for (int item = threadIdx.x; item < total * kWidth; item += kThreads) {
      const int row = item / kWidth, at = item % kWidth;
      const unsigned char* source = from(row);
      to[row * (kWidth + 16) + at] = source && inside(at, 1) ? source[offset + at] : 0;
    }
  }
}

__device__ __forceinline__ std::uint32_t widen(const unsigned char* two) {
  const __nv_bfloat16 low = __nv_bfloat16(static_cast<float>(static_cast<std::int8_t>(two[0])));
  const __nv_bfloat16 high = __nv_bfloat16(static_cast<float>(static_cast<std::int8_t>(two[1])));
  std::uint16_t words[2];
  std::memcpy(&words[0], &low, 2);
  std::memcpy(&words[1], &high, 2);
  return static_cast<std::uint32_t>(words[1]) << 16 | words[0];
}

template <Kind kKind, typename T>
__global__ __launch_bounds__(kThreads, 2) void scan_topk_kernel(Problem p) {
  using Sum = typename Rule<kKind, T>::Sum;
  constexpr int kQueryBytes = Rule<kKind, T>::kQueryBytes, kQueryStride = kQueryBytes + 16;
  PYINF_SHARED_MEMORY(shared);
  const int queries_stage = p.parts * p.block_queries * kQueryStride;
  unsigned char* row_ring = shared;
  unsigned char* query_ring = row_ring + kStages * kRows * kStride;
  Key* candidates = reinterpret_cast<Key*>(query_ring + kStages * queries_stage);
  Key* threshold = candidates + p.block_queries * p.capacity;
  int* counts = reinterpret_cast<int*>(threshold + p.block_queries);
  int* set_bits = counts + p.block_queries;

  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
  const std::int64_t query_tiles = ceil_div(p.count, p.block_queries);
  const std::int64_t q0 = blockIdx.x % query_tiles * p.block_queries, strip = blockIdx.x / query_tiles;
  const int queries = static_cast<int>(p.count - q0 < p.block_queries ? p.count - q0 : p.block_queries);
  const std::int64_t first = strip * p.strip, last = first + p.strip < p.n ? first + p.strip : p.n;
  const int subtiles = (queries + 7) / 8;

  for (int q = threadIdx.x; q < p.block_queries; q += kThreads) counts[q] = 0, threshold[q] = 0;
  if constexpr (kKind == kBits) {
    for (int q = warp; q < p.block_queries; q += kThreads / 32) {
      int set = 0;
      if (q < queries)
        for (std::int64_t i = lane; i < p.width; i += 32) set += __popc(p.queries[(q0 + q) * p.ld_queries + i]);
      for (int step = 16; step > 0; step /= 2) set += __shfl_xor_sync(0xFFFFFFFFu, set, step);
      if (lane == 0) set_bits[q] = set;
    }
  }

  const std::int64_t chunks = ceil_div(p.width, kBytes), tiles = ceil_div(last - first, kRows);
  std::int64_t ahead_tile = 0, ahead_chunk = 0;
  const auto fetch = [&](int stage) {
    if (ahead_tile < tiles && chunks > 0) {
      const std::int64_t row0 = first + ahead_tile * kRows;
      load_rows<kBytes>(row_ring + stage * kRows * kStride, kRows, ahead_chunk * kBytes, p.width, p.row_grain,
                        [&](int row) { return row0 + row < last ? p.rows + (row0 + row) * p.ld_rows : nullptr; });
      load_rows<kQueryBytes>(query_ring + stage * queries_stage, p.parts * p.block_queries, ahead_chunk * kQueryBytes,
                             p.width * (kQueryBytes / kBytes), p.query_grain, [&](int row) {
                               const int part = row / p.block_queries, q = row % p.block_queries;
                               return q < queries ? p.queries + part * p.part_stride + (q0 + q) * p.ld_queries
                                                  : nullptr;
                             });
      if (++ahead_chunk == chunks) ahead_chunk = 0, ++ahead_tile;
    }
    __pipeline_commit();  // also when there is nothing left, so that the count of batches in flight stays the same
  };
  for (int stage = 0; stage < kStages - 1; ++stage) fetch(stage);

  int stage = 0;
  for (std::int64_t tile = 0; tile < tiles; ++tile) {
    Sum acc[kQueries / 8][4] = {};
    int set_here[2] = {0, 0};
    for (std::int64_t chunk = 0; chunk < chunks; ++chunk) {
      __pipeline_wait_prior(kStages - 2);
      __syncthreads();  // this stage has arrived, and nobody reads the one before it any more
      fetch(stage == 0 ? kStages - 1 : stage - 1);
      const unsigned char* rows = row_ring + stage * kRows * kStride + warp * 16 * kStride;
      const unsigned char* columns = query_ring + stage * queries_stage;
      constexpr int kSteps = kQueryBytes / 32;
      std::uint32_t a[kSteps][4];
#pragma unroll
      for (int s = 0; s < kSteps; ++s) {
        if constexpr (kKind == kInt8Floats) {
#pragma unroll
          for (int r = 0; r < 4; ++r) a[s][r] = widen(rows + (g + r % 2 * 8) * kStride + s * 16 + r / 2 * 8 + 2 * t);
        } else {
          load_blocks(a[s], rows + lane % 16 * kStride + s * 32 + lane / 16 * 16);
        }
        if constexpr (kKind == kBits) {
          set_here[0] += __popc(a[s][0]) + __popc(a[s][2]);
          set_here[1] += __popc(a[s][1]) + __popc(a[s][3]);
        }
      }
      for (int part = 0; part < p.parts; ++part) {
#pragma unroll
        for (int n = 0; n < kQueries / 8; ++n) {
          if (n >= subtiles) continue;  // the same for all
#pragma unroll
          for (int s = 0; s < kSteps; s += 2) {
            std::uint32_t b[4];
            load_blocks(b,
                        columns + (part * p.block_queries + n * 8 + lane % 8) * kQueryStride + s * 32 + lane / 8 * 16);
#pragma unroll
            for (int h = 0; h < 2; ++h) {
              if constexpr (kKind == kBits) {
                mma_bits(acc[n], a[s + h], b[2 * h], b[2 * h + 1]);
              } else if constexpr (kKind == kInt8) {
                mma_int8(acc[n], a[s + h], b[2 * h], b[2 * h + 1]);
              } else {
                mma_16<T>(acc[n], a[s + h], b[2 * h], b[2 * h + 1]);
              }
            }
          }
        }
      }
      stage = stage + 1 == kStages ? 0 : stage + 1;
    }
    if constexpr (kKind == kBits) {
#pragma unroll
      for (int h = 0; h < 2; ++h)
#pragma unroll
        for (int step = 1; step < 4; step *= 2) set_here[h] += __shfl_xor_sync(0xFFFFFFFFu, set_here[h], step);
    }

    std::int64_t row[2];
    float factor[2];
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      row[h] = first + tile * kRows + warp * 16 + g + 8 * h;
      factor[h] = p.scale && row[h] < last ? p.scale[row[h]] : 1.0f;
    }
    if (chunks == 0) __syncthreads();  // the counts were cleared
    // The scores take the place of the sums, already in the order of integers.
    std::uint32_t order[kQueries / 8][4];
    std::uint32_t pending = 0;  // bit 4n + e: an element that may still become a candidate
#pragma unroll
    for (int n = 0; n < kQueries / 8; ++n)
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        const int q = n * 8 + 2 * t + e % 2;
        order[n][e] = 0;
        if (row[e / 2] >= last || q >= queries) continue;
        float score;
        if constexpr (kKind == kBits) {
          score = static_cast<float>(p.bits - 2 * (set_here[e / 2] + set_bits[q] - 2 * acc[n][e]));
        } else {
          score = static_cast<float>(acc[n][e]);
        }
        order[n][e] = order_bits(p.scale ? score * factor[e / 2] : score);
        pending |= 1u << (4 * n + e);
      }
    for (;;) {
#pragma unroll
      for (int n = 0; n < kQueries / 8; ++n)
#pragma unroll
        for (int e = 0; e < 4; ++e) {
          if (!(pending >> (4 * n + e) & 1)) continue;
          const int q = n * 8 + 2 * t + e % 2;
          const Key key = join_key(order[n][e], row[e / 2]);
          if (key > threshold[q]) {
            const int at = atomicAdd(&counts[q], 1);
            if (at >= p.capacity) continue;  // full: once more, after the candidates were pruned
            candidates[q * p.capacity + at] = key;
          }
          pending &= ~(1u << (4 * n + e));
        }
      const int again = __syncthreads_or(pending != 0);
      for (int q = warp; q < queries; q += kThreads / 32)
        if (counts[q] >= p.capacity || (threshold[q] == 0 && counts[q] >= p.k))
          prune(candidates + q * p.capacity, &counts[q], &threshold[q], p.capacity, p.k);
      __syncthreads();
      if (!again) break;
    }
  }
  __pipeline_wait_prior(0);
  __syncthreads();
  for (int q = warp; q < queries; q += kThreads / 32) {
    Key* keys = candidates + q * p.capacity;
    prune(keys, &counts[q], &threshold[q], p.capacity, p.k);
    Key* out = p.partials + ((q0 + q) * p.strips + strip) * p.k;
    for (int i = lane; i < p.k; i += 32) out[i] = keys[i];
  }
}

struct Merge {
  const Key* partials;  // [count, total]
  float* values;        // [count, k]
  std::int64_t* indices;
  std::int64_t total;
  int k;
};

// One block a query: the best k of its strips' best.
static __global__ __launch_bounds__(kThreads) void merge_topk_kernel(Merge p) {
  PYINF_SHARED_MEMORY(shared);
  Key* keys = reinterpret_cast<Key*>(shared);  // [kMerged], the best so far in front
  const std::int64_t query = blockIdx.x;
  for (int i = threadIdx.x; i < p.k; i += kThreads) keys[i] = 0;
  __syncthreads();
  for (std::int64_t base = 0; base < p.total; base += kMerged - p.k) {
    const Key worst = keys[p.k - 1];
    int better = 0;
    for (int i = p.k + threadIdx.x; i < kMerged; i += kThreads) {
      const std::int64_t at = base + i - p.k;
      keys[i] = at < p.total ? p.partials[query * p.total + at] : 0;
      better |= keys[i] > worst;
    }
    if (!__syncthreads_or(better)) continue;
    for (int size = 2; size <= kMerged; size *= 2)
      for (int stride = size / 2; stride > 0; stride /= 2) {
        for (int i = threadIdx.x; i < kMerged / 2; i += kThreads) compare(keys, i, size, stride);
        __syncthreads();
      }
  }
  for (int i = threadIdx.x; i < p.k; i += kThreads) {
    p.values[query * p.k + i] = key_score(keys[i]);
    p.indices[query * p.k + i] = key_row(keys[i]);
  }
}

}  // namespace pyinf::scan_topk
