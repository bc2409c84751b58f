/* leank.h: the whole public C API of LeanK. Read this file first.
 *
 * LeanK keeps a static set of K channels per KV head and drops the rest of the K cache, except in a
 * window of `sink` first and `recent` last tokens (arXiv 2508.02215). This library stores such a
 * cache in pages, attends to it, and has the attention by which the channels are learned.
 *
 * Letters (the same in C, Python, tests and prose): B rows (batch), T new columns of a call, L cached
 * tokens, Hq query heads (index h), Hkv KV heads (index g), R = Hq/Hkv, D head dim, Dk[g] kept
 * channels of KV head g, Dv value dim, S0 sink tokens, W recent tokens, P tokens of a page.
 *
 * The rule. For a query at position p and a key at position j <= p of the same row:
 *   window key   j < S0, or j >= lo and p - j < W, or j >= lo and p < n0:  scale * q . k, all D channels
 *   middle key   any other, Dk[g] > 0:                                     scale * sum over kept channels
 *   middle key   any other, Dk[g] = 0:                                     not attended at all
 * and one softmax over what is attended, times V. A call may soft-cap these logits, and may add a sink: one more logit
 * per query head in the softmax, whose key has no value. n0 is the row's prompt length: the prompt attends
 * densely, pruning is for what comes after. lo is the first position, at or after S0, whose dropped
 * channels are still stored: it stays behind the window of the next query, unless rows were cropped.
 *
 * Columns and tokens. Callers speak columns: a call brings T columns for all rows, of which a row
 * may use some (padding is not a token and is not stored). A bitmap of real tokens maps the two.
 *
 * Errors are status codes; on any error the cache is as it was. No function prints, exits or keeps
 * a message in static memory. A cache may be used from one thread at a time; copies of one cache
 * share pages and may be used from different threads. */
#ifndef LEANK_H
#define LEANK_H

#include <stddef.h>
#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

#define LK_PAGE_TOKENS 64 /* P: consecutive tokens of one row in one layer that share a page */
#define LK_MAX_HEAD_DIM 512
#define LK_CHANNEL_STEP 8 /* D, Dv and every Dk[g] are multiples of this */

typedef enum {
    LK_OK = 0,
    LK_E_NOMEM, /* an allocation failed */
    LK_E_SHAPE, /* a size does not fit the cache, or sizes overflow */
    LK_E_VALUE, /* an argument is outside its range */
    LK_E_LIMIT, /* the call would pass max_tokens or max_call of a reserved cache */
    LK_E_STATE, /* not allowed now: prompt announced late, nothing to attend to, a put that was not settled */
    LK_E_ISA,   /* unknown instruction set name, or not available on this machine */
    LK_E_DEVICE /* CUDA refused a call */
} lk_status;

/* One sentence for a status; never NULL. */
const char *lk_status_text(lk_status status);

typedef enum { LK_F32 = 0, LK_BF16 = 1, LK_F16 = 2 } lk_dtype;

/* Bytes of one element; 0 for a value that is no lk_dtype. */
size_t lk_dtype_bytes(lk_dtype dtype);

/* ---------------------------------------------------------------- instruction sets (dispatch.c) */

/* Name of the variant in use: "scalar", "avx2", "avx512", "avx512bf16" or "neon". The first call
 * picks the best that was built and that CPU and OS support, or what LEANK_ISA names. Status
 * LK_E_ISA when LEANK_ISA names something that cannot run; *name is then NULL. */
lk_status lk_isa(const char **name);

/* Use the named variant from now on (for tests and benchmarks). */
lk_status lk_isa_force(const char *name);

/* The i-th variant that was built, best first; NULL past the end. *available: it can run here. */
const char *lk_isa_built(int i, int *available);

/* ------------------------------------------------------------------------------- masks (mask.c) */

/* LK_E_SHAPE unless 0 < D <= LK_MAX_HEAD_DIM is a multiple of LK_CHANNEL_STEP and Hkv > 0; LK_E_VALUE
 * unless each head keeps a multiple of `align` channels (align itself a multiple of LK_CHANNEL_STEP).
 * keep [n_heads, D], non-zero = kept. *bad_head gets the first head that does not fit. */
lk_status lk_mask_check(const uint8_t *keep, int64_t n_heads, int64_t head_dim, int64_t align,
                        int64_t *bad_head);

