/* Paged attention, included by kernels.c. One item of work is a tile: some queries of one row, with all query heads of
   some key heads; each pair of a query and a head is a *lane*. Keys come in blocks with an online softmax (Milakov and
   Gimelshein 2018), so that a tile reads each key and value once from memory however long the context. */

#define LANES 32  /* of a tile, at most */
#define BLOCK 128 /* keys of a block */
#define AHEAD 16  /* keys that are asked of memory before they are needed */
#define LINE 64   /* bytes that memory comes in */
#define MOST_DIM 640
#define FEW_KEYS 1024 /* keys below which a second thread costs more than it saves */

typedef struct {
    int64_t q_heads, kv_heads, qk_dim, v_dim, page_size;
    int64_t v_stride; /* from one value's start to the next */
    int64_t window;   /* 0: none */
    int64_t causal, narrow;
    int64_t whole; /* rows of several queries are taken if their context is at most this; others are left alone */
    float scale, softcap;
} lineshaft_attend_problem;

typedef struct {
    lineshaft_attend_problem p;
    const void *q, *k, *v;                /* [T, Hq, D], [slots, Hkv, D], [slots, Hkv, Dv] */
    void *out;                            /* [T, Hq, Dv] */
    float *lse;                           /* [T, Hq] or NULL */
    const void *sinks;                    /* [Hq] or NULL */
    const int32_t *starts, *lens, *table; /* [B + 1], [B], [B, P] */
    int64_t rows, tokens, pages, q_stride;
    int64_t group;     /* query heads per key head */
    int64_t heads;     /* of a group in one tile: all, or LANES */
    int64_t parts;     /* tiles that a group's heads are cut into */
    int64_t queries;   /* of one tile, at most */
    int64_t key_heads; /* of one tile, at most */
    int64_t shares;    /* tiles that the key heads are cut into */
    const int32_t *live; /* how many tokens of a tape's step count; NULL: all */
    int64_t held;        /* pages of the cache */
} Attend;

typedef struct {
    int64_t row, token, key_head, head; /* the tile's first of each; `head` counts within a group */
    int64_t heads, key_heads, per_key_head, lanes;
    /* q and sum hold each head in the order of load_pair */
    float q[LANES][MOST_DIM], sum[LANES][MOST_DIM], scores[LANES][BLOCK];
    float top[LANES], mass[LANES];
    int64_t from[LANES], to[LANES]; /* positions that a lane sees; of one key head, they ascend with the lane */
    int64_t slot[BLOCK + AHEAD], position[BLOCK], keys;
} __attribute__((aligned(64))) Tile;

INLINE int64_t token_of(const Tile *t, int64_t lane) { return t->token + lane % t->per_key_head / t->heads; }

INLINE int64_t head_of(const Attend *a, const Tile *t, int64_t lane) {
    return (t->key_head + lane / t->per_key_head) * a->group + t->head + lane % t->heads;
}

/* Ask for the memory of a key and its value, of all heads of the tile: they lie where no processor foresees. */
INLINE void expect(const Attend *a, const Tile *t, int64_t key, int narrow) {
    const int64_t size = narrow ? 2 : 4, at = t->slot[key] * a->p.kv_heads + t->key_head;
    const char *k = (const char *)a->k + at * a->p.qk_dim * size;
    const char *v = (const char *)a->v + at * a->p.v_stride * size;
    for (int64_t byte = 0; byte < t->key_heads * a->p.qk_dim * size; byte += LINE)
        __builtin_prefetch(k + byte);
    for (int64_t byte = 0; byte < t->key_heads * a->p.v_stride * size; byte += LINE)
        __builtin_prefetch(v + byte);
}

/* scores of `lanes` lanes from `first` on against all keys of the block */
INLINE void score(const Attend *a, Tile *t, int64_t first, const int lanes, int narrow) {
    const int64_t dim = a->p.qk_dim, key_head = t->key_head + first / t->per_key_head;
    for (int64_t key = 0; key < t->keys; key += 4) {
        floats dots[4][4] = {{{0}}};
        int64_t at[4];
        for (int i = 0; i < 4; i++) {
            at[i] = (t->slot[key + i] * a->p.kv_heads + key_head) * dim;
            if (first == 0)
                expect(a, t, key + i + AHEAD, narrow);
        }
        for (int64_t d = 0; d < dim; d += 2 * WIDTH) {
            pair k[4];
            for (int i = 0; i < 4; i++)
                k[i] = load_pair(a->k, at[i] + d, narrow);
            for (int lane = 0; lane < lanes; lane++) {
                const pair q = load_pair(t->q[first + lane], d, 0);
                for (int i = 0; i < 4; i++)
                    dots[lane][i] += q.a * k[i].a;
                for (int i = 0; i < 4; i++)
                    dots[lane][i] += q.b * k[i].b;
            }
        }
        for (int lane = 0; lane < lanes; lane++) {
            floats4 found = sums(dots[lane][0], dots[lane][1], dots[lane][2], dots[lane][3]);
            memcpy(&t->scores[first + lane][key], &found, sizeof found);
        }
    }
}

