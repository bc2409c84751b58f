/* decode_plan.cuh: what each row sees and costs, as every block finds it from the lengths on the device; and how lengths
 * advance. */
#ifndef LEANK_DECODE_PLAN_CUH
#define LEANK_DECODE_PLAN_CUH

#include "decode_shape.cuh"

__device__ __forceinline__ bool is_real(const decode_params &p, int32_t b) {
    if (p.k) return !p.valid || p.valid[b];
    const int32_t columns = p.layer.state[LK_STATE_COLUMNS];
    return columns > 0 && p.layer.real[b * p.layer.real_stride + columns - 1];
}

/* s.row_base[i] for i in 1..n become sums up to i; one warp. */
__device__ __forceinline__ void sum_rows(uint32_t *row_base, int32_t n, int lane) {
    uint32_t carry = 0;
#pragma unroll 1
    for (int32_t first = 1; first <= n; first += LK_WARP) {
        const int32_t i = first + lane;
        const uint32_t sum = warp_sum_up_to(i <= n ? row_base[i] : 0, lane);
        if (i <= n) row_base[i] = carry + sum;
        carry += __shfl_sync(LK_ALL, sum, LK_WARP - 1);
    }
}

/* What each row sees and costs, by all threads of the block. row_base is 0 and becomes costs of rows, one place up:
 * the fetching warp sums them. */
template <typename Smem>
__device__ __forceinline__ void make_plan(const decode_params &p, Smem &s) {
    const lk_cuda_layer &layer = p.layer;
    const int32_t n_heads = layer.n_heads, n_units = layer.n_rows * n_heads;
    const bool fits = !p.k || layer.state[LK_STATE_COLUMNS] < layer.max_tokens;
#pragma unroll 1
    for (int32_t i = threadIdx.x; i < n_units; i += blockDim.x) {
        const int32_t b = i / n_heads, g = i % n_heads;
        const int32_t len = state_len(layer)[b], lo = state_lo(layer)[b], n0 = state_n0(layer)[b];
        const int32_t n_kept = head_kept(layer, g);
        const int32_t position = p.k ? len : len - 1;
        const bool stored = fits && is_real(p, b) && position >= 0;
        const int32_t end = stored ? position + 1 : 0;
        const int32_t full_lo = full_lo_of(layer, lo, n0, position);
        const lk_unit u = lk_unit_make(end, full_lo, layer.sink, n_kept, layer.head_dim);
        atomicAdd(&s.row_base[b + 1], lk_unit_cost(&u));
        s.row_end[b] = end; /* the same from every head of the row */
        s.row_full_lo[b] = full_lo;
        s.n_kept[g] = n_kept;
    }
}

/* By one warp of each block, when the block has taken its last chunk. Then it has read the lengths too: the last block
 * lets them advance, and leaves the counters at 0. */
__device__ __forceinline__ void finish_launch(const decode_params &p, int lane) {
    const lk_cuda_layer &layer = p.layer;
    int32_t n_before = 0;
    let_next_kernel_come();
    if (lane == 0) n_before = add_and_order(&p.counters[1], 1);
    n_before = __shfl_sync(LK_ALL, n_before, 0);
    if (n_before != (int32_t)gridDim.x - 1) return;
    if (lane == 0) p.counters[0] = p.counters[1] = 0;
    if (!p.k) return;
    const int32_t columns = layer.state[LK_STATE_COLUMNS];
    if (columns >= layer.max_tokens) { /* nothing was stored */
        if (lane == 0) layer.state[LK_STATE_OVERFLOW] = 1;
        return;
    }
#pragma unroll 1
    for (int32_t b = lane; b < layer.n_rows; b += LK_WARP) {
        const bool real = is_real(p, b);
        layer.real[b * layer.real_stride + columns] = real;
        if (real) settle_row(layer, b, state_len(layer)[b] + 1);
    }
    __syncwarp();
    if (lane == 0) layer.state[LK_STATE_COLUMNS] = columns + 1;
}

#endif
