/* span.cuh: attention of several tokens per row, which are stored already; see lk_cuda_span in leank_cuda.h.
 *
 * Grid: one block per multiprocessor; each has a chunk of the work (plan.h) as the blocks of decode.cuh have, but a unit is a
 * block of query columns of a (row, head), and all 8 warps compute. A warp has up to 32 columns (16 at D 256): column_warps
 * of them share the tokens of a tile, the others have other tokens, and their states are merged when the part ends.
 *
 * A part's tiles come in segments: the sink's, those between, those of the window, since tiles of one kind have one size. Of a
 * segment's tiles as many are in the ring as it has room for. The warps take turns with asking for the next one, in the place of
 * a tile with which all are done by then, so that hardly ever one waits for others. */
#ifndef LEANK_SPAN_CUH
#define LEANK_SPAN_CUH

#include "decode_fetch.cuh"
#include "decode_merge.cuh"
#include "span_shape.cuh"
#include "span_tile.cuh"

/* --------------------------------------------------------------------------------------------------- parts */

/* One chunk for each block: it has to get ready for each part, which costs more than blocks that end at different times. */
template <typename T, int D>
__device__ __forceinline__ void open_chunk(const span_params &p, const span_smem<T, D> &s) {
    span_cursor &at = *s.cursor;
    const int32_t n_units = p.layer.n_rows * p.layer.n_heads * p.column_blocks;
    const int32_t chunk = (int32_t)blockIdx.x;
    const lk_cut cut = lk_cut_make(s.row_base[count_views(p)], n_units, (int32_t)gridDim.x,
                                   lk_whole_cost(D) + p.tile_cost, 0);
    at.begin = lk_cut_begin(&cut, chunk);
    at.end = lk_cut_begin(&cut, chunk + 1);
    /* The last view that begins at or before `begin`: row_base[low] <= begin < row_base[high], if anywhere. */
    int32_t low = 0, high = count_views(p);
    while (high - low > 1) {
        const int32_t middle = (low + high) / 2;
        if (s.row_base[middle] <= at.begin) low = middle;
        else high = middle;
    }
    at.view = low;
    at.head = 0;
    at.base = s.row_base[low];
    s.part->chunk = chunk;
}

/* Find the block's next part, by one thread. */
template <typename T, int D>
__device__ __forceinline__ void next_part(const span_params &p, const span_smem<T, D> &s) {
    span_cursor &at = *s.cursor;
    span_part &part = *s.part;
    while (at.view < count_views(p) && at.base < at.end) {
        const row_view view = s.row[at.view];
        const lk_unit u = make_unit(p, view, s.n_kept[at.head]);
        part.row = at.view / p.column_blocks;
        part.block = at.view % p.column_blocks;
        part.head = at.head;
        part.view = view;
        part.tile_begin = lk_unit_first_tile(&u, at.base, at.begin);
        part.tile_end = lk_unit_first_tile(&u, at.base, at.end);
        part.ends = part.tile_end == u.n_tiles;
        at.base += lk_unit_cost(&u);
        const int32_t i = at.view;
        if (++at.head == p.layer.n_heads) {
            at.head = 0;
            at.view++;
        }
        if (part.tile_begin == part.tile_end) continue;
        part.seen = first_of_view(p, i) + 1;
        part.whole_from = full_lo_of(p.layer, state_lo(p.layer)[part.row],
                                     state_n0(p.layer)[part.row], view.end - 1);
        return;
    }
    part.row = -1;
}

