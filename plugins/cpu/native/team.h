/* The threads that share a kernel's work. They are the team of the OpenMP library that the process already runs, so that
   no two teams compete for the processor. */
#ifndef LINESHAFT_TEAM_H
#define LINESHAFT_TEAM_H

#include <stdint.h>

typedef void (*lineshaft_body)(const void *job, int64_t item);

/* Run body(job, i) for each i below `items`, in any order, on at most `threads` threads. */
void lineshaft_run(lineshaft_body body, const void *job, int64_t items, int threads);

#endif
