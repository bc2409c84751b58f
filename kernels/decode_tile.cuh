/* decode_tile.cuh: what a computing warp does with its 16 tokens of a tile. */
#ifndef LEANK_DECODE_TILE_CUH
#define LEANK_DECODE_TILE_CUH

#include "decode_fetch.cuh"

#include <math.h>

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

/* The new token into its page and twin, by n_threads threads. k and v [D] are in shared memory. */
template <typename T, int D, typename Smem>
__device__ __forceinline__ void store_new(const decode_params &p, const Smem &s,
                                          const decode_part &part, const T *k, const T *v,
                                          int32_t thread, int32_t n_threads) {
    const uint8_t *order = s.order + part.head * D;
    const int32_t n_kept = s.n_kept[part.head], position = part.end - 1;
    const int32_t slot = position % LK_PAGE_TOKENS;
    const head_blocks blocks = find_blocks(p.layer, part.row, part.head, position, true);
#pragma unroll 1
    for (int32_t c = thread; c < D; c += n_threads) {
        unsigned char *at = c < n_kept ? blocks.kept + lk_k_at(c, slot, n_kept)
                                       : blocks.dropped + lk_k_at(c - n_kept, slot, D - n_kept);
        *reinterpret_cast<T *>(at) = k[order[c]];
        *reinterpret_cast<T *>(blocks.v + lk_v_at(slot, c, D)) = v[c];
    }
}

/* The same into the stage that has its tile, by the warp that has its group: the copy of the page may have come before. */
template <typename T, int D, typename Smem>
__device__ __forceinline__ void patch_new(const Smem &s, const decode_part &part, int32_t n_kept,
                                          const T *k, const T *v, unsigned char *stage, int lane) {
    const uint8_t *order = s.order + part.head * D;
    const int32_t slot = (part.end - 1) % LK_PAGE_TOKENS;
    const tile_layout<D> layout(n_kept);
#pragma unroll
    for (int32_t i = 0; i < (D + LK_WARP - 1) / LK_WARP; i++) {
        const int32_t c = i * LK_WARP + lane;
        if (c >= D) break;
        const int32_t at = c < n_kept ? lk_k_at(c, slot, n_kept)
                                      : layout.dropped + lk_k_at(c - n_kept, slot, D - n_kept);
        *reinterpret_cast<T *>(stage + at) = k[order[c]];
        *reinterpret_cast<T *>(stage + layout.v + lk_v_at(slot, c, D)) = v[c];
    }
    fence_bulk(); /* the stage will be filled by bulk copies again */
    __syncwarp();
}

/* q of a part as the operands of its products: word [n][t][lane][half] is register `half` of slot t of column tile n.
 * rows [R, D] of q, order [D] of the head. By n_threads threads. */
template <int D, int COLUMN_TILES>
__device__ __forceinline__ void make_q_operand(const uint16_t *rows, const uint8_t *order,
                                               int32_t r, int32_t n_kept, uint32_t *q_operand,
                                               int32_t thread, int32_t n_threads) {
    constexpr int N_WORDS = COLUMN_TILES * (D / 16) * LK_WARP * 2;
#pragma unroll 2
    for (int32_t i = thread; i < N_WORDS; i += n_threads) {
        const int32_t half = i % 2, lane = i / 2 % LK_WARP, slot = i / 2 / LK_WARP;
        const int32_t column = slot / (D / 16) * 8 + lane / 4;
        const int32_t at = q_place(slot % (D / 16), half, n_kept, D) + 2 * (lane % 4);
        uint32_t word = 0;
        if (column < r) {
            const uint16_t *row = rows + column * D;
            word = (uint32_t)row[order[at]] | (uint32_t)row[order[at + 1]] << 16;
        }
        q_operand[i] = word;
    }
}

/* What one warp keeps while it goes over a part: R columns of a softmax state (lk_softmax.h), as the matrix units
 * hold them. Column 8 n + 2 (lane % 4) + i of column tile n has m[n][i]; l is summed over lanes at the end. */
