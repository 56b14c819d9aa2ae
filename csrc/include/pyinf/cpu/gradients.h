// Kernels on per-sequence gradients G_b = Σ_t g_t a_tᵀ, which are never written out whole.
// Rows of g [N, d_out] and a [N, d_in] may have any strides (in elements); dtypes are pyinf::Dtype.
#pragma once

#include <cstdint>

namespace pyinf::cpu {

struct GradientInputs {
  const void* g;
  std::int64_t g_row, g_column;
  int g_dtype;
  const void* a;
  std::int64_t a_row, a_column;
  int a_dtype;
  const std::int64_t* offsets;  // count + 1
  std::int64_t count, d_out, d_in;
};

// lam [d_out, d_in] (rows ld apart) += Σ_b G_b², elementwise. acc_dtype (float32 or float64) is lam's.
int accumulate_squared_gradients(void* lam, std::int64_t ld, int acc_dtype, const void* g, std::int64_t g_row,
                                 std::int64_t g_column, int g_dtype, const void* a, std::int64_t a_row,
                                 std::int64_t a_column, int a_dtype, const std::int64_t* offsets, std::int64_t count,
                                 std::int64_t d_out, std::int64_t d_in, int threads, int isa);

}  // namespace pyinf::cpu
