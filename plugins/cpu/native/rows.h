/* Steps of a tape that work on rows, included by kernels.c: lookups, copies, norms, gates, rotations, writes to pages.
   Each has a job, a count of its items and a body. */

/* ---- rows apart -------------------------------------------------------------------------------------------------- */

typedef struct {
    Extent e;
    int64_t grain;
    Gate g;
} GateStep;

GRAINS(gate, GateStep)
EXPORT void NAME(gate_body)(const void *job, int64_t item, void *scratch) {
    const GateStep *j = job;
    EACH_ROW(row, j, item) gate_item(&j->g, row, scratch);
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

/* ---- merges ------------------------------------------------------------------------------------------------------ */

typedef struct {
    Extent e;
    int64_t grain;
    const char *x, *others; /* rows; of those with a source, `others` has them */
    char *out;
    const int32_t *source; /* [rows]; -1: the row of x */
    int64_t count;         /* rows of `others` */
    int64_t bytes, x_stride, others_stride;
} MergeStep;

GRAINS(merge, MergeStep)
EXPORT void NAME(merge_body)(const void *job, int64_t item, void *scratch) {
    const MergeStep *j = job;
    EACH_ROW(row, j, item) {
        const int64_t at = j->source[row];
        const int other = at >= 0 && at < j->count;
        memcpy(j->out + row * j->bytes, other ? j->others + at * j->others_stride : j->x + row * j->x_stride, j->bytes);
    }
}

typedef struct {
    Extent e; /* heads of tokens */
    int64_t grain;
    const void *x;     /* [parts, rows, width] */
    const float *lse;  /* [parts, rows] */
    const void *sinks; /* [heads] or NULL */
    void *out;         /* [rows, width] */
    int64_t parts, heads, width, narrow, narrow_sinks;
} StatesStep;

/* Attention over disjoint keys, of each part's by their logsumexp; a part of -inf is not read. */
INLINE void merge_head(const StatesStep *j, int64_t row, float *weights, int narrow) {
    const int64_t whole = j->width - j->width % WIDTH, apart = j->e.rows * j->width;
    const float sink = j->sinks ? load_one(j->sinks, row % j->heads, j->narrow_sinks) : -INFINITY;
    float peak = sink, total = 0;
    for (int64_t p = 0; p < j->parts; p++)
        peak = fmaxf(peak, j->lse[p * j->e.rows + row]);
    for (int64_t p = 0; p < j->parts; p++) {
        const float lse = j->lse[p * j->e.rows + row];
        weights[p] = lse == -INFINITY ? 0 : expf(lse - peak);
        total += weights[p];
    }
    total += sink == -INFINITY ? 0 : expf(sink - peak);
    for (int64_t p = 0; p < j->parts; p++)
        weights[p] /= total == 0 ? 1 : total;
    for (int64_t i = 0; i < j->width; i += i < whole ? WIDTH : 1) {
        floats mixed = {0};
        for (int64_t p = 0; p < j->parts; p++) {
            const int64_t at = p * apart + row * j->width + i;
            if (weights[p] != 0)
                mixed += weights[p] * (i < whole ? load(j->x, at, narrow) : splat(load_one(j->x, at, narrow)));
        }
        if (i < whole)
            store(j->out, row * j->width + i, mixed, narrow);
        else
            store_one(j->out, row * j->width + i, mixed[0], narrow);
    }
}

GRAINS(states, StatesStep)
EXPORT void NAME(states_body)(const void *job, int64_t item, void *scratch) {
    const StatesStep *j = job;
    EACH_ROW(row, j, item) EITHER(merge_head, j->narrow, j, row, scratch);
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

/* ---- attention --------------------------------------------------------------------------------------------------- */

EXPORT const int64_t NAME(attend_bytes) = sizeof(Attend);
EXPORT void NAME(attend_cut)(void *job, int threads) { cut(job, threads); }

EXPORT int64_t NAME(attend_items)(const void *job) {
    const Attend *a = job;
    const int64_t tokens = a->live ? least(*a->live, a->tokens) : a->tokens;
    return tokens * a->shares * a->parts;
}

EXPORT void NAME(attend_body)(const void *job, int64_t item, void *scratch) { attend_item(job, item, scratch); }
