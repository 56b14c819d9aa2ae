// Body of scan.h for one instruction set. The includer defines PYINF_ISA_NAME; what it is compiled for decides how bits
// are counted.
//
// Bits are counted two vectors at a time. With u and v the differing bits of the two, and o those of everything before
// added without carry, a full adder gives o' = o ^ u ^ v and the carry maj(o, u, v); the carry alone is counted, twice.
// o' is linear: it is the exclusive or of a part that only the row knows and one that only the query knows, so both
// keep (first vector, exclusive or of all up to the second) in place of the two, and v is never formed: the carry is a
// function of o, u and o'. That leaves 2.5 operations a vector where counting each one takes 3.
//
// A few rows stay in the first-level cache, prepared like that, while all queries pass; the next rows are fetched
// meanwhile. So the store is read from memory once.
#include <algorithm>
#include <cstdint>
#include <cstring>
#include <limits>
#include <memory>
#include <new>
#if defined(__AVX2__)
#include <immintrin.h>
#endif
#if defined(__GNUC__) && !defined(__clang__)  // GCC's own AVX-512 headers: what they leave undefined is masked away
#pragma GCC diagnostic ignored "-Wuninitialized"
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#endif

#include "pyinf/cpu/scan.h"
#include "pyinf/status.h"

#define PYINF_CONCAT_(a, b) a##b
#define PYINF_CONCAT(a, b) PYINF_CONCAT_(a, b)
#define PYINF_NAME(name) PYINF_CONCAT(name, PYINF_ISA_NAME)

namespace {

constexpr int kRows = 2;                  // rows of a block
constexpr int kSide = 4;                  // rows, and queries, of a tile
constexpr int kTile = kSide * kSide;      // counts of a tile: row · kSide + query
constexpr std::int64_t kL1Bytes = 16384;  // rows that stay in the first-level cache
constexpr std::int64_t kMaxRows = 64;     // of them, at most

struct Hit {
  float value;
  std::int64_t index;
};

inline bool better(const Hit& x, const Hit& y) { return x.value != y.value ? x.value > y.value : x.index < y.index; }

// Keeps the best `top` of a stream in `heap`, the worst of them in front.
inline void keep(Hit* heap, std::int64_t& size, std::int64_t top, Hit hit) {
  const auto order = [](const Hit& x, const Hit& y) { return better(x, y); };
  if (size < top) {
    heap[size++] = hit;
    std::push_heap(heap, heap + size, order);
  } else if (better(hit, heap[0])) {
    std::pop_heap(heap, heap + size, order);
    heap[size - 1] = hit;
    std::push_heap(heap, heap + size, order);
  }
}

#if defined(__AVX512BW__)

using Vector = __m512i;
constexpr std::int64_t kVector = 64;
constexpr int kQueries = 4;  // of a block, with two rows: sixteen registers of state, eight of queries

inline Vector load(const std::uint8_t* x) { return _mm512_loadu_si512(x); }
inline Vector load_part(const std::uint8_t* x, std::int64_t bytes) {
  return _mm512_maskz_loadu_epi8((static_cast<__mmask64>(1) << bytes) - 1, x);
}
inline Vector add(Vector x, Vector y) { return _mm512_add_epi64(x, y); }
inline Vector differ(Vector x, Vector y) { return _mm512_xor_si512(x, y); }
inline Vector zero() { return _mm512_setzero_si512(); }
inline void store(std::uint8_t* to, Vector x) { _mm512_storeu_si512(to, x); }
inline Vector carry(Vector o, Vector u, Vector sum) { return _mm512_ternarylogic_epi64(o, u, sum, 0xd4); }
// In a register, which the compiler would not keep: it loads a query again for every row, and loads are what is scarce.
inline Vector held(Vector x) {
  asm("" : "+v"(x));
  return x;
}

// Set bits of x as eight sums.
inline Vector count(Vector x) {
#if defined(PYINF_VPOPCNTDQ)
  return _mm512_popcnt_epi64(x);
#else
  const Vector table = _mm512_broadcast_i32x4(_mm_setr_epi8(0, 1, 1, 2, 1, 2, 2, 3, 1, 2, 2, 3, 2, 3, 3, 4));
  const Vector low = _mm512_set1_epi8(15);
  const Vector a = _mm512_shuffle_epi8(table, _mm512_and_si512(x, low));
  const Vector b = _mm512_shuffle_epi8(table, _mm512_and_si512(_mm512_srli_epi16(x, 4), low));
  return _mm512_sad_epu8(_mm512_add_epi8(a, b), zero());
#endif
}

// The sums of the eight accumulators of a block, in their order: a tree that halves the vectors as it adds.
inline void totals(const Vector acc[kRows * kQueries], std::int32_t* out) {
  Vector t[4], u[2];
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) t[i] = _mm512_or_si512(acc[2 * i], _mm512_slli_epi64(acc[2 * i + 1], 32));
#pragma GCC unroll 2
  for (int i = 0; i < 2; ++i)
    u[i] =
        _mm512_add_epi32(_mm512_unpacklo_epi64(t[2 * i], t[2 * i + 1]), _mm512_unpackhi_epi64(t[2 * i], t[2 * i + 1]));
  const Vector v = _mm512_add_epi32(_mm512_shuffle_i32x4(u[0], u[1], 0x88), _mm512_shuffle_i32x4(u[0], u[1], 0xdd));
  const Vector w = _mm512_add_epi32(v, _mm512_shuffle_i32x4(v, v, 0xb1));
  _mm_storeu_si128(reinterpret_cast<__m128i*>(out), _mm512_castsi512_si128(w));
  _mm_storeu_si128(reinterpret_cast<__m128i*>(out + 4), _mm512_extracti32x4_epi32(w, 2));
}

