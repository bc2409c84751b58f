/* learn_keys.cuh: the gradients of 64 keys of the span, over all query rows that see any of them: dk and dv.
 *
 * As the rows' kernel with the sides exchanged: logits are keys by rows. Pairs of middle keys come first, with alpha * k in
 * shared memory; their sum of dS * q is multiplied by alpha, and that of window pairs is added. */
#ifndef LEANK_LEARN_KEYS_CUH
#define LEANK_LEARN_KEYS_CUH

#include "learn.cuh"

template <typename T, int D> struct keys_smem {
    static constexpr int KEYS = LEARN_SPAN_KEYS, ROWS = LEARN_SPAN_ROWS;
    static constexpr int STRIDE = learn_tile<D>::STRIDE;
    alignas(16) T k[KEYS * STRIDE];
    alignas(16) T v[KEYS * STRIDE];
    struct stage {
        alignas(16) T q[ROWS * STRIDE], d_o[ROWS * STRIDE];
        alignas(16) float2 states[ROWS]; /* shift and delta */
    } stages[2];
};

/* A block's unit and keys: t of the span, [first, last] of which are real. */
typedef struct {
    int32_t b, g, unit, first_key, first_real, last_real, start;
    bool hidden;
} key_block;

__device__ __forceinline__ key_block find_key_block(const learn_params &p) {
    key_block at;
    at.unit = (int32_t)blockIdx.x / p.key_blocks;
    at.b = at.unit / p.n_heads;
    at.g = at.unit % p.n_heads;
    at.first_key = (int32_t)blockIdx.x % p.key_blocks * LEARN_SPAN_KEYS;
    at.start = learn_start(p, at.b);
    at.hidden = p.hidden && p.hidden[at.g];
    at.first_real = max(at.first_key, at.start - p.n_context);
    at.last_real = min(at.first_key + LEARN_SPAN_KEYS, p.n_columns) - 1;
    return at;
}

__device__ __forceinline__ bool is_sink(const learn_params &p, const key_block &at, int32_t t) {
    return p.n_context + t - at.start < p.sink;
}

/* Query rows [x, y) to which key t of the span is a window key, or a middle one. */
__device__ __forceinline__ int2 seen_rows(const learn_params &p, const key_block &at, int window,
                                          int32_t t) {
    const int32_t visible = t * p.r, far = visible + p.recent_rows;
    const int32_t middle = is_sink(p, at, t) ? p.n_query_rows : min(far, p.n_query_rows);
    if (window) return make_int2(visible, middle);
    return make_int2(at.hidden ? p.n_query_rows : middle, p.n_query_rows);
}

/* Query rows from first_row on, zeros past the end and where columns are padding. */
template <typename T, int D>
__device__ __forceinline__ void copy_rows(const learn_params &p, const key_block &at,
                                          int32_t first_row, int32_t end_row,
                                          typename keys_smem<T, D>::stage *to) {
    constexpr int ROWS = LEARN_SPAN_ROWS, WORDS = learn_tile<D>::WORDS;
    constexpr int STRIDE = learn_tile<D>::STRIDE;
    const int32_t first_real = learn_first_real(p, at.start);
#pragma unroll
    for (int n = 0; n < (ROWS * WORDS + LEARN_THREADS - 1) / LEARN_THREADS; n++) {
        const int i = n * LEARN_THREADS + (int)threadIdx.x;
        if (ROWS * WORDS % LEARN_THREADS != 0 && i >= ROWS * WORDS) break;
        const int row = i / WORDS, word = i % WORDS;
        const bool wanted = first_row + row < end_row && first_row + row >= first_real;
        const int32_t from = wanted ? first_row + row : first_row;
        const T *q = query_row<T>(p, p.q, at.b, at.g, from);
        const T *d_o = query_row<T>(p, p.d_o, at.b, at.g, from);
        copy_16(smem_address(to->q + row * STRIDE + word * 8), q + word * 8, wanted);
        copy_16(smem_address(to->d_o + row * STRIDE + word * 8), d_o + word * 8, wanted);
    }
    if (threadIdx.x < ROWS) {
        const bool wanted = first_row + (int32_t)threadIdx.x < end_row;
        const int32_t from = wanted ? first_row + (int32_t)threadIdx.x : first_row;
        copy_8(smem_address(to->states + threadIdx.x),
               p.states + (int64_t)at.unit * p.n_query_rows + from, wanted);
    }
    end_copies();
}

/* Logits and dP of keys by rows become probabilities and gradients of logits; 0 where a key is not seen. */
template <int N>
__device__ __forceinline__ void find_gradients(const float2 *states, const int2 (&seen)[2],
                                               int32_t first_row, int lane, float scale_log2,
                                               float (&x)[1][N][4], float (&d)[1][N][4]) {
#pragma unroll
    for (int n = 0; n < N; n++) {
#pragma unroll
        for (int e = 0; e < 2; e++) {
            const int row = 8 * n + 2 * (lane % 4) + e;
            const float2 state = states[row];
#pragma unroll
            for (int half = 0; half < 2; half++) {
                const bool wanted =
                    first_row + row >= seen[half].x && first_row + row < seen[half].y;
                float &logit = x[0][n][2 * half + e], &grad = d[0][n][2 * half + e];
                const float weight = exp2_fast(fmaf(logit, scale_log2, -state.x));
                logit = wanted ? weight : 0.0f;
                grad = wanted ? weight * (grad - state.y) : 0.0f;
            }
        }
    }
}

