/* What the processor could do at best, measured: reading memory, and multiplying and adding in registers. Compiled once
   per instruction set level. Its threads are its own, so that no figure depends on the team that kernels share. */
#include <pthread.h>
#include <sched.h>
#include <stdint.h>
#include <string.h>
#include <time.h>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

#define PASTE(level, name) lineshaft_##level##_##name
#define EXPAND(level, name) PASTE(level, name)
#define NAME(name) EXPAND(LEVEL, name)
#define EXPORT __attribute__((visibility("default")))

#define MOST_THREADS 1024
#define CHAINS 10 /* sums that wait for none: enough for the longest latency, few enough for 16 registers */
#define ROUNDS 1000 /* of all chains between two looks at the clock */

/* BYTES make a vector as wide as the level's registers. */
#if defined(__AVX512F__)
#define BYTES 64
#elif defined(__AVX2__)
#define BYTES 32
#else
#define BYTES 16
#endif
typedef uint64_t words __attribute__((vector_size(BYTES)));
typedef float floats __attribute__((vector_size(BYTES)));
typedef int16_t shorts __attribute__((vector_size(BYTES)));

/* Tells the compiler that a register may have changed, so that no work on it leaves its loop. */
#if defined(__x86_64__)
#define CHANGED(x) __asm__ volatile("" : "+v"(x))
#elif defined(__aarch64__)
#define CHANGED(x) __asm__ volatile("" : "+w"(x))
#else
#define CHANGED(x) __asm__ volatile("" : "+m"(x))
#endif

static double now(void) {
    struct timespec at;
    clock_gettime(CLOCK_MONOTONIC, &at);
    return (double)at.tv_sec + 1e-9 * (double)at.tv_nsec;
}

/* ---- threads that begin together -------------------------------------------------------------------------------- */

enum { WAIT, GO, LEAVE };

typedef struct Gang {
    double (*body)(const void *job, int number);
    const void *job;
    int ready, state;
} Gang;

typedef struct {
    Gang *gang;
    pthread_t id;
    int number;
    double result; /* what body(job, number) gave */
} Member;

static void *take_part(void *argument) {
    Member *member = argument;
    Gang *gang = member->gang;
    int state;
    __atomic_add_fetch(&gang->ready, 1, __ATOMIC_ACQ_REL);
    while ((state = __atomic_load_n(&gang->state, __ATOMIC_ACQUIRE)) == WAIT)
        sched_yield();
    if (state == GO)
        member->result = gang->body(gang->job, member->number);
    return NULL;
}

/* Run body(job, number) on each of `threads` threads, the caller's among them, which begin together. Returns the sum of
   what it gave and puts the seconds until the last was done at `seconds`; -1 where so many threads cannot be had. */
static double run_together(double (*body)(const void *, int), const void *job, int threads, double *seconds) {
    Gang gang = {body, job, 0, WAIT};
    Member members[MOST_THREADS];
    int made = 1;
    if (threads < 1 || threads > MOST_THREADS)
        return -1;
    for (; made < threads; made++) {
        members[made] = (Member){&gang, 0, made, 0};
        if (pthread_create(&members[made].id, NULL, take_part, &members[made]))
            break;
    }
    while (__atomic_load_n(&gang.ready, __ATOMIC_ACQUIRE) < made - 1)
        sched_yield();
    const double began = now();
    __atomic_store_n(&gang.state, made == threads ? GO : LEAVE, __ATOMIC_RELEASE);
    double total = made == threads ? body(job, 0) : -1;
    for (int i = 1; i < made; i++) {
        pthread_join(members[i].id, NULL);
        total += members[i].result;
    }
    *seconds = now() - began;
    return made == threads ? total : -1;
}

/* ---- reading ---------------------------------------------------------------------------------------------------- */

typedef struct {
    const char *from;
    int64_t bytes;
    int threads;
} Read;

