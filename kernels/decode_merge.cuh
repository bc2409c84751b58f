/* decode_merge.cuh: states of warps, then of a unit's parts, become one. */
#ifndef LEANK_DECODE_MERGE_CUH
#define LEANK_DECODE_MERGE_CUH

#include "decode_shape.cuh"

#include <math.h>

/* A column's result, 4 value indices from d on: o and lse, with the sink's logit where there is one. */
template <typename T, int D>
__device__ __forceinline__ void write_out(const decode_params &p, const decode_part &part,
                                          int32_t column, int32_t d, float m, float l,
                                          const float o[4]) {
    const int32_t h = part.head * p.r + column;
    const int64_t at = (int64_t)part.row * (p.layer.n_heads * p.r) + h;
    float factor = 1.0f;
    if (p.sinks && part.end > 0) {
        const float sink = p.sinks[h] * LK_LOG2_E, top = fmaxf(m, sink);
        if (top != -INFINITY) {
            factor = exp2_fast(m - top);
            l = l * factor + exp2_fast(sink - top);
            m = top;
        }
    }
    factor = l == 0.0f ? 0.0f : factor / l;
    T *out = static_cast<T *>(p.o) + at * D + d;
#pragma unroll
    for (int i = 0; i < 4; i++) out[i] = from_float<T>(o[i] * factor);
    if (p.lse && d == 0) p.lse[at] = l == 0.0f ? -INFINITY : (m + log2f(l)) * LK_LN_2;
}

/* Write the state of a column, 4 value indices from d on, for another block to merge. */
template <int D>
__device__ __forceinline__ void put_state(float *state, int32_t r, int32_t column, int32_t d,
                                          float m, float l, const float o[4]) {
    __stcg(reinterpret_cast<float4 *>(state + column * D + d), make_float4(o[0], o[1], o[2], o[3]));
    if (d == 0) {
        __stcg(state + r * D + column, m);
        __stcg(state + r * (D + 1) + column, l);
    }
}

/* States that wait to be merged stand in pairs, one pair for each chunk and each share: of its parts, at most two are
 * not whole units, one that begins in it (second of the pair) and one that began before it (first). */
typedef struct {
    const float *first; /* pair of the first of them */
    int32_t n;          /* how many; all but the first are first of their pairs */
    int32_t begins;     /* the first is the second of its pair */
} state_run;

/* Merge a run, by the helper threads: 4 value indices of a column each, LOADS states at a time so that their loads are in
 * flight together. into NULL: the result is the unit's. */
template <typename T, int D, int COLUMN_TILES>
__device__ __forceinline__ void merge_run(const decode_params &p, const decode_part &part,
                                          const state_run &run, float *into, int32_t thread) {
    constexpr int LOADS = 8;
    const int32_t floats = part_floats(p.r, D);
#pragma unroll 1
    for (int32_t item = thread; item < p.r * (D / 4);
         item += decode_shape<D, COLUMN_TILES>::HELPER_THREADS) {
        const int32_t column = item / (D / 4), d = item % (D / 4) * 4;
        float m = -INFINITY, l = 0.0f, o[4] = {0.0f, 0.0f, 0.0f, 0.0f};
#pragma unroll 1
        for (int32_t k = 0; k < run.n; k += LOADS) {
            float other_m[LOADS], other_l[LOADS];
            float4 other_o[LOADS];
#pragma unroll
            for (int i = 0; i < LOADS; i++) {
                const int32_t at = min(k + i, run.n - 1);
                const float *state =
                    run.first + (int64_t)(2 * at + (at == 0 && run.begins)) * floats;
                other_o[i] = __ldcg(reinterpret_cast<const float4 *>(state + column * D + d));
                other_m[i] = __ldcg(state + p.r * D + column);
                other_l[i] = __ldcg(state + p.r * (D + 1) + column);
            }
            float top = m;
#pragma unroll
            for (int i = 0; i < LOADS; i++) {
                if (k + i >= run.n) other_m[i] = -INFINITY;
                top = fmaxf(top, other_m[i]);
            }
            const float shift = top == -INFINITY ? 0.0f : top; /* no -inf - -inf */
            const float factor = exp2_fast(m - shift);
            m = top;
            l *= factor;
#pragma unroll
            for (int i = 0; i < 4; i++) o[i] *= factor;
#pragma unroll
            for (int i = 0; i < LOADS; i++) {
                const float other_factor = exp2_fast(other_m[i] - shift);
                l += other_l[i] * other_factor;
                o[0] += other_o[i].x * other_factor;
                o[1] += other_o[i].y * other_factor;
                o[2] += other_o[i].z * other_factor;
                o[3] += other_o[i].w * other_factor;
            }
        }
        if (into) put_state<D>(into, p.r, column, d, m, l, o);
        else write_out<T, D>(p, part, column, d, m, l, o);
    }
}

