/* The CPU backend's kernels, compiled once per instruction set level. Arrays are bfloat16 (`narrow`) or float; sums are
   made in float; strides count elements. No kernel allocates, and none looks at anything but its arguments. */
#include "team.h"
#include "tiles.h"
#include "vectors.h"

#define PASTE(level, name) lineshaft_##level##_##name
#define EXPAND(level, name) PASTE(level, name)
#define NAME(name) EXPAND(LEVEL, name)
#define EXPORT __attribute__((visibility("default")))

#if defined(LINESHAFT_DEBUG)
#include <stdio.h>
#include <stdlib.h>
#endif

/* A function whose last parameter is `narrow`, inlined once for each of its values. */
#define EITHER(function, narrow, ...) ((narrow) ? function(__VA_ARGS__, 1) : function(__VA_ARGS__, 0))

#define SMALL 32768 /* values below which a second thread costs more than it saves */

INLINE int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }
INLINE int64_t most(int64_t a, int64_t b) { return a > b ? a : b; }

/* In builds for debugging, end the process at an index that is not below `count`. */
INLINE void check(const char *what, int64_t given, int64_t count) {
#if defined(LINESHAFT_DEBUG)
    if (given < 0 || given >= count) {
        fprintf(stderr, "lineshaft: %s %lld is given; allowed are 0 to %lld\n", what, (long long)given,
                (long long)count - 1);
        abort();
    }
#endif
}

/* How many rows a job of a tape has now: all of them, or those of the step's live tokens, `times` to a token. */
typedef struct {
    const int32_t *live; /* NULL: all */
    int64_t rows, times;
} Extent;

INLINE int64_t live_rows(const Extent *e) { return e->live ? least(*e->live * e->times, e->rows) : e->rows; }

/* Where a number of a row lies: rows of `width` numbers follow one another, or, `ordered`, are in the order of tiles,
   which is [rows / 32, width / 32, 32, 32]. */
INLINE int64_t place_of(int64_t row, int64_t column, int64_t width, int64_t ordered) {
    if (!ordered)
        return row * width + column;
    return (row / 32 * (width / 32) + column / 32) * 1024 + row % 32 * 32 + column % 32;
}

/* body(job, row) for each of `rows` rows of `width` values. */
static void run_rows(lineshaft_body body, const void *job, int64_t rows, int64_t width, int threads) {
    lineshaft_run(body, job, rows, rows * width < SMALL ? 1 : threads);
}

/* ---- rms_norm, add_rms_norm ------------------------------------------------------------------------------------- */

typedef struct {
    const void *x, *residual, *weight; /* [T, H], [T, H] or NULL, [H] */
    void *out, *total;                 /* [T, H], [T, H] or NULL */
    int64_t width, x_stride, residual_stride;
    int64_t inner, inner_stride; /* rows that lie `inner_stride` apart before the next `x_stride`; x alone */
    float eps;
    int narrow;
    int64_t ordered; /* whether `out` is in the order of tiles */
} Norm;

INLINE void norm_row(const Norm *n, int64_t row, int narrow) {
    const int64_t x = row / n->inner * n->x_stride + row % n->inner * n->inner_stride;
    const int64_t residual = row * n->residual_stride, out = row * n->width;
    const int64_t whole = n->width - n->width % WIDTH;
    const void *from = n->x;
    int64_t at = x;
    floats squares[2] = {{0}};
    float rest = 0;
    if (n->residual) {
        for (int64_t i = 0; i < whole; i += WIDTH)
            store(n->total, out + i, load(n->x, x + i, narrow) + load(n->residual, residual + i, narrow), narrow);
        for (int64_t i = whole; i < n->width; i++)
            store_one(n->total, out + i, load_one(n->x, x + i, narrow) + load_one(n->residual, residual + i, narrow),
                      narrow);
        from = n->total, at = out;
    }
    for (int64_t i = 0; i < whole; i += WIDTH) {
        floats value = load(from, at + i, narrow);
        squares[i / WIDTH % 2] += value * value;
    }
    for (int64_t i = whole; i < n->width; i++) {
        float value = load_one(from, at + i, narrow);
        rest += value * value;
    }
    const float mean = (sum(squares[0] + squares[1]) + rest) / (float)n->width;
    const float scale = 1.0f / sqrtf(mean + n->eps);
    for (int64_t i = 0; i < whole; i += WIDTH)
        store(n->out, place_of(row, i, n->width, n->ordered),
              load(from, at + i, narrow) * scale * load(n->weight, i, narrow), narrow);
    for (int64_t i = whole; i < n->width; i++)
        store_one(n->out, out + i, load_one(from, at + i, narrow) * scale * load_one(n->weight, i, narrow), narrow);
}

