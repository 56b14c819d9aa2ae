// A block's product of rows of x with up to 128 columns of a matrix P that is drawn while it is used, or given:
// acc [kRows, 128] += x[rows, first .. last] · P[first .. last, j0 .. j0 + columns], on tensor cores, in float32.
//
// x streams through a ring of shared-memory stages. Signs stay packed (one Philox call holds a row of 128 columns) and
// are spread over operand registers two instructions at a time; normal or given elements pass through a tile of
// shared memory. Exactness: signs are exact in 16 bits; float32 is cut into three bfloat16 parts (24 bits, products of
// parts whose indices add up to less than 3); a normal element is two parts beside 16-bit inputs.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_pipeline_primitives.h>

#include <cstdint>
#include <cstring>

#include "pyinf/index_maps.h"
#include "pyinf/mma.cuh"
#include "pyinf/philox.h"

namespace pyinf::projection {

constexpr int kThreads = 256;  // 8 warps
constexpr int kChunk = 32;     // columns of x a stage
constexpr int kColumns = 128;  // columns of P a block: those of one Philox call
constexpr int kDrawn = 256;    // rows of signs drawn at a time, one a thread
constexpr int kWordTiles = 4;  // 8-column tiles a warp: the 32 columns of one word of signs

enum Source : int { kSigns = 0, kNormal = 1, kGiven = 2 };

struct Matrix {
  int source;
  std::uint32_t stream;
  std::uint64_t seed;
  const void* given;  // [d, columns] of the dtype of x, row stride ld
  std::int64_t ld;
  bool aligned;  // given rows start on 16 bytes
};

template <typename T>
struct Format {
  using Element = T;  // what the tensor cores multiply
  static constexpr int kParts = 1, kDrawnParts = 2, kStages = 4;
};
template <>
struct Format<float> {
  using Element = __nv_bfloat16;
  static constexpr int kParts = 3, kDrawnParts = 3, kStages = 2;
};

template <typename Element>
constexpr std::uint32_t kOnes = 0x3F803F80u;  // a pair of bfloat16
template <>
inline constexpr std::uint32_t kOnes<__half> = 0x3C003C00u;

template <typename To, typename From>
__device__ __forceinline__ To bits_as(From value) {
  static_assert(sizeof(To) == sizeof(From));
  To out;
  std::memcpy(static_cast<void*>(&out), &value, sizeof(To));
  return out;
}

// value = Σ part[p], each the nearest `Element` to what the ones before it left.
template <typename Element, int kParts>
__device__ __forceinline__ void cut(float value, Element (&part)[kParts]) {
#pragma unroll
  for (int p = 0; p < kParts; ++p) {
    part[p] = Element(value);
    value -= static_cast<float>(part[p]);
  }
}

template <typename Element>
__device__ __forceinline__ std::uint32_t pair(Element low, Element high) {
  return static_cast<std::uint32_t>(bits_as<std::uint16_t>(high)) << 16 | bits_as<std::uint16_t>(low);
}

template <typename Element, int kRows, int kParts>
struct CutRows {
  Element part[kParts][kRows][kChunk + 8];
};
template <typename Element, int kRows>
struct CutRows<Element, kRows, 1> {};

template <typename T, int kRows>
struct Shared : CutRows<typename Format<T>::Element, kRows, Format<T>::kParts> {
  using Element = typename Format<T>::Element;
  static constexpr int kVector = 16 / static_cast<int>(sizeof(T));
  T x[Format<T>::kStages][kRows][kChunk + kVector];
  union {
    std::uint32_t signs[2][4][kDrawn];
    Element p[Format<T>::kDrawnParts][kChunk][kColumns + 8];
  };
};

// kTakesGiven: whether a given matrix is served (its elements for the next stage wait in registers).
template <typename T, int kRows, bool kTakesGiven>
class Product {
 public:
  using Element = typename Format<T>::Element;
  using Memory = Shared<T, kRows>;
  static constexpr int kParts = Format<T>::kParts;
  static constexpr int kStages = Format<T>::kStages;
  static constexpr int kTiles = kRows / 32;  // 16-row tiles a warp, when four warps share the columns

  // columns: how many of the 128 count. Fewer than 65 or 33: two warps or one share them, and more share the rows.
  __device__ __forceinline__ Product(int rows, int columns) : rows_(rows), columns_(columns) {
    const int warp = threadIdx.x / 32;
    const int wide = columns > 64 ? 4 : columns > 32 ? 2 : 1;
    warps_down_ = 8 / wide;
    warp_row_ = warp / wide;
    warp_column_ = warp % wide;
    clear();
  }

