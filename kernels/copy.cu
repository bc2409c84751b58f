/* copy.cu: rows that become copies of other rows, page by page, see leank_cuda.h; and twins of new pages that are elsewhere
 * for a time, see copy.cuh. */
#include "copy.cuh"
#include "state.cuh"

#define COPY_THREADS 256

/* ------------------------------------------------------------------------------------------ device kernels */

__device__ __forceinline__ void copy_block(int64_t to, int64_t from, int64_t n_bytes) {
    const uint4 *source = reinterpret_cast<const uint4 *>(from);
    uint4 *target = reinterpret_cast<uint4 *>(to);
#pragma unroll 4
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

/* Column y of the grid has row y: where its twins are, and a copy of the one that its next token goes to. */
__global__ void __launch_bounds__(COPY_THREADS)
    lend_kernel(const __grid_constant__ lk_cuda_layer layer, int64_t *table, int64_t lent,
                int32_t n_lent, int64_t twin_bytes) {
    const int64_t row = (int64_t)blockIdx.y * layer.table_stride;
    const int64_t from = lent + (int64_t)blockIdx.y * n_lent * twin_bytes;
    const int32_t len = state_len(layer)[blockIdx.y];
    const int32_t n_sink = (int32_t)(((int64_t)layer.sink + LK_PAGE_TOKENS - 1) / LK_PAGE_TOKENS);
    const int32_t first = max(len / LK_PAGE_TOKENS, n_sink); /* page that has the first lent twin */
    for (int64_t i = (int64_t)blockIdx.x * COPY_THREADS + threadIdx.x; i < layer.table_stride;
         i += (int64_t)gridDim.x * COPY_THREADS) {
        const int64_t slot = i - first;
        table[row + i] =
            slot >= 0 && slot < n_lent ? from + slot * twin_bytes : layer.twin[row + i];
    }
    if (blockIdx.x == 0 && first == len / LK_PAGE_TOKENS && len % LK_PAGE_TOKENS != 0)
        copy_block(from, layer.twin[row + first], twin_bytes);
}

/* Blocks of column y of the grid take turns with the twins of row y that stay, of those that were lent. */
__global__ void __launch_bounds__(COPY_THREADS)
    take_back_kernel(const __grid_constant__ lk_cuda_layer layer, const int64_t *table,
                     int64_t twin_bytes) {
    const int64_t row = (int64_t)blockIdx.y * layer.table_stride;
    const int32_t len = state_len(layer)[blockIdx.y];
    /* The same whether another block has written it or not. */
    const int32_t lo = settled_lo(layer, state_lo(layer)[blockIdx.y], len);
    for (int32_t i = lo / LK_PAGE_TOKENS + (int32_t)blockIdx.x; i * LK_PAGE_TOKENS < len;
         i += gridDim.x)
        if (table[row + i] != layer.twin[row + i])
            copy_block(layer.twin[row + i], table[row + i], twin_bytes);
    if (blockIdx.x == 0 && threadIdx.x == 0) state_lo(layer)[blockIdx.y] = lo;
}

/* ----------------------------------------------------------------------------------------------- launchers */

lk_status lend_twins(const lk_cuda_layer *layer, int64_t *table, int64_t lent, int32_t n_lent,
                     int64_t twin_bytes, cudaStream_t stream, int32_t *cuda_error) {
    const int64_t n_blocks = (layer->table_stride + COPY_THREADS - 1) / COPY_THREADS;
    const dim3 grid((unsigned)(n_blocks < 64 ? n_blocks : 64), (unsigned)layer->n_rows);
    lend_kernel<<<grid, COPY_THREADS, 0, stream>>>(*layer, table, lent, n_lent, twin_bytes);
    return lk_cuda_launched(cudaGetLastError(), stream, cuda_error);
}

lk_status take_back_twins(const lk_cuda_layer *layer, const int64_t *table, int32_t n_lent,
                          int64_t twin_bytes, cudaStream_t stream, int32_t *cuda_error) {
    const dim3 grid((unsigned)n_lent, (unsigned)layer->n_rows);
    take_back_kernel<<<grid, COPY_THREADS, 0, stream>>>(*layer, table, twin_bytes);
    return lk_cuda_launched(cudaGetLastError(), stream, cuda_error);
}

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
