/* span_tile.cuh: the softmax state of a warp's query columns, and how it takes in groups of 16 tokens.
 *
 * Unlike in columns.cuh, query columns are the rows of the first product, in tiles of 16, and tokens its columns: so the result
 * is an operand of the second as it is, of which query columns are the columns there too. A tile of K is two operands of 8
 * tokens. Logits x[(2 g + e) * TILES + n][4] are those of tokens 8 e .. 8 e + 7 of group g with row tile n: this lane has
 * tokens 2 (lane % 4) and the next one of columns lane / 4 and lane / 4 + 8 (x[..][2], [3]). */
#ifndef LEANK_SPAN_TILE_CUH
#define LEANK_SPAN_TILE_CUH

#include "columns.cuh"
#include "span_shape.cuh"

/* Column 16 n + 8 half + lane / 4 has m[n][half], in base 2; l is summed over lanes at the end. o is that of column_state,
 * where column tile 2 n + half is half of row tile n. */
template <int D, int TILES> struct query_state {
    float o[2 * TILES][D / 16][4];
    float m[TILES][2], l[TILES][2];

    __device__ __forceinline__ void clear() {
#pragma unroll
        for (int n = 0; n < 2 * TILES; n++) {
#pragma unroll
            for (int t = 0; t < D / 16; t++)
#pragma unroll
                for (int i = 0; i < 4; i++) o[n][t][i] = 0.0f;
            m[n / 2][n % 2] = -INFINITY;
            l[n / 2][n % 2] = 0.0f;
        }
    }

    /* The 8 columns of column tile n into shared memory, LK_STATE_FLOATS(D) each: o [D], m, l. */
    __device__ __forceinline__ void put(const int n, float *states, int lane) const {
        float sum = l[n / 2][n % 2];
        sum += __shfl_xor_sync(LK_ALL, sum, 1);
        sum += __shfl_xor_sync(LK_ALL, sum, 2);
        if (lane % 4 == 0) {
            states[lane / 4 * LK_STATE_FLOATS(D) + D] = m[n / 2][n % 2];
            states[lane / 4 * LK_STATE_FLOATS(D) + D + 1] = sum;
        }
        put_values<D>(o[n], states, 8, lane);
    }
};

/* q of a part as the operands of its products: word [n][t][lane][i] is register i of slot t (q_place) of row tile n, of n_tiles.
 * rows [n_columns] of q, row_stride elements from each other; order [D] of the head. By n_threads threads. */
template <int D>
__device__ __forceinline__ void make_q_rows(const uint16_t *rows, int32_t row_stride,
                                            const uint8_t *order, int32_t n_columns,
                                            int32_t n_tiles, int32_t n_kept, uint32_t *q_operand,
                                            int32_t thread, int32_t n_threads) {
#pragma unroll 2
    for (int32_t i = thread; i < n_tiles * (D / 16) * LK_WARP * 4; i += n_threads) {
        const int32_t lane = i / 4 % LK_WARP, slot = i / 4 / LK_WARP;
        const int32_t column = slot / (D / 16) * 16 + lane / 4 + 8 * (i % 2);
        const int32_t at = q_place(slot % (D / 16), i / 2 % 2, n_kept, D) + 2 * (lane % 4);
        uint32_t word = 0;
        if (column < n_columns) {
            const uint16_t *row = rows + column * row_stride;
            word = (uint32_t)row[order[at]] | (uint32_t)row[order[at + 1]] << 16;
        }
        q_operand[i] = word;
    }
}

/* ---------------------------------------------------------------------------------------------------- q . k */

/* logits += q . k of G groups over n_slots slots of q from `first` on; tiles of a group stand one after the other, those of the
 * next group group_bytes later. */
template <typename T, int D, int TILES, int G>
__device__ __forceinline__ void add_row_slots(const uint32_t *q, int32_t first, int32_t n_slots,
                                              const unsigned char *tiles, int32_t group_bytes,
                                              int lane, float (&x)[2 * G * TILES][4]) {
    q += (first * LK_WARP + lane) * 4;
    tiles += 16 * lane;
#pragma unroll 2
    for (int32_t t = 0; t < n_slots; t++) {
        uint4 a[TILES];
#pragma unroll
        for (int n = 0; n < TILES; n++)
            a[n] = *reinterpret_cast<const uint4 *>(q + (n * (D / 16) + t) * LK_WARP * 4);
#pragma unroll
        for (int g = 0; g < G; g++) {
            const uint4 b = *reinterpret_cast<const uint4 *>(tiles + 512 * t + g * group_bytes);
#pragma unroll
            for (int n = 0; n < TILES; n++) {
                mma_16<T>(x[2 * g * TILES + n], a[n], b.x, b.z);
                mma_16<T>(x[(2 * g + 1) * TILES + n], a[n], b.y, b.w);
            }
        }
    }
}