  __device__ __forceinline__ void clear() {
#pragma unroll
    for (int i = 0; i < kTiles; ++i)
#pragma unroll
      for (int j = 0; j < kWordTiles; ++j)
#pragma unroll
        for (int e = 0; e < 4; ++e) acc_[i][j][e] = 0.0f;
  }

  // x: row 0 of the block's rows, stride ld; j0: a multiple of 128; first: a multiple of 8. Leaves with all threads
  // past their last use of `s`.
  __device__ __forceinline__ void run(Memory& s, const T* x, std::int64_t ld, bool aligned, std::int64_t first,
                                      std::int64_t last, const Matrix& matrix, std::int64_t j0) {
    const std::int64_t chunks = ceil_div(last - first, kChunk);
    const bool signs = matrix.source == kSigns;
    const auto fetch = [&](std::int64_t c) {
      if (c < chunks) load(s.x[c % kStages], x, ld, aligned, first + c * kChunk, last);
      __pipeline_commit();  // also when there is nothing left, so that the count of batches in flight stays the same
    };
    for (int c = 0; c < kStages - 1; ++c) fetch(c);
    std::uint32_t held[kHeldWords];
    if (signs) draw_signs(s, matrix, first, last, 0, j0);
    if constexpr (kTakesGiven)
      if (matrix.source == kGiven) hold(held, matrix, first, last, j0);
    for (std::int64_t c = 0; c < chunks; ++c) {
      __pipeline_wait_prior(kStages - 2);
      __syncthreads();  // this chunk has arrived, and nobody reads the one before it any more
      fetch(c + kStages - 1);
      if (signs) {
        if (c % (kDrawn / kChunk) == 0) draw_signs(s, matrix, first, last, c / (kDrawn / kChunk) + 1, j0);
      } else if (!kTakesGiven || matrix.source == kNormal) {
        draw_normals(s, matrix, first + c * kChunk, j0);
      } else {
        put(s, held);
        hold(held, matrix, first + (c + 1) * kChunk, last, j0);
      }
      if constexpr (kParts > 1) cut_stage(s, static_cast<int>(c % kStages));
      if (kParts > 1 || !signs) __syncthreads();
      if (signs) {
        multiply_signs(s, static_cast<int>(c % kStages), c);
      } else {
        multiply_tile(s, static_cast<int>(c % kStages), matrix.source == kNormal ? Format<T>::kDrawnParts : kParts);
      }
    }
    __pipeline_wait_prior(0);
    __syncthreads();
  }

  // visit(row, column, value) for every element of acc that this thread holds, inside rows × columns.
  template <typename Visit>
  __device__ __forceinline__ void each(Visit visit) const {
    const int g = threadIdx.x % 32 / 4, t = threadIdx.x % 4;
#pragma unroll
    for (int i = 0; i < kTiles; ++i)
#pragma unroll
      for (int j = 0; j < kWordTiles; ++j)
#pragma unroll
        for (int e = 0; e < 4; ++e) {
          const int row = first_row(i) + g + e / 2 * 8;
          const int column = warp_column_ * 32 + j * 8 + t * 2 + e % 2;
          if (row < rows_ && column < columns_) visit(row, column, acc_[i][j][e]);
        }
  }

  // All rows and columns that a warp holds, into shared memory: zero below the last row, and columns past the last one
  // hold finite numbers.
  template <int kStride>
  __device__ __forceinline__ void store(float (*to)[kStride]) const {
    const int g = threadIdx.x % 32 / 4, t = threadIdx.x % 4;
#pragma unroll
    for (int i = 0; i < kTiles; ++i) {
      if (first_row(i) >= kRows) continue;
#pragma unroll
      for (int j = 0; j < kWordTiles; ++j)
#pragma unroll
        for (int e = 0; e < 4; ++e)
          to[first_row(i) + g + e / 2 * 8][warp_column_ * 32 + j * 8 + t * 2 + e % 2] = acc_[i][j][e];
    }
  }

 private:
  static constexpr int kHeldWords = kChunk * kColumns / kThreads * static_cast<int>(sizeof(T)) / 4;

  float acc_[kTiles][kWordTiles][4];
  int rows_, columns_, warps_down_, warp_row_, warp_column_;

  __device__ __forceinline__ int first_row(int i) const { return (i * warps_down_ + warp_row_) * 16; }

