// The generic instance and the choice between the instances of projection_impl.h.
#define PYINF_VECTOR_BYTES 16
#define PYINF_ISA_NAME generic
#include "pyinf/cpu/projection_impl.h"
#include "pyinf/cpu/select.h"

namespace pyinf::cpu {

#define PYINF_DECLARE(suffix)                                                                                          \
  int random_projection_##suffix(void*, int, const void*, std::int64_t, std::int64_t, int, std::int64_t, std::int64_t, \
                                 std::int64_t, std::int64_t, std::uint64_t, std::uint32_t, int);                       \
  int sparse_projection_##suffix(void*, int, const void*, std::int64_t, std::int64_t, int, std::int64_t, std::int64_t, \
                                 std::int64_t, std::int64_t, std::uint64_t, std::uint32_t, int)
PYINF_DECLARE(avx2);
PYINF_DECLARE(avx512);

int random_projection(void* out, int acc_dtype, const void* x, std::int64_t x_row, std::int64_t x_column, int x_dtype,
                      std::int64_t batch, std::int64_t d, std::int64_t k, std::int64_t slices, std::uint64_t seed,
                      std::uint32_t stream, int threads, int isa) {
  if (batch < 0 || d < 0 || k < 1 || slices < 1 || threads < 1) return kInvalidArgument;
  if (batch == 0 || d == 0) return kOk;
  return PYINF_SELECT(isa, random_projection_, out, acc_dtype, x, x_row, x_column, x_dtype, batch, d, k, slices, seed,
                      stream, threads);
}

int sparse_projection(void* out, int acc_dtype, const void* x, std::int64_t x_row, std::int64_t x_column, int x_dtype,
                      std::int64_t batch, std::int64_t d, std::int64_t k, std::int64_t nnz, std::uint64_t seed,
                      std::uint32_t stream, int threads, int isa) {
  if (batch < 0 || d < 0 || k < 1 || nnz < 1 || threads < 1) return kInvalidArgument;
  return PYINF_SELECT(isa, sparse_projection_, out, acc_dtype, x, x_row, x_column, x_dtype, batch, d, k, nnz, seed,
                      stream, threads);
}

}  // namespace pyinf::cpu
