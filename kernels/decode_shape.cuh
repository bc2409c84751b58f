/* decode_shape.cuh: sizes, parameters and shared memory of the decode kernel. */
#ifndef LEANK_DECODE_SHAPE_CUH
#define LEANK_DECODE_SHAPE_CUH

#include "state.cuh"

#define LK_MAX_STAGES 16 /* LK_RING_BYTES / STAGE_BYTES, at most */
/* A longer ring is not faster, and blocks of the next kernel find no room beside it. */
#define LK_RING_BYTES (160 * 1024)
/* Floats of a column's state in shared memory: o [D], m, l, and as many more that no bank is met twice. */
#define LK_STATE_FLOATS(D) ((D) + 6)

/* Groups of 16 tokens that a stage has: a whole tile, or half of a large one, so that the ring has more stages. */
static __host__ __device__ constexpr int stage_groups(int head_dim) {
    return head_dim <= 128 ? 4 : 2;
}

template <int D, int COLUMN_TILES> struct decode_shape {
    static constexpr int GROUPS = stage_groups(D);
    /* Two column tiles take the registers of two teams, and so does a large head dim. */
    static constexpr int COMPUTE_WARPS = COLUMN_TILES == 1 && D <= 128 ? 8 : 4;
    static constexpr int TEAMS = COMPUTE_WARPS / GROUPS;
    static constexpr int HELPER_WARPS = 3;
    static constexpr int FETCH_WARP = COMPUTE_WARPS + HELPER_WARPS;
    static constexpr int COMPUTE_THREADS = COMPUTE_WARPS * LK_WARP;
    static constexpr int HELPER_THREADS = HELPER_WARPS * LK_WARP;
    static constexpr int THREADS = (FETCH_WARP + 1) * LK_WARP;
    /* As many threads would fill the registers: so each has at most 128, and with the same number of warps in every
     * quarter of a multiprocessor, a block of combine.cu fits beside a block. */
    static constexpr int BOUND_THREADS = COMPUTE_WARPS == 8 ? 512 : THREADS;
    static constexpr int STAGE_BYTES = 2 * D * 16 * GROUPS * 2;
    static constexpr int STATE_FLOATS = LK_STATE_FLOATS(D); /* of one warp and column */
    static constexpr int Q_WORDS = COLUMN_TILES * (D / 16) * 2 * LK_WARP;
};

/* Floats of the state of a part in the workspace: o [R, D], m [R], l [R], whole vectors. */
static __host__ __device__ __forceinline__ int32_t part_floats(int32_t r, int32_t head_dim) {
    return (r * (2 + head_dim) + 3) / 4 * 4;
}

/* Floats that the two parts of a block's chunk of a span have: 256 columns at D 128, which are the most. */
#define LK_SPAN_STATE_FLOATS ((size_t)2 * 256 * (128 + 2))

typedef struct {
    lk_cuda_layer layer;
    const void *q, *k, *v;
    int64_t q_stride[2], k_stride[2], v_stride[2];
    void *o;
    float *lse;
    const uint8_t *valid;
    const float *sinks;
    int32_t n_q_heads, r, n_blocks, n_stages;
    /* Query columns. A unit has r of the n_columns of its (row, head), which has column_blocks such units; for one token per
     * row they are the R query heads. Each head has n_t of them, see find_query, and o_stride in o and lse. */
    int32_t n_columns, column_blocks, n_t, o_stride;
    float scale, softcap;
    /* The workspace:
     *   n_taken                 chunks taken beyond one per block; 0 between launches
     *   unit_chunks [B * Hkv]   chunks that have a unit's first and last tile
     *   states [2 * chunks]     part_floats each: parts that are not whole units */
    int32_t *n_taken;
    int2 *unit_chunks;
    float *states;
} decode_params;

/* Tokens j < end of a row are visible, those from full_lo on as window. */
typedef struct {
    int32_t end, full_lo;
} row_view;

/* The part of a unit that is in one chunk, as the fetching warp hands it to the others. */
typedef struct {
    int32_t row, head; /* row < 0: there is no more */
    int32_t chunk, tile_begin, tile_end;
    int32_t ends; /* has the unit's last tile */
    int32_t end, full_lo;
} decode_part;

