/* Causal attention within documents that lie one after another, forward and backward; ../attention.py has the formulas.

   One task is a key head of a document with all query heads that share it: keys and values are laid out for the
   products once (`pack_...`, product.h), then QUERIES queries at a time meet all keys that they may see. Their scores
   stay in the cache of one core. Where tasks are few, the blocks of queries of one are dealt out to several `parts`.

   Legend: T tokens, H query heads, K key heads, G = H / K, d head size, L tokens of a document, q first query of a
   block, k first key it sees. q, k, v, o are (T, heads, d) without gaps; lse, log-sum-exp, is (T, H) floats. */

#define QUERIES 60 /* a multiple of TILE_ROWS, and even */

#ifndef ATTENTION_H
#define ATTENTION_H

static inline long padded(long n, long to) { return (n + to - 1) / to * to; }
static inline long least(long a, long b) { return a < b ? a : b; }

typedef struct {
    const int64_t *ends; /* ends[b] tokens lie up to the end of document b */
    long documents, heads, key_heads, size, window;
    float scale;
} Shape;

/* One block of queries: `rows` of them from q, and the keys that they see, `columns` (a multiple of 16) from k. */
typedef struct { long q, rows, k, columns; } Block;

static Block block_of(long number, long L, long window) {
    Block b;
    b.q = number * QUERIES;
    b.rows = least(QUERIES, L - b.q);
    long first = window > 0 && b.q >= window ? b.q - window + 1 : 0;
    b.k = first / 16 * 16;
    b.columns = padded(b.q + b.rows - b.k, 16);
    return b;
}

static long longest_of(const Shape *s) {
    long longest = 0;
    for (long b = 0; b < s->documents; b++) {
        long L = s->ends[b] - (b ? s->ends[b - 1] : 0);
        longest = L > longest ? L : longest;
    }
    return longest;
}

/* Into how many parts a task is cut, so that every thread has about four. */
static long parts_of(const Shape *s, long threads) {
    long tasks = s->documents * s->key_heads;
    long parts = (4 * threads + tasks - 1) / tasks, blocks = (longest_of(s) + QUERIES - 1) / QUERIES;
    return threads == 1 ? 1 : least(parts, blocks);
}

/* A thread's room, handed out piece by piece, each at a cache line. */
typedef struct { char *base; size_t used; } Room;

static void *piece(Room *room, size_t bytes) {
    void *at = room->base + room->used;
    room->used += (bytes + 63) / 64 * 64;
    return at;
}

#endif

/* Scores to probabilities, in place: e^(score scale - shift) where the query sees the key, 0 elsewhere; their sum. */
INLINE float NAME(probabilities)(float *row, const Block *b, long query, long window, float scale, float shift) {
    long first = window > 0 && query >= window ? query - window + 1 - b->k : 0, end = query + 1 - b->k;
    float sum = 0.0f;
    for (long j = 0; j < first; j++) row[j] = 0.0f;
    for (long j = first; j < end; j++) {
        row[j] = exponential(row[j] * scale - shift);
        sum += row[j];
    }
    for (long j = end; j < b->columns; j++) row[j] = 0.0f;
    return sum;
}

INLINE float NAME(highest)(const float *row, const Block *b, long query, long window, float scale) {
    long first = window > 0 && query >= window ? query - window + 1 - b->k : 0, end = query + 1 - b->k;
    float most = row[first];
#pragma omp simd reduction(max : most)
    for (long j = first; j < end; j++) most = row[j] > most ? row[j] : most;
    return most * scale;
}

/* Floats as units along the row: the operand A of p x. */
INLINE void NAME(pack_floats)(const float *row, long n, uint32_t *to) {
#if PAIRED
    element *out = (element *)to;
    for (long j = 0; j < n; j++) out[j] = NAME(narrow)(row[j]);
#else
    memcpy(to, row, (size_t)n * sizeof(float));
#endif
}

/* Two rows as units of pairs; without pairs, one row at a time. The operand A of p' x. */
INLINE void NAME(pack_float_pair)(const float *row, const float *next, long n, uint32_t *to) {
#if PAIRED
    for (long j = 0; j < n; j++)
        to[j] = (uint32_t)NAME(narrow)(row[j]) | (next ? (uint32_t)NAME(narrow)(next[j]) << 16 : 0u);
#else
    (void)next;
    memcpy(to, row, (size_t)n * sizeof(float));
#endif
}

