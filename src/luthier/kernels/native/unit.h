/* Numbers as the kernels read, multiply and write them.

   A tensor's numbers are `element`s: float, or bfloat16 kept in 16 bits. A matrix product works on `unit`s of 32 bits: a
   float, or, where the processor multiplies pairs of bfloat16 (AVX512-BF16, one instruction for 32 products), two of
   them that lie next to each other along the dimension that is summed over. Everything is summed in float.

   Included once for each element type: ELEMENT_BF16 is 1 or 0, NAME(f) adds the type's suffix to a function's name. */

#undef element
#undef NAME
#undef PAIRED
#undef PER_UNIT

#if ELEMENT_BF16
#define element uint16_t
#define NAME(f) f##_bf16
#else
#define element float
#define NAME(f) f##_fp32
#endif

#if ELEMENT_BF16 && defined(__AVX512BF16__)
#define PAIRED 1
#define PER_UNIT 2
#else
#define PAIRED 0
#define PER_UNIT 1
#endif

static inline float NAME(widen)(element x) {
#if ELEMENT_BF16
    union { uint32_t bits; float value; } wide = {(uint32_t)x << 16};
    return wide.value;
#else
    return x;
#endif
}

/* To the nearest, ties to even, as torch rounds. */
static inline element NAME(narrow)(float x) {
#if ELEMENT_BF16
    union { float value; uint32_t bits; } wide = {x};
    return (element)((wide.bits + 0x7fffu + ((wide.bits >> 16) & 1u)) >> 16);
#else
    return x;
#endif
}

/* The unit that holds x, and y after it where a unit holds two. */
static inline uint32_t NAME(unit)(element x, element y) {
#if PAIRED
    return (uint32_t)x | (uint32_t)y << 16;
#else
    union { float value; uint32_t bits; } wide = {NAME(widen)(x)};
    (void)y;
    return wide.bits;
#endif
}