/* sum += weights @ values, for `lanes` lanes and `pairs` pairs of vectors of the values from `d` on */
INLINE void weigh_part(const Attend *a, Tile *t, int64_t first, int64_t d, const int lanes, const int pairs,
                       int narrow) {
    const int64_t key_head = t->key_head + first / t->per_key_head;
    pair sums[4][2];
    for (int lane = 0; lane < lanes; lane++)
        for (int i = 0; i < pairs; i++)
            sums[lane][i] = load_pair(t->sum[first + lane], d + i * 2 * WIDTH, 0);
    for (int64_t key = 0; key < t->keys; key++) {
        const int64_t at = (t->slot[key] * a->p.kv_heads + key_head) * a->p.v_stride + d;
        pair v[2];
        for (int i = 0; i < pairs; i++)
            v[i] = load_pair(a->v, at + i * 2 * WIDTH, narrow);
        for (int lane = 0; lane < lanes; lane++)
            for (int i = 0; i < pairs; i++) {
                sums[lane][i].a += t->scores[first + lane][key] * v[i].a;
                sums[lane][i].b += t->scores[first + lane][key] * v[i].b;
            }
    }
    for (int lane = 0; lane < lanes; lane++)
        for (int i = 0; i < pairs; i++)
            store_pair(t->sum[first + lane], d + i * 2 * WIDTH, sums[lane][i], 0);
}

INLINE void weigh(const Attend *a, Tile *t, int64_t first, const int lanes, int narrow) {
    int64_t d = 0;
    for (; d + 4 * WIDTH <= a->p.v_dim; d += 4 * WIDTH)
        weigh_part(a, t, first, d, lanes, 2, narrow);
    for (; d < a->p.v_dim; d += 2 * WIDTH)
        weigh_part(a, t, first, d, lanes, 1, narrow);
}

/* Scores of one lane to weights; returns by what its sum so far is to be scaled. */
INLINE float soften(const Attend *a, Tile *t, int64_t lane) {
    float *scores = t->scores[lane];
    const int64_t padded = (t->keys + WIDTH - 1) / WIDTH * WIDTH;
    if (a->p.softcap > 0)
        for (int64_t i = 0; i < padded; i += WIDTH)
            store(scores, i, hyperbolic_tangent(load(scores, i, 0) / a->p.softcap) * a->p.softcap, 0);
    if (t->position[0] < t->from[lane] || t->position[t->keys - 1] >= t->to[lane])
        for (int64_t i = 0; i < t->keys; i++)
            if (t->position[i] < t->from[lane] || t->position[i] >= t->to[lane])
                scores[i] = -INFINITY;
    for (int64_t i = t->keys; i < padded; i++)
        scores[i] = -INFINITY;
    floats best = splat(-INFINITY);
    ints unordered = {0};
    for (int64_t i = 0; i < padded; i += WIDTH) {
        floats s = load(scores, i, 0);
        best = larger(s, best);
        unordered |= s != s;
    }
    const float top = fmaxf(maximum(best), t->top[lane]);
    if (top == -INFINITY && !any(unordered)) {
        memset(scores, 0, padded * sizeof *scores);
        return 1.0f;
    }
    const float scale = t->top[lane] == top ? 1.0f : expf(t->top[lane] - top);
    floats mass = {0};
    for (int64_t i = 0; i < padded; i += WIDTH) {
        floats weight = exponential(load(scores, i, 0) - top);
        mass += weight;
        store(scores, i, weight, 0);
    }
    t->mass[lane] = t->mass[lane] * scale + sum(mass);
    t->top[lane] = top;
    return scale;
}