  // Columns i .. i + 32 of all rows; what lies outside becomes zero.
  __device__ __forceinline__ void load(T (*stage)[kChunk + Memory::kVector], const T* x, std::int64_t ld, bool aligned,
                                       std::int64_t i, std::int64_t last) const {
    constexpr int kVector = Memory::kVector;
    if (aligned) {
#pragma unroll
      for (int item = threadIdx.x; item < kRows * kChunk / kVector; item += kThreads) {
        const int row = item / (kChunk / kVector), offset = item % (kChunk / kVector) * kVector;
        const std::int64_t left = row < rows_ ? last - (i + offset) : 0;
        const int inside = left < 0 ? 0 : left < kVector ? static_cast<int>(left) : kVector;
        copy_async<16>(&stage[row][offset], inside ? x + row * ld + i + offset : x,
                       inside * static_cast<int>(sizeof(T)));
      }
    } else {
#pragma unroll 4
      for (int item = threadIdx.x; item < kRows * kChunk; item += kThreads) {
        const int row = item / kChunk, offset = item % kChunk;
        const bool inside = row < rows_ && i + offset < last;
        stage[row][offset] = inside ? x[row * ld + i + offset] : T(0.0f);
      }
    }
  }

  __device__ __forceinline__ void draw_signs(Memory& s, const Matrix& matrix, std::int64_t first, std::int64_t last,
                                             std::int64_t group, std::int64_t j0) const {
    const std::int64_t i = first + group * kDrawn + threadIdx.x;
    if (first + group * kDrawn >= last) return;
    const Philox4 out = philox_signs(matrix.seed, matrix.stream, static_cast<std::uint64_t>(i),
                                     static_cast<std::uint32_t>(j0 / kColumns));
#pragma unroll
    for (int w = 0; w < 4; ++w) s.signs[group % 2][w][threadIdx.x] = out.w[w];
  }

  // Also past `last`: x is zero there, and what it is multiplied with must be finite.
  __device__ __forceinline__ void draw_normals(Memory& s, const Matrix& matrix, std::int64_t i, std::int64_t j0) const {
    constexpr int kQuads = kColumns / 4;
#pragma unroll 1
    for (int item = threadIdx.x; item < kChunk * kQuads; item += kThreads) {
      const int row = item / kQuads, quad = item % kQuads;
      const Normal4 drawn = philox_normals(matrix.seed, matrix.stream, static_cast<std::uint64_t>(i + row),
                                           static_cast<std::uint32_t>(j0 / 4 + quad));
      Element part[4][Format<T>::kDrawnParts];
#pragma unroll
      for (int e = 0; e < 4; ++e) cut(drawn.v[e], part[e]);
#pragma unroll
      for (int p = 0; p < Format<T>::kDrawnParts; ++p)
        *reinterpret_cast<uint2*>(&s.p[p][row][quad * 4]) = {pair(part[0][p], part[1][p]),
                                                             pair(part[2][p], part[3][p])};
    }
  }

  // This thread's 16 elements of rows i .. i + 32 of the given matrix; zero outside of it.
  __device__ __forceinline__ void hold(std::uint32_t (&held)[kHeldWords], const Matrix& matrix, std::int64_t i,
                                       std::int64_t last, std::int64_t j0) const {
    constexpr int kPerWord = 4 / static_cast<int>(sizeof(T));
    const int offset = threadIdx.x % 8 * 16;
    const std::int64_t row = i + threadIdx.x / 8;
    const T* from = static_cast<const T*>(matrix.given) + row * matrix.ld + j0 + offset;
    if (row < last && matrix.aligned && offset + 16 <= columns_) {
#pragma unroll
      for (int q = 0; q < kHeldWords / 4; ++q) {
        const uint4 four = reinterpret_cast<const uint4*>(from)[q];
        held[4 * q] = four.x, held[4 * q + 1] = four.y, held[4 * q + 2] = four.z, held[4 * q + 3] = four.w;
      }
      return;
    }
#pragma unroll
    for (int w = 0; w < kHeldWords; ++w) {
      std::uint32_t word = 0;
#pragma unroll
      for (int h = 0; h < kPerWord; ++h) {
        const int e = w * kPerWord + h;
        if (row < last && offset + e < columns_) {
          if constexpr (sizeof(T) == 4) {
            word = bits_as<std::uint32_t>(from[e]);
          } else {
            word |= static_cast<std::uint32_t>(bits_as<std::uint16_t>(from[e])) << 16 * h;
          }
        }
      }
      held[w] = word;
    }
  }

  __device__ __forceinline__ void put(Memory& s, const std::uint32_t (&held)[kHeldWords]) const {
    const int offset = threadIdx.x % 8 * 16, row = threadIdx.x / 8;
    if constexpr (sizeof(T) == 4) {
#pragma unroll
      for (int e = 0; e < 16; e += 2) {
        Element low[kParts], high[kParts];
        cut(bits_as<float>(held[e]), low);
        cut(bits_as<float>(held[e + 1]), high);
#pragma unroll
        for (int p = 0; p < kParts; ++p)
          *reinterpret_cast<std::uint32_t*>(&s.p[p][row][offset + e]) = pair(low[p], high[p]);
      }
    } else {
#pragma unroll
      for (int q = 0; q < 2; ++q)
        *reinterpret_cast<uint4*>(&s.p[0][row][offset + 8 * q]) = {held[4 * q], held[4 * q + 1], held[4 * q + 2],
                                                                   held[4 * q + 3]};
    }
  }

