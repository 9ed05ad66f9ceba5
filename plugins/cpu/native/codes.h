/* Products with weights in codes, included by kernels.c after linear.h. A panel of PANEL outputs is one stream of
   memory.

   Of codes that are multiplied as floats it is a record for each `group` numbers along k: their codes, a scale for each
   output and, in blocks that have one, a number for each output that is added. Codes of 8 bits lie as [group /
   2][PANEL][2], of 4 bits as [group / 8][PANEL][2] of 16 bits, of which number p holds the codes of k = p, p + 2, p + 4
   and p + 6, lowest bits first. Codes are exact in bfloat16: with few rows products of codes are summed over a group
   before its scale comes, with many a panel is expanded once, of several groups to numbers in the dtype executed, and
   linear.h does the rest.

   Of codes that meet codes it is [k / 4][PANEL][4] int8, zeros to a multiple of 64, a float scale for each output and
   the sum of each one's codes. */

#if defined(__F16C__)
#include <immintrin.h>
#endif

#define SOON 6144 /* bytes that are asked for before one row needs them: the processor alone looks less far */
#define STRETCH 128 /* numbers along k that are expanded at once for few rows: they stay in the first cache */

typedef struct {
    Linear l;            /* x: [m, k], bfloat16 where there are `tokens`; panels: the records */
    int64_t kind, group, zero;
    int64_t half, offset; /* whether scales have 16 bits; whether there are numbers to add */
} Codes;

typedef struct {
    floats scale, offset;
} Step;

INLINE int64_t code_bytes(const Codes *c) {
    return c->kind == FOUR ? (c->group + 7) / 8 * 4 * PANEL : (c->group + 1) / 2 * 2 * PANEL;
}

INLINE int64_t record_bytes(const Codes *c) { return code_bytes(c) + (c->offset + 1) * PANEL * (c->half ? 2 : 4); }

/* Rows of numbers that a panel has when it is expanded: codes come in eights. */
INLINE int64_t expanded(const Codes *c) { return c->l.k + 8; }

INLINE int narrow_x(const Codes *c) { return c->l.narrow || c->l.tokens; }

/* Whether one scale is for all of k, and can wait until the sums are whole. */
INLINE int one_scale(const Codes *c) { return c->group == c->l.k && !c->offset; }

/* Numbers of 16 bits, as IEEE has them. */
INLINE floats half_of(halves bits) {
#if defined(__AVX512F__)
    return (floats)_mm512_cvtph_ps((__m256i)bits);
#elif defined(__F16C__)
    return (floats)_mm256_cvtph_ps((__m128i)bits);
#else
    const words wide = __builtin_convertvector(bits, words), low = wide & 0x3ff;
    const words top = (words)((ints)(wide & 0x7c00) == 0x7c00) & 0x38000000;
    const floats normal = (floats)(((wide & 0x7fff) << 13) + 0x38000000 + top);
    const floats small = __builtin_convertvector((ints)low, floats) * 0x1p-24f;
    return (floats)((words)choose((ints)(wide & 0x7c00) == 0, small, normal) | (wide & 0x8000) << 16);
#endif
}

INLINE floats load_half(const void *from) {
    halves bits;
    memcpy(&bits, from, sizeof bits);
    return half_of(bits);
}

INLINE Step step_at(const Codes *c, const char *record, int v) {
    const char *at = record + code_bytes(c);
    const int64_t size = c->half ? 2 : 4, place = v * WIDTH * size;
    Step s = {{0}, {0}};
    s.scale = c->half ? load_half(at + place) : load(at + place, 0, 0);
    if (c->offset)
        s.offset = c->half ? load_half(at + PANEL * size + place) : load(at + PANEL * size + place, 0, 0);
    return s;
}

/* ---- codes as numbers ------------------------------------------------------------------------------------------- */

/* Numbers at even and at odd places as bfloat16, which they are exactly. */
INLINE void put_both(void *out, int64_t at, floats even, floats odd) {
    const words both = (words)even >> 16 | ((words)odd & 0xffff0000);
    memcpy((uint16_t *)out + at, &both, sizeof both);
}

/* Numbers of neighbouring k, of WIDTH outputs from v * WIDTH on: pairs of bfloat16, or floats. */
INLINE void put_pair(void *out, int64_t k, int v, floats even, floats odd, int narrow) {
    if (narrow) {
        put_both(out, k * PANEL + 2 * v * WIDTH, even, odd);
    } else {
        store(out, k * PANEL + v * WIDTH, even, 0);
        store(out, (k + 1) * PANEL + v * WIDTH, odd, 0);
    }
}

