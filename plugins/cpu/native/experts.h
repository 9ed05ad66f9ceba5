/* Products with one weight of several, included by kernels.c: per head, and per expert with the routing around it. */

/* ---- head_linear ------------------------------------------------------------------------------------------------- */

typedef struct {
    Linear l; /* of the first head */
    int64_t heads;
    int64_t panel_bytes, x_step, out_step; /* from one head to the next: bytes of weights, values of x and of out */
} Heads;

EXPORT const int64_t NAME(heads_bytes) = sizeof(Heads);
EXPORT int64_t NAME(heads_items)(const void *job) {
    const Heads *h = job;
    return h->heads * multiply_items(&h->l, live_rows(&h->l.e));
}

EXPORT void NAME(heads_body)(const void *job, int64_t item, void *scratch) {
    const Heads *h = job;
    const int64_t rows = live_rows(&h->l.e), each = multiply_items(&h->l, rows), head = item / each;
    const int64_t size = h->l.narrow ? 2 : 4;
    Linear l = h->l;
    l.x = (const char *)l.x + head * h->x_step * size;
    l.out = (char *)l.out + head * h->out_step * size;
    l.panels = (const char *)l.panels + head * h->panel_bytes;
    multiply_item(&l, rows, item % each, finish);
}

/* ---- router_topk ------------------------------------------------------------------------------------------------- */

typedef struct {
    Extent e; /* tokens */
    int64_t grain;
    const void *x; /* [T, experts] */
    int32_t *ids;  /* [T, k] */
    float *probs;  /* [T, k] */
    int64_t experts, k, stride, groups, group_top, narrow;
    int64_t after, renormalise; /* whether the softmax is over the chosen; whether their weights are made to sum to 1 */
    double scale;
} Router;

/* The ids and values of the k largest of n values, in descending order: ties to the lowest id, NaN last. */
static void lead(const float *x, int64_t n, int64_t k, int32_t *ids, float *values) {
    int64_t found = 0;
    for (int64_t i = 0; i < n; i++) {
        int64_t at = found;
        while (at > 0 && (x[i] > values[at - 1] || (values[at - 1] != values[at - 1] && x[i] == x[i])))
            at--;
        if (at == k)
            continue;
        found = least(found + 1, k);
        for (int64_t j = found - 1; j > at; j--)
            ids[j] = ids[j - 1], values[j] = values[j - 1];
        ids[at] = (int32_t)i, values[at] = x[i];
    }
}

/* Take all but the best groups of neighbours out of the choice. */
static void close_groups(const Router *r, float *x, float *best, float *values, int32_t *chosen) {
    const int64_t size = r->experts / r->groups;
    for (int64_t g = 0; g < r->groups; g++) {
        best[g] = -INFINITY;
        for (int64_t i = g * size; i < (g + 1) * size; i++)
            best[g] = x[i] > best[g] ? x[i] : best[g];
    }
    lead(best, r->groups, r->group_top, chosen, values);
    for (int64_t g = 0; g < r->groups; g++) {
        int open = 0;
        for (int64_t i = 0; i < r->group_top; i++)
            open |= chosen[i] == g;
        for (int64_t i = g * size; i < (g + 1) * size && !open; i++)
            x[i] = -INFINITY;
    }
}

/* Scratch: the token's logits, as many as whole vectors hold, k values, and for each group two values and an id. */
INLINE void route(const Router *r, int64_t token, float *x, int narrow) {
    const int64_t whole = padded(r->experts);
    float *values = x + whole, *best = values + r->k, *leaders = best + r->groups;
    int32_t *ids = r->ids + token * r->k;
    float *probs = r->probs + token * r->k;
    for (int64_t i = 0; i < whole; i++)
        x[i] = i < r->experts ? load_one(r->x, token * r->stride + i, narrow) : -INFINITY;
    floats peaks = splat(-INFINITY), weights = {0};
    for (int64_t i = 0; i < whole; i += WIDTH)
        peaks = larger(load(x, i, 0), peaks);
    const float peak = maximum(peaks);
    for (int64_t i = 0; i < whole && !r->after; i += WIDTH)
        weights += exponential(load(x, i, 0) - peak);
    if (r->groups)
        close_groups(r, x, best, leaders, (int32_t *)(leaders + r->groups));
    lead(x, r->experts, r->k, ids, values);
    float chosen = 0;
    for (int64_t i = 0; i < r->k; i++)
        chosen += probs[i] = expf(values[i] - (r->after ? values[0] : peak));
    float total = r->after ? chosen : sum(weights);
    if (r->renormalise)
        total = chosen;
    for (int64_t i = 0; i < r->k; i++)
        probs[i] = probs[i] / total * (float)r->scale;
}

