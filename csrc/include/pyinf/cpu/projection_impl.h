// Bodies of the kernels in projection.h for one instruction set; see gradients_impl.h for what the includer defines.
#include <memory>
#include <new>

#include "pyinf/cpu/projection.h"
#include "pyinf/cpu/tiles.h"
#include "pyinf/philox.h"
#include "pyinf/status.h"

#define PYINF_CONCAT_(a, b) a##b
#define PYINF_CONCAT(a, b) PYINF_CONCAT_(a, b)
#define PYINF_NAME(name) PYINF_CONCAT(name, PYINF_ISA_NAME)

namespace {

constexpr int kWide = 16;                      // Philox calls side by side: one a lane
constexpr std::int64_t kProjectColumns = 512;  // outputs that share one packing of x

// Philox for kWide consecutive i: the ten rounds of philox.h, written so that the compiler uses vectors.
void philox_wide(std::uint64_t seed, std::uint32_t c3_word, std::uint64_t i, std::uint32_t c0_word,
                 std::uint32_t out[4][kWide]) {
  std::uint32_t c0[kWide], c1[kWide], c2[kWide], c3[kWide];
  for (int l = 0; l < kWide; ++l) {
    c0[l] = c0_word;
    c1[l] = static_cast<std::uint32_t>(i + static_cast<std::uint64_t>(l));
    c2[l] = static_cast<std::uint32_t>((i + static_cast<std::uint64_t>(l)) >> 32);
    c3[l] = c3_word;
  }
  std::uint32_t k0 = static_cast<std::uint32_t>(seed), k1 = static_cast<std::uint32_t>(seed >> 32);
  for (int round = 0; round < 10; ++round) {
    for (int l = 0; l < kWide; ++l) {
      const std::uint64_t p0 = static_cast<std::uint64_t>(pyinf::kPhiloxM0) * c0[l];
      const std::uint64_t p1 = static_cast<std::uint64_t>(pyinf::kPhiloxM1) * c2[l];
      c0[l] = static_cast<std::uint32_t>(p1 >> 32) ^ c1[l] ^ k0;
      c2[l] = static_cast<std::uint32_t>(p0 >> 32) ^ c3[l] ^ k1;
      c1[l] = static_cast<std::uint32_t>(p1);
      c3[l] = static_cast<std::uint32_t>(p0);
    }
    k0 += pyinf::kPhiloxW0;
    k1 += pyinf::kPhiloxW1;
  }
  for (int l = 0; l < kWide; ++l) {
    out[0][l] = c0[l];
    out[1][l] = c1[l];
    out[2][l] = c2[l];
    out[3][l] = c3[l];
  }
}

// Rows i0 .. i0 + depth of columns j0 .. j0 + n (j0 a multiple of 128) as panels [t][NR] of ±1.
template <typename T>
void draw_signs(std::uint64_t seed, std::uint32_t stream, std::int64_t i0, std::int64_t depth, std::int64_t j0,
                std::int64_t n, T* out) {
  constexpr int NR = Shape<T>::NR;
  static_assert(32 % NR == 0, "a panel row must not straddle words");
  for (std::int64_t t = 0; t < depth; t += kWide)
    for (std::int64_t block = 0; block < ceil_div(n, 128); ++block) {
      std::uint32_t words[4][kWide];
      philox_wide(seed, stream, static_cast<std::uint64_t>(i0 + t), static_cast<std::uint32_t>(j0 / 128 + block),
                  words);
      const std::int64_t rows = std::min<std::int64_t>(kWide, depth - t);
      for (std::int64_t c = block * 128; c < std::min(n, block * 128 + 128); c += NR) {
        T* to = out + c / NR * NR * depth + t * NR;
        const std::uint32_t* word = words[(c % 128) / 32];
        const int shift = static_cast<int>(c % 32);
        for (std::int64_t r = 0; r < rows; ++r) {
          const std::uint32_t bits = word[r] >> shift;
#pragma GCC unroll 32
          for (int j = 0; j < NR; ++j)
            to[r * NR + j] = static_cast<T>(1 - 2 * static_cast<std::int32_t>((bits >> j) & 1u));
        }
      }
    }
}

template <typename T>
int project(T* out, const Source& x, int dtype, std::int64_t batch, std::int64_t d, std::int64_t k, std::int64_t slices,
            std::uint64_t seed, std::uint32_t stream, int threads) {
  constexpr int MR = Shape<T>::MR;
  const std::int64_t column_blocks = ceil_div(k, kProjectColumns), slice = round_up(ceil_div(d, slices), kDepth);
  const std::int64_t rows = std::min<std::int64_t>(round_up(batch, MR), 384),
                     width = std::min(round_up(k, 128), kProjectColumns);
  int status = pyinf::kOk;
#pragma omp parallel for schedule(dynamic, 1) num_threads(threads)
  for (std::int64_t unit = 0; unit < column_blocks * slices; ++unit) {
    static thread_local Workspace workspace;
    const std::int64_t j0 = unit / slices * kProjectColumns, s = unit % slices;
    const std::int64_t n = std::min(kProjectColumns, k - j0), end = std::min(d, (s + 1) * slice);
    T* xp = workspace.reserve<T>((rows + width) * kDepth);
    if (!xp) {
#pragma omp atomic write
      status = pyinf::kInvalidArgument;
      continue;
    }
    T* pp = xp + rows * kDepth;
    for (std::int64_t i = s * slice; i < end; i += kDepth) {
      const std::int64_t depth = std::min(kDepth, end - i);
      draw_signs<T>(seed, stream, i, depth, j0, n, pp);
      for (std::int64_t b = 0; b < batch; b += rows) {
        const std::int64_t m = std::min(rows, batch - b);
        if (!pack<T, MR>(dtype, x, i, depth, b, m, xp)) {
#pragma omp atomic write
          status = pyinf::kUnsupportedDtype;
          break;
        }
        tiles<T>(tile_entry<T, Finish::kAdd>, depth, xp, pp, m, n, out + (s * batch + b) * k + j0, k, nullptr, 0);
      }
    }
  }
  return status;
}

constexpr std::int64_t kBuckets = 4096;  // coordinates whose buckets are drawn at a time

template <typename T, typename From>
int scatter(T* out, const From* x, std::int64_t x_row, std::int64_t x_column, std::int64_t batch, std::int64_t d,
            std::int64_t k, std::int64_t nnz, std::uint64_t seed, std::uint32_t stream, int threads) {
  std::unique_ptr<std::uint32_t[]> bucket(new (std::nothrow) std::uint32_t[kBuckets]);
  std::unique_ptr<T[]> sign(new (std::nothrow) T[kBuckets]);
  if (!bucket || !sign) return pyinf::kInvalidArgument;
  for (std::int64_t i0 = 0; i0 < d; i0 += kBuckets) {
    const std::int64_t count = std::min(kBuckets, d - i0);
    for (std::int64_t s = 0; s < nnz; ++s) {
#pragma omp parallel num_threads(threads)
      {
#pragma omp for schedule(static)
        for (std::int64_t i = 0; i < count; i += kWide) {
          std::uint32_t words[4][kWide];
          philox_wide(seed, stream | pyinf::kSparseBit, static_cast<std::uint64_t>(i0 + i),
                      static_cast<std::uint32_t>(s), words);
          for (std::int64_t l = 0; l < std::min<std::int64_t>(kWide, count - i); ++l) {
            bucket[i + l] = static_cast<std::uint32_t>(
                (static_cast<std::uint64_t>(words[0][l]) * static_cast<std::uint64_t>(k)) >> 32);
            sign[i + l] = words[1][l] & 1u ? T(-1) : T(1);
          }
        }
#pragma omp for schedule(static)
        for (std::int64_t b = 0; b < batch; ++b) {
          const From* from = x + b * x_row + i0 * x_column;
          T* to = out + b * k;
          for (std::int64_t i = 0; i < count; ++i)
            to[bucket[i]] += sign[i] * static_cast<T>(load_value(from[i * x_column]));
        }
      }
    }
  }
  return pyinf::kOk;
}

template <typename T>
int scatter_any(T* out, const void* x, std::int64_t row, std::int64_t column, int dtype, std::int64_t batch,
                std::int64_t d, std::int64_t k, std::int64_t nnz, std::uint64_t seed, std::uint32_t stream,
                int threads) {
  switch (dtype) {
    case pyinf::kFloat32:
      return scatter(out, static_cast<const float*>(x), row, column, batch, d, k, nnz, seed, stream, threads);
    case pyinf::kFloat64:
      return scatter(out, static_cast<const double*>(x), row, column, batch, d, k, nnz, seed, stream, threads);
    case pyinf::kFloat16:
      return scatter(out, static_cast<const pyinf::cpu::Half*>(x), row, column, batch, d, k, nnz, seed, stream,
                     threads);
    case pyinf::kBFloat16:
      return scatter(out, static_cast<const pyinf::cpu::BFloat16*>(x), row, column, batch, d, k, nnz, seed, stream,
                     threads);
    default:
      return pyinf::kUnsupportedDtype;
  }
}

}  // namespace

