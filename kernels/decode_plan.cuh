/* decode_plan.cuh: what each row sees and costs, as every block finds it from the lengths on the device; and how lengths
 * advance. */
#ifndef LEANK_DECODE_PLAN_CUH
#define LEANK_DECODE_PLAN_CUH

#include "decode_shape.cuh"

/* What earlier kernels may be writing still is read past L1, so that a later read finds the new value. */
__device__ __forceinline__ bool is_real(const decode_params &p, int32_t b) {
    if (p.k) return !p.valid || __ldcg(p.valid + b);
    const int32_t columns = __ldcg(p.layer.state + LK_STATE_COLUMNS);
    return columns > 0 && __ldcg(p.layer.real + b * p.layer.real_stride + columns - 1);
}

__device__ __forceinline__ row_view view_row(const decode_params &p, int32_t b) {
    const lk_cuda_layer &layer = p.layer;
    const int32_t columns = __ldcg(layer.state + LK_STATE_COLUMNS);
    const int32_t len = __ldcg(state_len(layer) + b), lo = __ldcg(state_lo(layer) + b);
    const int32_t n0 = __ldcg(state_n0(layer) + b), position = p.k ? len : len - 1;
    /* len too: it may be of a later step than columns, and must not lead beyond the tables. */
    const bool fits = !p.k || (columns < layer.max_tokens && len < layer.max_tokens);
    row_view view;
    view.end = fits && position >= 0 && is_real(p, b) ? position + 1 : 0;
    view.full_lo = full_lo_of(layer, lo, n0, position);
    return view;
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

/* One view per row; the twins of these two in span_shape.cuh have more. */
__device__ __forceinline__ int32_t count_views(const decode_params &p) { return p.layer.n_rows; }

__device__ __forceinline__ lk_unit make_unit(const decode_params &p, const row_view &view,
                                             int32_t n_kept) {
    return lk_unit_make(view.end, view.full_lo, p.layer.sink, n_kept, p.layer.head_dim);
}

/* What each row sees (view_row) and costs, by all threads of the block. row_base is 0 and becomes costs of rows, one place up:
 * the fetching warp sums them. Lengths may change while this runs: each is read once, so that costs agree with the views
 * that plan_holds checks. */
template <typename Params, typename Smem>
__device__ __forceinline__ void make_plan(const Params &p, Smem &s) {
    const int32_t n_heads = p.layer.n_heads, n_views = count_views(p);
    for (int32_t b = threadIdx.x; b < n_views; b += blockDim.x) s.row[b] = view_row(p, b);
    for (int32_t g = threadIdx.x; g < n_heads; g += blockDim.x) s.n_kept[g] = head_kept(p.layer, g);
    __syncthreads();
#pragma unroll 1
    for (int32_t i = threadIdx.x; i < n_views * n_heads; i += blockDim.x) {
        const lk_unit u = make_unit(p, s.row[i / n_heads], s.n_kept[i % n_heads]);
        atomicAdd(&s.row_base[i / n_heads + 1], lk_unit_cost(&u));
    }
}

/* Whether rows still see what they saw when the plan was made; by all threads, each for some rows. */
template <typename Smem>
__device__ __forceinline__ bool plan_holds(const decode_params &p, const Smem &s) {
    bool holds = true;
#pragma unroll 1
    for (int32_t b = threadIdx.x; b < p.layer.n_rows; b += blockDim.x) {
        const row_view view = view_row(p, b);
        holds = holds && view.end == s.row[b].end && view.full_lo == s.row[b].full_lo;
    }
    return holds;
}

/* Lengths, lo and columns advance, and the counter is 0 again; by one block, when the decode kernel has ended. */
__device__ __forceinline__ void advance_rows(const decode_params &p) {
    const lk_cuda_layer &layer = p.layer;
    if (threadIdx.x == 0) *p.n_taken = 0;
    if (!p.k) return;
    const int32_t columns = layer.state[LK_STATE_COLUMNS];
    const bool fits = columns < layer.max_tokens; /* or nothing was stored */
#pragma unroll 1
    for (int32_t b = threadIdx.x; b < layer.n_rows; b += blockDim.x) {
        /* All reads come before the first write and the first use, so that they are under way together. */
        const int32_t len = state_len(layer)[b], lo = state_lo(layer)[b], n0 = state_n0(layer)[b];
        const bool real = is_real(p, b);
        if (!fits) continue;
        layer.real[b * layer.real_stride + columns] = real;
        if (real) settle_row(layer, b, len + 1, lo, n0);
    }
    __syncthreads();
    if (threadIdx.x != 0) return;
    if (fits) layer.state[LK_STATE_COLUMNS] = columns + 1;
    else layer.state[LK_STATE_OVERFLOW] = 1;
}

#endif
