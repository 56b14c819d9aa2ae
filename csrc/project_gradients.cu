// Launcher of project_gradients.
//
// gate: kernel=project_gradients_kernelI(6__half|13__nv_bfloat16)E tensor_cores=HMMA async_copies=LDGSTS
// gate: kernel=project_gradients_kernelI(6__half|13__nv_bfloat16)E dynamic_shared=71680
// gate: kernel=project_gradients_kernelIfE tensor_cores=HMMA async_copies=LDGSTS dynamic_shared=93696
// gate: kernel=finish_projection_kernel tensor_cores=none dynamic_shared=0
// gate: kernel=quantise_projection_kernel tensor_cores=none dynamic_shared=64
#include <cmath>
#include <limits>

#include "pyinf/device_guard.cuh"
#include "pyinf/dtype.h"
#include "pyinf/project_gradients.cuh"
#include "pyinf/project_gradients.h"
#include "pyinf/status.h"

namespace pyinf {
namespace {

using namespace project_gradients;

static_assert(sizeof(Memory<__half>) == 71680 && sizeof(Memory<__nv_bfloat16>) == 71680 &&
                  sizeof(Memory<float>) == 93696,
              "the gate lines above give other sizes");

std::int64_t pieces_of(std::int64_t rows, std::int64_t sequences) { return rows / kRows + sequences; }

template <typename T>
cudaError_t launch(Problem p, unsigned pieces, cudaStream_t stream) {
  constexpr std::int64_t kVector = 16 / sizeof(T);
  for (Side& side : p.side) {
    side.aligned = reinterpret_cast<std::uintptr_t>(side.x) % 16 == 0 && side.ld % kVector == 0;
    side.matrix.aligned =
        reinterpret_cast<std::uintptr_t>(side.matrix.given) % 16 == 0 && side.matrix.ld % kVector == 0;
  }
  return launch_kernel(project_gradients_kernel<T>, pieces, kThreads, sizeof(Memory<T>), stream, p);
}

}  // namespace

std::int64_t project_gradients_workspace(std::int64_t rows, std::int64_t sequences, std::int64_t k_g,
                                         std::int64_t k_a) {
  return pieces_of(rows, sequences) * k_g * k_a * static_cast<std::int64_t>(sizeof(float));
}

int launch_project_gradients(void* out, float* row_scale, const void* g, std::int64_t ld_g, const void* a,
                             std::int64_t ld_a, const std::int64_t* offsets, std::int64_t rows, std::int64_t sequences,
                             std::int64_t d_out, std::int64_t d_in, const void* p_g, std::int64_t ld_p_g,
                             const void* p_a, std::int64_t ld_p_a, std::int64_t k_g, std::int64_t k_a,
                             std::uint64_t seed, std::uint32_t stream_g, std::uint32_t stream_a, int distribution,
                             int epilogue, int dtype, void* workspace, std::int64_t workspace_bytes, int device,
                             void* stream) {
  if (rows < 0 || sequences < 0 || d_out < 0 || d_in < 0 || k_g < 1 || k_a < 1 || ld_g < d_out || ld_a < d_in)
    return kInvalidArgument;
  if ((p_g != nullptr && ld_p_g < k_g) || (p_a != nullptr && ld_p_a < k_a)) return kInvalidArgument;
  if (distribution != projection::kSigns && distribution != projection::kNormal) return kInvalidArgument;
  if (epilogue < kFloat || epilogue > kSign) return kInvalidArgument;
  if (dtype != kFloat32 && dtype != kFloat16 && dtype != kBFloat16) return kUnsupportedDtype;
  if (k_g > kLargest || k_a > kLargest) return kUnsupportedShape;
  if (sequences == 0) return kOk;
  if (out == nullptr || offsets == nullptr || (epilogue == kInt && row_scale == nullptr)) return kInvalidArgument;
  if (workspace == nullptr || workspace_bytes < project_gradients_workspace(rows, sequences, k_g, k_a))
    return kInvalidArgument;
  const std::int64_t pieces = pieces_of(rows, sequences);
  if (pieces > std::numeric_limits<int>::max() || sequences > 65535) return kUnsupportedShape;

  const DeviceGuard guard(device);
  if (guard.error() != cudaSuccess) return guard.error();
  const auto on = static_cast<cudaStream_t>(stream);
  const auto matrix = [&](const void* given, std::int64_t ld, std::uint32_t philox_stream) {
    return projection::Matrix{
        given != nullptr ? static_cast<int>(projection::kGiven) : distribution, philox_stream, seed, given, ld, false};
  };
  Problem p{};
  p.partials = static_cast<float*>(workspace);
  p.offsets = offsets;
  p.sequences = sequences;
  p.side[0] = {g, ld_g, d_out, static_cast<int>(k_g), false, matrix(p_g, ld_p_g, stream_g)};
  p.side[1] = {a, ld_a, d_in, static_cast<int>(k_a), false, matrix(p_a, ld_p_a, stream_a)};
  const auto blocks = static_cast<unsigned>(pieces);
  cudaError_t error = dtype == kFloat32   ? launch<float>(p, blocks, on)
                      : dtype == kFloat16 ? launch<__half>(p, blocks, on)
                                          : launch<__nv_bfloat16>(p, blocks, on);
  if (error != cudaSuccess) return error;
  const double drawn = (p_g == nullptr ? static_cast<double>(k_g) : 1.0) * (p_a == nullptr ? k_a : 1);
  const Finish finish{
      p.partials, offsets, out, row_scale, k_g * k_a, epilogue, static_cast<float>(1.0 / std::sqrt(drawn))};
  const dim3 grid(static_cast<unsigned>(ceil_div(finish.size, kFinished)), static_cast<unsigned>(sequences));
  error = launch_kernel(finish_projection_kernel, grid, kFinished, 0, on, finish);
  if (error != cudaSuccess || epilogue != kInt) return error;
  return launch_kernel(quantise_projection_kernel, static_cast<unsigned>(sequences), kQuantised,
                       kQuantised / 32 * sizeof(float), on, finish);
}

}  // namespace pyinf