static void norm_item(const void *job, int64_t row, void *scratch) {
    const Norm *n = job;
    EITHER(norm_row, n->narrow, n, row);
}

EXPORT void NAME(norm)(const void *x, const void *residual, const void *weight, void *out, void *total, int64_t rows,
                       int64_t width, int64_t x_stride, int64_t residual_stride, float eps, int narrow, int threads) {
    const Norm job = {x, residual, weight, out, total, width, x_stride, residual_stride, 1, 0, eps, narrow};
    run_rows(norm_item, &job, rows, width, threads);
}

/* ---- silu_mul, gelu_mul ----------------------------------------------------------------------------------------- */

typedef struct {
    const void *x; /* [T, 2F], gate first */
    void *out;     /* [T, F] */
    int64_t width, stride;
    int narrow, gelu; /* gelu: in the place of silu */
} Gate;

/* x / (1 + exp(-z)): of z = x it is silu; of this z gelu, whose 1 + tanh(z / 2) is 2 / (1 + exp(-z)). */
INLINE floats activate(floats x, int gelu) {
    const floats z = gelu ? 1.59576912f * (x + 0.044715f * x * x * x) : x;
    return x / (1.0f + exponential(-z));
}

INLINE void gate_row(const Gate *g, int64_t row, int gelu, int narrow) {
    const int64_t gate = row * g->stride, up = gate + g->width, out = row * g->width;
    const int64_t whole = g->width - g->width % WIDTH;
    for (int64_t i = 0; i < whole; i += WIDTH)
        store(g->out, out + i, activate(load(g->x, gate + i, narrow), gelu) * load(g->x, up + i, narrow), narrow);
    for (int64_t i = whole; i < g->width; i++) {
        const float active = activate(splat(load_one(g->x, gate + i, narrow)), gelu)[0];
        store_one(g->out, out + i, active * load_one(g->x, up + i, narrow), narrow);
    }
}

static void gate_item(const void *job, int64_t row, void *scratch) {
    const Gate *g = job;
    if (g->gelu)
        EITHER(gate_row, g->narrow, g, row, 1);
    else
        EITHER(gate_row, g->narrow, g, row, 0);
}

EXPORT void NAME(silu_mul)(const void *x, void *out, int64_t rows, int64_t width, int64_t stride, int narrow,
                           int threads) {
    const Gate job = {x, out, width, stride, narrow, 0};
    run_rows(gate_item, &job, rows, width, threads);
}

/* ---- rope ------------------------------------------------------------------------------------------------------- */

typedef struct {
    const void *q, *k;          /* [T, Hq, D], [T, Hk, D] */
    void *q_out, *k_out;        /* the same, whole */
    const float *cos, *sin;     /* [positions, dim / 2] */
    const int32_t *positions;   /* [T] */
    int64_t q_heads, k_heads, head_dim, dim, q_stride, k_stride;
    int narrow, interleaved; /* whether value 2i turns with 2i + 1, not i with i + dim / 2 */
} Rope;

INLINE void turn_head(const void *x, int64_t from, void *out, int64_t to, const Rope *r, const float *cos,
                      const float *sin, int narrow) {
    const int64_t half = r->dim / 2, whole = r->interleaved ? 0 : half - half % WIDTH;
    const int64_t step = r->interleaved ? 2 : 1, apart = r->interleaved ? 1 : half;
    for (int64_t i = 0; i < whole; i += WIDTH) {
        floats a = load(x, from + i, narrow), b = load(x, from + half + i, narrow);
        floats c = load(cos, i, 0), s = load(sin, i, 0);
        store(out, to + i, a * c - b * s, narrow);
        store(out, to + half + i, b * c + a * s, narrow);
    }
    for (int64_t i = whole; i < half; i++) {
        float a = load_one(x, from + step * i, narrow), b = load_one(x, from + step * i + apart, narrow);
        store_one(out, to + step * i, a * cos[i] - b * sin[i], narrow);
        store_one(out, to + step * i + apart, b * cos[i] + a * sin[i], narrow);
    }
    for (int64_t i = r->dim; i < r->head_dim; i++)
        store_one(out, to + i, load_one(x, from + i, narrow), narrow);
}

