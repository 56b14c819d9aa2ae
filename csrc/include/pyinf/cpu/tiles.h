// Register-tiled products of packed panels. Included by files compiled for one instruction set each, inside an unnamed
// namespace, so that no instance of a template is shared between them.
//
// A tile is MR rows of G = Σ_t g_t a_tᵀ by NR columns, held in registers over t. Panels are packed as [t][MR] and
// [t][NR] and padded with zeros, so that the inner loop has no edges.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstdlib>
#include <cstring>

#include "pyinf/cpu/convert.h"

// The includer defines PYINF_VECTOR_BYTES (64, 32 or 16) for its instruction set.

namespace {

using pyinf::cpu::load_value;

constexpr int kVectorBytes = PYINF_VECTOR_BYTES;

template <typename T>
struct Shape {
  typedef T Vector __attribute__((vector_size(kVectorBytes), aligned(sizeof(T)), may_alias));
  static constexpr int lanes = kVectorBytes / static_cast<int>(sizeof(T));
  // 24 or 12 accumulators, the loads of a row, one broadcast: within 32 or 16 vector registers.
  static constexpr int vectors = 2;
  static constexpr int MR = kVectorBytes == 64 ? 12 : 6;
  static constexpr int NR = vectors * lanes;
};

constexpr std::int64_t kDepth =
    256;  // rows of a panel in one go: a panel of NR columns then stays in the first-level cache

enum class Finish { kStore, kAdd, kSquareAdd };

// dst (leading dimension ld) receives the m × n part of the tile: stored, added, or squared and added. `partial`
// (ld_partial) holds what earlier rows of a long sequence contributed, or is null.
template <typename T, Finish finish>
__attribute__((always_inline)) inline void tile(std::int64_t depth, const T* __restrict__ gp, const T* __restrict__ ap,
                                                T* __restrict__ dst, std::int64_t ld, const T* __restrict__ partial,
                                                std::int64_t ld_partial, int m, int n) {
  using S = Shape<T>;
  using V = typename S::Vector;
  constexpr int MR = S::MR, NV = S::vectors, L = S::lanes;
  V acc[MR][NV];
#pragma GCC unroll 16
  for (int i = 0; i < MR; ++i)
#pragma GCC unroll 4
    for (int v = 0; v < NV; ++v) acc[i][v] = V{};
  if (m == MR) {
#pragma GCC unroll 16
    for (int i = 0; i < MR; ++i)
#pragma GCC unroll 4
      for (int v = 0; v < NV; ++v) __builtin_prefetch(dst + i * ld + v * L, 1);
  }
  for (std::int64_t t = 0; t < depth; ++t) {
    V x[NV];
#pragma GCC unroll 4
    for (int v = 0; v < NV; ++v) x[v] = *reinterpret_cast<const V*>(ap + t * S::NR + v * L);
#pragma GCC unroll 16
    for (int i = 0; i < MR; ++i) {
      const T y = gp[t * MR + i];
#pragma GCC unroll 4
      for (int v = 0; v < NV; ++v) acc[i][v] += x[v] * y;
    }
  }
  if (m == MR && n == S::NR) {
#pragma GCC unroll 16
    for (int i = 0; i < MR; ++i)
#pragma GCC unroll 4
      for (int v = 0; v < NV; ++v) {
        V value = acc[i][v];
        V* out = reinterpret_cast<V*>(dst + i * ld + v * L);
        if (partial) value += *reinterpret_cast<const V*>(partial + i * ld_partial + v * L);
        if constexpr (finish == Finish::kStore) *out = value;
        if constexpr (finish == Finish::kAdd) *out += value;
        if constexpr (finish == Finish::kSquareAdd) *out += value * value;
      }
    return;
  }
  alignas(64) T spill[MR * S::NR];
#pragma GCC unroll 16
  for (int i = 0; i < MR; ++i)
#pragma GCC unroll 4
    for (int v = 0; v < NV; ++v) *reinterpret_cast<V*>(spill + i * S::NR + v * L) = acc[i][v];
  for (int i = 0; i < m; ++i)
    for (int j = 0; j < n; ++j) {
      T value = spill[i * S::NR + j];
      T& out = dst[i * ld + j];
      if (partial) value += partial[i * ld_partial + j];
      if constexpr (finish == Finish::kStore) out = value;
      if constexpr (finish == Finish::kAdd) out += value;
      if constexpr (finish == Finish::kSquareAdd) out += value * value;
    }
}

template <typename T>
using TileFunction = void (*)(std::int64_t, const T*, const T*, T*, std::int64_t, const T*, std::int64_t, int, int);

template <typename T, Finish finish>
void tile_entry(std::int64_t depth, const T* gp, const T* ap, T* dst, std::int64_t ld, const T* partial,
                std::int64_t ld_partial, int m, int n) {
  tile<T, finish>(depth, gp, ap, dst, ld, partial, ld_partial, m, n);
}

// A strided matrix [rows, columns] of any input type; `index` (or null) lists the rows to read.
struct Source {
  const void* data;
  std::int64_t row_stride, column_stride;
  const std::int64_t* index;
  std::int64_t columns;  // columns that exist; the one after them reads as 1 (the bias column)
};

template <typename T, typename From, int width>
void pack_typed(const Source& s, std::int64_t t0, std::int64_t depth, std::int64_t j0, std::int64_t n, T* out) {
  const From* base = static_cast<const From*>(s.data);
  // A few rows at a time: their reads are streams that the hardware fetches ahead, their writes fill whole cache lines.
  constexpr std::int64_t kRows = 8;
  const std::int64_t real = std::min(n, std::max<std::int64_t>(s.columns - j0, 0));
  const std::int64_t whole = s.column_stride == 1 ? real / width * width : 0;
  for (std::int64_t t1 = 0; t1 < depth; t1 += kRows) {
    const std::int64_t stop = std::min(kRows, depth - t1);
    const From* from[kRows];
    for (std::int64_t t = 0; t < stop; ++t)
      from[t] = base + (s.index ? s.index[t0 + t1 + t] : t0 + t1 + t) * s.row_stride + j0 * s.column_stride;
    T* to = out + t1 * width;
    std::int64_t p = 0;
    for (; p < whole; p += width, to += depth * width)
      for (std::int64_t t = 0; t < stop; ++t) {
#pragma GCC unroll 32
        for (int j = 0; j < width; ++j) to[t * width + j] = static_cast<T>(load_value(from[t][p + j]));
      }
    for (; p < n; p += width, to += depth * width)
      for (std::int64_t t = 0; t < stop; ++t)
        for (std::int64_t j = 0; j < width; ++j) {
          const std::int64_t c = p + j;
          to[t * width + j] = c < real ? static_cast<T>(load_value(from[t][c * s.column_stride])) : T(c < n);
        }
  }
}

template <typename T, int width>
bool pack(int dtype, const Source& s, std::int64_t t0, std::int64_t depth, std::int64_t j0, std::int64_t n, T* out) {
  switch (dtype) {
    case pyinf::kFloat32:
      pack_typed<T, float, width>(s, t0, depth, j0, n, out);
      return true;
    case pyinf::kFloat64:
      pack_typed<T, double, width>(s, t0, depth, j0, n, out);
      return true;
    case pyinf::kFloat16:
      pack_typed<T, pyinf::cpu::Half, width>(s, t0, depth, j0, n, out);
      return true;
    case pyinf::kBFloat16:
      pack_typed<T, pyinf::cpu::BFloat16, width>(s, t0, depth, j0, n, out);
      return true;
    default:
      return false;
  }
}

inline std::int64_t round_up(std::int64_t x, std::int64_t to) { return (x + to - 1) / to * to; }
inline std::int64_t ceil_div(std::int64_t x, std::int64_t by) { return (x + by - 1) / by; }

// Memory of one thread, kept between calls (a few MB): fresh pages at every call cost more than packing does.
class Workspace {
 public:
  Workspace() = default;
  Workspace(const Workspace&) = delete;
  Workspace& operator=(const Workspace&) = delete;
  ~Workspace() { std::free(data_); }