/* The next keys of the row from `position` on, those of page 0 left out; returns the position after them. */
INLINE int64_t take_keys(const Attend *a, Tile *t, int64_t position, int64_t stop) {
    const int64_t size = a->p.page_size;
    t->keys = 0;
    while (t->keys < BLOCK && position < stop) {
        const int64_t page = a->table[t->row * a->pages + position / size], next = (position / size + 1) * size;
        const int64_t end = least(least(next, stop), position + BLOCK - t->keys);
        check("page", page, a->held);
        if (page == 0) {
            position = next;
            continue;
        }
        for (; position < end; position++, t->keys++) {
            t->slot[t->keys] = page * size + position % size;
            t->position[t->keys] = position;
        }
    }
    for (int64_t i = t->keys; t->keys && i < (t->keys + 3) / 4 * 4 + AHEAD; i++) /* `score` takes keys by fours */
        t->slot[i] = t->slot[t->keys - 1];
    return position;
}

INLINE void attend_block(const Attend *a, Tile *t, int64_t first, const int lanes, int narrow) {
    if (t->position[0] >= t->to[first + lanes - 1] || t->position[t->keys - 1] < t->from[first])
        return; /* no lane sees any of it */
    score(a, t, first, lanes, narrow);
    for (int lane = 0; lane < lanes; lane++) {
        const float scale = soften(a, t, first + lane);
        if (scale != 1.0f)
            for (int64_t d = 0; d < a->p.v_dim; d += WIDTH)
                store(t->sum[first + lane], d, load(t->sum[first + lane], d, 0) * scale, 0);
    }
    weigh(a, t, first, lanes, narrow);
}

/* The lanes of one key head, from `lane` on. */
INLINE void attend_head(const Attend *a, Tile *t, int64_t lane, int narrow) {
    const int64_t stop = lane + t->per_key_head;
    for (; lane + 4 <= stop; lane += 4)
        attend_block(a, t, lane, 4, narrow);
    if (stop - lane == 3)
        attend_block(a, t, lane, 3, narrow);
    else if (stop - lane == 2)
        attend_block(a, t, lane, 2, narrow);
    else if (stop - lane == 1)
        attend_block(a, t, lane, 1, narrow);
}

INLINE void begin_tile(const Attend *a, Tile *t, int narrow) {
    const int64_t context = a->lens[t->row], past = context - a->starts[t->row + 1];
    for (int64_t lane = 0; lane < t->lanes; lane++) {
        const int64_t token = token_of(t, lane), at = past + token; /* the query's position */
        const int64_t q = token * a->q_stride + head_of(a, t, lane) * a->p.qk_dim;
        t->to[lane] = a->p.causal ? at + 1 : context;
        t->from[lane] = a->p.window ? most(0, at - a->p.window + 1) : 0;
        t->top[lane] = -INFINITY, t->mass[lane] = 0;
        for (int64_t d = 0; d < a->p.qk_dim; d += 2 * WIDTH) {
            const pair value = load_pair(a->q, q + d, narrow);
            store_pair(t->q[lane], d, (pair){value.a * a->p.scale, value.b * a->p.scale}, 0);
        }
        memset(t->sum[lane], 0, a->p.v_dim * sizeof(float));
    }
}

INLINE void end_tile(const Attend *a, Tile *t, int narrow) {
    for (int64_t lane = 0; lane < t->lanes; lane++) {
        const int64_t head = head_of(a, t, lane), at = token_of(t, lane) * a->p.q_heads + head;
        float scale = 1.0f, mass = t->mass[lane];
        if (a->lse)
            a->lse[at] = t->top[lane] + logf(mass);
        if (mass == 0) { /* no key seen: exactly 0, whatever the sink, and the values that other lanes see */
            memset(t->sum[lane], 0, a->p.v_dim * sizeof(float));
            mass = 1.0f;
        } else if (a->sinks) {
            const float sink = load_one(a->sinks, head, narrow), top = fmaxf(t->top[lane], sink);
            scale = expf(t->top[lane] - top);
            mass = mass * scale + expf(sink - top);
        }
        scale /= mass;
        for (int64_t d = 0; d < a->p.v_dim; d += 2 * WIDTH) {
            const pair value = load_pair(t->sum[lane], d, 0);
            store_pair(a->out, at * a->p.v_dim + d, (pair){value.a * scale, value.b * scale}, narrow);
        }
    }
}

INLINE void attend_tile(const Attend *a, Tile *t, int narrow) {
    begin_tile(a, t, narrow);
    const int64_t stop = t->to[t->lanes - 1];
    for (int64_t position = t->from[0]; position < stop;) {
        position = take_keys(a, t, position, stop);
        for (int64_t key = 0; key < least(t->keys, AHEAD); key++)
            expect(a, t, key, narrow);
        for (int64_t lane = 0; t->keys && lane < t->lanes; lane += t->per_key_head)
            attend_head(a, t, lane, narrow);
    }
    end_tile(a, t, narrow);
}

