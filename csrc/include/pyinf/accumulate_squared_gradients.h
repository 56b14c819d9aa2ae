// Λ[d_out, d_in] += Σ_b (g_bᵀ a_b)², squared elementwise: EK-FAC's corrected eigenvalues, without the per-sequence
// gradients ever leaving the registers.
#pragma once

#include <cstdint>

namespace pyinf {

// lam:      float32 [d_out, d_in], row stride ld_lam
// g, a:     [N, d_out] and [N, d_in] of `dtype` (float32, float16, bfloat16), row strides ld_g, ld_a, inner stride 1
// offsets:  int64 [sequences + 1] on the device; sequence b is rows offsets[b] .. offsets[b + 1], and may be empty
// stream:   a cudaStream_t of `device`
// All strides in elements. Every product is accumulated in float32; float32 inputs use no tensor cores (no tf32).
// The result does not depend on the order in which blocks run. Returns 0, a Status, or a cudaError_t.
int launch_accumulate_squared_gradients(float* lam, std::int64_t ld_lam, const void* g, std::int64_t ld_g,
                                        const void* a, std::int64_t ld_a, const std::int64_t* offsets,
                                        std::int64_t sequences, std::int64_t d_out, std::int64_t d_in, int dtype,
                                        int device, void* stream);

}  // namespace pyinf
