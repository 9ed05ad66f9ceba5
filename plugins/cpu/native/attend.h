/* Paged attention, included by kernels.c. One item of work is a tile: some queries of one row with the query heads that
   share one key head, the tile's *lanes*. Keys come in blocks with an online softmax (Milakov and Gimelshein 2018), so
   that a tile reads each key and value once from memory however long the context. */

#define LANES 32  /* of a tile, at most */
#define BLOCK 128 /* keys of a block */
#define MOST_DIM 640
#define FEW_KEYS 4096 /* keys below which a second thread costs more than it saves */

typedef struct {
    int64_t q_heads, kv_heads, qk_dim, v_dim, page_size;
    int64_t v_stride;  /* from one value's start to the next */
    int64_t window;    /* 0: none */
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
    int64_t group;   /* query heads per key head */
    int64_t heads;   /* of them in one tile */
    int64_t parts;   /* tiles that a group's heads are cut into */
    int64_t queries; /* of one tile, at most */
} Attend;

typedef struct {
    int64_t row, token, key_head, head, heads, lanes; /* `token` and `head` are the tile's first */
    float q[LANES][MOST_DIM], sum[LANES][MOST_DIM], scores[LANES][BLOCK];
    float top[LANES], mass[LANES];
    int64_t from[LANES], to[LANES]; /* positions that a lane sees, ascending with the lane */
    int64_t slot[BLOCK], position[BLOCK], keys;
} __attribute__((aligned(64))) Tile;

/* scores of `lanes` lanes from `first` on against all keys of the block */
INLINE void score(const Attend *a, Tile *t, int64_t first, const int lanes, int narrow) {
    const int64_t dim = a->p.qk_dim;
    for (int64_t key = 0; key < t->keys; key += 4) {
        floats dots[4][4] = {{{0}}};
        int64_t at[4];
        for (int i = 0; i < 4; i++)
            at[i] = (t->slot[key + i] * a->p.kv_heads + t->key_head) * dim;
        for (int64_t d = 0; d < dim; d += WIDTH) {
            floats k[4];
            for (int i = 0; i < 4; i++)
                k[i] = load(a->k, at[i] + d, narrow);
            for (int lane = 0; lane < lanes; lane++) {
                floats q = load(t->q[first + lane], d, 0);
                for (int i = 0; i < 4; i++)
                    dots[lane][i] += q * k[i];
            }
        }
        for (int lane = 0; lane < lanes; lane++) {
            floats4 found = sums(dots[lane][0], dots[lane][1], dots[lane][2], dots[lane][3]);
            memcpy(&t->scores[first + lane][key], &found, sizeof found);
        }
    }
}

/* sum += weights @ values, for `lanes` lanes and `vectors` vectors of the values from `d` on */
INLINE void weigh_part(const Attend *a, Tile *t, int64_t first, int64_t d, const int lanes, const int vectors,
                       int narrow) {
    floats sums[4][4];
    for (int lane = 0; lane < lanes; lane++)
        for (int i = 0; i < vectors; i++)
            sums[lane][i] = load(t->sum[first + lane], d + i * WIDTH, 0);
    for (int64_t key = 0; key < t->keys; key++) {
        const int64_t at = (t->slot[key] * a->p.kv_heads + t->key_head) * a->p.v_stride + d;
        floats v[4];
        for (int i = 0; i < vectors; i++)
            v[i] = load(a->v, at + i * WIDTH, narrow);
        for (int lane = 0; lane < lanes; lane++)
            for (int i = 0; i < vectors; i++)
                sums[lane][i] += t->scores[first + lane][key] * v[i];
    }
    for (int lane = 0; lane < lanes; lane++)
        for (int i = 0; i < vectors; i++)
            store(t->sum[first + lane], d + i * WIDTH, sums[lane][i], 0);
}

INLINE void weigh(const Attend *a, Tile *t, int64_t first, const int lanes, int narrow) {
    int64_t d = 0;
    for (; d + 4 * WIDTH <= a->p.v_dim; d += 4 * WIDTH)
        weigh_part(a, t, first, d, lanes, 4, narrow);
    for (; d < a->p.v_dim; d += WIDTH)
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
        if (page == 0) {
            position = next;
            continue;
        }
        for (; position < end; position++, t->keys++) {
            t->slot[t->keys] = page * size + position % size;
            t->position[t->keys] = position;
        }
    }
    for (int64_t i = t->keys; i % 4; i++)
        t->slot[i] = t->slot[0];
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

INLINE void begin_tile(const Attend *a, Tile *t, int narrow) {
    const int64_t context = a->lens[t->row], past = context - a->starts[t->row + 1];
    for (int64_t lane = 0; lane < t->lanes; lane++) {
        const int64_t token = t->token + lane / t->heads, head = t->head + lane % t->heads;
        const int64_t at = past + token; /* the query's position */
        t->to[lane] = a->p.causal ? at + 1 : context;
        t->from[lane] = a->p.window ? most(0, at - a->p.window + 1) : 0;
        t->top[lane] = -INFINITY, t->mass[lane] = 0;
        for (int64_t d = 0; d < a->p.qk_dim; d += WIDTH)
            store(t->q[lane], d, load(a->q, token * a->q_stride + head * a->p.qk_dim + d, narrow) * a->p.scale, 0);
        memset(t->sum[lane], 0, a->p.v_dim * sizeof(float));
    }
}

