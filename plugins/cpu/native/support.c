/* What the levels share: which of them this processor runs, and the team of threads. Compiled without any flag of an
   instruction set. */
#define _GNU_SOURCE /* syscall */
#include "team.h"

#include <string.h>

#define EXPORT __attribute__((visibility("default")))

/* The levels that were compiled, separated by spaces; the build defines LEVELS. */
EXPORT const char *lineshaft_levels(void) { return LEVELS; }

#if defined(__x86_64__)
#include <cpuid.h>

#include <sys/syscall.h>
#include <unistd.h>

#define ARCH_REQ_XCOMP_PERM 0x1023
#define XFEATURE_XTILEDATA 18
#define TILE_STATE (3u << 17) /* of XCR0: tile configuration and data */
#define LZCNT (1u << 5) /* of leaf 0x80000001, ecx: compilers name it in different ways */

/* -march=x86-64-v3. What older compilers cannot ask the builtin for is read from cpuid. */
static int avx2(void)
{
    unsigned eax, ebx, ecx, edx, extended;
    if (!__get_cpuid(1, &eax, &ebx, &ecx, &edx) || !__get_cpuid(0x80000001, &eax, &ebx, &extended, &edx))
        return 0;
    return (ecx & bit_F16C) && (ecx & bit_MOVBE) && (extended & LZCNT)
        && __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("bmi")
        && __builtin_cpu_supports("bmi2") && __builtin_cpu_supports("popcnt");
}

/* -march=x86-64-v4 */
static int avx512(void)
{
    return avx2() && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw")
        && __builtin_cpu_supports("avx512cd") && __builtin_cpu_supports("avx512dq")
        && __builtin_cpu_supports("avx512vl");
}

/* -march=x86-64-v4 with AVX512_BF16 and AVX512_VNNI */
static int avx512_bf16(void)
{
    unsigned eax, ebx, ecx, edx;
    return avx512() && __builtin_cpu_supports("avx512vnni")
        && __get_cpuid_count(7, 1, &eax, &ebx, &ecx, &edx) && (eax & (1u << 5));
}

/* AMX with bfloat16 and int8: the processor has it, the system keeps its registers, and this process may use them.
   Linux gives the permission once it is asked, to all threads. */
static int amx(void)
{
    unsigned eax, ebx, ecx, edx, low, high;
    const unsigned wanted = 1u << 22 | 1u << 24 | 1u << 25; /* AMX-BF16, AMX-TILE, AMX-INT8 */
    if (!avx512_bf16() || !__get_cpuid_count(7, 0, &eax, &ebx, &ecx, &edx) || (edx & wanted) != wanted)
        return 0;
    if (!__get_cpuid(1, &eax, &ebx, &ecx, &edx) || !(ecx & bit_OSXSAVE))
        return 0;
    __asm__ volatile("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
    if ((low & TILE_STATE) != TILE_STATE)
        return 0;
    return !syscall(SYS_arch_prctl, ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA);
}
#endif

/* 1 if this processor and its system run the code of `level`, else 0. */
EXPORT int lineshaft_supports(const char *level)
{
#if defined(__x86_64__)
    __builtin_cpu_init();
    if (!strcmp(level, "amx"))
        return amx();
    if (!strcmp(level, "avx512_bf16"))
        return avx512_bf16();
    if (!strcmp(level, "avx512"))
        return avx512();
    if (!strcmp(level, "avx2"))
        return avx2();
#endif
    return !strcmp(level, "portable") || !strcmp(level, "amx_emulated");
}

/* GOMP_parallel(body, argument, threads, flags): runs body(argument) on every thread of a team. */
typedef void (*Parallel)(void (*)(void *), void *, unsigned, unsigned);

static Parallel parallel;

/* Share work through this GOMP_parallel; NULL: run everything on the calling thread. */
EXPORT void lineshaft_use_team(void *gomp_parallel) { parallel = (Parallel)gomp_parallel; }

typedef struct {
    lineshaft_body body;
    const void *job;
    int64_t items, next;
} Shared;

static void take_items(void *argument) {
    Shared *shared = argument;
    int64_t item;
    while ((item = __atomic_fetch_add(&shared->next, 1, __ATOMIC_RELAXED)) < shared->items)
        shared->body(shared->job, item, NULL);
}

void lineshaft_run(lineshaft_body body, const void *job, int64_t items, int threads) {
    if (threads > 1 && items > 1 && parallel) {
        Shared shared = {body, job, items, 0};
        parallel(take_items, &shared, (unsigned)(items < threads ? items : threads), 0);
        return;
    }
    for (int64_t item = 0; item < items; item++)
        body(job, item, NULL);
}
