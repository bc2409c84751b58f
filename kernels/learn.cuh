/* learn.cuh: what the kernels of mask learning share: parameters, which keys a block meets, and products of tiles.
 *
 * A query row is one (query token t, query head r of the KV head) pair, number i = t * R + r: the rows of one KV head share
 * its K and V. A unit is one KV head of one row of the batch. Tiles in shared memory have rows of D + 8 elements: an odd
 * number of 16-byte words, so that eight rows of a matrix lie in different banks. Products are m16n8k16 with f32 sums; a
 * lane's places in their operands are those of the PTX manual. */
#ifndef LEANK_LEARN_CUH
#define LEANK_LEARN_CUH

#include "common.cuh"

#include <math.h>

#define LEARN_THREADS 128
#define LEARN_WARPS 4
#define LEARN_ROWS 128        /* query rows of a block */
#define LEARN_FORWARD_KEYS 64 /* keys of a tile, forward */
#define LEARN_BACKWARD_KEYS                                                                        \
    32 /* and backward, where two kinds of products are in registers at a time */
#define LEARN_SPAN_KEYS 64 /* keys of a block of the kernel that owns keys of the span */
#define LEARN_SPAN_ROWS 32 /* and query rows of its tiles */
#define LEARN_MOST_COLUMNS (1 << 29)
/* Blocks that a multiprocessor of 64 K registers and 228 KB of shared memory holds at a time. */
#define LEARN_BLOCKS_PER_PROCESSOR(D) ((D) <= 64 ? 3 : 2)

/* One call. Parts of sums stand split by split; they are added in that order. */
typedef struct {
    lk_strided q, k_context, v_context, k, v;
    lk_strided o, d_o;     /* backward */
    const float *alpha;    /* [Hkv, D] */
    const int64_t *start;  /* [B] or NULL */
    const uint8_t *hidden; /* [Hkv] or NULL */
    const float *lse;      /* [B, Hq, T], backward */
    void *out;             /* o or dq [B, Hq, T, D] */
    float *lse_out;        /* [B, Hq, T], forward */
    void *dk, *dv;         /* [B, Hkv, T, D] */
    float *dalpha;         /* [Hkv, D] */
    float *sums;           /* [S, B * Hkv, T * R, D] o or dq, not normalised, not scaled */
    float2 *
        states; /* forward: [S, B * Hkv, T * R] m and l; backward: [B * Hkv, T * R] shift and delta */
    float *dalpha_parts; /* [B * Hkv, row blocks, S, D] */
    int32_t head_dim, n_rows, n_heads, r, n_context, n_columns;
    int32_t n_query_rows; /* T * R */
    int32_t row_blocks, key_blocks, n_splits, n_stages;
    int32_t sink, recent, recent_rows; /* recent * R */
    float scale, scale_log2;           /* scale * log2(e): logits are in base 2 inside */
} learn_params;

/* ------------------------------------------------------------------------------------------- which keys */

/* Columns before it are padding. A start beyond the columns is one at their end. */
__device__ __forceinline__ int32_t learn_start(const learn_params &p, int32_t b) {
    if (!p.start) return 0;
    const int64_t start = p.start[b], n = (int64_t)p.n_context + p.n_columns;
    return (int32_t)(start < 0 ? 0 : start < n ? start : n);
}

/* Query rows before this one belong to padding columns. */
__device__ __forceinline__ int32_t learn_first_real(const learn_params &p, int32_t start) {
    return max(start - p.n_context, 0) * p.r;
}

enum { MIDDLE, SINK, RECENT, KEY_KINDS };

/* Columns of keys that some query row of a block has of each kind, and the tiles they make; a column near the window's
 * edge is middle for some rows and window for others, and so in two ranges. */
typedef struct {
    int32_t first_column, last_column; /* of the query rows that are real */
    int32_t from[KEY_KINDS], to[KEY_KINDS], n_tiles[KEY_KINDS];
} key_ranges;

typedef struct {
    int32_t kind, first, end; /* columns [first, min(end, first + keys of a tile)) */
} key_tile;

