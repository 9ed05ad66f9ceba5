/* Rows as checkpoints store them, to rows or panels of bfloat16 or float. Compiled once, without any flag of an
   instruction set and with every product and sum rounded: the numbers are those of the contract's `dequantize`. */
#include <stdint.h>
#include <string.h>

#define EXPORT __attribute__((visibility("default")))
#define CHUNK 256 /* values of a row that are decoded at once: whole blocks of every format */
#define LANES 32  /* rows of a panel */

static float as_float(uint32_t bits) {
    float value;
    memcpy(&value, &bits, sizeof value);
    return value;
}

static uint32_t as_bits(float value) {
    uint32_t bits;
    memcpy(&bits, &value, sizeof bits);
    return bits;
}

/* An IEEE half, of which no path branches: a subnormal is a whole number of 2^-24. */
static inline float of_half(uint16_t half) {
    const uint32_t sign = (uint32_t)(half & 0x8000) << 16, rest = half & 0x7fff;
    const uint32_t bias = rest >= 0x7c00 ? 224u << 23 : 112u << 23;
    const uint32_t small = as_bits((float)(int32_t)rest * 0x1p-24f);
    return as_float(sign | (rest < 0x400 ? small : (rest << 13) + bias));
}

/* To the nearest, of two the even one; what is no number becomes the quiet one of its sign. */
static inline uint16_t to_bfloat16(float value) {
    const uint32_t bits = as_bits(value), rounded = bits + 0x7fff + (bits >> 16 & 1);
    return (bits & 0x7fffffff) > 0x7f800000 ? (bits >> 16 & 0x8000) | 0x7fc0 : rounded >> 16;
}

static float half_at(const uint8_t *from) {
    uint16_t half;
    memcpy(&half, from, sizeof half);
    return of_half(half);
}

/* ---- formats: `count` values, whole blocks of them --------------------------------------------------------------- */

static void float32(const uint8_t *from, float *to, int64_t count) { memcpy(to, from, count * sizeof *to); }

static void bfloat16(const uint8_t *from, float *to, int64_t count) {
    uint16_t values[CHUNK];
    memcpy(values, from, count * sizeof *values);
    for (int64_t i = 0; i < count; i++)
        to[i] = as_float((uint32_t)values[i] << 16);
}

static void float16(const uint8_t *from, float *to, int64_t count) {
    uint16_t values[CHUNK];
    memcpy(values, from, count * sizeof *values);
    for (int64_t i = 0; i < count; i++)
        to[i] = of_half(values[i]);
}

static void q4_0(const uint8_t *from, float *to, int64_t count) {
    for (; count > 0; count -= 32, from += 18, to += 32) {
        const float scale = half_at(from);
        for (int i = 0; i < 16; i++) {
            to[i] = scale * (float)((from[2 + i] & 15) - 8);
            to[16 + i] = scale * (float)((from[2 + i] >> 4) - 8);
        }
    }
}

static void q4_1(const uint8_t *from, float *to, int64_t count) {
    for (; count > 0; count -= 32, from += 20, to += 32) {
        const float scale = half_at(from), least = half_at(from + 2);
        for (int i = 0; i < 16; i++) {
            to[i] = scale * (float)(from[4 + i] & 15) + least;
            to[16 + i] = scale * (float)(from[4 + i] >> 4) + least;
        }
    }
}

/* Value i of a block with 5 bits: 4 in `low`, the fifth in bit i of `high`. */
static inline int five_bits(const uint8_t *low, uint32_t high, int i) {
    return (i < 16 ? low[i] & 15 : low[i - 16] >> 4) | (high >> i & 1) << 4;
}

static void q5_0(const uint8_t *from, float *to, int64_t count) {
    for (; count > 0; count -= 32, from += 22, to += 32) {
        const float scale = half_at(from);
        uint32_t high;
        memcpy(&high, from + 2, sizeof high);
        for (int i = 0; i < 32; i++)
            to[i] = scale * (float)(five_bits(from + 6, high, i) - 16);
    }
}

static void q5_1(const uint8_t *from, float *to, int64_t count) {
    for (; count > 0; count -= 32, from += 24, to += 32) {
        const float scale = half_at(from), least = half_at(from + 2);
        uint32_t high;
        memcpy(&high, from + 4, sizeof high);
        for (int i = 0; i < 32; i++)
            to[i] = scale * (float)five_bits(from + 8, high, i) + least;
    }
}

static void q8_0(const uint8_t *from, float *to, int64_t count) {
    for (; count > 0; count -= 32, from += 34, to += 32) {
        const float scale = half_at(from);
        for (int i = 0; i < 32; i++)
            to[i] = (float)(int8_t)from[2 + i] * scale;
    }
}

/* Eight groups of 32: scales and minima of 6 bits, the upper two bits of the last four of each beside the first four.
   */
