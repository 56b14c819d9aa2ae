// P_gᵀ (Σ_t g_t a_tᵀ) P_a of every sequence (LoGra), the matrices given or drawn from Philox, k up to 128 on either
// side.
#pragma once

#include <cstdint>

namespace pyinf {

// Bytes of workspace that the launcher needs: a function of the sizes alone.
std::int64_t project_gradients_workspace(std::int64_t rows, std::int64_t sequences, std::int64_t k_g, std::int64_t k_a);

// out:          [sequences, k_g, k_a] contiguous: float32 (epilogue 0), bfloat16 (1), int8 (2), or the sign bits of
// each
//               sequence's values, uint8 [sequences, ceil(k_g · k_a / 8)] (3)
// row_scale:    float32 [sequences] with values ≈ scale · int8 (epilogue 2; null otherwise)
// g, a:         [rows, d_out] and [rows, d_in] of `dtype` (float32, float16, bfloat16), row strides ld_g, ld_a
// offsets:      int64 [sequences + 1] on the device, from 0 to `rows`
// p_g, p_a:     [d_out, k_g] and [d_in, k_a] of `dtype`, row strides ld_p_g, ld_p_a; null: drawn, times 1/√k
// distribution: of drawn sides, 0 signs, 1 normal; stream_g, stream_a: their Philox streams
// workspace:    project_gradients_workspace(...) bytes on the device
// stream:       a cudaStream_t of `device`. All inner strides are 1.
// Accumulated in float32. The same bits twice. Returns 0, a Status, or a cudaError_t.
int launch_project_gradients(void* out, float* row_scale, const void* g, std::int64_t ld_g, const void* a,
                             std::int64_t ld_a, const std::int64_t* offsets, std::int64_t rows, std::int64_t sequences,
                             std::int64_t d_out, std::int64_t d_in, const void* p_g, std::int64_t ld_p_g,
                             const void* p_a, std::int64_t ld_p_a, std::int64_t k_g, std::int64_t k_a,
                             std::uint64_t seed, std::uint32_t stream_g, std::uint32_t stream_a, int distribution,
                             int epilogue, int dtype, void* workspace, std::int64_t workspace_bytes, int device,
                             void* stream);

}  // namespace pyinf