#define LINE (8 * BYTES) /* bytes of one turn of the loop */

static double read_part(const void *job, int number) {
    const Read *r = job;
    const int64_t lines = r->bytes / LINE;
    const char *at = r->from + lines * number / r->threads * LINE;
    const char *end = r->from + lines * (number + 1) / r->threads * LINE;
    words sums[8] = {{0}};
    for (; at < end; at += LINE) {
        for (int i = 0; i < 8; i++) {
            words value;
            memcpy(&value, at + i * BYTES, BYTES);
            sums[i] |= value;
        }
    }
    for (int i = 0; i < 8; i++)
        CHANGED(sums[i]);
    return 0;
}

/* Read `bytes` bytes once, each thread a contiguous part of its own; the seconds, or -1 for too many threads. */
EXPORT void NAME(bound_read)(const void *from, int64_t bytes, int threads, double *seconds) {
    const Read job = {from, bytes, threads};
    if (run_together(read_part, &job, threads, seconds) < 0)
        *seconds = -1;
}

/* ---- arithmetic ------------------------------------------------------------------------------------------------- */

enum { FLOAT32, BFLOAT16, INT8, KINDS };

/* Each of these does ROUNDS turns and returns how many operations they were: a multiplication and an addition are two.
   The name of a step's instructions stands beside it. */

#if defined(__FMA__) || defined(__aarch64__)
#define FLOAT32_HOW "float32 FMA"
#else
#define FLOAT32_HOW "float32 multiply, add"
#endif

static double in_float32(void) {
    floats sums[CHAINS] = {{0}}, x = {0.5f}, y = {1.0f};
    CHANGED(x);
    CHANGED(y);
    for (int round = 0; round < ROUNDS; round++) {
        for (int i = 0; i < CHAINS; i++)
            sums[i] = sums[i] * x + y;
    }
    for (int i = 0; i < CHAINS; i++)
        CHANGED(sums[i]);
    return 2.0 * ROUNDS * CHAINS * (BYTES / 4);
}

#if defined(__AMX_TILE__)
#define TILE_ROWS 16
#define TILE_BYTES 1024 /* 16 rows of 64 bytes */

typedef struct {
    uint8_t palette, start_row, reserved[14];
    uint16_t row_bytes[16];
    uint8_t rows[16];
} TileConfig;

/* Four tiles of sums (0 to 3), two of each factor (4 and 5, 6 and 7), all filled with the byte `fill`. */
static void set_tiles(int fill) {
    TileConfig config = {.palette = 1};
    char data[TILE_BYTES];
    for (int i = 0; i < 8; i++) {
        config.row_bytes[i] = 64;
        config.rows[i] = TILE_ROWS;
    }
    memset(data, fill, sizeof data);
    __asm__ volatile("" ::"r"(&config), "r"(data) : "memory"); /* the intrinsics do not say what they read */
    _tile_loadconfig(&config);
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
    _tile_loadd(4, data, 64);
    _tile_loadd(5, data, 64);
    _tile_loadd(6, data, 64);
    _tile_loadd(7, data, 64);
}

#define ON_TILES(multiply) \
    for (int round = 0; round < ROUNDS; round++) { \
        multiply(0, 4, 6); \
        multiply(1, 4, 7); \
        multiply(2, 5, 6); \
        multiply(3, 5, 7); \
    } \
    _tile_release()
#endif