static void q4_k(const uint8_t *from, float *to, int64_t count) {
    for (; count > 0; count -= 256, from += 144) {
        const float scale = half_at(from), least = half_at(from + 2);
        const uint8_t *packed = from + 4, *values = from + 16;
        for (int group = 0; group < 8; group++, to += 32) {
            const int i = group % 4, last = group >= 4, both = packed[8 + i];
            const int factor = last ? (both & 15) | (packed[i] >> 2 & 48) : packed[i] & 63;
            const int offset = last ? both >> 4 | (packed[4 + i] >> 2 & 48) : packed[4 + i] & 63;
            const float step = scale * (float)factor, base = least * (float)offset;
            const uint8_t *at = values + group / 2 * 32;
            const int shift = group % 2 * 4;
            for (int j = 0; j < 32; j++)
                to[j] = step * (float)(at[j] >> shift & 15) - base;
        }
    }
}

/* Eight groups of 32, each of two with a scale: 4 bits of a value in `low`, two in `high`. */
static void q6_k(const uint8_t *from, float *to, int64_t count) {
    for (; count > 0; count -= 256, from += 210) {
        const int8_t *scales = (const int8_t *)from + 192;
        const float scale = half_at(from + 208);
        for (int group = 0; group < 8; group++, to += 32) {
            const uint8_t *low = from + group / 4 * 64 + group % 2 * 32, *high = from + 128 + group / 4 * 32;
            const int shift = group % 4 / 2 * 4, upper = group % 4 * 2;
            for (int half = 0; half < 2; half++) {
                const float step = scale * (float)scales[2 * group + half];
                for (int j = 16 * half; j < 16 * half + 16; j++)
                    to[j] = step * (float)(((low[j] >> shift & 15) | (high[j] >> upper & 3) << 4) - 32);
            }
        }
    }
}

typedef struct {
    const char *name;
    int64_t size, nbytes; /* of a block */
    void (*decode)(const uint8_t *from, float *to, int64_t count);
} Format;

static const Format formats[] = {
    {"float32", 1, 4, float32}, {"bfloat16", 1, 2, bfloat16}, {"float16", 1, 2, float16}, {"q4_0", 32, 18, q4_0},
    {"q4_1", 32, 20, q4_1},     {"q5_0", 32, 22, q5_0},       {"q5_1", 32, 24, q5_1},     {"q8_0", 32, 34, q8_0},
    {"q4_k", 256, 144, q4_k},   {"q6_k", 256, 210, q6_k},
};

/* ---- rows and panels --------------------------------------------------------------------------------------------- */

/* `count` values, which begin with a block, as bfloat16 or float; what is stored so is not touched. */
static void decode(const Format *format, const uint8_t *from, void *to, int64_t count, int narrow) {
    if (format->decode == (narrow ? bfloat16 : float32)) {
        memcpy(to, from, count * format->nbytes);
        return;
    }
    if (!narrow) {
        format->decode(from, to, count);
        return;
    }
    float values[CHUNK];
    uint16_t *out = to;
    format->decode(from, values, count);
    for (int64_t i = 0; i < count; i++)
        out[i] = to_bfloat16(values[i]);
}

/* Rows [rows, columns] of `nbytes` bytes, each `stride` bytes after the one before, stored as `name` says, to rows
   `first` and on of `to`: [.., columns], or with `panels` [.., words, 32], where a word is a float or two bfloat16 of a
   row. Returns whether there is a format in which such rows have so many bytes; what lies beyond the last column of a
   row is zero, other rows are left as they are. */
EXPORT int lineshaft_unpack(const char *name, const uint8_t *from, int64_t nbytes, int64_t stride, int64_t rows,
                            int64_t columns, void *to, int64_t first, int panels, int narrow) {
    const Format *format = formats, *end = formats + sizeof formats / sizeof *formats;
    while (format < end && strcmp(format->name, name))
        format++;
    if (format == end || columns % format->size || columns / format->size * format->nbytes != nbytes)
        return 0;
    const int64_t itemsize = narrow ? 2 : 4, width = (columns * itemsize + 3) / 4;
    uint32_t words[LANES][CHUNK];
    for (int64_t row = 0, count; row < rows; row += count) {
        const int64_t lane = (first + row) % LANES, left = rows - row;
        count = left < LANES - lane ? left : LANES - lane;
        for (int64_t column = 0; column < columns; column += CHUNK) {
            const int64_t values = columns - column < CHUNK ? columns - column : CHUNK;
            const uint8_t *block = from + row * stride + column / format->size * format->nbytes;
            if (!panels) {
                for (int64_t i = 0; i < count; i++)
                    decode(format, block + i * stride, (char *)to + ((first + row + i) * columns + column) * itemsize,
                           values, narrow);
                continue;
            }
            const int64_t whole = (values * itemsize + 3) / 4;
            for (int64_t i = 0; i < count; i++) {
                words[i][whole - 1] = 0;
                decode(format, block + i * stride, words[i], values, narrow);
            }
            uint32_t *out = (uint32_t *)to + ((first + row) / LANES * width + column * itemsize / 4) * LANES + lane;
            for (int64_t word = 0; word < whole; word++, out += LANES)
                for (int64_t i = 0; i < count; i++)
                    out[i] = words[i][word];
        }
    }
    return 1;
}
