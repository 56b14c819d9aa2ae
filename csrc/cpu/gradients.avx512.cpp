// Compiled for avx512: see gradients_impl.h.
#define PYINF_VECTOR_BYTES 64
#define PYINF_ISA_NAME avx512
#include "pyinf/cpu/gradients_impl.h"