/* q, positions and the first token of the window of the part's columns; q by way of the ring. By all threads. */
template <typename T, int D>
__device__ __forceinline__ void load_columns(const span_params &p, const span_smem<T, D> &s,
                                             const span_part &part) {
    using shape = span_shape<D>;
    const lk_cuda_layer &layer = p.layer;
    const int32_t r = p.n_columns / p.n_t;
    const int32_t first = part.block * p.r, n_columns = min(p.r, p.n_columns - first);
    const int32_t n_loaded = p.column_warps * shape::WARP_COLUMNS;
    const int32_t *position = p.position + (int64_t)part.row * p.position_stride;
    const int32_t lo = state_lo(layer)[part.row], n0 = state_n0(layer)[part.row];
    for (int32_t c = threadIdx.x; c < n_loaded; c += shape::THREADS) {
        const int32_t at = c < n_columns ? position[(first + c) / r] : -1;
        s.position[c] = at;
        s.window_from[c] = full_lo_of(layer, lo, n0, at);
    }
    for (int32_t c = threadIdx.x; c < D; c += shape::THREADS)
        s.order[c] = head_order(layer, part.head)[c];
    const T *q = static_cast<const T *>(p.q) + part.row * p.q_stride[0];
    T *rows = reinterpret_cast<T *>(s.ring);
#pragma unroll 4
    for (int32_t i = threadIdx.x; i < n_columns * (D / 8); i += shape::THREADS) {
        const int32_t c = i / (D / 8), word = i % (D / 8);
        const int32_t h = part.head * r + (first + c) % r, t = (first + c) / r;
        uint4 x = make_uint4(0, 0, 0, 0); /* padding may hold anything */
        if (position[t] >= 0)
            x = *reinterpret_cast<const uint4 *>(q + h * p.q_stride[1] + t * p.q_t + word * 8);
        *reinterpret_cast<uint4 *>(rows + c * shape::Q_STRIDE + word * 8) = x;
    }
    __syncthreads();
    make_q_rows<D>(reinterpret_cast<const uint16_t *>(rows), shape::Q_STRIDE, s.order, n_columns,
                   p.column_warps * shape::TILES, s.n_kept[part.head], s.q_operand, threadIdx.x,
                   shape::THREADS);
}

/* ---------------------------------------------------------------------------------------------------- tiles */

/* Tiles [first, first + n) of a unit, all of one kind. */
typedef struct {
    int32_t first, n;
    bool whole;
    uint32_t page_bytes, twin_bytes; /* that a tile has */
    int32_t slot_bytes, n_slots;
} span_segment;

template <int D>
__device__ __forceinline__ span_segment find_segment(const lk_unit &u, int32_t n_kept,
                                                     int32_t first, int32_t end,
                                                     int32_t ring_bytes) {
    span_segment x;
    x.first = first;
    x.whole = lk_unit_is_whole(&u, first);
    if (first < u.sink_tiles) end = min(end, u.sink_tiles);
    else if (!x.whole) end = min(end, u.tail_tile);
    x.n = min(end - first, LK_SPAN_TILES);
    x.page_bytes = n_kept > 0 ? 128u * (uint32_t)(n_kept + D) : 0;
    x.twin_bytes = !x.whole ? 0 : n_kept > 0 ? 128u * (uint32_t)(D - n_kept) : 256u * D;
    x.slot_bytes = (int32_t)(x.page_bytes + x.twin_bytes);
    x.n_slots = min(ring_bytes / x.slot_bytes, LK_SPAN_SLOTS);
    return x;
}

/* Where the segment's tiles are, a thread each. */
template <typename T, int D>
__device__ __forceinline__ void find_tiles(const span_params &p, const span_smem<T, D> &s,
                                           const span_part &part, const lk_unit &u,
                                           const span_segment &segment) {
    static_assert(span_shape<D>::THREADS >= LK_SPAN_TILES, "a thread for each tile");
    const int32_t i = threadIdx.x;
    if (i >= segment.n) return;
    const int64_t entry =
        (int64_t)part.row * p.layer.table_stride + lk_unit_page(&u, segment.first + i);
    if (segment.page_bytes > 0) s.page[i] = p.layer.page[entry] + head_kept_off(p.layer, part.head);
    if (segment.twin_bytes > 0)
        s.twin[i] = p.layer.twin[entry] + head_dropped_off(p.layer, part.head);
}

