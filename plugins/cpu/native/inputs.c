/* What the inputs of a step must keep to, looked at by one call before any kernel reads them. */
#include <stdint.h>

#define EXPORT __attribute__((visibility("default")))

typedef struct {
    int64_t offset, count, limit; /* int32 at a byte of the inputs, each of which is from 0 to below `limit` */
    int64_t padded;               /* whether those of padding tokens are left out */
} Bound;

typedef struct {
    int64_t starts; /* the byte of query_starts int32 [rows + 1]; below 0: there are none, and no padding */
    int64_t rows, tokens, longest;
    int64_t count;
    const Bound *bounds;
} Inputs;

enum { HELD = -1, DISORDERED = -2, TOO_LONG = -3 };

/* The largest of some int32, a negative one being larger than all others. */
static uint32_t largest(const uint32_t *values, int64_t count) {
    uint32_t found = 0;
    for (int64_t i = 0; i < count; i++)
        found = values[i] > found ? values[i] : found;
    return found;
}

static int64_t check_starts(const Inputs *inputs, const int32_t *starts) {
    int64_t longest = 0;
    if (starts[0] != 0 || starts[inputs->rows] > inputs->tokens)
        return DISORDERED;
    for (int64_t row = 0; row < inputs->rows; row++) {
        const int64_t length = (int64_t)starts[row + 1] - starts[row];
        if (length < 0)
            return DISORDERED;
        longest = length > longest ? length : longest;
    }
    return longest > inputs->longest ? TOO_LONG : HELD;
}

/* Which bound the inputs `step` break first: HELD if none, DISORDERED if query_starts descend or end after the tokens,
   TOO_LONG if they hold a row of more than `longest` tokens. */
EXPORT int64_t lineshaft_broken(const char *step, const Inputs *inputs) {
    const int32_t *starts = (const int32_t *)(step + inputs->starts);
    const int64_t found = inputs->starts < 0 ? HELD : check_starts(inputs, starts);
    if (found != HELD)
        return found;
    for (int64_t i = 0; i < inputs->count; i++) {
        const Bound bound = inputs->bounds[i];
        const int64_t count = bound.padded && inputs->starts >= 0 ? starts[inputs->rows] : bound.count;
        if (largest((const uint32_t *)(step + bound.offset), count) >= bound.limit)
            return i;
    }
    return HELD;
}
