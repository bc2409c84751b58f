/* decode_fetch.cuh: the warp that fetches: it takes chunks, tells the other warps of their parts, and copies tiles into
 * the ring, one after the other. */
#ifndef LEANK_DECODE_FETCH_CUH
#define LEANK_DECODE_FETCH_CUH

#include "decode_plan.cuh"

/* Where a stage has what, in bytes: kept K, V and dropped K of a live head; K and V of an empty one. */
template <int D> struct tile_layout {
    int32_t v, dropped;
    __device__ __forceinline__ explicit tile_layout(int32_t n_kept)
        : v(n_kept > 0 ? 128 * n_kept : 128 * D), dropped(n_kept > 0 ? 128 * (n_kept + D) : 0) {}
};

typedef struct {
    int32_t stage;
    uint32_t phase;
    __device__ __forceinline__ void advance(int32_t n_stages) {
        if (++stage == n_stages) {
            stage = 0;
            phase ^= 1;
        }
    }
} ring_place;

template <typename T, int D, int COLUMN_TILES> struct fetcher {
    using smem = decode_smem<T, D, COLUMN_TILES>;
    const decode_params &p;
    const smem &s;
    const int lane;
    ring_place at;
    int32_t n_parts;

    __device__ __forceinline__ fetcher(const decode_params &params, const smem &memory,
                                       int own_lane)
        : p(params), s(memory), lane(own_lane), at{0, 0}, n_parts(0) {}

    /* whole: the tile's dropped channels are wanted, and there are some. */
    __device__ __forceinline__ void fetch_tile(int64_t page, int64_t twin, int32_t n_kept,
                                               bool whole) {
        unsigned char *to = s.stage + (size_t)at.stage * smem::shape::STAGE_BYTES;
        uint64_t *bar = &s.full[at.stage];
        const tile_layout<D> layout(n_kept);
        const uint32_t page_bytes = n_kept > 0 ? 128u * (uint32_t)(n_kept + D) : 0;
        const uint32_t twin_bytes = !whole ? 0 : 128u * (uint32_t)(n_kept > 0 ? D - n_kept : 2 * D);
        barrier_wait(&s.empty[at.stage], at.phase ^ 1);
#if LK_BULK_COPY
        if (lane == 0) {
            const uint64_t policy = stream_policy();
            barrier_expect(bar, page_bytes + twin_bytes);
            if (page_bytes) bulk_copy(to, page, page_bytes, bar, policy);
            if (twin_bytes) bulk_copy(to + layout.dropped, twin, twin_bytes, bar, policy);
        }
#else
        warp_copy(to, page, page_bytes, lane);
        warp_copy(to + layout.dropped, twin, twin_bytes, lane);
        arrive_after_copies(bar);
#endif
        at.advance(p.n_stages);
    }

    __device__ __forceinline__ void fetch_part(const lk_unit &u, const decode_part &part) {
        const lk_cuda_layer &layer = p.layer;
        const int32_t n_kept = s.n_kept[part.head];
        const int64_t page_off = head_kept_off(layer, part.head);
        const int64_t twin_off = head_dropped_off(layer, part.head);
        const int64_t row_table = (int64_t)part.row * layer.table_stride;
#pragma unroll 1
        for (int32_t first = part.tile_begin; first < part.tile_end; first += LK_WARP) {
            const int32_t tile = first + lane;
            int64_t page = 0, twin = 0;
            if (tile < part.tile_end) {
                const int64_t entry = row_table + lk_unit_page(&u, tile);
                if (n_kept > 0) page = layer.page[entry] + page_off;
                if (n_kept < D && lk_unit_is_whole(&u, tile)) twin = layer.twin[entry] + twin_off;
            }
            const int32_t n = min(LK_WARP, part.tile_end - first);
#pragma unroll 1
            for (int32_t i = 0; i < n; i++)
                fetch_tile(__shfl_sync(LK_ALL, page, i), __shfl_sync(LK_ALL, twin, i), n_kept,
                           n_kept < D && lk_unit_is_whole(&u, first + i));
        }
    }

    /* Copy one row of D to the i-th place of a part's rows. */
    __device__ __forceinline__ void fetch_vector(T *to, const void *from, int64_t at,
                                                 uint64_t *bar) {
        const int64_t address = reinterpret_cast<int64_t>(static_cast<const T *>(from) + at);
#if LK_BULK_COPY
        if (lane == 0) bulk_copy(to, address, D * sizeof(T), bar, stream_policy());
#else
        warp_copy(reinterpret_cast<unsigned char *>(to), address, D * sizeof(T), lane);
#endif
    }

    /* Tell the other warps of the next part, with its q, and k and v of the new token if the part has its tile;
     * row < 0 ends their work. */
    __device__ __forceinline__ void hand_over(const decode_part &part, bool with_new) {
        const int slot = n_parts & 1;
        uint64_t *bar = &s.part_full[slot];
        barrier_wait(&s.part_empty[slot], ((n_parts >> 1) & 1) ^ 1);
        n_parts++;
        T *to = s.q + slot * (p.r + 2) * D;
        if (lane == 0) s.part[slot] = part;
#if LK_BULK_COPY
        const int32_t n_vectors = part.row < 0 ? 0 : p.r + 2 * with_new;
        if (lane == 0) barrier_expect(bar, (uint32_t)(n_vectors * D * sizeof(T)));
#endif
        if (part.row >= 0) {
#pragma unroll 1
            for (int32_t i = 0; i < p.r; i++)
                fetch_vector(to + i * D, p.q,
                             part.row * p.q_stride[0] + (part.head * p.r + i) * p.q_stride[1], bar);
            if (with_new) {
                fetch_vector(to + p.r * D, p.k,
                             part.row * p.k_stride[0] + part.head * p.k_stride[1], bar);
                fetch_vector(to + (p.r + 1) * D, p.v,
                             part.row * p.v_stride[0] + part.head * p.v_stride[1], bar);
            }
        }
#if !LK_BULK_COPY
        arrive_after_copies(bar);
        if (lane == 0) barrier_arrive(bar);
#endif
        __syncwarp();
    }

    /* Last row that begins at or before `cost`. */
    __device__ __forceinline__ int32_t find_row(uint32_t cost) const {
        /* row_base[low] <= cost < row_base[high], if anywhere */
        int32_t low = 0, high = p.layer.n_rows;
        while (high - low > 1) {
            const int32_t middle = (low + high) / 2;
            if (s.row_base[middle] <= cost) low = middle;
            else high = middle;
        }
        return low;
    }

    /* The heads of a row, a lane each: those with tiles in [begin, end) of the costs, in order. */
    __device__ __forceinline__ void fetch_row(int32_t b, int32_t chunk, uint32_t begin,
                                              uint32_t end) {
        const int32_t n_heads = p.layer.n_heads;
        uint32_t base = s.row_base[b];
#pragma unroll 1
        for (int32_t first = 0; first < n_heads && base < end; first += LK_WARP) {
            const int32_t g = first + lane;
            lk_unit u = {};
            uint32_t cost = 0;
            if (g < n_heads) {
                u = lk_unit_make(s.row_end[b], s.row_full_lo[b], p.layer.sink, s.n_kept[g], D);
                cost = lk_unit_cost(&u);
            }
            const uint32_t sum = warp_sum_up_to(cost, lane);
            const uint32_t unit_base = base + sum - cost;
            base += __shfl_sync(LK_ALL, sum, LK_WARP - 1);
            int32_t tile_begin = 0, tile_end = 0;
            if (g < n_heads) {
                tile_begin = lk_unit_first_tile(&u, unit_base, begin);
                tile_end = lk_unit_first_tile(&u, unit_base, end);
            }
            uint32_t with_tiles = __ballot_sync(LK_ALL, tile_begin < tile_end);
            for (; with_tiles; with_tiles &= with_tiles - 1) {
                const int i = __ffs((int)with_tiles) - 1;
                const decode_part part = {b,
                                          first + i,
                                          chunk,
                                          __shfl_sync(LK_ALL, tile_begin, i),
                                          __shfl_sync(LK_ALL, tile_end, i),
                                          __shfl_sync(LK_ALL, unit_base, i),
                                          s.row_end[b],
                                          s.row_full_lo[b]};
                const lk_unit unit =
                    lk_unit_make(part.end, part.full_lo, p.layer.sink, s.n_kept[part.head], D);
                hand_over(part, p.k && !unit.is_void && part.tile_end == unit.n_tiles);
                if (!unit.is_void) fetch_part(unit, part);
            }
        }
    }

    __device__ __forceinline__ void run() {
        sum_rows(s.row_base, p.layer.n_rows, lane);
        __syncwarp();
        const lk_cut cut = lk_cut_make(s.row_base[p.layer.n_rows], gridDim.x, D);
        const int32_t n_chunks = cut.n_blocks * cut.n_chunks;
        for (int32_t taken = blockIdx.x; taken < n_chunks;) {
            const int32_t chunk = lk_cut_chunk_taken(&cut, taken);
            const uint32_t begin = lk_cut_begin(&cut, chunk), end = lk_cut_begin(&cut, chunk + 1);
            if (begin < end)
                for (int32_t b = find_row(begin); b < p.layer.n_rows && s.row_base[b] < end; b++)
                    fetch_row(b, chunk, begin, end);
            if (cut.n_chunks == 1) break;
            if (lane == 0) taken = (int32_t)gridDim.x + atomicAdd(&p.counters[0], 1);
            taken = __shfl_sync(LK_ALL, taken, 0);
        }
        decode_part no_more = {};
        no_more.row = -1;
        hand_over(no_more, false);
    }
};

#endif
