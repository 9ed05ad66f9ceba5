/* Attention over pages in panels, included by kernels.c. A page holds, for each head, its keys as [D / 2][P][2] and its
   values as [P / 2][Dv][2] in bfloat16 (as floats [D][P] and [P][Dv]): both are panels of linear.h, one over keys, the other
   over values, so that scores and sums are products like any other, on tiles where there are some.

   One item is a block of one row's queries with the query heads of one key head; each pair of a query and a head is a
   *lane*. Keys come in blocks with an online softmax (Milakov and Gimelshein 2018). Where rows are few, the context is
   split: each split leaves its sums, top and mass, which `join` joins.

   Pages of codes (`coded`, pages.h) are expanded PANEL columns at a time, right before these are multiplied; what scales
   a key multiplies its scores, what scales a value its weights. */

#define MOST_LANES 64
#define KEYS 512       /* of a block */
#define MOST_PAGES 16  /* of a block: pages have PANEL keys or a multiple */
#define SCORES (KEYS + 16)  /* of a lane: rows of tiles that lie a power of two apart would share few lines of the cache */
#define WEIGHTS (KEYS + 32) /* the same of bfloat16 */
#define MOST_VALUES 256
#define SPLIT_PAGES 4  /* of a part of a context, at least */
#define LOG2_E 1.44269504f
#define HIDDEN -1e30f /* the score of a key that a lane does not see: its weight is 2^-126, which no sum notices */

typedef struct {
    int64_t q_heads, kv_heads, qk_dim, v_dim, page_size, window, causal, narrow;
    float scale, softcap;
    const void *q, *k, *v;                /* [T, Hq, D]; pages */
    void *out;                            /* [T, Hq, Dv] */
    float *lse;                           /* [T, Hq] or NULL */
    const void *sinks;                    /* [Hq] or NULL */
    const int32_t *starts, *lens, *table; /* [B + 1], [B], [B, P] */
    const int32_t *live;                  /* how many tokens count; NULL: all */
    int64_t rows, tokens, pages, q_stride;
    int64_t block;  /* queries of an item */
    int64_t splits; /* of a row's context; more than one only where all rows have one query */
    float *partial; /* [B, Hkv, splits, group, Dv + 2]: sums, top, mass */
    int64_t held;   /* pages of the cache */
    Coding c;
} Flash;

typedef struct {
    float scores[MOST_LANES][SCORES], sums[MOST_LANES][MOST_VALUES], block[MOST_LANES][PANEL];
    float top[MOST_LANES], mass[MOST_LANES];
    int64_t from[MOST_LANES], to[MOST_LANES];   /* positions that a lane sees */
    uint16_t weights[MOST_LANES][WEIGHTS];         /* bfloat16; floats stay in `scores` */
    float q[MOST_LANES][MOST_DIM];              /* in the executed dtype, lanes without gaps */
    float tail[KEYS * MOST_VALUES];             /* values of a page whose last slots hold none */
    float key_scales[KEYS], value_scales[KEYS]; /* of codes; 0 from the row's end on */
    float numbers[MOST_DIM * PANEL];            /* that codes stand for: of PANEL keys, or PANEL columns of all values */
    const char *keys[MOST_PAGES], *values[MOST_PAGES];
    int64_t position[MOST_PAGES], held; /* of a block's pages: the first position of each, and how many there are */
    int64_t lanes, group, token, row, head;
#if defined(TILES)
    Tiles tiles;
#endif
} __attribute__((aligned(64))) Lanes;

EXPORT const int64_t NAME(flash_scratch) = sizeof(Lanes);

_Static_assert(MOST_DIM >= KEYS, "numbers have room for the values of a block");

INLINE int64_t value_bytes(const Flash *f) { return f->narrow ? 2 : 4; }
INLINE int64_t page_bytes(const Flash *f, int coded) { return coded ? 1 : value_bytes(f); } /* of a number in a page */

/* What scales all keys, or all values, of a head. */
INLINE float head_scale(const Flash *f, int values, int64_t head) { return given_scale(&f->c, values, head, f->kv_heads); }

