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
    lk_unit unit;
    int32_t end;                           /* of the tiles that are read: a void unit has none */
    int32_t n_kept, kept_off, dropped_off; /* of its head */
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
    /* The part whose tiles are asked for, from `tile` on, and the one that comes after it, which is found before tile
     * `turn`. */
    found_part now, after;
    int32_t tile, turn;

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

    __device__ __forceinline__ static int32_t groups_of(const decode_part &part, int32_t i) {
        const bool is_last = part.ends && i == part.tile_end - 1;
        return is_last ? (part.end - 1) % LK_PAGE_TOKENS / 16 + 1 : 4;
    }

    /* Copy n_bytes into shared memory; where there are bulk copies, by one lane. */
    __device__ __forceinline__ void copy(unsigned char *to, int64_t from, uint32_t n_bytes,
                                         uint64_t *bar) {
#if LK_BULK_COPY
        if (n_bytes > 0) bulk_copy(to, from, n_bytes, bar, stream_policy());
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
        if (!LK_BULK_COPY || lane == 0) {
#if LK_BULK_COPY
            barrier_expect(bar, n.page + n.twin + n.v);
#endif
            copy(to, page + skipped * n_kept, n.page, bar);
            copy(to + layout.dropped, twin + skipped * (D - n_kept), n.twin, bar);
            copy(to + layout.v, v + skipped * D, n.v, bar);
        }
#if !LK_BULK_COPY
        arrive_after_copies(bar);
#endif
        at.advance(p.n_stages);
    }

    /* Where this lane's tile of the part's tiles from `first` on is. */
    __device__ __forceinline__ void find_tiles(found_part *f, int32_t first) {
        const lk_cuda_layer &layer = p.layer;
        const int32_t i = first + lane;
        f->page = f->twin = 0;
        if (i >= f->end) return;
        const int64_t row_table = (int64_t)f->part.row * layer.table_stride;
        const int64_t entry = row_table + lk_unit_page(&f->unit, i);
        if (f->n_kept > 0) f->page = __ldcg(layer.page + entry);
        if (f->n_kept < D && lk_unit_is_whole(&f->unit, i)) f->twin = __ldcg(layer.twin + entry);
    }

    /* Bring the first n_tiles into L2, up to 32. */
    __device__ __forceinline__ void prefetch(const found_part &f, int32_t n_tiles) {
#if LK_BULK_COPY
        if (!f.exists || lane >= n_tiles || !(f.page || f.twin)) return;
        const int64_t page = f.page + f.kept_off, twin = f.twin + f.dropped_off;
        const tile_bytes n =
            bytes_of(f.n_kept, f.twin != 0, groups_of(f.part, f.part.tile_begin + lane));
        if (n.page) bulk_prefetch(page, n.page);
        if (n.twin) bulk_prefetch(twin, n.twin);
        if (n.v) bulk_prefetch((f.n_kept > 0 ? page : twin) + tile_layout<D, 4>(f.n_kept).v, n.v);
#endif
    }

    /* Copy the next tile. */
    __device__ __forceinline__ void fetch_tile() {
        const int32_t n_kept = now.n_kept;
        const int32_t i = (tile - now.part.tile_begin) % LK_WARP;
        if (i == 0 && tile > now.part.tile_begin) find_tiles(&now, tile);
        const int64_t page = __shfl_sync(LK_ALL, now.page, i) + now.kept_off;
        const int64_t twin = __shfl_sync(LK_ALL, now.twin, i) + now.dropped_off;
        const bool whole = n_kept < D && lk_unit_is_whole(&now.unit, tile);
        const int32_t n_groups = groups_of(now.part, tile);
#pragma unroll
        for (int g = 0; g < 4; g += smem::shape::GROUPS)
            fetch_stage(page, twin, n_kept, whole, g, n_groups - g);
        tile++;
    }

    /* Copy n neighbouring rows of D; as copy, by one lane where there are bulk copies. */
    __device__ __forceinline__ void fetch_rows(T *to, const void *from, int64_t first, int32_t n,
                                               uint64_t *bar) {
        const int64_t address = reinterpret_cast<int64_t>(static_cast<const T *>(from) + first);
        copy(reinterpret_cast<unsigned char *>(to), address, (uint32_t)(n * D) * sizeof(T), bar);
    }

    /* Tell the other warps of the part `now`, with its q, and k and v of the new token if it has the token's tile; that there
     * is none ends their work. */
    __device__ __forceinline__ void hand_over() {
        const decode_part &part = now.part;
        const int slot = n_parts & 1;
        uint64_t *bar = &s.part_full[slot];
        T *to = s.q + slot * (p.r + 2) * D;
        const bool with_new = now.exists && p.k && part.ends && part.end > 0;
        const bool together = p.q_stride[1] == D;
        warp_wait(&s.part_empty[slot], ((n_parts >> 1) & 1) ^ 1, lane);
        if (lane == 0) {
            s.part[slot] = part;
            if (!now.exists) s.part[slot].row = LK_NO_PART;
        }
        if (!LK_BULK_COPY || lane == 0) {
#if LK_BULK_COPY
            const int32_t n_rows = now.exists ? p.r + 2 * with_new : 0;
            barrier_expect(bar, (uint32_t)(n_rows * D * sizeof(T)));
#endif
#pragma unroll 1
            for (int32_t i = 0; now.exists && i < (together ? 1 : p.r); i++)
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
        n_parts++;
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

    __device__ __forceinline__ void open_chunk(int32_t share, int32_t place) {
        chunk = lk_cut_chunk(&cut, share, place);
        begin = lk_cut_begin(&cut, share, place);
        end = lk_cut_begin(&cut, share, place + 1);
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
        const uint32_t base = next_base + sum - cost;
        lane_tile_begin = lane_tile_end = 0;
        if (g < p.layer.n_heads) {
#pragma unroll 1
            for (uint32_t cost_at = begin;; cost_at = end) {
                lane_tile_begin = lane_tile_end;
                lane_tile_end = lk_unit_first_tile(&u, base, cost_at);
                if (cost_at == end) break;
            }
        }
        heads_left = __ballot_sync(LK_ALL, lane_tile_begin < lane_tile_end);
        next_base += __shfl_sync(LK_ALL, sum, LK_WARP - 1);
        next_head += LK_WARP;
    }

    /* The chunk's next part, if it has more. */
    __device__ __forceinline__ void find_part() {
        after.exists = false;
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
        decode_part &part = after.part;
        after.exists = true;
        part.row = row;
        part.head = next_head - LK_WARP + i;
        part.chunk = chunk;
        part.tile_begin = __shfl_sync(LK_ALL, lane_tile_begin, i);
        part.tile_end = __shfl_sync(LK_ALL, lane_tile_end, i);
        part.end = view.end;
        part.full_lo = view.full_lo;
        after.n_kept = s.n_kept[part.head];
        after.kept_off = s.kept_off[part.head];
        after.dropped_off = s.dropped_off[part.head];
        after.unit = lk_unit_make(view.end, view.full_lo, p.layer.sink, after.n_kept, D);
        part.ends = part.tile_end == after.unit.n_tiles;
        after.end = after.unit.is_void ? part.tile_begin : part.tile_end;
        find_tiles(&after, part.tile_begin);
    }

    /* The part after `now`: the chunk's next one, or the first one of the next chunk that has any, if more may be taken. */
    __device__ __forceinline__ void find_after(bool may_take) {
#pragma unroll 1
        for (;;) {
            find_part();
            if (after.exists || !may_take || cut.n_chunks == 1) return;
            int32_t taken = 0;
            if (lane == 0) taken = gridDim.x + atomicAdd(p.n_taken, 1);
            taken = __shfl_sync(LK_ALL, taken, 0);
            const int32_t place = taken / (int32_t)gridDim.x;
            if (place >= cut.n_chunks) return;
            open_chunk(taken % (int32_t)gridDim.x, place);
        }
    }

    /* When the plan is made: begin with the block's first chunk. */
    __device__ __forceinline__ void prepare() {
        sum_rows(s.row_base, p.layer.n_rows, lane);
        __syncwarp();
        cut = lk_cut_make(s.row_base[p.layer.n_rows], p.layer.n_rows * p.layer.n_heads, gridDim.x,
                          lk_whole_cost(D), LK_PLAN_HALVINGS);
        now.exists = false;
        now.end = tile = turn = 0;
        open_chunk(blockIdx.x, 0);
    }

    /* Ask for tiles, part after part. Unless is_sure, lengths may change yet: find the first part, and bring as many tiles into
     * L2 as the ring holds, twice as many where a block has megabytes to read; wait for earlier kernels; and ask for q. The
     * tiles come with the next call, when it is known that lengths are what they were.
     *
     * What comes after a part is found before its last few tiles are asked for: to take a chunk and to find its first page are
     * two round trips to memory, in which the ring would run dry. */
    __device__ __forceinline__ void run(const bool is_sure) {
#pragma unroll 1
        for (;;) {
            if (tile == turn) {
                turn = -1;
                find_after(is_sure);
                if (!is_sure) {
                    const int32_t n_rings = cut.n_halvings < 4 ? 1 : 2;
                    prefetch(after, n_rings * p.n_stages * smem::shape::GROUPS / 4);
                    wait_for_earlier_kernels();
                }
            }
            if (tile < now.end) {
                fetch_tile();
                continue;
            }
            now = after;
            if (!is_sure && !now.exists) {
                now.end = turn = tile; /* look again in the next call */
                return;
            }
            hand_over();
            if (!now.exists) return;
            tile = now.part.tile_begin;
            turn = max(tile, now.end - LK_LOOK_AHEAD);
            if (is_sure) continue;
            turn = max(turn, min(tile + 1, now.end)); /* the first tile is waited for */
            return;
        }
    }

    /* The part that was handed over, if any, is none: let the others skip it, when its q has landed. */
    __device__ __forceinline__ void give_up() {
        if (now.exists && lane == 0) s.part[0].row = LK_SKIPPED;
    }
};

#endif
