// Philox4x32-10 (Salmon et al., SC 2011), on host and device, and how an element of a random matrix is read from it.
// pyinf/ops/philox.py is the same in PyTorch and says what the counter holds; tests compare the two bit for bit.
#pragma once

#include <cmath>
#include <cstdint>

#if defined(__CUDACC__)
#define PYINF_HOST_DEVICE __host__ __device__ __forceinline__
#else
#define PYINF_HOST_DEVICE inline
#endif

namespace pyinf {

struct Philox4 {
  std::uint32_t w[4];
};

constexpr std::uint32_t kPhiloxM0 = 0xD2511F53u, kPhiloxM1 = 0xCD9E8D57u;
constexpr std::uint32_t kPhiloxW0 = 0x9E3779B9u, kPhiloxW1 = 0xBB67AE85u;
constexpr std::uint32_t kNormalBit = 0x80000000u, kSparseBit = 0x40000000u;

static PYINF_HOST_DEVICE Philox4 philox4x32(std::uint32_t c0, std::uint32_t c1, std::uint32_t c2, std::uint32_t c3,
                                            std::uint32_t k0, std::uint32_t k1) {
  for (int round = 0; round < 10; ++round) {
    const std::uint64_t p0 = static_cast<std::uint64_t>(kPhiloxM0) * c0;
    const std::uint64_t p1 = static_cast<std::uint64_t>(kPhiloxM1) * c2;
    const std::uint32_t next0 = static_cast<std::uint32_t>(p1 >> 32) ^ c1 ^ k0;
    const std::uint32_t next2 = static_cast<std::uint32_t>(p0 >> 32) ^ c3 ^ k1;
    c1 = static_cast<std::uint32_t>(p1);
    c3 = static_cast<std::uint32_t>(p0);
    c0 = next0;
    c2 = next2;
    k0 += kPhiloxW0;
    k1 += kPhiloxW1;
  }
  return {{c0, c1, c2, c3}};
}

// The call that holds the sign bits of elements (i, 128·block .. 128·block + 127).
static PYINF_HOST_DEVICE Philox4 philox_signs(std::uint64_t seed, std::uint32_t stream, std::uint64_t i,
                                              std::uint32_t block) {
  return philox4x32(block, static_cast<std::uint32_t>(i), static_cast<std::uint32_t>(i >> 32), stream,
                    static_cast<std::uint32_t>(seed), static_cast<std::uint32_t>(seed >> 32));
}

struct Normal4 {
  float v[4];
};

// Elements (i, 4·block .. 4·block + 3) of the normal matrix, by Box–Muller in float32: within 1e-6 of the float64
// values.
static PYINF_HOST_DEVICE Normal4 philox_normals(std::uint64_t seed, std::uint32_t stream, std::uint64_t i,
                                                std::uint32_t block) {
  constexpr float kUnit = 1.0f / 4294967296.0f;
  const Philox4 out = philox_signs(seed, stream | kNormalBit, i, block);
  Normal4 normal;
  for (int pair = 0; pair < 2; ++pair) {
    const std::uint32_t u = out.w[2 * pair];
    // Near 1 the logarithm is taken of what is missing to 1, which float32 holds exactly there.
    const float log_u = u < 0x80000000u ? logf(static_cast<float>(u + 1) * kUnit)
                                        : log1pf(-static_cast<float>(0xFFFFFFFFu - u) * kUnit);
    const float radius = sqrtf(-2.0f * log_u);
    const float half_turns = static_cast<float>(static_cast<std::int32_t>(out.w[2 * pair + 1])) * (2.0f * kUnit);
    float sine, cosine;
#ifdef __CUDA_ARCH__
    sincospif(half_turns, &sine, &cosine);
#else
    sine = static_cast<float>(std::sin(3.14159265358979323846 * half_turns));
    cosine = static_cast<float>(std::cos(3.14159265358979323846 * half_turns));
#endif
    normal.v[2 * pair] = radius * cosine;
    normal.v[2 * pair + 1] = radius * sine;
  }
  return normal;
}

struct SparseEntry {
  std::uint32_t bucket;
  bool negative;
};

// The s-th non-zero of input coordinate i among k buckets.
static PYINF_HOST_DEVICE SparseEntry philox_sparse(std::uint64_t seed, std::uint32_t stream, std::uint64_t i,
                                                   std::uint32_t s, std::uint32_t k) {
  const Philox4 out = philox_signs(seed, stream | kSparseBit, i, s);
  return {static_cast<std::uint32_t>((static_cast<std::uint64_t>(out.w[0]) * k) >> 32), (out.w[1] & 1u) != 0};
}

}  // namespace pyinf