/* This warp's 16 keys of a gradient [B, Hkv, T, D], times a factor; zeros for padding. */
template <typename T, int D>
__device__ __forceinline__ void store_gradient(const learn_params &p, const key_block &at, int keys,
                                               int lane, float factor,
                                               const float (&x)[1][D / 8][4], void *gradient) {
#pragma unroll
    for (int half = 0; half < 2; half++) {
        const int32_t t = at.first_key + keys + 8 * half + lane / 4;
        if (t >= p.n_columns) continue;
        const bool real = t >= at.first_real;
        T *to = static_cast<T *>(gradient) + ((int64_t)at.unit * p.n_columns + t) * D;
#pragma unroll
        for (int n = 0; n < D / 8; n++)
            *reinterpret_cast<uint32_t *>(to + 8 * n + 2 * (lane % 4)) =
                real ? pack2<T>(x[0][n][2 * half] * factor, x[0][n][2 * half + 1] * factor) : 0;
    }
}

template <typename T, int D>
__global__ void __launch_bounds__(LEARN_THREADS, LEARN_BLOCKS_PER_PROCESSOR(D))
    learn_keys_kernel(const __grid_constant__ learn_params p) {
    constexpr int KEYS = LEARN_SPAN_KEYS, ROWS = LEARN_SPAN_ROWS;
    extern __shared__ __align__(16) unsigned char memory[];
    keys_smem<T, D> &s = *reinterpret_cast<keys_smem<T, D> *>(memory);
    const int lane = (int)threadIdx.x % LK_WARP, keys = (int)threadIdx.x / LK_WARP * 16;
    const key_block at = find_key_block(p);
    const T *k_first = static_cast<const T *>(p.k.data) + at.b * p.k.stride[0] +
                       at.g * p.k.stride[1] + at.first_key * p.k.stride[2];
    const T *v_first = static_cast<const T *>(p.v.data) + at.b * p.v.stride[0] +
                       at.g * p.v.stride[1] + at.first_key * p.v.stride[2];
    const auto is_real = [&](int row) {
        return at.first_key + row >= at.first_real && at.first_key + row <= at.last_real;
    };
    load_rows<T, D, KEYS>(
        [&](int row) { return is_real(row) ? v_first + row * p.v.stride[2] : NULL; }, NULL, s.v);

    float dk[1][D / 8][4], dv[1][D / 8][4];
#pragma unroll
    for (int n = 0; n < D / 8; n++)
#pragma unroll
        for (int e = 0; e < 4; e++) dk[0][n][e] = dv[0][n][e] = 0.0f;
    const int place = keys * learn_tile<D>::STRIDE + place_by_rows<D>(lane);
    wait_for_earlier_kernels(); /* shift and delta come from the rows' kernel */
    let_next_kernel_come();
#pragma unroll 1
    for (int window = 0; window < 2; window++) {
        /* Rows that any key of the block has. Sinks come first, and are middle keys of none. */
        const int32_t past_sink = at.start + p.sink - p.n_context;
        const int32_t t = window ? at.first_real : max(at.first_real, past_sink);
        if (t > at.last_real) continue;
        const int32_t first = seen_rows(p, at, window, t).x;
        const int32_t end =
            max(seen_rows(p, at, window, t).y, seen_rows(p, at, window, at.last_real).y);
        if (first >= end) continue;
        __syncthreads(); /* nobody reads k and the stages any more */
        copy_rows<T, D>(p, at, first, end, &s.stages[0]);
        load_rows<T, D, KEYS>(
            [&](int row) { return is_real(row) ? k_first + row * p.k.stride[2] : NULL; },
            window ? NULL : p.alpha + (int64_t)at.g * D, s.k);
        int2 seen[2];
#pragma unroll
        for (int half = 0; half < 2; half++) {
            const int row = keys + 8 * half + lane / 4;
            seen[half] =
                is_real(row) ? seen_rows(p, at, window, at.first_key + row) : make_int2(0, 0);
        }
#pragma unroll 1
        for (int32_t i = first, at_stage = 0; i < end; i += ROWS, at_stage = 1 - at_stage) {
            wait_for_copies();
            __syncthreads(); /* the tile is there, and nobody reads the one before it any more */
            if (i + ROWS < end) copy_rows<T, D>(p, at, i + ROWS, end, &s.stages[1 - at_stage]);
            const auto &stage = s.stages[at_stage];
            float x[1][ROWS / 8][4], d[1][ROWS / 8][4];
            multiply_channels<T, D>(x, smem_address(s.k + place),
                                    smem_address(stage.q + place_by_columns<D>(lane)));
            multiply_channels<T, D>(d, smem_address(s.v + place),
                                    smem_address(stage.d_o + place_by_columns<D>(lane)));
            find_gradients(stage.states, seen, i, lane, p.scale_log2, x, d);
            multiply_rows<T, D>(dv, x, smem_address(stage.d_o + place_by_rows<D>(lane)));
            multiply_rows<T, D>(dk, d, smem_address(stage.q + place_by_rows<D>(lane)));
        }
        if (!window) {
            const float *alpha = p.alpha + (int64_t)at.g * D + 2 * (lane % 4);
#pragma unroll
            for (int n = 0; n < D / 8; n++)
#pragma unroll
                for (int e = 0; e < 4; e++) dk[0][n][e] *= alpha[8 * n + e % 2];
        }
    }
    store_gradient<T, D>(p, at, keys, lane, p.scale, dk, p.dk);
    store_gradient<T, D>(p, at, keys, lane, 1.0f, dv, p.dv);
}

#endif