#elif defined(__AVX2__)

using Vector = __m256i;
constexpr std::int64_t kVector = 32;
constexpr int kQueries = 2;  // of a block, with two rows: sixteen registers hold no more

inline Vector load(const std::uint8_t* x) { return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(x)); }
inline Vector load_part(const std::uint8_t* x, std::int64_t bytes) {
  alignas(32) std::uint8_t part[32] = {};
  std::memcpy(part, x, static_cast<std::size_t>(bytes));
  return load(part);
}
inline Vector add(Vector x, Vector y) { return _mm256_add_epi64(x, y); }
inline Vector differ(Vector x, Vector y) { return _mm256_xor_si256(x, y); }
inline Vector zero() { return _mm256_setzero_si256(); }
inline void store(std::uint8_t* to, Vector x) { _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), x); }
inline Vector held(Vector x) { return x; }
inline Vector carry(Vector o, Vector u, Vector sum) {
  return _mm256_or_si256(_mm256_and_si256(o, u), _mm256_andnot_si256(sum, _mm256_or_si256(o, u)));
}

inline Vector count(Vector x) {
  const Vector table = _mm256_broadcastsi128_si256(_mm_setr_epi8(0, 1, 1, 2, 1, 2, 2, 3, 1, 2, 2, 3, 2, 3, 3, 4));
  const Vector low = _mm256_set1_epi8(15);
  const Vector a = _mm256_shuffle_epi8(table, _mm256_and_si256(x, low));
  const Vector b = _mm256_shuffle_epi8(table, _mm256_and_si256(_mm256_srli_epi16(x, 4), low));
  return _mm256_sad_epu8(_mm256_add_epi8(a, b), zero());
}

inline std::int32_t total(Vector x) {
  const __m128i y = _mm_add_epi64(_mm256_castsi256_si128(x), _mm256_extracti128_si256(x, 1));
  return static_cast<std::int32_t>(_mm_cvtsi128_si64(y) + _mm_extract_epi64(y, 1));
}

#else

using Vector = std::uint64_t;
constexpr std::int64_t kVector = 8;
constexpr int kQueries = 2;

inline Vector load(const std::uint8_t* x) {
  Vector y;
  std::memcpy(&y, x, 8);
  return y;
}
inline Vector load_part(const std::uint8_t* x, std::int64_t bytes) {
  Vector y = 0;
  std::memcpy(&y, x, static_cast<std::size_t>(bytes));
  return y;
}
inline Vector add(Vector x, Vector y) { return x + y; }
inline Vector differ(Vector x, Vector y) { return x ^ y; }
inline Vector zero() { return 0; }
inline void store(std::uint8_t* to, Vector x) { std::memcpy(to, &x, 8); }
inline Vector held(Vector x) { return x; }
inline Vector carry(Vector o, Vector u, Vector sum) { return (o & u) | ((o | u) & ~sum); }

