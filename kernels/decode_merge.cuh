/* decode_merge.cuh: the states of a part's warps become one: the unit's result, or a state that combine.cu merges with
 * those of the unit's other parts. */
#ifndef LEANK_DECODE_MERGE_CUH
#define LEANK_DECODE_MERGE_CUH

#include "decode_shape.cuh"

#include <math.h>

/* A column's result, 4 neighbouring value indices from d on: o and lse, with the sink's logit where there is one. */
template <typename T>
__device__ __forceinline__ void write_out(const decode_params &p, int32_t row, int32_t head,
                                          bool has_keys, int32_t column, int32_t d, float m,
                                          float l, const float o[4]) {
    const int32_t h = head * p.r + column;
    const int64_t at = (int64_t)row * (p.layer.n_heads * p.r) + h;
    float factor = 1.0f;
    if (p.sinks && has_keys) {
        const float sink = p.sinks[h] * LK_LOG2_E, top = fmaxf(m, sink);
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

/* By the helper threads. combine.cu is told which chunks have a unit's first and last tile. */
template <typename T, int D, int COLUMN_TILES>
__device__ __forceinline__ void finish_part(const decode_params &p,
                                            const decode_smem<T, D, COLUMN_TILES> &s,
                                            const decode_part &part, int32_t thread) {
    using shape = decode_shape<D, COLUMN_TILES>;
    const bool begins = part.tile_begin == 0;
    float *into = begins && part.ends ? NULL : p.states + part_place(p, part.chunk, begins);
    int2 *chunks = &p.unit_chunks[part.row * p.layer.n_heads + part.head];
    if (thread == 0 && begins) chunks->x = part.chunk;
    if (thread == 0 && part.ends) chunks->y = part.chunk;
#pragma unroll 1
    for (int32_t item = thread; item < p.r * (D / 4); item += shape::HELPER_THREADS) {
        const int32_t column = item / (D / 4), d = item % (D / 4) * 4;
        const float *states = s.states + column * shape::STATE_FLOATS;
        float m = -INFINITY, l = 0.0f, o[4] = {0.0f, 0.0f, 0.0f, 0.0f};
#pragma unroll
        for (int k = 0; k < shape::COMPUTE_WARPS; k++)
            m = fmaxf(m, states[k * p.r * shape::STATE_FLOATS + D]);
        const float shift = m == -INFINITY ? 0.0f : m;
#pragma unroll
        for (int k = 0; k < shape::COMPUTE_WARPS; k++) {
            const float *state = states + k * p.r * shape::STATE_FLOATS;
            const float factor = exp2_fast(state[D] - shift);
            l += state[D + 1] * factor;
#pragma unroll
            for (int i = 0; i < 4; i++) o[i] += state[d + i] * factor;
        }
        if (into) put_state<D>(into, p.r, column, d, m, l, o);
        else write_out<T>(p, part.row, part.head, part.end > 0, column, d, m, l, o);
    }
    barrier_arrive(s.states_empty);
}

#endif