/* Say that n_tiles more are done; true in all helper threads of the block that brings the number to n_all. */
template <typename Smem>
__device__ __forceinline__ bool is_last(const Smem &s, int32_t *counter, int32_t n_tiles,
                                        int32_t n_all, int32_t thread) {
    named_barrier(1, Smem::shape::HELPER_THREADS);
    if (thread == 0) {
        const bool last = add_and_order(counter, n_tiles) + n_tiles == n_all;
        if (last) *counter = 0;
        *s.flag = last;
    }
    named_barrier(1, Smem::shape::HELPER_THREADS);
    return *s.flag;
}

/* One state out of those of the warps, by the helper threads. */
template <typename T, int D, int COLUMN_TILES>
__device__ __forceinline__ void merge_warps(const decode_params &p,
                                            const decode_smem<T, D, COLUMN_TILES> &s,
                                            const decode_part &part, float *into, int32_t thread) {
    using shape = decode_shape<D, COLUMN_TILES>;
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
        else write_out<T, D>(p, part, column, d, m, l, o);
    }
    __syncwarp();
    if (thread % LK_WARP == 0) barrier_arrive(s.states_empty);
}

/* A part is computed. Its state is merged with those of the same unit in the same share by the block that completes
 * them (level 0), and the shares' states by the block that completes the unit (level 1), so that merges are short and
 * many at a time. */
template <typename T, int D, int COLUMN_TILES>
__device__ __forceinline__ void finish_part(const decode_params &p,
                                            const decode_smem<T, D, COLUMN_TILES> &s,
                                            const decode_part &part, int32_t thread) {
    const lk_unit u = lk_unit_make(part.end, part.full_lo, p.layer.sink, s.n_kept[part.head], D);
    const lk_cut cut = lk_cut_make(s.row_base[p.layer.n_rows], gridDim.x, D);
    const int64_t pair = 2 * (int64_t)part_floats(p.r, D);
    const int32_t share = part.chunk / cut.n_chunks, first_chunk = share * cut.n_chunks;
    const int32_t begin = lk_unit_first_tile(&u, part.base, lk_cut_begin(&cut, first_chunk));
    const int32_t end =
        lk_unit_first_tile(&u, part.base, lk_cut_begin(&cut, first_chunk + cut.n_chunks));
    const bool unit_in_share = begin == 0 && end == u.n_tiles;
    float *share_state = NULL; /* or the result */
    if (!unit_in_share) share_state = p.share_states + share * pair + (begin == 0 ? pair / 2 : 0);
    const bool share_in_part = part.tile_begin == begin && part.tile_end == end;
    float *into = share_state;
    if (!share_in_part)
        into = p.chunk_states + part.chunk * pair + (part.tile_begin == 0 ? pair / 2 : 0);
    merge_warps<T, D, COLUMN_TILES>(p, s, part, into, thread);

    int32_t *unit_counter = &p.unit_tiles[part.row * p.layer.n_heads + part.head];
#pragma unroll 1
    for (int level = share_in_part ? 1 : 0; into; level++) {
        int32_t *counter = unit_counter;
        int32_t n_mine = end - begin, n_all = u.n_tiles;
        if (level == 0) {
            /* A share may have many whole units, but only one that began before it, and one that ends after it. */
            if (!unit_in_share) counter = &p.share_tiles[2 * share + (begin == 0)];
            n_mine = part.tile_end - part.tile_begin;
            n_all = end - begin;
        }
        if (!is_last(s, counter, n_mine, n_all, thread)) return;
        const int32_t first_tile = level == 0 ? begin : 0;
        int32_t from = lk_cut_chunk_of(&cut, part.base + lk_unit_cost_before(&u, first_tile));
        int32_t to =
            lk_cut_chunk_of(&cut, part.base + lk_unit_cost_before(&u, first_tile + n_all - 1));
        if (level == 1) {
            from /= cut.n_chunks;
            to /= cut.n_chunks;
        }
        const float *states = level == 0 ? p.chunk_states : p.share_states;
        const state_run run = {states + from * pair, to - from + 1, first_tile == 0};
        into = level == 0 ? share_state : NULL;
        merge_run<T, D, COLUMN_TILES>(p, part, run, into, thread);
    }
}

#endif
