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

/* What inner products work on: rows of x, and a panel whose pairs of k (or single k, if floats) are `line` numbers apart;
   sums go to y, or are added to it. */
typedef struct {
    int64_t x_stride, line, k, y_stride;
    int add;
} Inner;

/* y[i] = x[i] . panel for `rows` rows, in vectors of floats. */
INLINE void multiply_wide(const Inner *p, const float *x, const float *w, const int rows, float *y) {
    floats sums[ABREAST][VECTORS] = {{{0}}};
    for (int64_t k = 0; k < p->k; k++)
        for (int v = 0; v < VECTORS; v++) {
            const floats weight = load(w, k * p->line + v * WIDTH, 0);
            for (int i = 0; i < rows; i++)
                sums[i][v] += x[i * p->x_stride + k] * weight;
        }
    for (int i = 0; i < rows; i++)
        for (int v = 0; v < VECTORS; v++) {
            float *to = y + i * p->y_stride + v * WIDTH;
            store(to, 0, p->add ? load(to, 0, 0) + sums[i][v] : sums[i][v], 0);
        }
}

#if defined(__AVX512BF16__)
#include <immintrin.h>

INLINE __m512bh sixteen_pairs(const uint16_t *from) { return (__m512bh)_mm512_loadu_si512(from); }

INLINE __m512bh pair_everywhere(uint32_t both) { return (__m512bh)_mm512_set1_epi32((int)both); }

INLINE void put_sums(const Inner *p, float *y, __m512 low, __m512 high) {
    if (p->add) {
        low = _mm512_add_ps(low, _mm512_loadu_ps(y));
        high = _mm512_add_ps(high, _mm512_loadu_ps(y + 16));
    }
    _mm512_storeu_ps(y, low);
    _mm512_storeu_ps(y + 16, high);
}

INLINE void multiply_narrow(const Inner *p, const uint16_t *x, const uint16_t *w, const int rows, float *y) {
    __m512 sums[12][2];
    for (int i = 0; i < rows; i++)
        sums[i][0] = sums[i][1] = _mm512_setzero_ps();
    int64_t k = 0;
    for (; k + 2 <= p->k; k += 2, w += p->line) {
        const __m512bh low = sixteen_pairs(w), high = sixteen_pairs(w + 32);
#pragma GCC unroll 12
        for (int i = 0; i < rows; i++) {
            uint32_t both;
            memcpy(&both, x + i * p->x_stride + k, 4);
            const __m512bh here = pair_everywhere(both);
            sums[i][0] = _mm512_dpbf16_ps(sums[i][0], here, low);
            sums[i][1] = _mm512_dpbf16_ps(sums[i][1], here, high);
        }
    }
    if (k < p->k) {
        const __m512bh low = sixteen_pairs(w), high = sixteen_pairs(w + 32);
        for (int i = 0; i < rows; i++) {
            const __m512bh here = pair_everywhere(x[i * p->x_stride + k]);
            sums[i][0] = _mm512_dpbf16_ps(sums[i][0], here, low);
            sums[i][1] = _mm512_dpbf16_ps(sums[i][1], here, high);
        }
    }
    for (int i = 0; i < rows; i++)
        put_sums(p, y + i * p->y_stride, sums[i][0], sums[i][1]);
}