/* Shared memory; what belongs to a part is double, so that the next part's is there when it begins. */
template <typename T, int D, int COLUMN_TILES> struct decode_smem {
    unsigned char *stage; /* [n_stages] tiles */
    T *q;                 /* [2][R + 2, D], the last two are k and v of the new token */
    uint32_t *q_operand;  /* [2][COLUMN_TILES][D / 16][32 lanes][2], see decode_tile.cuh */
    /* Barriers. [n_stages]: a tile has landed; the teams are done with it. */
    uint64_t *full, *empty;
    /* [2]: part and q are there; q_operand too; they were read. */
    uint64_t *part_full, *q_full, *part_empty;
    /* The warps' states of a part are there; they were read. */
    uint64_t *states_full, *states_empty;
    decode_part *part;  /* [2] */
    float *states;      /* [COMPUTE_WARPS][R][STATE_FLOATS]: o, m, l */
    row_view *row;      /* [B] */
    uint32_t *row_base; /* [B + 1] cost of all rows before */
    int32_t *n_kept;    /* [Hkv] */
    uint8_t *order;     /* [Hkv, D] */

    using shape = decode_shape<D, COLUMN_TILES>;
    static constexpr int N_BARRIERS = 2 * LK_MAX_STAGES + 8;

    __device__ __forceinline__ decode_smem(unsigned char *memory, const decode_params &p) {
        stage = memory;
        q = reinterpret_cast<T *>(stage + (size_t)p.n_stages * shape::STAGE_BYTES);
        q_operand = reinterpret_cast<uint32_t *>(q + 2 * (p.r + 2) * D);
        full = reinterpret_cast<uint64_t *>(q_operand + 2 * shape::Q_WORDS);
        empty = full + LK_MAX_STAGES;
        part_full = empty + LK_MAX_STAGES;
        q_full = part_full + 2;
        part_empty = q_full + 2;
        states_full = part_empty + 2;
        states_empty = states_full + 1;
        part = reinterpret_cast<decode_part *>(full + N_BARRIERS);
        states = reinterpret_cast<float *>(part + 2);
        row_base =
            reinterpret_cast<uint32_t *>(states + shape::COMPUTE_WARPS * p.r * shape::STATE_FLOATS);
        row = reinterpret_cast<row_view *>(row_base + p.layer.n_rows + 1);
        n_kept = reinterpret_cast<int32_t *>(row + p.layer.n_rows);
        order = reinterpret_cast<uint8_t *>(n_kept + p.layer.n_heads);
    }

    /* Bytes beside the stages. */
    static size_t fixed_bytes(const decode_params &p) {
        const size_t n_heads = (size_t)p.layer.n_heads, r = (size_t)p.r;
        return sizeof(T) * 2 * (r + 2) * D + sizeof(uint32_t) * 2 * shape::Q_WORDS +
               sizeof(uint64_t) * N_BARRIERS + sizeof(decode_part) * 2 +
               sizeof(float) * shape::COMPUTE_WARPS * r * shape::STATE_FLOATS +
               sizeof(int32_t) * (1 + 3 * (size_t)p.layer.n_rows + n_heads) + n_heads * D;
    }

    __device__ __forceinline__ void clear_plan(const decode_params &p) {
        for (int32_t b = threadIdx.x; b <= p.layer.n_rows; b += blockDim.x) row_base[b] = 0;
    }

    /* By all threads, before anything else. */
    __device__ __forceinline__ void init(const decode_params &p) {
        clear_plan(p);
        if (threadIdx.x != 0) return;
        for (int i = 0; i < p.n_stages; i++) {
            barrier_init(&full[i], LK_BULK_COPY ? 1 : LK_WARP);
            barrier_init(&empty[i], shape::COMPUTE_WARPS * LK_WARP_ARRIVALS);
        }
        for (int i = 0; i < 2; i++) {
            barrier_init(&part_full[i], LK_BULK_COPY ? 1 : LK_WARP + 1);
            barrier_init(&q_full[i], shape::HELPER_THREADS);
            barrier_init(&part_empty[i], shape::COMPUTE_THREADS + shape::HELPER_THREADS);
        }
        barrier_init(states_full, shape::COMPUTE_THREADS);
        barrier_init(states_empty, shape::HELPER_THREADS);
        fence_bulk();
    }
};

#endif
