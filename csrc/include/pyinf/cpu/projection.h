// Random projections whose matrix is drawn while it is used.
#pragma once

#include <cstdint>

namespace pyinf::cpu {

// out[s] [batch, k] += x[:, slice s] · P[slice s, :] for each of `slices` equal slices of the d columns, P of ±1 from
// Philox (pyinf/ops/philox.py). The caller clears out [slices, batch, k], adds the slices in order and scales.
int random_projection(void* out, int acc_dtype, const void* x, std::int64_t x_row, std::int64_t x_column, int x_dtype,
                      std::int64_t batch, std::int64_t d, std::int64_t k, std::int64_t slices, std::uint64_t seed,
                      std::uint32_t stream, int threads, int isa);

// Signed buckets of `rows` coordinates from `first` on: bucket [rows, nnz] (int32) and sign [rows, nnz] (float ±1) are
// filled, then out[b][bucket] += sign · x[b][i], coordinates in rising order. out [batch, k] is contiguous.
int sparse_projection(void* out, int acc_dtype, const void* x, std::int64_t x_row, std::int64_t x_column, int x_dtype,
                      std::int64_t batch, std::int64_t d, std::int64_t k, std::int64_t nnz, std::uint64_t seed,
                      std::uint32_t stream, int threads, int isa);

}  // namespace pyinf::cpu