static void NAME(attend)(const Shape *s, const element *q, const element *k, const element *v, element *o, float *lse,
                         long L, long part, long parts, char *base) {
    Room room = {base, 0};
    long d = s->size, G = s->heads / s->key_heads, row = s->heads * d, key_row = s->key_heads * d;
    long Lp = padded(L, 16), dp = padded(d, 16), units = (d + PER_UNIT - 1) / PER_UNIT;
    uint32_t *keys = piece(&room, 4 * units * Lp), *values = piece(&room, 4 * Lp * dp);
    uint32_t *queries = piece(&room, 4 * QUERIES * units), *weights = piece(&room, 4 * QUERIES * Lp);
    float *scores = piece(&room, 4 * QUERIES * Lp), *out = piece(&room, 4 * QUERIES * dp);
    NAME(pack_columns)(k, L, d, key_row, keys, units, Lp);
    NAME(pack_between)(v, L, d, key_row, values, dp);
    for (long r = (L + PER_UNIT - 1) / PER_UNIT; r < Lp / PER_UNIT; r++) memset(values + r * dp, 0, 4 * dp);
    for (long number = part; number * QUERIES < L; number += parts) {
        Block b = block_of(number, L, s->window);
        long across = b.columns / PER_UNIT;
        for (long g = 0; g < G; g++) {
            float sums[QUERIES];
            NAME(pack_rows)(q + b.q * row + g * d, b.rows, d, row, queries, units);
            NAME(product)(b.rows, b.columns, units, queries, units, 1, keys + b.k, Lp, scores, b.columns, 0);
            for (long i = 0; i < b.rows; i++) {
                float *line = scores + i * b.columns;
                float most = NAME(highest)(line, &b, b.q + i, s->window, s->scale);
                sums[i] = NAME(probabilities)(line, &b, b.q + i, s->window, s->scale, most);
                NAME(pack_floats)(line, b.columns, weights + i * across);
                if (lse) lse[(b.q + i) * s->heads + g] = most + logf(sums[i]);
            }
            NAME(product)(b.rows, dp, across, weights, across, 1, values + b.k / PER_UNIT * dp, dp, out, dp, 0);
            for (long i = 0; i < b.rows; i++) {
                element *to = o + (b.q + i) * row + g * d;
                float scale = 1.0f / sums[i];
                for (long j = 0; j < d; j++) to[j] = NAME(narrow)(out[i * dp + j] * scale);
            }
        }
    }
}

static size_t NAME(attend_bytes)(long L, long d) {
    size_t Lp = (size_t)padded(L, 16), dp = (size_t)padded(d, 16);
    return 4 * (Lp * dp * 2 + QUERIES * (2 * dp + 2 * Lp)) + 4096;
}

/* o = softmax(q k' scale) v, each document for itself; lse may be NULL. Returns 0, or 1 where there is no memory. */
EXPORT int NAME(attention)(const element *q, const element *k, const element *v, element *o, float *lse,
                           const int64_t *ends, long documents, long heads, long key_heads, long size, long window,
                           long threads) {
    Shape s = {ends, documents, heads, key_heads, size, window, 1.0f / sqrtf((float)size)};
    long parts = parts_of(&s, threads), G = heads / key_heads, tasks = documents * key_heads * parts;
    size_t bytes = NAME(attend_bytes)(longest_of(&s), size);
    int failed = 0;
#pragma omp parallel num_threads(threads) if (threads > 1)
    {
        char *room = aligned_alloc(64, (bytes + 63) / 64 * 64);
        if (!room) {
#pragma omp atomic write
            failed = 1;
        }
#pragma omp barrier
#pragma omp for schedule(dynamic, 1)
        for (long task = 0; task < tasks; task++) {
            if (failed) continue;
            long part = task % parts, head = task / parts % key_heads, b = task / parts / key_heads;
            long start = b ? ends[b - 1] : 0, L = ends[b] - start;
            long at = (start * heads + head * G) * size, key_at = (start * key_heads + head) * size;
            NAME(attend)(&s, q + at, k + key_at, v + key_at, o + at, lse ? lse + start * heads + head * G : NULL, L, part,
                         parts, room);
        }
        free(room);
    }
    return failed;
}

