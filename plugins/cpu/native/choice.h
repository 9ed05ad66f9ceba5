/* Steps of a tape that choose among logits, included by kernels.c: samples, logarithms of probabilities, edits.

   A row is ranked by value, the largest first, equal values by id. What a filter keeps is a head of that ranking, told
   by the value at which it ends and the last id that it takes there: nothing is sorted but the band of values around
   the end. */

#if defined(__SSE2__)
#include <immintrin.h>
#endif

#define CUTS 8     /* values that a pass over a row tries as an end */
#define BAND 1024  /* values that are sorted at most to find an end */
#define SPAN 1024  /* values whose sum is made in float, before it is added to others in double */

typedef struct {
    const float *values; /* [whole], -inf beyond the row */
    float *weights;      /* [whole], of what is kept: its probability by the largest one's */
    uint64_t *band, *spare;
    int64_t whole, finite; /* whole vectors; how many values are above -inf */
    float peak, low;       /* the largest value and the least one above -inf */
    int nan;
    float cut; /* kept is what lies above, and at it up to the id `last` */
    int32_t last;
} Ranking;

INLINE int64_t padded(int64_t width) { return (width + WIDTH - 1) / WIDTH * WIDTH; }

/* A bit for each lane that is set. */
INLINE uint32_t lanes(ints mask) {
#if defined(__AVX512DQ__)
    return _mm512_movepi32_mask((__m512i)mask);
#elif defined(__AVX2__)
    return (uint32_t)_mm256_movemask_ps((__m256)mask);
#elif defined(__SSE2__)
    return (uint32_t)_mm_movemask_ps((__m128)mask);
#else
    uint32_t bits = 0;
    for (int i = 0; i < WIDTH; i++)
        bits |= (uint32_t)(mask[i] & 1) << i;
    return bits;
#endif
}

