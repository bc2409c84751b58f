/* decode_tile.cuh: what a computing warp does with its 16 tokens of a tile. */
#ifndef LEANK_DECODE_TILE_CUH
#define LEANK_DECODE_TILE_CUH

#include "columns.cuh"
#include "decode_fetch.cuh"

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
    const int32_t slot = (part.end - 1) % (16 * stage_groups(D));
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

/* What one warp keeps while it goes over a part: the state of R columns, and their q where registers have room for it. */
template <typename T, int D, int COLUMN_TILES> struct warp_state : column_state<D, COLUMN_TILES> {
    static constexpr bool Q_IN_REGISTERS = D <= 128;
    uint32_t q[Q_IN_REGISTERS ? COLUMN_TILES : 1][Q_IN_REGISTERS ? D / 16 : 1][2];
    const uint32_t *q_shared;

    __device__ __forceinline__ void begin(const uint32_t *q_operand, int lane) {
        this->clear();
        q_shared = q_operand;
        if constexpr (Q_IN_REGISTERS) {
#pragma unroll
            for (int n = 0; n < COLUMN_TILES; n++) {
#pragma unroll
                for (int t = 0; t < D / 16; t++) {
                    const uint2 words = *reinterpret_cast<const uint2 *>(
                        q_operand + ((n * (D / 16) + t) * LK_WARP + lane) * 2);
                    q[n][t][0] = words.x;
                    q[n][t][1] = words.y;
                }
            }
        }
    }
};

/* logits += q . k of 16 tokens over N slots of q from slot `first` on; their tiles stand one after the other. */
template <int N, typename T, int D, int COLUMN_TILES>
__device__ __forceinline__ void add_slots(const warp_state<T, D, COLUMN_TILES> &w, const int first,
                                          const unsigned char *tiles, int lane,
                                          float (&logits)[COLUMN_TILES][4]) {
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
            const unsigned char *tiles, int lane, float (&logits)[COLUMN_TILES][4]) {
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
                                              float (&logits)[COLUMN_TILES][4]) {
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
                                         float (&logits)[COLUMN_TILES][4]) {
    if constexpr (warp_state<T, D, COLUMN_TILES>::Q_IN_REGISTERS) {
        add_n_slots(w, false, n_kept / 16, tiles, lane, logits);
        if (n_kept % 16 != 0)
            add_half_slot(w, n_kept / 16, 0, tiles + n_kept / 16 * 512, lane, logits);
    } else {
        add_shared_kept<T, D, COLUMN_TILES>(w.q_shared, n_kept, tiles, lane, logits);
    }
}

/* Over the dropped ones. */
template <typename T, int D, int COLUMN_TILES>
__device__ __forceinline__ void add_dropped(const warp_state<T, D, COLUMN_TILES> &w, int32_t n_kept,
                                            const unsigned char *tiles, int lane,
                                            float (&logits)[COLUMN_TILES][4]) {
    if constexpr (warp_state<T, D, COLUMN_TILES>::Q_IN_REGISTERS) {
        const int32_t n_full = (D - n_kept) / 16;
        add_n_slots(w, true, n_full, tiles, lane, logits);
        if (n_kept % 16 != 0) add_half_slot(w, n_kept / 16, 1, tiles + 512 * n_full, lane, logits);
    } else {
        add_shared_dropped<T, D, COLUMN_TILES>(w.q_shared, n_kept, tiles, lane, logits);
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
    scale_logits(p, x);
    uint32_t operand[COLUMN_TILES][2];
    take_logits<T, D, COLUMN_TILES>(w, x, operand);
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
    scale_logits(p, x);
#pragma unroll
    for (int n = 0; n < COLUMN_TILES; n++)
#pragma unroll
        for (int i = 0; i < 4; i++)
            if (hidden[i / 2]) x[n][i] = -INFINITY;
    uint32_t operand[COLUMN_TILES][2];
    take_logits<T, D, COLUMN_TILES>(w, x, operand);
    const auto is_seen = [&](int32_t j) {
        return j < part.end && (n_kept > 0 || j < sink || j >= part.full_lo);
    };
    add_some_values<T, D>(w.o, v, operand, first, is_seen, lane);
}

#endif
