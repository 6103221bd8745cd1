/* One step of decoding: the next token of each of R texts through all layers of a model; ../decoding.py calls it and
   ../../model/decoder.py has the formulas. Every row is computed by the same instructions whatever rows stand beside
   it, so a text's numbers do not depend, to the last bit, on what is decoded with it, nor on the number of threads.

   Weights lie as a model's files have them, (outputs, inputs), and are read once for up to ROWS rows at a time: the
   weights' way from memory is what a step of few rows costs.

   Legend: R rows, I inputs, O outputs, H query heads, K key heads, G = H / K, d head size, S cached tokens. */

#ifndef DECODE_H
#define DECODE_H

#include <omp.h>

#define ROWS 8     /* rows that the weights are read for at a time */
#define SUMS 16    /* of one tile, in registers: 1 row x 8 outputs (the rest idle), 4 x 4, or 8 x 2 */
#define CHUNK 16   /* outputs that a thread takes at a time */
#define PIECES 3   /* matrices with the same input that are taken together */

/* As ../decoding.py lays them out. a (rank, I) and b (O, rank) are an adapter's; rank 0: none. */
typedef struct { const void *weight, *bias, *a, *b; int64_t outputs, inputs, rank; double scaling; } Matrix;
typedef struct { const void *attention_norm, *mlp_norm, *q_norm, *k_norm; Matrix q, k, v, o, gate, up, down; int64_t window; } DecodeLayer;
typedef struct {
    const void *embedding, *norm;
    Matrix head;
    const DecodeLayer *layers;
    int64_t count, hidden, inner, heads, key_heads, size;
    double eps;
} DecodeModel;
/* cached[row][2 layer] are a text's keys and the next its values, (S, K, d) with room for one more. */
typedef struct { void ***cached; const int64_t *ids, *lengths; const void *cosine, *sine; int64_t rows, threads; } DecodeRows;

/* One product of several with the same input: y (R, outputs) = x w' + bias, + what stands in `onto` (y itself, too). */
typedef struct { const void *weight, *bias, *onto; void *y; long outputs; double scaling; } Piece;

/* How many numbers ahead weights are asked for: whole tiles, 8 KiB at least. Rows of one are too short for the processor
   to see by itself where the reading goes. */
INLINE long tiles_ahead(long tile, long bytes) { return (8192 / (tile * bytes) + 1) * tile; }

/* to[k] = the sum across sums[k]. Not inlined: where sums may be reordered, a copy in each caller could add in an order of
   its own, and a row's numbers would depend on how many rows stand beside it. */
#if defined(__AVX512F__)
__attribute__((noinline, noclone)) static void sums_across(const v16 *sums, float *to) {
    __m256 half[8];
    for (int k = 0; k < 8; k++) {
        __m512 whole = (__m512)sums[k];
        half[k] = _mm256_add_ps(_mm512_castps512_ps256(whole), _mm512_extractf32x8_ps(whole, 1));
    }
    __m256 low = _mm256_hadd_ps(_mm256_hadd_ps(half[0], half[1]), _mm256_hadd_ps(half[2], half[3]));
    __m256 high = _mm256_hadd_ps(_mm256_hadd_ps(half[4], half[5]), _mm256_hadd_ps(half[6], half[7]));
    _mm256_storeu_ps(to, _mm256_add_ps(_mm256_permute2f128_ps(low, high, 0x20), _mm256_permute2f128_ps(low, high, 0x31)));
}
#else
__attribute__((noinline, noclone)) static void sums_across(const v16 *sums, float *to) {
    for (int k = 0; k < 8; k++) {
        float a[8];
        for (int i = 0; i < 8; i++) a[i] = sums[k][i] + sums[k][i + 8];
        to[k] = ((a[0] + a[4]) + (a[2] + a[6])) + ((a[1] + a[5]) + (a[3] + a[7]));
    }
}
#endif

#endif

/* 16 numbers, widened. */
INLINE void NAME(load)(const element *x, v16 *to) {
#if ELEMENT_BF16
    typedef uint16_t short16 __attribute__((vector_size(32), aligned(2), may_alias));
    typedef uint32_t int16 __attribute__((vector_size(64), aligned(4), may_alias));
    *(int16 *)to = __builtin_convertvector(*(const short16 *)x, int16) << 16;
#else
    *to = *(const v16 *)x;
#endif
}