INLINE void end_tile(const Attend *a, Tile *t, int narrow) {
    for (int64_t lane = 0; lane < t->lanes; lane++) {
        const int64_t token = t->token + lane / t->heads, head = t->head + lane % t->heads;
        const int64_t at = token * a->p.q_heads + head;
        float scale = 1.0f, mass = t->mass[lane];
        if (a->lse)
            a->lse[at] = t->top[lane] + logf(mass);
        if (a->sinks) {
            const float sink = load_one(a->sinks, head, narrow), top = fmaxf(t->top[lane], sink);
            scale = expf(t->top[lane] - top);
            mass = mass * scale + expf(sink - top);
        }
        scale = mass == 0 ? 0.0f : scale / mass; /* no key seen: exactly 0 */
        for (int64_t d = 0; d < a->p.v_dim; d += WIDTH)
            store(a->out, at * a->p.v_dim + d, load(t->sum[lane], d, 0) * scale, narrow);
    }
}

INLINE void attend_tile(const Attend *a, Tile *t, int narrow) {
    begin_tile(a, t, narrow);
    const int64_t stop = t->to[t->lanes - 1];
    for (int64_t position = t->from[0]; position < stop;) {
        position = take_keys(a, t, position, stop);
        if (t->keys == 0)
            break;
        int64_t lane = 0;
        for (; lane + 4 <= t->lanes; lane += 4)
            attend_block(a, t, lane, 4, narrow);
        if (t->lanes - lane == 3)
            attend_block(a, t, lane, 3, narrow);
        else if (t->lanes - lane == 2)
            attend_block(a, t, lane, 2, narrow);
        else if (t->lanes - lane == 1)
            attend_block(a, t, lane, 1, narrow);
    }
    end_tile(a, t, narrow);
}

static void attend_narrow(const Attend *a, Tile *t) { attend_tile(a, t, 1); }
static void attend_wide(const Attend *a, Tile *t) { attend_tile(a, t, 0); }

static int64_t row_of(const Attend *a, int64_t token) {
    int64_t low = 0, high = a->rows - 1; /* the last row that starts at or before the token */
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
static void attend_nothing(const Attend *a, int64_t token, int64_t head, int64_t heads) {
    const int64_t at = token * a->p.q_heads + head, bytes = a->p.narrow ? 2 : 4;
    memset((char *)a->out + at * a->p.v_dim * bytes, 0, heads * a->p.v_dim * bytes);
    for (int64_t i = 0; a->lse && i < heads; i++)
        a->lse[at + i] = -INFINITY;
}

static int taken(const Attend *a, int64_t row) {
    return a->starts[row + 1] - a->starts[row] == 1 || a->lens[row] <= a->p.whole;
}

/* Items count tokens backwards, as a row's last queries see most; a token starts a tile or belongs to one. */
static void attend_item(const void *job, int64_t item) {
    const Attend *a = job;
    const int64_t per_token = a->p.kv_heads * a->parts, token = a->tokens - 1 - item / per_token;
    const int64_t key_head = item % per_token / a->parts, part = item % a->parts;
    const int64_t head = key_head * a->group + part * a->heads;
    const int64_t heads = least(a->heads, a->group - part * a->heads);
    if (token >= a->starts[a->rows]) {
        attend_nothing(a, token, head, heads);
        return;
    }
    const int64_t row = row_of(a, token), stop = a->starts[row + 1];
    if ((token - a->starts[row]) % a->queries || !taken(a, row))
        return;
    Tile tile;
    tile.row = row, tile.token = token, tile.key_head = key_head, tile.head = head, tile.heads = heads;
    tile.lanes = least(a->queries, stop - token) * heads;
    (a->p.narrow ? attend_narrow : attend_wide)(a, &tile);
}

EXPORT void NAME(attend)(const lineshaft_attend_problem *problem, const void *q, const void *k, const void *v,
                         void *out, float *lse, const void *sinks, const int32_t *starts, const int32_t *lens,
                         const int32_t *table, int64_t rows, int64_t tokens, int64_t pages, int64_t q_stride,
                         int threads) {
    const int64_t group = problem->q_heads / problem->kv_heads, heads = least(group, LANES);
    const Attend job = {*problem, q,    k,     v,        out,   lse,   sinks, starts, lens,
                        table,    rows, tokens, pages, q_stride, group, heads, (group + heads - 1) / heads,
                        LANES / heads};
    int64_t keys = 0;
    for (int64_t row = 0; row < rows; row++)
        keys += (starts[row + 1] - starts[row]) * lens[row];
    lineshaft_run(attend_item, &job, tokens * problem->kv_heads * job.parts,
                  keys * problem->kv_heads < FEW_KEYS / 4 ? 1 : threads);
}
