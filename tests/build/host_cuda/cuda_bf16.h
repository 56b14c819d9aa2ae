#pragma once
#include "emulator.h"

struct __nv_bfloat16 {
  std::uint16_t bits;
  __nv_bfloat16() = default;
  explicit __nv_bfloat16(float v) {
    std::uint32_t word;
    std::memcpy(&word, &v, 4);
    bits = static_cast<std::uint16_t>((word + 0x7fffu + (word >> 16 & 1)) >> 16);
  }
  explicit operator float() const {
    const std::uint32_t word = static_cast<std::uint32_t>(bits) << 16;
    float v;
    std::memcpy(&v, &word, 4);
    return v;
  }
};
