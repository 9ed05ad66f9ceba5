/* Attention over pages in panels, included by kernels.c. A page holds, for each head, its keys as [D / 2][P][2] and its
   values as [P / 2][Dv][2] in bfloat16 (as floats [D][P] and [P][Dv]): both are panels of linear.h, one over keys, the
   other over values, so that scores and sums are products like any other, on tiles where there are some.

   One item is a block of one row's queries with the query heads of one key head; each pair of a query and a head is a
   *lane*. Keys come in blocks with an online softmax (Milakov and Gimelshein 2018). Where rows are few, the context is
   split: each split leaves its sums, top and mass, which `join` joins.

   Pages of codes (`coded`, pages.h) are expanded block by block; what scales a key multiplies its scores, what scales a
   value its weights. */

#define MOST_LANES 64
#define KEYS 512       /* of a block */
#define NEAR 64        /* where tiles are, or codes: with all else they stay in the nearest cache */
#define MOST_KEYS 256  /* of a page */
#define LEAP 20        /* a score may be 2^LEAP above those before it until these are scaled anew */
#define MOST_PAGES 16  /* of a block: pages have PANEL keys or a multiple */
#define SCORES (KEYS + 16)  /* of a lane: rows a power of two apart would share few lines of the cache */
#define WEIGHTS (KEYS + 32) /* the same of bfloat16 */
#define MOST_VALUES 256
#define SUMS (MOST_VALUES + 16)
#define SPLIT_PAGES 4  /* of a part of a context, at least */
#define HIDDEN -1e30f /* the score of a key that a lane does not see: its weight is at most 2^-126 */

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
    int64_t ordered; /* whether `out` [T, Hq * Dv] is in the order of tiles; then `live` is not NULL */
    Coding c;
} Flash;

typedef struct {
    float scores[MOST_LANES][SCORES], sums[MOST_LANES][SUMS];
    floats mass[MOST_LANES]; /* what weights sum to, over its places */
    float largest[MOST_LANES], top[MOST_LANES]; /* of the scores so far, and that scaled */
    int64_t from[MOST_LANES], to[MOST_LANES];   /* positions that a lane sees */
    uint16_t weights[MOST_LANES][WEIGHTS];         /* bfloat16; floats stay in `scores` */
    float q[MOST_LANES][MOST_DIM];              /* in the executed dtype, lanes without gaps */
    float front[KEYS * MOST_VALUES];            /* values of a page whose first slots no lane sees */
    float tail[KEYS * MOST_VALUES];             /* and of one whose last slots hold none */
    float key_scales[MOST_KEYS], value_scales[MOST_KEYS]; /* of codes; 0 from the row's end on */
    float key_numbers[MOST_KEYS * MOST_DIM], value_numbers[MOST_KEYS * MOST_VALUES]; /* that codes stand for */
    const char *keys[MOST_PAGES], *values[MOST_PAGES];
    const uint16_t *key_tiles[KEYS / PANEL], *value_tiles[KEYS / PANEL]; /* of each 32 keys of the block */
    int64_t position[MOST_PAGES], held; /* of a block's pages: the first position of each, and how many there are */
    int64_t lanes, group, token, row, head;
#if defined(TILES)
    Tiles tiles;
#endif
} __attribute__((aligned(64))) Lanes;

EXPORT const int64_t NAME(flash_scratch) = sizeof(Lanes);

INLINE int64_t value_bytes(const Flash *f) { return f->narrow ? 2 : 4; }
INLINE int64_t page_bytes(const Flash *f, int coded) { return coded ? 1 : value_bytes(f); } /* of a number in a page */

