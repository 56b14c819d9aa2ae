// Compiled for avx2: see scan_impl.h.
#define PYINF_ISA_NAME avx2
#include "pyinf/cpu/scan_impl.h"
