// Compiled for avx512: see scan_impl.h.
#define PYINF_ISA_NAME avx512
#include "pyinf/cpu/scan_impl.h"
