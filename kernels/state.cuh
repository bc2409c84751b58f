/* state.cuh: what the kernels know of a row: its length, which tokens keep every channel, and how both advance. */
#ifndef LEANK_STATE_CUH
#define LEANK_STATE_CUH

#include "common.cuh"

__device__ __forceinline__ int32_t *state_len(const lk_cuda_layer &layer) {
    return layer.state + LK_STATE_HEADER;
}
__device__ __forceinline__ int32_t *state_lo(const lk_cuda_layer &layer) {
    return state_len(layer) + layer.n_rows;
}
__device__ __forceinline__ int32_t *state_n0(const lk_cuda_layer &layer) {
    return state_lo(layer) + layer.n_rows;
}

/* First position of the recent part of the window of a query; the twin of lk_decode's full_lo_of. */
__device__ __forceinline__ int32_t full_lo_of(const lk_cuda_layer &layer, int32_t lo, int32_t n0,
                                              int32_t position) {
    const int32_t from = max(layer.sink, lo);
    return position < n0 ? from : max(from, position + 1 - layer.recent);
}

/* Tokens of a row before a column, by the column's position; see place_kernel. */
__device__ __forceinline__ int32_t tokens_before(int32_t position) {
    return position >= 0 ? position : -1 - position;
}

/* lo of a row that has grown to len; the twin of lk_settled_lo. */
__device__ __forceinline__ int32_t settled_lo(const lk_cuda_layer &layer, int32_t lo, int32_t len) {
    const int32_t old = max(0, len - layer.recent - layer.slack);
    return max(max(lo, layer.sink), old / LK_PAGE_TOKENS * LK_PAGE_TOKENS);
}

/* Row b has len tokens now, and nobody attends to its dropped channels before the next call. lo, n0: as they were. */
__device__ __forceinline__ void settle_row(const lk_cuda_layer &layer, int32_t b, int32_t len,
                                           int32_t lo, int32_t n0) {
    state_len(layer)[b] = len;
    if (len == 0) return;
    if (n0 == LK_STATE_OPEN) state_n0(layer)[b] = len;
    state_lo(layer)[b] = settled_lo(layer, lo, len);
}

/* Whether page i of a row keeps its dropped channels, given lo; the twin of append.c's twin_stays. */
__device__ __forceinline__ bool twin_stays(const lk_cuda_layer &layer, int32_t i, int32_t lo) {
    return i * LK_PAGE_TOKENS < layer.sink || (i + 1) * LK_PAGE_TOKENS > lo;
}

/* Where things of head g are: lk_cuda_layer.geom. */
__device__ __forceinline__ int32_t head_kept(const lk_cuda_layer &layer, int32_t g) {
    return layer.geom[g];
}
__device__ __forceinline__ int32_t head_kept_off(const lk_cuda_layer &layer, int32_t g) {
    return layer.geom[layer.n_heads + g];
}
__device__ __forceinline__ int32_t head_dropped_off(const lk_cuda_layer &layer, int32_t g) {
    return layer.geom[2 * layer.n_heads + g];
}
__device__ __forceinline__ int32_t head_v_off(const lk_cuda_layer &layer, int32_t g) {
    return layer.geom[3 * layer.n_heads + g];
}
__device__ __forceinline__ const uint8_t *head_order(const lk_cuda_layer &layer, int32_t g) {
    return reinterpret_cast<const uint8_t *>(layer.geom + 4 * layer.n_heads) + g * layer.head_dim;
}

/* The blocks of head g that have position j of row b; NULL where there is none. whole: the dropped channels of its page are
 * stored. */
typedef struct {
    unsigned char *kept, *dropped, *v;
} head_blocks;

__device__ __forceinline__ head_blocks find_blocks(const lk_cuda_layer &layer, int64_t b, int32_t g,
                                                   int32_t j, bool whole) {
    const int64_t entry = b * layer.table_stride + j / LK_PAGE_TOKENS;
    const int32_t n_kept = head_kept(layer, g);
    head_blocks blocks = {};
    if (n_kept > 0) {
        unsigned char *page = reinterpret_cast<unsigned char *>(layer.page[entry]);
        blocks.kept = page + head_kept_off(layer, g);
        blocks.v = page + head_v_off(layer, g);
    }
    if (whole && n_kept < layer.head_dim) {
        unsigned char *twin = reinterpret_cast<unsigned char *>(layer.twin[entry]);
        blocks.dropped = twin + head_dropped_off(layer, g);
        if (n_kept == 0) blocks.v = twin + head_v_off(layer, g);
    }
    return blocks;
}

#endif