/* Channels of one head, kept ones ascending, then dropped ones ascending; returns how many are kept. */
int32_t lk_mask_order(const uint8_t *keep, int32_t head_dim, int32_t *order);

/* Exact-budget selection: sort each head's channels by score, cut them into blocks of `align`, and keep
 * the blocks with the largest sums over all heads until exactly
 * round(n_heads * D * (1 - ratio) / align) blocks are kept. Equal sums: lower head first, equal scores:
 * lower channel first. Here n_heads is N * Hkv, all heads of all layers together.
 * scores [n_heads, D], finite    keep [n_heads, D] written in full, 0 or 1
 * LK_E_VALUE: ratio outside [0, 1], a score that is not finite, D no multiple of align. */
lk_status lk_mask_select(const float *scores, int64_t n_heads, int64_t head_dim, double ratio,
                         int64_t align, uint8_t *keep);

/* ------------------------------------------------------------------- cache of one layer (cache.c) */

typedef struct {
    lk_dtype dtype;
    int32_t n_heads;     /* Hkv */
    int32_t head_dim;    /* D */
    int32_t v_dim;       /* Dv */
    int64_t sink;        /* S0 >= 0 */
    int64_t recent;      /* W >= 1: a query always sees its own token whole */
    int64_t slack;       /* extra tokens beyond W whose dropped channels stay, for crops; >= 0 */
    const uint8_t *keep; /* [Hkv, D], non-zero = kept; copied */
} lk_config;

typedef struct {
    int64_t n_pages,
        n_twins; /* live, or reserved if that is more; those that rows share count once */
    size_t k_bytes, v_bytes; /* K and V in them, whole pages and twins counted */
    /* What was taken from the allocator for this cache and its copies. As rows grow it exceeds the live bytes by at
     * most 1%, or a page and a twin per row; rows that are cropped or dropped give back whole slabs only. */
    size_t slab_bytes;
} lk_memory;

typedef struct lk_cache lk_cache;

/* An empty growing cache. The mask must pass lk_mask_check with align LK_CHANNEL_STEP. */
lk_status lk_cache_create(const lk_config *config, int64_t n_rows, lk_cache **out);

/* An empty reserved cache: the pages and twins that rows of at most max_tokens tokens, and calls of at most max_call
 * tokens of a row after the prompt, need are allocated now; appending past a limit is LK_E_LIMIT. Two things still come
 * from the allocator, and go back: the dropped channels of a prompt that is attended here, until it is complete, and
 * one more item per row in the call in which rows that shared a page part. */
lk_status lk_cache_create_reserved(const lk_config *config, int64_t n_rows, int64_t max_tokens,
                                   int64_t max_call, lk_cache **out);

/* Accepts NULL. */
void lk_cache_free(lk_cache *cache);

/* A second cache with the same rows; pages are shared and copied before either writes to them. */
lk_status lk_cache_copy(const lk_cache *cache, lk_cache **out);

int64_t lk_cache_n_rows(const lk_cache *cache);
int64_t lk_cache_n_columns(const lk_cache *cache);
/* Per row: tokens stored; n0, or -1 while the prompt is not complete; lo. */
int64_t lk_cache_length(const lk_cache *cache, int64_t row);
int64_t lk_cache_prompt(const lk_cache *cache, int64_t row);
int64_t lk_cache_lo(const lk_cache *cache, int64_t row);
/* Which columns are tokens of the row: real [n_columns], 0 or 1. */
void lk_cache_real(const lk_cache *cache, int64_t row, uint8_t *real);

/* Announce that the first n_columns columns are the prompt, however many calls bring them. Without it a row's
 * prompt is its first call that has a token of that row. LK_E_STATE unless the cache has no column yet. */
lk_status lk_cache_expect_prompt(lk_cache *cache, int64_t n_columns);

/* K and V of the T columns of one call. Strides in elements, last axis contiguous. */
typedef struct {
    const void *k;       /* [B, Hkv, T, D] */
    const void *v;       /* [B, Hkv, T, Dv] */
    int64_t k_stride[3]; /* b, g, t */
    int64_t v_stride[3];
    const uint8_t *valid; /* [B, T] contiguous, non-zero = a token of that row; NULL = all */
    int64_t n_columns;    /* T >= 0 */
    int n_threads;        /* to pack many tokens with; <= 0: what OpenMP would use */
} lk_span;

/* Append and settle: the call for K and V that nobody attends to through this library (a prompt). Dropped
 * channels that would retire at once are never stored. */