/* e4m3 in the low bytes; no code is a NaN. */
INLINE floats floats_of(words byte) {
    const words sign = (byte & 0x80) << 24, rest = byte & 0x7f;
    const floats small = __builtin_convertvector((ints)rest, floats) * 0x1p-9f;
    return (floats)((words)choose((ints)rest < 8, small, (floats)((rest << 20) + (120 << 23))) | sign);
}

INLINE floats integers_of(words byte) { return __builtin_convertvector((ints)(byte << 24) >> 24, floats); }

/* The numbers of codes of 8 bits in the low bytes, the others 0. */
INLINE floats numbers_of(words byte, const int kind) {
    if (kind == INTEGERS)
        return integers_of(byte);
    if (kind == E5M2)
        return half_of(__builtin_convertvector(byte << 8, halves));
    return kind == FLOATS ? floats_of(byte) : choose((ints)(byte & 0x7f) == 0x7f, splat(NAN), floats_of(byte));
}

#if defined(__AVX512BF16__)
INLINE __m512i sixteen_bits_of(const uint8_t *codes, int64_t kind) {
    if (kind == INTEGERS) {
        const __m512 low = _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128((const void *)codes)));
        const __m512 high = _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128((const void *)(codes + 16))));
        return (__m512i)_mm512_cvtne2ps_pbh(high, low);
    }
    if (kind == E5M2) {
        const __m512i whole = _mm512_slli_epi16(_mm512_cvtepu8_epi16(_mm256_loadu_si256((const void *)codes)), 8);
        const __m512 low = _mm512_cvtph_ps(_mm512_castsi512_si256(whole));
        return (__m512i)_mm512_cvtne2ps_pbh(_mm512_cvtph_ps(_mm512_extracti64x4_epi64(whole, 1)), low);
    }
    /* bfloat16 of 0 to 7 times 2^-9, the numbers without a leading one */
    const __m512i small = _mm512_castsi128_si512(
        _mm_setr_epi16(0, 0x3b00, 0x3b80, 0x3bc0, 0x3c00, 0x3c20, 0x3c40, 0x3c60));
    const __m512i wide = _mm512_cvtepu8_epi16(_mm256_loadu_si256((const void *)codes));
    const __m512i rest = _mm512_slli_epi16(_mm512_and_si512(wide, _mm512_set1_epi16(0x7f)), 4);
    const __m512i sign = _mm512_slli_epi16(_mm512_and_si512(wide, _mm512_set1_epi16(0x80)), 8);
    __m512i normal = _mm512_add_epi16(rest, _mm512_set1_epi16(0x3c00));
    if (kind == E4M3) {
        const __mmask32 is_nan = _mm512_cmpeq_epi16_mask(rest, _mm512_set1_epi16(0x7f0));
        normal = _mm512_mask_mov_epi16(normal, is_nan, _mm512_set1_epi16(0x7fc0));
    }
    const __mmask32 is_small = _mm512_testn_epi16_mask(wide, _mm512_set1_epi16(0x78));
    return _mm512_or_si512(_mm512_mask_permutexvar_epi16(normal, is_small, wide, small), sign);
}

/* bfloat16 of each code of 4 bits, twice: a permutation reads 5 bits of what it is told. */
INLINE __m512i sixteen_numbers(int64_t zero) {
    const __m512 all = _mm512_setr_ps(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15) - (float)zero;
    return (__m512i)_mm512_cvtne2ps_pbh(all, all);
}

INLINE void expand_four(const Codes *c, const uint8_t *codes, int64_t count, uint16_t *out) {
    const __m512i numbers = sixteen_numbers(c->zero);
    for (int64_t k = 0; k < count; k += 8, codes += 4 * PANEL, out += 8 * PANEL)
        for (int half = 0; half < 2; half++) {
            const __m512i four = _mm512_loadu_si512(codes + 64 * half);
            for (int j = 0; j < 4; j++)
                _mm512_storeu_si512(out + 2 * PANEL * j + PANEL * half,
                                    _mm512_permutexvar_epi16(_mm512_srli_epi16(four, 4 * j), numbers));
        }
}
#endif