/* to[r][o] = row r of x times row o of w: constants for rows and outputs keep the sums in registers. */
INLINE void NAME(dots)(const int rows, const int outputs, long I, const element *const *x, const element *const *w, float *to) {
    v16 sum[SUMS] = {{0}};
    long i = 0, ahead = tiles_ahead(outputs * I, sizeof(element));
#if PAIRED
    for (; i < I; i += 32) {
        __mmask32 inside = I - i >= 32 ? 0xffffffffu : (1u << (I - i)) - 1u;
        __m512bh weights[SUMS];
#pragma GCC unroll 16
        for (int o = 0; o < outputs; o++) {
            weights[o] = (__m512bh)_mm512_maskz_loadu_epi16(inside, w[o] + i);
            __builtin_prefetch(w[o] + i + ahead);
        }
#pragma GCC unroll 16
        for (int r = 0; r < rows; r++) {
            __m512bh row = (__m512bh)_mm512_maskz_loadu_epi16(inside, x[r] + i);
#pragma GCC unroll 16
            for (int o = 0; o < outputs; o++)
                sum[r * outputs + o] = (v16)_mm512_dpbf16_ps((__m512)sum[r * outputs + o], row, weights[o]);
        }
    }
#else
    for (; i + 16 <= I; i += 16) {
        v16 weights[SUMS];
#pragma GCC unroll 16
        for (int o = 0; o < outputs; o++) {
            NAME(load)(w[o] + i, &weights[o]);
            __builtin_prefetch(w[o] + i + ahead);
        }
#pragma GCC unroll 16
        for (int r = 0; r < rows; r++) {
            v16 row;
            NAME(load)(x[r] + i, &row);
#pragma GCC unroll 16
            for (int o = 0; o < outputs; o++) sum[r * outputs + o] += row * weights[o];
        }
    }
    if (i < I) { /* the last ones as a whole vector, filled up with zeros */
        size_t rest = (size_t)(I - i) * sizeof(element);
        element some[16] = {0};
        v16 weights[SUMS];
        for (int o = 0; o < outputs; o++) memcpy(some, w[o] + i, rest), NAME(load)(some, &weights[o]);
        for (int r = 0; r < rows; r++) {
            memcpy(some, x[r] + i, rest);
            v16 row;
            NAME(load)(some, &row);
            for (int o = 0; o < outputs; o++) sum[r * outputs + o] += row * weights[o];
        }
    }
#endif
    v16 whole[SUMS]; /* whose address is taken; `sum` stays in registers */
#pragma GCC unroll 16
    for (int k = 0; k < rows * outputs; k++) whole[k] = sum[k];
    for (int k = 0; k < rows * outputs; k += 8) sums_across(whole + k, to + k);
}

/* `rows` (at most ROWS) from r on, `count` outputs (at most CHUNK) from `from` on, of one piece. A tile that would reach
   beyond the last row or output takes that one again. */
static void NAME(some_outputs)(const Piece *piece, const element *x, long I, long r, long rows, long from, long count) {
    float sums[ROWS][CHUNK];
    const element *w = (const element *)piece->weight + from * I, *bias = piece->bias, *onto = piece->onto;
    const element *x_rows[ROWS], *w_rows[8];
    long high = rows == 1 ? 1 : rows <= 4 ? 4 : 8, wide = high == 1 ? 8 : SUMS / high;
    for (long row = 0; row < high; row++) x_rows[row] = x + (r + least(row, rows - 1)) * I;
    for (long o = 0; o < count; o += wide) {
        float tile[SUMS];
        for (long k = 0; k < wide; k++) w_rows[k] = w + least(o + k, count - 1) * I;
        if (high == 1) NAME(dots)(1, 8, I, x_rows, w_rows, tile);
        else if (high == 4) NAME(dots)(4, 4, I, x_rows, w_rows, tile);
        else NAME(dots)(8, 2, I, x_rows, w_rows, tile);
        for (long row = 0; row < high; row++)
            for (long k = 0; k < wide; k++) sums[row][o + k] = tile[row * wide + k];
    }
    float scaling = (float)piece->scaling;
    for (long row = 0; row < rows; row++) {
        float *line = sums[row];
        long at = (r + row) * piece->outputs + from;
        element *y = (element *)piece->y + at;
        for (long o = 0; o < count; o++) line[o] *= scaling;
        if (bias)
            for (long o = 0; o < count; o++) line[o] += NAME(widen)(bias[from + o]);
        if (onto)
            for (long o = 0; o < count; o++) line[o] = NAME(widen)(NAME(narrow)(line[o])) + NAME(widen)(onto[at + o]); /* as the reference is rounded */
        for (long o = 0; o < count; o++) y[o] = NAME(narrow)(line[o]);
    }
}

