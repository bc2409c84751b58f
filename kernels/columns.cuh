/* columns.cuh: the softmax state of the query columns that a warp has, and how it takes in groups of 16 tokens.
 *
 * Tokens are the rows of the first product and columns its columns, 8 in a tile. Logits x[n][4] are those of column tile n, as
 * the matrix units hold them: this lane has tokens lane / 4 and lane / 4 + 8 (x[..][2], [3]) of columns 2 (lane % 4) and
 * the next one. */
#ifndef LEANK_COLUMNS_CUH
#define LEANK_COLUMNS_CUH

#include "decode_shape.cuh"

#include <math.h>

/* o of the first n_columns of a column tile into shared memory, LK_STATE_FLOATS(D) from each other. */
template <int D>
__device__ __forceinline__ void put_values(const float (&o)[D / 16][4], float *states,
                                           int32_t n_columns, int lane) {
#pragma unroll
    for (int i = 0; i < 2; i++) {
        const int32_t column = 2 * (lane % 4) + i;
        if (column >= n_columns) continue;
        float *state = states + column * LK_STATE_FLOATS(D);
#pragma unroll
        for (int t = 0; t < D / 16; t++) {
            state[16 * t + lane / 4] = o[t][i];
            state[16 * t + 8 + lane / 4] = o[t][i + 2];
        }
    }
}

/* Column 8 n + 2 (lane % 4) + i of column tile n has m[n][i]; l is summed over lanes at the end. */
template <int D, int COLUMN_TILES> struct column_state {
    float o[COLUMN_TILES][D / 16][4];
    float m[COLUMN_TILES][2], l[COLUMN_TILES][2];

    __device__ __forceinline__ void clear() {
#pragma unroll
        for (int n = 0; n < COLUMN_TILES; n++) {
#pragma unroll
            for (int t = 0; t < D / 16; t++)
#pragma unroll
                for (int i = 0; i < 4; i++) o[n][t][i] = 0.0f;
#pragma unroll
            for (int i = 0; i < 2; i++) {
                m[n][i] = -INFINITY;
                l[n][i] = 0.0f;
            }
        }
    }

    /* The first n_columns of column tile n into shared memory, LK_STATE_FLOATS(D) each: o [D], m, l. */
    __device__ __forceinline__ void put(const int n, float *states, int32_t n_columns, int lane) {
#pragma unroll
        for (int i = 0; i < 2; i++) {
            float sum = l[n][i];
#pragma unroll
            for (int step = 4; step < LK_WARP; step *= 2) sum += __shfl_xor_sync(LK_ALL, sum, step);
            const int32_t column = 2 * (lane % 4) + i;
            if (lane >= 4 || column >= n_columns) continue;
            states[column * LK_STATE_FLOATS(D) + D] = m[n][i];
            states[column * LK_STATE_FLOATS(D) + D + 1] = sum;
        }
        put_values<D>(o[n], states, n_columns, lane);
    }
};

/* ------------------------------------------------------------------------------------------ q as operands */

/* Place in `order` of the channels that a lane multiplies in register `half` of slot t of q. Slots hold the kept
 * channels, then the dropped ones; where both counts are 8 more than a multiple of 16, the slot between them holds the
 * last 8 of each. */
__device__ __forceinline__ int32_t q_place(int32_t t, int32_t half, int32_t n_kept,
                                           int32_t head_dim) {
    const int32_t n_full = n_kept / 16;
    if (n_kept % 16 == 0 || t < n_full) return 16 * t + 8 * half;
    if (t > n_full) return 16 * t - 8 + 8 * half;
    return half == 0 ? 16 * n_full : head_dim - 8;
}

/* q of a part as the operands of its products: word [n][t][lane][half] is register `half` of slot t of column tile n, of
 * n_tiles. rows [n_columns] of q, row_stride elements from each other; order [D] of the head. By n_threads threads. */
template <int D>
__device__ __forceinline__ void make_q_operand(const uint16_t *rows, int32_t row_stride,
                                               const uint8_t *order, int32_t n_columns,
                                               int32_t n_tiles, int32_t n_kept, uint32_t *q_operand,
                                               int32_t thread, int32_t n_threads) {
#pragma unroll 2
    for (int32_t i = thread; i < n_tiles * (D / 16) * LK_WARP * 2; i += n_threads) {
        const int32_t half = i % 2, lane = i / 2 % LK_WARP, slot = i / 2 / LK_WARP;
        const int32_t column = slot / (D / 16) * 8 + lane / 4;
        const int32_t at = q_place(slot % (D / 16), half, n_kept, D) + 2 * (lane % 4);
        uint32_t word = 0;
        if (column < n_columns) {
            const uint16_t *row = rows + column * row_stride;
            word = (uint32_t)row[order[at]] | (uint32_t)row[order[at + 1]] << 16;
        }
        q_operand[i] = word;
    }
}