INLINE void expand_bytes(const uint8_t *codes, int64_t count, void *out, const int kind, int narrow) {
#if defined(__AVX512BF16__)
    for (int64_t at = 0; narrow && at < count; at += 32)
        _mm512_storeu_si512((uint16_t *)out + at, sixteen_bits_of(codes + at, kind));
#else
    for (int64_t at = 0; narrow && at < count; at += 2 * WIDTH) {
        halves two;
        memcpy(&two, codes + at, sizeof two);
        const words both = __builtin_convertvector(two, words);
        put_both(out, at, numbers_of(both & 255, kind), numbers_of(both >> 8, kind));
    }
#endif
    for (int64_t at = 0; !narrow && at < count; at += WIDTH) {
        typedef uint8_t bytes __attribute__((vector_size(WIDTH)));
        bytes one;
        memcpy(&one, codes + at, sizeof one);
        store(out, at, numbers_of(__builtin_convertvector(one, words), kind), 0);
    }
}

/* The numbers that `count` codes of 8 bits stand for, a multiple of PANEL, in the same order. */
INLINE void expand_codes(int64_t kind, const void *codes, int64_t count, void *out, int narrow) {
    if (kind == INTEGERS)
        expand_bytes(codes, count, out, INTEGERS, narrow);
    else if (kind == FLOATS)
        expand_bytes(codes, count, out, FLOATS, narrow);
    else if (kind == E4M3)
        expand_bytes(codes, count, out, E4M3, narrow);
    else
        expand_bytes(codes, count, out, E5M2, narrow);
}

/* The numbers that `count` codes of each output stand for, before their scale, as linear.h has panels. */
INLINE void expand_any(const Codes *c, const uint8_t *codes, int64_t count, void *out, int narrow) {
    if (c->kind == FOUR) {
        const float zero = (float)c->zero;
        for (int64_t k = 0; k < count; k += 8)
            for (int v = 0; v < VECTORS; v++) {
                words four;
                memcpy(&four, codes + k / 2 * PANEL + 4 * v * WIDTH, sizeof four);
                for (int j = 0; j < 4; j++, four >>= 4)
                    put_pair(out, k + 2 * j, v, __builtin_convertvector((ints)(four & 15), floats) - zero,
                             __builtin_convertvector((ints)(four >> 16 & 15), floats) - zero, narrow);
            }
        return;
    }
    if (narrow) {
        expand_codes(c->kind, codes, (count + 1) / 2 * 2 * PANEL, out, 1);
        return;
    }
    for (int64_t k = 0; k < count; k += 2)
        for (int v = 0; v < VECTORS; v++) {
            halves two;
            memcpy(&two, codes + k * PANEL + 2 * v * WIDTH, sizeof two);
            const words both = __builtin_convertvector(two, words);
            if (c->kind == INTEGERS)
                put_pair(out, k, v, integers_of(both), integers_of(both >> 8), 0);
            else
                put_pair(out, k, v, floats_of(both & 255), floats_of(both >> 8), 0);
        }
}

static void expand(const Codes *c, const uint8_t *codes, int64_t count, void *out) {
    if (!narrow_x(c)) {
        expand_any(c, codes, count, out, 0);
        return;
    }
#if defined(__AVX512BF16__)
    if (c->kind == FOUR) {
        expand_four(c, codes, count, out);
        return;
    }
#endif
    expand_any(c, codes, count, out, 1);
}

/* Codes of a record from number `from` on, which is a multiple of STRETCH. */
INLINE const uint8_t *codes_from(const Codes *c, const char *record, int64_t from) {
    return (const uint8_t *)record + (c->kind == FOUR ? from / 2 : from) * PANEL;
}

/* Turn `count` codes of each output, expanded at `numbers`, into the numbers they stand for. */
static void rescale(const Codes *c, const char *record, int64_t count, void *numbers) {
    for (int v = 0; v < VECTORS; v++) {
        const Step s = step_at(c, record, v);
        if (!narrow_x(c)) {
            for (int64_t k = 0; k < count; k++) {
                const int64_t at = k * PANEL + v * WIDTH;
                store(numbers, at, load(numbers, at, 0) * s.scale + s.offset, 0);
            }
            continue;
        }
        for (int64_t k = 0; k < count; k += 2) {
            const int64_t at = k * PANEL + 2 * v * WIDTH;
            pair both = load_pair(numbers, at, 1);
            both.a = both.a * s.scale + s.offset, both.b = both.b * s.scale + s.offset;
#if defined(__AVX512BF16__)
            const __m512i order = _mm512_set_epi16(31, 15, 30, 14, 29, 13, 28, 12, 27, 11, 26, 10, 25, 9, 24, 8, 23, 7,
                                                   22, 6, 21, 5, 20, 4, 19, 3, 18, 2, 17, 1, 16, 0);
            const __m512i apart = (__m512i)_mm512_cvtne2ps_pbh((__m512)both.b, (__m512)both.a);
            _mm512_storeu_si512((uint16_t *)numbers + at, _mm512_permutexvar_epi16(order, apart));
#else
            store_pair(numbers, at, both, 1);
#endif
        }
    }
}

