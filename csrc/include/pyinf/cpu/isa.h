// Run-time choice of instruction set. Files named *.avx2.cpp and *.avx512.cpp are compiled with those flags; anything
// in them that is not in an unnamed namespace must have a name of its own, so that the linker never picks an inline
// function built for a newer processor than the one at hand.
#pragma once

namespace pyinf::cpu {

enum Isa : int { kGeneric = 0, kAvx2 = 1, kAvx512 = 2, kAvx512Bf16 = 3, kAvx512Popcnt = 4 };

// The best level that this processor and operating system run (it does not look at what was compiled).
inline Isa detect_isa() {
#if (defined(__x86_64__) || defined(_M_X64)) && (defined(__GNUC__) || defined(__clang__))
  static const Isa level = [] {
    __builtin_cpu_init();
    const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
    const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                        __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
    if (avx512 && __builtin_cpu_supports("avx512bf16")) return kAvx512Bf16;
    if (avx512) return kAvx512;
    return avx2 ? kAvx2 : kGeneric;
  }();
  return level;
#else
  return kGeneric;
#endif
}

// Whether the processor counts bits in vectors (AVX-512 VPOPCNTDQ), which goes with no level of its own.
inline bool has_vpopcntdq() {
#if (defined(__x86_64__) || defined(_M_X64)) && (defined(__GNUC__) || defined(__clang__))
  static const bool has = [] {
    __builtin_cpu_init();
    return __builtin_cpu_supports("avx512vpopcntdq") != 0;
  }();
  return has;
#else
  return false;
#endif
}

}  // namespace pyinf::cpu
