/* Products with packed weights, included by kernels.c. A weight [n, k] is cut into panels of PANEL outputs; within one,
   k comes first: bfloat16 as [k / 2][PANEL][2], float as [k][PANEL], zeros at the ends. So a panel is one stream of
   memory, a pair of k is what VDPBF16PS takes, and 16 pairs of rows are what a tile takes. */

#define PANEL 32
#define VECTORS (PANEL / WIDTH)

#if defined(TILES)
#define STEP 32 /* rows of x that meet a panel at once */
#elif defined(__AVX512BF16__)
#define STEP 12
#else
#define STEP 8
#endif
#define ABREAST (WIDTH == 16 ? 4 : WIDTH == 8 ? 2 : 1) /* rows whose sums fit the registers, where C keeps them */
#define FEW 12 /* rows up to which vectors are as good as tiles */

typedef float Sums[STEP][PANEL];

typedef struct {
    Extent e; /* rows of x */
    const void *x, *panels, *bias; /* [m, k]; the packed weight; [n] or NULL */
    void *out;                     /* [m, n], or [m, gate] */
    int64_t n, k, x_stride, out_stride;
    int64_t gate;  /* columns of the gate, whose silu multiplies the columns after it; 0: none */
    int64_t block; /* rows of an item, at most */
    int64_t grain; /* panels of an item, or pairs of a gate's and its partner's */
    int64_t narrow;
} Linear;

INLINE int64_t panel_bytes(const Linear *l) { return l->narrow ? (l->k + 1) / 2 * PANEL * 4 : l->k * PANEL * 4; }
INLINE int64_t units(const Linear *l) { return ((l->gate ? l->gate : l->n) + PANEL - 1) / PANEL; }

/* Two neighbouring bfloat16 at `at`, or the last one alone. */
INLINE uint32_t two(const uint16_t *x, int64_t at, int64_t k) {
    uint32_t both = 0;
    memcpy(&both, x + at, at + 1 < k ? 4 : 2);
    return both;
}

/* y[i] = x[i] . panel for `rows` rows, in vectors of floats. */
INLINE void multiply_wide(const Linear *l, const float *x, const float *w, const int rows, Sums y) {
    floats sums[ABREAST][VECTORS] = {{{0}}};
    for (int64_t k = 0; k < l->k; k++)
        for (int v = 0; v < VECTORS; v++) {
            const floats weight = load(w, k * PANEL + v * WIDTH, 0);
            for (int i = 0; i < rows; i++)
                sums[i][v] += x[i * l->x_stride + k] * weight;
        }
    for (int i = 0; i < rows; i++)
        for (int v = 0; v < VECTORS; v++)
            store(y[i], v * WIDTH, sums[i][v], 0);
}

#if defined(__AVX512BF16__)
#include <immintrin.h>

INLINE void multiply_narrow(const Linear *l, const uint16_t *x, const uint16_t *w, const int rows, Sums y) {
    __m512 sums[12][2];
    const int64_t whole = l->k / 2;
    for (int i = 0; i < rows; i++)
        sums[i][0] = sums[i][1] = _mm512_setzero_ps();
    for (int64_t p = 0; p < whole; p++, w += 2 * PANEL) {
        const __m512bh low = (__m512bh)_mm512_loadu_si512(w), high = (__m512bh)_mm512_loadu_si512(w + PANEL);
#pragma GCC unroll 12
        for (int i = 0; i < rows; i++) {
            uint32_t both;
            memcpy(&both, x + i * l->x_stride + 2 * p, 4);
            const __m512bh here = (__m512bh)_mm512_set1_epi32((int)both);
            sums[i][0] = _mm512_dpbf16_ps(sums[i][0], here, low);
            sums[i][1] = _mm512_dpbf16_ps(sums[i][1], here, high);
        }
    }
    if (l->k % 2) {
        const __m512bh low = (__m512bh)_mm512_loadu_si512(w), high = (__m512bh)_mm512_loadu_si512(w + PANEL);
        for (int i = 0; i < rows; i++) {
            const __m512bh here = (__m512bh)_mm512_set1_epi32(x[i * l->x_stride + l->k - 1]);
            sums[i][0] = _mm512_dpbf16_ps(sums[i][0], here, low);
            sums[i][1] = _mm512_dpbf16_ps(sums[i][1], here, high);
        }
    }
    for (int i = 0; i < rows; i++) {
        _mm512_storeu_ps(y[i], sums[i][0]);
        _mm512_storeu_ps(y[i] + 16, sums[i][1]);
    }
}