template <typename T, int D, int COLUMN_TILES> struct warp_state {
    uint32_t q[COLUMN_TILES][D / 16][2];
    float o[COLUMN_TILES][D / 16][4];
    float m[COLUMN_TILES][2], l[COLUMN_TILES][2];

    __device__ __forceinline__ void begin(const uint32_t *q_operand, int lane) {
#pragma unroll
        for (int n = 0; n < COLUMN_TILES; n++) {
#pragma unroll
            for (int t = 0; t < D / 16; t++) {
                const uint2 words = *reinterpret_cast<const uint2 *>(
                    q_operand + ((n * (D / 16) + t) * LK_WARP + lane) * 2);
                q[n][t][0] = words.x;
                q[n][t][1] = words.y;
#pragma unroll
                for (int i = 0; i < 4; i++) o[n][t][i] = 0.0f;
            }
#pragma unroll
            for (int i = 0; i < 2; i++) {
                m[n][i] = -INFINITY;
                l[n][i] = 0.0f;
            }
        }
    }

    /* Each column into shared memory: o [D], m, l. */
    __device__ __forceinline__ void put(float *states, int32_t r, int warp, int lane) {
        constexpr int FLOATS = decode_shape<D, COLUMN_TILES>::STATE_FLOATS;
#pragma unroll
        for (int n = 0; n < COLUMN_TILES; n++) {
#pragma unroll
            for (int i = 0; i < 2; i++) {
                float sum = l[n][i];
#pragma unroll
                for (int step = 4; step < LK_WARP; step *= 2)
                    sum += __shfl_xor_sync(LK_ALL, sum, step);
                const int32_t column = 8 * n + 2 * (lane % 4) + i;
                if (column >= r) continue;
                float *state = states + (warp * r + column) * FLOATS;
                if (lane < 4) {
                    state[D] = m[n][i];
                    state[D + 1] = sum;
                }
#pragma unroll
                for (int t = 0; t < D / 16; t++) {
                    state[16 * t + lane / 4] = o[n][t][i];
                    state[16 * t + 8 + lane / 4] = o[n][t][i + 2];
                }
            }
        }
    }
};

/* logits += q . k of 16 tokens over N slots of q from slot `first` on; their tiles stand one after the other. */
template <int N, typename T, int D, int COLUMN_TILES>
__device__ __forceinline__ void add_slots(const warp_state<T, D, COLUMN_TILES> &w, const int first,
                                          const unsigned char *tiles, int lane,
                                          float logits[COLUMN_TILES][4]) {
    uint4 a[N > 0 ? N : 1];
#pragma unroll
    for (int t = 0; t < N; t++)
        a[t] = *reinterpret_cast<const uint4 *>(tiles + 512 * t + 16 * lane);
#pragma unroll
    for (int t = 0; t < N; t++)
#pragma unroll
        for (int n = 0; n < COLUMN_TILES; n++)
            mma_16<T>(logits[n], a[t], w.q[n][first + t][0], w.q[n][first + t][1]);
}

/* The same over the first or the last n_slots slots. A case for each count, so that all loads come first and registers have
 * names. */
template <typename T, int D, int COLUMN_TILES>
__device__ __forceinline__ void
add_n_slots(const warp_state<T, D, COLUMN_TILES> &w, const bool last, int32_t n_slots,
            const unsigned char *tiles, int lane, float logits[COLUMN_TILES][4]) {
    switch (n_slots) {
#define LK_CASE(n)                                                                                 \
    case n:                                                                                        \
        if constexpr (n <= D / 16) add_slots<n>(w, last ? D / 16 - n : 0, tiles, lane, logits);    \
        break;
        LK_CASE(1)
        LK_CASE(2)
        LK_CASE(3)
        LK_CASE(4)
        LK_CASE(5)
        LK_CASE(6)
        LK_CASE(7)
        LK_CASE(8)
#undef LK_CASE
    }
}