INLINE void turn_token(const Rope *r, int64_t t, int narrow) {
    const float *cos = r->cos + r->positions[t] * (r->dim / 2), *sin = r->sin + r->positions[t] * (r->dim / 2);
    for (int64_t h = 0; h < r->q_heads; h++)
        turn_head(r->q, t * r->q_stride + h * r->head_dim, r->q_out, (t * r->q_heads + h) * r->head_dim, r, cos, sin,
                  narrow);
    for (int64_t h = 0; h < r->k_heads; h++)
        turn_head(r->k, t * r->k_stride + h * r->head_dim, r->k_out, (t * r->k_heads + h) * r->head_dim, r, cos, sin,
                  narrow);
}

static void rope_item(const void *job, int64_t token, void *scratch) {
    const Rope *r = job;
    EITHER(turn_token, r->narrow, r, token);
}

EXPORT void NAME(rope)(const void *q, const void *k, void *q_out, void *k_out, const float *cos, const float *sin,
                       const int32_t *positions, int64_t tokens, int64_t q_heads, int64_t k_heads, int64_t head_dim,
                       int64_t dim, int64_t q_stride, int64_t k_stride, int narrow, int threads) {
    const Rope job = {q, k, q_out, k_out, cos, sin, positions, q_heads, k_heads, head_dim, dim, q_stride, k_stride,
                      narrow, 0};
    run_rows(rope_item, &job, tokens, (q_heads + k_heads) * head_dim, threads);
}

/* ---- write_kv --------------------------------------------------------------------------------------------------- */

/* new [T, row_bytes], a row every stride_bytes -> pages [slots, row_bytes] at slots[t]. */
EXPORT void NAME(write_rows)(const char *new, char *pages, const int32_t *slots, int64_t tokens, int64_t row_bytes,
                             int64_t stride_bytes) {
    for (int64_t t = 0; t < tokens; t++)
        memcpy(pages + slots[t] * row_bytes, new + t * stride_bytes, row_bytes);
}

/* ---- argmax ----------------------------------------------------------------------------------------------------- */

typedef struct {
    const void *x; /* [R, V] */
    int32_t *out;  /* [R] */
    int64_t width, stride;
    int narrow;
} Argmax;

INLINE int32_t argmax_row(const Argmax *a, int64_t row, int narrow) {
    const int64_t from = row * a->stride, whole = a->width - a->width % WIDTH;
    floats best = splat(-INFINITY);
    ints unordered = {0};
    for (int64_t i = 0; i < whole; i += WIDTH) {
        floats x = load(a->x, from + i, narrow);
        best = larger(x, best);
        unordered |= x != x;
    }
    float top = maximum(best);
    int nan = any(unordered);
    for (int64_t i = whole; i < a->width; i++) {
        float x = load_one(a->x, from + i, narrow);
        top = x > top ? x : top;
        nan |= x != x;
    }
    if (nan || top == -INFINITY)
        return -1;
    int64_t i = 0;
    for (; i < whole; i += WIDTH) {
        if (any(load(a->x, from + i, narrow) == top))
            break;
    }
    while (load_one(a->x, from + i, narrow) != top)
        i++;
    return (int32_t)i;
}

static void argmax_item(const void *job, int64_t row, void *scratch) {
    const Argmax *a = job;
    a->out[row] = EITHER(argmax_row, a->narrow, a, row);
}

/* The first largest of each row; -1 for a row with a NaN or nothing above -inf. */
EXPORT void NAME(argmax)(const void *x, int32_t *out, int64_t rows, int64_t width, int64_t stride, int narrow,
                         int threads) {
    const Argmax job = {x, out, width, stride, narrow};
    run_rows(argmax_item, &job, rows, width, threads);
}

#include "attend.h"
#include "heads.h"
#include "linear.h"
#include "codes.h"
#include "pages.h"
#include "flash.h"
#include "rows.h"
#include "choice.h"
#include "experts.h"
