/* Kernels of a decoder layer for CPUs, with their gradients, for fp32 and bf16. ../native.py calls them through ctypes.

   Plain C: the compiler makes vectors of the loops, and this file is compiled once for each instruction set that is
   worth it (setup.py). The one place with instructions by name is the product of pairs of bfloat16 (product.h). */

#include "common.h"

/* Counted up with every change to what a function takes or does: ../native.py refuses a library of another number. */
EXPORT int interface(void) { return 2; }

/* Whether this processor runs what this file was compiled for. */
EXPORT int supported(void) {
#if defined(__x86_64__)
    __builtin_cpu_init();
#if defined(__AVX512BF16__)
    return __builtin_cpu_supports("avx512bf16") && __builtin_cpu_supports("avx512bw");
#elif defined(__AVX512F__)
    return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl");
#elif defined(__AVX2__)
    return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
#endif
#endif
    return 1;
}

#define ELEMENT_BF16 0
#include "unit.h"
#include "product.h"
#include "pointwise.h"
#include "cross_entropy.h"
#include "attention.h"
#include "decode.h"

#undef ELEMENT_BF16
#define ELEMENT_BF16 1
#include "unit.h"
#include "product.h"
#include "pointwise.h"
#include "cross_entropy.h"
#include "attention.h"
#include "decode.h"
