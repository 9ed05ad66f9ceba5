/* Norms, rotations and writes to pages as steps of a tape, included by kernels.c: what a product may begin or end with. */

/* Of `rows` rows, `grain` to an item. */
#define GRAINS(name, Job) \
    EXPORT const int64_t NAME(name##_bytes) = sizeof(Job); \
    EXPORT int64_t NAME(name##_items)(const void *job) { \
        const Job *j = job; \
        return (live_rows(&j->e) + j->grain - 1) / j->grain; \
    }

#define EACH_ROW(row, j, item) \
    for (int64_t row = (item) * (j)->grain, row##_end = least(row + (j)->grain, live_rows(&(j)->e)); row < row##_end; row++)

typedef struct {
    Extent e;
    int64_t grain;
    Norm n;
} NormStep;

GRAINS(norm, NormStep)
EXPORT void NAME(norm_body)(const void *job, int64_t item, void *scratch) {
    const NormStep *j = job;
    EACH_ROW(row, j, item) EITHER(norm_row, j->n.narrow, &j->n, row);
}

/* ---- pages in panels (flash.h) ---------------------------------------------------------------------------------------- */

typedef struct {
    void *keys, *values; /* pages in panels; NULL: none */
    int64_t page_size, heads, k_dim, v_dim, narrow;
} Panels;

/* Put one head's key [D] into its slot. */
INLINE void put_key(const Panels *p, int64_t slot, int64_t head, const void *x) {
    const int64_t size = p->page_size, page = slot / size, at = slot % size;
    const int64_t to = (page * p->heads + head) * p->k_dim * size;
    if (p->narrow)
        for (int64_t d = 0; d < p->k_dim; d += 2)
            memcpy((uint16_t *)p->keys + to + d * size + 2 * at, (const uint16_t *)x + d, 4);
    else
        for (int64_t d = 0; d < p->k_dim; d++)
            ((float *)p->keys)[to + d * size + at] = ((const float *)x)[d];
}

/* Put one head's value [Dv] into its slot. */
INLINE void put_value(const Panels *p, int64_t slot, int64_t head, const void *x) {
    const int64_t size = p->page_size, page = slot / size, at = slot % size;
    const int64_t to = (page * p->heads + head) * p->v_dim * size;
    if (p->narrow) {
        uint16_t *row = (uint16_t *)p->values + to + at / 2 * 2 * p->v_dim + at % 2;
        for (int64_t d = 0; d < p->v_dim; d++)
            row[2 * d] = ((const uint16_t *)x)[d];
    } else
        memcpy((float *)p->values + to + at * p->v_dim, x, p->v_dim * sizeof(float));
}

typedef struct {
    Extent e; /* tokens */
    int64_t grain;
    Panels p;
    const void *k, *v; /* [T, Hk, D], [T, Hk, Dv] */
    const int32_t *slots;
    int64_t k_stride, v_stride;
} PutStep;

GRAINS(put, PutStep)
EXPORT void NAME(put_body)(const void *job, int64_t item, void *scratch) {
    const PutStep *j = job;
    const int64_t size = j->p.narrow ? 2 : 4;
    EACH_ROW(token, j, item)
        for (int64_t head = 0; head < j->p.heads; head++) {
            put_key(&j->p, j->slots[token], head, (const char *)j->k + (token * j->k_stride + head * j->p.k_dim) * size);
            put_value(&j->p, j->slots[token], head, (const char *)j->v + (token * j->v_stride + head * j->p.v_dim) * size);
        }
}

/* ---- heads --------------------------------------------------------------------------------------------------------- */

typedef struct {
    Extent e; /* tokens */
    int64_t grain;
    Rope r;
    void *k_pages, *v_pages; /* [slots, Hk, D] and [slots, Hk, Dv]; NULL: nothing is written */
    const void *v;
    const int32_t *slots; /* [T] */
    int64_t v_bytes, v_stride_bytes, k_bytes; /* of a token */
    Panels p; /* page_size 0: pages are rows of slots */
} RopeStep;

/* Turn one head of a token, or write a value: heads count queries, then keys, then values. */
INLINE void turn_one(const RopeStep *j, int64_t token, int64_t head, int narrow) {
    const Rope *r = &j->r;
    const int64_t size = narrow ? 2 : 4, half = r->dim / 2, dim = r->head_dim, slot = j->slots ? j->slots[token] : 0;
    const float *cos = r->cos + r->positions[token] * half, *sin = r->sin + r->positions[token] * half;
    if (head < r->q_heads) {
        turn_head(r->q, token * r->q_stride + head * dim, r->q_out, (token * r->q_heads + head) * dim, r, cos, sin, narrow);
        return;
    }
    head -= r->q_heads;
    if (head < r->k_heads) {
        const int64_t to = (token * r->k_heads + head) * dim;
        turn_head(r->k, token * r->k_stride + head * dim, r->k_out, to, r, cos, sin, narrow);
        if (j->p.page_size)
            put_key(&j->p, slot, head, (const char *)r->k_out + to * size);
        else if (j->k_pages)
            memcpy((char *)j->k_pages + (slot * r->k_heads + head) * dim * size, (char *)r->k_out + to * size, dim * size);
        return;
    }
    head -= r->k_heads;
    const int64_t bytes = j->v_bytes / r->k_heads;
    const char *value = (const char *)j->v + token * j->v_stride_bytes + head * bytes;
    if (j->p.page_size)
        put_value(&j->p, slot, head, value);
    else
        memcpy((char *)j->v_pages + slot * j->v_bytes + head * bytes, value, bytes);
}

INLINE int64_t heads_of(const RopeStep *j) { return j->r.q_heads + (j->v ? 2 : 1) * j->r.k_heads; }

GRAINS(rope, RopeStep)
EXPORT void NAME(rope_body)(const void *job, int64_t item, void *scratch) {
    const RopeStep *j = job;
    EACH_ROW(token, j, item)
        for (int64_t head = 0; head < heads_of(j); head++)
            EITHER(turn_one, j->r.narrow, j, token, head);
}

typedef struct {
    Extent e; /* tokens */
    int64_t grain;
    const char *x; /* [T, bytes] */
    char *pages;   /* [slots, bytes] */
    const int32_t *slots;
    int64_t bytes, stride;
} WriteStep;

GRAINS(write, WriteStep)
EXPORT void NAME(write_body)(const void *job, int64_t item, void *scratch) {
    const WriteStep *j = job;
    EACH_ROW(token, j, item) memcpy(j->pages + j->slots[token] * j->bytes, j->x + token * j->stride, j->bytes);
}

/* ---- rows of x as codes ----------------------------------------------------------------------------------------- */

enum { INTEGERS, FLOATS, FOUR }; /* codes of 8 bits: int8, e4m3; or of 4 bits, raised by `zero` */

typedef struct {
    Extent e;
    int64_t grain;
    const void *x;  /* [m, width] */
    void *codes;    /* [m, out_stride]: int8, or e4m3 as bfloat16; zeros from `width` on */
    float *scales;  /* [m] */
    int64_t width, x_stride, out_stride, kind, narrow;
} Quantize;

INLINE floats magnitude(floats x) { return (floats)((words)x & 0x7fffffff); }

/* To whole numbers, or to numbers of e4m3 below 449; halves to even. */
INLINE floats rounded(floats x, int64_t kind) {
    if (kind == INTEGERS)
        return x + 12582912.0f - 12582912.0f; /* 1.5 * 2^23, from where on floats are whole */
    const words bits = (words)magnitude(x), sign = (words)x & 0x80000000;
    const floats normal = (floats)((bits + 0x7ffff + (bits >> 20 & 1)) & 0xfff00000);
    const floats small = magnitude(x) + 0x1.8p14f - 0x1.8p14f;
    return (floats)((words)choose(magnitude(x) < 0x1p-6f, small, normal) | sign);
}

INLINE void put_codes(const Quantize *q, int64_t at, floats x) {
    if (q->kind == INTEGERS) {
        typedef int8_t bytes __attribute__((vector_size(WIDTH)));
        const bytes codes = __builtin_convertvector(__builtin_convertvector(x, ints), bytes);
        memcpy((int8_t *)q->codes + at, &codes, sizeof codes);
    } else {
        store(q->codes, at, x, 1);
    }
}

/* WIDTH numbers of a row from `k` on; zeros where it ends. */
INLINE floats load_within(const Quantize *q, int64_t row, int64_t k, int narrow) {
    if (k + WIDTH <= q->width)
        return load(q->x, row * q->x_stride + k, narrow);
    float tail[WIDTH] = {0};
    for (int64_t i = 0; k + i < q->width; i++)
        tail[i] = load_one(q->x, row * q->x_stride + k + i, narrow);
    return load(tail, 0, 0);
}

INLINE void quantize_row(const Quantize *q, int64_t row, int narrow) {
    const float top = q->kind == INTEGERS ? 127.0f : 448.0f;
    floats most_of = {0};
    ints lost = {0};
    for (int64_t k = 0; k < q->width; k += WIDTH) {
        const floats x = magnitude(load_within(q, row, k, narrow));
        most_of = larger(x, most_of);
        lost |= ~(x < INFINITY);
    }
    const int nan = any(lost);
    float scale = maximum(most_of) / top;
    scale = scale < 0x1p-126f ? 1.0f : scale;
    q->scales[row] = nan ? NAN : scale;
    for (int64_t k = 0; k < q->out_stride; k += WIDTH) {
        floats x = {0};
        if (!nan && k < q->width)
            x = load_within(q, row, k, narrow) / scale;
        x = choose(x > top, splat(top), choose(x < -top, splat(-top), x));
        put_codes(q, row * q->out_stride + k, rounded(x, q->kind));
    }
}

GRAINS(quantize, Quantize)
EXPORT void NAME(quantize_body)(const void *job, int64_t item, void *scratch) {
    const Quantize *q = job;
    EACH_ROW(row, q, item) EITHER(quantize_row, q->narrow, q, row);
}
