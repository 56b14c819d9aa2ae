// How a kernel is launched and how it names its dynamic shared memory. tests/build/host_cuda has another version of
// this file, with which the launchers and kernels of csrc/ run on the host as they stand.
#pragma once

#include <cuda_runtime.h>

// An array of bytes, aligned to 128.
#define PYINF_SHARED_MEMORY(name) extern __shared__ __align__(128) unsigned char name[]

namespace pyinf {

// Asks for the shared memory that the kernel needs (per device, so at every launch: a cache of it would need a lock)
// and launches. The error of either, or cudaSuccess.
template <typename... Parameters, typename... Arguments>
cudaError_t launch_kernel(void (*kernel)(Parameters...), dim3 grid, unsigned threads, std::size_t shared,
                          cudaStream_t stream, Arguments... arguments) {
  if (shared > 48 * 1024) {
    const cudaError_t error =
        cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(shared));
    if (error != cudaSuccess) return error;
  }
  kernel<<<grid, threads, shared, stream>>>(arguments...);
  return cudaGetLastError();
}

}  // namespace pyinf
