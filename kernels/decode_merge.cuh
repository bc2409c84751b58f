/* decode_merge.cuh: the states of a part's warps become one: the unit's result, or a state that combine.cu merges with
 * those of the unit's other parts. */
#ifndef LEANK_DECODE_MERGE_CUH
#define LEANK_DECODE_MERGE_CUH

#include "decode_shape.cuh"

#include <math.h>

/* A column's result, 4 neighbouring value indices from d on: o and lse, with the sink's logit where there is one.
 * query: which of [B, Hq, n_t] it is. */
template <typename T>
__device__ __forceinline__ void write_out(const decode_params &p, int32_t query, bool has_keys,
                                          int32_t d, float m, float l, const float o[4]) {
    int32_t h = query;
    int64_t at = query;
    if (p.o_stride > 1) {
        h = query / p.n_t;
        at = (int64_t)h * p.o_stride + query % p.n_t;
    }
    float factor = 1.0f;
    if (p.sinks && has_keys) {
        const float sink = p.sinks[h % p.n_q_heads] * LK_LOG2_E, top = fmaxf(m, sink);
        if (top != -INFINITY) {
            factor = exp2_fast(m - top);
            l = l * factor + exp2_fast(sink - top);
            m = top;
        }
    }
    factor = l == 0.0f ? 0.0f : factor / l;
    const uint2 words = {pack2<T>(o[0] * factor, o[1] * factor),
                         pack2<T>(o[2] * factor, o[3] * factor)};
    *reinterpret_cast<uint2 *>(static_cast<T *>(p.o) + at * p.layer.head_dim + d) = words;
    if (p.lse && d == 0) p.lse[at] = l == 0.0f ? -INFINITY : (m + log2f(l)) * LK_LN_2;
}

/* Which of the queries [B, Hq, n_t] column `column` of a unit is; -1 past the last one. Columns are in the order of tokens,
 * so that those of a unit see nearly the same keys. */
__device__ __forceinline__ int32_t find_query(const decode_params &p, int32_t unit,
                                              int32_t column) {
    if (p.n_t == 1) return unit * p.r + column;
    column += unit % p.column_blocks * p.r;
    if (column >= p.n_columns) return -1;
    const int32_t r = p.n_columns / p.n_t;
    return unit / p.column_blocks * p.n_columns + column % r * p.n_t + column / r;
}

/* Where in `states` the state of a chunk's part of a unit is. A chunk has at most two parts that are not whole units: one
 * that begins before it (first of a pair), one that begins in it. */
__device__ __forceinline__ int32_t part_place(const decode_params &p, int32_t chunk, bool begins) {
    return (2 * chunk + begins) * part_floats(p.r, p.layer.head_dim);
}

/* Write the state of a column, 4 value indices from d on, for combine.cu. */
template <int D>
__device__ __forceinline__ void put_state(float *state, int32_t r, int32_t column, int32_t d,
                                          float m, float l, const float o[4]) {
    __stcg(reinterpret_cast<float4 *>(state + column * D + d), make_float4(o[0], o[1], o[2], o[3]));
    if (d == 0) {
        __stcg(state + r * D + column, m);
        __stcg(state + r * (D + 1) + column, l);
    }
}

/* Take the same column of n warps together, 4 value indices from d on. step: floats from a warp's state to the next one's. */
template <int D>
__device__ __forceinline__ void merge_warps(const float *states, int32_t step, const int n,
                                            int32_t d, float *m, float *l, float o[4]) {
    *m = -INFINITY;
    *l = o[0] = o[1] = o[2] = o[3] = 0.0f;
#pragma unroll
    for (int k = 0; k < n; k++) *m = fmaxf(*m, states[k * step + D]);
    const float shift = *m == -INFINITY ? 0.0f : *m;
#pragma unroll
    for (int k = 0; k < n; k++) {
        const float *state = states + k * step;
        const float factor = exp2_fast(state[D] - shift);
        *l += state[D + 1] * factor;
#pragma unroll
        for (int i = 0; i < 4; i++) o[i] += state[d + i] * factor;
    }
}

/* By the helper threads. combine.cu is told which chunks have a unit's first and last tile. */
template <typename T, int D, int COLUMN_TILES>
__device__ __forceinline__ void finish_part(const decode_params &p,
                                            const decode_smem<T, D, COLUMN_TILES> &s,
                                            const decode_part &part, int32_t thread) {
    using shape = decode_shape<D, COLUMN_TILES>;
    const bool begins = part.tile_begin == 0;
    float *into = begins && part.ends ? NULL : p.states + part_place(p, part.chunk, begins);
    const int32_t unit = part.row * p.layer.n_heads + part.head, first_query = unit * p.r;
    int2 *chunks = &p.unit_chunks[unit];
    if (thread == 0 && begins) chunks->x = part.chunk;
    if (thread == 0 && part.ends) chunks->y = part.chunk;
#pragma unroll 1
    for (int32_t item = thread; item < p.r * (D / 4); item += shape::HELPER_THREADS) {
        const int32_t column = item / (D / 4), d = item % (D / 4) * 4;
        float m, l, o[4];
        merge_warps<D>(s.states + column * shape::STATE_FLOATS, p.r * shape::STATE_FLOATS,
                       shape::COMPUTE_WARPS, d, &m, &l, o);
        if (into) put_state<D>(into, p.r, column, d, m, l, o);
        else write_out<T>(p, first_query + column, part.end > 0, d, m, l, o);
    }
    barrier_arrive(s.states_empty);
}

#endif
