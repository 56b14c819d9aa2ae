// Element types in memory and their value in the accumulator's type. Everything is static: files that include this are
// compiled for different processors, and the linker must not merge their copies.
#pragma once

#include <cstdint>
#include <cstring>

#include "pyinf/dtype.h"

namespace pyinf::cpu {

struct Half {
  std::uint16_t bits;
};
struct BFloat16 {
  std::uint16_t bits;
};

static inline float bits_to_float(std::uint32_t bits) {
  float value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}

static inline float load_value(float x) { return x; }
static inline double load_value(double x) { return x; }
static inline float load_value(BFloat16 x) { return bits_to_float(static_cast<std::uint32_t>(x.bits) << 16); }
static inline float load_value(Half x) {
  // Exponent and fraction moved to float's places, then the bias corrected by a product: right for subnormals too.
  const std::uint32_t magnitude = static_cast<std::uint32_t>(x.bits & 0x7fffu) << 13;
  float value = bits_to_float(magnitude) * 0x1p112f;
  std::uint32_t bits;
  std::memcpy(&bits, &value, sizeof bits);
  bits |= (x.bits & 0x7c00u) == 0x7c00u ? 0x7f800000u : 0u;
  return bits_to_float(bits | (static_cast<std::uint32_t>(x.bits & 0x8000u) << 16));
}

}  // namespace pyinf::cpu
