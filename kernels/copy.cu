/* copy.cu: rows that become copies of other rows, page by page. See leank_cuda.h. */
#include "state.cuh"

#define COPY_THREADS 256

/* ------------------------------------------------------------------------------------------ device kernel */

__device__ __forceinline__ void copy_block(int64_t to, int64_t from, int64_t n_bytes) {
    const uint4 *source = reinterpret_cast<const uint4 *>(from);
    uint4 *target = reinterpret_cast<uint4 *>(to);
    for (int64_t i = threadIdx.x; i < n_bytes / (int64_t)sizeof(uint4); i += COPY_THREADS)
        target[i] = source[i];
}

/* Blocks of column y of the grid take turns with the pages of pair y. */
__global__ void __launch_bounds__(COPY_THREADS)
    copy_kernel(const __grid_constant__ lk_cuda_layer to,
                const __grid_constant__ lk_cuda_layer from, const int32_t *pairs,
                int64_t page_bytes, int64_t twin_bytes) {
    const int64_t to_row = pairs[2 * blockIdx.y], from_row = pairs[2 * blockIdx.y + 1];
    const int32_t len = state_len(from)[from_row], lo = state_lo(from)[from_row];
    const int32_t n_pages = (len + LK_PAGE_TOKENS - 1) / LK_PAGE_TOKENS;
    for (int32_t i = blockIdx.x; i < n_pages; i += gridDim.x) {
        const int64_t to_entry = to_row * to.table_stride + i;
        const int64_t from_entry = from_row * from.table_stride + i;
        if (page_bytes > 0) copy_block(to.page[to_entry], from.page[from_entry], page_bytes);
        if (twin_bytes > 0 && twin_stays(from, i, lo))
            copy_block(to.twin[to_entry], from.twin[from_entry], twin_bytes);
    }
}

/* ----------------------------------------------------------------------------------------------- launcher */

lk_status lk_cuda_copy_pages(const lk_cuda_layer *to, const lk_cuda_layer *from,
                             const int32_t *pairs, int32_t n_pairs, int64_t page_bytes,
                             int64_t twin_bytes, void *stream, int32_t *cuda_error) {
    *cuda_error = 0;
    if (n_pairs < 0 || n_pairs > 65535 || from->max_tokens > to->max_tokens) return LK_E_SHAPE;
    if (page_bytes % 16 != 0 || twin_bytes % 16 != 0) return LK_E_VALUE;
    if (n_pairs == 0) return LK_OK;
    const int32_t n_pages = (from->max_tokens + LK_PAGE_TOKENS - 1) / LK_PAGE_TOKENS;
    const dim3 grid((unsigned)(n_pages < 1024 ? n_pages : 1024), (unsigned)n_pairs);
    copy_kernel<<<grid, COPY_THREADS, 0, static_cast<cudaStream_t>(stream)>>>(
        *to, *from, pairs, page_bytes, twin_bytes);
    return lk_cuda_launched(cudaGetLastError(), static_cast<cudaStream_t>(stream), cuda_error);
}