/* The same over the 8 channels that are half of a slot. */
template <typename T, int D, int TILES, int G>
__device__ __forceinline__ void add_row_half(const uint32_t *q, int32_t slot, int half,
                                             const unsigned char *tile, int32_t group_bytes,
                                             int lane, float (&x)[2 * G * TILES][4]) {
    uint2 a[TILES];
#pragma unroll
    for (int n = 0; n < TILES; n++)
        a[n] = *reinterpret_cast<const uint2 *>(q + ((n * (D / 16) + slot) * LK_WARP + lane) * 4 +
                                                2 * half);
#pragma unroll
    for (int g = 0; g < G; g++) {
        const uint2 b = *reinterpret_cast<const uint2 *>(tile + 8 * lane + g * group_bytes);
#pragma unroll
        for (int n = 0; n < TILES; n++) {
            mma_8<T>(x[2 * g * TILES + n], a[n], b.x);
            mma_8<T>(x[(2 * g + 1) * TILES + n], a[n], b.y);
        }
    }
}

/* Over the kept channels. */
template <typename T, int D, int TILES, int G>
__device__ __forceinline__ void add_row_kept(const uint32_t *q, int32_t n_kept,
                                             const unsigned char *tiles, int lane,
                                             float (&x)[2 * G * TILES][4]) {
    const int32_t n_full = n_kept / 16, group_bytes = 32 * n_kept;
    add_row_slots<T, D, TILES, G>(q, 0, n_full, tiles, group_bytes, lane, x);
    if (n_kept % 16 != 0)
        add_row_half<T, D, TILES, G>(q, n_full, 0, tiles + 512 * n_full, group_bytes, lane, x);
}

/* Over the dropped ones. */
template <typename T, int D, int TILES, int G>
__device__ __forceinline__ void add_row_dropped(const uint32_t *q, int32_t n_kept,
                                                const unsigned char *tiles, int lane,
                                                float (&x)[2 * G * TILES][4]) {
    const int32_t n_full = (D - n_kept) / 16, group_bytes = 32 * (D - n_kept);
    add_row_slots<T, D, TILES, G>(q, D / 16 - n_full, n_full, tiles, group_bytes, lane, x);
    if (n_kept % 16 != 0)
        add_row_half<T, D, TILES, G>(q, n_kept / 16, 1, tiles + 512 * n_full, group_bytes, lane, x);
}

/* ------------------------------------------------------------------------------------------ softmax and values */

/* What q . k is multiplied by to be a logit in base 2. Most calls multiply when they take the exponential, in the same
 * instruction; others, for which the order of logits is another than that of q . k, are scaled here. */
template <int N>
__device__ __forceinline__ float scale_rows(const span_params &p, float (&x)[N][4]) {
    if (p.softcap == 0.0f && p.scale > 0.0f) return p.scale * LK_LOG2_E;
    scale_logits(p, x);
    return 1.0f;
}

/* Take q . k of G groups into the state, -inf where nothing is seen: they become the operands of the product with V, see
 * add_values. */
template <typename T, int G, int D, int TILES>
__device__ __forceinline__ void take_rows(query_state<D, TILES> &w, float scale,
                                          float (&x)[2 * G * TILES][4],
                                          uint32_t (&operand)[2 * G * TILES][2], int lane) {
    float top[TILES][2];
    bool above = false;
#pragma unroll
    for (int n = 0; n < TILES; n++) {
#pragma unroll
        for (int half = 0; half < 2; half++) {
            float y = fmaxf(x[n][2 * half], x[n][2 * half + 1]);
#pragma unroll
            for (int e = 1; e < 2 * G; e++)
                y = fmaxf(y, fmaxf(x[e * TILES + n][2 * half], x[e * TILES + n][2 * half + 1]));
            top[n][half] = y * scale;
            above |= top[n][half] > w.m[n][half] + LK_M_SLACK;
        }
    }
    if (__any_sync(LK_ALL, above)) {
#pragma unroll
        for (int n = 0; n < TILES; n++) {
#pragma unroll
            for (int half = 0; half < 2; half++) {
                float y = top[n][half];
                y = fmaxf(y, __shfl_xor_sync(LK_ALL, y, 1));
                y = fmaxf(y, __shfl_xor_sync(LK_ALL, y, 2));
                y = fmaxf(y, w.m[n][half]);
                /* No -inf - -inf where a column has seen nothing. */
                const float factor = y == -INFINITY ? 1.0f : exp2_fast(w.m[n][half] - y);
                w.m[n][half] = y;
                w.l[n][half] *= factor;
                float of_column[2]; /* those of o, which other lanes have */
#pragma unroll
                for (int i = 0; i < 2; i++)
                    of_column[i] = __shfl_sync(LK_ALL, factor, 4 * (2 * (lane % 4) + i));
#pragma unroll
                for (int t = 0; t < D / 16; t++)
#pragma unroll
                    for (int i = 0; i < 4; i++) w.o[2 * n + half][t][i] *= of_column[i % 2];
            }
        }
    }
#pragma unroll
    for (int n = 0; n < TILES; n++) {
#pragma unroll
        for (int half = 0; half < 2; half++) {
            const float shift = w.m[n][half] == -INFINITY ? 0.0f : w.m[n][half];
#pragma unroll
            for (int e = 0; e < 2 * G; e++) {
                const float *y = x[e * TILES + n] + 2 * half;
                const float a = exp2_fast(fmaf(y[0], scale, -shift));
                const float b = exp2_fast(fmaf(y[1], scale, -shift));
                w.l[n][half] += a + b;
                operand[e / 2 * 2 * TILES + 2 * n + half][e % 2] = pack2<T>(a, b);
            }
        }
    }
}

#endif
