/* span_shape.cuh: sizes, parameters and shared memory of the kernel for several tokens per row. */
#ifndef LEANK_SPAN_SHAPE_CUH
#define LEANK_SPAN_SHAPE_CUH

#include "decode_plan.cuh"

#define LK_SPAN_SLOTS 16  /* of the ring, at most */
#define LK_SPAN_TILES 256 /* of a segment, at most */

template <int D> struct span_shape {
    static constexpr int WARPS = 8; /* of 255 registers */
    static constexpr int THREADS = WARPS * LK_WARP;
    /* Row tiles of a warp: o takes 128 registers at D 128 and 256. */
    static constexpr int TILES = D <= 128 ? 2 : 1;
    static constexpr int WARP_COLUMNS = 16 * TILES;
    static constexpr int WARP_Q_WORDS = TILES * (D / 16) * 4 * LK_WARP;
    static constexpr int TILE_BYTES = 2 * D * LK_PAGE_TOKENS * 2;
    /* What else the ring holds, between tiles: rows of q, at a distance that meets other banks; states of a column tile. */
    static constexpr int Q_STRIDE = D + 8;
    static constexpr int MERGE_BYTES = WARPS * 8 * LK_STATE_FLOATS(D) * (int)sizeof(float);
};

/* Column c of a (row, head) is token c / R of its query head c % R. q and o begin at the piece's first token. */
struct span_params : decode_params {
    int64_t q_t;             /* elements of q from a token to the next */
    const int32_t *position; /* [B, position_stride] of each token, see place_kernel */
    int32_t position_stride;
    int32_t column_warps; /* warps that share a tile's tokens; the others have other tokens */
    int32_t ring_bytes;
    uint32_t tile_cost; /* of a tile, beside its bytes */
};

/* A row has a view for each block of its columns: its tokens are about the same for all heads. */
__device__ __forceinline__ int32_t count_views(const span_params &p) {
    return p.layer.n_rows * p.column_blocks;
}

/* Tokens of the row before the first one of a view's columns. */
__device__ __forceinline__ int32_t first_of_view(const span_params &p, int32_t view) {
    const int32_t b = view / p.column_blocks, first = view % p.column_blocks * p.r;
    return tokens_before(
        p.position[(int64_t)b * p.position_stride + first / (p.n_columns / p.n_t)]);
}

/* What the queries of a view see: tokens j < end, those from full_lo on as window for some of them. */
__device__ __forceinline__ row_view view_row(const span_params &p, int32_t view) {
    const int32_t b = view / p.column_blocks, block = view % p.column_blocks;
    const int32_t last = min((block + 1) * p.r, p.n_columns) - 1;
    const int32_t t = last / (p.n_columns / p.n_t) + 1; /* the first token that none has */
    const int32_t first = first_of_view(p, view);
    const int32_t end = t < p.n_t ? tokens_before(p.position[(int64_t)b * p.position_stride + t])
                                  : state_len(p.layer)[b];
    row_view x;
    x.end = end > first ? end : 0;
    x.full_lo = full_lo_of(p.layer, state_lo(p.layer)[b], state_n0(p.layer)[b], first);
    return x;
}

__device__ __forceinline__ lk_unit make_unit(const span_params &p, const row_view &view,
                                             int32_t n_kept) {
    lk_unit u = lk_unit_make(view.end, view.full_lo, p.layer.sink, n_kept, p.layer.head_dim);
    if (u.is_void) return u;
    u.whole_cost += p.tile_cost;
    u.middle_cost += p.tile_cost;
    return u;
}

/* Tiles of a unit that are in one chunk. */
typedef struct {
    int32_t row, head, block; /* row < 0: there is no more; block of the (row, head)'s columns */
    int32_t chunk, tile_begin, tile_end;
    int32_t ends; /* has the unit's last tile */
    row_view view;
    /* Tokens before `seen` are seen, those from whole_from on as window, by every query. */
    int32_t seen, whole_from;
} span_part;