/* Ask for tile i of the segment, by one warp: it lands as tile_layout<D, 4> says. */
template <typename T, int D>
__device__ __forceinline__ void fetch_tile(const span_smem<T, D> &s, const span_segment &segment,
                                           int32_t i, int32_t slot, int lane) {
    unsigned char *to = s.ring + slot * segment.slot_bytes;
    uint64_t *bar = &s.full[slot];
#if LK_BULK_COPY
    if (lane != 0) return;
    barrier_expect(bar, segment.page_bytes + segment.twin_bytes);
    if (segment.page_bytes > 0) bulk_copy(to, s.page[i], segment.page_bytes, bar, stream_policy());
    if (segment.twin_bytes > 0)
        bulk_copy(to + segment.page_bytes, s.twin[i], segment.twin_bytes, bar, stream_policy());
#else
    warp_copy(to, s.page[i], segment.page_bytes, lane);
    warp_copy(to + segment.page_bytes, s.twin[i], segment.twin_bytes, lane);
    arrive_after_copies(bar);
#endif
}

/* This warp is done with tile i of the segment. Now it may be its turn to ask for the tile that comes in the place of an earlier
 * one: half of the ring earlier, so that the other warps are done with it too. phases: of the slots, with that of tile i over. */
template <typename T, int D>
__device__ __forceinline__ void release_tile(const span_smem<T, D> &s, const span_segment &segment,
                                             int32_t i, int32_t slot, uint32_t phases, int warp,
                                             int lane) {
    barrier_arrive_warp(&s.empty[slot], lane);
    const int32_t earlier = segment.n_slots / 2, next = i - earlier + segment.n_slots;
    if (i % span_shape<D>::WARPS != warp || i < earlier || next >= segment.n) return;
    slot -= earlier;
    if (slot < 0) slot += segment.n_slots;
    /* When the phase is over, what they read was read. */
    warp_wait(&s.empty[slot], (phases >> slot & 1) ^ 1, lane);
    fetch_tile(s, segment, next, slot, lane);
}

/* Take two groups of 16 tokens that every query sees: as window, or without dropped_k as middle. */
template <typename T, int D>
__device__ __forceinline__ void
take_seen_pair(const span_params &p, query_state<D, span_shape<D>::TILES> &w, const uint32_t *q,
               const unsigned char *kept_k, const unsigned char *dropped_k, const unsigned char *v,
               int32_t n_kept, int lane) {
    constexpr int N = span_shape<D>::TILES;
    float x[4 * N][4] = {};
    add_row_kept<T, D, N, 2>(q, n_kept, kept_k, lane, x);
    if (dropped_k) add_row_dropped<T, D, N, 2>(q, n_kept, dropped_k, lane, x);
    uint32_t operand[4 * N][2];
    take_rows<T, 2>(w, scale_rows(p, x), x, operand, lane);
    add_values<T, 2, D>(w.o, v, operand, lane);
}

/* Take 16 tokens of a whole tile: each query sees some of them, as window or as middle. first: the position of the first
 * of them, some query sees it. position, window_from: of this warp's columns. */
