#include <cuda_runtime_api.h>

#include "pyinf/cuda_info.h"

namespace pyinf {

int cuda_runtime_version() {
  int version = 0;
  return cudaRuntimeGetVersion(&version) == cudaSuccess ? version : CUDART_VERSION;
}

int cuda_device_count() {
  int count = 0;
  if (cudaGetDeviceCount(&count) == cudaSuccess) return count;
  cudaGetLastError();  // no driver is not an error that the next launch should see
  return -1;
}

const char* cuda_error_name(int code) { return cudaGetErrorString(static_cast<cudaError_t>(code)); }

}  // namespace pyinf