lk_status lk_cache_append(lk_cache *cache, const lk_span *span);

/* The two halves, for attending in between: put stores every channel of the new tokens; settle completes the
 * prompt if its columns are all there, raises lo, and frees the dropped channels that are wholly older than
 * W + slack, if they are not held; it cannot fail. Between the two only lk_decode may be called. lk_attend (below) does the whole step. */
lk_status lk_cache_put(lk_cache *cache, const lk_span *span);
void lk_cache_settle(lk_cache *cache);

/* Keep the first n_columns columns (0 <= n_columns <= now). 0 makes every row empty, with a new prompt to come. */
lk_status lk_cache_crop(lk_cache *cache, int64_t n_columns);

/* On: from now on the dropped channels that the rows would need if they were cropped to their present lengths stay,
 * whatever is appended, so that such a crop takes back any number of tokens as if they had never been; without this it
 * does up to `slack`. Calling it again holds the rows as they are then; a prompt that is still to come is not held as
 * such, only what follows it. Off: what was held is freed. LK_E_STATE if the cache is reserved, or a put not settled. */
lk_status lk_cache_hold(lk_cache *cache, int on);

/* Row i becomes the former row rows[i]; reorders, drops and repeats rows. Pages are shared, nothing is copied. */
lk_status lk_cache_select(lk_cache *cache, const int64_t *rows, int64_t n_rows);

/* Back to dense, for debugging and moving between devices: k [Hkv, L, D], v [Hkv, L, Dv] of one row, contiguous,
 * cache dtype, bit-equal to what was appended. What is not stored any more is NaN. */
lk_status lk_cache_gather(const lk_cache *cache, int64_t row, void *k, void *v);

lk_memory lk_cache_memory(const lk_cache *cache);

/* What lk_cache_memory would report (slab_bytes: the same as k_bytes + v_bytes) for rows of the given lengths
 * whose prompt is complete and that were never cropped. max_tokens < 0: growing; else reserved, lengths unused. */
lk_status lk_predict_memory(const lk_config *config, const int64_t *lengths, int64_t n_rows,
                            int64_t max_tokens, int64_t max_call, lk_memory *out);

/* ---------------------------------------------------------------------------- attention (decode.c) */

/* lk_decode: attention of the last T columns of the cache, by the rule at the top of this file.
 * q [B, Hq, T, D], o [B, Hq, T, Dv], both cache dtype, strides in elements, last axis contiguous.
 * The T columns were put but not yet settled, or appended and T = 1. (The last token of a prompt is attended to densely
 * only before it is settled; lo holds for it afterwards.) A logit that is -inf counts as not attended.
 *   softcap  0: none; > 0: logits become softcap * tanh(logit / softcap), window and middle alike (Gemma 2)
 *   sinks    [Hq] f32: natural logits of one more key per head without a value, neither scaled nor capped (GPT-OSS); or
 *            NULL. -inf is no sink; beside +inf nothing else counts, o is 0
 * o of a padding column is 0. f32 accumulation, in which sums of V that are not yet divided by their weights must fit; the
 * variant avx512bf16 takes bf16 values below 2^-126 for 0, as its instruction does. Two runs agree bit for bit, whatever n_threads is.
 * n_threads <= 0: what OpenMP would use. Bytes read per row, window and short splits apart:
 * elem * L * sum over g with Dk[g] > 0 of (Dk[g] + Dv).
 * Truth: tests/reference.py attend(). Source: LeanK section 3; online softmax, Milakov 2018. */
typedef struct {
    const lk_cache *cache;
    const void *q;
    int64_t q_stride[3]; /* b, h, t */
    void *o;
    int64_t o_stride[3];
    int64_t n_q_heads; /* Hq, a multiple of Hkv */
    int64_t n_columns; /* T */
    float scale, softcap;
    const float *sinks;
    int n_threads;
} lk_decode_args;

lk_status lk_decode(const lk_decode_args *args);

/* put, lk_decode, settle: one step of one layer. On any error the cache is as it was. args->cache is `cache`, and
 * args->n_columns is span->n_columns. */
lk_status lk_attend(lk_cache *cache, const lk_span *span, const lk_decode_args *args);

/* ------------------------------------------------------------------------------- mask learning (learn.c) */

