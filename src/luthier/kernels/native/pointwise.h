/* RMSNorm, rotary positions and SwiGLU, each in one pass over its rows; ../pointwise.py has the formulas.

   Legend: T tokens (rows), D size of a row, H heads, d head size. */

INLINE float NAME(row_scale)(const element *x, long D, float eps) {
    float sum = 0.0f;
    for (long i = 0; i < D; i++) {
        float value = NAME(widen)(x[i]);
        sum += value * value;
    }
    return 1.0f / sqrtf(sum / (float)D + eps);
}

EXPORT int NAME(rms_norm)(const element *x, const element *weight, element *y, long T, long D, float eps) {
#pragma omp parallel for if (T * D > ALONE)
    for (long t = 0; t < T; t++) {
        const element *from = x + t * D;
        element *to = y + t * D;
        float scale = NAME(row_scale)(from, D, eps);
        for (long i = 0; i < D; i++) { /* rounded before the weight is applied, as the reference does */
            float value = NAME(widen)(NAME(narrow)(NAME(widen)(from[i]) * scale));
            to[i] = NAME(narrow)(value * NAME(widen)(weight[i]));
        }
    }
    return 0;
}

/* out = onto + d rms_norm / dx, with n = x scale and g = grad weight: scale (g - n mean(g n)). `onto` may be NULL or out. */
EXPORT int NAME(rms_norm_backward)(const element *grad, const element *x, const element *weight, const element *onto,
                                    element *out, long T, long D, float eps) {
#pragma omp parallel for if (T * D > ALONE)
    for (long t = 0; t < T; t++) {
        const element *g = grad + t * D, *from = x + t * D, *before = onto ? onto + t * D : NULL;
        element *to = out + t * D;
        float scale = NAME(row_scale)(from, D, eps), dot = 0.0f;
        for (long i = 0; i < D; i++) dot += NAME(widen)(g[i]) * NAME(widen)(weight[i]) * NAME(widen)(from[i]);
        float mean = dot * scale * scale / (float)D; /* mean(g n) scale: n is not kept */
        if (before) {
            for (long i = 0; i < D; i++) {
                float value = scale * (NAME(widen)(g[i]) * NAME(widen)(weight[i]) - NAME(widen)(from[i]) * mean);
                to[i] = NAME(narrow)(value + NAME(widen)(before[i]));
            }
        } else {
            for (long i = 0; i < D; i++)
                to[i] = NAME(narrow)(scale * (NAME(widen)(g[i]) * NAME(widen)(weight[i]) - NAME(widen)(from[i]) * mean));
        }
    }
    return 0;
}

/* (a, b) -> (a cos - b sin, b cos + a sin) for the two halves of one head. */
INLINE void NAME(turn)(element *restrict low, element *restrict high, const element *cosine, const element *sine,
                       long half, float sign) {
    for (long i = 0; i < half; i++) {
        float a = NAME(widen)(low[i]), b = NAME(widen)(high[i]);
        float s = sign * NAME(widen)(sine[i]), c = NAME(widen)(cosine[i]);
        low[i] = NAME(narrow)(a * c - b * s);
        high[i] = NAME(narrow)(b * c + a * s);
    }
}

/* In place, H heads of each token; turned back with sign -1. */
EXPORT int NAME(rope)(element *x, const element *cosine, const element *sine, long T, long H, long d, float sign) {
    long half = d / 2, whole = half / 16 * 16, rest = half - whole;
#pragma omp parallel for if (T * H * d > ALONE)
    for (long t = 0; t < T; t++) {
        const element *c = cosine + t * d, *s = sine + t * d;
        element low[16] = {0}, high[16] = {0}, some_c[16] = {0}, some_s[16] = {0};
        memcpy(some_c, c + whole, (size_t)rest * sizeof(element));
        memcpy(some_s, s + whole, (size_t)rest * sizeof(element));
        for (long h = 0; h < H; h++) {
            element *head = x + (t * H + h) * d;
            NAME(turn)(head, head + half, c, s, whole, sign);
            if (!rest) continue;
            memcpy(low, head + whole, (size_t)rest * sizeof(element)); /* the last ones as a whole vector too */
            memcpy(high, head + half + whole, (size_t)rest * sizeof(element));
            NAME(turn)(low, high, some_c, some_s, 16, sign);
            memcpy(head + whole, low, (size_t)rest * sizeof(element));
            memcpy(head + half + whole, high, (size_t)rest * sizeof(element));
        }
    }
    return 0;
}

EXPORT int NAME(swiglu)(const element *gate, const element *up, element *y, long n) {
#pragma omp parallel for simd if (n > ALONE)
    for (long i = 0; i < n; i++) {
        float g = NAME(widen)(gate[i]);
        y[i] = NAME(narrow)(g / (1.0f + exponential(-g)) * NAME(widen)(up[i]));
    }
    return 0;
}

/* gate and up become their gradients, grad the product itself, which the adapter of the next projection needs. */
EXPORT int NAME(swiglu_backward)(element *grad, element *gate, element *up, long n) {
#pragma omp parallel for simd if (n > ALONE)
    for (long i = 0; i < n; i++) {
        float dy = NAME(widen)(grad[i]), g = NAME(widen)(gate[i]), u = NAME(widen)(up[i]);
        float sigmoid = 1.0f / (1.0f + exponential(-g)), silu = g * sigmoid;
        grad[i] = NAME(narrow)(silu * u);
        up[i] = NAME(narrow)(dy * silu);
        gate[i] = NAME(narrow)(dy * u * (sigmoid + silu * (1.0f - sigmoid)));
    }
    return 0;
}
