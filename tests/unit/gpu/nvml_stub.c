/* An NVML with GPUs of its own making, for tests: GPUS many of compute capability MAJOR.MINOR, one slice, CUDA driver
 * version CUDA. Signatures as in the NVML API Reference. FAIL is what nvmlInit_v2 returns. The variable NVML_STUB says
 * what fails beside: "nvmlDeviceGetName=15" with that status, "nvmlDeviceGetName@1=15" of GPU 1 alone. */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

typedef struct { int number; int slice; } device;
typedef struct { unsigned long long total, free, used; } memory;
static device gpus[16] = {{0}, {1}, {2}, {3}}, slice = {0, 1};

static int put(char *out, unsigned size, const char *text, int number) {
    return snprintf(out, size, text, number) < (int)size ? 0 : 7;
}
static int status_of(const char *asked) {
    const char *all = getenv("NVML_STUB"), *found = all ? strstr(all, asked) : 0;
    return found ? atoi(found + strlen(asked)) : 0;
}
static int failing(const char *function, const device *own) {
    char all[96], one[96];
    snprintf(all, sizeof all, "%s=", function);
    snprintf(one, sizeof one, "%s@%s%d=", function, own && own->slice ? "slice" : "", own ? own->number : 0);
    return status_of(all) ? status_of(all) : status_of(one);
}
#define MAY_FAIL(own) if (failing(__func__, own)) return failing(__func__, own)

int nvmlInit_v2(void) { return FAIL; }
int nvmlShutdown(void) { return 0; }
const char *nvmlErrorString(int status) {
    switch (status) {
        case 3: return "Not Supported";
        case 4: return "Insufficient Permissions";
        case 9: return "Driver Not Loaded";
        case 12: return "Shared Library Not Found";
        case 15: return "GPU is lost";
        case 999: return 0;
        default: return "Not Found";
    }
}
int nvmlSystemGetCudaDriverVersion_v2(int *version) { MAY_FAIL(0); *version = CUDA; return 0; }
int nvmlSystemGetDriverVersion(char *out, unsigned size) { MAY_FAIL(0); return put(out, size, "555.%d", 42); }
int nvmlDeviceGetCount_v2(unsigned *count) { MAY_FAIL(0); *count = GPUS; return 0; }
int nvmlDeviceGetHandleByIndex_v2(unsigned index, device **out) {
    *out = &gpus[index];
    MAY_FAIL(*out);
    return index < GPUS ? 0 : 6;
}
int nvmlDeviceGetHandleByUUID(const char *uuid, device **out) {
    MAY_FAIL(0);
    *out = &slice;
    return strcmp(uuid, "MIG-5") ? 6 : 0;
}
int nvmlDeviceGetDeviceHandleFromMigDeviceHandle(device *own, device **out) {
    MAY_FAIL(own);
    *out = &gpus[own->number];
    return 0;
}
int nvmlDeviceGetName(device *own, char *out, unsigned size) {
    MAY_FAIL(own);
    return put(out, size, "Fake GPU %d", own->number);
}
int nvmlDeviceGetUUID(device *own, char *out, unsigned size) {
    MAY_FAIL(own);
    return own->slice ? put(out, size, "MIG-%d", 5) : put(out, size, "GPU-%d0c0ffee", own->number);
}
int nvmlDeviceGetMemoryInfo(device *own, memory *out) {
    MAY_FAIL(own);
    out->total = (own->slice ? 10ULL : 80ULL) << 30;
    out->free = out->used = 0;
    return 0;
}
int nvmlDeviceGetCudaComputeCapability(device *own, int *major, int *minor) {
    MAY_FAIL(own);
    *major = MAJOR;
    *minor = MINOR;
    return own->slice; /* NVML tells this of whole GPUs only */
}