GRAINS(router, Router)
EXPORT void NAME(router_body)(const void *job, int64_t item, void *scratch) {
    const Router *r = job;
    EACH_ROW(token, r, item) EITHER(route, r->narrow, r, token, scratch);
}

/* ---- moe_dispatch ------------------------------------------------------------------------------------------------ */

typedef struct {
    Extent e; /* tokens */
    const int32_t *ids, *map; /* [T, k]; [experts], the local expert or -1 */
    int32_t *offsets, *source; /* [local + 1]; [T * k] */
    int64_t k, local;
} Sort;

EXPORT const int64_t NAME(sort_bytes) = sizeof(Sort);
EXPORT int64_t NAME(sort_items)(const void *job) { return 1; }

/* Assignments by local expert; those of padding tokens lie with those to experts elsewhere, at the end. */
EXPORT void NAME(sort_body)(const void *job, int64_t item, void *scratch) {
    const Sort *s = job;
    const int64_t live = live_rows(&s->e) * s->k;
    memset(s->offsets, 0, (s->local + 1) * sizeof *s->offsets);
    for (int64_t i = 0; i < live; i++)
        if (s->map[s->ids[i]] >= 0)
            s->offsets[s->map[s->ids[i]] + 1]++;
    for (int64_t e = 0; e < s->local; e++)
        s->offsets[e + 1] += s->offsets[e];
    int64_t elsewhere = s->offsets[s->local];
    for (int64_t i = 0; i < s->e.rows * s->k; i++) { /* an expert's offset counts up to that of the next one */
        const int32_t expert = i < live ? s->map[s->ids[i]] : -1;
        s->source[expert < 0 ? elsewhere++ : s->offsets[expert]++] = (int32_t)i;
    }
    for (int64_t e = s->local; e > 0; e--)
        s->offsets[e] = s->offsets[e - 1];
    s->offsets[0] = 0;
}

typedef struct {
    Extent e; /* assignments */
    int64_t grain;
    const char *x; /* [T, bytes] */
    char *out;     /* [T * k, bytes] */
    const int32_t *source, *end; /* [T * k]; rows from `end` on are zeros */
    int64_t k, bytes, stride;
} Spread;

GRAINS(spread, Spread)
EXPORT void NAME(spread_body)(const void *job, int64_t item, void *scratch) {
    const Spread *s = job;
    EACH_ROW(row, s, item) {
        if (row < *s->end)
            memcpy(s->out + row * s->bytes, s->x + s->source[row] / s->k * s->stride, s->bytes);
        else
            memset(s->out + row * s->bytes, 0, s->bytes);
    }
}

/* ---- grouped_mlp ------------------------------------------------------------------------------------------------- */

typedef struct {
    Linear l; /* of the first expert, with all rows; w13 has the panels of the gate, then those of up */
    const int32_t *offsets; /* [experts + 1] */
    int64_t experts, panel_bytes, bias_step; /* from one expert to the next: bytes of weights, values of the bias */
    int64_t activation;
    float alpha, limit;
} Experts;

enum { SILU, GELU, SWIGLUOAI };

#define ZEROED 64 /* rows of zeros of an item */

INLINE floats at_most(floats x, float limit) { return choose(x > limit, splat(limit), x); }

INLINE floats gated(const Experts *e, floats gate, floats up) {
    if (e->activation != SWIGLUOAI)
        return activate(gate, e->activation == GELU) * up;
    gate = at_most(gate, e->limit);
    return gate / (1.0f + exponential(-e->alpha * gate)) * (1.0f - at_most(-at_most(up, e->limit), e->limit));
}

