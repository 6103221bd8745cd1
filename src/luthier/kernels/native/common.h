/* What all kernels share: the vector type, the exponential, and how rows are divided among threads. */

#include <math.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#if defined(__AVX512F__)
#include <immintrin.h>
#endif

#define EXPORT __attribute__((visibility("default")))
#define INLINE static inline __attribute__((always_inline))

typedef float v16 __attribute__((vector_size(64), aligned(4), may_alias)); /* the compiler splits it where registers are shorter */

/* e^x to 2 units in the last place: 2^n p(f), n the nearest integer to x log2(e), f the rest. Below -87 it is about 1e-38, and NaN
   stays NaN. */
INLINE float exponential(float x) {
    float y = x * 1.44269504088896f;
    y = y < -126.0f ? -126.0f : y;
    y = y > 127.0f ? 127.0f : y;
    float n = rintf(y);
    float f = y - n;
    float p = 1.54035304e-4f; /* ln(2)^k / k! */
    p = p * f + 1.33335581e-3f;
    p = p * f + 9.61812911e-3f;
    p = p * f + 5.55041087e-2f;
    p = p * f + 2.40226507e-1f;
    p = p * f + 6.93147181e-1f;
    p = p * f + 1.0f;
    union { int32_t bits; float value; } power = {((int32_t)n + 127) << 23};
    return p * power.value;
}

/* Below this many numbers a second thread costs more than it saves. */
#define ALONE 16384
