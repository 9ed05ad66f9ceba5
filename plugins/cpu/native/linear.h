/* Products with packed weights, included by kernels.c. A weight [n, k] is cut into panels of PANEL outputs; within one,
   k comes first: bfloat16 as [k / 2][PANEL][2], float as [k][PANEL], zeros at the ends. So a panel is one stream of
   memory, a pair of k is what VDPBF16PS takes, and 16 pairs of rows are what a tile takes. */

#define PANEL 32
#define VECTORS (PANEL / WIDTH)

#define STEP 32 /* rows of x that meet a panel at once, at most */
#define ABREAST (WIDTH == 16 ? 4 : WIDTH == 8 ? 2 : 1) /* rows whose sums fit the registers, where C keeps them */
#define FEW 12 /* rows that vectors multiply at once, at most */
#define LONE 4 /* rows up to which vectors are as good as tiles */
enum { ORDERED = 1, DIRECT = 2 };
#define AHEAD_BYTES 5120 /* how far before its use memory is asked for: less comes too late, whatever is foreseen */
#define LEAN 128 /* rows up to which weights are read faster than they are multiplied */
#define TILE 512 /* bfloat16 of a tile: 16 rows of 32 */
#define DEEP 576 /* k of a panel that the nearest cache holds beside sums and results */
#define MOST_STRIPS 20 /* of 32 rows, of an item */

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
    int64_t ordered; /* whether `out` is in the order of tiles */
    int64_t tiled; /* ORDERED: x is in the order of tiles; DIRECT: x has at most 32 rows, as they are; 0: no tiles */
    const NormStep *norm; /* what makes x, in the scratch of each thread; NULL: x is there. Few rows are worth it */
    const RopeStep *rope; /* what turns and stores the heads that columns are, once they are written; NULL: nothing */
    const Quantize *quantize; /* the same as `norm`, for codes of x and their scales */
    const float *tokens;      /* [m]: scales of the rows of x, where those are codes; or NULL */
} Linear;

INLINE int64_t panel_bytes(const Linear *l) { return l->narrow ? (l->k + 1) / 2 * PANEL * 4 : l->k * PANEL * 4; }
INLINE int64_t units(const Linear *l) { return ((l->gate ? l->gate : l->n) + PANEL - 1) / PANEL; }

/* Two neighbouring bfloat16 at `at`, or the last one alone. */
INLINE uint32_t two(const uint16_t *x, int64_t at, int64_t k) {
    uint32_t both = 0;
    memcpy(&both, x + at, at + 1 < k ? 4 : 2);
    return both;
}

/* What inner products work on: rows of x, and a panel whose pairs of k (or single k, if floats) are `line` numbers
   apart; sums go to y, or are added to it. */
typedef struct {
    int64_t x_stride, line, k, y_stride;
    int add, streams; /* whether panels follow one another, so that the next lines can be asked for */
} Inner;

/* Ask for the lines of a panel that are needed in a while. */
INLINE void look_ahead(const void *w, int64_t bytes, int streams) {
    for (int64_t i = 0; streams && i < bytes; i += 64)
        __builtin_prefetch((const char *)w + AHEAD_BYTES + i);
}

/* y[i] = x[i] . panel for `rows` rows, in vectors of floats. */
INLINE void multiply_wide(const Inner *p, const float *x, const float *w, const int rows, float *y) {
    floats sums[ABREAST][VECTORS] = {{{0}}};
    for (int64_t k = 0; k < p->k; k++) {
        look_ahead(w + k * p->line, PANEL * 4, p->streams);
        for (int v = 0; v < VECTORS; v++) {
            const floats weight = load(w, k * p->line + v * WIDTH, 0);
            for (int i = 0; i < rows; i++)
                sums[i][v] += x[i * p->x_stride + k] * weight;
        }
    }
    for (int i = 0; i < rows; i++)
        for (int v = 0; v < VECTORS; v++) {
            float *to = y + i * p->y_stride + v * WIDTH;
            store(to, 0, p->add ? load(to, 0, 0) + sums[i][v] : sums[i][v], 0);
        }
}

