// Bodies of the kernels in pyinf/cpu/gradients.h for one instruction set. The including file defines PYINF_VECTOR_BYTES
// and PYINF_ISA_NAME, the suffix of the exported names.
#include "pyinf/cpu/gradients.h"
#include "pyinf/cpu/tiles.h"
#include "pyinf/status.h"

#define PYINF_CONCAT_(a, b) a##b
#define PYINF_CONCAT(a, b) PYINF_CONCAT_(a, b)
#define PYINF_NAME(name) PYINF_CONCAT(name, PYINF_ISA_NAME)

namespace {

using pyinf::cpu::GradientInputs;

// Rows × columns of Λ that one thread works on: with the panels of one depth they fill about half a second-level cache.
constexpr std::int64_t kBlockRows = 384, kBlockColumns = 512;

struct Grid {
  std::int64_t rows, columns, row_blocks, column_blocks;
};

// Blocks of equal size, and enough of them for every thread. Values do not depend on where the cuts are.
template <typename T>
Grid make_grid(std::int64_t m, std::int64_t n, int threads) {
  Grid grid{block_size(m, kBlockRows, Shape<T>::MR), block_size(n, kBlockColumns, Shape<T>::NR), 0, 0};
  for (;;) {
    grid.row_blocks = ceil_div(m, grid.rows);
    grid.column_blocks = ceil_div(n, grid.columns);
    if (threads <= 1 || grid.row_blocks * grid.column_blocks >= 4 * threads) break;
    if (grid.rows > 8 * Shape<T>::MR)
      grid.rows = round_up(grid.rows / 2, Shape<T>::MR);
    else if (grid.columns > 4 * Shape<T>::NR)
      grid.columns = round_up(grid.columns / 2, Shape<T>::NR);
    else
      break;
  }
  return grid;
}

template <typename T>
int squared(T* lam, std::int64_t ld, const GradientInputs& in, int threads) {
  constexpr int MR = Shape<T>::MR, NR = Shape<T>::NR;
  const Grid grid = make_grid<T>(in.d_out, in.d_in, threads);
  const Source g{in.g, in.g_row, in.g_column, nullptr, in.d_out};
  const Source a{in.a, in.a_row, in.a_column, nullptr, in.d_in};
  std::int64_t longest = 0;
  for (std::int64_t b = 0; b < in.count; ++b) longest = std::max(longest, in.offsets[b + 1] - in.offsets[b]);
  if (longest == 0) return pyinf::kOk;
  const std::int64_t depth = std::min(longest, kDepth);
  const std::int64_t g_size = grid.rows * depth, a_size = grid.columns * depth, area = grid.rows * grid.columns;
  const std::int64_t scratch = longest > kDepth ? area : 0;
  int status = pyinf::kOk;
#pragma omp parallel for schedule(dynamic, 1) num_threads(threads)
  for (std::int64_t block = 0; block < grid.row_blocks * grid.column_blocks; ++block) {
    static thread_local Workspace workspace;
    T* gp = workspace.reserve<T>(g_size + a_size + area + scratch);
    if (!gp) {
#pragma omp atomic write
      status = pyinf::kInvalidArgument;
      continue;
    }
    T* ap = gp + g_size;
    T* own = ap + a_size;  // this block of Λ, kept in tiles over all sequences
    T* sum = own + area;
    const std::int64_t i0 = block / grid.column_blocks * grid.rows, j0 = block % grid.column_blocks * grid.columns;
    const std::int64_t m = std::min(grid.rows, in.d_out - i0), n = std::min(grid.columns, in.d_in - j0);
    T* out = lam + i0 * ld + j0;
    reblock<T, true>(out, ld, own, m, n);
    for (std::int64_t b = 0; b < in.count; ++b) {
      const std::int64_t end = in.offsets[b + 1];
      for (std::int64_t t = in.offsets[b]; t < end; t += kDepth) {
        const std::int64_t now = std::min(kDepth, end - t);
        const bool first = t == in.offsets[b], last = t + now == end;
        if (!pack<T, MR>(in.g_dtype, g, t, now, i0, m, gp) || !pack<T, NR>(in.a_dtype, a, t, now, j0, n, ap)) {
#pragma omp atomic write
          status = pyinf::kUnsupportedDtype;
          break;
        }
        const std::int64_t next = std::min(kDepth, in.offsets[in.count] - (t + now));  // of whichever sequence
        Ahead ahead_g(g, in.g_dtype, t + now, next, i0, m), ahead_a(a, in.a_dtype, t + now, next, j0, n);
        if (last)
          tiles_blocked<T>(tile_entry<T, Finish::kSquareAdd>, now, gp, ap, m, n, own, first ? nullptr : sum, ahead_g,
                           ahead_a);
        else
          tiles_blocked<T>(first ? tile_entry<T, Finish::kStore> : tile_entry<T, Finish::kAdd>, now, gp, ap, m, n, sum,
                           nullptr, ahead_g, ahead_a);
      }
    }
    reblock<T, false>(out, ld, own, m, n);
  }
  return status;
}

}  // namespace

namespace pyinf::cpu {

int PYINF_NAME(squared_gradients_)(void* lam, std::int64_t ld, int acc_dtype, const GradientInputs& in, int threads) {
  if (acc_dtype == kFloat32) return squared(static_cast<float*>(lam), ld, in, threads);
  if (acc_dtype == kFloat64) return squared(static_cast<double*>(lam), ld, in, threads);
  return kUnsupportedDtype;
}

}  // namespace pyinf::cpu