/* What the backward pass of one key head lays out once. */
typedef struct { uint32_t *keys, *key_rows, *values, *queries, *query_rows, *grads, *grad_rows, *errors, *pairs; } NAME(Laid);

static void NAME(attend_backward)(const Shape *s, const element *q, const element *k, const element *v,
                                  const element *o, const element *grad, const float *lse, element *dq, float *dk,
                                  float *dv, long L, long part, long parts, char *base) {
    Room room = {base, 0};
    long d = s->size, G = s->heads / s->key_heads, row = s->heads * d, key_row = s->key_heads * d;
    long Lp = padded(L, 16), dp = padded(d, 16), units = (d + PER_UNIT - 1) / PER_UNIT, lines = QUERIES / PER_UNIT;
    NAME(Laid) x = {
        piece(&room, 4 * units * Lp), piece(&room, 4 * Lp * dp),    piece(&room, 4 * units * Lp),
        piece(&room, 4 * QUERIES * units), piece(&room, 4 * lines * dp), piece(&room, 4 * QUERIES * units),
        piece(&room, 4 * lines * dp), piece(&room, 4 * QUERIES * Lp), piece(&room, 4 * lines * Lp),
    };
    float *scores = piece(&room, 4 * QUERIES * Lp), *errors = piece(&room, 4 * QUERIES * Lp);
    float *out = piece(&room, 4 * QUERIES * dp);
    NAME(pack_columns)(k, L, d, key_row, x.keys, units, Lp);
    NAME(pack_columns)(v, L, d, key_row, x.values, units, Lp);
    NAME(pack_between)(k, L, d, key_row, x.key_rows, dp);
    for (long r = (L + PER_UNIT - 1) / PER_UNIT; r < Lp / PER_UNIT; r++) memset(x.key_rows + r * dp, 0, 4 * dp);
    memset(dk, 0, 4 * Lp * dp);
    memset(dv, 0, 4 * Lp * dp);
    for (long number = part; number * QUERIES < L; number += parts) {
        Block b = block_of(number, L, s->window);
        long across = b.columns / PER_UNIT, deep = (b.rows + PER_UNIT - 1) / PER_UNIT;
        for (long g = 0; g < G; g++) {
            const element *qs = q + b.q * row + g * d, *gs = grad + b.q * row + g * d, *os = o + b.q * row + g * d;
            NAME(pack_rows)(qs, b.rows, d, row, x.queries, units);
            NAME(pack_rows)(gs, b.rows, d, row, x.grads, units);
            NAME(pack_between)(qs, b.rows, d, row, x.query_rows, dp);
            NAME(pack_between)(gs, b.rows, d, row, x.grad_rows, dp);
            NAME(product)(b.rows, b.columns, units, x.queries, units, 1, x.keys + b.k, Lp, scores, b.columns, 0);
            NAME(product)(b.rows, b.columns, units, x.grads, units, 1, x.values + b.k, Lp, errors, b.columns, 0);
            for (long i = 0; i < b.rows; i++) {
                float *p = scores + i * b.columns, *e = errors + i * b.columns, mean = 0.0f;
                NAME(probabilities)(p, &b, b.q + i, s->window, s->scale, lse[(b.q + i) * s->heads + g]);
                for (long j = 0; j < d; j++) mean += NAME(widen)(gs[i * row + j]) * NAME(widen)(os[i * row + j]);
                for (long j = 0; j < b.columns; j++) e[j] = p[j] * (e[j] - mean) * s->scale;
                NAME(pack_floats)(e, b.columns, x.errors + i * across);
            }
            /* dv += p' grad */
            for (long i = 0; i < b.rows; i += PER_UNIT)
                NAME(pack_float_pair)(scores + i * b.columns, i + 1 < b.rows ? scores + (i + 1) * b.columns : NULL,
                                      b.columns, x.pairs + i / PER_UNIT * b.columns);
            NAME(product)(b.columns, dp, deep, x.pairs, 1, b.columns, x.grad_rows, dp, dv + b.k * dp, dp, 1);
            /* dk += e' q */
            for (long i = 0; i < b.rows; i += PER_UNIT)
                NAME(pack_float_pair)(errors + i * b.columns, i + 1 < b.rows ? errors + (i + 1) * b.columns : NULL,
                                      b.columns, x.pairs + i / PER_UNIT * b.columns);
            NAME(product)(b.columns, dp, deep, x.pairs, 1, b.columns, x.query_rows, dp, dk + b.k * dp, dp, 1);
            /* dq = e k */
            NAME(product)(b.rows, dp, across, x.errors, across, 1, x.key_rows + b.k / PER_UNIT * dp, dp, out, dp, 0);
            for (long i = 0; i < b.rows; i++) {
                element *to = dq + (b.q + i) * row + g * d;
                for (long j = 0; j < d; j++) to[j] = NAME(narrow)(out[i * dp + j]);
            }
        }
    }
}