/* Where a block is in the work: its costs [begin, end), and the unit that comes next, of a head and a view, which begins at
 * base. */
typedef struct {
    int32_t view, head;
    uint32_t base, begin, end;
} span_cursor;

template <typename T, int D> struct span_smem {
    unsigned char *ring;
    uint32_t *q_operand;    /* [column_warps][WARP_Q_WORDS] */
    uint64_t *full, *empty; /* [LK_SPAN_SLOTS] a tile has landed; the warps are done with it */
    int64_t *page, *twin;   /* [LK_SPAN_TILES] where tiles of the segment are; 0: nothing is read */
    span_cursor *cursor;
    span_part *part;
    int32_t *position, *window_from; /* [column_warps * WARP_COLUMNS] of each query */
    uint32_t *row_base;              /* [views + 1] cost of all views before */
    row_view *row;                   /* [views] */
    int32_t *n_kept;                 /* [Hkv] */
    uint8_t *order;                  /* [D] of the part's head */

    using shape = span_shape<D>;

    __device__ __forceinline__ span_smem(unsigned char *memory, const span_params &p) {
        const int32_t n_columns = p.column_warps * shape::WARP_COLUMNS;
        ring = memory;
        q_operand = reinterpret_cast<uint32_t *>(ring + p.ring_bytes);
        full = reinterpret_cast<uint64_t *>(q_operand + p.column_warps * shape::WARP_Q_WORDS);
        empty = full + LK_SPAN_SLOTS;
        page = reinterpret_cast<int64_t *>(empty + LK_SPAN_SLOTS);
        twin = page + LK_SPAN_TILES;
        cursor = reinterpret_cast<span_cursor *>(twin + LK_SPAN_TILES);
        part = reinterpret_cast<span_part *>(cursor + 1);
        position = reinterpret_cast<int32_t *>(part + 1);
        window_from = position + n_columns;
        row_base = reinterpret_cast<uint32_t *>(window_from + n_columns);
        row = reinterpret_cast<row_view *>(row_base + p.layer.n_rows * p.column_blocks + 1);
        n_kept = reinterpret_cast<int32_t *>(row + p.layer.n_rows * p.column_blocks);
        order = reinterpret_cast<uint8_t *>(n_kept + p.layer.n_heads);
    }

    /* Bytes beside the ring. */
    static size_t fixed_bytes(const span_params &p) {
        const size_t warps = (size_t)p.column_warps;
        const size_t n_views = (size_t)p.layer.n_rows * (size_t)p.column_blocks;
        return sizeof(uint32_t) * warps * shape::WARP_Q_WORDS +
               sizeof(uint64_t) * 2 * LK_SPAN_SLOTS + sizeof(int64_t) * 2 * LK_SPAN_TILES +
               sizeof(span_cursor) + sizeof(span_part) +
               sizeof(int32_t) *
                   (2 * warps * shape::WARP_COLUMNS + 1 + 3 * n_views + (size_t)p.layer.n_heads) +
               D;
    }

    /* Bytes that the ring has at least. */
    static size_t least_ring_bytes(const span_params &p) {
        const size_t q_bytes =
            sizeof(T) * (size_t)p.column_warps * shape::WARP_COLUMNS * shape::Q_STRIDE;
        size_t least = shape::TILE_BYTES;
        if (least < q_bytes) least = q_bytes;
        if (least < shape::MERGE_BYTES) least = shape::MERGE_BYTES;
        return (least + 127) / 128 * 128;
    }

    /* By all threads, before anything else. */
    __device__ __forceinline__ void init(const span_params &p) {
        for (int32_t i = threadIdx.x; i <= count_views(p); i += blockDim.x) row_base[i] = 0;
        if (threadIdx.x != 0) return;
        for (int i = 0; i < LK_SPAN_SLOTS; i++) {
            barrier_init(&full[i], LK_BULK_COPY ? 1 : LK_WARP);
            barrier_init(&empty[i], shape::WARPS * LK_WARP_ARRIVALS);
        }
        fence_bulk();
    }
};

#endif