__device__ __forceinline__ key_ranges find_ranges(const learn_params &p, int32_t start, bool hidden,
                                                  int32_t first_row, int32_t tile_keys) {
    const int32_t last_row = min(first_row + LEARN_ROWS, p.n_query_rows) - 1;
    key_ranges a = {};
    a.first_column = max(p.n_context + first_row / p.r, start);
    a.last_column = p.n_context + last_row / p.r;
    if (a.last_column < start) return a; /* all rows are padding */
    const int32_t sink_end = min(start + p.sink, a.last_column + 1);
    a.from[MIDDLE] = sink_end;
    a.to[MIDDLE] = hidden ? 0 : a.last_column - p.recent + 1;
    a.from[SINK] = start;
    a.to[SINK] = sink_end;
    a.from[RECENT] = max(sink_end, a.first_column - p.recent + 1);
    a.to[RECENT] = a.last_column + 1;
#pragma unroll
    for (int i = 0; i < KEY_KINDS; i++)
        a.n_tiles[i] = max(a.to[i] - a.from[i] + tile_keys - 1, 0) / tile_keys;
    return a;
}

/* Tile i of a block: first those of middle keys. */
__device__ __forceinline__ key_tile find_tile(const key_ranges &a, int32_t i, int32_t tile_keys) {
    key_tile tile = {MIDDLE, 0, 0};
    if (i >= a.n_tiles[MIDDLE]) {
        i -= a.n_tiles[MIDDLE];
        tile.kind = i < a.n_tiles[SINK] ? SINK : RECENT;
        if (tile.kind == RECENT) i -= a.n_tiles[SINK];
    }
    tile.first = a.from[tile.kind] + i * tile_keys;
    tile.end = a.to[tile.kind];
    return tile;
}

/* The tile's columns [x, y) that a query in `column` (-1: no query) attends to. */
__device__ __forceinline__ int2 seen_columns(const learn_params &p, const key_tile &tile,
                                             int32_t column) {
    const int32_t window_from = column - p.recent + 1;
    return make_int2(tile.kind == RECENT ? max(tile.first, window_from) : tile.first,
                     min(tile.end, tile.kind == MIDDLE ? window_from : column + 1));
}

/* Whether every real row of the block attends to every key of the tile. */
__device__ __forceinline__ bool is_whole(const learn_params &p, const key_ranges &a,
                                         const key_tile &tile, int32_t tile_keys) {
    return seen_columns(p, tile, a.last_column).x <= tile.first &&
           seen_columns(p, tile, a.first_column).y >= tile.first + tile_keys;
}

/* ------------------------------------------------------------------------------------------- async copies */

/* 16 bytes into shared memory, or zeros. */
__device__ __forceinline__ void copy_16(uint32_t to, const void *from, bool wanted) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(to), "l"(from),
                 "r"(wanted ? 16 : 0)
                 : "memory");
}
__device__ __forceinline__ void copy_8(uint32_t to, const void *from, bool wanted) {
    asm volatile("cp.async.ca.shared.global [%0], [%1], 8, %2;" ::"r"(to), "l"(from),
                 "r"(wanted ? 8 : 0)
                 : "memory");
}
__device__ __forceinline__ void end_copies() {
    asm volatile("cp.async.commit_group;" ::: "memory");
}
__device__ __forceinline__ void wait_for_copies() {
    asm volatile("cp.async.wait_group 0;" ::: "memory");
}

/* ------------------------------------------------------------------------------------------------- tiles */

template <int D> struct learn_tile {
    static constexpr int STRIDE = D + 8; /* elements from one row to the next */
    static constexpr int WORDS = D / 8;  /* of 16 bytes that hold something */
};

/* K or V [columns] of a unit: the context's, then the span's. */
template <typename T> struct key_source {
    const T *context, *span;
};

template <typename T>
__device__ __forceinline__ key_source<T> find_source(const lk_strided &context,
                                                     const lk_strided &span, int32_t b, int32_t g) {
    return {static_cast<const T *>(context.data) + b * context.stride[0] + g * context.stride[1],
            static_cast<const T *>(span.data) + b * span.stride[0] + g * span.stride[1]};
}