/* ---- products of numbers with codes ----------------------------------------------------------------------------- */

/* y = x w^T of `rows` rows from `row` on, from number `from` of each on, and `count` numbers of a panel. */
INLINE void multiply_numbers(const Codes *c, int64_t row, int64_t rows, int64_t from, int64_t count,
                             const void *numbers, Sums y) {
    const int narrow = narrow_x(c);
    const Inner p = {c->l.x_stride, narrow ? 2 * PANEL : PANEL, count, PANEL, 0};
    inner(&p, (const char *)c->l.x + (row * c->l.x_stride + from) * (narrow ? 2 : 4), numbers, rows, y[0], narrow);
}

/* y = x w^T of up to FEW rows and a panel, groups scaled one by one; `totals` holds the sum of each group of each x. */
static void multiply_codes(const Codes *c, int64_t row, int64_t rows, int64_t panel, const float *totals, Sums y) {
    const int64_t groups = c->l.k / c->group;
    const char *record = (const char *)c->l.panels + panel * groups * record_bytes(c);
    _Alignas(64) float numbers[STRETCH * PANEL];
    _Alignas(64) Sums part;
    memset(y, 0, rows * sizeof *y);
    for (int64_t g = 0; g < groups; g++, record += record_bytes(c)) {
        for (int64_t from = 0; from < c->group; from += STRETCH) {
            const int64_t some = least(STRETCH, c->group - from);
            expand(c, codes_from(c, record, from), some, numbers);
            multiply_numbers(c, row, rows, g * c->group + from, some, numbers, part);
            for (int v = 0; v < VECTORS; v++) {
                const floats scale = step_at(c, record, v).scale;
                for (int64_t i = 0; i < rows; i++)
                    store(y[i], v * WIDTH, load(y[i], v * WIDTH, 0) + load(part[i], v * WIDTH, 0) * scale, 0);
            }
        }
        for (int v = 0; c->offset && v < VECTORS; v++) {
            const floats offset = step_at(c, record, v).offset;
            for (int64_t i = 0; i < rows; i++)
                store(y[i], v * WIDTH, load(y[i], v * WIDTH, 0) + offset * totals[i * groups + g], 0);
        }
    }
}

#if defined(__AVX512F__)
/* One row, whose numbers are floats here: codes become floats in registers, and are read once and as fast as memory
   gives them. A group is of whole eights. */
INLINE void group_of_four(const uint8_t *codes, int64_t group, const float *x, __m512 numbers, __m512 *sums) {
    __m512 apart[2][2] = {{_mm512_setzero_ps(), _mm512_setzero_ps()}, {_mm512_setzero_ps(), _mm512_setzero_ps()}};
    for (int64_t k = 0; k < group; k += 8, codes += 4 * PANEL)
#pragma GCC unroll 2
        for (int half = 0; half < 2; half++) {
            const __m512i eight = _mm512_loadu_si512(codes + 64 * half);
            __builtin_prefetch(codes + SOON + 64 * half);
#pragma GCC unroll 4
            for (int j = 0; j < 4; j++) {
                const __m512 even = _mm512_permutexvar_ps(_mm512_srli_epi32(eight, 4 * j), numbers);
                const __m512 odd = _mm512_permutexvar_ps(_mm512_srli_epi32(eight, 16 + 4 * j), numbers);
                apart[half][0] = _mm512_fmadd_ps(even, _mm512_set1_ps(x[k + 2 * j]), apart[half][0]);
                apart[half][1] = _mm512_fmadd_ps(odd, _mm512_set1_ps(x[k + 2 * j + 1]), apart[half][1]);
            }
        }
    sums[0] = apart[0][0] + apart[0][1], sums[1] = apart[1][0] + apart[1][1];
}

/* Eight outputs' codes of a pair; e4m3 as 1/256 of itself, which it is to 16 bits once its sign is out of its way. */
INLINE __m512 pairs_of_eight(const uint8_t *codes, const int kind) {
    const __m128i some = _mm_loadu_si128((const void *)codes);
    if (kind == INTEGERS)
        return _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(some));
    const __m256i placed = _mm256_slli_epi16(_mm256_cvtepi8_epi16(some), 7);
    return _mm512_cvtph_ps(_mm256_and_si256(placed, _mm256_set1_epi16((int16_t)0xbfff)));
}

