/* The kernels, compiled once a level; the build defines LEVEL and the level's -march. */

#define PASTE_(level, f) lineshaft_##level##_##f
#define PASTE(level, f) PASTE_(level, f)
#define NAME(f) PASTE(LEVEL, f)
#define EXPORT __attribute__((visibility("default")))

EXPORT int NAME(ping)(void) { return 1; }
