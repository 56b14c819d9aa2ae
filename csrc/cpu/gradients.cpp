// The generic instance and the choice between the instances of gradients_impl.h.
#define PYINF_VECTOR_BYTES 16
#define PYINF_ISA_NAME generic
#include "pyinf/cpu/gradients_impl.h"
#include "pyinf/cpu/select.h"

namespace pyinf::cpu {

int squared_gradients_avx2(void*, std::int64_t, int, const GradientInputs&, int);
int squared_gradients_avx512(void*, std::int64_t, int, const GradientInputs&, int);

int accumulate_squared_gradients(void* lam, std::int64_t ld, int acc_dtype, const void* g, std::int64_t g_row,
                                 std::int64_t g_column, int g_dtype, const void* a, std::int64_t a_row,
                                 std::int64_t a_column, int a_dtype, const std::int64_t* offsets, std::int64_t count,
                                 std::int64_t d_out, std::int64_t d_in, int threads, int isa) {
  if (count < 0 || d_out < 0 || d_in < 0 || threads < 1) return kInvalidArgument;
  if (count == 0 || d_out == 0 || d_in == 0) return kOk;
  const GradientInputs in{g, g_row, g_column, g_dtype, a, a_row, a_column, a_dtype, offsets, count, d_out, d_in};
  return PYINF_SELECT(isa, squared_gradients_, lam, ld, acc_dtype, in, threads);
}

}  // namespace pyinf::cpu
