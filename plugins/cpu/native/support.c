/* What the levels share: which of them this processor runs, and the team of threads. Compiled without any flag of an
   instruction set. */
#include "team.h"

#include <string.h>

#define EXPORT __attribute__((visibility("default")))

/* The levels that were compiled, separated by spaces; the build defines LEVELS. */
EXPORT const char *lineshaft_levels(void) { return LEVELS; }

#if defined(__x86_64__)
#include <cpuid.h>

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
#endif

/* 1 if this processor and its system run the code of `level`, else 0. */
EXPORT int lineshaft_supports(const char *level)
{
#if defined(__x86_64__)
    __builtin_cpu_init();
    if (!strcmp(level, "avx512"))
        return avx512();
    if (!strcmp(level, "avx2"))
        return avx2();
#endif
    return !strcmp(level, "portable");
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
        shared->body(shared->job, item);
}

void lineshaft_run(lineshaft_body body, const void *job, int64_t items, int threads) {
    if (threads > 1 && items > 1 && parallel) {
        Shared shared = {body, job, items, 0};
        parallel(take_items, &shared, (unsigned)(items < threads ? items : threads), 0);
        return;
    }
    for (int64_t item = 0; item < items; item++)
        body(job, item);
}