/* One row, whose sums would wait for each other: four of each at a time. */
INLINE void multiply_one(const Inner *p, const uint16_t *x, const uint16_t *w, float *y) {
    __m512 sums[4][2];
    for (int i = 0; i < 4; i++)
        sums[i][0] = sums[i][1] = _mm512_setzero_ps();
    int64_t k = 0;
    for (; k + 8 <= p->k; k += 8, w += 4 * p->line)
#pragma GCC unroll 4
        for (int i = 0; i < 4; i++) {
            uint32_t both;
            memcpy(&both, x + k + 2 * i, 4);
            const __m512bh here = pair_everywhere(both);
            sums[i][0] = _mm512_dpbf16_ps(sums[i][0], here, sixteen_pairs(w + i * p->line));
            sums[i][1] = _mm512_dpbf16_ps(sums[i][1], here, sixteen_pairs(w + i * p->line + 32));
        }
    for (; k < p->k; k += 2, w += p->line) {
        const __m512bh here = pair_everywhere(two(x, k, p->k));
        sums[0][0] = _mm512_dpbf16_ps(sums[0][0], here, sixteen_pairs(w));
        sums[0][1] = _mm512_dpbf16_ps(sums[0][1], here, sixteen_pairs(w + 32));
    }
    __m512 whole[2];
    for (int half = 0; half < 2; half++)
        whole[half] = _mm512_add_ps(_mm512_add_ps(sums[0][half], sums[1][half]),
                                    _mm512_add_ps(sums[2][half], sums[3][half]));
    put_sums(p, y, whole[0], whole[1]);
}
#else
INLINE void multiply_narrow(const Inner *p, const uint16_t *x, const uint16_t *w, const int rows, float *y) {
    floats sums[ABREAST][VECTORS] = {{{0}}};
    for (int64_t k = 0; k < p->k; k += 2, w += p->line)
        for (int v = 0; v < VECTORS; v++) {
            words bits;
            memcpy(&bits, w + 2 * v * WIDTH, sizeof bits);
            const floats even = (floats)(bits << 16), odd = (floats)(bits & 0xffff0000);
            for (int i = 0; i < rows; i++) {
                const words pair = two(x + i * p->x_stride, k, p->k) - (words){0};
                sums[i][v] += (floats)(pair << 16) * even;
                sums[i][v] += (floats)(pair & 0xffff0000) * odd;
            }
        }
    for (int i = 0; i < rows; i++)
        for (int v = 0; v < VECTORS; v++) {
            float *to = y + i * p->y_stride + v * WIDTH;
            store(to, 0, p->add ? load(to, 0, 0) + sums[i][v] : sums[i][v], 0);
        }
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

static void inner_narrow(const Inner *p, const uint16_t *x, const uint16_t *w, int64_t rows, float *y) {
#if defined(__AVX512BF16__)
#define CALL(count) multiply_narrow(p, x, w, count, y)
    for (; rows > 1; rows -= 12, x += 12 * p->x_stride, y += 12 * p->y_stride)
        CONSTANT_ROWS(rows, CALL)
#undef CALL
    if (rows == 1)
        multiply_one(p, x, w, y);
#else
    for (; rows >= ABREAST; rows -= ABREAST, x += ABREAST * p->x_stride, y += ABREAST * p->y_stride)
        multiply_narrow(p, x, w, ABREAST, y);
    for (; rows > 0; rows--, x += p->x_stride, y += p->y_stride)
        multiply_narrow(p, x, w, 1, y);
#endif
}

static void inner_wide(const Inner *p, const float *x, const float *w, int64_t rows, float *y) {
    for (; rows >= ABREAST; rows -= ABREAST, x += ABREAST * p->x_stride, y += ABREAST * p->y_stride)
        multiply_wide(p, x, w, ABREAST, y);
    for (; rows > 0; rows--, x += p->x_stride, y += p->y_stride)
        multiply_wide(p, x, w, 1, y);
}

/* y[i] = x[i] . panel, or that added to it, for any number of rows. */
INLINE void inner(const Inner *p, const void *x, const void *w, int64_t rows, float *y, int narrow) {
    if (narrow)
        inner_narrow(p, x, w, rows, y);
    else
        inner_wide(p, x, w, rows, y);
}

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

/* y = x w^T for up to STEP rows from `row` on and the panel of that number. */
INLINE void multiply(const Linear *l, void *tiles, int64_t row, int64_t rows, int64_t panel, Sums y) {
    const char *w = (const char *)l->panels + panel * panel_bytes(l);
    const char *x = (const char *)l->x + row * l->x_stride * (l->narrow ? 2 : 4);
#if defined(TILES)
    if (tiles) {
        multiply_tiles(tiles, l, (const uint16_t *)x, (const uint16_t *)w, rows, y);
        return;
    }
#endif
    const Inner p = {l->x_stride, l->narrow ? 2 * PANEL : PANEL, l->k, PANEL, 0};
    inner(&p, x, w, rows, y[0], l->narrow);
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
EXPORT int64_t NAME(linear_items)(const void *job) {
    const Linear *l = job;
    return (live_rows(&l->e) + l->block - 1) / l->block * ((units(l) + l->grain - 1) / l->grain);
}

EXPORT void NAME(linear_body)(const void *job, int64_t item, void *scratch) {
    const Linear *l = job;
    const int64_t chunks = (units(l) + l->grain - 1) / l->grain, first = item / chunks * l->block;
    const int64_t rows = least(l->block, live_rows(&l->e) - first), begin = item % chunks * l->grain;
    const int64_t end = least(units(l), begin + l->grain);
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
                multiply(l, tiles, first + i, here, l->gate / PANEL + panel, up);
            finish(l, first + i, here, panel, y, up);
        }
    }
#if defined(TILES)
    if (tiles)
        tiles_end(tiles);
#endif
}
