/* Pages of codes, included by kernels.c after codes.h: the panels of heads.h with a byte for a number. What a key or a
   value is divided by before it is coded is given with the step, stored beside the page, or both. */

INLINE float given_scale(const Coding *c, int values, int64_t head, int64_t heads) {
    return !c->given ? 1.0f : c->per_head ? c->given[values * heads + head] : c->given[values];
}

/* ---- numbers as codes -------------------------------------------------------------------------------------------- */

/* Codes in the low bytes. Finite numbers beyond the largest become it; NaN and infinity stay, or are NaN in e4m3. */
INLINE words codes_of(floats x, const int kind) {
    const float top = largest_code(kind);
    const ints finite = magnitude(x) < INFINITY;
    const floats inside = rounded(choose(x > top, splat(top), choose(x < -top, splat(-top), x)), kind);
    if (kind == INTEGERS)
        return (words)__builtin_convertvector(inside, ints);
    const floats size = magnitude(inside);
    const words normal = ((words)size >> (kind == E5M2 ? 21 : 20)) - (kind == E5M2 ? 112 << 2 : 120 << 3);
    const ints small = __builtin_convertvector(size * (kind == E5M2 ? 0x1p16f : 0x1p9f), ints);
    const ints code = (ints)choose(size < (kind == E5M2 ? 0x1p-14f : 0x1p-6f), (floats)small, (floats)normal);
    const ints other = kind == E5M2 ? 0x7c + ((x != x) & 3) : (ints){0} + 0x7f;
    return (words)((code & finite) | (other & ~finite)) | ((words)x >> 24 & 0x80);
}

/* Code the key or the value of a head of a token into its slot. */
INLINE void put_codes_of(const PutStep *j, int64_t token, int64_t head, const int values, const int kind, int narrow) {
    typedef uint8_t bytes __attribute__((vector_size(WIDTH)));
    const Panels *p = &j->p;
    const int64_t dim = values ? p->v_dim : p->k_dim, x = token * (values ? j->v_stride : j->k_stride) + head * dim;
    const int64_t size = p->page_size, slot = j->slots[token], page = slot / size * p->heads + head, at = slot % size;
    const void *from = values ? j->v : j->k;
    const floats given = splat(given_scale(&j->c, values, head, p->heads));
    float *stored = values ? j->c.v_scales : j->c.k_scales, scale = 1.0f;
    if (stored) {
        floats top = {0};
        ints lost = {0};
        for (int64_t d = 0; d < dim; d += WIDTH) {
            const floats here = magnitude(load(from, x + d, narrow) / given);
            top = larger(here, top);
            lost |= here != here;
        }
        scale = any(lost) ? NAN : maximum(top) / largest_code(kind);
        stored[page * size + at] = scale;
        scale = scale > 0 ? scale : 1.0f;
    }
    const int64_t pair = narrow ? 2 : 1;
    uint8_t *to = values ? (uint8_t *)p->values + page * dim * size + at / pair * pair * dim + at % pair
                         : (uint8_t *)p->keys + page * dim * size + pair * at;
    for (int64_t d = 0; d < dim; d += WIDTH) {
        const bytes codes = __builtin_convertvector(codes_of(load(from, x + d, narrow) / given / scale, kind), bytes);
        for (int i = 0; i < WIDTH; i++)
            to[values ? pair * (d + i) : (d + i) / pair * pair * size + i % pair] = codes[i];
    }
}

INLINE void put_coded(const PutStep *j, int64_t token, const int kind, int narrow) {
    for (int64_t head = 0; head < j->p.heads; head++) {
        put_codes_of(j, token, head, 0, kind, narrow);
        put_codes_of(j, token, head, 1, kind, narrow);
    }
}

GRAINS(put, PutStep)
EXPORT void NAME(put_body)(const void *job, int64_t item, void *scratch) {
    const PutStep *j = job;
    EACH_ROW(token, j, item) {
        check("slot", j->slots[token], j->p.slots);
        if (j->c.kind == NUMBERS)
            put_token(j, token);
        else if (j->c.kind == INTEGERS)
            EITHER(put_coded, j->p.narrow, j, token, INTEGERS);
        else if (j->c.kind == E4M3)
            EITHER(put_coded, j->p.narrow, j, token, E4M3);
        else
            EITHER(put_coded, j->p.narrow, j, token, E5M2);
    }
}
