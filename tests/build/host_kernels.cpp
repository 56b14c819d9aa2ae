// The launchers of csrc/*.cu, compiled for the emulator, as C functions for ctypes.
#include <cuda_runtime.h>

#include "pyinf/philox.h"
#include "pyinf/project_gradients.h"
#include "pyinf/random_projection.h"
#include "pyinf/scan_topk.cuh"
#include "pyinf/scan_topk.h"
#include "pyinf/sparse_projection.h"

namespace {
template <auto Launcher>
struct Plain;
template <typename R, typename... Args, R (*Launcher)(Args...)>
struct Plain<Launcher> {
  static R call(Args... args) { return Launcher(args...); }
};
}  // namespace

// The address of a C++ function with its own signature, whatever its mangled name is.
#define EXPORT(name) \
  extern "C" void* host_##name() { return reinterpret_cast<void*>(&Plain<&pyinf::name>::call); }

EXPORT(random_projection_workspace)
EXPORT(launch_random_projection)
EXPORT(sparse_projection_workspace)
EXPORT(sparse_projection_factors_workspace)
EXPORT(launch_sparse_projection)
EXPORT(launch_sparse_projection_factors)
EXPORT(scan_topk_workspace)
EXPORT(launch_scan_topk)
EXPORT(project_gradients_workspace)
EXPORT(launch_project_gradients)

extern "C" void host_backwards(int on) { emulator::backwards = on != 0; }

extern "C" void host_normals(std::uint64_t seed, std::uint32_t stream, std::uint64_t i, std::uint32_t block,
                             float* out) {
  const pyinf::Normal4 drawn = pyinf::philox_normals(seed, stream, i, block);
  for (int e = 0; e < 4; ++e) out[e] = drawn.v[e];
}
extern "C" void host_sparse(std::uint64_t seed, std::uint32_t stream, std::uint64_t i, std::uint32_t s, std::uint32_t k,
                            std::uint32_t* bucket, int* negative) {
  const pyinf::SparseEntry entry = pyinf::philox_sparse(seed, stream, i, s, k);
  *bucket = entry.bucket;
  *negative = entry.negative;
}

// The sign of (key of x at row i) − (key of y at row j), and whether a key gives back what it was made of.
extern "C" int host_compare_keys(float x, std::int64_t i, float y, std::int64_t j) {
  const auto first = pyinf::scan_topk::make_key(x, i), second = pyinf::scan_topk::make_key(y, j);
  return (first > second) - (first < second);
}
extern "C" float host_key_round_trip(float x, std::int64_t i, std::int64_t* row) {
  const auto key = pyinf::scan_topk::make_key(x, i);
  *row = pyinf::scan_topk::key_row(key);
  return pyinf::scan_topk::key_score(key);
}