  template <typename T>
  T* reserve(std::int64_t elements) {
    const std::size_t bytes = static_cast<std::size_t>(round_up(elements * static_cast<std::int64_t>(sizeof(T)), 64));
    if (bytes > size_) {
      std::free(data_);
      data_ = std::aligned_alloc(64, bytes);
      size_ = data_ ? bytes : 0;
    }
    return static_cast<T*>(data_);
  }

 private:
  void* data_ = nullptr;
  std::size_t size_ = 0;
};

// Cuts `size` into equal blocks of at most `limit`, each a multiple of `unit`; gives the size of one.
inline std::int64_t block_size(std::int64_t size, std::int64_t limit, std::int64_t unit) {
  const std::int64_t count = std::max<std::int64_t>(1, ceil_div(size, limit));
  return round_up(ceil_div(size, count), unit);
}

// The rows that will be packed next, fetched into the second-level cache a few lines at a time while tiles are
// computed.
class Ahead {
 public:
  Ahead() = default;
  Ahead(const Source& s, int dtype, std::int64_t t0, std::int64_t depth, std::int64_t j0, std::int64_t n) {
    if (s.column_stride != 1 || s.index) return;
    const std::int64_t size = dtype == pyinf::kFloat64 ? 8 : dtype == pyinf::kFloat32 ? 4 : 2;
    row_ = static_cast<const char*>(s.data) + (t0 * s.row_stride + j0) * size;
    stride_ = s.row_stride * size;
    width_ = std::min(n, s.columns - j0) * size;
    rows_ = depth;
  }
  std::int64_t lines() const { return rows_ * ceil_div(width_, 64); }
  void fetch(std::int64_t count) {
    for (; count > 0 && rows_ > 0; --count) {
      __builtin_prefetch(row_ + at_, 0, 2);
      at_ += 64;
      if (at_ >= width_) {
        at_ = 0;
        row_ += stride_;
        --rows_;
      }
    }
  }