/* ------------------------------------------------------------------------------- q . k, with q in shared memory */

/* logits += q . k of a group over n_slots slots of q from `first` on. q: word [n][slot][lane][half], see make_q_operand; tiles
 * stand one after the other. */
template <typename T, int D, int COLUMN_TILES>
__device__ __forceinline__ void add_shared_slots(const uint32_t *q, int32_t first, int32_t n_slots,
                                                 const unsigned char *tiles, int lane,
                                                 float (&x)[COLUMN_TILES][4]) {
    q += (first * LK_WARP + lane) * 2;
    tiles += 16 * lane;
#pragma unroll 2
    for (int32_t t = 0; t < n_slots; t++) {
        const uint4 a = *reinterpret_cast<const uint4 *>(tiles + 512 * t);
#pragma unroll
        for (int n = 0; n < COLUMN_TILES; n++) {
            const uint2 b = *reinterpret_cast<const uint2 *>(q + (n * (D / 16) + t) * LK_WARP * 2);
            mma_16<T>(x[n], a, b.x, b.y);
        }
    }
}

/* The same over the 8 channels that are half of a slot. */
template <typename T, int D, int COLUMN_TILES>
__device__ __forceinline__ void add_shared_half(const uint32_t *q, int32_t slot, int half,
                                                const unsigned char *tile, int lane,
                                                float (&x)[COLUMN_TILES][4]) {
    const uint2 a = *reinterpret_cast<const uint2 *>(tile + 8 * lane);
#pragma unroll
    for (int n = 0; n < COLUMN_TILES; n++)
        mma_8<T>(x[n], a, q[((n * (D / 16) + slot) * LK_WARP + lane) * 2 + half]);
}

/* Over the kept channels. */
template <typename T, int D, int COLUMN_TILES>
__device__ __forceinline__ void add_shared_kept(const uint32_t *q, int32_t n_kept,
                                                const unsigned char *tiles, int lane,
                                                float (&x)[COLUMN_TILES][4]) {
    const int32_t n_full = n_kept / 16;
    add_shared_slots<T, D, COLUMN_TILES>(q, 0, n_full, tiles, lane, x);
    if (n_kept % 16 != 0)
        add_shared_half<T, D, COLUMN_TILES>(q, n_full, 0, tiles + 512 * n_full, lane, x);
}

/* Over the dropped ones. */
template <typename T, int D, int COLUMN_TILES>
__device__ __forceinline__ void add_shared_dropped(const uint32_t *q, int32_t n_kept,
                                                   const unsigned char *tiles, int lane,
                                                   float (&x)[COLUMN_TILES][4]) {
    const int32_t n_full = (D - n_kept) / 16;
    add_shared_slots<T, D, COLUMN_TILES>(q, D / 16 - n_full, n_full, tiles, lane, x);
    if (n_kept % 16 != 0)
        add_shared_half<T, D, COLUMN_TILES>(q, n_kept / 16, 1, tiles + 512 * n_full, lane, x);
}

/* ------------------------------------------------------------------------------------------ softmax and values */

/* From q . k to logits in base 2. */
template <int N>
__device__ __forceinline__ void scale_logits(const decode_params &p, float (&x)[N][4]) {
    if (p.softcap > 0.0f) {
#pragma unroll
        for (int n = 0; n < N; n++)
#pragma unroll
            for (int i = 0; i < 4; i++)
                x[n][i] = p.softcap * LK_LOG2_E * tanhf(x[n][i] * (p.scale / p.softcap));
    } else {
        const float scale_log2 = p.scale * LK_LOG2_E;
#pragma unroll
        for (int n = 0; n < N; n++)
#pragma unroll
            for (int i = 0; i < 4; i++) x[n][i] *= scale_log2;
    }
}

/* A logit may exceed m by this much (in base 2) before m is raised: any m gives the same result, probabilities are
 * divided by their sum in the end, and those up to 2^8 fit in f16 too. So most tiles do without a maximum over lanes. */
#define LK_M_SLACK 8.0f