  __device__ __forceinline__ void cut_stage(Memory& s, int stage) const {
#pragma unroll 4
    for (int item = threadIdx.x; item < kRows * kChunk / 2; item += kThreads) {
      const int row = item / (kChunk / 2), offset = item % (kChunk / 2) * 2;
      Element low[kParts], high[kParts];
      cut(static_cast<float>(s.x[stage][row][offset]), low);
      cut(static_cast<float>(s.x[stage][row][offset + 1]), high);
#pragma unroll
      for (int p = 0; p < kParts; ++p)
        *reinterpret_cast<std::uint32_t*>(&s.part[p][row][offset]) = pair(low[p], high[p]);
    }
  }

  __device__ __forceinline__ void load_a(std::uint32_t (&a)[4], const Memory& s, int stage, int part, int i,
                                         int k) const {
    const int row = first_row(i) + threadIdx.x % 16, offset = k + threadIdx.x % 32 / 16 * 8;
    if constexpr (kParts > 1) {
      load_blocks(a, &s.part[part][row][offset]);
    } else {
      load_blocks(a, &s.x[stage][row][offset]);
    }
  }

  __device__ __forceinline__ void multiply(const Memory& s, int stage, int part, int k,
                                           const std::uint32_t (&b)[kWordTiles][2]) {
#pragma unroll
    for (int i = 0; i < kTiles; ++i) {
      if (first_row(i) >= rows_) continue;  // the same for the whole warp
      std::uint32_t a[4];
      load_a(a, s, stage, part, i, k);
#pragma unroll
      for (int j = 0; j < kWordTiles; ++j) mma_16<Element>(acc_[i][j], a, b[j][0], b[j][1]);
    }
  }

  // The signs of rows k and k + 1 of this lane's column in 8-column tile j, as a pair of ±1: the words were shifted so
  // that the column's bit leads byte j.
  __device__ __forceinline__ static std::uint32_t spread(std::uint32_t low, std::uint32_t high, int j) {
    return (__byte_perm(low, high, static_cast<unsigned>((4 + j) << 12 | j << 4)) & 0x80008000u) | kOnes<Element>;
  }

  __device__ __forceinline__ void multiply_signs(const Memory& s, int stage, std::int64_t c) {
    const int g = threadIdx.x % 32 / 4, t = threadIdx.x % 4;
    const int base = static_cast<int>(c % (kDrawn / kChunk)) * kChunk + 2 * t;
    const std::uint32_t* words = s.signs[c / (kDrawn / kChunk) % 2][warp_column_] + base;
#pragma unroll
    for (int k = 0; k < kChunk; k += 16) {
      const uint2 near = *reinterpret_cast<const uint2*>(words + k);
      const uint2 far = *reinterpret_cast<const uint2*>(words + k + 8);
      std::uint32_t b[kWordTiles][2];
#pragma unroll
      for (int j = 0; j < kWordTiles; ++j) {
        b[j][0] = spread(near.x << (7 - g), near.y << (7 - g), j);
        b[j][1] = spread(far.x << (7 - g), far.y << (7 - g), j);
      }
#pragma unroll
      for (int part = 0; part < kParts; ++part) multiply(s, stage, part, k, b);
    }
  }

  __device__ __forceinline__ void multiply_tile(const Memory& s, int stage, int tile_parts) {
    const int lane = threadIdx.x % 32;
#pragma unroll
    for (int k = 0; k < kChunk; k += 16)
#pragma unroll
      for (int p = 0; p < Format<T>::kDrawnParts; ++p) {
        if (p >= tile_parts) continue;
        std::uint32_t b[kWordTiles][2];
#pragma unroll
        for (int j = 0; j < kWordTiles; j += 2) {
          std::uint32_t r[4];
          load_blocks_transposed(r, &s.p[p][k + lane % 16][warp_column_ * 32 + j * 8 + lane / 16 * 8]);
          b[j][0] = r[0], b[j][1] = r[1], b[j + 1][0] = r[2], b[j + 1][1] = r[3];
        }
#pragma unroll
        for (int part = 0; part < kParts; ++part)
          if (part + p < 3) multiply(s, stage, part, k, b);
      }
  }
};

}  // namespace pyinf::projection
