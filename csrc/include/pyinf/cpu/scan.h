// The scan of packed sign bits: which rows agree most with a query.
#pragma once

#include <cstdint>

namespace pyinf::cpu {

// The `top` best rows for each query. A row is `bytes` bytes of sign bits in `sections` parts: part s is bytes
// starts[s] to starts[s + 1] and counts widths[s] bits (bits beyond them are 0 in queries and rows). Score:
// sum over s of query_scale[q][s] · row_scale[r][s] · (widths[s] − 2 · differing bits); a null scale is 1. Equal
// scores: the lower row first. queries [count, bytes] are contiguous, rows are row_stride bytes apart, scales
// [count, sections] and [n, sections], values and indices [count, top].
int scan_bits(const std::uint8_t* queries, std::int64_t count, const std::uint8_t* rows, std::int64_t row_stride,
              std::int64_t n, std::int64_t bytes, std::int64_t sections, const std::int64_t* starts,
              const std::int64_t* widths, const float* query_scale, const float* row_scale, std::int64_t top,
              float* values, std::int64_t* indices, int threads, int isa);

}  // namespace pyinf::cpu