/* 2^x for finite x of at most 0, to 5e-5 of itself: what is rounded to bfloat16 needs no more. */
INLINE floats quick_power(floats x) {
    const floats kept = larger(splat(-126.0f), x);
    const floats shifted = kept + 12582912.0f, r = kept - (shifted - 12582912.0f);
    const floats p = (((0.00961813f * r + 0.05550411f) * r + 0.24022651f) * r + 0.69314718f) * r + 1.0f;
    return (floats)((ints)p + ((ints)shifted << 23));
}

/* The scales of a page's codes, whatever lies behind the row's end. */
INLINE void take_scales(const Flash *f, Lanes *t, int64_t page) {
    const int64_t size = f->page_size, at = t->held * size, from = (page * f->kv_heads + t->head) * size;
    const int64_t there = f->lens[t->row] - t->position[t->held];
    for (int64_t i = 0; i < size; i += WIDTH) {
        const ints live = COUNT + (int32_t)i < (int32_t)least(there, size);
        const floats key = f->c.k_scales ? load(f->c.k_scales, from + i, 0) : splat(1.0f);
        const floats value = f->c.v_scales ? load(f->c.v_scales, from + i, 0) : splat(1.0f);
        store(t->key_scales, at + i, choose(live, key, splat(0.0f)), 0);
        store(t->value_scales, at + i, choose(live, value, splat(0.0f)), 0);
    }
}

/* The next pages of the row from page `at` on, those of page 0 left out; returns the page after them. */
INLINE int64_t take_pages(const Flash *f, Lanes *t, int64_t at, int64_t end, int coded) {
    const int64_t size = f->page_size, most_pages = least(MOST_PAGES, KEYS / size);
    const int64_t key_bytes = size * f->qk_dim * page_bytes(f, coded);
    const int64_t value_size = size * f->v_dim * page_bytes(f, coded);
    t->held = 0;
    for (; at < end && t->held < most_pages; at++) {
        const int64_t page = f->table[t->row * f->pages + at];
        check("page", page, f->held);
        if (page == 0)
            continue;
        t->keys[t->held] = (const char *)f->k + (page * f->kv_heads + t->head) * key_bytes;
        t->values[t->held] = (const char *)f->v + (page * f->kv_heads + t->head) * value_size;
        t->position[t->held] = at * size;
        if (coded)
            take_scales(f, t, page);
        t->held++;
    }
    return at;
}

/* `dim` values of each slot of a page, 0 from slot `there` on. */
INLINE void clear_tail(const Flash *f, char *values, int64_t there, int64_t dim, int narrow) {
    const int64_t pair = narrow ? 2 : 1, row = pair * dim * value_bytes(f), rows = (there + pair - 1) / pair;
    memset(values + rows * row, 0, (f->page_size / pair - rows) * row);
    for (int64_t d = 0; there % pair && d < dim; d++)
        ((uint16_t *)(values + (rows - 1) * row))[2 * d + 1] = 0;
}

/* Give the slots of the last page from the row's end on values of 0: whatever lies there, no lane may see it. */
INLINE void cut_tail(const Flash *f, Lanes *t, int narrow) {
    const int64_t page = t->held - 1, there = f->lens[t->row] - t->position[page];
    if (there >= f->page_size)
        return;
    memcpy(t->tail, t->values[page], (there + narrow) / (1 + narrow) * (1 + narrow) * f->v_dim * value_bytes(f));
    clear_tail(f, (char *)t->tail, there, f->v_dim, narrow);
    t->values[page] = (const char *)t->tail;
}

/* Expand PANEL columns from `d` on of all values of the block. */
INLINE void expand_values(const Flash *f, Lanes *t, int64_t d, int narrow) {
    const int64_t pair = narrow ? 2 : 1, bytes = f->page_size * PANEL * value_bytes(f);
    for (int64_t page = 0; page < t->held; page++) {
        char *to = (char *)t->numbers + page * bytes;
        const int64_t there = f->lens[t->row] - t->position[page];
        expand_columns(&f->c, t->values[page] + pair * d, f->page_size / pair, pair * f->v_dim, to, narrow);
        if (there < f->page_size)
            clear_tail(f, to, there, PANEL, narrow);
    }
}