static size_t NAME(attend_backward_bytes)(long L, long d) {
    size_t Lp = (size_t)padded(L, 16), dp = (size_t)padded(d, 16);
    return 4 * (Lp * dp * 3 + QUERIES * (5 * dp + 4 * Lp)) + 4096;
}

/* Gradients of q, k, v from that of o. Returns 0, or 1 where there is no memory. */
EXPORT int NAME(attention_backward)(const element *q, const element *k, const element *v, const element *o,
                                    const element *grad, const float *lse, element *dq, element *dk, element *dv,
                                    const int64_t *ends, long documents, long heads, long key_heads, long size,
                                    long window, long threads) {
    Shape s = {ends, documents, heads, key_heads, size, window, 1.0f / sqrtf((float)size)};
    long parts = parts_of(&s, threads), G = heads / key_heads, tasks = documents * key_heads * parts;
    long dp = padded(size, 16), longest = longest_of(&s), Lp = padded(longest, 16);
    size_t bytes = NAME(attend_backward_bytes)(longest, size), sums = 4 * (size_t)Lp * (size_t)dp;
    int failed = 0;
    /* Sums of a part's gradients of keys and values; one part writes them out itself, several are added up after. */
    float *partial = parts > 1 ? aligned_alloc(64, 2 * sums * (size_t)tasks) : NULL;
    if (parts > 1 && !partial) return 1;
#pragma omp parallel num_threads(threads) if (threads > 1)
    {
        char *room = aligned_alloc(64, (bytes + (parts > 1 ? 0 : 2 * sums) + 63) / 64 * 64);
        if (!room) {
#pragma omp atomic write
            failed = 1;
        }
#pragma omp barrier
#pragma omp for schedule(dynamic, 1)
        for (long task = 0; task < tasks; task++) {
            if (failed) continue;
            long part = task % parts, head = task / parts % key_heads, b = task / parts / key_heads;
            long start = b ? ends[b - 1] : 0, L = ends[b] - start;
            long at = (start * heads + head * G) * size, key_at = (start * key_heads + head) * size;
            float *sum = parts > 1 ? partial + 2 * (size_t)task * (sums / 4) : (float *)(room + bytes / 64 * 64);
            NAME(attend_backward)(&s, q + at, k + key_at, v + key_at, o + at, grad + at, lse + start * heads + head * G,
                                  dq + at, sum, sum + sums / 4, L, part, parts, room);
            if (parts > 1) continue;
            for (long i = 0; i < L; i++)
                for (long j = 0; j < size; j++) {
                    dk[key_at + i * key_heads * size + j] = NAME(narrow)(sum[i * dp + j]);
                    dv[key_at + i * key_heads * size + j] = NAME(narrow)(sum[sums / 4 + i * dp + j]);
                }
        }
        free(room);
        if (parts > 1 && !failed) {
#pragma omp for schedule(dynamic, 1)
            for (long task = 0; task < documents * key_heads; task++) {
                long head = task % key_heads, b = task / key_heads, start = b ? ends[b - 1] : 0, L = ends[b] - start;
                const float *from = partial + 2 * (size_t)(task * parts) * (sums / 4);
                for (long i = 0; i < L; i++)
                    for (long j = 0; j < size; j++) {
                        float key = 0.0f, value = 0.0f;
                        for (long part = 0; part < parts; part++) {
                            const float *one = from + 2 * (size_t)part * (sums / 4) + i * dp + j;
                            key += one[0];
                            value += one[sums / 4];
                        }
                        dk[((start + i) * key_heads + head) * size + j] = NAME(narrow)(key);
                        dv[((start + i) * key_heads + head) * size + j] = NAME(narrow)(value);
                    }
            }
        }
    }
    free(partial);
    return failed;
}
