// Partial results added in a fixed order.
#pragma once

#include <cstdint>

namespace pyinf::reduction {

constexpr int kThreads = 256;

struct Problem {
  float* out;             // [rows, ld_out]
  const float* partials;  // [splits, rows, columns]
  std::int64_t ld_out, splits, rows, columns;
  float scale;
};

// Element `index` of the result.
__device__ __forceinline__ void reduce_one(const Problem& p, std::int64_t index) {
  float sum = 0.0f;
#pragma unroll 4
  for (std::int64_t s = 0; s < p.splits; ++s) sum += p.partials[s * p.rows * p.columns + index];
  p.out[index / p.columns * p.ld_out + index % p.columns] = sum * p.scale;
}

static __global__ __launch_bounds__(kThreads) void reduce_splits_kernel(Problem p) {
  for (std::int64_t i = static_cast<std::int64_t>(blockIdx.x) * kThreads + threadIdx.x; i < p.rows * p.columns;
       i += static_cast<std::int64_t>(gridDim.x) * kThreads)
    reduce_one(p, i);
}

}  // namespace pyinf::reduction
