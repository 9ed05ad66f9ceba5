/* Work that threads share: bodies run for items, and tapes of steps that a team of threads replays. */
#ifndef LINESHAFT_TEAM_H
#define LINESHAFT_TEAM_H

#include <stdint.h>

/* Work on one item. `scratch` is memory of the thread's own, as much as the tape asked for, behind a head. */
typedef void (*lineshaft_body)(const void *job, int64_t item, void *scratch);

/* How many items a job has now: it may read lengths from the step's inputs, and is called once by each thread. */
typedef int64_t (*lineshaft_count)(const void *job);

/* One step of a tape. All its items are done before the next step begins. */
typedef struct {
    lineshaft_body body;
    lineshaft_count items;
    const void *job;
} lineshaft_step;

/* What lies in front of a thread's scratch: 0 when it begins a step, after that what the step's items leave there. */
#define LINESHAFT_HEAD 128

static inline int64_t *lineshaft_head(void *scratch) { return (int64_t *)((char *)scratch - LINESHAFT_HEAD); }

/* Run body(job, i, NULL) for each i below `items`, in any order, on at most `threads` threads of the OpenMP library
   that the process already runs, so that no two teams compete for the processor. */
void lineshaft_run(lineshaft_body body, const void *job, int64_t items, int threads);

#endif