/* All pieces, x (R, I) being the input of each. */
static void NAME(products)(const Piece *pieces, int count, const element *x, long R, long I, long threads) {
    long chunks[PIECES], total = 0, weights = 0;
    for (int p = 0; p < count; p++) {
        chunks[p] = (pieces[p].outputs + CHUNK - 1) / CHUNK;
        total += chunks[p], weights += pieces[p].outputs * I;
    }
#pragma omp parallel for num_threads(threads) schedule(static) if (threads > 1 && weights > ALONE)
    for (long chunk = 0; chunk < total; chunk++) {
        long number = chunk;
        const Piece *piece = pieces;
        while (number >= chunks[piece - pieces]) number -= chunks[piece - pieces], piece++;
        long from = number * CHUNK, outputs = least(CHUNK, piece->outputs - from);
        for (long r = 0; r < R; r += ROWS) NAME(some_outputs)(piece, x, I, r, least(ROWS, R - r), from, outputs);
    }
}

/* y = x w' + bias of each matrix, and of its adapter s (x a') b' where it has one. `low` has room for what PIECES ranks make. */
static void NAME(matrices)(const Matrix *const *m, int count, const element *x, element *const *y, element *low, long R, long threads) {
    Piece whole[PIECES], thin[PIECES], back[PIECES];
    int adapted = 0;
    for (int p = 0; p < count; p++) {
        whole[p] = (Piece){m[p]->weight, m[p]->bias, NULL, y[p], m[p]->outputs, 1.0};
        if (!m[p]->rank) continue;
        thin[adapted] = (Piece){m[p]->a, NULL, NULL, low, m[p]->rank, m[p]->scaling};
        back[adapted++] = (Piece){m[p]->b, NULL, y[p], y[p], m[p]->outputs, 1.0};
        low += R * m[p]->rank;
    }
    NAME(products)(whole, count, x, R, m[0]->inputs, threads);
    if (adapted) NAME(products)(thin, adapted, x, R, m[0]->inputs, threads);
    for (int p = 0; p < adapted; p++) NAME(products)(back + p, 1, thin[p].y, R, thin[p].outputs, threads);
}

/* The queries of one key head of one text, G of them, over its S cached tokens from `first` on; room: G (S + 2 d) + d. */
static void NAME(attend_cached)(const element *q, const element *k, const element *v, element *o, long G, long d, long stride,
                                long first, long S, float *room) {
    float *query = room, *out = room + G * d, *row = room + 2 * G * d, *scores = row + d, scale = 1.0f / sqrtf((float)d);
    for (long i = 0; i < G * d; i++) query[i] = NAME(widen)(q[i]) * scale, out[i] = 0.0f;
    for (long s = first; s < S; s++) {
        const element *key = k + s * stride;
        for (long j = 0; j < d; j++) row[j] = NAME(widen)(key[j]);
        for (long g = 0; g < G; g++) {
            float sum = 0.0f;
            for (long j = 0; j < d; j++) sum += query[g * d + j] * row[j];
            scores[g * S + s] = sum;
        }
    }
    for (long g = 0; g < G; g++) {
        float *line = scores + g * S, most = line[first], sum = 0.0f;
#pragma omp simd reduction(max : most)
        for (long s = first; s < S; s++) most = line[s] > most ? line[s] : most;
        for (long s = first; s < S; s++) {
            line[s] = exponential(line[s] - most);
            sum += line[s];
        }
        float share = 1.0f / sum;
        for (long s = first; s < S; s++) line[s] *= share;
    }
    for (long s = first; s < S; s++) {
        const element *value = v + s * stride;
        for (long j = 0; j < d; j++) row[j] = NAME(widen)(value[j]);
        for (long g = 0; g < G; g++) {
            float weight = scores[g * S + s];
            for (long j = 0; j < d; j++) out[g * d + j] += weight * row[j];
        }
    }
    for (long i = 0; i < G * d; i++) o[i] = NAME(narrow)(out[i]);
}

typedef struct { element *h, *x, *q, *k, *v, *o, *gate, *up, *low, *cosine, *sine; float *room; long each; } NAME(Scratch);

/* Puts the new keys and values behind the cached ones, and attends. */
static void NAME(attend_rows)(const DecodeModel *m, const DecodeRows *rows, long number, const NAME(Scratch) *s) {
    long d = m->size, K = m->key_heads, G = m->heads / K, R = rows->rows, window = m->layers[number].window;
#pragma omp parallel for num_threads(rows->threads) schedule(dynamic, 1) if (rows->threads > 1)
    for (long task = 0; task < R * K; task++) {
        long r = task / K, head = task % K, S = rows->lengths[r] + 1;
        element *k = (element *)rows->cached[r][2 * number] + head * d;
        element *v = (element *)rows->cached[r][2 * number + 1] + head * d;
        memcpy(k + (S - 1) * K * d, s->k + (r * K + head) * d, (size_t)d * sizeof(element));
        memcpy(v + (S - 1) * K * d, s->v + (r * K + head) * d, (size_t)d * sizeof(element));
        long at = (r * m->heads + head * G) * d, first = window > 0 && S > window ? S - window : 0;
        NAME(attend_cached)(s->q + at, k, v, s->o + at, G, d, K * d, first, S, s->room + omp_get_thread_num() * s->each);
    }
}