/* The columns from `d` on of a page's values, in rows of `value_line` columns. */
INLINE const char *values_at(const Flash *f, const Lanes *t, int64_t page, int64_t d, int narrow, int coded) {
    if (coded)
        return (const char *)t->numbers + page * f->page_size * PANEL * value_bytes(f);
    return t->values[page] + (narrow ? 2 : 1) * d * value_bytes(f);
}

INLINE int64_t value_line(const Flash *f, int coded) { return coded ? PANEL : f->v_dim; }

#if defined(TILES)
INLINE void score_tiles(const Flash *f, Lanes *t, const uint16_t *k, int64_t line, int64_t at) {
    const uint16_t *q = (const uint16_t *)t->q;
    for (int64_t lane = 0; lane < t->lanes; lane += 32, q += 32 * f->qk_dim) {
        zero_sums(&t->tiles);
        for (int64_t d = 0; d < f->qk_dim; d += 32)
            add_products(&t->tiles, q + d, q + 16 * f->qk_dim + d, f->qk_dim * 2, k + d * line, line * 4);
        put_products(&t->tiles, &t->scores[lane][at], SCORES * 4);
    }
}

INLINE void weigh_tiles(const Flash *f, Lanes *t, int64_t d, int coded) {
    const int64_t line = value_line(f, coded);
    for (int64_t lane = 0; lane < t->lanes; lane += 32) {
        zero_sums(&t->tiles);
        for (int64_t page = 0; page < t->held; page++)
            for (int64_t key = 0; key < f->page_size; key += 32) {
                const uint16_t *weights = &t->weights[lane][page * f->page_size + key];
                add_products(&t->tiles, weights, weights + 16 * WEIGHTS, WEIGHTS * 2,
                             (const uint16_t *)values_at(f, t, page, d, 1, coded) + key * line, line * 4);
            }
        put_products(&t->tiles, t->block[0], PANEL * 4);
        for (int64_t i = 0; i < 32; i++)
            for (int v = 0; v < PANEL; v += WIDTH)
                store(t->sums[lane + i], d + v, load(t->sums[lane + i], d + v, 0) + load(t->block[i], v, 0), 0);
    }
}
#endif

/* Ask for a page's keys or values of one head: they lie where no processor foresees. */
INLINE void ask_for(const char *from, int64_t bytes) {
    for (int64_t i = 0; i < bytes; i += 64)
        __builtin_prefetch(from + i);
}

/* Scores of all lanes against all keys of the block. */
INLINE void score_lanes(const Flash *f, Lanes *t, int tiled, int narrow, int coded) {
    const int64_t pair = narrow ? 2 : 1, line = coded ? PANEL : f->page_size;
    const Inner p = {f->qk_dim, pair * line, f->qk_dim, SCORES, 0, 0};
    for (int64_t page = 0; page < t->held; page++) {
        if (!tiled) {
            if (page + 1 < t->held)
                ask_for(t->keys[page + 1], f->page_size * f->qk_dim * page_bytes(f, coded));
            ask_for(t->values[page], f->page_size * f->v_dim * page_bytes(f, coded));
        }
        for (int64_t key = 0; key < f->page_size; key += PANEL) {
            const int64_t at = page * f->page_size + key;
            const char *keys = t->keys[page] + pair * key * page_bytes(f, coded);
            if (coded) {
                expand_columns(&f->c, keys, f->qk_dim / pair, pair * f->page_size, t->numbers, narrow);
                keys = (const char *)t->numbers;
            }
#if defined(TILES)
            if (tiled) {
                score_tiles(f, t, (const uint16_t *)keys, line, at);
                continue;
            }
#endif
            inner(&p, t->q, keys, t->lanes, &t->scores[0][at], narrow);
        }
    }
}