/* The hidden activation of a panel of gates and its partner's. */
static void finish_gated(const Linear *l, int64_t row, int64_t rows, int64_t panel, Sums y, Sums up) {
    const Experts *e = (const Experts *)l;
    const int64_t column = panel * PANEL, wide = least(PANEL, l->gate - column);
    Linear plain = *l;
    plain.n = l->gate, plain.gate = 0, plain.bias = NULL;
    for (int64_t i = 0; i < rows; i++) {
        add_bias(l, column, wide, y[i], up[i], l->narrow);
        for (int64_t v = 0; v < wide; v += WIDTH)
            store(y[i], v, gated(e, load(y[i], v, 0), load(up[i], v, 0)), 0);
    }
    finish(&plain, row, rows, panel, y, up);
}

INLINE int64_t beyond(const Experts *e) { return e->l.gate ? 0 : e->l.e.rows - e->offsets[e->experts]; }

EXPORT const int64_t NAME(experts_bytes) = sizeof(Experts);
EXPORT int64_t NAME(experts_items)(const void *job) {
    const Experts *e = job;
    int64_t items = (beyond(e) + ZEROED - 1) / ZEROED;
    for (int64_t i = 0; i < e->experts; i++)
        if (e->offsets[i + 1] > e->offsets[i])
            items += multiply_items(&e->l, e->offsets[i + 1] - e->offsets[i]);
    return items;
}

EXPORT void NAME(experts_body)(const void *job, int64_t item, void *scratch) {
    const Experts *e = job;
    const int64_t size = e->l.narrow ? 2 : 4;
    for (int64_t i = 0; i < e->experts; i++) {
        const int64_t first = e->offsets[i], rows = e->offsets[i + 1] - first;
        if (rows == 0)
            continue;
        const int64_t items = multiply_items(&e->l, rows);
        if (item >= items) {
            item -= items;
            continue;
        }
        Experts own = *e;
        own.l.x = (const char *)own.l.x + first * own.l.x_stride * size;
        own.l.out = (char *)own.l.out + first * own.l.out_stride * size;
        own.l.panels = (const char *)own.l.panels + i * e->panel_bytes;
        if (own.l.bias)
            own.l.bias = (const char *)own.l.bias + i * e->bias_step * size;
        multiply_item(&own.l, rows, item, e->l.gate ? finish_gated : finish);
        return;
    }
    const int64_t from = e->offsets[e->experts] + item * ZEROED, rows = least(ZEROED, e->l.e.rows - from);
    memset((char *)e->l.out + from * e->l.out_stride * size, 0, rows * e->l.out_stride * size);
}

/* ---- moe_combine ------------------------------------------------------------------------------------------------- */

typedef struct {
    Extent e; /* assignments */
    int64_t grain;
    const int32_t *source; /* [T * k] */
    int32_t *place;        /* [T * k], the row of each assignment */
} Invert;

GRAINS(invert, Invert)
EXPORT void NAME(invert_body)(const void *job, int64_t item, void *scratch) {
    const Invert *v = job;
    EACH_ROW(row, v, item) v->place[v->source[row]] = (int32_t)row;
}

typedef struct {
    Extent e; /* tokens */
    int64_t grain;
    const void *x;        /* [T * k, width] */
    const int32_t *place; /* [T, k] */
    const float *probs;   /* [T, k] */
    void *out;            /* [T, width] */
    int64_t k, width, stride, narrow;
} Combine;

INLINE void combine_row(const Combine *c, int64_t token, int narrow) {
    const int64_t whole = c->width - c->width % WIDTH;
    const int32_t *place = c->place + token * c->k;
    const float *probs = c->probs + token * c->k;
    for (int64_t i = 0; i < c->width; i += i < whole ? WIDTH : 1) {
        floats total = {0};
        for (int64_t j = 0; j < c->k; j++) {
            const int64_t at = place[j] * c->stride + i;
            total += probs[j] * (i < whole ? load(c->x, at, narrow) : splat(load_one(c->x, at, narrow)));
        }
        if (i < whole)
            store(c->out, token * c->width + i, total, narrow);
        else
            store_one(c->out, token * c->width + i, total[0], narrow);
    }
}

GRAINS(combine, Combine)
EXPORT void NAME(combine_body)(const void *job, int64_t item, void *scratch) {
    const Combine *c = job;
    EACH_ROW(token, c, item) EITHER(combine_row, c->narrow, c, token);
}