/* h += y, rounded. */
INLINE void NAME(add_to)(element *h, const element *y, long n) {
    for (long i = 0; i < n; i++) h[i] = NAME(narrow)(NAME(widen)(h[i]) + NAME(widen)(y[i]));
}

static void NAME(decode_layer)(const DecodeModel *m, const DecodeRows *rows, long number, const NAME(Scratch) *s) {
    const DecodeLayer *layer = m->layers + number;
    long D = m->hidden, R = rows->rows, d = m->size, threads = rows->threads;
    float eps = (float)m->eps;
    NAME(rms_norm)(s->h, layer->attention_norm, s->x, R, D, eps);
    NAME(matrices)((const Matrix *[]){&layer->q, &layer->k, &layer->v}, 3, s->x, (element *[]){s->q, s->k, s->v}, s->low, R, threads);
    if (layer->q_norm) {
        NAME(rms_norm)(s->q, layer->q_norm, s->q, R * m->heads, d, eps);
        NAME(rms_norm)(s->k, layer->k_norm, s->k, R * m->key_heads, d, eps);
    }
    NAME(rope)(s->q, s->cosine, s->sine, R, m->heads, d, 1.0f);
    NAME(rope)(s->k, s->cosine, s->sine, R, m->key_heads, d, 1.0f);
    NAME(attend_rows)(m, rows, number, s);
    NAME(matrices)((const Matrix *[]){&layer->o}, 1, s->o, (element *[]){s->x}, s->low, R, threads);
    NAME(add_to)(s->h, s->x, R * D);
    NAME(rms_norm)(s->h, layer->mlp_norm, s->x, R, D, eps);
    NAME(matrices)((const Matrix *[]){&layer->gate, &layer->up}, 2, s->x, (element *[]){s->gate, s->up}, s->low, R, threads);
    NAME(swiglu)(s->gate, s->up, s->gate, R * m->inner);
    NAME(matrices)((const Matrix *[]){&layer->down}, 1, s->gate, (element *[]){s->x}, s->low, R, threads);
    NAME(add_to)(s->h, s->x, R * D);
}

/* Numbers of all three adapters that read one input together. */
static long NAME(low_width)(const DecodeModel *m) {
    long most = 0;
    for (long i = 0; i < m->count; i++) {
        const DecodeLayer *l = m->layers + i;
        long ranks[] = {l->q.rank + l->k.rank + l->v.rank, l->o.rank, l->gate.rank + l->up.rank, l->down.rank};
        for (int j = 0; j < 4; j++) most = ranks[j] > most ? ranks[j] : most;
    }
    return most;
}

/* logits (R, V) after one token of each row. Returns 0, or 1 where there is no memory for scratch space. */
EXPORT int NAME(decode)(const DecodeModel *m, const DecodeRows *rows, element *logits) {
    long R = rows->rows, D = m->hidden, d = m->size, H = m->heads, K = m->key_heads, longest = 0;
    for (long r = 0; r < R; r++) longest = rows->lengths[r] + 1 > longest ? rows->lengths[r] + 1 : longest;
    long widths[] = {D, D, H * d, K * d, K * d, H * d, m->inner, m->inner, NAME(low_width)(m), d, d};
    size_t bytes = 0;
    for (int i = 0; i < 11; i++) bytes += ((size_t)(R * widths[i]) * sizeof(element) + 63) / 64 * 64;
    long each = padded(H / K * (longest + 2 * d) + d, 16);
    char *base = aligned_alloc(64, bytes + (size_t)(rows->threads * each) * sizeof(float));
    if (!base) return 1;
    Room room = {base, 0};
    element *at[11];
    for (int i = 0; i < 11; i++) at[i] = piece(&room, (size_t)(R * widths[i]) * sizeof(element));
    NAME(Scratch) s = {at[0], at[1], at[2], at[3], at[4], at[5], at[6], at[7], at[8], at[9], at[10], (float *)(base + room.used), each};
    for (long r = 0; r < R; r++) {
        memcpy(s.h + r * D, (const element *)m->embedding + rows->ids[r] * D, (size_t)D * sizeof(element));
        memcpy(s.cosine + r * d, (const element *)rows->cosine + rows->lengths[r] * d, (size_t)d * sizeof(element));
        memcpy(s.sine + r * d, (const element *)rows->sine + rows->lengths[r] * d, (size_t)d * sizeof(element));
    }
    for (long number = 0; number < m->count; number++) NAME(decode_layer)(m, rows, number, &s);
    NAME(rms_norm)(s.h, m->norm, s.x, R, D, (float)m->eps);
    NAME(matrices)((const Matrix *[]){&m->head}, 1, s.x, (element *[]){logits}, s.low, R, rows->threads);
    free(base);
    return 0;
}