/* The same over the 8 channels that are half of slot `slot`. */
template <typename T, int D, int COLUMN_TILES>
__device__ __forceinline__ void add_half_slot(const warp_state<T, D, COLUMN_TILES> &w, int32_t slot,
                                              int half, const unsigned char *tile, int lane,
                                              float logits[COLUMN_TILES][4]) {
    const uint2 a = *reinterpret_cast<const uint2 *>(tile + 8 * lane);
#pragma unroll
    for (int t = 0; t < D / 16; t++)
        if (t == slot)
#pragma unroll
            for (int n = 0; n < COLUMN_TILES; n++) mma_8<T>(logits[n], a, w.q[n][t][half]);
}

/* Over the kept channels. */
template <typename T, int D, int COLUMN_TILES>
__device__ __forceinline__ void add_kept(const warp_state<T, D, COLUMN_TILES> &w, int32_t n_kept,
                                         const unsigned char *tiles, int lane,
                                         float logits[COLUMN_TILES][4]) {
    add_n_slots(w, false, n_kept / 16, tiles, lane, logits);
    if (n_kept % 16 != 0) add_half_slot(w, n_kept / 16, 0, tiles + n_kept / 16 * 512, lane, logits);
}

/* Over the dropped ones. */
template <typename T, int D, int COLUMN_TILES>
__device__ __forceinline__ void add_dropped(const warp_state<T, D, COLUMN_TILES> &w, int32_t n_kept,
                                            const unsigned char *tiles, int lane,
                                            float logits[COLUMN_TILES][4]) {
    const int32_t n_full = (D - n_kept) / 16;
    add_n_slots(w, true, n_full, tiles, lane, logits);
    if (n_kept % 16 != 0) add_half_slot(w, n_kept / 16, 1, tiles + 512 * n_full, lane, logits);
}

/* From q . k to logits in base 2. */
template <int COLUMN_TILES>
__device__ __forceinline__ void scale_logits(const decode_params &p, float x[COLUMN_TILES][4]) {
    if (p.softcap > 0.0f) {
#pragma unroll
        for (int n = 0; n < COLUMN_TILES; n++)
#pragma unroll
            for (int i = 0; i < 4; i++)
                x[n][i] = p.softcap * LK_LOG2_E * tanhf(x[n][i] * (p.scale / p.softcap));
    } else {
        const float scale_log2 = p.scale * LK_LOG2_E;
#pragma unroll
        for (int n = 0; n < COLUMN_TILES; n++)
#pragma unroll
            for (int i = 0; i < 4; i++) x[n][i] *= scale_log2;
    }
}

/* A logit may exceed m by this much (in base 2) before m is raised: any m gives the same result, probabilities are
 * divided by their sum in the end, and those up to 2^8 fit in f16 too. So most tiles do without a maximum over lanes. */
#define LK_M_SLACK 8.0f

