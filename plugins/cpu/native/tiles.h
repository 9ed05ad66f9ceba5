/* The dozen primitives of matrix tiles that kernels are written in: the processor's own (AMX), or the same in plain C
   (LINESHAFT_EMULATE_TILES), by which their logic runs on any machine. A tile has up to 16 rows of up to 64 bytes. */
#ifndef LINESHAFT_TILES_H
#define LINESHAFT_TILES_H

#include <stdint.h>
#include <string.h>

#if defined(__AMX_TILE__) && defined(__AMX_BF16__) && defined(__AMX_INT8__)
#define TILES 1
#include <immintrin.h>

typedef struct {
    uint8_t palette, start, reserved[14];
    uint16_t columns[16]; /* bytes of a row */
    uint8_t rows[16];
} __attribute__((packed, aligned(64))) Tiles;

#define tiles_begin(t) (*(t) = (Tiles){.palette = 1})
#define tile_shape(t, i, height, bytes) ((t)->rows[i] = (uint8_t)(height), (t)->columns[i] = (uint16_t)(bytes))
#define tiles_ready(t) _tile_loadconfig(t)
#define tiles_end(t) _tile_release()
#define tile_zero(t, i) _tile_zero(i)
#define tile_load(t, i, from, stride) _tile_loadd(i, from, stride)
#define tile_stream(t, i, from, stride) _tile_stream_loadd(i, from, stride)
#define tile_store(t, i, to, stride) _tile_stored(i, to, stride)
#define tile_bf16(t, c, a, b) _tile_dpbf16ps(c, a, b) /* c f32[m][n] += a bf16[m][2k] b bf16[k][n][2] */
#define tile_int8(t, c, a, b) _tile_dpbssd(c, a, b)   /* c int32[m][n] += a int8[m][4k] b int8[k][n][4] */

#elif defined(LINESHAFT_EMULATE_TILES)
#define TILES 1

typedef struct {
    int rows[8], bytes[8];
    _Alignas(64) uint8_t data[8][16][64];
} Tiles;

static inline void tiles_begin(Tiles *t) { memset(t, 0, sizeof *t); }
static inline void tile_shape(Tiles *t, int i, int64_t rows, int64_t bytes) { t->rows[i] = rows, t->bytes[i] = bytes; }
static inline void tiles_ready(Tiles *t) { (void)t; }
static inline void tiles_end(Tiles *t) { (void)t; }
static inline void tile_zero(Tiles *t, int i) { memset(t->data[i], 0, sizeof t->data[i]); }

static inline void tile_load(Tiles *t, int i, const void *from, int64_t stride) {
    for (int row = 0; row < t->rows[i]; row++)
        memcpy(t->data[i][row], (const char *)from + row * stride, t->bytes[i]);
}

#define tile_stream tile_load

static inline void tile_store(const Tiles *t, int i, void *to, int64_t stride) {
    for (int row = 0; row < t->rows[i]; row++)
        memcpy((char *)to + row * stride, t->data[i][row], t->bytes[i]);
}

static inline float tile_number(const uint8_t *from) {
    uint16_t half;
    memcpy(&half, from, sizeof half);
    const uint32_t bits = (uint32_t)half << 16;
    float value;
    memcpy(&value, &bits, sizeof value);
    return value;
}

static inline void tile_bf16(Tiles *t, int c, int a, int b) {
    for (int m = 0; m < t->rows[c]; m++)
        for (int n = 0; n < t->bytes[c] / 4; n++) {
            float sum;
            memcpy(&sum, t->data[c][m] + 4 * n, sizeof sum);
            for (int k = 0; k < t->bytes[a] / 4; k++)
                for (int half = 0; half < 4; half += 2)
                    sum += tile_number(t->data[a][m] + 4 * k + half) * tile_number(t->data[b][k] + 4 * n + half);
            memcpy(t->data[c][m] + 4 * n, &sum, sizeof sum);
        }
}

static inline void tile_int8(Tiles *t, int c, int a, int b) {
    for (int m = 0; m < t->rows[c]; m++)
        for (int n = 0; n < t->bytes[c] / 4; n++) {
            int32_t sum;
            memcpy(&sum, t->data[c][m] + 4 * n, sizeof sum);
            for (int k = 0; k < t->bytes[a]; k++)
                sum += (int8_t)t->data[a][m][k] * (int8_t)t->data[b][k / 4][4 * n + k % 4];
            memcpy(t->data[c][m] + 4 * n, &sum, sizeof sum);
        }
}
#endif

#endif
