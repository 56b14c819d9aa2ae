// out[batch, k] = x P / √k with P [d, k] of ±1 or standard normal elements that are drawn from Philox and never stored
// (pyinf/ops/philox.py says which counter holds which element).
#pragma once

#include <cstdint>

namespace pyinf {

// Bytes of workspace that the launcher needs: a function of the sizes alone, so that the result is too.
std::int64_t random_projection_workspace(std::int64_t batch, std::int64_t d, std::int64_t k);

// out:          float32 [batch, k], row stride ld_out
// x:            [batch, d] of `dtype` (float32, float16, bfloat16), row stride ld_x, inner stride 1
// workspace:    random_projection_workspace(...) bytes on the device; may be null when that is 0
// distribution: 0 signs, 1 normal
// stream:       a cudaStream_t of `device`
// Accumulated in float32; float32 inputs keep all 24 bits. The same bits twice. Returns 0, a Status, or a cudaError_t.
int launch_random_projection(float* out, std::int64_t ld_out, const void* x, std::int64_t ld_x, std::int64_t batch,
                             std::int64_t d, std::int64_t k, std::uint64_t seed, std::uint32_t philox_stream,
                             int distribution, int dtype, void* workspace, std::int64_t workspace_bytes, int device,
                             void* stream);

}  // namespace pyinf
