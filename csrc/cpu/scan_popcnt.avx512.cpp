// Compiled for avx512 and its instruction that counts bits: see scan_impl.h. Another compiler than GCC counts as
// avx512 does. GCC takes the pragma, but its macros do not follow (its lexer is ahead of it), hence one of our own.
#if defined(__GNUC__) && !defined(__clang__)
#pragma GCC target("avx512vpopcntdq")
#define PYINF_VPOPCNTDQ
#endif
#define PYINF_ISA_NAME avx512popcnt
#include "pyinf/cpu/scan_impl.h"