/* The mixed attention by which a mask is learned: middle keys count with a factor alpha per KV head and channel.
 *   s_tj = scale * sum_c a_c q_tc k_jc,  a = 1 on window keys, alpha[g] on middle keys   A = softmax(s)   o = A v
 * The queries are the T columns of a span that follows a context of Lc columns; L = Lc + T. Rows are padded on the left:
 * columns before start[b] are no tokens, column j has position j - start[b]. A query at position p sees the keys at
 * positions up to p; of these, position < sink or p - position < recent is window, the others are middle. */

/* [B, H, n, D or Dv] in the call's dtype, last axis contiguous; stride in elements: b, h, column. */
typedef struct {
    const void *data;
    int64_t stride[3];
} lk_strided;

typedef struct {
    lk_dtype dtype;
    int64_t n_rows, n_q_heads, n_heads; /* B, Hq, a multiple of Hkv, Hkv */
    int64_t n_context, n_columns;       /* Lc >= 0, T >= 1 */
    int32_t head_dim, v_dim;            /* D, Dv: any size up to LK_MAX_HEAD_DIM */
    int64_t sink, recent;               /* S0 >= 0, W >= 1 */
    float scale;
    lk_strided q;                    /* [B, Hq, T, D] */
    lk_strided k_context, v_context; /* [B, Hkv, Lc, D or Dv]; not read if Lc = 0 */
    lk_strided k, v;                 /* [B, Hkv, T, D or Dv] */
    const float *alpha;              /* [Hkv, D] contiguous */
    const int64_t *start;            /* [B] in [0, L]; NULL = 0 */
    const uint8_t
        *hidden;   /* [Hkv] non-zero: the head attends to no middle key at all; NULL = none */
    int n_threads; /* <= 0: what OpenMP would use */
} lk_learn_args;

/* lk_learn_forward: o [B, Hq, T, Dv] in the call's dtype and lse [B, Hq, T] natural log, contiguous, written in full.
 * A query column that is padding gets o = 0, lse = -inf. f32 accumulation; two runs agree bit for bit, whatever n_threads
 * is. What padding columns hold is not read. K and V of tokens must be finite: 0 * inf reaches earlier queries too.
 * Scratch: per thread 64 * (6 D + 4 Dv + 197) floats about; no array of size T x L. Reentrant.
 * LK_E_SHAPE, LK_E_VALUE, LK_E_NOMEM, LK_E_ISA: nothing was written.
 * Truth: tests/reference_learn.py. Source: LeanK section 3; online softmax, Milakov 2018. */
lk_status lk_learn_forward(const lk_learn_args *args, void *o, float *lse);

typedef struct {
    lk_strided d_o, o;  /* [B, Hq, T, Dv]: gradient of o, and o as the forward gave it */
    const float *lse;   /* [B, Hq, T] contiguous, as the forward gave it */
    void *dq, *dk, *dv; /* out: like q, k, v of the span, in the call's dtype, contiguous */
    float *dalpha;      /* out [Hkv, D] */
} lk_learn_grads;

/* lk_learn_backward: with dA = do v^T and dS = A * (dA - rowsum(do * o)),
 *   dq_tc = scale * sum_j dS_tj a_c k_jc    dk_jc = scale * sum_t,r dS_tj a_c q_tc    dv_j = sum_t,r A_tj do_t
 *   dalpha_c = scale * sum over b, t, r and middle keys j of dS_tj q_tc k_jc
 * A is computed anew from lse. The context has no gradient, nor has padding; outputs are written in full. dalpha: f32
 * sums over the keys of one query row, double over the rest, in an order that depends on sizes alone. Otherwise as the
 * forward. */
lk_status lk_learn_backward(const lk_learn_args *args, const lk_learn_grads *grads);

/* ----------------------------------------------------------------------------------- threads (threads.c) */

/* From now on forked children use one thread, since OpenMP's workers do not live on in them. The first call that uses
 * threads does this by itself; call it earlier if others in the process use OpenMP before. */
void lk_watch_forks(void);

/* Threads to use where `wanted` are asked for (<= 0: OpenMP's choice): not more than the machine has, and 1 in a
 * process that was forked. */
int lk_thread_count(int wanted);

/* ------------------------------------------------------------------------------ test hooks (alloc.c) */

/* Let the n-th allocation from now fail (1 = the next one); 0 switches this off. */
void lk_test_fail_allocation(int64_t n);
/* Fill new pages and twins with NaN patterns, so that reading an unused slot shows. */
void lk_test_poison(int on);

#ifdef __cplusplus
}
#endif
#endif
