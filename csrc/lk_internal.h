/* lk_internal.h: what the C files share and nobody else sees; not installed. */
#ifndef LK_INTERNAL_H
#define LK_INTERNAL_H

#include "leank.h"

#include <stdatomic.h>
#include <stdbool.h>

/* Return early: LK_CHECK for a condition on input, LK_TRY to hand a status on. Builds with LEANK_DEBUG=1 say where. */
#ifdef LK_DEBUG
#include <stdio.h>
#define LK_LOG(text) ((void)fprintf(stderr, "leank: %s:%d: %s\n", __FILE__, __LINE__, text))
#else
#define LK_LOG(text) ((void)0)
#endif
#define LK_CHECK(cond, status)                                                                     \
    do {                                                                                           \
        if (!(cond)) {                                                                             \
            LK_LOG(#status ": " #cond);                                                            \
            return (status);                                                                       \
        }                                                                                          \
    } while (0)
#define LK_TRY(call)                                                                               \
    do {                                                                                           \
        lk_status lk_try_status_ = (call);                                                         \
        if (lk_try_status_ != LK_OK) return lk_try_status_;                                        \
    } while (0)

/* a * b into *out; false on overflow. */
static inline bool lk_mul(size_t a, size_t b, size_t *out) {
    return !__builtin_mul_overflow(a, b, out);
}

/* An OpenMP directive, or nothing. */
#ifdef _OPENMP
#define OMP(directive) _Pragma(#directive)
#else
#define OMP(directive)
#endif

static inline int64_t lk_min(int64_t a, int64_t b) { return a < b ? a : b; }
static inline int64_t lk_max(int64_t a, int64_t b) { return a > b ? a : b; }
static inline int64_t lk_ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

/* ------------------------------------------------------------------------------------------ alloc.c */

/* All memory of the library comes from here, so that tests can make any allocation fail. Zeroed; NULL on
 * failure or when n_items * item_bytes overflows. lk_alloc_pages: 64-byte aligned, not zeroed. */
void *lk_alloc(size_t n_items, size_t item_bytes);
void *lk_alloc_pages(size_t bytes);
void lk_dealloc(void *p);
bool lk_poison_on(void);

/* ------------------------------------------------------------------------------------------- pool.c */

#define LK_VALUE_SLICE 64

/* Where things are inside the pages and twins of a layer. Immutable once built, shared by cache copies.
 *
 * G (group) is 2 for bf16 and 1 for f32 and f16: bf16 is stored in pairs, so that one 32-bit lane holds two
 * channels of a token (K) or two tokens of a channel (V): the operand form of the BF16 dot instructions, and
 * two cheap integer operations away from f32 on older CPUs. With c, j, d the channel, token slot, value index:
 *   K block of n channels  [n/G][P][G]:    element (c, j) at ((c/G)*P + j)*G + c%G
 *   V block, in slices of up to 64 value indices (w of them, the first is d0):
 *                          [P/G][w][G]:    element (j, d) at d0*P + ((j/G)*w + d - d0)*G + j%G
 * Slices make a pass over 64 value indices of all tokens, which is what registers hold, read V in memory order.
 * The region of a head in a page, if Dk[g] > 0: its kept K block, then its V block.
 * The region of a head in a twin: the K block of its dropped channels; for an empty head then its V block.
 * A slab of n items holds all regions of the first head, then all of the next: what a pass over the tokens of one head
 * reads lies in one piece, which the CPU's prefetchers follow.
 * Unused slots of a page hold anything: what was there before, what a cropped token left, NaN under lk_test_poison. */
typedef struct lk_geom {
    lk_dtype dtype;
    int32_t n_heads, head_dim, v_dim, group;
    size_t elem_bytes;
    int64_t sink, recent, slack;
    size_t page_bytes, twin_bytes;     /* twin_bytes is 0 when every head keeps everything */
    size_t page_k_bytes, twin_k_bytes; /* the K part of each */
    int32_t *n_kept;                   /* [Hkv] Dk */
    uint16_t *order;             /* [Hkv, D] kept channels ascending, then dropped ones ascending */
    size_t *page_off, *twin_off; /* [Hkv + 1] bytes of the regions of all heads before this one */
    size_t *v_off;               /* [Hkv] bytes from the start of the region that has V */
} lk_geom;

struct lk_slab;

/* A page or a twin: its data never moves; lk_region says where it is in the slab. refs counts the row tables and undo
 * lists that hold it, over all copies of the cache. */
typedef struct lk_page {
    unsigned char *slab_data;
    size_t slab_items, slab_index;
    struct lk_slab *slab;
    atomic_int_fast32_t refs;
    uint64_t mark;             /* visit stamp of lk_cache_memory, under the pool lock */
    struct lk_page *next_free; /* while it is free */
} lk_page;

/* Region of head g in a page (off: page_off of the geometry) or in a twin (twin_off); NULL if it is empty. */
static inline unsigned char *lk_region(const lk_page *page, const size_t *off, int32_t g) {
    const size_t bytes = off[g + 1] - off[g];
    return bytes ? page->slab_data + page->slab_items * off[g] + page->slab_index * bytes : NULL;
}

/* ------------------------------------------------------------------------------------------ cache.c */

#define LK_PROMPT_OPEN INT64_MAX
#define LK_NOT_HELD INT64_MAX

typedef struct {
    int64_t len;  /* tokens stored */
    int64_t lo;   /* see leank.h */
    int64_t n0;   /* prompt length; LK_PROMPT_OPEN while it is not complete, or the row is empty */
    int64_t held; /* len when it was held, see lk_cache_hold; LK_NOT_HELD */
    lk_page **page; /* [n_pages] */
    lk_page **twin; /* [n_pages] NULL where retired, or where the layer has no dropped channels */
    int64_t n_pages, capacity;
    uint8_t *real; /* [column capacity] 1 where that column is a token of this row */
} lk_row;

/* A table entry that a put has replaced; the put's undo brings the old item back, settle releases it. */
typedef struct {
    lk_page **entry, *old; /* old may be NULL */
} lk_replaced;

struct lk_cache {
    struct lk_pool *pool;
    const lk_geom *geom; /* the pool's */
    lk_row *row;         /* [n_rows] */
    int64_t n_rows, n_columns, column_capacity;
    int64_t prompt_columns;       /* announced, or -1 */
    int64_t max_tokens, max_call; /* reserved mode, else -1 */
    lk_replaced *replaced;        /* [n_replaced] since the last settle */
    int64_t n_replaced;
    bool unsettled; /* a put was neither settled nor undone */
};

/* lo of a row of len tokens whose prompt is complete, given its lo so far. */
int64_t lk_settled_lo(const lk_geom *geom, int64_t lo, int64_t len);

/* Room for n_pages table entries of a row. */
lk_status lk_row_grow_tables(lk_row *row, int64_t n_pages);

/* What one row of a reserved cache holds ready. */
typedef struct {
    int64_t n_pages, n_sink_twins, n_recent_twins;
} lk_reservation;
lk_reservation lk_reserved_per_row(const lk_geom *geom, int64_t max_tokens, int64_t max_call);

/* Release what a put has replaced. */
void lk_forget_replaced(lk_cache *cache);

/* Take back the columns of a put that was not settled, and whatever it changed with them. */
void lk_cache_undo(lk_cache *cache, int64_t n_columns);

/* n0 as it stands with the columns stored now, settled or not; LK_PROMPT_OPEN while it is not complete. */
int64_t lk_row_prompt(const lk_cache *cache, int64_t row);

/* --------------------------------------------------------------------------- decode_<isa>.c, dispatch.c */

#define LK_JOB_COLUMNS 64
#define LK_GROUP_COLUMNS 4 /* columns that share the registers of a kernel */

/* Floats from one column of o to the next: rows of whole 64-byte lines, so that kernels store whole vectors. */
static inline int64_t lk_o_stride(const lk_geom *geom) { return lk_ceil_div(geom->v_dim, 16) * 16; }

/* What a kernel works in; one memory block per thread, cut by lk_scratch_carve (decode.c). */
typedef struct {
    float *
        q; /* [n_cols, D] kept channels, then dropped ones; bf16 dot kernels: [n_cols, D/2] pairs */
    float
        *p; /* [n_cols, P] probabilities; bf16 dot kernels: [n_cols, P/2] pairs, same row stride */
    float *alpha;       /* [n_cols] */
    float *kept, *full; /* [LK_GROUP_COLUMNS, P] q . k over the kept channels, over all channels */
    unsigned char
        *edge; /* [LK_EDGE_ROWS] V rows of pairs with one token blanked; group == 2 only */
} lk_scratch;

#define LK_EDGE_ROWS 3

size_t lk_scratch_bytes(const lk_geom *geom, int32_t n_cols);
void lk_scratch_carve(const lk_geom *geom, int32_t n_cols, void *memory, lk_scratch *out);

/* One piece of work: query columns of one KV head of one row, over a range of pages. A query column is one
 * (query token, query head) pair. The state that comes out covers just these pages, so that pieces merge. */
typedef struct {
    const lk_geom *geom;
    int32_t head;         /* g */
    lk_page *const *page; /* the row's tables */
    lk_page *const *twin; /* read only where a column has window keys */
    int64_t page_begin, page_end;
    bool q_is_packed;              /* scratch.q already holds these columns */
    int32_t n_cols;                /* 1..LK_JOB_COLUMNS */
    const void *q[LK_JOB_COLUMNS]; /* [D] contiguous, cache dtype */
    int64_t end[LK_JOB_COLUMNS];   /* keys j < end are visible: p + 1, or 0 for a padding column */
    int64_t full_lo[LK_JOB_COLUMNS]; /* keys in [S0, full_lo) are middle; the others are window */
    float scale_log2;                /* scale * log2(e): logits and m are in base 2 */
    float softcap_log2;              /* softcap * log2(e); 0: logits are not capped */
    float two_over_softcap;          /* see v_softcap in lk_vec.h */
    lk_scratch scratch;
    float *m,
        *l;   /* out [n_cols]: largest logit (-inf if nothing was visible), sum of exp2(s - m) */
    float *o; /* out [n_cols, lk_o_stride]: sum of exp2(s - m) * v, not normalised */
} lk_job;

typedef void (*lk_job_fn)(const lk_job *job);

struct lk_learn_job;
typedef void (*lk_learn_fn)(const struct lk_learn_job *job);

typedef struct {
    lk_learn_fn forward, backward_rows, backward_keys;
} lk_learn_kernels;

typedef struct {
    const char *name;
    lk_job_fn decode[3];    /* by lk_dtype */
    lk_learn_kernels learn; /* lk_learn.h */
} lk_isa_table;

/* The table in use; NULL when LEANK_ISA names something that cannot run. */
const lk_isa_table *lk_dispatch(void);

/* Which of these exist besides scalar is up to the build: LK_BUILD_AVX2, LK_BUILD_AVX512, LK_BUILD_AVX512BF16,
 * LK_BUILD_NEON are defined where decode_<isa>.c and learn_<isa>.c got their compiler flags. */
#define LK_DECLARE_DECODE(isa)                                                                     \
    void lk_decode_f32_##isa(const lk_job *job);                                                   \
    void lk_decode_bf16_##isa(const lk_job *job);                                                  \
    void lk_decode_f16_##isa(const lk_job *job)

LK_DECLARE_DECODE(scalar);
LK_DECLARE_DECODE(avx2);
LK_DECLARE_DECODE(avx512);
LK_DECLARE_DECODE(neon);
void lk_decode_bf16_avx512bf16(const lk_job *job); /* its f32 and f16 are those of avx512 */

#endif
