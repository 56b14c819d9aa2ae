// out[batch, k] = x S / √nnz with nnz signed ones in every row of S [d, k], drawn from Philox (pyinf/ops/philox.py):
// the sparse Johnson–Lindenstrauss transform, of rows or of gradients that are given by their factors.
#pragma once

#include <cstdint>

namespace pyinf {

// Bytes of workspace of either launcher: a function of the sizes alone. With factors: d = d_out · d_in, batch =
// sequences.
std::int64_t sparse_projection_workspace(std::int64_t batch, std::int64_t d, std::int64_t k);
std::int64_t sparse_projection_factors_workspace(std::int64_t sequences, std::int64_t d_out, std::int64_t d_in,
                                                 std::int64_t k);

// out:       float32 [batch, k], row stride ld_out
// x:         [batch, d] of `dtype` (float32, float16, bfloat16), row stride ld_x, inner stride 1
// workspace: sparse_projection_workspace(...) bytes on the device; may be null when that is 0
// stream:    a cudaStream_t of `device`
// Summed in float32 in a fixed order. Returns 0, a Status, or a cudaError_t.
int launch_sparse_projection(float* out, std::int64_t ld_out, const void* x, std::int64_t ld_x, std::int64_t batch,
                             std::int64_t d, std::int64_t k, std::int64_t nnz, std::uint64_t seed,
                             std::uint32_t philox_stream, int dtype, void* workspace, std::int64_t workspace_bytes,
                             int device, void* stream);

// The same for x_b = vec(Σ_t g_t a_tᵀ), coordinate o · d_in + i; the gradients are formed a 64 × 64 tile at a time.
// g, a:    [N, d_out] and [N, d_in] of `dtype`, row strides ld_g, ld_a, inner stride 1
// offsets: int64 [sequences + 1] on the device; sequence b is rows offsets[b] .. offsets[b + 1]
int launch_sparse_projection_factors(float* out, std::int64_t ld_out, const void* g, std::int64_t ld_g, const void* a,
                                     std::int64_t ld_a, const std::int64_t* offsets, std::int64_t sequences,
                                     std::int64_t d_out, std::int64_t d_in, std::int64_t k, std::int64_t nnz,
                                     std::uint64_t seed, std::uint32_t philox_stream, int dtype, void* workspace,
                                     std::int64_t workspace_bytes, int device, void* stream);

}  // namespace pyinf
