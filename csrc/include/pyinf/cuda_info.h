// What the statically linked CUDA runtime says. None of these needs a driver to be present.
#pragma once

namespace pyinf {
int cuda_runtime_version();
// Number of devices, or a negative number where there is no usable driver.
int cuda_device_count();
const char* cuda_error_name(int code);
}  // namespace pyinf
