/* leank_cuda.h: the C interface of the CUDA side. Device pointers, sizes and a stream go in, a status comes out.
 *
 * Rules, letters and the order of a step are those of csrc/leank.h. Memory belongs to the caller, and nothing here
 * allocates, waits for the device or copies to the host: every call can be captured in a CUDA graph.
 * Lengths live on the device. A step reads them there, so that a captured step can be replayed.
 *
 * Pages and twins hold the same blocks and bytes as those of the CPU (lk_geom in csrc/lk_internal.h), but the heads of a
 * page follow each other, and elements inside a block have the order of layout.h. */
#ifndef LEANK_CUDA_H
#define LEANK_CUDA_H

#include "leank.h"

#include <stdbool.h>

#ifdef __cplusplus
extern "C" {
#endif

/* Head dims that kernels are built for; Dv is D. */
#define LK_CUDA_HEAD_DIMS {64, 80, 96, 128, 256}
/* And for mask learning. */
#define LK_CUDA_LEARN_HEAD_DIMS {64, 80, 96, 128}
#define LK_CUDA_MAX_HEAD_DIM 256
#define LK_CUDA_MAX_R 16
#define LK_CUDA_MAX_UNITS 262144 /* B * Hkv */

/* int32 numbers at the start of lk_cuda_layer.state; after them come len[B], lo[B] and n0[B]. */
enum {
    LK_STATE_COLUMNS,  /* columns stored, the same for all rows */
    LK_STATE_OVERFLOW, /* 1 once a column did not fit in max_tokens (nothing of it was stored) */
    LK_STATE_HEADER = 8
};
/* n0 of a row without a token: its first call with one will be its prompt. */
#define LK_STATE_OPEN INT32_MAX

/* One layer's cache. All pointers are device pointers. */
typedef struct {
    const int64_t *page; /* [B, table_stride] address of page i of the row; 0: none */
    const int64_t *twin; /* [B, table_stride] address of its twin; 0: none */
    int64_t table_stride;
    int32_t *state; /* [LK_STATE_HEADER + 3 * B] */
    uint8_t *real;  /* [B, real_stride >= max_tokens] 1 where a column is a token of the row */
    int64_t real_stride;
    const int32_t *geom; /* [Hkv] each: n_kept; where in the page its kept K is, in the twin its
                          * dropped K, and V in the one that has it, in bytes; then uint8 [Hkv, D]:
                          * kept channels ascending, then dropped ones */
    lk_dtype dtype;      /* LK_BF16 or LK_F16 */
    int32_t n_rows, n_heads, head_dim;
    int32_t sink, recent, slack; /* beyond INT32_MAX / 4 they mean the same as that */
    int32_t max_tokens;          /* columns, and so tokens of a row, that fit */
} lk_cuda_layer;

/* Bytes of geom for a layer, and its contents for the mask keep [Hkv, D] (host memory, non-zero = kept).
 * page_bytes, twin_bytes: one page and one twin. LK_E_SHAPE, LK_E_VALUE as lk_mask_check. */
size_t lk_cuda_geom_bytes(int32_t n_heads, int32_t head_dim);
lk_status lk_cuda_geom(const uint8_t *keep, int32_t n_heads, int32_t head_dim, int32_t *geom,
                       size_t *page_bytes, size_t *twin_bytes);

/* -------------------------------------------------------------------------------------- attend (decode.cu) */

/* One step of one token per row: the token's K and V are stored, its query attends, then lengths, lo and the columns
 * advance. With k = NULL nothing is stored or advanced: the query is that of each row's last token.
 *   q [B, Hq, D], k and v [B, Hkv, D], last axis contiguous; o [B, Hq, D] contiguous, written in full
 *   lse [B, Hq] natural logarithm, or NULL; -inf where nothing was attended to (o is 0 there)
 *   valid [B] non-zero = this column is a token of the row; NULL = all. o of a padding row is 0.
 *   sinks [Hq] f32: logits of one more key per head without a value (GPT-OSS), or NULL
 *   softcap > 0: logits become softcap * tanh(logit / softcap)
 *   rows of q, k and v are 16-byte aligned, o is 8-byte aligned
 *   work: lk_cuda_attend_work_bytes, zeroed once; kernels leave its counter at 0
 *   page, twin and geom are read before earlier kernels of the stream have ended: they must not be written by the one
 *   directly ahead (lengths, real and valid may be). A kernel behind it that is launched early has to wait as usual
 * Bytes read: (D + Dk[g]) * 2 per token of a live head, 2 * 2 * D per window token otherwise.
 * The work is cut into chunks (plan.h) that blocks take as they get to them. A second launch merges the states of a
 * (row, head) that several chunks cover, in a fixed order, so that two runs agree bit for bit.
 * LK_E_SHAPE: sizes that no kernel is built for, or that need more shared memory than smem_bytes;
 * LK_E_DEVICE: CUDA refused a launch, *cuda_error says why. */
typedef struct {
    const lk_cuda_layer *layer;
    const void *q, *k, *v;
    int64_t q_stride[2], k_stride[2], v_stride[2]; /* b and head, in elements */
    void *o;
    float *lse;
    const uint8_t *valid;
    const float *sinks;
    int32_t n_q_heads;
    float scale, softcap;
    void *work;
    int32_t n_blocks, smem_bytes; /* as given by lk_cuda_device */
    void *stream;
    int32_t *cuda_error;
} lk_cuda_attend_args;

/* Of head dims up to head_dim and up to r query heads per KV head. Launches that follow each other may share it. */
size_t lk_cuda_attend_work_bytes(int32_t head_dim, int32_t r, int32_t n_blocks);
lk_status lk_cuda_attend(const lk_cuda_attend_args *args);

/* The parts that a launch would have, for tests: each is (chunk, row, head, first tile, end tile), at most `room` of
 * them are written, the number of all is returned. end, full_lo [B] as decode_plan.cuh finds them; host memory. */
int64_t lk_cuda_plan_parts(const int32_t *end, const int32_t *full_lo, int32_t n_rows,
                           const int32_t *n_kept, int32_t n_heads, int32_t head_dim, int32_t sink,
                           int32_t n_blocks, int32_t (*parts)[5], int64_t room);

/* -------------------------------------------------------------------------------------- append (append.cu) */

/* Append T columns and settle: for K and V that nobody attends to through lk_cuda_attend (a prompt).
 *   k and v [B, Hkv, T, D], last axis contiguous; strides b, head, t in elements
 *   valid [B, T] contiguous or NULL; position [B, T] int32 scratch
 *   columns_before: columns stored now, which the host knows (a call that brings a prompt is not captured)
 *   Dropped channels that would retire at once are not stored. */
typedef struct {
    const lk_cuda_layer *layer;
    const void *k, *v;
    int64_t k_stride[3], v_stride[3];
    const uint8_t *valid;
    int32_t *position;
    int32_t n_columns, columns_before;
    void *stream;
    int32_t *cuda_error;
} lk_cuda_append_args;

lk_status lk_cuda_append(const lk_cuda_append_args *args);

/* What the attention mask of a step of one column says: valid [B] whether the column is a token of the row; *misfit becomes
 * the number of that column, if it is less, where the mask hides a stored token, or shows anything else but the new column.
 *   mask [B, max_tokens] non-zero where the column is seen, rows mask_b bytes apart (0: one for all); NULL = all up to the new
 *   one
 * A step beyond the end is noted by lk_cuda_attend. */
lk_status lk_cuda_step_columns(const lk_cuda_layer *layer, const uint8_t *mask, int64_t mask_b,
                               uint8_t *valid, int32_t *misfit, void *stream, int32_t *cuda_error);

/* ------------------------------------------------------------------------------- attend with spans (span.cu) */

/* Append T columns and attend with each: as lk_cuda_append, and as lk_cuda_attend of one column after the other would.
 *   q [B, Hq, T, D], k and v [B, Hkv, T, D], last axis contiguous; strides b, head, t in elements
 *   o [B, Hq, T, D] and lse [B, Hq, T] or NULL, contiguous, written in full
 *   valid [B, T] contiguous or NULL; sinks, softcap and alignment as in lk_cuda_attend
 *   position [B * T] int32 scratch
 *   piece: columns that are stored and attend together, as lk_cuda_span_piece says or less. More than one frees no channel
 *     that is needed only if no row that has tokens is shorter than its prompt; a row without a token has its prompt in the
 *     first piece
 *   scratch: as many bytes as lk_cuda_span_piece says, aligned to 128, in which the twins of a piece's tokens are while it
 *     attends; NULL: pieces have at most min(slack + 1, LK_CUDA_MOST_PIECE) columns. twin_bytes as lk_cuda_geom gives it
 *   columns_before: as in lk_cuda_append
 *   work: lk_cuda_attend_work_bytes(LK_CUDA_MAX_HEAD_DIM, LK_CUDA_MAX_R, n_blocks), shared with lk_cuda_attend
 * Launches per piece: 4, with scratch 6. LK_E_SHAPE as in lk_cuda_attend, before the first launch. */
#define LK_CUDA_MOST_PIECE 64
#define LK_CUDA_MOST_LONG_PIECE 2048
#define LK_CUDA_MOST_SCRATCH_BYTES ((size_t)256 << 20)
typedef struct {
    const lk_cuda_layer *layer;
    const void *q, *k, *v;
    int64_t q_stride[3], k_stride[3], v_stride[3];
    void *o;
    float *lse;
    const uint8_t *valid;
    const float *sinks;
    int32_t *position;
    void *scratch;
    int64_t twin_bytes;
    int32_t n_q_heads, n_columns, piece, columns_before;
    float scale, softcap;
    void *work;
    int32_t n_blocks, smem_bytes; /* as given by lk_cuda_device */
    void *stream;
    int32_t *cuda_error;
} lk_cuda_span_args;

lk_status lk_cuda_span(const lk_cuda_span_args *args);

/* The longest piece for a span of n_columns, and the bytes of scratch that it needs, 0 for none. LK_E_SHAPE: sizes that no
 * kernel is built for. */
lk_status lk_cuda_span_piece(const lk_cuda_layer *layer, int32_t n_q_heads, int32_t n_columns,
                             int64_t twin_bytes, int32_t smem_bytes, int32_t *piece,
                             size_t *scratch_bytes);

/* Keep the first n_columns columns (at most what is stored); 0 makes every row empty, with a new prompt to come. */
lk_status lk_cuda_crop(const lk_cuda_layer *layer, int32_t n_columns, void *stream,
                       int32_t *cuda_error);

/* ------------------------------------------------------------------------------------- gather (gather.cu) */

/* Back to dense: k and v [Hkv, n_tokens, D] contiguous of one row, NaN where nothing is stored any more. */
lk_status lk_cuda_gather(const lk_cuda_layer *layer, int32_t row, int32_t n_tokens, void *k,
                         void *v, void *stream, int32_t *cuda_error);

/* ------------------------------------------------------------------------------------------ copy (copy.cu) */

/* Row pairs[i][0] of `to` gets what row pairs[i][1] of `from` stores; the caller copies state and real.
 *   pairs [n_pairs, 2] int32 on the device; no row of `to` may be among the rows of `from` that are read
 *   both layers have the same mask and dtype, and `to` as much room; page_bytes, twin_bytes as lk_cuda_geom gives them
 * LK_E_SHAPE: more than 65535 pairs, or not enough room; LK_E_VALUE: bytes that are no multiple of 16. */
lk_status lk_cuda_copy_pages(const lk_cuda_layer *to, const lk_cuda_layer *from,
                             const int32_t *pairs, int32_t n_pairs, int64_t page_bytes,
                             int64_t twin_bytes, void *stream, int32_t *cuda_error);

/* --------------------------------------------------------------------------------- mask learning (learn.cu) */

/* Where and with what a call runs. */
typedef struct {
    void *work; /* lk_cuda_learn_work_bytes, aligned to 16 bytes; need not be zeroed */
    int32_t n_blocks, smem_bytes; /* as given by lk_cuda_device */
    void *stream;
    int32_t *cuda_error;
} lk_cuda_learn_launch;

/* lk_learn_forward and lk_learn_backward of leank.h on the device: all data are device pointers, n_threads means nothing.
 *   dtype LK_BF16 or LK_F16, D one of LK_CUDA_LEARN_HEAD_DIMS, Dv = D; L and B * Hq * T up to 2^29
 *   rows of q, k, v, o and do are 16-byte aligned
 *   start is read on the device: what is not in [0, L] is taken as the nearest end of it
 * Products are of the dtype, sums f32: alpha * q, probabilities and gradients of logits are rounded to it, so that in f16
 * gradients of logits below 6e-8 vanish. Two runs on devices of as many n_blocks agree bit for bit.
 * Launches: forward 2, backward 3. The keys are split among blocks, whose parts are merged in a fixed order.
 * Work: S * B * Hq * T * (D + 2) floats about, S <= 32 splits; more than one only where the device would not be full.
 * LK_E_SHAPE: sizes that no kernel is built for, or that need more shared memory than smem_bytes. LK_E_VALUE as in
 * leank.h; LK_E_DEVICE: CUDA refused a launch, *cuda_error says why. */
size_t lk_cuda_learn_work_bytes(const lk_learn_args *args, bool backward, int32_t n_blocks);
lk_status lk_cuda_learn_forward(const lk_learn_args *args, void *o, float *lse,
                                const lk_cuda_learn_launch *launch);
lk_status lk_cuda_learn_backward(const lk_learn_args *args, const lk_learn_grads *grads,
                                 const lk_cuda_learn_launch *launch);

/* ------------------------------------------------------------------------------------ devices (device.cu) */

typedef struct {
    int32_t major, minor; /* compute capability */
    int32_t n_blocks;     /* multiprocessors: blocks of an attend launch */
    int32_t smem_bytes;   /* shared memory that one block may have */
} lk_cuda_device;

/* Number of devices that the driver shows; 0 without a driver. */
int32_t lk_cuda_device_count(void);
/* LK_E_DEVICE: there is no such device. */
lk_status lk_cuda_device_info(int32_t device, lk_cuda_device *out);
/* CUDA's words for *cuda_error; never NULL. */
const char *lk_cuda_error_text(int32_t cuda_error);
/* What was built, as "sm_80,sm_90,compute_90". */
const char *lk_cuda_built(void);

#ifdef __cplusplus
}
#endif
#endif