/* Take the logits of 16 tokens into the state: x becomes the operand of the product with V. */
template <typename T, int D, int COLUMN_TILES>
__device__ __forceinline__ void take_logits(warp_state<T, D, COLUMN_TILES> &w,
                                            float x[COLUMN_TILES][4],
                                            uint32_t operand[COLUMN_TILES][2]) {
#pragma unroll
    for (int n = 0; n < COLUMN_TILES; n++) {
        const bool above = fmaxf(x[n][0], x[n][2]) > w.m[n][0] + LK_M_SLACK ||
                           fmaxf(x[n][1], x[n][3]) > w.m[n][1] + LK_M_SLACK;
        if (__any_sync(LK_ALL, above)) {
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

/* Take 16 tokens that are all visible and middle. */
template <typename T, int D, int COLUMN_TILES>
__device__ __forceinline__ void
take_middle(const decode_params &p, warp_state<T, D, COLUMN_TILES> &w, const unsigned char *kept_k,
            const unsigned char *v, int32_t n_kept, int lane) {
    /* Tiles of V that are loaded ahead, where registers allow. */
    constexpr int N_EARLY = COLUMN_TILES == 1 ? D / 32 : 0;
    uint4 v_early[N_EARLY > 0 ? N_EARLY : 1];
    float x[COLUMN_TILES][4] = {};
    add_kept(w, n_kept, kept_k, lane, x);
#pragma unroll
    for (int t = 0; t < N_EARLY; t++)
        v_early[t] = *reinterpret_cast<const uint4 *>(v + 512 * t + 16 * lane);
    scale_logits<COLUMN_TILES>(p, x);
    uint32_t operand[COLUMN_TILES][2];
    take_logits(w, x, operand);
#pragma unroll
    for (int t = 0; t < D / 16; t++) {
        const uint4 a = t < N_EARLY ? v_early[t < N_EARLY ? t : 0]
                                    : *reinterpret_cast<const uint4 *>(v + 512 * t + 16 * lane);
#pragma unroll
        for (int n = 0; n < COLUMN_TILES; n++)
            mma_16<T>(w.o[n][t], a, operand[n][0], operand[n][1]);
    }
}

/* Take 16 tokens of a whole tile. first: the position of their first one, which is visible. */
template <typename T, int D, int COLUMN_TILES>
__device__ __forceinline__ void
take_whole(const decode_params &p, const decode_part &part, warp_state<T, D, COLUMN_TILES> &w,
           const unsigned char *kept_k, const unsigned char *dropped_k, const unsigned char *v,
           int32_t first, int32_t n_kept, int lane) {
    const int32_t sink = p.layer.sink;
    float kept[COLUMN_TILES][4] = {}, x[COLUMN_TILES][4];
    add_kept(w, n_kept, kept_k, lane, kept);
#pragma unroll
    for (int n = 0; n < COLUMN_TILES; n++)
#pragma unroll
        for (int i = 0; i < 4; i++) x[n][i] = kept[n][i];
    add_dropped(w, n_kept, dropped_k, lane, x);
    bool hidden[2];
#pragma unroll
    for (int row = 0; row < 2; row++) {
        const int32_t j = first + lane / 4 + 8 * row;
        const bool middle = j >= sink && j < part.full_lo;
        hidden[row] = j >= part.end || (middle && n_kept == 0);
#pragma unroll
        for (int n = 0; n < COLUMN_TILES; n++)
#pragma unroll
            for (int i = 2 * row; middle && i < 2 * row + 2; i++) x[n][i] = kept[n][i];
    }
    scale_logits<COLUMN_TILES>(p, x);
#pragma unroll
    for (int n = 0; n < COLUMN_TILES; n++)
#pragma unroll
        for (int i = 0; i < 4; i++)
            if (hidden[i / 2]) x[n][i] = -INFINITY;
    uint32_t operand[COLUMN_TILES][2];
    take_logits(w, x, operand);

    /* V of a token that is not attended to may hold anything, and 0 * NaN is NaN: such tokens are blanked. */
    uint32_t keep[2] = {LK_ALL, LK_ALL};
#pragma unroll
    for (int i = 0; i < 4; i++) {
        const int32_t j = first + 2 * (lane % 4) + i % 2 + 8 * (i / 2);
        const bool middle = j >= sink && j < part.full_lo;
        if (j >= part.end || (middle && n_kept == 0)) keep[i / 2] &= i % 2 ? 0xffffu : 0xffff0000u;
    }
#pragma unroll
    for (int t = 0; t < D / 16; t++) {
        uint4 a = *reinterpret_cast<const uint4 *>(v + 512 * t + 16 * lane);
        a.x &= keep[0];
        a.y &= keep[0];
        a.z &= keep[1];
        a.w &= keep[1];
#pragma unroll
        for (int n = 0; n < COLUMN_TILES; n++)
            mma_16<T>(w.o[n][t], a, operand[n][0], operand[n][1]);
    }
}

#endif
