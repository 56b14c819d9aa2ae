// Launcher of random_projection.
//
// gate: kernel=random_projection_kernelI6__half tensor_cores=HMMA async_copies=LDGSTS dynamic_shared=58368
// gate: kernel=random_projection_kernelI13__nv_bfloat16 tensor_cores=HMMA async_copies=LDGSTS dynamic_shared=58368
// gate: kernel=random_projection_kernelIf tensor_cores=HMMA async_copies=LDGSTS dynamic_shared=93696
#include <algorithm>
#include <cmath>
#include <limits>

#include "pyinf/device_guard.cuh"
#include "pyinf/dtype.h"
#include "pyinf/launch.cuh"
#include "pyinf/random_projection.cuh"
#include "pyinf/random_projection.h"
#include "pyinf/reduce_splits.h"
#include "pyinf/status.h"

namespace pyinf {
namespace {

using projection::kColumns;
using projection::kDrawn;
using projection::kThreads;
using random_projection::kRows;
using random_projection::Problem;
using random_projection::random_projection_kernel;

template <typename T>
using Memory = projection::Shared<T, kRows>;

static_assert(sizeof(Memory<__half>) == 58368 && sizeof(Memory<__nv_bfloat16>) == 58368 &&
                  sizeof(Memory<float>) == 93696,
              "the gate lines above give other sizes");

std::int64_t tiles(std::int64_t batch, std::int64_t k) { return ceil_div(batch, kRows) * ceil_div(k, kColumns); }

// Two blocks for every multiprocessor of the largest cards, and slices worth starting a block for.
std::int64_t slice_of(std::int64_t batch, std::int64_t d, std::int64_t k) {
  constexpr std::int64_t kBlocks = 264, kShortest = 2048;
  const std::int64_t wanted = ceil_div(kBlocks, std::max<std::int64_t>(1, tiles(batch, k)));
  const std::int64_t splits = std::max<std::int64_t>(1, std::min(wanted, ceil_div(d, kShortest)));
  return std::max<std::int64_t>(1, ceil_div(ceil_div(d, splits), kDrawn)) * kDrawn;
}

template <typename T>
cudaError_t launch(Problem p, dim3 grid, cudaStream_t stream) {
  p.aligned = reinterpret_cast<std::uintptr_t>(p.x) % 16 == 0 && p.ld_x % (16 / sizeof(T)) == 0;
  return launch_kernel(random_projection_kernel<T>, grid, kThreads, sizeof(Memory<T>), stream, p);
}

}  // namespace

std::int64_t random_projection_workspace(std::int64_t batch, std::int64_t d, std::int64_t k) {
  if (batch <= 0 || d <= 0 || k <= 0) return 0;
  const std::int64_t splits = ceil_div(d, slice_of(batch, d, k));
  return splits > 1 ? splits * batch * k * static_cast<std::int64_t>(sizeof(float)) : 0;
}

int launch_random_projection(float* out, std::int64_t ld_out, const void* x, std::int64_t ld_x, std::int64_t batch,
                             std::int64_t d, std::int64_t k, std::uint64_t seed, std::uint32_t philox_stream,
                             int distribution, int dtype, void* workspace, std::int64_t workspace_bytes, int device,
                             void* stream) {
  if (batch < 0 || d < 0 || k < 1 || ld_out < k || (batch > 1 && ld_x < d)) return kInvalidArgument;
  if (distribution != projection::kSigns && distribution != projection::kNormal) return kInvalidArgument;
  if (dtype != kFloat32 && dtype != kFloat16 && dtype != kBFloat16) return kUnsupportedDtype;
  if (batch == 0) return kOk;
  if (out == nullptr || (d > 0 && x == nullptr)) return kInvalidArgument;
  if (workspace_bytes < random_projection_workspace(batch, d, k)) return kInvalidArgument;
  if (tiles(batch, k) > std::numeric_limits<int>::max()) return kUnsupportedShape;
  // Column blocks are counted in 32 bits by the generator.
  if (k >= std::int64_t{1} << 32) return kUnsupportedShape;

  const DeviceGuard guard(device);
  if (guard.error() != cudaSuccess) return guard.error();
  const float scale = static_cast<float>(1.0 / std::sqrt(static_cast<double>(k)));
  const std::int64_t slice = slice_of(batch, d, k), splits = std::max<std::int64_t>(1, ceil_div(d, slice));
  Problem p{};
  p.out = splits > 1 ? static_cast<float*>(workspace) : out;
  p.ld_out = splits > 1 ? k : ld_out;
  p.scale = splits > 1 ? 1.0f : scale;
  p.x = x;
  p.ld_x = ld_x;
  p.batch = batch;
  p.d = d;
  p.k = k;
  p.slice = slice;
  p.matrix = {distribution, philox_stream, seed, nullptr, 0, false};
  const dim3 grid(static_cast<unsigned>(tiles(batch, k)), static_cast<unsigned>(splits));
  const auto on = static_cast<cudaStream_t>(stream);
  const cudaError_t error = dtype == kFloat32   ? launch<float>(p, grid, on)
                            : dtype == kFloat16 ? launch<__half>(p, grid, on)
                                                : launch<__nv_bfloat16>(p, grid, on);
  if (error != cudaSuccess || splits == 1) return error;
  return launch_reduce_splits(out, ld_out, p.out, splits, batch, k, scale, stream);
}

}  // namespace pyinf
