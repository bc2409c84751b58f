/* common.cuh: the instructions that kernels use by name, and how launches report errors. */
#ifndef LEANK_COMMON_CUH
#define LEANK_COMMON_CUH

#include "layout.h"
#include "leank_cuda.h"

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>
#include <stdint.h>

/* Bulk copies (one thread asks the copy engine for kilobytes) came with sm_90; before it all lanes copy 16 bytes. */
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
#define LK_BULK_COPY 1
#else
#define LK_BULK_COPY 0
#endif

#define LK_LOG2_E 1.4426950408889634f
#define LK_LN_2 0.6931471805599453f
#define LK_WARP 32
#define LK_ALL 0xffffffffu

/* The status of a launch that gave `error`; LEANK_CUDA_SYNC=1 waits for it, so that a fault gets its name. */
lk_status lk_cuda_launched(cudaError_t error, cudaStream_t stream, int32_t *cuda_error);

/* ------------------------------------------------------------------------------------------------ barriers */

__device__ __forceinline__ uint32_t smem_address(const void *p) {
    return (uint32_t)__cvta_generic_to_shared(p);
}

__device__ __forceinline__ void barrier_init(uint64_t *bar, uint32_t n_arrivals) {
    asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(smem_address(bar)), "r"(n_arrivals)
                 : "memory");
}

__device__ __forceinline__ void barrier_arrive(uint64_t *bar) {
    asm volatile("{\n.reg .b64 state;\nmbarrier.arrive.shared::cta.b64 state, [%0];\n}" ::"r"(
                     smem_address(bar))
                 : "memory");
}

/* A warp arrives, by one lane. compute-sanitizer's racecheck takes what the other lanes did for a race: for it, build with
 * NVCC_APPEND_FLAGS=-DLK_EACH_LANE_ARRIVES=1. */
#ifndef LK_EACH_LANE_ARRIVES
#define LK_EACH_LANE_ARRIVES 0
#endif
#define LK_WARP_ARRIVALS (LK_EACH_LANE_ARRIVES ? LK_WARP : 1)
__device__ __forceinline__ void barrier_arrive_warp(uint64_t *bar, int lane) {
    __syncwarp();
    if (LK_EACH_LANE_ARRIVES || lane == 0) barrier_arrive(bar);
}

/* Wait until the phase of this parity has completed. A fresh barrier counts as having completed parity 1. */
__device__ __forceinline__ void barrier_wait(uint64_t *bar, uint32_t parity) {
#if LK_BULK_COPY
#define LK_WAIT "mbarrier.try_wait.parity.shared::cta.b64"
#else
#define LK_WAIT "mbarrier.test_wait.parity.shared::cta.b64"
#endif
    uint32_t done;
    do {
        asm volatile("{\n.reg .pred p;\n" LK_WAIT " p, [%1], %2;\nselp.u32 %0, 1, 0, p;\n}"
                     : "=r"(done)
                     : "r"(smem_address(bar)), "r"(parity)
                     : "memory");
    } while (!done);
#undef LK_WAIT
}

/* The same for a whole warp. One lane waits: others might come so late that the barrier is two phases on, which looks as
 * if this one had not completed. (Where every lane waits, the next phase needs an arrival that follows a __syncwarp.) */
__device__ __forceinline__ void warp_wait(uint64_t *bar, uint32_t parity, int lane) {
    if (lane == 0) barrier_wait(bar, parity);
    __syncwarp();
}

/* Launch a kernel whose blocks may come before the kernel ahead of them has ended (and then wait for it, see below),
 * which hides the time that a launch takes. What was not built for sm_90 does not wait, and comes after it. */
template <typename Kernel, typename... Args>
static lk_status launch_early(dim3 grid, int n_threads, size_t smem_bytes, cudaStream_t stream,
                              int32_t *cuda_error, Kernel kernel, const Args &...args) {
    cudaFuncAttributes built;
    cudaError_t error = cudaFuncGetAttributes(&built, kernel);
    if (error != cudaSuccess) return lk_cuda_launched(error, stream, cuda_error);
    cudaLaunchAttribute early = {};
    early.id = cudaLaunchAttributeProgrammaticStreamSerialization;
    early.val.programmaticStreamSerializationAllowed = 1;
    cudaLaunchConfig_t config = {};
    config.gridDim = grid;
    config.blockDim = dim3((unsigned)n_threads);
    config.dynamicSmemBytes = smem_bytes;
    config.stream = stream;
    config.attrs = &early;
    config.numAttrs = built.ptxVersion >= 90;
    return lk_cuda_launched(cudaLaunchKernelEx(&config, kernel, args...), stream, cuda_error);
}

/* What earlier kernels wrote is there after this. */
__device__ __forceinline__ void wait_for_earlier_kernels() {
#if LK_BULK_COPY
    asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}

/* Let the next kernel's blocks come where there is room for them. */
__device__ __forceinline__ void let_next_kernel_come() {
#if LK_BULK_COPY
    asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}

/* ---------------------------------------------------------------------------------------------- async copies */

#if LK_BULK_COPY
__device__ __forceinline__ void barrier_expect(uint64_t *bar, uint32_t n_bytes) {
    asm volatile(
        "{\n.reg .b64 state;\nmbarrier.arrive.expect_tx.shared::cta.b64 state, [%0], %1;\n}" ::"r"(
            smem_address(bar)),
        "r"(n_bytes)
        : "memory");
}

