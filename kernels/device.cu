/* device.cu: which devices there are, what was built, and the status of a launch. */
#include "common.cuh"

#include <stdlib.h>
#include <string.h>

#ifndef LK_CUDA_BUILT
#error setup.py defines LK_CUDA_BUILT, the list of architectures
#endif

const char *lk_cuda_built(void) { return LK_CUDA_BUILT; }

const char *lk_cuda_error_text(int32_t cuda_error) {
    return cudaGetErrorString(static_cast<cudaError_t>(cuda_error));
}

static bool wanted_to_wait(cudaStream_t stream) {
    const char *sync = getenv("LEANK_CUDA_SYNC");
    cudaStreamCaptureStatus capture = cudaStreamCaptureStatusNone;
    return sync && strcmp(sync, "1") == 0 &&
           cudaStreamIsCapturing(stream, &capture) == cudaSuccess &&
           capture == cudaStreamCaptureStatusNone;
}

lk_status lk_cuda_launched(cudaError_t error, cudaStream_t stream, int32_t *cuda_error) {
    if (error == cudaSuccess && wanted_to_wait(stream)) error = cudaStreamSynchronize(stream);
    if (error != cudaSuccess)
        (void)cudaGetLastError(); /* or the next launch would report it again */
    *cuda_error = static_cast<int32_t>(error);
    return error == cudaSuccess ? LK_OK : LK_E_DEVICE;
}

int32_t lk_cuda_device_count(void) {
    int n = 0;
    if (cudaGetDeviceCount(&n) != cudaSuccess) {
        (void)cudaGetLastError(); /* no driver is no error here */
        return 0;
    }
    return n;
}

lk_status lk_cuda_device_info(int32_t device, lk_cuda_device *out) {
    const struct {
        cudaDeviceAttr attribute;
        int32_t *value;
    } wanted[] = {
        {cudaDevAttrComputeCapabilityMajor, &out->major},
        {cudaDevAttrComputeCapabilityMinor, &out->minor},
        {cudaDevAttrMultiProcessorCount, &out->n_blocks},
        {cudaDevAttrMaxSharedMemoryPerBlockOptin, &out->smem_bytes},
    };
    for (const auto &item : wanted) {
        int value;
        if (cudaDeviceGetAttribute(&value, item.attribute, device) != cudaSuccess) {
            (void)cudaGetLastError();
            return LK_E_DEVICE;
        }
        *item.value = value;
    }
    return LK_OK;
}
