/* gather.cu: a row back in dense form. See leank_cuda.h. */
#include "state.cuh"

/* ------------------------------------------------------------------------------------------ device kernel */

/* One block per (token, head); elements are moved as bits. */
__global__ void gather_kernel(const __grid_constant__ lk_cuda_layer layer, int32_t b,
                              int32_t n_tokens, uint16_t *k, uint16_t *v) {
    const uint16_t nan = 0xffff; /* in bf16 and f16 alike */
    const int32_t D = layer.head_dim, g = blockIdx.y;
    const int32_t n_kept = head_kept(layer, g);
    const uint8_t *order = head_order(layer, g);
    const int32_t lo = state_lo(layer)[b], len = state_len(layer)[b];
    for (int32_t j = blockIdx.x; j < n_tokens; j += gridDim.x) {
        const int32_t slot = j % LK_PAGE_TOKENS;
        head_blocks blocks = {};
        if (j < len) blocks = find_blocks(layer, b, g, j, j < layer.sink || j >= lo);
        const int64_t to = ((int64_t)g * n_tokens + j) * D;
        for (int32_t c = threadIdx.x; c < D; c += blockDim.x) {
            const bool kept = c < n_kept;
            const unsigned char *block = kept ? blocks.kept : blocks.dropped;
            const int32_t at =
                kept ? lk_k_at(c, slot, n_kept) : lk_k_at(c - n_kept, slot, D - n_kept);
            k[to + order[c]] = block ? *reinterpret_cast<const uint16_t *>(block + at) : nan;
            const int32_t v_at = lk_v_at(slot, c, D);
            v[to + c] = blocks.v ? *reinterpret_cast<const uint16_t *>(blocks.v + v_at) : nan;
        }
    }
}

/* ----------------------------------------------------------------------------------------------- launcher */

lk_status lk_cuda_gather(const lk_cuda_layer *layer, int32_t row, int32_t n_tokens, void *k,
                         void *v, void *stream, int32_t *cuda_error) {
    *cuda_error = 0;
    if (row < 0 || row >= layer->n_rows || n_tokens < 0 || n_tokens > layer->max_tokens)
        return LK_E_VALUE;
    if (n_tokens == 0) return LK_OK;
    const dim3 grid((unsigned)(n_tokens < 65536 ? n_tokens : 65536), (unsigned)layer->n_heads);
    gather_kernel<<<grid, 64, 0, static_cast<cudaStream_t>(stream)>>>(
        *layer, row, n_tokens, static_cast<uint16_t *>(k), static_cast<uint16_t *>(v));
    return lk_cuda_launched(cudaGetLastError(), static_cast<cudaStream_t>(stream), cuda_error);
}
