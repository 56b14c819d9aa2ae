// Compiled for avx512 and its instruction that counts bits (a compiler that ignores the pragma counts as avx512 does):
// see scan_impl.h.
#pragma GCC target("avx512vpopcntdq")
#define PYINF_ISA_NAME avx512popcnt
#include "pyinf/cpu/scan_impl.h"
