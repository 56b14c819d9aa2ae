// csrc/include/pyinf/mma.cuh for the emulator: the same layouts of registers, written from the PTX manual.
#pragma once
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include "emulator.h"

namespace pyinf {
namespace emulated {

// Operands of all lanes: A as 16 rows of 32 bytes, B as 8 columns of 32 bytes.
struct Operands {
  unsigned char a[16][32], b[8][32];
};

inline Operands collect(const std::uint32_t (&a)[4], std::uint32_t b0, std::uint32_t b1) {
  auto& words = emulator::exchange[emulator::warp()];
  std::uint32_t* mine = words[emulator::lane()];
  std::memcpy(mine, a, 16);
  mine[4] = b0, mine[5] = b1;
  emulator::warp_wait();
  Operands out;
  for (int l = 0; l < 32; ++l) {
    for (int r = 0; r < 4; ++r) std::memcpy(&out.a[l / 4 + r % 2 * 8][l % 4 * 4 + r / 2 * 16], &words[l][r], 4);
    for (int r = 0; r < 2; ++r) std::memcpy(&out.b[l / 4][l % 4 * 4 + r * 16], &words[l][4 + r], 4);
  }
  emulator::warp_wait();
  return out;
}

template <typename C, typename Product>
void each(C (&c)[4], const Operands& x, Product product) {
  const int g = emulator::lane() / 4, t = emulator::lane() % 4;
  for (int e = 0; e < 4; ++e) c[e] += product(x.a[g + e / 2 * 8], x.b[t * 2 + e % 2]);
}

}  // namespace emulated

template <typename T>
void mma_16(float (&c)[4], const std::uint32_t (&a)[4], std::uint32_t b0, std::uint32_t b1) {
  emulated::each(c, emulated::collect(a, b0, b1), [](const unsigned char* x, const unsigned char* y) {
    double sum = 0;
    for (int k = 0; k < 16; ++k) {
      T u, v;
      std::memcpy(static_cast<void*>(&u), x + 2 * k, 2), std::memcpy(static_cast<void*>(&v), y + 2 * k, 2);
      sum += static_cast<double>(static_cast<float>(u)) * static_cast<float>(v);
    }
    return static_cast<float>(sum);
  });
}
inline void mma_int8(std::int32_t (&c)[4], const std::uint32_t (&a)[4], std::uint32_t b0, std::uint32_t b1) {
  emulated::each(c, emulated::collect(a, b0, b1), [](const unsigned char* x, const unsigned char* y) {
    int sum = 0;
    for (int k = 0; k < 32; ++k) sum += static_cast<std::int8_t>(x[k]) * static_cast<std::int8_t>(y[k]);
    return sum;
  });
}
inline void mma_bits(std::int32_t (&c)[4], const std::uint32_t (&a)[4], std::uint32_t b0, std::uint32_t b1) {
  emulated::each(c, emulated::collect(a, b0, b1), [](const unsigned char* x, const unsigned char* y) {
    int sum = 0;
    for (int k = 0; k < 32; ++k) sum += __builtin_popcount(x[k] & y[k]);
    return sum;
  });
}

namespace emulated {
template <typename Read>
void load(std::uint32_t (&r)[4], const void* row, Read read) {
  if (reinterpret_cast<std::uintptr_t>(row) % 16) {
    std::printf("WRONG: a matrix row is not aligned to 16 bytes\n");
    std::exit(4);
  }
  const void* rows[32];
  emulator::gather(row, rows);
  for (int block = 0; block < 4; ++block) r[block] = read(rows + block * 8, emulator::lane() / 4, emulator::lane() % 4);
}
}  // namespace emulated

template <int kSize>
void copy_async(void* to, const void* from, int count) {
  __pipeline_memcpy_async(to, from, kSize, kSize - count);
}

inline void load_blocks(std::uint32_t (&r)[4], const void* row) {
  emulated::load(r, row, [](const void** rows, int g, int t) {
    std::uint32_t word;
    std::memcpy(&word, static_cast<const char*>(rows[g]) + 4 * t, 4);
    return word;
  });
}
inline void load_blocks_transposed(std::uint32_t (&r)[4], const void* row) {
  emulated::load(r, row, [](const void** rows, int g, int t) {
    std::uint16_t low, high;
    std::memcpy(&low, static_cast<const char*>(rows[2 * t]) + 2 * g, 2);
    std::memcpy(&high, static_cast<const char*>(rows[2 * t + 1]) + 2 * g, 2);
    return std::uint32_t{high} << 16 | low;
  });
}

}  // namespace pyinf
