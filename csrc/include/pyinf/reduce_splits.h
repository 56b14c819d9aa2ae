// out = scale · Σ_s partials[s], the splits added in order.
#pragma once

#include <cstdint>

namespace pyinf {

// out: float32 [rows, columns], row stride ld_out; partials: float32 [splits, rows, columns]. Of the current device.
int launch_reduce_splits(float* out, std::int64_t ld_out, const float* partials, std::int64_t splits, std::int64_t rows,
                         std::int64_t columns, float scale, void* stream);

}  // namespace pyinf