static void attend_narrow(const Attend *a, Tile *t) { attend_tile(a, t, 1); }
static void attend_wide(const Attend *a, Tile *t) { attend_tile(a, t, 0); }

/* The last row that starts at or before a token. */
static int64_t row_of(const Attend *a, int64_t token) {
    int64_t low = 0, high = a->rows - 1;
    while (low < high) {
        const int64_t middle = (low + high + 1) / 2;
        if (a->starts[middle] <= token)
            low = middle;
        else
            high = middle - 1;
    }
    return low;
}

/* The result of a token that belongs to no row. */
static void attend_nothing(const Attend *a, int64_t token) {
    const int64_t at = token * a->p.q_heads, bytes = a->p.narrow ? 2 : 4;
    memset((char *)a->out + at * a->p.v_dim * bytes, 0, a->p.q_heads * a->p.v_dim * bytes);
    for (int64_t head = 0; a->lse && head < a->p.q_heads; head++)
        a->lse[at + head] = -INFINITY;
}

static int taken(const Attend *a, int64_t row) {
    return a->starts[row + 1] - a->starts[row] == 1 || a->lens[row] <= a->p.whole;
}

/* Items count tokens backwards, as a row's last queries see most; a token starts a tile or belongs to one. */
static void attend_item(const void *job, int64_t item, void *scratch) {
    const Attend *a = job;
    const int64_t per_token = a->shares * a->parts, tokens = a->live ? least(*a->live, a->tokens) : a->tokens;
    const int64_t token = tokens - 1 - item / per_token;
    const int64_t share = item % per_token / a->parts, part = item % a->parts;
    if (token >= a->starts[a->rows]) {
        if (item % per_token == 0)
            attend_nothing(a, token);
        return;
    }
    const int64_t row = row_of(a, token), stop = a->starts[row + 1];
    if ((token - a->starts[row]) % a->queries || !taken(a, row))
        return;
    Tile tile;
    tile.row = row, tile.token = token, tile.key_head = share * a->key_heads, tile.head = part * a->heads;
    tile.heads = least(a->heads, a->group - tile.head);
    tile.key_heads = least(a->key_heads, a->p.kv_heads - tile.key_head);
    tile.per_key_head = least(a->queries, stop - token) * tile.heads;
    tile.lanes = tile.key_heads * tile.per_key_head;
    (a->p.narrow ? attend_narrow : attend_wide)(a, &tile);
}

/* How the work is cut: into tiles of many queries of one key head where rows have many, else into tiles of one query
   and all key heads, whose keys are neighbours in memory, unless that leaves threads without work. */
static void cut(Attend *a, int threads) {
    a->group = a->p.q_heads / a->p.kv_heads;
    a->heads = least(a->group, LANES);
    a->parts = (a->group + a->heads - 1) / a->heads;
    const int decode = a->tokens <= a->rows, enough = a->rows >= 2 * threads || threads == 1;
    a->queries = decode ? 1 : LANES / a->heads;
    a->key_heads = decode && enough ? least(a->p.kv_heads, LANES / a->heads) : 1;
    a->shares = (a->p.kv_heads + a->key_heads - 1) / a->key_heads;
}

EXPORT void NAME(attend)(const lineshaft_attend_problem *problem, const void *q, const void *k, const void *v,
                         void *out, float *lse, const void *sinks, const int32_t *starts, const int32_t *lens,
                         const int32_t *table, int64_t rows, int64_t tokens, int64_t pages, int64_t q_stride,
                         int threads) {
    Attend job = {.p = *problem, .q = q, .k = k, .v = v, .out = out, .lse = lse, .sinks = sinks, .starts = starts,
                  .lens = lens, .table = table, .rows = rows, .tokens = tokens, .pages = pages, .q_stride = q_stride,
                  .held = INT64_MAX};
    int64_t keys = 0;
    for (int64_t row = 0; row < rows; row++)
        keys += (int64_t)(starts[row + 1] - starts[row]) * lens[row];
    if (keys * problem->kv_heads < FEW_KEYS)
        threads = 1;
    cut(&job, threads);
    lineshaft_run(attend_item, &job, tokens * job.shares * job.parts, threads);
}