/* Sums of eight outputs and both numbers of a pair lie side by side until the group ends. */
INLINE void group_of_eight(const uint8_t *codes, int64_t group, const float *x, const int kind, __m512 *sums) {
    const __m512i evens = _mm512_set_epi32(30, 28, 26, 24, 22, 20, 18, 16, 14, 12, 10, 8, 6, 4, 2, 0);
    const __m512i odds = _mm512_add_epi32(evens, _mm512_set1_epi32(1));
    __m512 apart[4] = {_mm512_setzero_ps(), _mm512_setzero_ps(), _mm512_setzero_ps(), _mm512_setzero_ps()};
    for (int64_t k = 0; k < group; k += 2, codes += 2 * PANEL) {
        double both;
        memcpy(&both, x + k, sizeof both);
        const __m512 here = _mm512_castpd_ps(_mm512_set1_pd(both));
        __builtin_prefetch(codes + SOON);
#pragma GCC unroll 4
        for (int i = 0; i < 4; i++)
            apart[i] = _mm512_fmadd_ps(pairs_of_eight(codes + 16 * i, kind), here, apart[i]);
    }
    for (int half = 0; half < 2; half++) {
        const __m512 low = apart[2 * half], high = apart[2 * half + 1];
        const __m512 whole = _mm512_permutex2var_ps(low, evens, high) + _mm512_permutex2var_ps(low, odds, high);
        sums[half] = whole * (kind == INTEGERS ? 1.0f : 256.0f);
    }
}

/* y = x w^T of a row and a panel. */
INLINE void multiply_row(const Codes *c, const float *x, int64_t panel, const float *totals, const int kind, float *y) {
    const int64_t groups = c->l.k / c->group, bytes = record_bytes(c);
    const char *record = (const char *)c->l.panels + panel * groups * bytes;
    const __m512 numbers =
        _mm512_setr_ps(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15) - (float)c->zero;
    __m512 all[2] = {_mm512_setzero_ps(), _mm512_setzero_ps()}, sums[2];
    for (int64_t g = 0; g < groups; g++, record += bytes, x += c->group) {
        if (kind == FOUR)
            group_of_four((const uint8_t *)record, c->group, x, numbers, sums);
        else
            group_of_eight((const uint8_t *)record, c->group, x, kind, sums);
        for (int half = 0; half < 2; half++) {
            const Step s = step_at(c, record, half);
            all[half] += (__m512)s.scale * sums[half];
            if (c->offset)
                all[half] += (__m512)s.offset * totals[g];
        }
    }
    _mm512_storeu_ps(y, all[0]);
    _mm512_storeu_ps(y + 16, all[1]);
}

INLINE int in_registers(const Codes *c, int64_t rows) { return rows == 1 && c->group % (c->kind == FOUR ? 8 : 2) == 0; }

static void multiply_alone(const Codes *c, const float *x, int64_t panel, const float *totals, float *y) {
    if (c->kind == FOUR)
        multiply_row(c, x, panel, totals, FOUR, y);
    else if (c->kind == INTEGERS)
        multiply_row(c, x, panel, totals, INTEGERS, y);
    else
        multiply_row(c, x, panel, totals, FLOATS, y);
}
#endif

/* Sums of each group of `rows` rows of x. */
static void total(const Codes *c, int64_t row, int64_t rows, float *totals) {
    const int64_t groups = c->l.k / c->group;
    for (int64_t i = 0; i < rows; i++)
        for (int64_t g = 0; g < groups; g++) {
            const int64_t at = (row + i) * c->l.x_stride + g * c->group, whole = c->group - c->group % WIDTH;
            floats found = {0};
            float rest = 0;
            for (int64_t k = 0; k < whole; k += WIDTH)
                found += load(c->l.x, at + k, c->l.narrow);
            for (int64_t k = whole; k < c->group; k++)
                rest += load_one(c->l.x, at + k, c->l.narrow);
            totals[i * groups + g] = sum(found) + rest;
        }
}

/* The numbers of a whole panel. */
static void expand_panel(const Codes *c, int64_t panel, char *numbers) {
    const int64_t groups = c->l.k / c->group, size = narrow_x(c) ? 2 : 4;
    const char *record = (const char *)c->l.panels + panel * groups * record_bytes(c);
    for (int64_t g = 0; g < groups; g++, record += record_bytes(c)) {
        char *to = numbers + g * c->group * PANEL * size;
        expand(c, (const uint8_t *)record, c->group, to);
        if (!one_scale(c))
            rescale(c, record, c->group, to);
    }
}

