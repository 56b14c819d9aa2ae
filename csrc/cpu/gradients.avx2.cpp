// Compiled for avx2: see gradients_impl.h.
#define PYINF_VECTOR_BYTES 32
#define PYINF_ISA_NAME avx2
#include "pyinf/cpu/gradients_impl.h"
