/* span.cuh: attention of several tokens per row, which are stored already; see lk_cuda_span in leank_cuda.h.
 *
 * Grid: one block per multiprocessor; each takes chunks of the work (plan.h) as the blocks of decode.cuh do, but a unit is a
 * block of query columns of a (row, head), and all 8 warps compute. A warp has up to 32 columns (16 at D 256): column_warps
 * of them share the tokens of a tile, the others have other tokens, and their states are merged when the part ends.
 *
 * A part's tiles come in segments: the sink's, those between, those of the window, since tiles of one kind have one size. Of a
 * segment's tiles as many are in the ring as it has room for; the warp that is the last to be done with a tile asks for the
 * next one in its place, so that no warp waits to fetch. */
#ifndef LEANK_SPAN_CUH
#define LEANK_SPAN_CUH

#include "columns.cuh"
#include "decode_fetch.cuh"
#include "decode_merge.cuh"
#include "span_shape.cuh"

/* --------------------------------------------------------------------------------------------------- parts */

template <typename T, int D>
__device__ __forceinline__ void open_chunk(const span_params &p, const span_smem<T, D> &s) {
    span_cursor &at = *s.cursor;
    const int32_t n_chunks = at.cut.n_blocks * at.cut.n_chunks;
    const int32_t chunk = at.taken < n_chunks ? lk_cut_chunk_taken(&at.cut, at.taken) : n_chunks;
    at.begin = lk_cut_begin(&at.cut, chunk);
    at.end = at.taken < n_chunks ? lk_cut_begin(&at.cut, chunk + 1) : at.begin;
    /* The last row that begins at or before `begin`: row_base[low] <= begin < row_base[high], if anywhere. */
    int32_t low = 0, high = p.layer.n_rows;
    while (high - low > 1) {
        const int32_t middle = (low + high) / 2;
        if (s.row_base[middle] <= at.begin) low = middle;
        else high = middle;
    }
    at.row = low;
    at.unit = 0;
    at.base = s.row_base[low];
    s.part->chunk = chunk;
}

/* Find the block's next part, by one thread. */
template <typename T, int D>
__device__ __forceinline__ void next_part(const span_params &p, const span_smem<T, D> &s) {
    span_cursor &at = *s.cursor;
    span_part &part = *s.part;
    for (;;) {
        while (at.row < p.layer.n_rows && at.base < at.end) {
            const int32_t head = at.unit / p.column_blocks, block = at.unit % p.column_blocks;
            const row_view view = s.row[at.row];
            const lk_unit u = lk_unit_make(view.end, view.full_lo, p.layer.sink, s.n_kept[head], D);
            part.row = at.row;
            part.head = head;
            part.block = block;
            part.tile_begin = lk_unit_first_tile(&u, at.base, at.begin);
            part.tile_end = lk_unit_first_tile(&u, at.base, at.end);
            part.ends = part.tile_end == u.n_tiles;
            part.end = view.end;
            part.full_lo = view.full_lo;
            at.base += lk_unit_cost(&u);
            if (++at.unit == p.layer.n_heads * p.column_blocks) {
                at.unit = 0;
                at.row++;
            }
            if (part.tile_begin < part.tile_end) return;
        }
        if (at.taken >= at.cut.n_blocks * at.cut.n_chunks) break;
        at.taken = at.cut.n_chunks > 1 ? (int32_t)gridDim.x + atomicAdd(p.n_taken, 1)
                                       : at.cut.n_blocks * at.cut.n_chunks;
        open_chunk(p, s);
    }
    part.row = -1;
}

