/* learn_forward.cuh: 128 query rows of a unit over a share of the keys that they see: o, m and l of each row.
 *
 * Middle keys come first, with alpha * q in shared memory, then window keys with q. Of a tile in which keys are middle for
 * some rows and window for others, each pass takes its own pairs. A warp has 32 rows, so that each fragment of K and V that
 * is read serves two products. */
#ifndef LEANK_LEARN_FORWARD_CUH
#define LEANK_LEARN_FORWARD_CUH

#include "learn.cuh"

template <typename T, int D> struct forward_smem {
    static constexpr int KEYS = LEARN_FORWARD_KEYS, STRIDE = learn_tile<D>::STRIDE;
    row_block_shared<T> block;
    alignas(16) T q[LEARN_ROWS * STRIDE];
    struct stage {
        alignas(16) T k[KEYS * STRIDE], v[KEYS * STRIDE];
    } stages[2]; /* n_stages of them are there */

    static size_t bytes(int32_t n_stages) {
        return sizeof(forward_smem) - (size_t)(2 - n_stages) * sizeof(stage);
    }
};

/* A logit may exceed m by this much (in base 2) before m is raised: any m gives the same result, and probabilities up to
 * 2^8 fit in f16 too. So most tiles do without a maximum over lanes. */
#define LEARN_M_SLACK 8.0f

/* What one warp keeps. Row 16 m + 8 half + lane / 4 of its rows has m[m][half]; l is summed over lanes at the end. */
template <int D> struct forward_state {
    float o[2][D / 8][4];
    float m[2][2], l[2][2];
};

/* The largest logit of a row that this lane holds. */
template <int N> __device__ __forceinline__ float largest(const float (&x)[N][4], const int half) {
    float most = fmaxf(x[0][2 * half], x[0][2 * half + 1]);
#pragma unroll
    for (int n = 1; n < N; n++) most = fmaxf(most, fmaxf(x[n][2 * half], x[n][2 * half + 1]));
    return most;
}

/* Logits become probabilities, and the state goes on to them. */
template <int D, int N>
__device__ __forceinline__ void take_logits(forward_state<D> &w, float (&x)[2][N][4]) {
    bool above = false;
#pragma unroll
    for (int m = 0; m < 2; m++)
#pragma unroll
        for (int half = 0; half < 2; half++)
            above |= largest(x[m], half) > w.m[m][half] + LEARN_M_SLACK;
    if (__any_sync(LK_ALL, above)) {
#pragma unroll
        for (int m = 0; m < 2; m++) {
#pragma unroll
            for (int half = 0; half < 2; half++) {
                float most = largest(x[m], half);
                most = fmaxf(most, __shfl_xor_sync(LK_ALL, most, 1));
                most = fmaxf(most, __shfl_xor_sync(LK_ALL, most, 2));
                most = fmaxf(most, w.m[m][half]);
                /* No -inf - -inf where a row has seen nothing. */
                const float factor = most == -INFINITY ? 1.0f : exp2_fast(w.m[m][half] - most);
                w.m[m][half] = most;
                w.l[m][half] *= factor;
#pragma unroll
                for (int n = 0; n < D / 8; n++) {
                    w.o[m][n][2 * half] *= factor;
                    w.o[m][n][2 * half + 1] *= factor;
                }
            }
        }
    }
#pragma unroll
    for (int m = 0; m < 2; m++) {
#pragma unroll
        for (int half = 0; half < 2; half++) {
            const float shift = w.m[m][half] == -INFINITY ? 0.0f : w.m[m][half];
            float sum = 0.0f;
#pragma unroll
            for (int n = 0; n < N; n++) {
#pragma unroll
                for (int e = 2 * half; e < 2 * half + 2; e++) {
                    x[m][n][e] = exp2_fast(x[m][n][e] - shift);
                    sum += x[m][n][e];
                }
            }
            w.l[m][half] += sum;
        }
    }
}

template <typename T, int D>
__global__ void __launch_bounds__(LEARN_THREADS, LEARN_BLOCKS_PER_PROCESSOR(D))
    learn_forward_kernel(const __grid_constant__ learn_params p) {
    constexpr int KEYS = LEARN_FORWARD_KEYS;
    extern __shared__ __align__(16) unsigned char memory[];
    forward_smem<T, D> &s = *reinterpret_cast<forward_smem<T, D> *>(memory);
    const int lane = (int)threadIdx.x % LK_WARP, rows = (int)threadIdx.x / LK_WARP * 32;
    fill_shared(p, KEYS, &s.block);
    const row_block &at = s.block.at;

    forward_state<D> w;
#pragma unroll
    for (int m = 0; m < 2; m++) {
#pragma unroll
        for (int n = 0; n < D / 8; n++)
#pragma unroll
            for (int e = 0; e < 4; e++) w.o[m][n][e] = 0.0f;
#pragma unroll
        for (int half = 0; half < 2; half++) {
            w.m[m][half] = -INFINITY;
            w.l[m][half] = 0.0f;
        }
    }
    const uint32_t q = smem_address(s.q + rows * learn_tile<D>::STRIDE + place_by_rows<D>(lane));
#pragma unroll 1
    for (int window = 0; window < 2; window++) {
        const int32_t n_middle = s.block.ranges.n_tiles[MIDDLE];
        const int32_t first = window ? max(s.block.first_tile, n_middle) : s.block.first_tile;
        const int32_t end = window ? s.block.end_tile : min(s.block.end_tile, n_middle);
        if (first >= end) continue;
        __syncthreads(); /* nobody reads q and the stages any more */
        if (p.n_stages > 1) copy_tile<T, D, KEYS>(p, s.block, first, s.stages[0].k, s.stages[0].v);
        load_rows<T, D, LEARN_ROWS>([&](int row) { return block_row(p, s.block, p.q, row); },
                                    window ? NULL : p.alpha + (int64_t)at.g * D, s.q);
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
            float x[2][KEYS / 8][4];
            multiply_channels<T, D>(x, q,
                                    smem_address(s.stages[at_stage].k + place_by_columns<D>(lane)));
#pragma unroll
            for (int m = 0; m < 2; m++)
#pragma unroll
                for (int n = 0; n < KEYS / 8; n++)
#pragma unroll
                    for (int e = 0; e < 4; e++) x[m][n][e] *= p.scale_log2;
            const key_tile tile = find_tile(s.block.ranges, i, KEYS);
            if (!is_whole(p, s.block.ranges, tile, KEYS))
                set_unseen(p, s.block, tile, rows, lane, -INFINITY, x);
            take_logits(w, x);
            multiply_rows<T, D>(w.o, x,
                                smem_address(s.stages[at_stage].v + place_by_rows<D>(lane)));
        }
    }

    let_next_kernel_come();
    store_sums<D>(p, at, rows, lane, w.o);
    const int64_t n_units = (int64_t)p.n_rows * p.n_heads;
#pragma unroll
    for (int m = 0; m < 2; m++) {
#pragma unroll
        for (int half = 0; half < 2; half++) {
            float sum = w.l[m][half];
            sum += __shfl_xor_sync(LK_ALL, sum, 1);
            sum += __shfl_xor_sync(LK_ALL, sum, 2);
            const int32_t i = at.first_row + rows + 16 * m + 8 * half + lane / 4;
            if (lane % 4 == 0 && i < p.n_query_rows)
                p.states[(at.split * n_units + at.unit) * p.n_query_rows + i] =
                    make_float2(w.m[m][half], sum);
        }
    }
}

#endif
