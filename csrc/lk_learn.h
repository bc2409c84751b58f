/* lk_learn.h: what learn.c and the kernels of learn_<isa>.c share.
 *
 * A query row is one (query token t, query head r of the KV head) pair, number i = t * R + r: the rows of one KV head
 * share its K and V. Kernels work on blocks of LK_LEARN_ROWS rows and LK_LEARN_KEYS keys. Logits and what follows from
 * them are stored key by key, so that vectors lie along rows: the softmax has no horizontal step, K and V are read as
 * they lie in memory, and what a row sees of a key is a comparison of row numbers. */
#ifndef LK_LEARN_H
#define LK_LEARN_H

#include "lk_internal.h"

#define LK_LEARN_ROWS 64
#define LK_LEARN_KEYS 64

/* Floats from one row of `n` to the next: whole 64-byte lines, the rest of them 0. */
static inline int64_t lk_learn_stride(int64_t n) { return lk_ceil_div(n, 16) * 16; }

/* What a kernel works in, and leaves its results in; one memory block per thread, cut by learn.c. Dp, Vp: strides. */
typedef struct {
    float *k, *v;    /* [KEYS, Dp], [KEYS, Vp] of a block of keys */
    float *q, *d_o;  /* [ROWS, Dp], [ROWS, Vp] */
    float *qt, *aqt; /* [D, ROWS] q and alpha * q, times scale * log2(e) */
    float *d_ot;     /* [Dv, ROWS] */
    float *p, *ds;   /* [KEYS, ROWS] logits, then probabilities; gradients of logits */
    float *
        mid; /* [KEYS, ROWS] logits of middle keys, later their gradients, where a block has both kinds */
    float *m, *l;  /* [ROWS] running state of lk_softmax.h */
    float *shift;  /* [ROWS] what is subtracted from logits */
    float *factor; /* [ROWS] for what was summed before this block */
    float *delta;  /* [ROWS] rowsum(do * o) */
    float *sum_v;  /* [64, Vp] out: o, not normalised, of rows; or dv of keys */
    float *
        sum_window; /* [64, Dp] out: sum of dS * k of rows, or of dS * q of keys, over window pairs */
    float *sum_middle; /* [64, Dp] the same over middle pairs, without alpha */
} lk_learn_scratch;

/* One KV head of one row of the batch, and the block of query rows or keys that the item owns. Pointers are at
 * [b, g, 0, 0] or [b, g * R, 0, 0], strides in elements. */
typedef struct lk_learn_job {
    lk_dtype dtype;
    int32_t head_dim, v_dim;
    int64_t n_context, n_columns, heads_per_kv; /* Lc, T, R */
    int64_t start, sink, recent;
    bool hidden;
    float scale_log2;   /* scale * log2(e): logits are in base 2 inside */
    const float *alpha; /* [D] */
    const void *k_context, *v_context, *k, *v;
    int64_t k_context_stride, v_context_stride, k_stride, v_stride; /* t */
    const void *q, *o, *d_o;
    int64_t q_stride[2], o_stride[2], d_o_stride[2]; /* h, t */
    const float *lse;                                /* [R, T] */
    int64_t first_row;         /* of the block that an item of query rows owns */
    int64_t first_key, n_keys; /* of the block that an item of keys owns; columns */
    lk_learn_scratch scratch;
} lk_learn_job;

/* Element i * n of the query row's vector: its place in an array of the given strides (h, t). */
static inline const unsigned char *lk_learn_row(const lk_learn_job *job, const void *data,
                                                const int64_t stride[2], int64_t row) {
    const int64_t t = row / job->heads_per_kv, r = row % job->heads_per_kv;
    const int64_t offset = r * stride[0] + t * stride[1];
    return (const unsigned char *)data + offset * (ptrdiff_t)lk_dtype_bytes(job->dtype);
}

/* Rows of the block from `first` on. */
static inline int32_t lk_learn_n_rows(const lk_learn_job *job, int64_t first) {
    return (int32_t)lk_min(LK_LEARN_ROWS, job->n_columns * job->heads_per_kv - first);
}

/* Query rows before this one belong to padding columns. */
static inline int64_t lk_learn_first_real(const lk_learn_job *job) {
    return lk_max(job->start - job->n_context, 0) * job->heads_per_kv;
}

#define LK_DECLARE_LEARN(isa)                                                                      \
    void lk_learn_forward_##isa(const lk_learn_job *job);                                          \
    void lk_learn_backward_rows_##isa(const lk_learn_job *job);                                    \
    void lk_learn_backward_keys_##isa(const lk_learn_job *job)

LK_DECLARE_LEARN(scalar);
LK_DECLARE_LEARN(avx2);
LK_DECLARE_LEARN(avx512);
LK_DECLARE_LEARN(neon);

#endif
