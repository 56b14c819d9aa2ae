// Launcher of reduce_splits.
//
// gate: kernel=reduce_splits_kernel tensor_cores=none dynamic_shared=0
#include <algorithm>

#include "pyinf/index_maps.h"
#include "pyinf/launch.cuh"
#include "pyinf/reduce_splits.cuh"
#include "pyinf/reduce_splits.h"

namespace pyinf {

int launch_reduce_splits(float* out, std::int64_t ld_out, const float* partials, std::int64_t splits, std::int64_t rows,
                         std::int64_t columns, float scale, void* stream) {
  if (rows == 0 || columns == 0) return 0;
  const std::int64_t blocks = std::min<std::int64_t>(ceil_div(rows * columns, reduction::kThreads), 1 << 20);
  return launch_kernel(reduction::reduce_splits_kernel, static_cast<unsigned>(blocks), reduction::kThreads, 0,
                       static_cast<cudaStream_t>(stream),
                       reduction::Problem{out, partials, ld_out, splits, rows, columns, scale});
}

}  // namespace pyinf