/* Take the logits of a group into the state: they become the operands of the product with V. */
template <typename T, int D, int COLUMN_TILES>
__device__ __forceinline__ void take_logits(column_state<D, COLUMN_TILES> &w,
                                            float (&x)[COLUMN_TILES][4],
                                            uint32_t (&operand)[COLUMN_TILES][2]) {
    bool above = false;
#pragma unroll
    for (int n = 0; n < COLUMN_TILES; n++)
        above |= fmaxf(x[n][0], x[n][2]) > w.m[n][0] + LK_M_SLACK ||
                 fmaxf(x[n][1], x[n][3]) > w.m[n][1] + LK_M_SLACK;
    if (__any_sync(LK_ALL, above)) {
#pragma unroll
        for (int n = 0; n < COLUMN_TILES; n++) {
            float factor[2];
#pragma unroll
            for (int i = 0; i < 2; i++) {
                float top = fmaxf(x[n][i], x[n][i + 2]);
#pragma unroll
                for (int step = 4; step < LK_WARP; step *= 2)
                    top = fmaxf(top, __shfl_xor_sync(LK_ALL, top, step));
                top = fmaxf(top, w.m[n][i]);
                /* No -inf - -inf where a column has seen nothing. */
                factor[i] = top == -INFINITY ? 1.0f : exp2_fast(w.m[n][i] - top);
                w.m[n][i] = top;
                w.l[n][i] *= factor[i];
            }
#pragma unroll
            for (int t = 0; t < D / 16; t++)
#pragma unroll
                for (int i = 0; i < 4; i++) w.o[n][t][i] *= factor[i % 2];
        }
    }
#pragma unroll
    for (int n = 0; n < COLUMN_TILES; n++) {
#pragma unroll
        for (int i = 0; i < 4; i++) {
            const float m = w.m[n][i % 2];
            x[n][i] = exp2_fast(x[n][i] - (m == -INFINITY ? 0.0f : m));
        }
#pragma unroll
        for (int i = 0; i < 2; i++) w.l[n][i] += x[n][i] + x[n][i + 2];
        operand[n][0] = transpose_8x8(pack2<T>(x[n][0], x[n][1]));
        operand[n][1] = transpose_8x8(pack2<T>(x[n][2], x[n][3]));
    }
}

/* o += V^T P of G groups; V of the next group stands 32 D bytes later. */
template <typename T, int G, int D, int COLUMN_TILES>
__device__ __forceinline__ void
add_values(float (&o)[COLUMN_TILES][D / 16][4], const unsigned char *v,
           const uint32_t (&operand)[G * COLUMN_TILES][2], int lane) {
    v += 16 * lane;
#pragma unroll
    for (int t = 0; t < D / 16; t++) {
#pragma unroll
        for (int g = 0; g < G; g++) {
            const uint4 a = *reinterpret_cast<const uint4 *>(v + 512 * t + g * 32 * D);
#pragma unroll
            for (int n = 0; n < COLUMN_TILES; n++)
                mma_16<T>(o[n][t], a, operand[g * COLUMN_TILES + n][0],
                          operand[g * COLUMN_TILES + n][1]);
        }
    }
}

/* The same of one group, of which some tokens are attended to. first: the position of its first token.
 * V of others may hold anything, and 0 * NaN is NaN: such tokens are blanked. */
template <typename T, int D, int COLUMN_TILES, typename Seen>
__device__ __forceinline__ void add_some_values(float (&o)[COLUMN_TILES][D / 16][4],
                                                const unsigned char *v,
                                                const uint32_t (&operand)[COLUMN_TILES][2],
                                                int32_t first, const Seen &is_seen, int lane) {
    uint32_t keep[2] = {LK_ALL, LK_ALL};
#pragma unroll
    for (int i = 0; i < 4; i++)
        if (!is_seen(first + 2 * (lane % 4) + i % 2 + 8 * (i / 2)))
            keep[i / 2] &= i % 2 ? 0xffffu : 0xffff0000u;
#pragma unroll
    for (int t = 0; t < D / 16; t++) {
        uint4 a = *reinterpret_cast<const uint4 *>(v + 512 * t + 16 * lane);
        a.x &= keep[0];
        a.y &= keep[0];
        a.z &= keep[1];
        a.w &= keep[1];
#pragma unroll
        for (int n = 0; n < COLUMN_TILES; n++) mma_16<T>(o[n][t], a, operand[n][0], operand[n][1]);
    }
}

#endif
