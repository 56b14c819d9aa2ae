// Device code of project_gradients. A block takes up to 64 tokens of one sequence, projects g and then a (each read
// once; the projections stay in shared memory as float32), and contracts the two over the tokens into [k_g, k_a] on
// tensor cores, both sides cut into bfloat16 parts. The pieces of a sequence are added in order by a second kernel,
// which also scales and casts or packs; int8 needs the largest value of a sequence first, and so a third one.
#pragma once

#include "pyinf/launch.cuh"
#include "pyinf/projection_tile.cuh"

namespace pyinf::project_gradients {

using projection::kThreads;

constexpr int kRows = 64;      // tokens a block
constexpr int kLargest = 128;  // k of either side
constexpr int kStride = kLargest + 4;
constexpr int kFinished = 256;  // threads of the second kernel, one element each
constexpr int kQuantised = 512;

enum Epilogue : int { kFloat = 0, kBFloat = 1, kInt = 2, kSign = 3 };

template <typename T>
struct Memory {
  float left[kRows][kStride];
  union {
    projection::Shared<T, kRows> product;
    float right[kRows][kStride];
  };
};

struct Side {
  const void* x;
  std::int64_t ld, d;
  int k;
  bool aligned;
  projection::Matrix matrix;
};

struct Problem {
  float* partials;  // [pieces, k_g, k_a]
  const std::int64_t* offsets;
  std::int64_t sequences;
  Side side[2];  // g, a
};

// Two neighbouring tokens of one column, each cut into parts: an operand register a part.
template <int kParts>
__device__ __forceinline__ void cut_tokens(const float (*from)[kStride], int token, int column,
                                           std::uint32_t (&out)[kParts]) {
  __nv_bfloat16 low[kParts], high[kParts];
  projection::cut(from[token][column], low);
  projection::cut(from[token + 1][column], high);
#pragma unroll
  for (int p = 0; p < kParts; ++p) out[p] = projection::pair(low[p], high[p]);
}

// out [k_g, k_a] = leftᵀ · right.
template <int kParts>
__device__ __forceinline__ void contract(const float (*left)[kStride], const float (*right)[kStride], int k_g, int k_a,
                                         int tokens, float* out) {
  const int warp = threadIdx.x / 32, g = threadIdx.x % 32 / 4, t = threadIdx.x % 4;
  // Tiles are dealt out in turn, so that all warps have work when k is small.
  const int down = warp / 4 * 16, across = warp % 4 * 8;
  float acc[4][4][4] = {};
#pragma unroll 1
  for (int k = 0; k < tokens; k += 16) {
    std::uint32_t a[4][4][kParts];
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      if (down + i * 32 >= k_g) continue;
#pragma unroll
      for (int r = 0; r < 4; ++r) cut_tokens(left, k + 2 * t + r / 2 * 8, down + i * 32 + g + r % 2 * 8, a[i][r]);
    }
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      if (across + j * 32 >= k_a) continue;
      std::uint32_t b[2][kParts];
#pragma unroll
      for (int r = 0; r < 2; ++r) cut_tokens(right, k + 2 * t + r * 8, across + j * 32 + g, b[r]);
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        if (down + i * 32 >= k_g) continue;
#pragma unroll
        for (int p = kParts - 1; p >= 0; --p) {
          const std::uint32_t part[4] = {a[i][0][p], a[i][1][p], a[i][2][p], a[i][3][p]};
#pragma unroll
          for (int q = kParts - 1 - p; q >= 0; --q) mma_16<__nv_bfloat16>(acc[i][j], part, b[0][q], b[1][q]);
        }
      }
    }
  }
#pragma unroll
  for (int i = 0; i < 4; ++i)
#pragma unroll
    for (int j = 0; j < 4; ++j)
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        const int row = down + i * 32 + g + e / 2 * 8, column = across + j * 32 + 2 * t + e % 2;
        if (row < k_g && column < k_a) out[row * k_a + column] = acc[i][j][e];
      }
}

