// The generic instance and the choice between the instances of scan_impl.h.
#define PYINF_ISA_NAME generic
#include "pyinf/cpu/scan_impl.h"
#include "pyinf/cpu/select.h"

namespace pyinf::cpu {

#define PYINF_DECLARE(suffix)                                                                                \
  int scan_bits_##suffix(const std::uint8_t*, std::int64_t, const std::uint8_t*, std::int64_t, std::int64_t, \
                         std::int64_t, std::int64_t, const std::int64_t*, const std::int64_t*, const float*, \
                         const float*, std::int64_t, float*, std::int64_t*, int)
PYINF_DECLARE(avx2);
PYINF_DECLARE(avx512);
PYINF_DECLARE(avx512popcnt);

int scan_bits(const std::uint8_t* queries, std::int64_t count, const std::uint8_t* rows, std::int64_t row_stride,
              std::int64_t n, std::int64_t bytes, std::int64_t sections, const std::int64_t* starts,
              const std::int64_t* widths, const float* query_scale, const float* row_scale, std::int64_t top,
              float* values, std::int64_t* indices, int threads, int isa) {
  if (count < 0 || n < 0 || bytes < 0 || top < 0 || top > n || threads < 1 || sections < 1) return kInvalidArgument;
  if (starts[0] != 0 || starts[sections] != bytes || (n > 1 && row_stride < bytes)) return kInvalidArgument;
  for (std::int64_t s = 0; s < sections; ++s)
    if (starts[s + 1] < starts[s] || widths[s] > 8 * (starts[s + 1] - starts[s])) return kInvalidArgument;
  if (count == 0 || top == 0) return kOk;
#if defined(__x86_64__)
  if (isa >= kAvx512Popcnt && detect_isa() >= kAvx512 && has_vpopcntdq())
    return scan_bits_avx512popcnt(queries, count, rows, row_stride, n, bytes, sections, starts, widths, query_scale,
                                  row_scale, top, values, indices, threads);
#endif
  return PYINF_SELECT(isa, scan_bits_, queries, count, rows, row_stride, n, bytes, sections, starts, widths,
                      query_scale, row_scale, top, values, indices, threads);
}

}  // namespace pyinf::cpu