/* Read once: evicted first, so that what is used again stays in L2. */
__device__ __forceinline__ uint64_t stream_policy() {
    uint64_t policy;
    asm volatile("createpolicy.fractional.L2::evict_first.b64 %0, 1.0;" : "=l"(policy));
    return policy;
}

__device__ __forceinline__ void bulk_copy(void *to, int64_t from, uint32_t n_bytes, uint64_t *bar,
                                          uint64_t policy) {
    asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes.L2::cache_hint "
                 "[%0], [%1], %2, [%3], %4;" ::"r"(smem_address(to)),
                 "l"(from), "r"(n_bytes), "r"(smem_address(bar)), "l"(policy)
                 : "memory");
}

/* Bring n_bytes, a multiple of 16, into L2. */
__device__ __forceinline__ void bulk_prefetch(int64_t from, uint32_t n_bytes) {
    asm volatile("cp.async.bulk.prefetch.L2.global [%0], %1;" ::"l"(from), "r"(n_bytes) : "memory");
}

/* Ordinary stores to shared memory before it are seen by bulk copies after it. */
__device__ __forceinline__ void fence_bulk() {
    asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
}
#else
__device__ __forceinline__ void fence_bulk() {}

/* All lanes of a warp copy n_bytes, a multiple of 16. */
__device__ __forceinline__ void warp_copy(unsigned char *to, int64_t from, uint32_t n_bytes,
                                          int lane) {
    for (uint32_t at = (uint32_t)lane * 16; at < n_bytes; at += LK_WARP * 16)
        asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(smem_address(to + at)),
                     "l"(from + at)
                     : "memory");
}

/* This lane arrives at the barrier when its copies so far have landed. */
__device__ __forceinline__ void arrive_after_copies(uint64_t *bar) {
    asm volatile("cp.async.mbarrier.arrive.noinc.shared::cta.b64 [%0];" ::"r"(smem_address(bar))
                 : "memory");
}
#endif

/* ----------------------------------------------------------------------------------------------- matrix units */

/* Two numbers as one register, low half first. */
template <typename T> __device__ __forceinline__ uint32_t pack2(float low, float high);
template <> __device__ __forceinline__ uint32_t pack2<__nv_bfloat16>(float low, float high) {
    const __nv_bfloat162 x = __floats2bfloat162_rn(low, high);
    return *reinterpret_cast<const uint32_t *>(&x);
}
template <> __device__ __forceinline__ uint32_t pack2<__half>(float low, float high) {
    const __half2 x = __floats2half2_rn(low, high);
    return *reinterpret_cast<const uint32_t *>(&x);
}

/* d [16 x 8] += a [16 x 16] * b [16 x 8]; operands as the PTX manual orders them. */
template <typename T>
__device__ __forceinline__ void mma_16(float d[4], const uint4 &a, uint32_t b0, uint32_t b1);
/* d [16 x 8] += a [16 x 8] * b [8 x 8]. */
template <typename T>
__device__ __forceinline__ void mma_8(float d[4], const uint2 &a, uint32_t b0);

#define LK_DEFINE_MMA(T, name)                                                                     \
    template <>                                                                                    \
    __device__ __forceinline__ void mma_16<T>(float d[4], const uint4 &a, uint32_t b0,             \
                                              uint32_t b1) {                                       \
        asm("mma.sync.aligned.m16n8k16.row.col.f32." name "." name                                 \
            ".f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"                 \
            : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])                                       \
            : "r"(a.x), "r"(a.y), "r"(a.z), "r"(a.w), "r"(b0), "r"(b1));                           \
    }                                                                                              \
    template <>                                                                                    \
    __device__ __forceinline__ void mma_8<T>(float d[4], const uint2 &a, uint32_t b0) {            \
        asm("mma.sync.aligned.m16n8k8.row.col.f32." name "." name                                  \
            ".f32 {%0, %1, %2, %3}, {%4, %5}, {%6}, {%0, %1, %2, %3};"                             \
            : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])                                       \
            : "r"(a.x), "r"(a.y), "r"(b0));                                                        \
    }
LK_DEFINE_MMA(__nv_bfloat16, "bf16")
LK_DEFINE_MMA(__half, "f16")
#undef LK_DEFINE_MMA

/* Transpose an 8 x 8 matrix of 16-bit numbers that the warp holds, two neighbours of a row per lane. */
__device__ __forceinline__ uint32_t transpose_8x8(uint32_t x) {
    uint32_t y;
    asm volatile("movmatrix.sync.aligned.m8n8.trans.b16 %0, %1;" : "=r"(y) : "r"(x));
    return y;
}

/* Sum of x over the lanes up to this one. */
__device__ __forceinline__ uint32_t warp_sum_up_to(uint32_t x, int lane) {
#pragma unroll
    for (int step = 1; step < LK_WARP; step *= 2) {
        const uint32_t other = __shfl_up_sync(LK_ALL, x, step);
        if (lane >= step) x += other;
    }
    return x;
}

/* 2^x; 0 for -inf. */
__device__ __forceinline__ float exp2_fast(float x) {
    float y;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}

#endif
