// Device code of random_projection. One block owns 128 rows × 128 columns of the result over a slice of the input's
// coordinates: every Philox call is used for 128 rows. Partial results of the slices are added in order by
// reduce_splits.
#pragma once

#include "pyinf/launch.cuh"
#include "pyinf/projection_tile.cuh"

namespace pyinf::random_projection {

constexpr int kRows = 128;

struct Problem {
  float* out;  // [splits, batch, ld_out]
  const void* x;
  std::int64_t ld_out, ld_x, batch, d, k, slice;  // slice: a multiple of kDrawn, so that stages stay aligned
  float scale;
  bool aligned;
  projection::Matrix matrix;
};

template <typename T>
__global__ __launch_bounds__(projection::kThreads) void random_projection_kernel(Problem p) {
  PYINF_SHARED_MEMORY(shared);
  using Tile = projection::Product<T, kRows, false>;
  auto& memory = *reinterpret_cast<typename Tile::Memory*>(shared);
  // Columns first: blocks that run at the same time read the same rows of x.
  const std::int64_t across = ceil_div(p.k, projection::kColumns);
  const std::int64_t row = blockIdx.x / across * kRows, j0 = blockIdx.x % across * projection::kColumns;
  const std::int64_t first = blockIdx.y * p.slice;
  const std::int64_t last = first + p.slice < p.d ? first + p.slice : p.d;
  const std::int64_t rows = p.batch - row < kRows ? p.batch - row : kRows;
  const std::int64_t columns = p.k - j0 < projection::kColumns ? p.k - j0 : projection::kColumns;
  Tile tile(static_cast<int>(rows), static_cast<int>(columns));
  tile.run(memory, static_cast<const T*>(p.x) + row * p.ld_x, p.ld_x, p.aligned, first, last, p.matrix, j0);
  float* out = p.out + (blockIdx.y * p.batch + row) * p.ld_out + j0;
  tile.each([&](int r, int c, float value) { out[r * p.ld_out + c] = value * p.scale; });
}

}  // namespace pyinf::random_projection