/* Rows of a tile = columns from tile.first on, zeros past its end. */
template <typename T, int D, int N>
__device__ __forceinline__ void copy_keys(const learn_params &p, const key_source<T> &source,
                                          int64_t context_stride, int64_t span_stride,
                                          const key_tile &tile, T *to) {
    constexpr int WORDS = learn_tile<D>::WORDS, STRIDE = learn_tile<D>::STRIDE;
#pragma unroll
    for (int k = 0; k < (N * WORDS + LEARN_THREADS - 1) / LEARN_THREADS; k++) {
        const int i = k * LEARN_THREADS + (int)threadIdx.x;
        if (N * WORDS % LEARN_THREADS != 0 && i >= N * WORDS) break;
        const int row = i / WORDS, word = i % WORDS;
        const bool wanted = tile.first + row < tile.end;
        const int32_t column = wanted ? tile.first + row : tile.first;
        const int32_t t = column - p.n_context;
        const T *from =
            t < 0 ? source.context + column * context_stride : source.span + t * span_stride;
        copy_16(smem_address(to + row * STRIDE + word * 8), from + word * 8, wanted);
    }
}

/* Query row i of a unit in q, o or do. */
template <typename T>
__device__ __forceinline__ const T *query_row(const learn_params &p, const lk_strided &x, int32_t b,
                                              int32_t g, int32_t i) {
    const int32_t t = i / p.r, h = g * p.r + i % p.r;
    return static_cast<const T *>(x.data) + b * x.stride[0] + h * x.stride[1] + t * x.stride[2];
}

template <typename T> __device__ __forceinline__ float2 unpack2(uint32_t x);
template <> __device__ __forceinline__ float2 unpack2<__nv_bfloat16>(uint32_t x) {
    return make_float2(__uint_as_float(x << 16), __uint_as_float(x & 0xffff0000u));
}
template <> __device__ __forceinline__ float2 unpack2<__half>(uint32_t x) {
    return __half22float2(*reinterpret_cast<const __half2 *>(&x));
}

/* 8 numbers times 8 factors. */
template <typename T> __device__ __forceinline__ uint4 times(const uint4 &x, const float *factor) {
    uint4 y;
    const uint32_t *from = &x.x;
    uint32_t *to = &y.x;
#pragma unroll
    for (int i = 0; i < 4; i++) {
        const float2 pair = unpack2<T>(from[i]);
        to[i] = pack2<T>(pair.x * factor[2 * i], pair.y * factor[2 * i + 1]);
    }
    return y;
}

/* N rows into a tile, zeros where from(row) is NULL; times alpha [D] unless that is NULL. By all threads. */
template <typename T, int D, int N, typename From>
__device__ __forceinline__ void load_rows(const From &from, const float *alpha, T *to) {
    constexpr int WORDS = learn_tile<D>::WORDS, STRIDE = learn_tile<D>::STRIDE;
#pragma unroll 4
    for (int i = (int)threadIdx.x; i < N * WORDS; i += LEARN_THREADS) {
        const int row = i / WORDS, word = i % WORDS;
        const T *at = from(row);
        uint4 x = make_uint4(0, 0, 0, 0);
        if (at) x = *reinterpret_cast<const uint4 *>(at + word * 8);
        if (alpha) x = times<T>(x, alpha + word * 8);
        *reinterpret_cast<uint4 *>(to + row * STRIDE + word * 8) = x;
    }
}

/* ---------------------------------------------------------------------------------------------- products */

/* Four 8 x 8 matrices; lane l gives the address of row l % 8 of matrix l / 8. */
__device__ __forceinline__ uint4 load_matrices(uint32_t address) {
    uint4 x;
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(x.x), "=r"(x.y), "=r"(x.z), "=r"(x.w)
                 : "r"(address)
                 : "memory");
    return x;
}
__device__ __forceinline__ uint4 load_transposed(uint32_t address) {
    uint4 x;
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(x.x), "=r"(x.y), "=r"(x.z), "=r"(x.w)
                 : "r"(address)
                 : "memory");
    return x;
}

/* Elements from the tile's begin to what a lane gives the address of. By 16 rows: operand a of a product (rows 0-7, 8-15,
 * then the same 8 channels on), and operand b of a product over rows, transposed: rows k, k + 8 of 8 channels, then the
 * next 8 channels. By columns: operand b of a product over channels: rows 0-7 of channels k, k + 8, then rows 8-15. */