template <typename T, int D>
__device__ __forceinline__ void
take_whole_group(const span_params &p, const span_part &part,
                 query_state<D, span_shape<D>::TILES> &w, const uint32_t *q,
                 const int32_t *position, const int32_t *window_from, const unsigned char *kept_k,
                 const unsigned char *dropped_k, const unsigned char *v, int32_t first,
                 int32_t n_kept, int lane) {
    constexpr int N = span_shape<D>::TILES;
    const int32_t sink = p.layer.sink, token = first + 2 * (lane % 4);
    float kept[2 * N][4] = {}, x[2 * N][4];
    add_row_kept<T, D, N, 1>(q, n_kept, kept_k, lane, kept);
#pragma unroll
    for (int n = 0; n < 2 * N; n++)
#pragma unroll
        for (int i = 0; i < 4; i++) x[n][i] = kept[n][i];
    add_row_dropped<T, D, N, 1>(q, n_kept, dropped_k, lane, x);
    uint32_t hidden = 0; /* a bit for each logit */
#pragma unroll
    for (int n = 0; n < 2 * N; n++) {
#pragma unroll
        for (int i = 0; i < 4; i++) {
            const int32_t column = 16 * (n % N) + lane / 4 + 8 * (i / 2);
            const int32_t j = token + 8 * (n / N) + i % 2;
            const bool middle = j >= sink && j < window_from[column];
            if (middle) x[n][i] = kept[n][i];
            if (j > position[column] || (middle && n_kept == 0)) hidden |= 1u << (4 * n + i);
        }
    }
    const float scale = scale_rows(p, x);
#pragma unroll
    for (int n = 0; n < 2 * N; n++)
#pragma unroll
        for (int i = 0; i < 4; i++)
            if (hidden >> (4 * n + i) & 1) x[n][i] = -INFINITY;
    uint32_t operand[2 * N][2];
    take_rows<T, 1>(w, scale, x, operand, lane);
    /* By some query. */
    const auto is_seen = [&](int32_t j) {
        return j < part.view.end && (n_kept > 0 || j < sink || j >= part.view.full_lo);
    };
    add_some_values<T, D>(w.o, v, operand, first, is_seen, lane);
}

/* What this warp has to do with a tile: its tokens are those of pairs [pair, pair_end) of groups. */
template <typename T, int D>
__device__ __forceinline__ void
take_pairs(const span_params &p, const span_smem<T, D> &s, const span_part &part,
           query_state<D, span_shape<D>::TILES> &w, int32_t column_warp, bool whole,
           const unsigned char *stage, int32_t page, int32_t pair, int32_t pair_end, int32_t n_kept,
           int lane) {
    using shape = span_shape<D>;
    const uint32_t *q = s.q_operand + column_warp * shape::WARP_Q_WORDS;
    const tile_layout<D, 4> layout(n_kept);
#pragma unroll 1
    for (; pair < pair_end; pair++) {
        const unsigned char *kept_k = stage + 64 * pair * n_kept;
        const unsigned char *dropped_k = stage + layout.dropped + 64 * pair * (D - n_kept);
        const unsigned char *v = stage + layout.v + 64 * pair * D;
        const int32_t first = page * LK_PAGE_TOKENS + 32 * pair, end = first + 32;
        const bool is_window = end <= p.layer.sink || first >= part.whole_from;
        if (!whole || (is_window && end <= part.seen)) {
            take_seen_pair<T, D>(p, w, q, kept_k, whole ? dropped_k : NULL, v, n_kept, lane);
            continue;
        }
        const int32_t column = column_warp * shape::WARP_COLUMNS;
#pragma unroll 1
        for (int32_t g = 0; g < 2 && first + 16 * g < part.view.end; g++)
            take_whole_group<T, D>(p, part, w, q, s.position + column, s.window_from + column,
                                   kept_k + 32 * g * n_kept, dropped_k + 32 * g * (D - n_kept),
                                   v + 32 * g * D, first + 16 * g, n_kept, lane);
    }
}

/* --------------------------------------------------------------------------------------------------- results */

/* The states of the warps that share columns become one, 8 columns of each at a time: the unit's result, or a state that
 * combine.cu merges with those of the unit's other parts. By all threads. */