template <typename T>
__global__ __launch_bounds__(kThreads, 1) void project_gradients_kernel(Problem p) {
  PYINF_SHARED_MEMORY(shared);
  Memory<T>& memory = *reinterpret_cast<Memory<T>*>(shared);
  const Piece piece = find_piece(p.offsets, p.sequences, blockIdx.x, kRows);
  if (piece.count == 0) return;
#pragma unroll 1
  for (int n = 0; n < 2; ++n) {
    const Side& side = p.side[n];
    projection::Product<T, kRows, true> tile(static_cast<int>(piece.count), side.k);
    tile.run(memory.product, static_cast<const T*>(side.x) + piece.row * side.ld, side.ld, side.aligned, 0, side.d,
             side.matrix, 0);
    tile.store(n == 0 ? memory.left : memory.right);
  }
  __syncthreads();
  const int k_g = p.side[0].k, k_a = p.side[1].k;
  contract<sizeof(T) == 2 ? 2 : 3>(memory.left, memory.right, k_g, k_a, static_cast<int>(piece.count),
                                   p.partials + static_cast<std::int64_t>(blockIdx.x) * k_g * k_a);
}

struct Finish {
  float* partials;
  const std::int64_t* offsets;
  void* out;
  float* row_scale;   // of int8
  std::int64_t size;  // k_g · k_a
  int epilogue;
  float scale;
};

// Grid: blocks of elements, sequences. For int8 the sums go into the place of the sequence's first piece.
static __global__ __launch_bounds__(kFinished) void finish_projection_kernel(Finish p) {
  const std::int64_t b = blockIdx.y, index = static_cast<std::int64_t>(blockIdx.x) * kFinished + threadIdx.x;
  const std::int64_t first = first_piece(p.offsets, b, kRows);
  const std::int64_t pieces = ceil_div(p.offsets[b + 1] - p.offsets[b], kRows);
  float sum = 0.0f;
  if (index < p.size) {
#pragma unroll 4
    for (std::int64_t c = 0; c < pieces; ++c) sum += p.partials[(first + c) * p.size + index];
  }
  sum *= p.scale;
  if (p.epilogue == kSign) {
    const unsigned bits = __ballot_sync(0xFFFFFFFFu, index < p.size && sum < 0.0f);
    if (threadIdx.x % 8 == 0 && index < p.size)
      static_cast<std::uint8_t*>(p.out)[b * ceil_div(p.size, 8) + index / 8] =
          static_cast<std::uint8_t>(bits >> threadIdx.x % 32);
    return;
  }
  if (index >= p.size) return;
  if (p.epilogue == kFloat) static_cast<float*>(p.out)[b * p.size + index] = sum;
  if (p.epilogue == kBFloat) static_cast<__nv_bfloat16*>(p.out)[b * p.size + index] = __nv_bfloat16(sum);
  if (p.epilogue == kInt) p.partials[first * p.size + index] = sum;
}

// The greater, where what is not a number is greater than all.
__device__ __forceinline__ float greater(float x, float y) { return y > x || y != y ? y : x; }

// One block a sequence: the largest absolute value is 127.
static __global__ __launch_bounds__(kQuantised) void quantise_projection_kernel(Finish p) {
  PYINF_SHARED_MEMORY(shared);
  float* largest = reinterpret_cast<float*>(shared);
  const std::int64_t b = blockIdx.x;
  const float* sums = p.partials + first_piece(p.offsets, b, kRows) * p.size;
  float most = 0.0f;
  for (std::int64_t i = threadIdx.x; i < p.size; i += kQuantised) most = greater(most, fabsf(sums[i]));
  for (int step = 16; step > 0; step /= 2) most = greater(most, __shfl_xor_sync(0xFFFFFFFFu, most, step));
  if (threadIdx.x % 32 == 0) largest[threadIdx.x / 32] = most;
  __syncthreads();
  for (int w = 0; w < kQuantised / 32; ++w) most = greater(most, largest[w]);
  const float scale = most / 127.0f, inverse = scale > 0.0f ? 1.0f / scale : 0.0f;
  for (std::int64_t i = threadIdx.x; i < p.size; i += kQuantised) {
    const float value = rintf(sums[i] * inverse);
    const float clamped = value > 127.0f ? 127.0f : value < -127.0f ? -127.0f : value == value ? value : 0.0f;
    static_cast<std::int8_t*>(p.out)[b * p.size + i] = static_cast<std::int8_t>(clamped);
  }
  if (threadIdx.x == 0) p.row_scale[b] = scale;
}

}  // namespace pyinf::project_gradients