namespace pyinf::cpu {

int PYINF_NAME(random_projection_)(void* out, int acc_dtype, const void* x, std::int64_t x_row, std::int64_t x_column,
                                   int x_dtype, std::int64_t batch, std::int64_t d, std::int64_t k, std::int64_t slices,
                                   std::uint64_t seed, std::uint32_t stream, int threads) {
  const Source source{x, x_column, x_row, nullptr, batch};  // read as [d, batch]
  if (acc_dtype == kFloat32)
    return project(static_cast<float*>(out), source, x_dtype, batch, d, k, slices, seed, stream, threads);
  if (acc_dtype == kFloat64)
    return project(static_cast<double*>(out), source, x_dtype, batch, d, k, slices, seed, stream, threads);
  return kUnsupportedDtype;
}

int PYINF_NAME(sparse_projection_)(void* out, int acc_dtype, const void* x, std::int64_t x_row, std::int64_t x_column,
                                   int x_dtype, std::int64_t batch, std::int64_t d, std::int64_t k, std::int64_t nnz,
                                   std::uint64_t seed, std::uint32_t stream, int threads) {
  if (acc_dtype == kFloat32)
    return scatter_any(static_cast<float*>(out), x, x_row, x_column, x_dtype, batch, d, k, nnz, seed, stream, threads);
  if (acc_dtype == kFloat64)
    return scatter_any(static_cast<double*>(out), x, x_row, x_column, x_dtype, batch, d, k, nnz, seed, stream, threads);
  return kUnsupportedDtype;
}

}  // namespace pyinf::cpu
