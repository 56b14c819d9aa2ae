// Compiled for avx512: see projection_impl.h.
#define PYINF_VECTOR_BYTES 64
#define PYINF_ISA_NAME avx512
#include "pyinf/cpu/projection_impl.h"
