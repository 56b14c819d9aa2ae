// PYINF_SELECT(isa, name_, arguments...): the instance of a kernel for the best instruction set not above `isa` (what
// the caller allows) nor above what this processor has.
#pragma once

#include "pyinf/cpu/isa.h"

#if defined(__x86_64__)
#define PYINF_SELECT(isa, name, ...)                                       \
  ((isa) >= kAvx512 && detect_isa() >= kAvx512 ? name##avx512(__VA_ARGS__) \
   : (isa) >= kAvx2 && detect_isa() >= kAvx2   ? name##avx2(__VA_ARGS__)   \
                                               : name##generic(__VA_ARGS__))
#else
#define PYINF_SELECT(isa, name, ...) name##generic(__VA_ARGS__)
#endif