/* One row, whose sums would wait for each other: four of each at a time. */
INLINE void multiply_one(const Linear *l, const uint16_t *x, const uint16_t *w, Sums y) {
    __m512 sums[4][2];
    for (int i = 0; i < 4; i++)
        sums[i][0] = sums[i][1] = _mm512_setzero_ps();
    int64_t k = 0;
    for (; k + 8 <= l->k; k += 8, w += 8 * PANEL)
#pragma GCC unroll 4
        for (int i = 0; i < 4; i++) {
            uint32_t both;
            memcpy(&both, x + k + 2 * i, 4);
            const __m512bh here = (__m512bh)_mm512_set1_epi32((int)both);
            sums[i][0] = _mm512_dpbf16_ps(sums[i][0], here, (__m512bh)_mm512_loadu_si512(w + 2 * i * PANEL));
            sums[i][1] = _mm512_dpbf16_ps(sums[i][1], here, (__m512bh)_mm512_loadu_si512(w + 2 * i * PANEL + PANEL));
        }
    for (; k < l->k; k += 2, w += 2 * PANEL) {
        const __m512bh here = (__m512bh)_mm512_set1_epi32((int)two(x, k, l->k));
        sums[0][0] = _mm512_dpbf16_ps(sums[0][0], here, (__m512bh)_mm512_loadu_si512(w));
        sums[0][1] = _mm512_dpbf16_ps(sums[0][1], here, (__m512bh)_mm512_loadu_si512(w + PANEL));
    }
    for (int half = 0; half < 2; half++)
        _mm512_storeu_ps(y[0] + 16 * half, _mm512_add_ps(_mm512_add_ps(sums[0][half], sums[1][half]),
                                                         _mm512_add_ps(sums[2][half], sums[3][half])));
}
#else
INLINE void multiply_narrow(const Linear *l, const uint16_t *x, const uint16_t *w, const int rows, Sums y) {
    floats sums[ABREAST][VECTORS] = {{{0}}};
    for (int64_t k = 0; k < l->k; k += 2)
        for (int v = 0; v < VECTORS; v++) {
            words bits;
            memcpy(&bits, w + k * PANEL + 2 * v * WIDTH, sizeof bits);
            const floats even = (floats)(bits << 16), odd = (floats)(bits & 0xffff0000);
            for (int i = 0; i < rows; i++) {
                const uint32_t both = two(x + i * l->x_stride, k, l->k);
                const words pair = both - (words){0};
                sums[i][v] += (floats)(pair << 16) * even;
                sums[i][v] += (floats)(pair & 0xffff0000) * odd;
            }
        }
    for (int i = 0; i < rows; i++)
        for (int v = 0; v < VECTORS; v++)
            store(y[i], v * WIDTH, sums[i][v], 0);
}

INLINE void multiply_one(const Linear *l, const uint16_t *x, const uint16_t *w, Sums y) {
    multiply_narrow(l, x, w, 1, y);
}
#endif

#if defined(TILES)
/* Sums of 32 rows and a panel in the tiles 0 to 3; x in 4 and 5, the panel in 6 and 7. */
INLINE void shape_tiles(Tiles *t, int64_t rows) {
    tiles_begin(t);
    for (int half = 0; half < 2; half++) {
        const int64_t height = most(1, least(16, rows - 16 * half));
        tile_shape(t, 2 * half, height, 64);
        tile_shape(t, 2 * half + 1, height, 64);
        tile_shape(t, 4 + half, height, 64);
        tile_shape(t, 6 + half, 16, 64);
    }
    tiles_ready(t);
}

