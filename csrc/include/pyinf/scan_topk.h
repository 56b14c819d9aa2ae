// The k best rows of a store for every query, without the scores of all rows ever being written.
#pragma once

#include <cstdint>

namespace pyinf {

// What a store holds and what a query is.
enum ScanFormat : int {
  kScanBits = 0,          // packed sign bits on both sides; score = bits − 2 · differing bits
  kScanInt8 = 1,          // int8 · int8, exact in int32
  kScanFloat16 = 2,       // float16 · float16
  kScanBFloat16 = 3,      // bfloat16 · Σ_p of `parts` bfloat16 queries
  kScanInt8BFloat16 = 4,  // int8 · Σ_p of `parts` bfloat16 queries
};

constexpr std::int64_t kScanLargestK = 512;

// Bytes of workspace that the launcher needs: a function of the arguments alone.
std::int64_t scan_topk_workspace(std::int64_t count, std::int64_t n, std::int64_t d, std::int64_t k, int format,
                                 int parts);

// values:  float32 [count, k], indices: int64 [count, k], best first; equal scores: the lower row first; contiguous
// queries: [parts, count, d], strides in elements (kScanBits: bytes); more than one part for float32 queries, cut into
//          bfloat16 parts whose sum they are
// rows:    [n, d], row stride ld_rows; inner strides 1
// d:       elements of a row (kScanBits: bytes); bits: sign bits of a row (kScanBits)
// scale:   float32 [n] that multiplies the scores of each row, or null
// k:       1 .. min(n, 512); n below 2³²
// stream:  a cudaStream_t of `device`
// Accumulated in float32 or int32. The same bits twice. Returns 0, a Status, or a cudaError_t.
int launch_scan_topk(float* values, std::int64_t* indices, const void* queries, std::int64_t part_stride,
                     std::int64_t ld_queries, const void* rows, std::int64_t ld_rows, const float* scale,
                     std::int64_t count, std::int64_t n, std::int64_t d, std::int64_t bits, std::int64_t k, int format,
                     int parts, void* workspace, std::int64_t workspace_bytes, int device, void* stream);

}  // namespace pyinf