inline Vector count(Vector x) {
#if defined(__x86_64__) && !defined(__POPCNT__)  // the builtin would be a call
  x -= (x >> 1) & 0x5555555555555555u;
  x = (x & 0x3333333333333333u) + ((x >> 2) & 0x3333333333333333u);
  return (((x + (x >> 4)) & 0x0f0f0f0f0f0f0f0fu) * 0x0101010101010101u) >> 56;
#else
  return static_cast<Vector>(__builtin_popcountll(x));
#endif
}

inline std::int32_t total(Vector x) { return static_cast<std::int32_t>(x); }

#endif

// Vectors of a section that are counted in pairs, from the first on: short ones gain nothing from it.
inline std::int64_t paired(std::int64_t vectors) { return vectors < 4 ? 0 : vectors / 2 * 2; }

// A section of a row or a query, as differing() wants it: `vectors` vectors, zeros beyond its bytes.
inline void prepare(const std::uint8_t* from, std::int64_t bytes, std::int64_t vectors, std::uint8_t* to) {
  Vector before = zero();
  for (std::int64_t v = 0; v < vectors; ++v) {
    const std::int64_t left = bytes - v * kVector;
    Vector x = left >= kVector ? load(from + v * kVector) : load_part(from + v * kVector, left);
    if (v < paired(vectors)) {
      before = differ(before, x);
      if (v % 2) x = before;
    }
    store(to + v * kVector, x);
  }
}

// out[row · kSide + query] = differing bits of four rows and four queries, all prepared.
inline void differing(const std::uint8_t* const rows[kSide], const std::uint8_t* const queries[kSide],
                      std::int64_t vectors, std::int32_t* out) {
  constexpr int kPairs = kRows * kQueries;
  const std::int64_t in_pairs = paired(vectors) * kVector, end = vectors * kVector;
  for (int r0 = 0; r0 < kSide; r0 += kRows)
    for (int q0 = 0; q0 < kSide; q0 += kQueries) {
      Vector acc[kPairs], o[kPairs];
#pragma GCC unroll 8
      for (int i = 0; i < kPairs; ++i) acc[i] = o[i] = zero();
      for (std::int64_t at = 0; at < in_pairs; at += 2 * kVector) {
        Vector first[kQueries], all[kQueries];
#pragma GCC unroll 4
        for (int i = 0; i < kQueries; ++i) {
          first[i] = held(load(queries[q0 + i] + at));
          all[i] = held(load(queries[q0 + i] + at + kVector));
        }
#pragma GCC unroll 2
        for (int r = 0; r < kRows; ++r) {
          const Vector row_first = load(rows[r0 + r] + at), row_all = load(rows[r0 + r] + at + kVector);
#pragma GCC unroll 4
          for (int i = 0; i < kQueries; ++i) {
            const int pair = r * kQueries + i;
            const Vector sum = differ(row_all, all[i]);
            acc[pair] = add(acc[pair], count(carry(o[pair], differ(row_first, first[i]), sum)));
            o[pair] = sum;
          }
        }
      }
#pragma GCC unroll 8
      for (int i = 0; i < kPairs; ++i) acc[i] = add(add(acc[i], acc[i]), count(o[i]));
      for (std::int64_t at = in_pairs; at < end; at += kVector)
#pragma GCC unroll 2
        for (int r = 0; r < kRows; ++r) {
          const Vector x = load(rows[r0 + r] + at);
#pragma GCC unroll 4
          for (int i = 0; i < kQueries; ++i) {
            const int pair = r * kQueries + i;
            acc[pair] = add(acc[pair], count(differ(x, load(queries[q0 + i] + at))));
          }
        }
#if defined(__AVX512BW__)
      totals(acc, out + r0 * kSide);
#else
      for (int r = 0; r < kRows; ++r)
        for (int i = 0; i < kQueries; ++i) out[(r0 + r) * kSide + q0 + i] = total(acc[r * kQueries + i]);
#endif
    }
}

struct Scan {
  const std::uint8_t* queries;
  std::int64_t count;
  const std::uint8_t* rows;
  std::int64_t row_stride, n, bytes, sections;
  const std::int64_t *starts, *widths;
  const float *query_scale, *row_scale;
  std::int64_t top;