INLINE void multiply_tiles(Tiles *t, const Linear *l, const uint16_t *x, const uint16_t *w, int64_t rows, Sums y) {
    const int64_t stride = l->x_stride * 2, line = PANEL * 4, below = 16 * l->x_stride;
    tile_zero(t, 0);
    tile_zero(t, 1);
    if (rows > 16) {
        tile_zero(t, 2);
        tile_zero(t, 3);
        for (int64_t k = 0; k < l->k; k += 32, w += 32 * PANEL) {
            tile_load(t, 4, x + k, stride);
            tile_load(t, 6, w, line);
            tile_bf16(t, 0, 4, 6);
            tile_load(t, 7, w + PANEL, line);
            tile_bf16(t, 1, 4, 7);
            tile_load(t, 5, x + below + k, stride);
            tile_bf16(t, 2, 5, 6);
            tile_bf16(t, 3, 5, 7);
        }
        tile_store(t, 2, y[16], line);
        tile_store(t, 3, y[16] + 16, line);
    } else {
        for (int64_t k = 0; k < l->k; k += 32, w += 32 * PANEL) {
            tile_load(t, 4, x + k, stride);
            tile_load(t, 6, w, line);
            tile_bf16(t, 0, 4, 6);
            tile_load(t, 7, w + PANEL, line);
            tile_bf16(t, 1, 4, 7);
        }
    }
    tile_store(t, 0, y[0], line);
    tile_store(t, 1, y[0] + 16, line);
}
#endif

/* `call(rows)` with a constant in the place of `rows`, which is 1 to 12. */
#define CONSTANT_ROWS(rows, call) \
    switch (rows) { \
    case 1: call(1); break; \
    case 2: call(2); break; \
    case 3: call(3); break; \
    case 4: call(4); break; \
    case 5: call(5); break; \
    case 6: call(6); break; \
    case 7: call(7); break; \
    case 8: call(8); break; \
    case 9: call(9); break; \
    case 10: call(10); break; \
    case 11: call(11); break; \
    default: call(12); \
    }

static void vectors_narrow(const Linear *l, const uint16_t *x, const uint16_t *w, int64_t rows, Sums y) {
    if (rows == 1) {
        multiply_one(l, x, w, y);
        return;
    }
#if defined(__AVX512BF16__)
#define CALL(count) multiply_narrow(l, x, w, count, y)
    CONSTANT_ROWS(rows, CALL)
#undef CALL
#else
    for (; rows >= ABREAST; rows -= ABREAST, x += ABREAST * l->x_stride, y += ABREAST)
        multiply_narrow(l, x, w, ABREAST, y);
    for (; rows > 0; rows--, x += l->x_stride, y++)
        multiply_narrow(l, x, w, 1, y);
#endif
}

static void vectors_wide(const Linear *l, const float *x, const float *w, int64_t rows, Sums y) {
    for (; rows >= ABREAST; rows -= ABREAST, x += ABREAST * l->x_stride, y += ABREAST)
        multiply_wide(l, x, w, ABREAST, y);
    for (; rows > 0; rows--, x += l->x_stride, y++)
        multiply_wide(l, x, w, 1, y);
}

/* y = x w^T for up to STEP rows from `row` on and the panel of that number. */
INLINE void multiply(const Linear *l, void *tiles, int64_t row, int64_t rows, int64_t panel, Sums y) {
    const char *w = (const char *)l->panels + panel * panel_bytes(l);
    if (!l->narrow) {
        vectors_wide(l, (const float *)l->x + row * l->x_stride, (const float *)w, rows, y);
        return;
    }
    const uint16_t *x = (const uint16_t *)l->x + row * l->x_stride;
#if defined(TILES)
    if (tiles) {
        multiply_tiles(tiles, l, x, (const uint16_t *)w, rows, y);
        return;
    }
#endif
    vectors_narrow(l, x, (const uint16_t *)w, rows, y);
}