 private:
  const char* row_ = nullptr;
  std::int64_t stride_ = 0, width_ = 0, rows_ = 0, at_ = 0;
};

// As `tiles`, with dst and partial kept tile by tile ([column tile][row tile][MR][NR]): whole tiles only, no two rows
// of which fall into the same cache set.
template <typename T>
inline void tiles_blocked(TileFunction<T> run, std::int64_t depth, const T* gp, const T* ap, std::int64_t m,
                          std::int64_t n, T* dst, const T* partial, Ahead& ahead1, Ahead& ahead2) {
  constexpr int MR = Shape<T>::MR, NR = Shape<T>::NR;
  const std::int64_t count = ceil_div(m, MR) * ceil_div(n, NR);
  const std::int64_t each1 = ceil_div(ahead1.lines(), count), each2 = ceil_div(ahead2.lines(), count);
  for (std::int64_t j = 0; j < n; j += NR)
    for (std::int64_t i = 0; i < m; i += MR) {
      ahead1.fetch(each1);
      ahead2.fetch(each2);
      run(depth, gp + i * depth, ap + j * depth, dst, NR, partial, NR, MR, NR);
      dst += MR * NR;
      if (partial) partial += MR * NR;
    }
}

// Copies the m × n block at `rows` into tiles (padded with zeros), or back; row by row, as rows are whole in memory.
template <typename T, bool to_tiles>
inline void reblock(T* rows, std::int64_t ld, T* blocked, std::int64_t m, std::int64_t n) {
  constexpr int MR = Shape<T>::MR, NR = Shape<T>::NR;
  const std::int64_t column_of_tiles = ceil_div(m, MR) * MR * NR;
  if (to_tiles && (m % MR || n % NR))
    std::memset(blocked, 0, sizeof(T) * static_cast<std::size_t>(column_of_tiles * ceil_div(n, NR)));
  for (std::int64_t i = 0; i < m; ++i) {
    T* outside = rows + i * ld;
    T* inside = blocked + i * NR;  // row i of the first column of tiles: tiles of one column follow each other
    for (std::int64_t j = 0; j < n; j += NR, inside += column_of_tiles) {
      const std::size_t bytes = sizeof(T) * static_cast<std::size_t>(std::min<std::int64_t>(NR, n - j));
      if (to_tiles)
        std::memcpy(inside, outside + j, bytes);
      else
        std::memcpy(outside + j, inside, bytes);
    }
  }
}

// All tiles of one packed pair of panels: rows [0, m), columns [0, n) of dst.
template <typename T>
inline void tiles(TileFunction<T> run, std::int64_t depth, const T* gp, const T* ap, std::int64_t m, std::int64_t n,
                  T* dst, std::int64_t ld, const T* partial, std::int64_t ld_partial) {
  constexpr int MR = Shape<T>::MR, NR = Shape<T>::NR;
  for (std::int64_t j = 0; j < n; j += NR)
    for (std::int64_t i = 0; i < m; i += MR)
      run(depth, gp + i * depth, ap + j * depth, dst + i * ld + j, ld, partial ? partial + i * ld_partial + j : nullptr,
          ld_partial, static_cast<int>(std::min<std::int64_t>(MR, m - i)),
          static_cast<int>(std::min<std::int64_t>(NR, n - j)));
}

}  // namespace
