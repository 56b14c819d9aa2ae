// Launchers of sparse_projection and sparse_projection_factors.
//
// gate: kernel=sparse_projection_kernelI.*Lb0E tensor_cores=none dynamic_shared=90112
// gate: kernel=sparse_projection_kernelI(6__half|13__nv_bfloat16)Lb1E tensor_cores=HMMA dynamic_shared=99328
// gate: kernel=sparse_projection_kernelIfLb1E tensor_cores=none dynamic_shared=98816
#include <algorithm>
#include <cmath>
#include <limits>

#include "pyinf/device_guard.cuh"
#include "pyinf/dtype.h"
#include "pyinf/launch.cuh"
#include "pyinf/reduce_splits.h"
#include "pyinf/sparse_projection.cuh"
#include "pyinf/sparse_projection.h"
#include "pyinf/status.h"

namespace pyinf {
namespace {

using namespace sparse_projection;

static_assert(sizeof(Memory) == 90112 && sizeof(FactorMemory<__half>) == 99328 &&
                  sizeof(FactorMemory<__nv_bfloat16>) == 99328 && sizeof(FactorMemory<float>) == 98816,
              "the gate lines above give other sizes");

std::int64_t bucket_groups(std::int64_t k) { return ceil_div(k, kChains / pieces_of(k)); }

// Two blocks for every multiprocessor of the largest cards.
std::int64_t slices_per_split(std::int64_t rows, std::int64_t slices, std::int64_t k) {
  const std::int64_t blocks = ceil_div(rows, kRows<float>) * bucket_groups(k);  // of 16-bit inputs half as many
  const std::int64_t wanted = ceil_div(264, std::max<std::int64_t>(1, blocks));
  return std::max<std::int64_t>(1, ceil_div(slices, wanted));
}

std::int64_t workspace_of(std::int64_t rows, std::int64_t slices, std::int64_t k) {
  if (rows <= 0 || slices <= 0 || k <= 0) return 0;
  const std::int64_t splits = ceil_div(slices, slices_per_split(rows, slices, k));
  return splits > 1 ? splits * rows * k * static_cast<std::int64_t>(sizeof(float)) : 0;
}

std::int64_t factor_slices(std::int64_t d_out, std::int64_t d_in) {
  return ceil_div(d_out, kSide) * ceil_div(d_in, kSide);
}

template <typename T, bool kFactors>
cudaError_t launch(const Problem& p, std::int64_t splits, cudaStream_t stream) {
  const dim3 grid(static_cast<unsigned>(ceil_div(p.rows, kRows<Held<T, kFactors>>)),
                  static_cast<unsigned>(bucket_groups(p.k)), static_cast<unsigned>(splits));
  const std::size_t shared = kFactors ? sizeof(FactorMemory<T>) : sizeof(Memory);
  return launch_kernel(sparse_projection_kernel<T, kFactors>, grid, kThreads, shared, stream, p);
}

template <bool kFactors>
int launch(Problem p, float* out, std::int64_t ld_out, std::int64_t slices, int dtype, void* workspace,
           std::int64_t workspace_bytes, int device, void* stream) {
  if (p.rows < 0 || p.d < 0 || p.k < 1 || p.nnz < 1 || ld_out < p.k) return kInvalidArgument;
  if (dtype != kFloat32 && dtype != kFloat16 && dtype != kBFloat16) return kUnsupportedDtype;
  if (p.rows == 0) return kOk;
  if (out == nullptr || (!kFactors && slices > 0 && p.x == nullptr)) return kInvalidArgument;
  if (workspace_bytes < workspace_of(p.rows, slices, p.k)) return kInvalidArgument;
  if (p.k > std::numeric_limits<std::uint32_t>::max() || p.nnz > std::numeric_limits<std::uint32_t>::max() ||
      ceil_div(p.rows, kRows<float>) > std::numeric_limits<int>::max() || bucket_groups(p.k) > 65535)
    return kUnsupportedShape;

  const DeviceGuard guard(device);
  if (guard.error() != cudaSuccess) return guard.error();
  const float scale = static_cast<float>(1.0 / std::sqrt(static_cast<double>(p.nnz)));
  p.slices_per_split = slices_per_split(p.rows, slices, p.k);
  const std::int64_t splits = std::max<std::int64_t>(1, ceil_div(slices, p.slices_per_split));
  p.pieces = pieces_of(p.k);
  p.out = splits > 1 ? static_cast<float*>(workspace) : out;
  p.ld_out = splits > 1 ? p.k : ld_out;
  p.scale = splits > 1 ? 1.0f : scale;
  const std::uintptr_t wide = dtype == kFloat32 ? 8 : 4;
  p.pairs = reinterpret_cast<std::uintptr_t>(p.x) % wide == 0 && p.ld_x % 2 == 0;
  const auto on = static_cast<cudaStream_t>(stream);
  const cudaError_t error = dtype == kFloat32   ? launch<float, kFactors>(p, splits, on)
                            : dtype == kFloat16 ? launch<__half, kFactors>(p, splits, on)
                                                : launch<__nv_bfloat16, kFactors>(p, splits, on);
  if (error != cudaSuccess || splits == 1) return error;
  return launch_reduce_splits(out, ld_out, p.out, splits, p.rows, p.k, scale, stream);
}

}  // namespace

std::int64_t sparse_projection_workspace(std::int64_t batch, std::int64_t d, std::int64_t k) {
  return workspace_of(batch, ceil_div(d, kSlice), k);
}

std::int64_t sparse_projection_factors_workspace(std::int64_t sequences, std::int64_t d_out, std::int64_t d_in,
                                                 std::int64_t k) {
  return workspace_of(sequences, factor_slices(d_out, d_in), k);
}

int launch_sparse_projection(float* out, std::int64_t ld_out, const void* x, std::int64_t ld_x, std::int64_t batch,
                             std::int64_t d, std::int64_t k, std::int64_t nnz, std::uint64_t seed,
                             std::uint32_t philox_stream, int dtype, void* workspace, std::int64_t workspace_bytes,
                             int device, void* stream) {
  if (batch > 1 && ld_x < d) return kInvalidArgument;
  Problem p{};
  p.x = x;
  p.ld_x = ld_x;
  p.rows = batch;
  p.d = d;
  p.d_in = 1;
  p.k = k;
  p.nnz = nnz;
  p.seed = seed;
  p.stream = philox_stream;
  return launch<false>(p, out, ld_out, ceil_div(d, kSlice), dtype, workspace, workspace_bytes, device, stream);
}

int launch_sparse_projection_factors(float* out, std::int64_t ld_out, const void* g, std::int64_t ld_g, const void* a,
                                     std::int64_t ld_a, const std::int64_t* offsets, std::int64_t sequences,
                                     std::int64_t d_out, std::int64_t d_in, std::int64_t k, std::int64_t nnz,
                                     std::uint64_t seed, std::uint32_t philox_stream, int dtype, void* workspace,
                                     std::int64_t workspace_bytes, int device, void* stream) {
  if (d_out < 0 || d_in < 0 || ld_g < d_out || ld_a < d_in) return kInvalidArgument;
  if (sequences > 0 && offsets == nullptr) return kInvalidArgument;
  Problem p{};
  p.x = g;
  p.a = a;
  p.offsets = offsets;
  p.ld_x = ld_g;
  p.ld_a = ld_a;
  p.rows = sequences;
  p.d = d_out * d_in;
  p.d_in = std::max<std::int64_t>(1, d_in);
  p.k = k;
  p.nnz = nnz;
  p.seed = seed;
  p.stream = philox_stream;
  return launch<true>(p, out, ld_out, factor_slices(d_out, d_in), dtype, workspace, workspace_bytes, device, stream);
}

}  // namespace pyinf