INLINE floats silu(floats x) { return x / (1.0f + exponential(-x)); }

/* Write `rows` rows of y from `row` on to the columns of a panel; of a gate, what `up` holds multiplies it. */
INLINE void finish(const Linear *l, int64_t row, int64_t rows, int64_t panel, Sums y, Sums up) {
    const int64_t column = panel * PANEL, width = l->gate ? l->gate : l->n, wide = least(PANEL, width - column);
    for (int64_t i = 0; i < rows; i++) {
        const int64_t at = (row + i) * l->out_stride + column;
        if (l->bias)
            for (int64_t c = 0; c < wide; c++)
                y[i][c] += load_one(l->bias, column + c, l->narrow);
        if (l->gate)
            for (int v = 0; v < PANEL; v += WIDTH) {
                if (l->bias)
                    store(up[i], v, load(up[i], v, 0) + load(l->bias, l->gate + column + v, l->narrow), 0);
                store(y[i], v, silu(load(y[i], v, 0)) * load(up[i], v, 0), 0);
            }
        if (wide == PANEL)
            for (int v = 0; v < PANEL; v += WIDTH)
                store(l->out, at + v, load(y[i], v, 0), l->narrow);
        else
            for (int64_t c = 0; c < wide; c++)
                store_one(l->out, at + c, y[i][c], l->narrow);
    }
}

EXPORT const int64_t NAME(linear_bytes) = sizeof(Linear);
/* How many items a product of `rows` rows is cut into. */
INLINE int64_t multiply_items(const Linear *l, int64_t rows) {
    return (rows + l->block - 1) / l->block * ((units(l) + l->grain - 1) / l->grain);
}

EXPORT int64_t NAME(linear_items)(const void *job) {
    const Linear *l = job;
    return multiply_items(l, live_rows(&l->e));
}

typedef void (*Finish)(const Linear *l, int64_t row, int64_t rows, int64_t panel, Sums y, Sums up);

/* The panels from `begin` to `end` of x w^T for `rows` rows from `first` on, each handed to `finish`. */
static void multiply_block(const Linear *l, int64_t first, int64_t rows, int64_t begin, int64_t end, Finish finish) {
    _Alignas(64) Sums y, up;
    int64_t step = least(STEP, FEW);
    void *tiles = NULL;
#if defined(TILES)
    Tiles state;
    if (l->narrow && rows > FEW && l->k % 32 == 0)
        tiles = &state, step = STEP;
#endif
    for (int64_t i = 0; i < rows; i += step) {
        const int64_t here = least(step, rows - i);
#if defined(TILES)
        if (tiles && (i == 0 || here < step))
            shape_tiles(tiles, here);
#endif
        for (int64_t panel = begin; panel < end; panel++) {
            multiply(l, tiles, first + i, here, panel, y);
            if (l->gate)
                multiply(l, tiles, first + i, here, units(l) + panel, up);
            finish(l, first + i, here, panel, y, up);
        }
    }
#if defined(TILES)
    if (tiles)
        tiles_end(tiles);
#endif
}

/* One of the items into which a product of `rows` rows is cut. */
static void multiply_item(const Linear *l, int64_t rows, int64_t item, Finish finish) {
    const int64_t chunks = (units(l) + l->grain - 1) / l->grain, first = item / chunks * l->block;
    const int64_t begin = item % chunks * l->grain, end = least(units(l), begin + l->grain);
    multiply_block(l, first, least(l->block, rows - first), begin, end, finish);
}

EXPORT void NAME(linear_body)(const void *job, int64_t item, void *scratch) {
    const Linear *l = job;
    multiply_item(l, live_rows(&l->e), item, finish);
}
