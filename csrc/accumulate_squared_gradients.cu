// Launcher of accumulate_squared_gradients. The "gate" lines say what the machine code must hold; tests/build checks
// it.
//
// gate: kernel=accumulate_squared_gradients_kernelI6__half.* tensor_cores=HMMA dynamic_shared=69632
// gate: kernel=accumulate_squared_gradients_kernelI13__nv_bfloat16.* tensor_cores=HMMA dynamic_shared=69632
// gate: kernel=accumulate_squared_gradients_kernelIf.* tensor_cores=none dynamic_shared=67584
// gate: kernel=accumulate_squared_gradients_kernelI.*Lb1E.* async_copies=LDGSTS
#include <limits>

#include "pyinf/accumulate_squared_gradients.cuh"
#include "pyinf/accumulate_squared_gradients.h"
#include "pyinf/device_guard.cuh"
#include "pyinf/dtype.h"
#include "pyinf/status.h"

namespace pyinf {
namespace {

using squared_gradients::accumulate_squared_gradients_kernel;
using squared_gradients::kThreads;
using squared_gradients::kTile;
using squared_gradients::Problem;
using squared_gradients::Ring;

static_assert(sizeof(Ring<__half>) == 69632 && sizeof(Ring<__nv_bfloat16>) == 69632 && sizeof(Ring<float>) == 67584,
              "the gate lines above give other sizes");

template <typename T>
bool whole_vectors(const void* pointer, std::int64_t stride, std::int64_t width) {
  return reinterpret_cast<std::uintptr_t>(pointer) % 16 == 0 && stride % Ring<T>::kVector == 0 &&
         width % Ring<T>::kVector == 0;
}

template <typename T, bool kVectorised>
cudaError_t launch(const Problem& problem, unsigned blocks, cudaStream_t stream) {
  const auto kernel = accumulate_squared_gradients_kernel<T, kVectorised>;
  // Per device, so it is set at every launch: it costs well under a microsecond and a cache of it would need a lock.
  const cudaError_t error =
      cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(sizeof(Ring<T>)));
  if (error != cudaSuccess) return error;
  kernel<<<blocks, kThreads, sizeof(Ring<T>), stream>>>(problem);
  return cudaGetLastError();
}

template <typename T>
cudaError_t launch(const Problem& p, unsigned blocks, cudaStream_t stream) {
  const bool vectorised = whole_vectors<T>(p.g, p.ld_g, p.d_out) && whole_vectors<T>(p.a, p.ld_a, p.d_in);
  return vectorised ? launch<T, true>(p, blocks, stream) : launch<T, false>(p, blocks, stream);
}

}  // namespace

int launch_accumulate_squared_gradients(float* lam, std::int64_t ld_lam, const void* g, std::int64_t ld_g,
                                        const void* a, std::int64_t ld_a, const std::int64_t* offsets,
                                        std::int64_t sequences, std::int64_t d_out, std::int64_t d_in, int dtype,
                                        int device, void* stream) {
  if (sequences < 0 || d_out < 0 || d_in < 0 || ld_lam < d_in || ld_g < d_out || ld_a < d_in) return kInvalidArgument;
  if (dtype != kFloat32 && dtype != kFloat16 && dtype != kBFloat16) return kUnsupportedDtype;
  const std::int64_t blocks = ceil_div(d_out, kTile) * ceil_div(d_in, kTile);
  if (sequences == 0 || blocks == 0) return kOk;
  if (lam == nullptr || offsets == nullptr) return kInvalidArgument;
  if (blocks > std::numeric_limits<int>::max()) return kUnsupportedShape;

  const DeviceGuard guard(device);
  if (guard.error() != cudaSuccess) return guard.error();
  const Problem problem{lam, g, a, offsets, ld_lam, ld_g, ld_a, sequences, d_out, d_in};
  const auto grid = static_cast<unsigned>(blocks);
  const auto on = static_cast<cudaStream_t>(stream);
  switch (dtype) {
    case kFloat32:
      return launch<float>(problem, grid, on);
    case kFloat16:
      return launch<__half>(problem, grid, on);
    default:
      return launch<__nv_bfloat16>(problem, grid, on);
  }
}

}  // namespace pyinf