#if defined(__AMX_BF16__)
#define BFLOAT16_HOW "AMX TDPBF16PS"
static double in_bfloat16(void) {
    set_tiles(0x3d); /* 0x3d3d is 0.046 */
    ON_TILES(_tile_dpbf16ps);
    return 2.0 * ROUNDS * 4 * TILE_ROWS * 16 * 32;
}
#elif defined(__AVX512BF16__)
#define BFLOAT16_HOW "VDPBF16PS"
static double in_bfloat16(void) {
    floats sums[CHAINS] = {{0}}, x = {0.5f};
    CHANGED(x);
    for (int round = 0; round < ROUNDS; round++) {
        for (int i = 0; i < CHAINS; i++)
            sums[i] = (floats)_mm512_dpbf16_ps((__m512)sums[i], (__m512bh)x, (__m512bh)x);
    }
    for (int i = 0; i < CHAINS; i++)
        CHANGED(sums[i]);
    return 2.0 * ROUNDS * CHAINS * 32;
}
#else
#define BFLOAT16_HOW FLOAT32_HOW
#define in_bfloat16 in_float32
#endif

#if defined(__AMX_INT8__)
#define INT8_HOW "AMX TDPBSSD"
static double in_int8(void) {
    set_tiles(1);
    ON_TILES(_tile_dpbssd);
    return 2.0 * ROUNDS * 4 * TILE_ROWS * 16 * 64;
}
#else
#if defined(__AVX512VNNI__)
#define INT8_HOW "VPDPBUSD"
#define INT8_STEP(sum, x) (words)_mm512_dpbusd_epi32((__m512i)(sum), (__m512i)(x), (__m512i)(x))
#define INT8_PRODUCTS BYTES
#elif defined(__AVX512BW__)
#define INT8_HOW "VPMADDUBSW, VPMADDWD"
#define INT8_STEP(sum, x) \
    (words)_mm512_add_epi32((__m512i)(sum), _mm512_madd_epi16( \
        _mm512_maddubs_epi16((__m512i)(x), (__m512i)(x)), _mm512_set1_epi16(1)))
#define INT8_PRODUCTS BYTES
#elif defined(__AVX2__)
#define INT8_HOW "VPMADDUBSW, VPMADDWD"
#define INT8_STEP(sum, x) \
    (words)_mm256_add_epi32((__m256i)(sum), _mm256_madd_epi16( \
        _mm256_maddubs_epi16((__m256i)(x), (__m256i)(x)), _mm256_set1_epi16(1)))
#define INT8_PRODUCTS BYTES
#else
#define INT8_HOW "int16 multiply, add"
#define INT8_STEP(sum, x) (words)((shorts)(sum) + (shorts)(x) * (shorts)(x))
#define INT8_PRODUCTS (BYTES / 2)
#endif

static double in_int8(void) {
    words sums[CHAINS] = {{0}}, x = {0x0101010101010101};
    for (int round = 0; round < ROUNDS; round++) {
        for (int i = 0; i < CHAINS; i++) {
            CHANGED(x);
            sums[i] = INT8_STEP(sums[i], x);
        }
    }
    for (int i = 0; i < CHAINS; i++)
        CHANGED(sums[i]);
    return 2.0 * ROUNDS * CHAINS * INT8_PRODUCTS;
}
#endif

typedef struct {
    double (*turns)(void);
    double seconds;
} Arithmetic;

static double repeat_turns(const void *job, int number) {
    const Arithmetic *a = job;
    const double began = now();
    double done = 0, passed;
    (void)number;
    do {
        done += a->turns();
        passed = now() - began;
    } while (passed < a->seconds);
    return done / passed;
}

/* Operations per second of all threads together in about `seconds`, with one `kind` of number, and at `how` the
   instructions that did them, in at most 31 characters. -1: so many threads cannot be had. A process may use tiles once
   `lineshaft_supports` has said so. */
EXPORT void NAME(bound_arithmetic)(int kind, int threads, double seconds, double *per_second, char *how) {
    static double (*const turns[KINDS])(void) = {in_float32, in_bfloat16, in_int8};
    static const char *const names[KINDS] = {FLOAT32_HOW, BFLOAT16_HOW, INT8_HOW};
    double passed;
    strcpy(how, names[kind]);
    const Arithmetic job = {turns[kind], seconds};
    *per_second = run_together(repeat_turns, &job, threads, &passed);
}