/* What scales all keys, or all values, of a head. */
INLINE float head_scale(const Flash *f, int values, int64_t head) {
    return given_scale(&f->c, values, head, f->kv_heads);
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

/* The next pages of the row from page `at` on, of up to `keys` keys or one page, those of page 0 left out; returns the
   page after them. */
INLINE int64_t take_pages(const Flash *f, Lanes *t, int64_t at, int64_t end, int64_t keys, int coded) {
    const int64_t size = f->page_size, most_pages = least(MOST_PAGES, most(1, keys / size));
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

/* Give the slots of a page that no lane may see values of 0, whatever lies there: those before the first lane's window
   and from the row's end on. `own` is room for the page. */
INLINE void hide_slots(const Flash *f, Lanes *t, int64_t page, void *own, int narrow, int coded) {
    const int64_t from = most(0, t->from[0] - t->position[page]);
    const int64_t to = least(f->page_size, f->lens[t->row] - t->position[page]);
    if (from == 0 && to == f->page_size)
        return;
    const int64_t pair = narrow ? 2 : 1, line = pair * f->v_dim * value_bytes(f);
    const int64_t first = from / pair, last = (to + pair - 1) / pair;
    char *values = coded ? (char *)t->values[page] : (char *)own;
    if (!coded)
        memcpy(values + first * line, (const char *)t->values[page] + first * line, (last - first) * line);
    memset(values, 0, first * line);
    memset(values + last * line, 0, (f->page_size / pair - last) * line);
    for (int64_t d = 0; from % pair && d < f->v_dim; d++)
        ((uint16_t *)(values + first * line))[2 * d] = 0;
    for (int64_t d = 0; to % pair && d < f->v_dim; d++)
        ((uint16_t *)(values + (last - 1) * line))[2 * d + 1] = 0;
    t->values[page] = values;
}

/* Turn the codes of the block into numbers. */
INLINE void expand_block(const Flash *f, Lanes *t, int narrow) {
    const int64_t keys = f->page_size * f->qk_dim, values = f->page_size * f->v_dim, size = value_bytes(f);
    for (int64_t page = 0; page < t->held; page++) {
        char *k = (char *)t->key_numbers + page * keys * size, *v = (char *)t->value_numbers + page * values * size;
        expand_codes(f->c.kind, t->keys[page], keys, k, narrow);
        expand_codes(f->c.kind, t->values[page], values, v, narrow);
        t->keys[page] = k, t->values[page] = v;
    }
}

/* Ask for a page's keys or values of one head: they lie where no processor foresees. */
INLINE void ask_for(const void *from, int64_t bytes) {
    for (int64_t i = 0; i < bytes; i += 64)
        __builtin_prefetch((const char *)from + i);
}

#if defined(TILES)
/* Find the tiles of the block. */
INLINE void find_tiles(const Flash *f, Lanes *t) {
    int64_t count = 0;
    for (int64_t page = 0; page < t->held; page++)
        for (int64_t key = 0; key < f->page_size; key += PANEL, count++) {
            t->key_tiles[count] = (const uint16_t *)t->keys[page] + 2 * key;
            t->value_tiles[count] = (const uint16_t *)t->values[page] + key * f->v_dim;
        }
}

/* Ask for what few lanes need after the scores of 64 keys from `at` on: their values, and the keys that come next. */
INLINE void look_on(const Flash *f, const Lanes *t, int64_t at) {
    const int64_t size = f->page_size, ahead = most(1, 64 / size);
    for (int64_t page = (at + size - 1) / size; page * size < at + 64 && page < t->held; page++) {
        ask_for(t->values[page], size * f->v_dim * 2);
        if (page + ahead < t->held)
            ask_for(t->keys[page + ahead], size * f->qk_dim * 2);
    }
}

/* Sums of up to 16 lanes in the tiles 0 to 3, what belongs to lanes in 4, what belongs to keys in 6 and 7. */
INLINE void shape_lanes(Tiles *t, int64_t lanes) {
    tiles_begin(t);
    for (int i = 0; i < 8; i++)
        tile_shape(t, i, i < 5 ? lanes : 16, 64);
    tiles_ready(t);
}

/* Scores of 16 lanes from `lane` on against all keys of the block. */
INLINE void score_tiles(const Flash *f, Lanes *t, int64_t lane) {
    const int64_t line = f->page_size * 4, keys = t->held * f->page_size;
    const uint16_t *q = (const uint16_t *)t->q + lane * f->qk_dim;
    for (int64_t at = 0; at < keys; at += 64) {
        const int both = at + 32 < keys;
        const uint16_t *one = t->key_tiles[at / 32], *two = both ? t->key_tiles[at / 32 + 1] : one;
        if (t->lanes <= 16)
            look_on(f, t, at);
        zero_sums(&t->tiles);
        for (int64_t d = 0; d < f->qk_dim; d += 32, one += 32 * f->page_size, two += 32 * f->page_size) {
            tile_load(&t->tiles, 4, q + d, f->qk_dim * 2);
            ADD_TWO(&t->tiles, 0, 1, one, line);
            if (both)
                ADD_TWO(&t->tiles, 2, 3, two, line);
        }
        float *to = &t->scores[0][at];
        tile_store(&t->tiles, 0, to, SCORES * 4);
        tile_store(&t->tiles, 1, to + 16, SCORES * 4);
        if (both) {
            tile_store(&t->tiles, 2, to + 32, SCORES * 4);
            tile_store(&t->tiles, 3, to + 48, SCORES * 4);
        }
    }
}

/* The sums of 16 lanes from `lane` on += their weights times the values of the block. */
INLINE void weigh_tiles(const Flash *f, Lanes *t, int64_t lane) {
    const int64_t line = f->v_dim * 4, keys = t->held * f->page_size;
    for (int64_t d = 0; d < f->v_dim; d += 64) {
        const int both = d + 32 < f->v_dim;
        float *sums = &t->sums[lane][d];
        tile_load(&t->tiles, 0, sums, SUMS * 4);
        tile_load(&t->tiles, 1, sums + 16, SUMS * 4);
        if (both) {
            tile_load(&t->tiles, 2, sums + 32, SUMS * 4);
            tile_load(&t->tiles, 3, sums + 48, SUMS * 4);
        }
        for (int64_t at = 0; at < keys; at += 32) {
            const uint16_t *values = t->value_tiles[at / 32] + 2 * d;
            tile_load(&t->tiles, 4, &t->weights[0][at], WEIGHTS * 2);
            ADD_TWO(&t->tiles, 0, 1, values, line);
            if (both)
                ADD_TWO(&t->tiles, 2, 3, values + 64, line);
        }
        tile_store(&t->tiles, 0, sums, SUMS * 4);
        tile_store(&t->tiles, 1, sums + 16, SUMS * 4);
        if (both) {
            tile_store(&t->tiles, 2, sums + 32, SUMS * 4);
            tile_store(&t->tiles, 3, sums + 48, SUMS * 4);
        }
    }
}
#endif

/* Scores of all lanes against all keys of the block. */
INLINE void score_lanes(const Flash *f, Lanes *t, int narrow) {
    const int64_t pair = narrow ? 2 : 1;
    const Inner p = {f->qk_dim, pair * f->page_size, f->qk_dim, SCORES, 0, 0};
    for (int64_t page = 0; page < t->held; page++) {
        if (page + 1 < t->held)
            ask_for(t->keys[page + 1], f->page_size * f->qk_dim * value_bytes(f));
        ask_for(t->values[page], f->page_size * f->v_dim * value_bytes(f));
        for (int64_t key = 0; key < f->page_size; key += PANEL)
            inner(&p, t->q, t->keys[page] + pair * key * value_bytes(f), t->lanes,
                  &t->scores[0][page * f->page_size + key], narrow);
    }
}

/* Each lane's sums += weights times values. */
INLINE void weigh_lanes(const Flash *f, Lanes *t, int narrow) {
    const int64_t pair = narrow ? 2 : 1;
    const Inner p = {narrow ? WEIGHTS : SCORES, pair * f->v_dim, f->page_size, SUMS, 1, 0};
    for (int64_t d = 0; d < f->v_dim; d += PANEL) {
        for (int64_t page = 0; page < t->held; page++) {
            const int64_t at = page * f->page_size;
            const void *weights = narrow ? (void *)&t->weights[0][at] : (void *)&t->scores[0][at];
            inner(&p, weights, t->values[page] + pair * d * value_bytes(f), t->lanes, t->sums[0] + d, narrow);
        }
    }
}

/* Scale the scores of codes, apply the soft cap, hide the scores of keys that a lane does not see, and return the
   largest; `unit` is what scales all scores. */
INLINE float see(const Flash *f, const Lanes *t, int64_t lane, float unit, float *scores, int coded) {
    const int64_t size = f->page_size, from = t->from[lane], to = t->to[lane];
    floats top = splat(HIDDEN);
    for (int64_t page = 0; page < t->held; page++, scores += size) {
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

/* A lane's scores to weights, that of a score at the top being 1, and what they sum to added to its mass. Returns 0,
   and adds nothing, where a score is so far above a top that was not `raised` that it has to be first. */
INLINE int weights_below(const Flash *f, Lanes *t, int64_t lane, float unit, float *scores, uint16_t *weights,
                         int raised, int coded, int narrow) {
    const floats below = splat(t->top[lane] * LOG2_E), largest = splat(t->largest[lane]);
    const int quick = narrow && !f->lse; /* a log-sum is told to more places than what bfloat16 holds */
    floats mass = {0}, highest = splat(HIDDEN);
    for (int64_t i = 0; i < t->held * f->page_size; i += 2 * WIDTH) {
        floats weight[2];
        for (int v = 0; v < 2; v++) {
            const int64_t at = i + v * WIDTH;
            const floats score = load(scores, at, 0), short_of = score - largest;
            const floats power = raised ? short_of * (unit * LOG2_E) : score * (unit * LOG2_E) - below;
            weight[v] = quick ? quick_power(power) : exponential(short_of * unit);
            if (!raised)
                highest = larger(power, highest);
            mass += weight[v];
            if (coded)
                weight[v] *= load(t->value_scales, at, 0);
        }
        store_two(narrow ? (void *)weights : scores, i, weight[0], weight[1], narrow);
    }
    if (!raised && any(highest > (float)LEAP))
        return 0;
    t->mass[lane] += mass;
    return 1;
}

INLINE int holds_nan(const float *scores, int64_t count) {
    ints found = {0};
    for (int64_t i = 0; i < count; i += WIDTH) {
        const floats score = load(scores, i, 0);
        found |= score != score;
    }
    return any(found);
}

/* A lane's scores to weights; what it has summed so far is scaled where its top is raised. */
INLINE void weights_of(const Flash *f, Lanes *t, int64_t lane, float *scores, uint16_t *weights, int coded,
                       int narrow) {
    const float scaled = coded ? f->scale * head_scale(f, 0, t->head) : f->scale, unit = f->softcap ? 1.0f : scaled;
    const float before = t->largest[lane];
    const int64_t end = t->position[t->held - 1] + f->page_size;
    const int plain = narrow && !coded && !f->softcap && t->from[lane] <= t->position[0] && t->to[lane] >= end;
    if (plain && before != -INFINITY && weights_below(f, t, lane, unit, scores, weights, 0, coded, narrow))
        return;
    float largest = see(f, t, lane, scaled, scores, coded);
    if (largest == HIDDEN)
        largest = before;
    if (largest == -INFINITY && holds_nan(scores, t->held * f->page_size))
        largest = 0; /* any will do: they make weights that are none either */
    if (largest == -INFINITY) {
        memset(narrow ? (void *)weights : scores, 0, t->held * f->page_size * value_bytes(f));
        return;
    }
    if (largest > before) {
        const float scale = before == -INFINITY ? 0.0f : expf((before - largest) * unit);
        t->largest[lane] = largest, t->top[lane] = largest * unit, t->mass[lane] *= scale;
        for (int64_t d = 0; d < f->v_dim; d += WIDTH)
            store(t->sums[lane], d, load(t->sums[lane], d, 0) * scale, 0);
    }
    weights_below(f, t, lane, unit, scores, weights, 1, coded, narrow);
}

INLINE void begin_lanes(const Flash *f, Lanes *t, int64_t queries, int narrow) {
    const int64_t context = f->lens[t->row], past = context - f->starts[t->row + 1];
    const int64_t bytes = f->qk_dim * value_bytes(f);
    for (int64_t i = 0; i < queries; i++) {
        const int64_t token = t->token + i, at = past + token;
        const int64_t from = (token * f->q_stride + t->head * t->group * f->qk_dim) * value_bytes(f);
        memcpy((char *)t->q + i * t->group * bytes, (const char *)f->q + from, t->group * bytes);
        for (int64_t lane = i * t->group; lane < (i + 1) * t->group; lane++) {
            t->to[lane] = f->causal ? least(at + 1, context) : context;
            t->from[lane] = f->window ? most(0, at - f->window + 1) : 0;
            t->largest[lane] = t->top[lane] = -INFINITY, t->mass[lane] = splat(0.0f);
            memset(t->sums[lane], 0, f->v_dim * sizeof(float));
        }
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
        store(f->out, place_of(token, head * f->v_dim + d, f->q_heads * f->v_dim, f->ordered), load(sums, d, 0) * scale,
              narrow);
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
            to[f->v_dim] = t->top[lane], to[f->v_dim + 1] = sum(t->mass[lane]);
        } else
            end_lane(f, t->token + lane / t->group, t->head * t->group + lane % t->group, t->sums[lane], t->top[lane],
                     sum(t->mass[lane]), narrow);
    }
}

#if defined(TILES)
/* 16 lanes at a time, so that their scores and weights stay in the nearest cache. */
INLINE void attend_tiles(const Flash *f, Lanes *t, int coded) {
    find_tiles(f, t);
    for (int64_t lane = 0; lane < t->lanes; lane += 16) {
        score_tiles(f, t, lane);
        for (int64_t i = lane; i < least(lane + 16, t->lanes); i++)
            weights_of(f, t, i, t->scores[i - lane], t->weights[i - lane], coded, 1);
        weigh_tiles(f, t, lane);
    }
}
#endif

INLINE void attend_lanes(const Flash *f, Lanes *t, int64_t queries, int64_t split, int coded, int narrow) {
#if defined(TILES)
    const int tiled = narrow && t->lanes > 1, few = t->lanes <= 16;
#else
    const int tiled = 0, few = 1;
#endif
    const int64_t splits = splits_of(f, t->row);
    if (split >= splits)
        return;
    begin_lanes(f, t, queries, narrow);
#if defined(TILES)
    if (tiled)
        shape_lanes(&t->tiles, least(16, t->lanes));
#endif
    const int64_t stop = most(0, t->to[t->lanes - 1]), first = t->from[0] / f->page_size;
    const int64_t end = (stop + f->page_size - 1) / f->page_size, share = (end - first + splits - 1) / splits;
    int64_t at = first + split * share;
    for (const int64_t last = least(end, at + share); at < last;) {
        at = take_pages(f, t, at, last, (tiled && !few) || coded ? NEAR : KEYS, coded);
        if (t->held == 0)
            continue;
        if (coded)
            expand_block(f, t, narrow);
        hide_slots(f, t, t->held - 1, t->tail, narrow, coded);
        if (t->held > 1)
            hide_slots(f, t, 0, t->front, narrow, coded);
#if defined(TILES)
        if (tiled) {
            attend_tiles(f, t, coded);
            continue;
        }
#endif
        score_lanes(f, t, narrow);
        for (int64_t lane = 0; lane < t->lanes; lane++)
            weights_of(f, t, lane, t->scores[lane], t->weights[lane], coded, narrow);
        weigh_lanes(f, t, narrow);
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

/* Items take a row's heads one after the other, so that the keys of one stay near, and of each the last queries first,
   as they see most; the last item of all is what belongs to no row. */
EXPORT void NAME(flash_body)(const void *job, int64_t item, void *scratch) {
    const Flash *f = job;
    Lanes *t = scratch;
    const int64_t each = f->kv_heads * f->splits; /* items of a block */
    int64_t row = 0;
    for (; row < f->rows && item >= blocks_of(f, row) * each; row++)
        item -= blocks_of(f, row) * each;
    if (row == f->rows) {
        const int64_t begin = f->starts[f->rows] * f->q_heads, count = f->tokens * f->q_heads - begin;
        memset((char *)f->out + begin * f->v_dim * value_bytes(f), 0, count * f->v_dim * value_bytes(f));
        for (int64_t i = 0; f->lse && i < count; i++)
            f->lse[begin + i] = -INFINITY;
        return;
    }
    const int64_t blocks = blocks_of(f, row), split = item % f->splits, head = item / f->splits / blocks;
    const int64_t block = blocks - 1 - item / f->splits % blocks;
    const int64_t queries = least(f->block, f->starts[row + 1] - f->starts[row] - block * f->block);
    t->group = f->q_heads / f->kv_heads, t->lanes = queries * t->group;
    t->row = row, t->head = head, t->token = f->starts[row] + block * f->block;
    (f->c.kind == NUMBERS ? flash_numbers : flash_codes)(f, t, queries, split);
}

/* ---- the splits of a context, joined ----------------------------------------------------------------------------- */

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
