/* learn_rows.cuh: the gradients of 128 query rows of a unit over a share of the keys that they see: dq and dalpha.
 *
 * Middle keys come first. Their sum of dS * k, multiplied by q, is dalpha, and multiplied by alpha it is their part of dq;
 * window keys are then added to that, so that one sum in registers serves both. */
#ifndef LEANK_LEARN_ROWS_CUH
#define LEANK_LEARN_ROWS_CUH

#include "learn.cuh"

template <typename T, int D> struct rows_smem {
    static constexpr int KEYS = LEARN_BACKWARD_KEYS, STRIDE = learn_tile<D>::STRIDE;
    row_block_shared<T> block;
    float2 states[LEARN_ROWS];     /* shift and delta */
    float dalpha[LEARN_WARPS * D]; /* of each warp */
    alignas(16) T q[LEARN_ROWS * STRIDE];
    alignas(16) T d_o[LEARN_ROWS * STRIDE];
    struct stage {
        alignas(16) T k[KEYS * STRIDE], v[KEYS * STRIDE];
    } stages[2]; /* n_stages of them are there */

    static size_t bytes(int32_t n_stages) {
        return sizeof(rows_smem) - (size_t)(2 - n_stages) * sizeof(stage);
    }
};

/* What is subtracted from a row's logits, and rowsum(do * o): one row per thread. */
template <typename T, int D>
__device__ __forceinline__ void find_states(const learn_params &p, const row_block &at,
                                            rows_smem<T, D> &s) {
    const int row = (int)threadIdx.x;
    const int32_t i = at.first_row + row;
    float shift = 0.0f, delta = 0.0f;
    if (s.block.columns[row] >= 0) {
        const int64_t h = (int64_t)at.b * p.n_heads * p.r + at.g * p.r + i % p.r;
        const float lse = p.lse[h * p.n_columns + i / p.r];
        /* A row whose logits all overflowed has none to subtract from. */
        if (lse != -INFINITY) shift = lse * LK_LOG2_E;
        const T *o = query_row<T>(p, p.o, at.b, at.g, i);
        const T *d_o = s.d_o + row * learn_tile<D>::STRIDE;
#pragma unroll 4
        for (int word = 0; word < D / 8; word++) {
            const uint4 x = *reinterpret_cast<const uint4 *>(o + 8 * word);
            const uint4 y = *reinterpret_cast<const uint4 *>(d_o + 8 * word);
            const uint32_t *xs = &x.x, *ys = &y.x;
#pragma unroll
            for (int k = 0; k < 4; k++) {
                const float2 a = unpack2<T>(xs[k]), b = unpack2<T>(ys[k]);
                delta = fmaf(a.x, b.x, fmaf(a.y, b.y, delta));
            }
        }
    }
    s.states[row] = make_float2(shift, delta);
    if (at.split == 0 && i < p.n_query_rows)
        p.states[(int64_t)at.unit * p.n_query_rows + i] = make_float2(shift, delta);
}

/* dq holds the sums over middle keys, s.q holds q: give the block's part of dalpha, and multiply by alpha. */
template <typename T, int D>
__device__ __forceinline__ void finish_middle(const learn_params &p, const row_block &at,
                                              rows_smem<T, D> &s, float (&dq)[2][D / 8][4]) {
    const int lane = (int)threadIdx.x % LK_WARP, warp = (int)threadIdx.x / LK_WARP;
    const T *q = s.q + (warp * 32 + lane / 4) * learn_tile<D>::STRIDE + 2 * (lane % 4);
    const float *alpha = p.alpha + (int64_t)at.g * D + 2 * (lane % 4);
#pragma unroll
    for (int n = 0; n < D / 8; n++) {
        const float by[2] = {alpha[8 * n], alpha[8 * n + 1]};
        float sum[2] = {0.0f, 0.0f};
#pragma unroll
        for (int m = 0; m < 2; m++) {
#pragma unroll
            for (int half = 0; half < 2; half++) {
                const float2 pair = unpack2<T>(*reinterpret_cast<const uint32_t *>(
                    q + (16 * m + 8 * half) * learn_tile<D>::STRIDE + 8 * n));
                sum[0] = fmaf(pair.x, dq[m][n][2 * half], sum[0]);
                sum[1] = fmaf(pair.y, dq[m][n][2 * half + 1], sum[1]);
                dq[m][n][2 * half] *= by[0];
                dq[m][n][2 * half + 1] *= by[1];
            }
        }
#pragma unroll
        for (int e = 0; e < 2; e++) {
#pragma unroll
            for (int step = 4; step < LK_WARP; step *= 2)
                sum[e] += __shfl_xor_sync(LK_ALL, sum[e], step);
            if (lane < 4) s.dalpha[warp * D + 8 * n + 2 * lane + e] = sum[e];
        }
    }
    __syncthreads();
    const int64_t part = ((int64_t)at.unit * p.row_blocks + at.row_block) * p.n_splits + at.split;
    for (int c = (int)threadIdx.x; c < D; c += LEARN_THREADS) {
        float sum = 0.0f;
#pragma unroll
        for (int i = 0; i < LEARN_WARPS; i++) sum += s.dalpha[i * D + c];
        p.dalpha_parts[part * D + c] = sum;
    }
}

