/* An NVML with GPUs of its own making, for tests: GPUS many of compute capability MAJOR.MINOR, one slice, CUDA driver
 * version CUDA. Signatures as in the NVML API Reference. FAIL is what nvmlInit_v2 returns. */
#include <stdio.h>
#include <string.h>

typedef struct { int number; int slice; } device;
typedef struct { unsigned long long total, free, used; } memory;
static device gpus[16] = {{0}, {1}, {2}, {3}}, slice = {0, 1};

static int put(char *out, unsigned size, const char *text, int number) {
    return snprintf(out, size, text, number) < (int)size ? 0 : 7;
}
int nvmlInit_v2(void) { return FAIL; }
int nvmlShutdown(void) { return 0; }
const char *nvmlErrorString(int status) { return status == 9 ? "Driver Not Loaded" : "Not Found"; }
int nvmlSystemGetCudaDriverVersion_v2(int *version) { *version = CUDA; return 0; }
int nvmlSystemGetDriverVersion(char *out, unsigned size) { return put(out, size, "555.%d", 42); }
int nvmlDeviceGetCount_v2(unsigned *count) { *count = GPUS; return 0; }
int nvmlDeviceGetHandleByIndex_v2(unsigned index, device **out) { *out = &gpus[index]; return index < GPUS ? 0 : 6; }
int nvmlDeviceGetHandleByUUID(const char *uuid, device **out) { *out = &slice; return strcmp(uuid, "MIG-5") ? 6 : 0; }
int nvmlDeviceGetDeviceHandleFromMigDeviceHandle(device *own, device **out) { *out = &gpus[own->number]; return 0; }
int nvmlDeviceGetName(device *own, char *out, unsigned size) { return put(out, size, "Fake GPU %d", own->number); }
int nvmlDeviceGetUUID(device *own, char *out, unsigned size) {
    return own->slice ? put(out, size, "MIG-%d", 5) : put(out, size, "GPU-%d0c0ffee", own->number);
}
int nvmlDeviceGetMemoryInfo(device *own, memory *out) {
    out->total = (own->slice ? 10ULL : 80ULL) << 30;
    out->free = out->used = 0;
    return 0;
}
int nvmlDeviceGetCudaComputeCapability(device *own, int *major, int *minor) {
    *major = MAJOR;
    *minor = MINOR;
    return own->slice; /* NVML tells this of whole GPUs only */
}