template <typename T, int D>
__device__ __forceinline__ void
finish_part(const span_params &p, const span_smem<T, D> &s, const span_part &part,
            query_state<D, span_shape<D>::TILES> &w, int warp, int lane) {
    using shape = span_shape<D>;
    static_assert(2 * shape::WARPS * shape::WARP_COLUMNS * (D + 2) <= LK_SPAN_STATE_FLOATS,
                  "the workspace has room for two parts of a chunk");
    const bool begins = part.tile_begin == 0;
    const int32_t unit = (part.row * p.layer.n_heads + part.head) * p.column_blocks + part.block;
    const int32_t n_columns = min(p.r, p.n_columns - part.block * p.r);
    float *into = begins && part.ends ? NULL : p.states + part_place(p, part.chunk, begins);
    if (threadIdx.x == 0 && begins) p.unit_chunks[unit].x = part.chunk;
    if (threadIdx.x == 0 && part.ends) p.unit_chunks[unit].y = part.chunk;
    float *states = reinterpret_cast<float *>(s.ring); /* [warps][8] */
    const int32_t token_warps = shape::WARPS / p.column_warps;
    const int32_t step = p.column_warps * 8 * LK_STATE_FLOATS(D);
    __syncthreads(); /* the ring is not read any more */
#pragma unroll
    for (int n = 0; n < 2 * shape::TILES; n++) {
        w.put(n, states + warp * 8 * LK_STATE_FLOATS(D), lane);
        __syncthreads();
#pragma unroll 1
        for (int32_t i = threadIdx.x; i < p.column_warps * 8 * (D / 4); i += shape::THREADS) {
            const int32_t d = i % (D / 4) * 4, from = i / (D / 4);
            const int32_t column = from / 8 * shape::WARP_COLUMNS + 8 * n + from % 8;
            if (column >= n_columns) continue;
            float m, l, o[4];
            merge_warps<D>(states + from * LK_STATE_FLOATS(D), step, token_warps, d, &m, &l, o);
            if (s.position[column] < 0) { /* padding: whatever it saw */
                m = -INFINITY;
                l = o[0] = o[1] = o[2] = o[3] = 0.0f;
            }
            if (into) put_state<D>(into, p.r, column, d, m, l, o);
            else write_out<T>(p, find_query(p, unit, column), l > 0.0f, d, m, l, o);
        }
        __syncthreads();
    }
}

template <typename T, int D>
__global__ void __launch_bounds__(span_shape<D>::THREADS, 1)
    span_kernel(const __grid_constant__ span_params p) {
    using shape = span_shape<D>;
    extern __shared__ __align__(128) unsigned char memory[];
    span_smem<T, D> s(memory, p);
    const int warp = threadIdx.x / LK_WARP, lane = threadIdx.x % LK_WARP;
    /* Warps of one column_warp have the same columns; token_warp says which pairs of groups are a warp's. */
    const int32_t column_warp = warp % p.column_warps, token_warp = warp / p.column_warps;
    const int32_t token_warps = shape::WARPS / p.column_warps;
    s.init(p);
    __syncthreads();
    make_plan(p, s);
    __syncthreads();
    if (warp == 0) sum_rows(s.row_base, count_views(p), lane);
    __syncthreads();
    if (threadIdx.x == 0) open_chunk(p, s);

    query_state<D, shape::TILES> w;
    uint32_t phases = 0; /* of the slots' barriers, a bit each */
#pragma unroll 1
    for (;;) {
        if (threadIdx.x == 0) next_part(p, s);
        __syncthreads();
        const span_part part = *s.part;
        if (part.row < 0) return;
        const int32_t n_kept = s.n_kept[part.head];
        const lk_unit u = make_unit(p, part.view, n_kept);
        load_columns(p, s, part);
        fence_bulk(); /* what the ring held is overwritten by bulk copies */
        w.clear();
        const int32_t tile_end = u.is_void ? part.tile_begin : part.tile_end;
#pragma unroll 1
        for (int32_t tile = part.tile_begin; tile < tile_end;) {
            const span_segment segment = find_segment<D>(u, n_kept, tile, tile_end, p.ring_bytes);
            __syncthreads(); /* the last segment's tiles, and their addresses, are not read any more */
            find_tiles(p, s, part, u, segment);
            __syncthreads();
            if (warp == 0)
                for (int32_t i = 0; i < min(segment.n, segment.n_slots); i++)
                    fetch_tile(s, segment, i, i, lane);
            int32_t slot = 0;
#pragma unroll 1
            for (int32_t i = 0; i < segment.n; i++) {
                barrier_wait(&s.full[slot], phases >> slot & 1);
                /* Two pairs for each of the warps that share columns, or one each in turn. */
                int32_t pair = 0, pair_end = 2;
                if (token_warps > 1) {
                    pair = token_warp % 2;
                    pair_end = pair + (i % (token_warps / 2) == token_warp / 2);
                }
                if (column_warp * shape::WARP_COLUMNS < p.r)
                    take_pairs(p, s, part, w, column_warp, segment.whole,
                               s.ring + slot * segment.slot_bytes, lk_unit_page(&u, tile + i), pair,
                               pair_end, n_kept, lane);
                phases ^= 1u << slot;
                release_tile(s, segment, i, slot, phases, warp, lane);
                if (++slot == segment.n_slots) slot = 0;
            }
            tile += segment.n;
        }
        finish_part(p, s, part, w, warp, lane);
    }
}

