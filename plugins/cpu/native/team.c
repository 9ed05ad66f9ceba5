/* A team of threads that replays tapes. Whoever calls is its first member and is never pinned; the others wait for the
   next tape as they wait for each other between steps: they spin for some microseconds, then sleep in the kernel, so that
   a thread which the system has interrupted finds a processor to go on. Items are handed out one by one: a member that
   comes late takes fewer. */
#define _GNU_SOURCE
#include "team.h"

#include <limits.h>
#include <linux/futex.h>
#include <pthread.h>
#include <stdatomic.h>
#include <stdlib.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

#define EXPORT __attribute__((visibility("default")))
#define LINE 128 /* bytes that processors fetch together */

typedef struct {
    _Alignas(LINE) _Atomic uint32_t epoch; /* counts meetings; sleepers wait for it to change */
    _Alignas(LINE) _Atomic uint32_t arrived;
    _Atomic uint32_t sleepers;
    _Alignas(LINE) _Atomic int64_t next; /* the next item of the step */
    _Alignas(LINE) uint32_t members;
    uint32_t forks; /* that this process was the child of, when the team began */
    int64_t spin_ns;
    int stop;
    const lineshaft_step *steps; /* the tape under way */
    int64_t count;
    char *scratch;
    int64_t scratch_bytes; /* of each member */
    pthread_t threads[];
} Team;

typedef struct {
    Team *team;
    uint32_t index;
} Member;

static _Atomic uint32_t forks;

static void count_fork(void) { atomic_fetch_add(&forks, 1); }

static void listen_for_forks(void) { pthread_atfork(NULL, NULL, count_fork); }

static int64_t now_ns(void) {
    struct timespec time;
    clock_gettime(CLOCK_MONOTONIC, &time);
    return (int64_t)time.tv_sec * 1000000000 + time.tv_nsec;
}

static void pause_briefly(void) {
#if defined(__x86_64__)
    __builtin_ia32_pause();
#elif defined(__aarch64__)
    __asm__ volatile("yield");
#endif
}

static void await(Team *team, uint32_t epoch) {
    const int64_t deadline = now_ns() + team->spin_ns;
    do {
        for (int i = 0; i < 32; i++) {
            if (atomic_load_explicit(&team->epoch, memory_order_acquire) != epoch)
                return;
            pause_briefly();
        }
    } while (now_ns() < deadline);
    atomic_fetch_add(&team->sleepers, 1);
    while (atomic_load(&team->epoch) == epoch)
        syscall(SYS_futex, &team->epoch, FUTEX_WAIT_PRIVATE, epoch, NULL, NULL, 0);
    atomic_fetch_sub(&team->sleepers, 1);
}

/* Wait until every member is here. The last one makes the counters ready for the next step. */
static void meet(Team *team) {
    const uint32_t epoch = atomic_load_explicit(&team->epoch, memory_order_acquire);
    if (atomic_fetch_add_explicit(&team->arrived, 1, memory_order_acq_rel) + 1 < team->members) {
        await(team, epoch);
        return;
    }
    atomic_store_explicit(&team->arrived, 0, memory_order_relaxed);
    atomic_store_explicit(&team->next, 0, memory_order_relaxed);
    atomic_store(&team->epoch, epoch + 1);
    if (atomic_load(&team->sleepers))
        syscall(SYS_futex, &team->epoch, FUTEX_WAKE_PRIVATE, INT_MAX, NULL, NULL, 0);
}

/* What a tape is has to be read before the first meeting: after the last one, the caller may bring the next. */
static void play(Team *team, uint32_t member) {
    char *scratch = team->scratch + member * team->scratch_bytes;
    const lineshaft_step *step = team->steps, *const end = step + team->count;
    for (; step < end; step++) {
        const int64_t items = step->items(step->job);
        int64_t item;
        while ((item = atomic_fetch_add_explicit(&team->next, 1, memory_order_relaxed)) < items)
            step->body(step->job, item, scratch);
        meet(team);
    }
}

static void *live(void *argument) {
    const Member member = *(Member *)argument;
    free(argument);
    for (;;) {
        meet(member.team);
        if (member.team->stop)
            return NULL;
        play(member.team, member.index);
    }
}

/* End a team of which `begun` members run, the caller among them. */
static void end(Team *team, uint32_t begun) {
    team->stop = 1;
    meet(team);
    for (uint32_t i = 1; i < begun; i++)
        pthread_join(team->threads[i], NULL);
    free(team);
}

/* A team of so many threads, the caller's among them, each of which spins for `spin_ns` before it sleeps; NULL if the
   system gives no memory or not all of the threads. */
EXPORT void *lineshaft_team_start(int threads, int64_t spin_ns) {
    static pthread_once_t once = PTHREAD_ONCE_INIT;
    pthread_once(&once, listen_for_forks);
    const size_t bytes = sizeof(Team) + threads * sizeof(pthread_t);
    Team *team = aligned_alloc(LINE, (bytes + LINE - 1) / LINE * LINE);
    if (!team)
        return NULL;
    *team = (Team){.forks = atomic_load(&forks), .spin_ns = spin_ns, .members = threads};
    for (int i = 1; i < threads; i++) {
        Member *member = malloc(sizeof *member);
        if (member)
            *member = (Member){team, i};
        if (!member || pthread_create(team->threads + i, NULL, live, member)) {
            free(member);
            /* Those that run wait for `threads` members: stand in for the ones that never began. */
            team->stop = 1;
            atomic_fetch_add(&team->arrived, threads - i);
            end(team, i);
            return NULL;
        }
    }
    return team;
}

/* End the threads and free the team. In a child of the process that began it there are no threads to end. */
EXPORT void lineshaft_team_stop(void *argument) {
    Team *team = argument;
    if (team->forks != atomic_load(&forks))
        free(team);
    else
        end(team, team->members);
}

/* Run a tape. `scratch` has `scratch_bytes` for each member. In a child of the process that began the team, which has none
   of its threads, the caller runs everything alone. */
EXPORT void lineshaft_replay(void *argument, const lineshaft_step *steps, int64_t count, char *scratch,
                             int64_t scratch_bytes) {
    Team *team = argument;
    if (count == 0)
        return;
    if (team->forks != atomic_load(&forks)) {
        for (int64_t i = 0; i < count; i++) {
            const int64_t items = steps[i].items(steps[i].job);
            for (int64_t item = 0; item < items; item++)
                steps[i].body(steps[i].job, item, scratch);
        }
        return;
    }
    team->steps = steps, team->count = count, team->scratch = scratch, team->scratch_bytes = scratch_bytes;
    meet(team);
    play(team, 0);
}
