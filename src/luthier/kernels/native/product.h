/* C (+)= A B for small matrices that lie in the nearest caches: what attention is made of.

   A is M x K units, element (m, k) at A[m am + k ak], so that it may lie either way round. B is K x N units, N a
   multiple of 16, row k at B + k ldb: with pairs, B[k][n] holds rows 2k and 2k + 1 of column n. C is M x N floats. */

#if defined(__AVX512F__)
#define TILE_ROWS 6 /* 6 x 4 sums, 4 columns of B and a number of A: 29 of 32 registers */
#define TILE_COLUMNS 4
#else
#define TILE_ROWS 3
#define TILE_COLUMNS 1 /* a v16 is two registers of AVX2 */
#endif

INLINE void NAME(tile)(const int rows, const int columns, long K, const uint32_t *A, long am, long ak,
                       const uint32_t *B, long ldb, float *C, long ldc, int add) {
    v16 sum[TILE_ROWS][TILE_COLUMNS];
#pragma GCC unroll 8
    for (int m = 0; m < rows; m++)
#pragma GCC unroll 4
        for (int n = 0; n < columns; n++) sum[m][n] = add ? *(v16 *)(C + m * ldc + 16 * n) : (v16){0};
    for (long k = 0; k < K; k++) {
#if PAIRED
        __m512i b[TILE_COLUMNS];
#pragma GCC unroll 4
        for (int n = 0; n < columns; n++) b[n] = _mm512_loadu_si512(B + k * ldb + 16 * n);
#pragma GCC unroll 8
        for (int m = 0; m < rows; m++) {
            __m512i a = _mm512_set1_epi32((int)A[m * am + k * ak]);
#pragma GCC unroll 4
            for (int n = 0; n < columns; n++)
                sum[m][n] = (v16)_mm512_dpbf16_ps((__m512)sum[m][n], (__m512bh)a, (__m512bh)b[n]);
        }
#else
        const float *a = (const float *)A + k * ak, *b = (const float *)B + k * ldb;
#pragma GCC unroll 8
        for (int m = 0; m < rows; m++)
#pragma GCC unroll 4
            for (int n = 0; n < columns; n++) sum[m][n] += a[m * am] * *(const v16 *)(b + 16 * n);
#endif
    }
#pragma GCC unroll 8
    for (int m = 0; m < rows; m++)
#pragma GCC unroll 4
        for (int n = 0; n < columns; n++) *(v16 *)(C + m * ldc + 16 * n) = sum[m][n];
}

INLINE void NAME(columns)(const int columns, long M, long K, const uint32_t *A, long am, long ak, const uint32_t *B,
                          long ldb, float *C, long ldc, int add) {
    long m = 0;
    for (; m + TILE_ROWS <= M; m += TILE_ROWS)
        NAME(tile)(TILE_ROWS, columns, K, A + m * am, am, ak, B, ldb, C + m * ldc, ldc, add);
    A += m * am, C += m * ldc;
    switch (M - m) { /* constants, so that the sums stay in registers */
    case 1: NAME(tile)(1, columns, K, A, am, ak, B, ldb, C, ldc, add); break;
    case 2: NAME(tile)(2, columns, K, A, am, ak, B, ldb, C, ldc, add); break;
#if TILE_ROWS > 3
    case 3: NAME(tile)(3, columns, K, A, am, ak, B, ldb, C, ldc, add); break;
    case 4: NAME(tile)(4, columns, K, A, am, ak, B, ldb, C, ldc, add); break;
    case 5: NAME(tile)(5, columns, K, A, am, ak, B, ldb, C, ldc, add); break;
#endif
    }
}

static void NAME(product)(long M, long N, long K, const uint32_t *A, long am, long ak, const uint32_t *B, long ldb,
                          float *C, long ldc, int add) {
    long n = 0;
    for (; n + 16 * TILE_COLUMNS <= N; n += 16 * TILE_COLUMNS)
        NAME(columns)(TILE_COLUMNS, M, K, A, am, ak, B + n, ldb, C + n, ldc, add);
    switch ((N - n) / 16) {
    case 1: NAME(columns)(1, M, K, A, am, ak, B + n, ldb, C + n, ldc, add); break;
#if TILE_COLUMNS > 1
    case 2: NAME(columns)(2, M, K, A, am, ak, B + n, ldb, C + n, ldc, add); break;
    case 3: NAME(columns)(3, M, K, A, am, ak, B + n, ldb, C + n, ldc, add); break;
#endif
    }
}

/* R rows of n elements, `stride` apart, as units along each row: the operand A of x y'. Zero up to `padded` units. */
static void NAME(pack_rows)(const element *x, long R, long n, long stride, uint32_t *to, long padded) {
    for (long r = 0; r < R; r++) {
        const element *row = x + r * stride;
        uint32_t *out = to + r * padded;
        long whole = n / PER_UNIT;
        for (long i = 0; i < whole; i++) out[i] = NAME(unit)(row[i * PER_UNIT], row[i * PER_UNIT + PER_UNIT - 1]);
        for (long i = whole; i < padded; i++) out[i] = i * PER_UNIT < n ? NAME(unit)(row[i * PER_UNIT], 0) : 0;
    }
}

/* The same units the other way round, (padded units, ldb): the operand B of x y'. Columns from R on are zero. */
static void NAME(pack_columns)(const element *x, long R, long n, long stride, uint32_t *to, long padded, long ldb) {
    for (long from = 0; from < ldb; from += 16) { /* 16 rows at a time: what is written lies together */
        long rows = R - from < 16 ? R - from : 16;
        for (long i = 0; i < padded; i++) {
            uint32_t *out = to + i * ldb + from;
            long at = i * PER_UNIT, next = at + PER_UNIT - 1;
            for (long r = 0; r < rows; r++) {
                const element *row = x + (from + r) * stride;
                out[r] = at < n ? NAME(unit)(row[at], next < n ? row[next] : 0) : 0;
            }
            for (long r = rows < 0 ? 0 : rows; r < 16; r++) out[r] = 0;
        }
    }
}

/* Units along the rows' number, (ceil(R / PER_UNIT), ldb): the operand B of p x. Columns from n on are zero. */
static void NAME(pack_between)(const element *x, long R, long n, long stride, uint32_t *to, long ldb) {
    for (long r = 0; r < R; r += PER_UNIT) {
        const element *row = x + r * stride, *next = PAIRED && r + 1 < R ? row + stride : NULL;
        uint32_t *out = to + r / PER_UNIT * ldb;
        if (next)
            for (long i = 0; i < n; i++) out[i] = NAME(unit)(row[i], next[i]);
        else
            for (long i = 0; i < n; i++) out[i] = NAME(unit)(row[i], 0);
        for (long i = n; i < ldb; i++) out[i] = 0;
    }
}