/* Sizes that a launch will have with so many column warps; false if they do not fit. */
template <typename T, int D>
static bool fit_span(span_params *p, int32_t column_warps, int32_t smem_bytes) {
    const int32_t most = column_warps * span_shape<D>::WARP_COLUMNS;
    p->column_warps = column_warps;
    p->column_blocks = (p->n_columns + most - 1) / most;
    p->r = p->column_blocks == 1 ? p->n_columns : most;
    const int64_t room = smem_bytes - (int64_t)span_smem<T, D>::fixed_bytes(*p);
    if (room < (int64_t)span_smem<T, D>::least_ring_bytes(*p)) return false;
    /* Enough for the most slots there can be. */
    const int64_t most_bytes = (int64_t)LK_SPAN_SLOTS * span_shape<D>::TILE_BYTES;
    p->ring_bytes = (int32_t)((room < most_bytes ? room : most_bytes) / 128 * 128);
    return true;
}

/* Choose the sizes for p->n_columns columns; LK_E_SHAPE if a block has not enough shared memory. */
template <typename T, int D> static lk_status plan_span(span_params *p, int32_t smem_bytes) {
    int32_t column_warps = 1;
    while (column_warps < span_shape<D>::WARPS &&
           column_warps * span_shape<D>::WARP_COLUMNS < p->n_columns)
        column_warps *= 2;
    while (column_warps > 0 && !fit_span<T, D>(p, column_warps, smem_bytes)) column_warps /= 2;
    return column_warps > 0 ? LK_OK : LK_E_SHAPE;
}

template <typename T, int D>
static lk_status launch_span(const span_params &p, cudaStream_t stream, int32_t *cuda_error) {
    const size_t bytes = (size_t)p.ring_bytes + span_smem<T, D>::fixed_bytes(p);
    const auto kernel = span_kernel<T, D>;
    const cudaError_t error =
        cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, (int)bytes);
    if (error != cudaSuccess) return lk_cuda_launched(error, stream, cuda_error);
    kernel<<<(unsigned)p.n_blocks, span_shape<D>::THREADS, bytes, stream>>>(p);
    return lk_cuda_launched(cudaGetLastError(), stream, cuda_error);
}

/* inst/span_<name>_<D>.cu: the kernel of one dtype and head dim. */
#define LK_SPAN_INSTANCE(name, T, D)                                                               \
    lk_status plan_span_##name##_##D(span_params *p, int32_t smem_bytes) {                         \
        return plan_span<T, D>(p, smem_bytes);                                                     \
    }                                                                                              \
    lk_status launch_span_##name##_##D(const span_params *p, cudaStream_t stream,                  \
                                       int32_t *cuda_error) {                                      \
        return launch_span<T, D>(*p, stream, cuda_error);                                          \
    }

#endif