/* q, positions and the first token of the window of the part's columns; q by way of the ring. By all threads. */
template <typename T, int D>
__device__ __forceinline__ void load_columns(const span_params &p, const span_smem<T, D> &s,
                                             const span_part &part) {
    using shape = span_shape<D>;
    const lk_cuda_layer &layer = p.layer;
    const int32_t first = part.block * p.r, n_columns = min(p.r, p.n_columns - first);
    const int32_t n_loaded = p.column_warps * shape::WARP_COLUMNS;
    const int32_t *position = p.position + (int64_t)part.row * p.position_stride;
    const int32_t lo = state_lo(layer)[part.row], n0 = state_n0(layer)[part.row];
    for (int32_t c = threadIdx.x; c < n_loaded; c += shape::THREADS) {
        const int32_t at = c < n_columns ? position[(first + c) % p.n_t] : -1;
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
        const int32_t h = part.head * (p.n_q_heads / layer.n_heads) + (first + c) / p.n_t;
        const int32_t t = (first + c) % p.n_t;
        uint4 x = make_uint4(0, 0, 0, 0); /* padding may hold anything */
        if (position[t] >= 0)
            x = *reinterpret_cast<const uint4 *>(q + h * p.q_stride[1] + t * p.q_t + word * 8);
        *reinterpret_cast<uint4 *>(rows + c * shape::Q_STRIDE + word * 8) = x;
    }
    __syncthreads();
    make_q_operand<D>(reinterpret_cast<const uint16_t *>(rows), shape::Q_STRIDE, s.order, n_columns,
                      p.column_warps * shape::COLUMN_TILES, s.n_kept[part.head], s.q_operand,
                      threadIdx.x, shape::THREADS);
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

/* This warp is done with tile i in `slot`; the last one asks for the tile that comes there next. */
template <typename T, int D>
__device__ __forceinline__ void release_tile(const span_smem<T, D> &s, const span_segment &segment,
                                             int32_t i, int32_t slot, uint32_t phase, int lane) {
    __syncwarp();
    uint32_t n_before = 0;
    if (lane == 0) {
        barrier_arrive(&s.empty[slot]);
        n_before = atomicAdd(&s.released[slot], 1u);
    }
    n_before = __shfl_sync(LK_ALL, n_before, 0);
    const int32_t next = i + segment.n_slots;
    if ((n_before + 1) % span_shape<D>::WARPS != 0 || next >= segment.n) return;
    warp_wait(&s.empty[slot], phase, lane); /* is over: that what they read was read */
    fetch_tile(s, segment, next, slot, lane);
}

/* Take two groups of 16 tokens that are middle for every query. */
template <typename T, int D>
__device__ __forceinline__ void take_middle_pair(const span_params &p,
                                                 column_state<D, span_shape<D>::COLUMN_TILES> &w,
                                                 const uint32_t *q, const unsigned char *kept_k,
                                                 const unsigned char *v, int32_t n_kept, int lane) {
    constexpr int N = span_shape<D>::COLUMN_TILES;
    float x[2 * N][4] = {};
    add_shared_kept<T, D, N, 2>(q, n_kept, kept_k, lane, x);
    scale_logits(p, x);
    uint32_t operand[2 * N][2];
    take_logits<T, 2, D, N>(w, x, operand);
    add_values<T, 2, D, N>(w, v, operand, lane);
}

/* Take 16 tokens of a whole tile: each query sees those up to its own, as window or as middle. first: the position of the first
 * of them, some query sees it. position, window_from: of this warp's columns. */
template <typename T, int D>
__device__ __forceinline__ void
take_whole_group(const span_params &p, const span_part &part,
                 column_state<D, span_shape<D>::COLUMN_TILES> &w, const uint32_t *q,
                 const int32_t *position, const int32_t *window_from, const unsigned char *kept_k,
                 const unsigned char *dropped_k, const unsigned char *v, int32_t first,
                 int32_t n_kept, int lane) {
    constexpr int N = span_shape<D>::COLUMN_TILES;
    const int32_t sink = p.layer.sink;
    float kept[N][4] = {}, x[N][4];
    add_shared_kept<T, D, N, 1>(q, n_kept, kept_k, lane, kept);
#pragma unroll
    for (int n = 0; n < N; n++)
#pragma unroll
        for (int i = 0; i < 4; i++) x[n][i] = kept[n][i];
    add_shared_dropped<T, D, N>(q, n_kept, dropped_k, lane, x);
    uint32_t hidden = 0; /* a bit for each logit */
#pragma unroll
    for (int n = 0; n < N; n++) {
#pragma unroll
        for (int i = 0; i < 4; i++) {
            const int32_t column = 8 * n + 2 * (lane % 4) + i % 2;
            const int32_t j = first + lane / 4 + 8 * (i / 2);
            const bool middle = j >= sink && j < window_from[column];
            if (middle) x[n][i] = kept[n][i];
            if (j > position[column] || (middle && n_kept == 0)) hidden |= 1u << (4 * n + i);
        }
    }
    scale_logits(p, x);
#pragma unroll
    for (int n = 0; n < N; n++)
#pragma unroll
        for (int i = 0; i < 4; i++)
            if (hidden >> (4 * n + i) & 1) x[n][i] = -INFINITY;
    uint32_t operand[N][2];
    take_logits<T, 1, D, N>(w, x, operand);
    /* By some query. */
    const auto is_seen = [&](int32_t j) {
        return j < part.end && (n_kept > 0 || j < sink || j >= part.full_lo);
    };
    add_some_values<T>(w, v, operand, first, is_seen, lane);
}

/* What this warp has to do with a tile: its tokens are those of pairs [pair, pair_end) of groups. */
template <typename T, int D>
__device__ __forceinline__ void
take_pairs(const span_params &p, const span_smem<T, D> &s, const span_part &part,
           column_state<D, span_shape<D>::COLUMN_TILES> &w, int32_t column_warp, bool whole,
           const unsigned char *stage, int32_t page, int32_t pair, int32_t pair_end, int32_t n_kept,
           int lane) {
    using shape = span_shape<D>;
    const uint32_t *q = s.q_operand + column_warp * shape::WARP_Q_WORDS;
    const tile_layout<D, 4> layout(n_kept);
#pragma unroll 1
    for (; pair < pair_end; pair++) {
        const unsigned char *kept_k = stage + 64 * pair * n_kept;
        const unsigned char *v = stage + layout.v + 64 * pair * D;
        if (!whole) {
            take_middle_pair<T, D>(p, w, q, kept_k, v, n_kept, lane);
            continue;
        }
        const int32_t column = column_warp * shape::WARP_COLUMNS;
#pragma unroll 1
        for (int32_t group = 2 * pair; group < 2 * pair + 2; group++) {
            const int32_t first = page * LK_PAGE_TOKENS + 16 * group;
            if (first >= part.end) break;
            take_whole_group<T, D>(p, part, w, q, s.position + column, s.window_from + column,
                                   stage + 32 * group * n_kept,
                                   stage + layout.dropped + 32 * group * (D - n_kept),
                                   stage + layout.v + 32 * group * D, first, n_kept, lane);
        }
    }
}

/* --------------------------------------------------------------------------------------------------- results */

/* The states of the warps that share columns become one, a column tile at a time: the unit's result, or a state that
 * combine.cu merges with those of the unit's other parts. By all threads. */
template <typename T, int D>
__device__ __forceinline__ void
finish_part(const span_params &p, const span_smem<T, D> &s, const span_part &part,
            column_state<D, span_shape<D>::COLUMN_TILES> &w, int warp, int lane) {
    using shape = span_shape<D>;
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
    for (int n = 0; n < shape::COLUMN_TILES; n++) {
        w.put(n, states + warp * 8 * LK_STATE_FLOATS(D), 8, lane);
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
    if (warp == 0) sum_rows(s.row_base, p.layer.n_rows, lane);
    __syncthreads();
    if (threadIdx.x == 0) {
        const int32_t n_units = p.layer.n_rows * p.layer.n_heads * p.column_blocks;
        s.cursor->cut =
            lk_cut_make(s.row_base[p.layer.n_rows], n_units, gridDim.x, D, p.most_halvings);
        s.cursor->taken = (int32_t)blockIdx.x;
        open_chunk(p, s);
    }

    column_state<D, shape::COLUMN_TILES> w;
    uint32_t phases = 0; /* of the slots' barriers, a bit each */
#pragma unroll 1
    for (;;) {
        if (threadIdx.x == 0) next_part(p, s);
        __syncthreads();
        const span_part part = *s.part;
        if (part.row < 0) return;
        const int32_t n_kept = s.n_kept[part.head];
        const lk_unit u = lk_unit_make(part.end, part.full_lo, p.layer.sink, n_kept, D);
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
                const uint32_t phase = phases >> slot & 1;
                barrier_wait(&s.full[slot], phase);
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
                release_tile(s, segment, i, slot, phase, lane);
                phases ^= 1u << slot;
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