/* Each lane's sums += weights times values. */
INLINE void weigh_lanes(const Flash *f, Lanes *t, int tiled, int narrow, int coded) {
    const int64_t line = (narrow ? 2 : 1) * value_line(f, coded);
    const Inner p = {narrow ? WEIGHTS : SCORES, line, f->page_size, MOST_VALUES, 1, 0};
    for (int64_t d = 0; d < f->v_dim; d += PANEL) {
        if (coded)
            expand_values(f, t, d, narrow);
#if defined(TILES)
        if (tiled) {
            weigh_tiles(f, t, d, coded);
            continue;
        }
#endif
        for (int64_t page = 0; page < t->held; page++) {
            const int64_t at = page * f->page_size;
            const void *weights = narrow ? (void *)&t->weights[0][at] : (void *)&t->scores[0][at];
            inner(&p, weights, values_at(f, t, page, d, narrow, coded), t->lanes, t->sums[0] + d, narrow);
        }
    }
}

/* Scale the scores of codes, apply the soft cap, hide the scores of keys that a lane does not see, and return the
   largest; `unit` is what scales all scores. */
INLINE float see(const Flash *f, Lanes *t, int64_t lane, float unit, int coded) {
    const int64_t size = f->page_size, from = t->from[lane], to = t->to[lane];
    floats top = splat(HIDDEN);
    for (int64_t page = 0; page < t->held; page++) {
        float *scores = t->scores[lane] + page * size;
        const int64_t first = t->position[page];
        const ints begin = (int32_t)most(from - first, 0) - (ints){0}, end = (int32_t)most(to - first, 0) - (ints){0};
        const int whole = from <= first && to >= first + size, final = whole && !f->softcap && !coded;
        for (int64_t i = 0; final && i < size; i += WIDTH)
            top = larger(load(scores, i, 0), top);
        for (int64_t i = 0; !final && i < size; i += WIDTH) {
            floats score = load(scores, i, 0);
            if (coded)
                score *= load(t->key_scales, page * size + i, 0);
            if (f->softcap)
                score = f->softcap * hyperbolic_tangent(score * (unit / f->softcap));
            if (!whole) {
                const ints place = COUNT + (int32_t)i;
                score = choose((place >= begin) & (place < end), score, splat(HIDDEN));
            }
            store(scores, i, score, 0);
            top = larger(score, top);
        }
    }
    return maximum(top);
}

/* A lane's scores to weights; what it has summed so far is scaled to the new top. */
INLINE void weights_of(const Flash *f, Lanes *t, int64_t lane, int narrow, int coded) {
    const float scaled = coded ? f->scale * head_scale(f, 0, t->head) : f->scale;
    const float largest = see(f, t, lane, scaled, coded), unit = f->softcap ? 1.0f : scaled, before = t->top[lane];
    const float top = largest == HIDDEN ? before : fmaxf(before, largest * unit);
    const int64_t keys = t->held * f->page_size;
    if (top == -INFINITY) {
        memset(narrow ? (void *)t->weights[lane] : t->scores[lane], 0, keys * value_bytes(f));
        return;
    }
    floats mass = {0};
    for (int64_t i = 0; i < keys; i += WIDTH) {
        const floats score = load(t->scores[lane], i, 0);
        if (narrow) {
            floats weight = quick_power(score * (unit * LOG2_E) - top * LOG2_E);
            mass += weight;
            if (coded)
                weight *= load(t->value_scales, i, 0);
            store(t->weights[lane], i, weight, 1);
        } else {
            floats weight = exponential(score * unit - top);
            mass += weight;
            if (coded)
                weight *= load(t->value_scales, i, 0);
            store(t->scores[lane], i, weight, 0);
        }
    }
    const float scale = before == top ? 1.0f : expf(before - top);
    t->mass[lane] = t->mass[lane] * scale + sum(mass);
    t->top[lane] = top;
    if (scale != 1.0f)
        for (int64_t d = 0; d < f->v_dim; d += WIDTH)
            store(t->sums[lane], d, load(t->sums[lane], d, 0) * scale, 0);
}

