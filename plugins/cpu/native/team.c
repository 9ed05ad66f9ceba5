/* A team of threads that replays tapes. Whoever submits one goes on with its own work while the threads begin; when it
   waits for the end, it joins them for what is left and is never pinned. Between steps the members meet: those that
   wait spin for some microseconds, then sleep in the kernel, so that a thread which the system has interrupted finds a
   processor to go on. Items are handed out one by one: a member that comes late takes fewer. */
#define _GNU_SOURCE
#include "team.h"

#include <limits.h>
#include <linux/futex.h>
#include <pthread.h>
#include <sched.h>
#include <stdatomic.h>
#include <stdlib.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

#define EXPORT __attribute__((visibility("default")))
#define LINE 128 /* bytes that processors fetch together */

typedef struct {
    /* Counts meetings and the beginnings of tapes. Nothing else changes it, and whoever waits for one of those waits
       for it to change: a member that knows its value now can take no other change for its own. */
    _Alignas(LINE) _Atomic uint32_t epoch;
    _Alignas(LINE) _Atomic uint32_t arrived;
    _Atomic uint32_t sleepers;
    _Atomic uint32_t joining; /* the submitter would like to be a member from the next step on */
    _Atomic uint32_t joined;  /* it is one, from the step `at` and the epoch `turn` on */
    _Atomic uint32_t done;    /* the tape is, from the epoch `turn` on */
    uint32_t turn;
    _Alignas(LINE) _Atomic int64_t next; /* the next item of the step */
    _Alignas(LINE) uint32_t members;     /* who have to come to a meeting */
    uint32_t threads, forks;             /* the team's own; forks of the process when the team began */
    int64_t spin_ns, at, started_ns, ended_ns;
    int stop;
    const lineshaft_step *steps; /* the tape under way */
    int64_t count;
    char *scratch;
    int64_t scratch_bytes; /* of each member, its head among them */
    pthread_t ids[];
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

static void wake(Team *team) {
    atomic_fetch_add(&team->epoch, 1);
    if (atomic_load(&team->sleepers))
        syscall(SYS_futex, &team->epoch, FUTEX_WAKE_PRIVATE, INT_MAX, NULL, NULL, 0);
}

/* Until the epoch is another than `epoch`. */
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

/* Wait until every member is here, before step `step`; returns the epoch then. The last one makes the counters ready
   for it, lets the submitter join, and says so if there is no such step. */
static uint32_t meet(Team *team, int64_t step, int64_t count) {
    /* Read before one arrives: once all have, the next tape may change it. */
    const uint32_t epoch = atomic_load_explicit(&team->epoch, memory_order_acquire), members = team->members;
    if (atomic_fetch_add(&team->arrived, 1) + 1 < members) {
        await(team, epoch);
        return epoch + 1;
    }
    atomic_store(&team->arrived, 0);
    atomic_store(&team->next, 0);
    team->turn = epoch + 1;
    if (step == count) {
        team->ended_ns = now_ns();
        atomic_store(&team->done, 1);
    } else if (atomic_exchange(&team->joining, 0)) {
        team->members++;
        team->at = step;
        atomic_store(&team->joined, 1);
    }
    wake(team);
    return epoch + 1;
}

static char *scratch_of(const Team *team, int64_t member) {
    return team->scratch + member * team->scratch_bytes + LINESHAFT_HEAD;
}

/* Run the items of a step that no other member takes. */
static void work(Team *team, const lineshaft_step *step, char *scratch) {
    const int64_t items = step->items(step->job);
    int64_t item;
    *lineshaft_head(scratch) = 0;
    while ((item = atomic_fetch_add_explicit(&team->next, 1, memory_order_relaxed)) < items)
        step->body(step->job, item, scratch);
}

/* Go through a tape from step `at` on; returns the epoch of its end. What the tape is has to be read before: after the
   last meeting the next one may come. */
static uint32_t play(Team *team, uint32_t member, int64_t at) {
    char *scratch = scratch_of(team, member);
    const lineshaft_step *steps = team->steps;
    uint32_t epoch = 0;
    for (const int64_t count = team->count; at < count; at++) {
        work(team, steps + at, scratch);
        epoch = meet(team, at + 1, count);
    }
    return epoch;
}

static void *live(void *argument) {
    const Member member = *(Member *)argument;
    free(argument);
    for (uint32_t epoch = 0;;) {
        await(member.team, epoch);
        if (member.team->stop)
            return NULL;
        epoch = play(member.team, member.index, 0);
    }
}

static void begin(Team *team) {
    team->members = team->threads;
    atomic_store(&team->joining, 0);
    atomic_store(&team->joined, 0);
    atomic_store(&team->done, 0);
    wake(team);
}

/* End a team of which so many threads run. */
static void end(Team *team, uint32_t running) {
    team->stop = 1;
    begin(team);
    for (uint32_t i = 0; i < running; i++)
        pthread_join(team->ids[i], NULL);
    free(team);
}

/* A team of so many members, the caller among them, each of which spins for `spin_ns` before it sleeps; NULL if the
   system gives no memory or not all of the threads. */
EXPORT void *lineshaft_team_start(int members, int64_t spin_ns) {
    static pthread_once_t once = PTHREAD_ONCE_INIT;
    pthread_once(&once, listen_for_forks);
    const size_t bytes = sizeof(Team) + members * sizeof(pthread_t);
    Team *team = aligned_alloc(LINE, (bytes + LINE - 1) / LINE * LINE);
    if (!team)
        return NULL;
    *team = (Team){.forks = atomic_load(&forks), .spin_ns = spin_ns, .threads = members - 1, .done = 1};
    for (uint32_t i = 0; i < team->threads; i++) {
        Member *member = malloc(sizeof *member);
        if (member)
            *member = (Member){team, i + 1};
        if (!member || pthread_create(team->ids + i, NULL, live, member)) {
            free(member);
            end(team, i);
            return NULL;
        }
    }
    return team;
}

static int alone(const Team *team) { return team->threads == 0 || team->forks != atomic_load(&forks); }

/* Begin a tape; `lineshaft_wait` comes before the next. `scratch` has `scratch_bytes` for each member, LINESHAFT_HEAD
   of them for the head. */
EXPORT void lineshaft_submit(void *argument, const lineshaft_step *steps, int64_t count, char *scratch,
                             int64_t scratch_bytes) {
    Team *team = argument;
    team->steps = steps, team->count = count, team->scratch = scratch, team->scratch_bytes = scratch_bytes;
    team->started_ns = team->ended_ns = now_ns();
    if (count && !alone(team))
        begin(team);
    else
        atomic_store(&team->done, count == 0);
}

/* Help with the tape until it is done, and return how many nanoseconds it took. A team of one, or one whose threads
   stayed behind in another process, runs it here. */
EXPORT int64_t lineshaft_wait(void *argument) {
    Team *team = argument;
    if (alone(team)) {
        for (int64_t i = 0; i < team->count && !atomic_load(&team->done); i++) {
            atomic_store(&team->next, 0);
            work(team, team->steps + i, scratch_of(team, 0));
        }
        if (!atomic_exchange(&team->done, 1))
            team->ended_ns = now_ns();
        return team->ended_ns - team->started_ns;
    }
    atomic_store(&team->joining, 1);
    for (;;) {
        const uint32_t epoch = atomic_load(&team->epoch);
        const int joined = atomic_load(&team->joined), done = atomic_load(&team->done);
        if (!joined && !done) {
            await(team, epoch);
            continue;
        }
        while (atomic_load(&team->epoch) != team->turn) /* whoever said so is about to count this meeting */
            sched_yield();
        if (!done)
            play(team, 0, team->at);
        break;
    }
    return team->ended_ns - team->started_ns;
}

/* Wait for a tape under way, end the threads and free the team. In a child of the process that began it there are
   none. */
EXPORT void lineshaft_team_stop(void *argument) {
    Team *team = argument;
    if (team->forks != atomic_load(&forks)) {
        free(team);
        return;
    }
    lineshaft_wait(team);
    end(team, team->threads);
}
