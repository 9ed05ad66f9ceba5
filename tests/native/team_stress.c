/* Many short tapes on one team: every item runs once, and none before all items of the step before it.

   Each thread finds its head cleared. team_stress THREADS TAPES */
#include "team.h"

#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>

#define MOST 40
#define SCRATCH (2 * LINESHAFT_HEAD) /* of a member */

void *lineshaft_team_start(int members, int64_t spin_ns);
void lineshaft_team_stop(void *team);
void lineshaft_submit(void *team, const lineshaft_step *steps, int64_t count, char *scratch, int64_t scratch_bytes);
int64_t lineshaft_wait(void *team);

typedef struct {
    int64_t number, items;
    _Atomic int64_t done;
} Job;

static Job jobs[MOST];

static void fail(const char *what, int64_t step) {
    fprintf(stderr, "step %ld: %s\n", (long)step, what);
    exit(1);
}

static void body(const void *argument, int64_t item, void *scratch) {
    const int64_t number = ((const Job *)argument)->number;
    int64_t *head = lineshaft_head(scratch);
    if (*head != 0 && *head != number + 1)
        fail("finds in front of its scratch what another step has left", number);
    *head = number + 1;
    if (item >= jobs[number].items)
        fail("an item that there is not", number);
    if (number > 0 && atomic_load(&jobs[number - 1].done) != jobs[number - 1].items)
        fail("begins before the step before it has ended", number);
    atomic_fetch_add(&jobs[number].done, 1);
}

static int64_t items(const void *argument) { return ((const Job *)argument)->items; }

/* Begin a tape, of one step and more; returns how many. */
static int64_t begin(void *team, int64_t tape, lineshaft_step *steps, char *scratch) {
    const int64_t length = 1 + tape % MOST;
    for (int64_t i = 0; i < length; i++) {
        jobs[i].number = i, jobs[i].items = (i * 7 + tape) % 5;
        atomic_store(&jobs[i].done, 0);
        steps[i] = (lineshaft_step){body, items, jobs + i};
    }
    lineshaft_submit(team, steps, length, scratch, SCRATCH);
    return length;
}

static void check(int64_t length) {
    for (int64_t i = 0; i < length; i++)
        if (atomic_load(&jobs[i].done) != jobs[i].items)
            fail("not all items have run", i);
}

int main(int count, char **words) {
    if (count != 3)
        return 2;
    void *team = lineshaft_team_start(atoi(words[1]), 10000);
    lineshaft_step steps[MOST];
    _Alignas(LINESHAFT_HEAD) char scratch[64 * SCRATCH];
    for (int64_t tape = 0; tape < atol(words[2]); tape++) {
        const int64_t length = begin(team, tape, steps, scratch);
        for (volatile int64_t wait = 0; tape % 3 == 0 && wait < tape % 1000; wait++) {
        }
        lineshaft_wait(team);
        if (tape % 5 == 0)
            lineshaft_wait(team); /* again: there is nothing to wait for */
        check(length);
    }
    const int64_t length = begin(team, MOST - 1, steps, scratch);
    lineshaft_team_stop(team);
    check(length);
    return 0;
}