  std::int64_t vectors(std::int64_t part) const { return (starts[part + 1] - starts[part] + kVector - 1) / kVector; }
  // Bytes of a prepared row.
  std::int64_t prepared() const {
    std::int64_t total = 0;
    for (std::int64_t part = 0; part < sections; ++part) total += vectors(part) * kVector;
    return total;
  }
  void prepare_row(const std::uint8_t* from, std::uint8_t* to) const {
    for (std::int64_t part = 0; part < sections; ++part) {
      prepare(from + starts[part], starts[part + 1] - starts[part], vectors(part), to);
      to += vectors(part) * kVector;
    }
  }
  // Rows that stay in the cache together.
  std::int64_t tile_rows() const {
    const std::int64_t fit = kL1Bytes / std::max<std::int64_t>(1, prepared()) / kSide * kSide;
    return std::min(kMaxRows, std::max<std::int64_t>(kSide, fit));
  }
};

// Scores of four prepared rows with four prepared queries; scales are [sections][4] and [sections][padded].
inline void tile_scores(const Scan& s, const std::uint8_t* row, const std::uint8_t* query, std::int64_t size,
                        const float* row_scales, const float* query_scales, std::int64_t padded, float* scores) {
  const std::uint8_t *rows[kSide], *queries[kSide];
  for (int i = 0; i < kSide; ++i) {
    rows[i] = row + i * size;
    queries[i] = query + i * size;
  }
  for (int i = 0; i < kTile; ++i) scores[i] = 0.0f;
  for (std::int64_t part = 0; part < s.sections; ++part) {
    std::int32_t counts[kTile];
    const std::int64_t vectors = s.vectors(part);
    differing(rows, queries, vectors, counts);
    const float *of_row = row_scales + part * kSide, *of_query = query_scales + part * padded;
    const std::int32_t width = static_cast<std::int32_t>(s.widths[part]);
    for (int r = 0; r < kSide; ++r)
      for (int q = 0; q < kSide; ++q)
        scores[r * kSide + q] += of_row[r] * of_query[q] * static_cast<float>(width - 2 * counts[r * kSide + q]);
    for (int i = 0; i < kSide; ++i) {
      rows[i] += vectors * kVector;
      queries[i] += vectors * kVector;
    }
  }
}

// What the parts share: prepared queries [padded], their scales [sections][padded].
struct Shared {
  const std::uint8_t* queries;
  const float* scales;
  std::int64_t padded, size, tile;
};

// Rows `first` to `last` past all queries: hits into heaps [count][top]. `rows` and `row_scales` hold one tile.
void scan_part(const Scan& s, const Shared& shared, std::int64_t first, std::int64_t last, Hit* heaps,
               std::int64_t* sizes, float* threshold, std::uint8_t* rows, float* row_scales) {
  for (std::int64_t r0 = first; r0 < last; r0 += shared.tile) {
    const std::int64_t end = std::min(last, r0 + shared.tile);
    for (std::int64_t r = r0; r < (end - r0 + kSide - 1) / kSide * kSide + r0; ++r) {
      const std::int64_t row = std::min(r, end - 1);  // beyond the end the last one again, whose score is not used
      s.prepare_row(s.rows + row * s.row_stride, rows + (r - r0) * shared.size);
      const std::int64_t tile = (r - r0) / kSide, place = (r - r0) % kSide;
      for (std::int64_t part = 0; part < s.sections; ++part)
        row_scales[(tile * s.sections + part) * kSide + place] =
            s.row_scale ? s.row_scale[row * s.sections + part] : 1.0f;
    }
    const std::uint8_t* next = s.rows + end * s.row_stride;
    const std::int64_t ahead = std::min(shared.tile, last - end) * s.row_stride;
    for (std::int64_t q0 = 0; q0 < s.count; q0 += kSide) {
      for (std::int64_t at = ahead * q0 / s.count / 64 * 64; at < ahead * (q0 + kSide) / s.count && at < ahead;
           at += 64)
        __builtin_prefetch(next + at, 0, 2);
      for (std::int64_t r = r0; r < end; r += kSide) {
        float scores[kTile];
        tile_scores(s, rows + (r - r0) * shared.size, shared.queries + q0 * shared.size, shared.size,
                    row_scales + (r - r0) * s.sections, shared.scales + q0, shared.padded, scores);
        const float* limit = threshold + q0;
        int any = 0;
        for (int i = 0; i < kTile; ++i) any |= scores[i] > limit[i % kSide];
        if (!any) continue;
        for (int i = 0; i < kTile; ++i) {  // rows rise for each query: an equal score that comes later does not enter
          const std::int64_t row = r + i / kSide, query = q0 + i % kSide;
          if (row >= end || query >= s.count || !(scores[i] > threshold[query])) continue;
          Hit* heap = heaps + query * s.top;
          keep(heap, sizes[query], s.top, {scores[i] + 0.0f, row});
          if (sizes[query] == s.top) threshold[query] = heap[0].value;
        }
      }
    }
  }
}