#if defined(__AVX512BF16__)
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
        look_ahead(w, PANEL * 4, p->streams);
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
            look_ahead(w + i * p->line, PANEL * 4, p->streams);
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
    for (int64_t k = 0; k < p->k; k += 2, w += p->line) {
        look_ahead(w, PANEL * 4, p->streams);
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
/* Sums of up to 32 rows and a panel in the tiles 0 to 3; x in 4 and 5, the panel in 6 and 7. */
INLINE void shape_tiles(Tiles *t, int64_t rows) {
    const int64_t upper = least(16, rows), lower = most(1, rows - 16);
    tiles_begin(t);
    for (int i = 0; i < 2; i++) {
        tile_shape(t, i, upper, 64);
        tile_shape(t, 2 + i, lower, 64);
        tile_shape(t, 6 + i, 16, 64);
    }
    tile_shape(t, 4, upper, 64);
    tile_shape(t, 5, lower, 64);
    tiles_ready(t);
}

INLINE void zero_sums(Tiles *t) {
    tile_zero(t, 0);
    tile_zero(t, 1);
    tile_zero(t, 2);
    tile_zero(t, 3);
}

/* Two sums += the x in 4 times 32 columns of a panel. */
#define ADD_TWO(t, left, right, w, line) \
    do { \
        tile_load(t, 6, w, line); \
        tile_bf16(t, left, 4, 6); \
        tile_load(t, 7, (w) + PANEL, line); \
        tile_bf16(t, right, 4, 7); \
    } while (0)

/* The four sums += 32 rows of x in the order of tiles times 32 columns of a panel. x passes by the nearest cache, where
   the panel stays: with both in it, neither would. */
INLINE void add_products(Tiles *t, const uint16_t *x, const uint16_t *w) {
    tile_stream(t, 4, x, 64);
    tile_load(t, 6, w, PANEL * 4);
    tile_bf16(t, 0, 4, 6);
    tile_load(t, 7, w + PANEL, PANEL * 4);
    tile_bf16(t, 1, 4, 7);
    tile_stream(t, 5, x + TILE, 64);
    tile_bf16(t, 2, 5, 6);
    tile_bf16(t, 3, 5, 7);
}

/* The same of up to 32 rows as they lie, `stride` bytes apart, the second 16 of them at `below`, if there are any. They
   stay in the nearest cache, and the panel, which is needed once, passes by. */
INLINE void add_direct(Tiles *t, const uint16_t *x, const uint16_t *below, int64_t stride, const uint16_t *w) {
    tile_load(t, 4, x, stride);
    tile_stream(t, 6, w, PANEL * 4);
    tile_bf16(t, 0, 4, 6);
    tile_stream(t, 7, w + PANEL, PANEL * 4);
    tile_bf16(t, 1, 4, 7);
    if (below) {
        tile_load(t, 5, below, stride);
        tile_bf16(t, 2, 5, 6);
        tile_bf16(t, 3, 5, 7);
    }
}

INLINE void take_sums(Tiles *t, Sums from) {
    tile_load(t, 0, from[0], PANEL * 4);
    tile_load(t, 1, from[0] + 16, PANEL * 4);
    tile_load(t, 2, from[16], PANEL * 4);
    tile_load(t, 3, from[16] + 16, PANEL * 4);
}

INLINE void store_sums(Tiles *t, Sums to) {
    tile_store(t, 0, to[0], PANEL * 4);
    tile_store(t, 1, to[0] + 16, PANEL * 4);
    tile_store(t, 2, to[16], PANEL * 4);
    tile_store(t, 3, to[16] + 16, PANEL * 4);
}
#endif

/* silu of sums that are rounded to bfloat16 (`narrow`), or kept. */
INLINE floats silu(floats x, int narrow) {
#if WIDTH == 16
    if (narrow) /* within 2^-13 of itself */
        return x * (floats)_mm512_rcp14_ps((__m512)(1.0f + quick_power(x * -LOG2_E)));
#endif
    return x / (1.0f + exponential(-x));
}

INLINE void put_columns(void *out, int64_t at, const float *y, int64_t wide, int narrow) {
    if (wide == PANEL)
        for (int v = 0; v < PANEL; v += 2 * WIDTH)
            store_two(out, at + v, load(y, v, 0), load(y, v + WIDTH, 0), narrow);
    else
        for (int64_t c = 0; c < wide; c++)
            store_one(out, at + c, y[c], narrow);
}

/* Add their bias to a row's sums of columns, and to those of a gate's partners. */
INLINE void add_bias(const Linear *l, int64_t column, int64_t wide, float *y, float *up, int narrow) {
    for (int64_t c = 0; l->bias && c < wide; c++)
        y[c] += load_one(l->bias, column + c, narrow);
    for (int64_t c = 0; l->gate && l->bias && c < wide; c++)
        up[c] += load_one(l->bias, l->gate + column + c, narrow);
}

/* Write `rows` rows of sums from `row` on to the columns of a panel; of a gate, what `up` holds multiplies them. In the
   order of tiles they are rows of one 32. */
INLINE void finish_rows(const Linear *l, int64_t row, int64_t rows, int64_t panel, Sums y, Sums up, int narrow) {
    const int64_t column = panel * PANEL, wide = least(PANEL, (l->gate ? l->gate : l->n) - column);
    const int64_t apart = l->ordered ? 32 : l->out_stride;
    int64_t at = place_of(row, column, l->out_stride, l->ordered);
    for (int64_t i = 0; i < rows; i++, at += apart) {
        add_bias(l, column, wide, y[i], up[i], narrow);
        for (int64_t v = 0; l->gate && v < wide; v += WIDTH)
            store(y[i], v, silu(load(y[i], v, 0), narrow) * load(up[i], v, 0), 0);
        put_columns(l->out, at, y[i], wide, narrow);
    }
}

INLINE void finish(const Linear *l, int64_t row, int64_t rows, int64_t panel, Sums y, Sums up) {
    EITHER(finish_rows, l->narrow, l, row, rows, panel, y, up);
}

/* Sums that wait to be written, a row at a time while the next ones are made: vectors idle where tiles are busy. */
typedef struct {
    int64_t row, rows, panel;
    float (*y)[PANEL], (*up)[PANEL];
} Pending;

/* How the sums of some rows and a panel become results. */
typedef void (*Finish)(const Linear *l, int64_t row, int64_t rows, int64_t panel, Sums y, Sums up);

INLINE void finish_some(const Linear *l, Pending *p, int64_t count, Finish finish) {
    const int64_t here = least(count, p->rows);
    finish(l, p->row, here, p->panel, p->y, p->up);
    p->row += here, p->rows -= here, p->y += here, p->up += here;
}

/* y = x w^T for up to FEW rows from `row` on and the panel of that number. */
INLINE void multiply(const Linear *l, int64_t row, int64_t rows, int64_t panel, Sums y) {
    const char *w = (const char *)l->panels + panel * panel_bytes(l);
    const char *x = (const char *)l->x + row * l->x_stride * (l->narrow ? 2 : 4);
    const Inner p = {l->x_stride, l->narrow ? 2 * PANEL : PANEL, l->k, PANEL, 0, l->e.rows <= LEAN};
    inner(&p, x, w, rows, y[0], l->narrow);
}

/* How many items a product of `rows` rows is cut into. */
INLINE int64_t multiply_items(const Linear *l, int64_t rows) {
    return (rows + l->block - 1) / l->block * ((units(l) + l->grain - 1) / l->grain);
}

/* A part of a product: `rows` rows from `row` on, and the panels from `begin` to `end`. */
typedef struct {
    int64_t row, rows, begin, end;
} Part;

/* One of the items into which a product of `rows` rows is cut. */
INLINE Part part_of(const Linear *l, int64_t rows, int64_t item) {
    const int64_t chunks = (units(l) + l->grain - 1) / l->grain, row = item / chunks * l->block;
    const int64_t begin = item % chunks * l->grain;
    return (Part){row, least(l->block, rows - row), begin, least(units(l), begin + l->grain)};
}

#if defined(TILES)
typedef struct {
    int64_t row, rows, from, to; /* up to 32 rows of x, and the k to sum over */
    const uint16_t *w;           /* a panel, from its first k on */
    float (*before)[PANEL];      /* what was summed of k below, unless `from` is 0 */
    float (*y)[PANEL];
} Strip;

INLINE void multiply_tiles(Tiles *t, const Linear *l, const Strip s, Pending *pending, Finish finish) {
    const int ordered = l->tiled == ORDERED;
    const uint16_t *x = (const uint16_t *)l->x + s.row * (ordered ? l->k : l->x_stride);
    const uint16_t *w = s.w + s.from * PANEL;
    if (s.from)
        take_sums(t, s.before);
    else
        zero_sums(t);
    for (int64_t k = s.from; k < s.to; k += 32, w += 2 * TILE) {
        if (ordered) {
            look_ahead(w, 4 * TILE, l->e.rows <= LEAN);
            add_products(t, x + k * 32, w);
        } else {
            for (int64_t i = 0; i < 4 * TILE; i += 64)
                __builtin_prefetch((const char *)w + AHEAD_BYTES + i, 0, 2);
            add_direct(t, x + k, s.rows > 16 ? x + k + 16 * l->x_stride : NULL, 2 * l->x_stride, w);
        }
        finish_some(l, pending, 2, finish);
    }
    finish_some(l, pending, STEP, finish);
    store_sums(t, s.y);
}

/* The sums of a part by tiles: all rows meet so much of a panel as the nearest cache holds, before they meet more. */
INLINE void multiply_strips(const Linear *l, const Part part, Finish finish) {
    _Alignas(64) Sums kept[2][MOST_STRIPS], y[2]; /* of a gate and its partner, or of one panel; the last ones */
    const int64_t depth = part.rows > 32 ? DEEP : l->k;
    Pending pending = {0};
    Tiles tiles;
    int turn = 0;
    check("row", part.rows - 1, 32 * MOST_STRIPS);
    shape_tiles(&tiles, l->tiled == ORDERED ? 32 : part.rows);
    for (int64_t panel = part.begin; panel < part.end; panel++)
        for (int gate = l->gate != 0; gate >= 0; gate--)
            for (int64_t k = 0; k < l->k; k += depth) {
                const int64_t number = l->gate && !gate ? units(l) + panel : panel, to = least(l->k, k + depth);
                const uint16_t *w = (const uint16_t *)l->panels + number * panel_bytes(l) / 2;
                for (int64_t i = 0; i < part.rows; i += 32) {
                    const int last = to == l->k && !gate;
                    float (*sums)[PANEL] = kept[gate][i / 32], (*to_sums)[PANEL] = last ? y[turn] : sums;
                    const Strip s = {part.row + i, least(32, part.rows - i), k, to, w, sums, to_sums};
                    multiply_tiles(&tiles, l, s, &pending, finish);
                    if (!last)
                        continue;
                    pending = (Pending){s.row, s.rows, panel, l->gate ? kept[1][i / 32] : s.y, s.y};
                    turn = !turn;
                }
            }
    finish_some(l, &pending, STEP, finish);
    tiles_end(&tiles);
}
#endif

/* The sums of a part, handed to `finish`. */
INLINE void multiply_part(const Linear *l, const Part part, Finish finish) {
    _Alignas(64) Sums y, up;
#if defined(TILES)
    if (l->tiled == ORDERED || (l->tiled == DIRECT && part.rows > LONE)) {
        multiply_strips(l, part, finish);
        return;
    }
#endif
    for (int64_t panel = part.begin; panel < part.end; panel++)
        for (int64_t i = 0; i < part.rows; i += FEW) {
            const int64_t here = least(FEW, part.rows - i);
            multiply(l, part.row + i, here, panel, y);
            if (l->gate)
                multiply(l, part.row + i, here, units(l) + panel, up);
            finish(l, part.row + i, here, panel, y, up);
        }
}

INLINE void multiply_item(const Linear *l, int64_t rows, int64_t item, Finish finish) {
    multiply_part(l, part_of(l, rows, item), finish);
}

/* Whether a thread meets the rows of an item for the first time in a step. */
INLINE int first_meeting(const Linear *l, void *scratch) {
    int64_t *met = lineshaft_head(scratch);
    return live_rows(&l->e) > l->block || !(*met)++;
}

INLINE char *aligned(char *at, int64_t bytes) { return at + (bytes + 63) / 64 * 64; }

/* Make x of a product whose rows are one block, once for each thread; the item of the first panels leaves the sum with
   the residual for others. Returns where the rest of the scratch begins. */
INLINE void *make_rows(Linear *l, const Part part, int first, char *scratch) {
    if (l->norm) {
        Norm n = l->norm->n;
        const int64_t bytes = part.rows * n.width * (n.narrow ? 2 : 4);
        n.out = scratch, n.total = scratch + bytes;
        for (int64_t row = 0; first && row < part.rows; row++)
            EITHER(norm_row, n.narrow, &n, row);
        if (n.residual && part.begin == 0)
            memcpy(l->norm->n.total, n.total, bytes);
        l->x = n.out, l->x_stride = n.width;
        scratch = aligned(scratch, 2 * bytes);
    }
    if (l->quantize) {
        Quantize q = *l->quantize;
        const int64_t bytes = part.rows * q.out_stride * (q.kind == INTEGERS ? 1 : 2);
        if (l->norm)
            q.x = l->x, q.x_stride = l->x_stride;
        q.codes = scratch, q.scales = (float *)aligned(scratch, bytes);
        for (int64_t row = 0; first && row < part.rows; row++)
            EITHER(quantize_row, q.narrow, &q, row);
        l->x = q.codes, l->x_stride = q.out_stride, l->tokens = q.scales;
        scratch = aligned((char *)q.scales, part.rows * sizeof(float));
    }
    return scratch;
}

/* Turn the heads that the columns of a part are, and write them to pages. */
INLINE void turn_columns(const Linear *l, const Part part) {
    if (!l->rope)
        return;
    const int64_t panels = l->rope->r.head_dim / PANEL;
    for (int64_t token = part.row; token < part.row + part.rows; token++)
        for (int64_t head = part.begin / panels; head < part.end / panels; head++)
            EITHER(turn_one, l->rope->r.narrow, l->rope, token, head);
}

EXPORT const int64_t NAME(linear_bytes) = sizeof(Linear);
EXPORT int64_t NAME(linear_items)(const void *job) {
    const Linear *l = job;
    return multiply_items(l, live_rows(&l->e));
}

EXPORT void NAME(linear_body)(const void *job, int64_t item, void *scratch) {
    Linear l = *(const Linear *)job;
    const Part part = part_of(&l, live_rows(&l.e), item);
    make_rows(&l, part, first_meeting(&l, scratch), scratch);
    multiply_part(&l, part, finish);
    turn_columns(&l, part);
}

/* ---- rows in the order of tiles ---------------------------------------------------------------------------------- */

typedef struct {
    Extent e;
    const uint16_t *x; /* [m, k], k a multiple of 32 */
    uint16_t *out;     /* [m / 32, k / 32, 32, 32], zeros where x ends */
    int64_t k, x_stride;
} Order;

EXPORT const int64_t NAME(order_bytes) = sizeof(Order);
EXPORT int64_t NAME(order_items)(const void *job) {
    const Order *o = job;
    return (live_rows(&o->e) + 31) / 32;
}

EXPORT void NAME(order_body)(const void *job, int64_t item, void *scratch) {
    const Order *o = job;
    const int64_t first = 32 * item, rows = least(32, live_rows(&o->e) - first);
    for (int64_t k = 0; k < o->k; k += 32) {
        uint16_t *to = o->out + first * o->k + 32 * k;
        for (int64_t i = 0; i < rows; i++)
            memcpy(to + 32 * i, o->x + (first + i) * o->x_stride + k, 64);
        memset(to + 32 * rows, 0, (32 - rows) * 64);
    }
}