/* What the sums of `rows` rows and a panel still lack: the one scale of each output, and that of each row. */
INLINE void settle(const Codes *c, int64_t row, int64_t rows, int64_t panel, int scaled, Sums y) {
    const char *record = (const char *)c->l.panels + panel * (c->l.k / c->group) * record_bytes(c);
    for (int v = 0; v < VECTORS; v++) {
        const floats scale = scaled ? splat(1.0f) : step_at(c, record, v).scale;
        for (int64_t i = 0; i < rows; i++) {
            const floats token = splat(c->l.tokens ? c->l.tokens[row + i] : 1.0f);
            store(y[i], v * WIDTH, load(y[i], v * WIDTH, 0) * token * scale, 0);
        }
    }
}

/* y = x w^T of up to FEW rows and a panel; `scratch` is that of few_rows. */
INLINE void multiply_few(const Codes *c, const Part s, int64_t panel, const float *scratch, Sums y) {
#if defined(__AVX512F__)
    if (in_registers(c, s.rows))
        multiply_alone(c, scratch + c->l.k / c->group, panel, scratch, y[0]);
    else
#endif
        multiply_codes(c, s.row, s.rows, panel, scratch, y);
    if (c->l.tokens)
        settle(c, s.row, s.rows, panel, 1, y);
}

/* `scratch` takes the sums of each group of x and, of a row alone, its numbers as floats. */
static void few_rows(const Codes *c, const Part s, int first, float *scratch) {
    _Alignas(64) Sums y, up;
    if (c->offset && first)
        total(c, s.row, s.rows, scratch);
#if defined(__AVX512F__)
    if (first && in_registers(c, s.rows))
        for (int64_t k = 0; k < c->l.k; k++)
            scratch[c->l.k / c->group + k] = load_one(c->l.x, s.row * c->l.x_stride + k, narrow_x(c));
#endif
    for (int64_t panel = s.begin; panel < s.end; panel++) {
        multiply_few(c, s, panel, scratch, y);
        if (c->l.gate)
            multiply_few(c, s, c->l.gate / PANEL + panel, scratch, up);
        finish(&c->l, s.row, s.rows, panel, y, up);
    }
}

#if defined(TILES)
/* y = x w^T of up to 32 rows of `bytes` bytes, `stride` apart: of int8 (`whole`), or of bfloat16; y int32 or float. */
INLINE void multiply_rows(Tiles *t, const char *x, int64_t stride, int64_t bytes, const char *w, int64_t rows,
                          const int whole, void *y) {
    const int64_t line = PANEL * 4;
    const int two = rows > 16;
    zero_sums(t);
#define MULTIPLY(c, a, b) \
    if (whole) \
        tile_int8(t, c, a, b); \
    else \
        tile_bf16(t, c, a, b)
    for (int64_t k = 0; k < bytes; k += 64, w += 64 * PANEL) {
        tile_load(t, 4, x + k, stride);
        tile_load(t, 6, w, line);
        MULTIPLY(0, 4, 6);
        tile_load(t, 7, w + 64, line);
        MULTIPLY(1, 4, 7);
        if (two) {
            tile_load(t, 5, x + 16 * stride + k, stride);
            MULTIPLY(2, 5, 6);
            MULTIPLY(3, 5, 7);
        }
    }
#undef MULTIPLY
    tile_store(t, 0, y, line);
    tile_store(t, 1, (char *)y + 64, line);
    if (two) {
        tile_store(t, 2, (char *)y + 16 * line, line);
        tile_store(t, 3, (char *)y + 16 * line + 64, line);
    }
}
#endif

/* y = x w^T of up to STEP rows and a panel that was expanded. */
INLINE void multiply_expanded(const Codes *c, void *tiles, const char *numbers, int64_t row, int64_t rows,
                              int64_t panel, Sums y) {
#if defined(TILES)
    if (tiles)
        multiply_rows(tiles, (const char *)c->l.x + row * c->l.x_stride * 2, c->l.x_stride * 2, c->l.k * 2, numbers,
                      rows, 0, y);
    else
#endif
        multiply_numbers(c, row, rows, 0, c->l.k, numbers, y);
    settle(c, row, rows, panel, !one_scale(c), y);
}

