/* learn_launch.cuh: the launches of one dtype and head dim; inst/learn_<name>_<D>.cu has one instance each. */
#ifndef LEANK_LEARN_LAUNCH_CUH
#define LEANK_LEARN_LAUNCH_CUH

#include "learn_forward.cuh"
#include "learn_keys.cuh"
#include "learn_rows.cuh"

/* Let a kernel have this much shared memory, and multiprocessors as many of its blocks as they can. */
template <typename Kernel> static cudaError_t allow_smem(Kernel kernel, size_t bytes) {
    const cudaError_t error =
        cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, (int)bytes);
    if (error != cudaSuccess) return error;
    return cudaFuncSetAttribute(kernel, cudaFuncAttributePreferredSharedMemoryCarveout,
                                cudaSharedmemCarveoutMaxShared);
}

template <typename T, int D>
static lk_status launch_learn_forward(learn_params *p, int32_t smem_bytes, cudaStream_t stream,
                                      int32_t *cuda_error) {
    using smem = forward_smem<T, D>;
    p->n_stages = smem::bytes(2) <= (size_t)smem_bytes ? 2 : 1;
    const size_t bytes = smem::bytes(p->n_stages);
    if (bytes > (size_t)smem_bytes) return LK_E_SHAPE;
    const auto kernel = learn_forward_kernel<T, D>;
    const cudaError_t error = allow_smem(kernel, bytes);
    if (error != cudaSuccess) return lk_cuda_launched(error, stream, cuda_error);
    const unsigned n_blocks = (unsigned)(p->n_rows * p->n_heads * p->row_blocks * p->n_splits);
    kernel<<<n_blocks, LEARN_THREADS, bytes, stream>>>(*p);
    return lk_cuda_launched(cudaGetLastError(), stream, cuda_error);
}

template <typename T, int D>
static lk_status launch_learn_backward(learn_params *p, int32_t smem_bytes, cudaStream_t stream,
                                       int32_t *cuda_error) {
    using smem = rows_smem<T, D>;
    p->n_stages = smem::bytes(2) <= (size_t)smem_bytes ? 2 : 1;
    const size_t bytes = smem::bytes(p->n_stages), keys_bytes = sizeof(keys_smem<T, D>);
    if (bytes > (size_t)smem_bytes || keys_bytes > (size_t)smem_bytes) return LK_E_SHAPE;
    const auto rows_kernel = learn_rows_kernel<T, D>;
    const auto keys_kernel = learn_keys_kernel<T, D>;
    cudaError_t error = allow_smem(rows_kernel, bytes);
    if (error == cudaSuccess) error = allow_smem(keys_kernel, keys_bytes);
    if (error != cudaSuccess) return lk_cuda_launched(error, stream, cuda_error);
    const unsigned n_units = (unsigned)(p->n_rows * p->n_heads);
    const unsigned n_blocks = n_units * (unsigned)(p->row_blocks * p->n_splits);
    rows_kernel<<<n_blocks, LEARN_THREADS, bytes, stream>>>(*p);
    const lk_status status = lk_cuda_launched(cudaGetLastError(), stream, cuda_error);
    if (status != LK_OK) return status;
    return launch_early(dim3(n_units * (unsigned)p->key_blocks), LEARN_THREADS, keys_bytes, stream,
                        cuda_error, keys_kernel, *p);
}

#define LK_LEARN_INSTANCE(name, T, D)                                                              \
    lk_status launch_learn_forward_##name##_##D(learn_params *p, int32_t smem_bytes,               \
                                                cudaStream_t stream, int32_t *cuda_error) {        \
        return launch_learn_forward<T, D>(p, smem_bytes, stream, cuda_error);                      \
    }                                                                                              \
    lk_status launch_learn_backward_##name##_##D(learn_params *p, int32_t smem_bytes,              \
                                                 cudaStream_t stream, int32_t *cuda_error) {       \
        return launch_learn_backward<T, D>(p, smem_bytes, stream, cuda_error);                     \
    }

#endif