#define EACH_LANE(lane, mask) \
    for (uint32_t lane##_bits = lanes(mask), lane; lane##_bits && (lane = (uint32_t)__builtin_ctz(lane##_bits), 1); \
         lane##_bits &= lane##_bits - 1)

INLINE floats where(ints mask, floats x) { return (floats)((ints)x & mask); }

INLINE ints kept(const Ranking *r, floats x, int64_t i) {
    static const int32_t order[16] = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
    ints ids;
    memcpy(&ids, order, sizeof ids);
    return (x > r->cut) | ((x == r->cut) & (ids + (int32_t)i <= r->last));
}

/* Integers in the order of floats, without a gap: neighbours differ by 1, and both zeros are 0. */
INLINE int64_t key_of(float x) {
    int32_t bits;
    memcpy(&bits, &x, sizeof bits);
    return bits >= 0 ? bits : -(int64_t)(bits & INT32_MAX);
}

INLINE float from_key(int64_t key) {
    const uint32_t bits = key >= 0 ? (uint32_t)key : (uint32_t)-key | 0x80000000u;
    float x;
    memcpy(&x, &bits, sizeof x);
    return x;
}

/* Numbers that ascend as the ranking does. */
INLINE uint64_t place(float x, int64_t id) { return (uint64_t)(INT32_MAX - key_of(x)) << 32 | (uint64_t)id; }
INLINE int32_t id_at(uint64_t place) { return (int32_t)(uint32_t)place; }
INLINE float value_at(uint64_t place) { return from_key(INT32_MAX - (int64_t)(place >> 32)); }

/* Sort n numbers, with room for as many. */
static void sort_places(uint64_t *a, uint64_t *spare, int64_t n) {
    uint64_t *from = a, *to = spare;
    for (int64_t run = 1; run < n; run *= 2) {
        for (int64_t first = 0; first < n; first += 2 * run) {
            int64_t i = first, j = least(first + run, n);
            const int64_t middle = j, end = least(first + 2 * run, n);
            for (int64_t at = first; at < end; at++)
                to[at] = i < middle && (j == end || from[i] < from[j]) ? from[i++] : from[j++];
        }
        uint64_t *swapped = from;
        from = to, to = swapped;
    }
    if (from != a)
        memcpy(a, from, n * sizeof *a);
}

INLINE void survey(Ranking *r, float *values, const void *x, int64_t from, int64_t width, int narrow) {
    floats peak = splat(-INFINITY), low = splat(INFINITY);
    ints unordered = {0}, count = {0};
    r->whole = padded(width), r->values = values;
    for (int64_t i = 0; i < r->whole; i += WIDTH) {
        floats here = splat(-INFINITY);
        if (i + WIDTH <= width)
            here = load(x, from + i, narrow);
        else
            for (int64_t j = i; j < width; j++)
                here[j - i] = load_one(x, from + j, narrow);
        store(values, i, here, 0);
        const ints above = here > -INFINITY;
        peak = larger(here, peak);
        low = choose(above & (here < low), here, low);
        unordered |= here != here;
        count -= above;
    }
    r->peak = maximum(peak), r->low = -maximum(-low), r->nan = lanes(unordered) != 0;
    r->finite = 0;
    for (int i = 0; i < WIDTH; i++)
        r->finite += count[i];
    r->cut = -INFINITY, r->last = -1;
}

/* The weights of what is kept, exp((x - peak) / temperature), and their sum. */
static double weigh_kept(const Ranking *r, float temperature) {
    double total = 0;
    for (int64_t first = 0; first < r->whole; first += SPAN) {
        floats part = {0};
        for (int64_t i = first; i < least(first + SPAN, r->whole); i += WIDTH) {
            const floats x = load(r->values, i, 0);
            const ints in = kept(r, x, i);
            if (!lanes(in))
                continue;
            const floats weight = exponential((x - r->peak) / temperature);
            store(r->weights, i, weight, 0);
            part += where(in, weight);
        }
        total += sum(part);
    }
    return total;
}

/* What is kept of the values from lo to hi, in id order: how many, or `room` + 1 if there are more than that. */
static int64_t collect_kept(const Ranking *r, float lo, float hi, uint64_t *to, int64_t room) {
    int64_t n = 0;
    for (int64_t i = 0; i < r->whole; i += WIDTH) {
        const floats x = load(r->values, i, 0);
        EACH_LANE(lane, kept(r, x, i) & (x >= lo) & (x <= hi)) {
            if (n == room)
                return room + 1;
            to[n++] = place(r->values[i + lane], i + lane);
        }
    }
    return n;
}

/* Of what is kept from each of the ascending cuts on: how much it weighs, or how much it is. */
static void measure_kept(const Ranking *r, const float *cuts, int weighed, double *sums) {
    memset(sums, 0, CUTS * sizeof *sums);
    for (int64_t first = 0; first < r->whole; first += SPAN) {
        floats parts[CUTS] = {{0}};
        uint32_t any_here = 0;
        for (int64_t i = first; i < least(first + SPAN, r->whole); i += WIDTH) {
            const floats x = load(r->values, i, 0);
            const ints in = kept(r, x, i) & (x >= cuts[0]);
            const uint32_t here = lanes(in);
            if (!here)
                continue;
            any_here |= here;
            const floats amount = where(in, weighed ? load(r->weights, i, 0) : splat(1.0f));
            for (int c = 0; c < CUTS; c++)
                parts[c] += where(x >= cuts[c], amount);
        }
        if (any_here)
            for (int c = 0; c < CUTS; c++)
                sums[c] += sum(parts[c]);
    }
}

/* Keep so many of the equal values at `cut`, the lowest ids. */
static void keep_equal(Ranking *r, float cut, double count) {
    int32_t last = -1;
    for (int64_t i = 0; i < r->whole && count > 0; i += WIDTH) {
        const floats x = load(r->values, i, 0);
        EACH_LANE(lane, kept(r, x, i) & (x == cut))
            if (count > 0)
                last = (int32_t)(i + lane), count--;
    }
    r->cut = cut, r->last = last;
}

/* Values that part those of the keys low to high: evenly first, as logits lie, then by their keys, which comes to an
   end. */
static void part_band(int64_t low, int64_t high, int round, float *cuts) {
    const float lo = from_key(low), hi = from_key(high);
    for (int c = 0; c < CUTS; c++) {
        const float share = (float)(c + 1) / (CUTS + 1);
        const int64_t evenly = low + (high - low) * (c + 1) / (CUTS + 1);
        const int64_t key = round < 3 ? key_of(lo * (1 - share) + hi * share) : evenly;
        cuts[c] = from_key(most(low + 1, least(high, key)));
    }
}

/* Keep what comes, in the ranking, before `goal` has been gathered: weights, or values of 1 each. Values below `low`
   are known to come after that. */
static void keep_head(Ranking *r, double goal, float low_value, int weighed) {
    int64_t low = key_of(low_value), high = key_of(r->peak); /* the end is one of these, */
    double above = 0;                                        /* and so much lies above all of them */
    for (int round = 0;; round++) {
        const int64_t n = collect_kept(r, from_key(low), from_key(high), r->band, BAND);
        if (n <= BAND) {
            int64_t taken = 0;
            sort_places(r->band, r->spare, n);
            for (; taken < n && above < goal; taken++)
                above += weighed ? r->weights[id_at(r->band[taken])] : 1;
            r->cut = taken ? value_at(r->band[taken - 1]) : from_key(high);
            r->last = taken ? id_at(r->band[taken - 1]) : -1;
            return;
        }
        if (low == high) {
            const double each = weighed ? r->weights[id_at(r->band[0])] : 1;
            keep_equal(r, from_key(low), each > 0 ? ceil((goal - above) / each) : INFINITY);
            return;
        }
        float cuts[CUTS];
        double sums[CUTS];
        part_band(low, high, round, cuts);
        measure_kept(r, cuts, weighed, sums);
        int c = CUTS;
        while (c > 0 && sums[c - 1] < goal)
            c--;
        if (c < CUTS)
            high = key_of(cuts[c]) - 1, above = sums[c];
        if (c > 0)
            low = key_of(cuts[c - 1]);
    }
}

/* The first kept id of weight min_p or more at which the gathered weights exceed the share u of all; -1 if none is
   kept. */
static int32_t draw_kept(const Ranking *r, double u, float min_p, double *spans) {
    double total = 0, gathered = 0;
    int64_t chosen = -1;
    for (int64_t first = 0; first < r->whole; first += SPAN) {
        floats part = {0};
        for (int64_t i = first; i < least(first + SPAN, r->whole); i += WIDTH) {
            const ints in = kept(r, load(r->values, i, 0), i);
            if (!lanes(in))
                continue;
            const floats weight = load(r->weights, i, 0);
            part += where(in & (weight >= min_p), weight);
        }
        spans[first / SPAN] = sum(part);
        total += spans[first / SPAN];
    }
    for (int64_t s = 0; s * SPAN < r->whole; s++) {
        if (!(spans[s] > 0))
            continue;
        gathered = chosen < 0 ? 0 : gathered + spans[chosen];
        chosen = s;
        if (gathered + spans[s] > u * total)
            break;
    }
    int32_t found = -1;
    for (int64_t i = chosen * SPAN; chosen >= 0 && i < least((chosen + 1) * SPAN, r->whole); i += WIDTH) {
        const ints in = kept(r, load(r->values, i, 0), i);
        EACH_LANE(lane, in) {
            const float weight = r->weights[i + lane];
            if (!(weight > 0) || weight < min_p)
                continue;
            found = (int32_t)(i + lane);
            gathered += weight;
            if (gathered > u * total)
                return found;
        }
    }
    return found;
}

/* ---- sample ------------------------------------------------------------------------------------------------------ */

typedef struct {
    Extent e;
    int64_t grain;
    Argmax a; /* for rows of temperature 0 */
    const float *temperature, *top_p, *min_p, *u; /* [R] */
    const int32_t *top_k;                         /* [R] */
} SampleStep;

/* Scratch of a thread: values and weights, two bands of `band` places, and a sum of each span. */
INLINE double *ranking_in(void *scratch, int64_t width, int64_t band, Ranking *r, float **values) {
    *values = scratch;
    r->weights = *values + padded(width);
    r->band = (uint64_t *)(r->weights + padded(width));
    r->spare = r->band + band;
    return (double *)(r->spare + band);
}

INLINE int32_t sample_row(const SampleStep *s, int64_t row, void *scratch, int narrow) {
    const Argmax *a = &s->a;
    const float temperature = s->temperature[row], top_p = s->top_p[row];
    const int64_t top_k = s->top_k[row];
    if (!(temperature > 0))
        return argmax_row(a, row, narrow);
    Ranking r;
    float *values;
    double *spans = ranking_in(scratch, a->width, BAND, &r, &values);
    survey(&r, values, a->x, row * a->stride, a->width, narrow);
    if (r.nan || r.finite == 0 || r.peak == INFINITY)
        return argmax_row(a, row, narrow);
    if (top_k > 0 && top_k < a->width)
        keep_head(&r, (double)top_k, r.low, 0);
    const double total = weigh_kept(&r, temperature);
    if (top_p > 0 && top_p < 1) {
        /* All that weighs less than this together makes up less than 1 - top_p. */
        const double least_weight = (1 - (double)top_p) * total / (double)a->width;
        const double low = r.peak + temperature * (log(least_weight) - 1e-3) - 1e-6 * fabs(r.peak);
        keep_head(&r, top_p * total, low > r.low ? (float)low : r.low, 1);
    }
    return draw_kept(&r, s->u[row], s->min_p[row] > 0 ? s->min_p[row] : 0, spans);
}

GRAINS(sample, SampleStep)
EXPORT void NAME(sample_body)(const void *job, int64_t item, void *scratch) {
    const SampleStep *s = job;
    EACH_ROW(row, s, item) s->a.out[row] = EITHER(sample_row, s->a.narrow, s, row, scratch);
}

/* ---- logprobs ---------------------------------------------------------------------------------------------------- */

typedef struct {
    Extent e;
    int64_t grain;
    const void *x;      /* [R, V] */
    const int32_t *ids; /* [R] */
    float *chosen;      /* [R] */
    int32_t *top_ids;   /* [R, k] */
    float *top;         /* [R, k] */
    int64_t width, stride, k;
    int64_t band; /* k, or BAND if that is more */
    int64_t narrow;
} LogprobsStep;

INLINE void logprobs_row(const LogprobsStep *l, int64_t row, void *scratch) {
    Ranking r;
    float *values;
    ranking_in(scratch, l->width, l->band, &r, &values);
    EITHER(survey, l->narrow, &r, values, l->x, row * l->stride, l->width);
    const double logarithm = r.nan || !r.finite ? NAN : log(weigh_kept(&r, 1.0f));
    const int64_t id = most(l->ids[row], 0);
    int32_t *top_ids = l->top_ids + row * l->k;
    float *top = l->top + row * l->k;
    l->chosen[row] = id < l->width ? (float)((double)values[id] - r.peak - logarithm) : NAN;
    if (l->k < r.finite && l->k > 0)
        keep_head(&r, (double)l->k, r.low, 0);
    int64_t n = l->k ? collect_kept(&r, -INFINITY, INFINITY, r.band, l->k) : 0;
    sort_places(r.band, r.spare, n);
    for (int64_t i = 0; i < n; i++) {
        top_ids[i] = id_at(r.band[i]);
        top[i] = (float)((double)values[top_ids[i]] - r.peak - logarithm);
    }
    for (int nan = 0; nan < 2; nan++) /* -inf comes after all that is above it, NaN after that */
        for (int64_t i = 0; i < l->width && n < l->k; i++)
            if (nan ? values[i] != values[i] : values[i] == -INFINITY)
                top_ids[n] = (int32_t)i, top[n++] = (float)((double)values[i] - r.peak - logarithm);
}

GRAINS(logprobs, LogprobsStep)
EXPORT void NAME(logprobs_body)(const void *job, int64_t item, void *scratch) {
    const LogprobsStep *l = job;
    EACH_ROW(row, l, item) logprobs_row(l, row, scratch);
}

/* ---- apply_logits ------------------------------------------------------------------------------------------------ */

typedef struct {
    Extent e;
    int64_t grain;
    const void *x; /* [R, V] */
    void *out;     /* [R, V] */
    const uint32_t *mask; /* [R, words], a bit for each token that is allowed, or NULL */
    const int32_t *ids;   /* [R, edits], or NULL */
    const float *scale, *bias;
    int64_t width, stride, words, edits, narrow;
} ApplyStep;

INLINE int allowed(const uint32_t *mask, int64_t id) { return !mask || mask[id / 32] >> id % 32 & 1; }

INLINE void apply_row(const ApplyStep *a, int64_t row, int narrow) {
    const int64_t from = row * a->stride, to = row * a->width, size = narrow ? 2 : 4;
    const uint32_t *mask = a->mask ? a->mask + row * a->words : NULL;
    for (int64_t first = 0; first < a->width; first += 32) {
        const int64_t end = least(first + 32, a->width);
        if (!mask || mask[first / 32] == UINT32_MAX)
            memcpy((char *)a->out + (to + first) * size, (const char *)a->x + (from + first) * size,
                   (end - first) * size);
        else
            for (int64_t i = first; i < end; i++)
                store_one(a->out, to + i, allowed(mask, i) ? load_one(a->x, from + i, narrow) : -INFINITY, narrow);
    }
    for (int64_t i = row * a->edits; i < (row + 1) * a->edits; i++) {
        const int64_t id = a->ids[i];
        if (id < 0 || id >= a->width || !allowed(mask, id))
            continue;
        const float x = load_one(a->x, from + id, narrow), scale = a->scale[i] == 0 ? 1 : a->scale[i];
        store_one(a->out, to + id, (x > 0 ? x / scale : x * scale) + a->bias[i], narrow);
    }
}

GRAINS(apply, ApplyStep)
EXPORT void NAME(apply_body)(const void *job, int64_t item, void *scratch) {
    const ApplyStep *a = job;
    EACH_ROW(row, a, item) EITHER(apply_row, a->narrow, a, row);
}