template <int D> __device__ __forceinline__ int place_by_rows(int lane) {
    return lane % 16 * learn_tile<D>::STRIDE + lane / 16 * 8;
}
template <int D> __device__ __forceinline__ int place_by_columns(int lane) {
    return (lane / 16 * 8 + lane % 8) * learn_tile<D>::STRIDE + lane / 8 % 2 * 8;
}

/* s [M * 16, N * 8] = a [M * 16, D] times b [N * 8, D] transposed. Addresses: place_by_rows of a, place_by_columns of b. */
template <typename T, int D, int M, int N>
__device__ __forceinline__ void multiply_channels(float (&s)[M][N][4], uint32_t a, uint32_t b) {
    constexpr int ROW_BYTES = 2 * learn_tile<D>::STRIDE;
#pragma unroll
    for (int m = 0; m < M; m++)
#pragma unroll
        for (int n = 0; n < N; n++)
#pragma unroll
            for (int e = 0; e < 4; e++) s[m][n][e] = 0.0f;
#pragma unroll
    for (int k = 0; k < D / 16; k++) {
        uint4 x[M];
#pragma unroll
        for (int m = 0; m < M; m++) x[m] = load_matrices(a + m * 16 * ROW_BYTES + k * 32);
#pragma unroll
        for (int n = 0; n < N / 2; n++) {
            const uint4 y = load_matrices(b + n * 16 * ROW_BYTES + k * 32);
#pragma unroll
            for (int m = 0; m < M; m++) {
                mma_16<T>(s[m][2 * n], x[m], y.x, y.y);
                mma_16<T>(s[m][2 * n + 1], x[m], y.z, y.w);
            }
        }
    }
}

/* y [M * 16, D] += w [M * 16, N * 8] times x [N * 8, D]. w as multiply_channels leaves it; address: place_by_rows of x. */
template <typename T, int D, int M, int N>
__device__ __forceinline__ void multiply_rows(float (&y)[M][D / 8][4], const float (&w)[M][N][4],
                                              uint32_t x) {
    constexpr int ROW_BYTES = 2 * learn_tile<D>::STRIDE;
#pragma unroll
    for (int k = 0; k < N / 2; k++) {
        uint4 a[M];
#pragma unroll
        for (int m = 0; m < M; m++)
            a[m] = make_uint4(pack2<T>(w[m][2 * k][0], w[m][2 * k][1]),
                              pack2<T>(w[m][2 * k][2], w[m][2 * k][3]),
                              pack2<T>(w[m][2 * k + 1][0], w[m][2 * k + 1][1]),
                              pack2<T>(w[m][2 * k + 1][2], w[m][2 * k + 1][3]));
#pragma unroll
        for (int n = 0; n < D / 16; n++) {
            const uint4 b = load_transposed(x + k * 16 * ROW_BYTES + n * 32);
#pragma unroll
            for (int m = 0; m < M; m++) {
                mma_16<T>(y[m][2 * n], a[m], b.x, b.y);
                mma_16<T>(y[m][2 * n + 1], a[m], b.z, b.w);
            }
        }
    }
}

/* --------------------------------------------------------------------------------------- blocks of query rows */

/* What a block of query rows is: unit (b, g), its rows, its share of the key tiles. Row blocks of a unit follow each
 * other, so that they find its keys in L2. */
typedef struct {
    int32_t b, g, unit, row_block, split, first_row, start;
} row_block;

__device__ __forceinline__ row_block find_row_block(const learn_params &p) {
    row_block at;
    int32_t i = (int32_t)blockIdx.x;
    at.row_block = i % p.row_blocks;
    i /= p.row_blocks;
    at.split = i % p.n_splits;
    at.unit = i / p.n_splits;
    at.b = at.unit / p.n_heads;
    at.g = at.unit % p.n_heads;
    at.first_row = at.row_block * LEARN_ROWS;
    at.start = learn_start(p, at.b);
    return at;
}