static void many_rows(const Codes *c, const Part s, char *numbers) {
    char *partner = numbers + expanded(c) * PANEL * (narrow_x(c) ? 2 : 4);
    _Alignas(64) Sums y, up;
    int64_t step = FEW;
    void *tiles = NULL;
#if defined(TILES)
    Tiles state;
    if (narrow_x(c) && c->l.k % 32 == 0)
        tiles = &state, step = STEP;
#endif
    for (int64_t panel = s.begin; panel < s.end; panel++) {
        expand_panel(c, panel, numbers);
        if (c->l.gate)
            expand_panel(c, c->l.gate / PANEL + panel, partner);
        for (int64_t i = 0; i < s.rows; i += step) {
            const int64_t here = least(step, s.rows - i);
#if defined(TILES)
            if (tiles && (i == 0 || here < step))
                shape_tiles(tiles, here);
#endif
            multiply_expanded(c, tiles, numbers, s.row + i, here, panel, y);
            if (c->l.gate)
                multiply_expanded(c, tiles, partner, s.row + i, here, c->l.gate / PANEL + panel, up);
            finish(&c->l, s.row + i, here, panel, y, up);
        }
    }
#if defined(TILES)
    if (tiles)
        tiles_end(tiles);
#endif
}

EXPORT const int64_t NAME(codes_bytes) = sizeof(Codes);
EXPORT int64_t NAME(codes_items)(const void *job) {
    const Codes *c = job;
    return multiply_items(&c->l, live_rows(&c->l.e));
}

EXPORT void NAME(codes_body)(const void *job, int64_t item, void *scratch) {
    Codes c = *(const Codes *)job;
    const Part s = part_of(&c.l, live_rows(&c.l.e), item);
    const int first = first_meeting(&c.l, scratch);
    scratch = make_rows(&c.l, s, first, scratch);
    if (s.rows > FEW)
        many_rows(&c, s, scratch);
    else
        few_rows(&c, s, first, scratch);
    turn_columns(&c.l, s);
}

/* ---- products of codes with codes ------------------------------------------------------------------------------- */

typedef int32_t Counts[STEP][PANEL]; /* of x as int8 [m, x_stride], a multiple of 64, whose scales are `tokens` */

INLINE int64_t matched_bytes(const Linear *l) { return l->x_stride * PANEL + 8 * PANEL; }

#if defined(__AVX512VNNI__)
/* x is raised by 128, as its bytes are unsigned here; what that adds is known from the sums of the weight's codes. */
INLINE __m512i lowered(const Linear *l, const int8_t *w, int half) {
    const __m512i all = _mm512_loadu_si512(w + l->x_stride * PANEL + 4 * PANEL + 64 * half);
    return _mm512_sub_epi32(_mm512_setzero_si512(), _mm512_slli_epi32(all, 7));
}

INLINE void multiply_counts(const Linear *l, const int8_t *x, const int8_t *w, const int rows, int32_t *y) {
    __m512i sums[12][2];
    for (int i = 0; i < rows; i++)
        sums[i][0] = lowered(l, w, 0), sums[i][1] = lowered(l, w, 1);
    for (int64_t k = 0; k < l->x_stride; k += 4, w += 4 * PANEL) {
        const __m512i low = _mm512_loadu_si512(w), high = _mm512_loadu_si512(w + 64);
#pragma GCC unroll 12
        for (int i = 0; i < rows; i++) {
            int32_t four;
            memcpy(&four, x + i * l->x_stride + k, 4);
            const __m512i here = _mm512_set1_epi32(four ^ (int32_t)0x80808080);
            sums[i][0] = _mm512_dpbusd_epi32(sums[i][0], here, low);
            sums[i][1] = _mm512_dpbusd_epi32(sums[i][1], here, high);
        }
    }
    for (int i = 0; i < rows; i++)
        for (int half = 0; half < 2; half++)
            _mm512_storeu_si512(y + i * PANEL + 16 * half, sums[i][half]);
}

static void count_one(const Linear *l, const int8_t *x, const int8_t *w, int32_t *y) {
    __m512i sums[4][2];
    sums[0][0] = lowered(l, w, 0), sums[0][1] = lowered(l, w, 1);
    for (int i = 1; i < 4; i++)
        sums[i][0] = sums[i][1] = _mm512_setzero_si512();
    for (int64_t k = 0; k < l->x_stride; k += 16, w += 16 * PANEL)
#pragma GCC unroll 4
        for (int i = 0; i < 4; i++) {
            int32_t four;
            memcpy(&four, x + k + 4 * i, 4);
            const __m512i here = _mm512_set1_epi32(four ^ (int32_t)0x80808080);
            __builtin_prefetch(w + SOON + 4 * i * PANEL);
            __builtin_prefetch(w + SOON + 4 * i * PANEL + 64);
            sums[i][0] = _mm512_dpbusd_epi32(sums[i][0], here, _mm512_loadu_si512(w + 4 * i * PANEL));
            sums[i][1] = _mm512_dpbusd_epi32(sums[i][1], here, _mm512_loadu_si512(w + 4 * i * PANEL + 64));
        }
    for (int half = 0; half < 2; half++)
        _mm512_storeu_si512(y + 16 * half, _mm512_add_epi32(_mm512_add_epi32(sums[0][half], sums[1][half]),
                                                            _mm512_add_epi32(sums[2][half], sums[3][half])));
}

