/* Norms, rotations and writes to pages as steps of a tape, included by kernels.c: what a product may begin or end with.
   */

/* Of `rows` rows, `grain` to an item. */
#define GRAINS(name, Job) \
    EXPORT const int64_t NAME(name##_bytes) = sizeof(Job); \
    EXPORT int64_t NAME(name##_items)(const void *job) { \
        const Job *j = job; \
        return (live_rows(&j->e) + j->grain - 1) / j->grain; \
    }

#define EACH_ROW(row, j, item) \
    for (int64_t row = (item) * (j)->grain, row##_end = least(row + (j)->grain, live_rows(&(j)->e)); row < row##_end; \
         row++)

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

/* ---- pages in panels (flash.h) ----------------------------------------------------------------------------------- */

typedef struct {
    void *keys, *values; /* pages in panels; NULL: none */
    int64_t page_size, heads, k_dim, v_dim, narrow;
    int64_t slots; /* of the cache, in whichever layout */
} Panels;

/* How pages hold keys and values that are not numbers of the executed dtype (pages.h). */
typedef struct {
    int64_t kind;               /* of their codes; NUMBERS: they are none */
    float *k_scales, *v_scales; /* [N, Hkv, P], a scale stored for each head of a slot; NULL: none */
    const float *given;         /* kv_scales: of all keys and of all values, or of each head's; NULL: none */
    int64_t per_head;
} Coding;

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
    Coding c;
} PutStep;

INLINE void put_token(const PutStep *j, int64_t token) {
    const int64_t size = j->p.narrow ? 2 : 4;
    for (int64_t head = 0; head < j->p.heads; head++) {
        put_key(&j->p, j->slots[token], head, (const char *)j->k + (token * j->k_stride + head * j->p.k_dim) * size);
        put_value(&j->p, j->slots[token], head, (const char *)j->v + (token * j->v_stride + head * j->p.v_dim) * size);
    }
}

/* ---- heads ------------------------------------------------------------------------------------------------------- */

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
        const int64_t to = (token * r->q_heads + head) * dim;
        turn_head(r->q, token * r->q_stride + head * dim, r->q_out, to, r, cos, sin, narrow);
        return;
    }
    head -= r->q_heads;
    if (j->slots)
        check("slot", slot, j->p.slots);
    if (head < r->k_heads) {
        const int64_t to = (token * r->k_heads + head) * dim;
        turn_head(r->k, token * r->k_stride + head * dim, r->k_out, to, r, cos, sin, narrow);
        if (j->p.page_size)
            put_key(&j->p, slot, head, (const char *)r->k_out + to * size);
        else if (j->k_pages)
            memcpy((char *)j->k_pages + (slot * r->k_heads + head) * dim * size, (char *)r->k_out + to * size,
                   dim * size);
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
    int64_t held; /* slots of the cache */
} WriteStep;

GRAINS(write, WriteStep)
EXPORT void NAME(write_body)(const void *job, int64_t item, void *scratch) {
    const WriteStep *j = job;
    EACH_ROW(token, j, item) {
        check("slot", j->slots[token], j->held);
        memcpy(j->pages + j->slots[token] * j->bytes, j->x + token * j->stride, j->bytes);
    }
}

/* ---- rows of x as codes ----------------------------------------------------------------------------------------- */

/* Codes of 8 bits: int8, e4m3 without NaN; or of 4 bits, raised by `zero`; of 8 bits: e4m3, e5m2; or none at all. */
enum { INTEGERS, FLOATS, FOUR, E4M3, E5M2, NUMBERS };

typedef struct {
    Extent e;
    int64_t grain;
    const void *x;  /* [m, width] */
    void *codes;    /* [m, out_stride]: int8, or e4m3 as bfloat16; zeros from `width` on */
    float *scales;  /* [m] */
    int64_t width, x_stride, out_stride, kind, narrow;
} Quantize;

INLINE floats magnitude(floats x) { return (floats)((words)x & 0x7fffffff); }

INLINE float largest_code(int64_t kind) { return kind == INTEGERS ? 127.0f : kind == E5M2 ? 57344.0f : 448.0f; }

/* To whole numbers, or to numbers of e4m3 or e5m2 of at most their largest; halves to even. */
INLINE floats rounded(floats x, int64_t kind) {
    if (kind == INTEGERS)
        return x + 12582912.0f - 12582912.0f; /* 1.5 * 2^23, from where on floats are whole */
    const uint32_t drop = kind == E5M2 ? 21 : 20, half = 1u << (drop - 1);
    const float shift = kind == E5M2 ? 0x1.8p7f : 0x1.8p14f, least_normal = kind == E5M2 ? 0x1p-14f : 0x1p-6f;
    const words bits = (words)magnitude(x), sign = (words)x & 0x80000000;
    const floats normal = (floats)((bits + (half - 1) + (bits >> drop & 1)) & -(half << 1));
    const floats small = magnitude(x) + shift - shift;
    return (floats)((words)choose(magnitude(x) < least_normal, small, normal) | sign);
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
    const float top = largest_code(q->kind);
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