INLINE void begin_lanes(const Flash *f, Lanes *t, int64_t queries, int tiled, int narrow) {
    const int64_t context = f->lens[t->row], past = context - f->starts[t->row + 1];
    const int64_t padded = tiled ? (t->lanes + 31) / 32 * 32 : t->lanes;
    const int64_t bytes = f->qk_dim * value_bytes(f);
    for (int64_t i = 0; i < queries; i++) {
        const int64_t token = t->token + i, at = past + token;
        const int64_t from = (token * f->q_stride + t->head * t->group * f->qk_dim) * value_bytes(f);
        memcpy((char *)t->q + i * t->group * bytes, (const char *)f->q + from, t->group * bytes);
        for (int64_t lane = i * t->group; lane < (i + 1) * t->group; lane++) {
            t->to[lane] = f->causal ? least(at + 1, context) : context;
            t->from[lane] = f->window ? most(0, at - f->window + 1) : 0;
            t->top[lane] = -INFINITY, t->mass[lane] = 0;
            memset(t->sums[lane], 0, f->v_dim * sizeof(float));
        }
    }
    memset((char *)t->q + t->lanes * bytes, 0, (padded - t->lanes) * bytes); /* tiles take 32 lanes */
    for (int64_t lane = t->lanes; lane < padded; lane++) {
        memset(t->sums[lane], 0, f->v_dim * sizeof(float));
        memset(t->weights[lane], 0, sizeof t->weights[lane]);
    }
}

/* Write a lane's result from its sums, top and mass. */
INLINE void end_lane(const Flash *f, int64_t token, int64_t head, float *sums, float top, float mass, int narrow) {
    const int64_t at = token * f->q_heads + head;
    float scale = 1.0f;
    if (f->lse)
        f->lse[at] = top + logf(mass);
    if (mass == 0) { /* no key seen: exactly 0, whatever the sink, and the values that other lanes see */
        memset(sums, 0, f->v_dim * sizeof(float));
        mass = 1.0f;
    } else if (f->sinks) {
        const float sink = load_one(f->sinks, head, narrow), both = fmaxf(top, sink);
        scale = expf(top - both);
        mass = mass * scale + expf(sink - both);
    }
    scale = scale * head_scale(f, 1, head / (f->q_heads / f->kv_heads)) / mass;
    for (int64_t d = 0; d < f->v_dim; d += WIDTH)
        store(f->out, at * f->v_dim + d, load(sums, d, 0) * scale, narrow);
}

/* How many parts a row's context is cut into: no more than are worth joining. */
INLINE int64_t splits_of(const Flash *f, int64_t row) {
    const int64_t worth = f->lens[row] / (f->page_size * SPLIT_PAGES);
    return most(1, least(f->splits, worth));
}

INLINE float *partial_of(const Flash *f, int64_t row, int64_t head, int64_t split) {
    const int64_t group = f->q_heads / f->kv_heads;
    return f->partial + ((row * f->kv_heads + head) * f->splits + split) * group * (f->v_dim + 2);
}

INLINE void end_lanes(const Flash *f, Lanes *t, int64_t split, int narrow) {
    for (int64_t lane = 0; lane < t->lanes; lane++) {
        if (splits_of(f, t->row) > 1) {
            float *to = partial_of(f, t->row, t->head, split) + lane * (f->v_dim + 2);
            memcpy(to, t->sums[lane], f->v_dim * sizeof(float));
            to[f->v_dim] = t->top[lane], to[f->v_dim + 1] = t->mass[lane];
        } else
            end_lane(f, t->token + lane / t->group, t->head * t->group + lane % t->group, t->sums[lane], t->top[lane],
                     t->mass[lane], narrow);
    }
}

INLINE void attend_lanes(const Flash *f, Lanes *t, int64_t queries, int64_t split, int coded, int narrow) {
    const int tiled = narrow && t->lanes > FEW;
    const int64_t splits = splits_of(f, t->row);
    if (split >= splits)
        return;
    begin_lanes(f, t, queries, tiled, narrow);
#if defined(TILES)
    if (tiled)
        shape_tiles(&t->tiles, 32);
#endif
    const int64_t stop = most(0, t->to[t->lanes - 1]), first = t->from[0] / f->page_size;
    const int64_t end = (stop + f->page_size - 1) / f->page_size, share = (end - first + splits - 1) / splits;
    int64_t at = first + split * share;
    for (const int64_t last = least(end, at + share); at < last;) {
        at = take_pages(f, t, at, last, coded);
        if (t->held == 0)
            continue;
        if (!coded)
            cut_tail(f, t, narrow);
        score_lanes(f, t, tiled, narrow, coded);
        for (int64_t lane = 0; lane < t->lanes; lane++)
            weights_of(f, t, lane, narrow, coded);
        weigh_lanes(f, t, tiled, narrow, coded);
    }
#if defined(TILES)
    if (tiled)
        tiles_end(&t->tiles);
#endif
    end_lanes(f, t, split, narrow);
}

