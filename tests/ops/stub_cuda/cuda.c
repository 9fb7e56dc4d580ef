// A CUDA driver without a device: every call succeeds and launches are counted. Triton's launcher links against it, so
// that the host path of a launch runs on machines without a GPU. Built and loaded by tests/ops/stub_driver.py.

#include <stdatomic.h>
#include <stddef.h>
#include <stdint.h>

typedef int CUresult;  // 0: success

static atomic_long num_launches;
static char handle;  // stands for contexts, modules and functions

long stub_num_launches(void) { return num_launches; }

CUresult cuDeviceGet(int* device, int ordinal) {
    *device = ordinal;
    return 0;
}

// 227 KB of shared memory per block where that is queried, and otherwise a value that no caller depends on.
CUresult cuDeviceGetAttribute(int* value, int attribute, int device) {
    (void)attribute, (void)device;
    *value = 227 << 10;
    return 0;
}

CUresult cuDevicePrimaryCtxRetain(void** context, int device) {
    (void)device;
    *context = &handle;
    return 0;
}

CUresult cuCtxGetCurrent(void** context) {
    *context = &handle;
    return 0;
}

CUresult cuCtxSetCurrent(void* context) {
    (void)context;
    return 0;
}

CUresult cuModuleLoadData(void** module, const void* image) {
    (void)image;
    *module = &handle;
    return 0;
}

CUresult cuModuleGetFunction(void** function, void* module, const char* name) {
    (void)module, (void)name;
    *function = &handle;
    return 0;
}

// Attribute 0 is the maximum number of threads per block; the others are sizes in bytes.
CUresult cuFuncGetAttribute(int* value, int attribute, void* function) {
    (void)function;
    *value = attribute == 0 ? 1024 : 0;
    return 0;
}

CUresult cuFuncSetAttribute(void* function, int attribute, int value) {
    (void)function, (void)attribute, (void)value;
    return 0;
}

CUresult cuFuncSetCacheConfig(void* function, int config) {
    (void)function, (void)config;
    return 0;
}

CUresult cuPointerGetAttribute(void* value, int attribute, uint64_t pointer) {
    (void)attribute;
    *(uint64_t*)value = pointer;
    return 0;
}

CUresult cuLaunchKernelEx(const void* config, void* function, void** parameters, void** extra) {
    (void)config, (void)function, (void)parameters, (void)extra;
    num_launches++;
    return 0;
}

CUresult cuGetErrorString(CUresult error, const char** text) {
    (void)error;
    *text = "stub";
    return 0;
}

CUresult cuDriverGetVersion(int* version) {
    *version = 13000;
    return 0;
}

CUresult cuCtxGetLimit(size_t* value, int limit) {
    (void)limit;
    *value = 0;
    return 0;
}

CUresult cuCtxSetLimit(int limit, size_t value) {
    (void)limit, (void)value;
    return 0;
}
