/* decode_fetch.cuh: the warp that fetches: it takes chunks, tells the other warps of their parts, and copies tiles into
 * the ring, one after the other. */
#ifndef LEANK_DECODE_FETCH_CUH
#define LEANK_DECODE_FETCH_CUH

#include "decode_plan.cuh"

/* Tiles that take about as long as two round trips to memory. */
#define LK_LOOK_AHEAD 4

/* Where a stage has what, in bytes: kept K, V and dropped K of a live head; K and V of an empty one. */
template <int D, int GROUPS = stage_groups(D)> struct tile_layout {
    int32_t v, dropped;
    __device__ __forceinline__ explicit tile_layout(int32_t n_kept)
        : v(32 * GROUPS * (n_kept > 0 ? n_kept : D)),
          dropped(n_kept > 0 ? 32 * GROUPS * (n_kept + D) : 0) {}
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

/* A part as the fetching warp has found it: with where its first 32 tiles are, a lane each. */
typedef struct {
    bool exists;
    decode_part part;
    /* Of all heads: adding a head's place already here would be to wait for memory. */
    int64_t page, twin;
} found_part;

template <typename T, int D, int COLUMN_TILES> struct fetcher {
    using smem = decode_smem<T, D, COLUMN_TILES>;
    const decode_params &p;
    const smem &s;
    const int lane;
    ring_place at;
    int32_t n_parts;

    /* The chunk: costs [begin, end), the row, and where the next 32 heads of the row begin. */
    lk_cut cut;
    int32_t chunk, row, next_head;
    uint32_t begin, end, next_base;
    /* Heads of the 32 before those, a lane each, that have tiles in the chunk and were not handed over yet. */
    uint32_t heads_left;
    int32_t lane_tile_begin, lane_tile_end;
    uint32_t lane_base;
    /* The part whose tiles are asked for, and the one that comes after it. */
    found_part now, after;

    __device__ __forceinline__ fetcher(const decode_params &params, const smem &memory,
                                       int own_lane)
        : p(params), s(memory), lane(own_lane), at{0, 0}, n_parts(0) {}

    /* How a tile is copied, in bytes: from its page, from its twin, and of V, where K and V are copied apart. */
    typedef struct {
        uint32_t page, twin, v;
    } tile_bytes;

    /* whole: the tile's dropped channels are wanted, and there are some; n_groups: groups of 16 tokens that it has. */
    __device__ __forceinline__ static tile_bytes bytes_of(int32_t n_kept, bool whole,
                                                          int32_t n_groups) {
        tile_bytes n;
        n.v = n_groups < 4 ? 32u * (uint32_t)(n_groups * D)
                           : 0; /* the groups of each are its first */
        n.page = 32u * (uint32_t)(n_groups * n_kept);
        n.twin = !whole ? 0 : 32u * (uint32_t)(n_groups * (D - n_kept));
        if (n_groups == 4 && n_kept > 0) n.page += 128u * D;
        if (n_groups == 4 && n_kept == 0 && whole) n.twin += 128u * D;
        return n;
    }

    __device__ __forceinline__ static int32_t groups_of(const decode_part &part, int32_t tile) {
        const bool is_last = part.ends && tile == part.tile_end - 1;
        return is_last ? (part.end - 1) % LK_PAGE_TOKENS / 16 + 1 : 4;
    }

    /* One of the copies that a stage gets. */
    __device__ __forceinline__ void copy(unsigned char *to, int64_t from, uint32_t n_bytes,
                                         uint64_t *bar) {
        if (n_bytes == 0) return;
#if LK_BULK_COPY
        if (lane == 0) bulk_copy(to, from, n_bytes, bar, stream_policy());
#else
        warp_copy(to, from, n_bytes, lane);
#endif
    }

    /* n_groups: of the tile, from the stage's first group on. */
    __device__ __forceinline__ void fetch_stage(int64_t page, int64_t twin, int32_t n_kept,
                                                bool whole, const int32_t first_group,
                                                int32_t n_groups) {
        unsigned char *to = s.stage + (size_t)at.stage * smem::shape::STAGE_BYTES;
        uint64_t *bar = &s.full[at.stage];
        const tile_layout<D> layout(n_kept);
        const int64_t v = (n_kept > 0 ? page : twin) + tile_layout<D, 4>(n_kept).v;
        const int32_t skipped = 32 * first_group;
        const tile_bytes n = bytes_of(n_kept, whole, min(max(n_groups, 0), smem::shape::GROUPS));
        warp_wait(&s.empty[at.stage], at.phase ^ 1, lane);
#if LK_BULK_COPY
        if (lane == 0) barrier_expect(bar, n.page + n.twin + n.v);
#endif
        copy(to, page + skipped * n_kept, n.page, bar);
        copy(to + layout.dropped, twin + skipped * (D - n_kept), n.twin, bar);
        copy(to + layout.v, v + skipped * D, n.v, bar);
#if !LK_BULK_COPY
        arrive_after_copies(bar);
#endif
        at.advance(p.n_stages);
    }

    __device__ __forceinline__ lk_unit unit_of(const decode_part &part) const {
        return lk_unit_make(part.end, part.full_lo, p.layer.sink, s.n_kept[part.head], D);
    }

    /* Where this lane's tile of the part's tiles from `first` on is. */
    __device__ __forceinline__ void find_tiles(found_part *f, const lk_unit &unit, int32_t first) {
        const lk_cuda_layer &layer = p.layer;
        const int32_t head = f->part.head, n_kept = s.n_kept[head], tile = first + lane;
        f->page = f->twin = 0;
        if (unit.is_void || tile >= f->part.tile_end) return;
        const int64_t row_table = (int64_t)f->part.row * layer.table_stride;
        const int64_t entry = row_table + lk_unit_page(&unit, tile);
        if (n_kept > 0) f->page = __ldcg(layer.page + entry);
        if (n_kept < D && lk_unit_is_whole(&unit, tile)) f->twin = __ldcg(layer.twin + entry);
    }

    /* Bring the first n_tiles into L2, up to 32. */
    __device__ __forceinline__ void prefetch(const found_part &f, int32_t n_tiles) {
#if LK_BULK_COPY
        if (!f.exists || lane >= n_tiles || !(f.page || f.twin)) return;
        const int32_t n_kept = s.n_kept[f.part.head];
        const int64_t page = f.page + head_kept_off(p.layer, f.part.head);
        const int64_t twin = f.twin + head_dropped_off(p.layer, f.part.head);
        const tile_bytes n =
            bytes_of(n_kept, f.twin != 0, groups_of(f.part, f.part.tile_begin + lane));
        if (n.page) bulk_prefetch(page, n.page);
        if (n.twin) bulk_prefetch(twin, n.twin);
        if (n.v) bulk_prefetch((n_kept > 0 ? page : twin) + tile_layout<D, 4>(n_kept).v, n.v);
#endif
    }

    /* Copy the part's tiles. What comes after them is found before the last few are asked for: to take a chunk and to find
     * its first page are two round trips to memory, in which the ring would run dry. */
    __device__ __forceinline__ void fetch_part() {
        const lk_unit unit = unit_of(now.part);
        const int32_t head = now.part.head, n_kept = s.n_kept[head], begin = now.part.tile_begin;
        const int32_t end = unit.is_void ? begin : now.part.tile_end;
        const int32_t turn = max(begin, end - LK_LOOK_AHEAD);
        const int64_t page_off = head_kept_off(p.layer, head);
        const int64_t twin_off = head_dropped_off(p.layer, head);
#pragma unroll 1
        for (int32_t tile = begin;; tile++) {
            if (tile == turn) find_after();
            if (tile == end) break;
            const int32_t i = (tile - begin) % LK_WARP;
            if (i == 0 && tile > begin) find_tiles(&now, unit, tile);
            const int64_t page = __shfl_sync(LK_ALL, now.page, i) + page_off;
            const int64_t twin = __shfl_sync(LK_ALL, now.twin, i) + twin_off;
            const bool whole = n_kept < D && lk_unit_is_whole(&unit, tile);
            const int32_t n_groups = groups_of(now.part, tile);
#pragma unroll
            for (int g = 0; g < 4; g += smem::shape::GROUPS)
                fetch_stage(page, twin, n_kept, whole, g, n_groups - g);
        }
    }

    /* Copy n neighbouring rows of D. */
    __device__ __forceinline__ void fetch_rows(T *to, const void *from, int64_t first, int32_t n,
                                               uint64_t *bar) {
        const int64_t address = reinterpret_cast<int64_t>(static_cast<const T *>(from) + first);
        const uint32_t n_bytes = (uint32_t)(n * D) * sizeof(T);
#if LK_BULK_COPY
        if (lane == 0) bulk_copy(to, address, n_bytes, bar, stream_policy());
#else
        warp_copy(reinterpret_cast<unsigned char *>(to), address, n_bytes, lane);
#endif
    }

    /* Tell the other warps of a part, with its q, and k and v of the new token if it has the token's tile; row < 0 ends
     * their work. */
    __device__ __forceinline__ void hand_over(const decode_part &part, bool with_new) {
        const int slot = n_parts & 1;
        uint64_t *bar = &s.part_full[slot];
        warp_wait(&s.part_empty[slot], ((n_parts >> 1) & 1) ^ 1, lane);
        n_parts++;
        T *to = s.q + slot * (p.r + 2) * D;
        if (lane == 0) s.part[slot] = part;
#if LK_BULK_COPY
        const int32_t n_rows = part.row < 0 ? 0 : p.r + 2 * with_new;
        if (lane == 0) barrier_expect(bar, (uint32_t)(n_rows * D * sizeof(T)));
#endif
        if (part.row >= 0) {
            const bool together = p.q_stride[1] == D;
#pragma unroll 1
            for (int32_t i = 0; i < (together ? 1 : p.r); i++)
                fetch_rows(to + i * D, p.q,
                           part.row * p.q_stride[0] + (part.head * p.r + i) * p.q_stride[1],
                           together ? p.r : 1, bar);
            if (with_new) {
                fetch_rows(to + p.r * D, p.k, part.row * p.k_stride[0] + part.head * p.k_stride[1],
                           1, bar);
                fetch_rows(to + (p.r + 1) * D, p.v,
                           part.row * p.v_stride[0] + part.head * p.v_stride[1], 1, bar);
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

    __device__ __forceinline__ void open_chunk(int32_t taken) {
        chunk = lk_cut_chunk_taken(&cut, taken);
        begin = lk_cut_begin(&cut, chunk);
        end = lk_cut_begin(&cut, chunk + 1);
        row = begin < end ? find_row(begin) : p.layer.n_rows;
        next_head = 0;
        next_base = row < p.layer.n_rows ? s.row_base[row] : end;
        heads_left = 0;
    }

    /* The next 32 heads of the row, a lane each: which tiles of theirs are in the chunk. */
    __device__ __forceinline__ void open_heads() {
        const int32_t g = next_head + lane;
        const row_view view = s.row[row];
        lk_unit u = {};
        uint32_t cost = 0;
        if (g < p.layer.n_heads) {
            u = lk_unit_make(view.end, view.full_lo, p.layer.sink, s.n_kept[g], D);
            cost = lk_unit_cost(&u);
        }
        const uint32_t sum = warp_sum_up_to(cost, lane);
        lane_base = next_base + sum - cost;
        lane_tile_begin = lane_tile_end = 0;
        if (g < p.layer.n_heads) {
            lane_tile_begin = lk_unit_first_tile(&u, lane_base, begin);
            lane_tile_end = lk_unit_first_tile(&u, lane_base, end);
        }
        heads_left = __ballot_sync(LK_ALL, lane_tile_begin < lane_tile_end);
        next_base += __shfl_sync(LK_ALL, sum, LK_WARP - 1);
        next_head += LK_WARP;
    }

    /* The chunk's next part, if it has more. */
    __device__ __forceinline__ void find_part(found_part *f) {
        f->exists = false;
        while (!heads_left) {
            if (next_head >= p.layer.n_heads) {
                next_head = 0;
                row++;
            }
            if (row >= p.layer.n_rows || next_base >= end) return;
            open_heads();
        }
        const int i = __ffs((int)heads_left) - 1;
        heads_left &= heads_left - 1;
        const row_view view = s.row[row];
        f->exists = true;
        f->part.row = row;
        f->part.head = next_head - LK_WARP + i;
        f->part.chunk = chunk;
        f->part.tile_begin = __shfl_sync(LK_ALL, lane_tile_begin, i);
        f->part.tile_end = __shfl_sync(LK_ALL, lane_tile_end, i);
        f->part.end = view.end;
        f->part.full_lo = view.full_lo;
        const lk_unit unit = unit_of(f->part);
        f->part.ends = f->part.tile_end == unit.n_tiles;
        find_tiles(f, unit, f->part.tile_begin);
    }

    /* The part after `now`: the chunk's next one, or the first one of the next chunk that has any. */
    __device__ __forceinline__ void find_after() {
        const int32_t n_chunks = cut.n_blocks * cut.n_chunks;
#pragma unroll 1
        for (;;) {
            find_part(&after);
            if (after.exists || cut.n_chunks == 1) return;
            int32_t taken = 0;
            if (lane == 0) taken = gridDim.x + atomicAdd(p.n_taken, 1);
            taken = __shfl_sync(LK_ALL, taken, 0);
            if (taken >= n_chunks) return;
            open_chunk(taken);
        }
    }

    /* Before earlier kernels have ended: find the block's first part, and bring as many tiles into L2 as the ring holds, twice as
     * many where a block has megabytes to read. */
    __device__ __forceinline__ void prepare() {
        sum_rows(s.row_base, p.layer.n_rows, lane);
        __syncwarp();
        cut = lk_cut_make(s.row_base[p.layer.n_rows], p.layer.n_rows * p.layer.n_heads, gridDim.x,
                          lk_whole_cost(D), LK_PLAN_HALVINGS);
        open_chunk(blockIdx.x);
        find_part(&now);
        prefetch(now, (cut.n_halvings < 4 ? 1 : 2) * p.n_stages * smem::shape::GROUPS / 4);
    }

    __device__ __forceinline__ void run() {
        if (!now.exists) {
            find_after();
            now = after;
        }
        while (now.exists) {
            hand_over(now.part, p.k && now.part.ends && now.part.end > 0);
            fetch_part();
            now = after;
        }
        decode_part no_more = {};
        no_more.row = -1;
        hand_over(no_more, false);
    }
};

#endif