/* What is the same for all threads of such a block; it is read from shared memory to save registers. */
template <typename T> struct row_block_shared {
    row_block at;
    key_ranges ranges;
    key_source<T> k, v;
    int32_t first_tile, end_tile;
    int32_t columns[LEARN_ROWS]; /* of the queries; -1 where there is none, or padding */
};

template <typename T>
__device__ __forceinline__ void fill_shared(const learn_params &p, int32_t tile_keys,
                                            row_block_shared<T> *s) {
    const row_block at = find_row_block(p);
    const int32_t i = at.first_row + (int32_t)threadIdx.x, column = p.n_context + i / p.r;
    s->columns[threadIdx.x] = i < p.n_query_rows && column >= at.start ? column : -1;
    if (threadIdx.x == 0) {
        const bool hidden = p.hidden && p.hidden[at.g];
        s->at = at;
        s->ranges = find_ranges(p, at.start, hidden, at.first_row, tile_keys);
        const int64_t n = (int64_t)s->ranges.n_tiles[MIDDLE] + s->ranges.n_tiles[SINK] +
                          s->ranges.n_tiles[RECENT];
        s->first_tile = (int32_t)(n * at.split / p.n_splits);
        s->end_tile = (int32_t)(n * (at.split + 1) / p.n_splits);
        s->k = find_source<T>(p.k_context, p.k, at.b, at.g);
        s->v = find_source<T>(p.v_context, p.v, at.b, at.g);
    }
    __syncthreads();
}

/* The row of x that row `row` of the block is; NULL: none. */
template <typename T>
__device__ __forceinline__ const T *block_row(const learn_params &p, const row_block_shared<T> &s,
                                              const lk_strided &x, int row) {
    return s.columns[row] < 0 ? NULL : query_row<T>(p, x, s.at.b, s.at.g, s.at.first_row + row);
}

template <typename T, int D, int N>
__device__ __forceinline__ void copy_tile(const learn_params &p, const row_block_shared<T> &s,
                                          int32_t i, T *k, T *v) {
    const key_tile tile = find_tile(s.ranges, i, N);
    copy_keys<T, D, N>(p, s.k, p.k_context.stride[2], p.k.stride[2], tile, k);
    copy_keys<T, D, N>(p, s.v, p.v_context.stride[2], p.v.stride[2], tile, v);
    end_copies();
}

/* Set x of pairs that are not attended. rows: the first of this warp's 32. */
template <typename T, int M, int N>
__device__ __forceinline__ void set_unseen(const learn_params &p, const row_block_shared<T> &s,
                                           const key_tile &tile, int rows, int lane, float value,
                                           float (&x)[M][N][4]) {
#pragma unroll
    for (int m = 0; m < M; m++) {
#pragma unroll
        for (int half = 0; half < 2; half++) {
            const int32_t column = s.columns[rows + 16 * m + 8 * half + lane / 4];
            const int2 seen = seen_columns(p, tile, column);
#pragma unroll
            for (int n = 0; n < N; n++) {
#pragma unroll
                for (int e = 0; e < 2; e++) {
                    const int32_t j = tile.first + 8 * n + 2 * (lane % 4) + e;
                    if (j < seen.x || j >= seen.y) x[m][n][2 * half + e] = value;
                }
            }
        }
    }
}

/* This warp's 32 rows of sums, for the rows that there are. */
template <int D>
__device__ __forceinline__ void store_sums(const learn_params &p, const row_block &at, int rows,
                                           int lane, const float (&x)[2][D / 8][4]) {
    const int64_t n_units = (int64_t)p.n_rows * p.n_heads;
#pragma unroll
    for (int m = 0; m < 2; m++) {
#pragma unroll
        for (int half = 0; half < 2; half++) {
            const int32_t i = at.first_row + rows + 16 * m + 8 * half + lane / 4;
            if (i >= p.n_query_rows) continue;
            float *to =
                p.sums + ((at.split * n_units + at.unit) * p.n_query_rows + i) * D + 2 * (lane % 4);
#pragma unroll
            for (int n = 0; n < D / 8; n++)
                *reinterpret_cast<float2 *>(to + 8 * n) =
                    make_float2(x[m][n][2 * half], x[m][n][2 * half + 1]);
        }
    }
}

#endif