static void flash_numbers(const Flash *f, Lanes *t, int64_t queries, int64_t split) {
    EITHER(attend_lanes, f->narrow, f, t, queries, split, 0);
}

static void flash_codes(const Flash *f, Lanes *t, int64_t queries, int64_t split) {
    EITHER(attend_lanes, f->narrow, f, t, queries, split, 1);
}

INLINE int64_t blocks_of(const Flash *f, int64_t row) {
    return (f->starts[row + 1] - f->starts[row] + f->block - 1) / f->block;
}

EXPORT const int64_t NAME(flash_bytes) = sizeof(Flash);
EXPORT int64_t NAME(flash_items)(const void *job) {
    const Flash *f = job;
    int64_t blocks = 0;
    for (int64_t row = 0; row < f->rows; row++)
        blocks += blocks_of(f, row);
    return blocks * f->kv_heads * f->splits + !f->live;
}

/* Items take a row's last queries first, as they see most; the last item of all is what belongs to no row. */
EXPORT void NAME(flash_body)(const void *job, int64_t item, void *scratch) {
    const Flash *f = job;
    Lanes *t = scratch;
    const int64_t split = item % f->splits, head = item / f->splits % f->kv_heads;
    int64_t block = item / f->splits / f->kv_heads, row = 0;
    for (; row < f->rows && block >= blocks_of(f, row); row++)
        block -= blocks_of(f, row);
    if (row == f->rows) {
        const int64_t begin = f->starts[f->rows] * f->q_heads, count = f->tokens * f->q_heads - begin;
        memset((char *)f->out + begin * f->v_dim * value_bytes(f), 0, count * f->v_dim * value_bytes(f));
        for (int64_t i = 0; f->lse && i < count; i++)
            f->lse[begin + i] = -INFINITY;
        return;
    }
    block = blocks_of(f, row) - 1 - block;
    const int64_t queries = least(f->block, f->starts[row + 1] - f->starts[row] - block * f->block);
    t->group = f->q_heads / f->kv_heads, t->lanes = queries * t->group;
    t->row = row, t->head = head, t->token = f->starts[row] + block * f->block;
    (f->c.kind == NUMBERS ? flash_numbers : flash_codes)(f, t, queries, split);
}

/* ---- the splits of a context, joined ------------------------------------------------------------------------------- */

EXPORT const int64_t NAME(join_bytes) = sizeof(Flash);
EXPORT int64_t NAME(join_items)(const void *job) {
    const Flash *f = job;
    return f->splits > 1 ? f->rows : 0;
}

EXPORT void NAME(join_body)(const void *job, int64_t row, void *scratch) {
    const Flash *f = job;
    const int64_t group = f->q_heads / f->kv_heads, width = f->v_dim + 2, splits = splits_of(f, row);
    if (f->starts[row + 1] == f->starts[row] || splits == 1)
        return;
    for (int64_t q_head = 0; q_head < f->q_heads; q_head++) {
        float *parts = partial_of(f, row, q_head / group, 0) + q_head % group * width;
        float top = -INFINITY, mass = 0;
        for (int64_t i = 0; i < splits; i++)
            top = fmaxf(top, parts[i * group * width + f->v_dim]);
        floats sums[MOST_VALUES / WIDTH] = {{0}};
        for (int64_t i = 0; i < splits; i++) {
            const float *part = parts + i * group * width;
            if (part[f->v_dim] == -INFINITY)
                continue;
            const float scale = expf(part[f->v_dim] - top);
            mass += part[f->v_dim + 1] * scale;
            for (int64_t d = 0; d < f->v_dim; d += WIDTH)
                sums[d / WIDTH] += load(part, d, 0) * scale;
        }
        EITHER(end_lane, f->narrow, f, f->starts[row], q_head, (float *)sums, top, mass);
    }
}