/* Logits and dP become gradients of logits. */
template <int N>
__device__ __forceinline__ void find_gradients(const float2 *states, int lane, float scale_log2,
                                               const float (&x)[2][N][4], float (&d)[2][N][4]) {
#pragma unroll
    for (int m = 0; m < 2; m++) {
#pragma unroll
        for (int half = 0; half < 2; half++) {
            const float2 state = states[16 * m + 8 * half + lane / 4];
#pragma unroll
            for (int n = 0; n < N; n++)
#pragma unroll
                for (int e = 2 * half; e < 2 * half + 2; e++)
                    d[m][n][e] =
                        exp2_fast(fmaf(x[m][n][e], scale_log2, -state.x)) * (d[m][n][e] - state.y);
        }
    }
}

template <typename T, int D>
__global__ void __launch_bounds__(LEARN_THREADS, LEARN_BLOCKS_PER_PROCESSOR(D))
    learn_rows_kernel(const __grid_constant__ learn_params p) {
    constexpr int KEYS = LEARN_BACKWARD_KEYS;
    extern __shared__ __align__(16) unsigned char memory[];
    rows_smem<T, D> &s = *reinterpret_cast<rows_smem<T, D> *>(memory);
    const int lane = (int)threadIdx.x % LK_WARP, rows = (int)threadIdx.x / LK_WARP * 32;
    fill_shared(p, KEYS, &s.block);
    const row_block &at = s.block.at;
    load_rows<T, D, LEARN_ROWS>([&](int row) { return block_row(p, s.block, p.d_o, row); }, NULL,
                                s.d_o);
    __syncthreads();
    find_states<T, D>(p, at, s);

    float dq[2][D / 8][4];
#pragma unroll
    for (int m = 0; m < 2; m++)
#pragma unroll
        for (int n = 0; n < D / 8; n++)
#pragma unroll
            for (int e = 0; e < 4; e++) dq[m][n][e] = 0.0f;
    const int place = rows * learn_tile<D>::STRIDE + place_by_rows<D>(lane);
    const uint32_t q = smem_address(s.q + place), d_o = smem_address(s.d_o + place);
#pragma unroll 1
    for (int window = 0; window < 2; window++) {
        const int32_t n_middle = s.block.ranges.n_tiles[MIDDLE];
        const int32_t first = window ? max(s.block.first_tile, n_middle) : s.block.first_tile;
        const int32_t end = window ? s.block.end_tile : min(s.block.end_tile, n_middle);
        if (!window && first >= end) continue;
        __syncthreads(); /* nobody reads q and the stages any more */
        if (p.n_stages > 1 && first < end)
            copy_tile<T, D, KEYS>(p, s.block, first, s.stages[0].k, s.stages[0].v);
        load_rows<T, D, LEARN_ROWS>([&](int row) { return block_row(p, s.block, p.q, row); },
                                    window ? NULL : p.alpha + (int64_t)at.g * D, s.q);
        if (window) {
            __syncthreads();
            finish_middle<T, D>(p, at, s, dq);
        }
#pragma unroll 1
        for (int32_t i = first; i < end; i++) {
            const int at_stage = p.n_stages > 1 ? (i - first) % 2 : 0;
            if (p.n_stages == 1) {
                __syncthreads();
                copy_tile<T, D, KEYS>(p, s.block, i, s.stages[0].k, s.stages[0].v);
            }
            wait_for_copies();
            __syncthreads(); /* the tile is there, and nobody reads the one before it any more */
            if (p.n_stages > 1 && i + 1 < end)
                copy_tile<T, D, KEYS>(p, s.block, i + 1, s.stages[1 - at_stage].k,
                                      s.stages[1 - at_stage].v);
            const T *k = s.stages[at_stage].k, *v = s.stages[at_stage].v;
            float x[2][KEYS / 8][4], d[2][KEYS / 8][4];
            multiply_channels<T, D>(x, q, smem_address(k + place_by_columns<D>(lane)));
            multiply_channels<T, D>(d, d_o, smem_address(v + place_by_columns<D>(lane)));
            find_gradients(s.states + rows, lane, p.scale_log2, x, d);
            const key_tile tile = find_tile(s.block.ranges, i, KEYS);
            if (!is_whole(p, s.block.ranges, tile, KEYS))
                set_unseen(p, s.block, tile, rows, lane, 0.0f, d);
            multiply_rows<T, D>(dq, d, smem_address(k + place_by_rows<D>(lane)));
        }
    }
    let_next_kernel_come();
    store_sums<D>(p, at, rows, lane, dq);
}

#endif