static void count(const Linear *l, const int8_t *x, const int8_t *w, int64_t rows, int32_t *y) {
    if (rows == 1) {
        count_one(l, x, w, y);
        return;
    }
#define CALL(many) multiply_counts(l, x, w, many, y)
    CONSTANT_ROWS(rows, CALL)
#undef CALL
}
#else
/* Two products of codes and their sum fit 16 bits. */
static void count(const Linear *l, const int8_t *x, const int8_t *w, int64_t rows, int32_t *y) {
    typedef int16_t shorts __attribute__((vector_size(4 * WIDTH)));
    for (int64_t i = 0; i < rows; i++, x += l->x_stride)
        for (int v = 0; v < VECTORS; v++) {
            ints sums = {0};
            for (int64_t k = 0; k < l->x_stride; k += 4) {
                shorts weights;
                memcpy(&weights, w + k * PANEL + 4 * v * WIDTH, sizeof weights);
                const uint32_t even = (uint16_t)x[k] | (uint32_t)(uint16_t)x[k + 2] << 16;
                const uint32_t odd = (uint16_t)x[k + 1] | (uint32_t)(uint16_t)x[k + 3] << 16;
                const shorts evens = (shorts)(even - (words){0}), odds = (shorts)(odd - (words){0});
                const ints both = (ints)(((weights << 8) >> 8) * evens + (weights >> 8) * odds);
                sums += (both << 16 >> 16) + (both >> 16);
            }
            memcpy(y + i * PANEL + v * WIDTH, &sums, sizeof sums);
        }
}
#endif

/* y = x w^T of up to STEP rows and a panel. */
INLINE void match(const Linear *l, void *tiles, int64_t row, int64_t rows, int64_t panel, Sums y) {
    const int8_t *w = (const int8_t *)l->panels + panel * matched_bytes(l);
    const int8_t *x = (const int8_t *)l->x + row * l->x_stride, *scales = w + l->x_stride * PANEL;
    _Alignas(64) Counts counts;
#if defined(TILES)
    if (tiles)
        multiply_rows(tiles, (const char *)x, l->x_stride, l->x_stride, (const char *)w, rows, 1, counts);
    else
#endif
        count(l, x, w, rows, counts[0]);
    for (int v = 0; v < VECTORS; v++) {
        const floats scale = load(scales + 4 * v * WIDTH, 0, 0);
        for (int64_t i = 0; i < rows; i++) {
            ints found;
            memcpy(&found, counts[i] + v * WIDTH, sizeof found);
            store(y[i], v * WIDTH, __builtin_convertvector(found, floats) * l->tokens[row + i] * scale, 0);
        }
    }
}

EXPORT const int64_t NAME(matched_bytes) = sizeof(Linear);
EXPORT int64_t NAME(matched_items)(const void *job) {
    const Linear *l = job;
    return multiply_items(l, live_rows(&l->e));
}

EXPORT void NAME(matched_body)(const void *job, int64_t item, void *scratch) {
    Linear l = *(const Linear *)job;
    const Part s = part_of(&l, live_rows(&l.e), item);
    make_rows(&l, s, first_meeting(&l, scratch), scratch);
    _Alignas(64) Sums y, up;
    int64_t step = FEW;
    void *tiles = NULL;
#if defined(TILES)
    Tiles state;
    if (s.rows > FEW)
        tiles = &state, step = STEP;
#endif
    for (int64_t i = 0; i < s.rows; i += step) {
        const int64_t here = least(step, s.rows - i);
#if defined(TILES)
        if (tiles && (i == 0 || here < step))
            shape_tiles(tiles, here);
#endif
        for (int64_t panel = s.begin; panel < s.end; panel++) {
            match(&l, tiles, s.row + i, here, panel, y);
            if (l.gate)
                match(&l, tiles, s.row + i, here, l.gate / PANEL + panel, up);
            finish(&l, s.row + i, here, panel, y, up);
        }
    }
#if defined(TILES)
    if (tiles)
        tiles_end(tiles);
#endif
    turn_columns(&l, s);
}
