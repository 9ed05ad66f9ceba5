/* Steps of a tape that work on rows, included by kernels.c: lookups, copies, norms, gates, rotations, writes to pages.
   Each has a job, a count of its items and a body. */

/* ---- rows apart ---------------------------------------------------------------------------------------------------- */

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

typedef struct {
    Extent e;
    int64_t grain;
    Gate g;
} GateStep;

GRAINS(gate, GateStep)
EXPORT void NAME(gate_body)(const void *job, int64_t item, void *scratch) {
    const GateStep *j = job;
    EACH_ROW(row, j, item) EITHER(gate_row, j->g.narrow, &j->g, row);
}

typedef struct {
    Extent e;
    int64_t grain;
    const void *x, *y; /* [rows, width], dense */
    void *out;
    int64_t width, narrow;
} AddStep;

GRAINS(add, AddStep)
EXPORT void NAME(add_body)(const void *job, int64_t item, void *scratch) {
    const AddStep *j = job;
    EACH_ROW(row, j, item) {
        int64_t i = row * j->width;
        const int64_t end = i + j->width;
        for (; i + WIDTH <= end; i += WIDTH)
            store(j->out, i, load(j->x, i, j->narrow) + load(j->y, i, j->narrow), j->narrow);
        for (; i < end; i++)
            store_one(j->out, i, load_one(j->x, i, j->narrow) + load_one(j->y, i, j->narrow), j->narrow);
    }
}

typedef struct {
    Extent e;
    int64_t grain;
    const char *from; /* rows: that of index[row] - first where there is an index */
    char *to;
    const int32_t *index, *first; /* [rows] or NULL; int32[1] or NULL */
    int64_t count;                /* rows that there are: what an index names beyond them is zeros */
    int64_t bytes, to_stride;     /* of a row */
    int64_t from_stride, inner, inner_stride; /* `inner` rows lie `inner_stride` apart before the next `from_stride` */
    int64_t scaled, narrow;       /* whether numbers are multiplied by `scale` */
    double scale;
} LookupStep;

INLINE void scale_row(const LookupStep *j, const char *from, char *to) {
    const int64_t size = j->narrow ? 2 : 4;
    for (int64_t i = 0; i < j->bytes / size; i++)
        store_one(to, i, load_one(from, i, j->narrow) * (float)j->scale, j->narrow);
}

GRAINS(lookup, LookupStep)
EXPORT void NAME(lookup_body)(const void *job, int64_t item, void *scratch) {
    const LookupStep *j = job;
    EACH_ROW(row, j, item) {
        const int64_t at = j->index ? (int64_t)j->index[row] - (j->first ? *j->first : 0) : row;
        const char *from = j->from + at / j->inner * j->from_stride + at % j->inner * j->inner_stride;
        char *to = j->to + row * j->to_stride;
        if (at < 0 || at >= j->count)
            memset(to, 0, j->bytes);
        else if (j->scaled)
            scale_row(j, from, to);
        else
            memcpy(to, from, j->bytes);
    }
}

typedef struct {
    Extent e;
    int64_t grain;
    Argmax a;
} ArgmaxStep;

GRAINS(argmax, ArgmaxStep)
EXPORT void NAME(argmax_body)(const void *job, int64_t item, void *scratch) {
    const ArgmaxStep *j = job;
    EACH_ROW(row, j, item) argmax_item(&j->a, row, scratch);
}

/* ---- pages in panels (flash.h) ---------------------------------------------------------------------------------------- */

typedef struct {
    void *keys, *values; /* pages in panels; NULL: none */
    int64_t page_size, heads, k_dim, v_dim, narrow;
} Panels;

/* Put one token's keys [Hk, D] into its slot. */
INLINE void put_keys(const Panels *p, int64_t slot, const void *x) {
    const int64_t size = p->page_size, page = slot / size, at = slot % size;
    for (int64_t head = 0; head < p->heads; head++) {
        const int64_t to = (page * p->heads + head) * p->k_dim * size, from = head * p->k_dim;
        if (p->narrow)
            for (int64_t d = 0; d < p->k_dim; d += 2)
                memcpy((uint16_t *)p->keys + to + d * size + 2 * at, (const uint16_t *)x + from + d, 4);
        else
            for (int64_t d = 0; d < p->k_dim; d++)
                ((float *)p->keys)[to + d * size + at] = ((const float *)x)[from + d];
    }
}

/* Put one token's values [Hk, Dv] into its slot. */
INLINE void put_values(const Panels *p, int64_t slot, const void *x) {
    const int64_t size = p->page_size, page = slot / size, at = slot % size;
    for (int64_t head = 0; head < p->heads; head++) {
        const int64_t to = (page * p->heads + head) * p->v_dim * size, from = head * p->v_dim;
        if (p->narrow) {
            uint16_t *row = (uint16_t *)p->values + to + at / 2 * 2 * p->v_dim + at % 2;
            for (int64_t d = 0; d < p->v_dim; d++)
                row[2 * d] = ((const uint16_t *)x)[from + d];
        } else
            memcpy((float *)p->values + to + at * p->v_dim, (const float *)x + from, p->v_dim * sizeof(float));
    }
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
    EACH_ROW(token, j, item) {
        put_keys(&j->p, j->slots[token], (const char *)j->k + token * j->k_stride * size);
        if (j->p.values)
            put_values(&j->p, j->slots[token], (const char *)j->v + token * j->v_stride * size);
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

GRAINS(rope, RopeStep)
EXPORT void NAME(rope_body)(const void *job, int64_t item, void *scratch) {
    const RopeStep *j = job;
    EACH_ROW(token, j, item) {
        EITHER(turn_token, j->r.narrow, &j->r, token);
        if (j->p.page_size) {
            put_keys(&j->p, j->slots[token], (const char *)j->r.k_out + token * j->k_bytes);
            if (j->v)
                put_values(&j->p, j->slots[token], (const char *)j->v + token * j->v_stride_bytes);
            continue;
        }
        if (j->k_pages)
            memcpy((char *)j->k_pages + j->slots[token] * j->k_bytes, (char *)j->r.k_out + token * j->k_bytes, j->k_bytes);
        if (j->v_pages)
            memcpy((char *)j->v_pages + j->slots[token] * j->v_bytes, (const char *)j->v + token * j->v_stride_bytes,
                   j->v_bytes);
    }
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

/* ---- attention ----------------------------------------------------------------------------------------------------- */

EXPORT const int64_t NAME(attend_bytes) = sizeof(Attend);
EXPORT void NAME(attend_cut)(void *job, int threads) { cut(job, threads); }

EXPORT int64_t NAME(attend_items)(const void *job) {
    const Attend *a = job;
    const int64_t tokens = a->live ? least(*a->live, a->tokens) : a->tokens;
    return tokens * a->shares * a->parts;
}

EXPORT void NAME(attend_body)(const void *job, int64_t item, void *scratch) { attend_item(job, item, scratch); }