template <typename T>
std::unique_ptr<T[]> reserve(std::int64_t count) {
  return std::unique_ptr<T[]>(new (std::nothrow) T[static_cast<std::size_t>(count)]);
}

int scan(const Scan& s, float* values, std::int64_t* indices, int threads) {
  // One part of the rows a thread; the order of hits is total, so the answer does not depend on the parts.
  const std::int64_t parts = std::max<std::int64_t>(1, std::min<std::int64_t>(threads, s.n / 1024));
  const std::int64_t padded = (s.count + kSide - 1) / kSide * kSide, size = s.prepared(), tile = s.tile_rows();
  const auto heaps = reserve<Hit>(parts * s.count * s.top);
  const auto sizes = reserve<std::int64_t>(parts * s.count);
  const auto limits = reserve<float>(parts * padded);
  const auto queries = reserve<std::uint8_t>(padded * size + 64),
             rows = reserve<std::uint8_t>(parts * (tile * size + 64) + 64);
  const auto scales = reserve<float>(s.sections * padded), row_scales = reserve<float>(parts * tile * s.sections);
  if (!heaps || !sizes || !limits || !queries || !rows || !scales || !row_scales) return pyinf::kInvalidArgument;
  // Vectors that cross a line of the cache take twice as long to load.
  const auto aligned = [](std::uint8_t* x) {
    return reinterpret_cast<std::uint8_t*>((reinterpret_cast<std::uintptr_t>(x) + 63) / 64 * 64);
  };
  std::uint8_t* const prepared = aligned(queries.get());
  for (std::int64_t q = 0; q < padded; ++q) {
    const std::int64_t query = std::min(q, s.count - 1);
    s.prepare_row(s.queries + query * s.bytes, prepared + q * size);
    for (std::int64_t part = 0; part < s.sections; ++part)
      scales[static_cast<std::size_t>(part * padded + q)] =
          s.query_scale ? s.query_scale[query * s.sections + part] : 1.0f;
  }
  for (std::int64_t i = 0; i < parts * padded; ++i)
    limits[static_cast<std::size_t>(i)] = -std::numeric_limits<float>::infinity();
  for (std::int64_t i = 0; i < parts * s.count; ++i) sizes[static_cast<std::size_t>(i)] = 0;
  const Shared shared{prepared, scales.get(), padded, size, tile};
#pragma omp parallel for schedule(static, 1) num_threads(threads)
  for (std::int64_t part = 0; part < parts; ++part)
    scan_part(s, shared, s.n * part / parts, s.n * (part + 1) / parts, heaps.get() + part * s.count * s.top,
              sizes.get() + part * s.count, limits.get() + part * padded,
              aligned(rows.get()) + part * ((tile * size + 63) / 64 * 64), row_scales.get() + part * tile * s.sections);
  for (std::int64_t q = 0; q < s.count; ++q) {
    Hit* best = heaps.get() + q * s.top;
    std::int64_t& kept = sizes[static_cast<std::size_t>(q)];
    for (std::int64_t part = 1; part < parts; ++part)
      for (std::int64_t i = 0; i < sizes[static_cast<std::size_t>(part * s.count + q)]; ++i)
        keep(best, kept, s.top, heaps[static_cast<std::size_t>((part * s.count + q) * s.top + i)]);
    std::sort(best, best + kept, better);
    for (std::int64_t i = 0; i < kept; ++i) {
      values[q * s.top + i] = best[i].value;
      indices[q * s.top + i] = best[i].index;
    }
  }
  return pyinf::kOk;
}

}  // namespace

namespace pyinf::cpu {

int PYINF_NAME(scan_bits_)(const std::uint8_t* queries, std::int64_t count, const std::uint8_t* rows,
                           std::int64_t row_stride, std::int64_t n, std::int64_t bytes, std::int64_t sections,
                           const std::int64_t* starts, const std::int64_t* widths, const float* query_scale,
                           const float* row_scale, std::int64_t top, float* values, std::int64_t* indices,
                           int threads) {
  const Scan s{queries, count, rows, row_stride, n, bytes, sections, starts, widths, query_scale, row_scale, top};
  return scan(s, values, indices, threads);
}

}  // namespace pyinf::cpu
