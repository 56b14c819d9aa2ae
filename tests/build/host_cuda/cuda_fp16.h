#pragma once
#include "emulator.h"

struct __half {
  _Float16 value;
  __half() = default;
  explicit __half(float v) : value(static_cast<_Float16>(v)) {}
  explicit operator float() const { return static_cast<float>(value); }
};
