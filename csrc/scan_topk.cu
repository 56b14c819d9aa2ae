// Launcher of scan_topk.
//
// gate: kernel=scan_topk_kernelILNS0_4KindE0E tensor_cores=BMMA async_copies=LDGSTS dynamic_shared=101376
// gate: kernel=scan_topk_kernelILNS0_4KindE1E tensor_cores=IMMA async_copies=LDGSTS dynamic_shared=101376
// gate: kernel=scan_topk_kernelILNS0_4KindE[23]E tensor_cores=HMMA async_copies=LDGSTS dynamic_shared=101376
// gate: kernel=merge_topk_kernel tensor_cores=none dynamic_shared=16384
#include <algorithm>
#include <limits>

#include "pyinf/device_guard.cuh"
#include "pyinf/launch.cuh"
#include "pyinf/scan_topk.cuh"
#include "pyinf/scan_topk.h"
#include "pyinf/status.h"

namespace pyinf {
namespace {

using namespace scan_topk;

constexpr int kSharedLimit = 101376;  // of sm_86 and sm_89, and what the gate lines above claim
constexpr int kQueryRing = 24 * 1024;
constexpr int kCandidates = 4096;
static_assert(kMerged * sizeof(Key) == 16384);

struct Plan {
  int query_bytes, row_element, query_element, block_queries, capacity, shared;
  std::int64_t strip, strips;
};

// How the work is cut; shared is 0 where the kernel does not serve the sizes.
Plan plan_of(std::int64_t count, std::int64_t n, std::int64_t k, int format, int parts) {
  Plan plan{};
  plan.row_element = format == kScanFloat16 || format == kScanBFloat16 ? 2 : 1;
  plan.query_element = format == kScanBits || format == kScanInt8 ? 1 : 2;
  plan.query_bytes = kBytes / plan.row_element * plan.query_element;
  plan.capacity = capacity_of(static_cast<int>(k));
  const int fit =
      std::min({kQueries, kCandidates / plan.capacity, kQueryRing / (kStages * parts * (plan.query_bytes + 16))});
  const std::int64_t wanted = std::min<std::int64_t>(fit, ceil_div(count, 8) * 8);
  plan.block_queries = std::max(8, static_cast<int>(wanted) / 8 * 8);
  const int shared = shared_bytes(parts, plan.block_queries, plan.capacity, plan.query_bytes);
  plan.shared = shared <= kSharedLimit ? shared : 0;
  // Two blocks for every multiprocessor of the largest cards, and strips worth starting a block for.
  const std::int64_t per_tile = ceil_div(264, std::max<std::int64_t>(1, ceil_div(count, plan.block_queries)));
  const std::int64_t strips = std::max<std::int64_t>(1, std::min(per_tile, ceil_div(n, 1024)));
  plan.strip = ceil_div(ceil_div(n, strips), kRows) * kRows;
  plan.strips = ceil_div(n, plan.strip);
  return plan;
}

// The widest copy that every row allows.
int grain(const void* base, std::int64_t stride_bytes, std::int64_t more_bytes) {
  const std::uint64_t all = reinterpret_cast<std::uintptr_t>(base) | static_cast<std::uint64_t>(stride_bytes) |
                            static_cast<std::uint64_t>(more_bytes);
  return all % 16 == 0 ? 16 : all % 4 == 0 ? 4 : 1;
}

template <Kind kKind, typename T>
cudaError_t launch(const Problem& p, unsigned blocks, int shared, cudaStream_t stream) {
  return launch_kernel(scan_topk_kernel<kKind, T>, blocks, kThreads, static_cast<std::size_t>(shared), stream, p);
}

bool sizes_are_served(std::int64_t n, std::int64_t d, std::int64_t k, int format) {
  return k <= kScanLargestK && n < std::numeric_limits<std::uint32_t>::max() && d < std::int64_t{1} << 40 &&
         (format != kScanInt8 || d <= std::numeric_limits<std::int32_t>::max() / (128 * 128)) &&
         (format != kScanBits || d <= std::numeric_limits<std::int32_t>::max() / 32);
}

}  // namespace

std::int64_t scan_topk_workspace(std::int64_t count, std::int64_t n, std::int64_t d, std::int64_t k, int format,
                                 int parts) {
  if (count <= 0 || n <= 0 || k <= 0 || parts < 1 || !sizes_are_served(n, d, k, format)) return 0;
  return count * plan_of(count, n, k, format, parts).strips * k * static_cast<std::int64_t>(sizeof(Key));
}

int launch_scan_topk(float* values, std::int64_t* indices, const void* queries, std::int64_t part_stride,
                     std::int64_t ld_queries, const void* rows, std::int64_t ld_rows, const float* scale,
                     std::int64_t count, std::int64_t n, std::int64_t d, std::int64_t bits, std::int64_t k, int format,
                     int parts, void* workspace, std::int64_t workspace_bytes, int device, void* stream) {
  if (count < 0 || n < 0 || d < 0 || k < 0 || k > n || parts < 1) return kInvalidArgument;
  if ((n > 1 && ld_rows < d) || (count > 1 && ld_queries < d)) return kInvalidArgument;
  if (format < kScanBits || format > kScanInt8BFloat16) return kUnsupportedDtype;
  if (parts > 1 && format != kScanBFloat16 && format != kScanInt8BFloat16) return kUnsupportedDtype;
  if (count == 0 || k == 0) return kOk;
  if (!sizes_are_served(n, d, k, format)) return kUnsupportedShape;
  const Plan plan = plan_of(count, n, k, format, parts);
  const std::int64_t blocks = ceil_div(count, plan.block_queries) * plan.strips;
  if (plan.shared == 0 || blocks > std::numeric_limits<int>::max() || count > std::numeric_limits<int>::max())
    return kUnsupportedShape;
  if (values == nullptr || indices == nullptr || (d > 0 && (queries == nullptr || rows == nullptr)))
    return kInvalidArgument;
  if (workspace == nullptr || workspace_bytes < scan_topk_workspace(count, n, d, k, format, parts))
    return kInvalidArgument;

  const DeviceGuard guard(device);
  if (guard.error() != cudaSuccess) return guard.error();
  Problem p{};
  p.queries = static_cast<const unsigned char*>(queries);
  p.rows = static_cast<const unsigned char*>(rows);
  p.scale = scale;
  p.partials = static_cast<Key*>(workspace);
  p.part_stride = part_stride * plan.query_element;
  p.ld_queries = ld_queries * plan.query_element;
  p.ld_rows = ld_rows * plan.row_element;
  p.count = count;
  p.n = n;
  p.width = d * plan.row_element;
  p.bits = bits;
  p.strip = plan.strip;
  p.strips = plan.strips;
  p.k = static_cast<int>(k);
  p.parts = parts;
  p.block_queries = plan.block_queries;
  p.capacity = plan.capacity;
  p.query_grain = grain(queries, p.ld_queries, p.part_stride);
  p.row_grain = grain(rows, p.ld_rows, 0);
  const auto on = static_cast<cudaStream_t>(stream);
  const auto grid = static_cast<unsigned>(blocks);
  cudaError_t error = cudaSuccess;
  switch (format) {
    case kScanBits:
      error = launch<kBits, std::uint8_t>(p, grid, plan.shared, on);
      break;
    case kScanInt8:
      error = launch<kInt8, std::int8_t>(p, grid, plan.shared, on);
      break;
    case kScanFloat16:
      error = launch<kFloats, __half>(p, grid, plan.shared, on);
      break;
    case kScanBFloat16:
      error = launch<kFloats, __nv_bfloat16>(p, grid, plan.shared, on);
      break;
    default:
      error = launch<kInt8Floats, __nv_bfloat16>(p, grid, plan.shared, on);
  }
  if (error != cudaSuccess) return error;
  return launch_kernel(merge_topk_kernel, static_cast<unsigned>(count), kThreads, kMerged * sizeof(Key), on,
                       Merge{p.partials, values, indices, plan.strips * k, p.k});
}

}  // namespace pyinf
