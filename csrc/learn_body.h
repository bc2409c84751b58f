/* learn_body.h: the kernels of mask learning, written once over the operations of lk_vec.h.
 *
 * Included by each learn_<isa>.c after it has included lk_vec_<isa>.h and defined LK_ISA. lk_learn.h says how data lies.
 *
 * All products are y[c] += sum over rows r of w[c][r] * x[r], with x in rows of whole vectors and w broadcast:
 *   logits [key][row]   w = K [key][channel]   x = q transposed [channel][row]
 *   o [row][value]      w = P [key][row]       x = V [key][value]         (w by columns)
 * and so on for the gradients. alpha never meets K: middle logits use alpha * q, and sums over middle keys are kept
 * apart from those over window keys, so that
 *   dq = scale * (window + alpha * middle)   and   dalpha = scale * sum over rows of q * middle
 * need no product of their own. */
#include "lk_learn.h"
#include "lk_vec.h"

/* --------------------------------------------------------------------------------------------- products */

#define COLUMNS 4 /* columns that share the registers of a product */

typedef struct {
    const float *w; /* element (c, r) at c * w_column + r * w_row */
    int64_t w_column, w_row;
    const float *x; /* [n_rows] rows */
    int64_t x_stride;
    float *y; /* [n_columns] rows */
    int64_t y_stride;
    const float *factor; /* [n_columns] for what stands in y */
    bool add;          /* to what stands in y, times factor unless that is NULL; else replace it */
    int32_t n_columns; /* a multiple of COLUMNS is computed */
    int32_t n_rows, width; /* width: a multiple of 16 */
} product;

/* The sum of one block starts at 0 and is added to y whole: over many blocks that keeps rounding small. */
LK_INLINE void product_tile(const int n_vecs, const product *a, int32_t c, int32_t e) {
    lk_vec sum[COLUMNS][LK_VECS];
    LK_UNROLL
    for (int k = 0; k < COLUMNS; k++) {
        LK_UNROLL
        for (int i = 0; i < n_vecs; i++) sum[k][i] = v_set1(0.0f);
    }
    const int64_t w_column = a->w_column, w_row = a->w_row, x_stride = a->x_stride;
    const float *w = a->w + c * w_column, *x = a->x + e;
    for (int32_t r = 0; r < a->n_rows; r++, w += w_row, x += x_stride) {
        lk_vec row[LK_VECS];
        LK_UNROLL
        for (int i = 0; i < n_vecs; i++) row[i] = v_load(x + i * LK_LANES);
        LK_UNROLL
        for (int k = 0; k < COLUMNS; k++) {
            const lk_vec factor = v_set1(w[k * w_column]);
            LK_UNROLL
            for (int i = 0; i < n_vecs; i++) sum[k][i] = v_fma(row[i], factor, sum[k][i]);
        }
    }
    LK_UNROLL
    for (int k = 0; k < COLUMNS; k++) {
        float *y = a->y + (c + k) * a->y_stride + e;
        LK_UNROLL
        for (int i = 0; i < n_vecs; i++) {
            if (a->factor)
                sum[k][i] = v_fma(v_load(y + i * LK_LANES), v_set1(a->factor[c + k]), sum[k][i]);
            else if (a->add) sum[k][i] = v_add(v_load(y + i * LK_LANES), sum[k][i]);
            v_store(y + i * LK_LANES, sum[k][i]);
        }
    }
}

LK_INLINE void product_strip(const int n_vecs, const product *a, int32_t e) {
    for (int32_t c = 0; c < a->n_columns; c += COLUMNS) product_tile(n_vecs, a, c, e);
}

/* Elements outside, columns inside: a strip of x stays in L1 for all columns. */
LK_NOINLINE void multiply(const product *a) {
    int32_t e = 0;
    for (; e + LK_VECS * LK_LANES <= a->width; e += LK_VECS * LK_LANES)
        product_strip(LK_VECS, a, e);
#if LK_VECS * LK_LANES > 16 /* else the width is whole strips */
    switch ((a->width - e) / LK_LANES) {
    case 3: product_strip(3, a, e); break;
    case 2: product_strip(2, a, e); break;
    case 1: product_strip(1, a, e); break;
    default: break;
    }
#endif
}

/* ---------------------------------------------------------------------------------------------- packing */

/* One vector of n elements as floats, zeros up to the stride. */
LK_INLINE void pack_vector(const lk_dtype dtype, const unsigned char *from, int64_t n, float *to) {
    int64_t i = 0;
    if (dtype == LK_F16)
        for (; i + LK_LANES <= n; i += LK_LANES) v_store(to + i, v_load_f16(from + 2 * i));
    for (; i < n; i++)
        to[i] = lk_half_load(dtype, from, i); /* compilers turn f32 and bf16 into vectors */
    for (; i < lk_learn_stride(n); i++) to[i] = 0.0f;
}

/* The same for a dtype that is known at run time only. */
LK_NOINLINE void pack(lk_dtype dtype, const unsigned char *from, int64_t n, float *to) {
    if (dtype == LK_F32) pack_vector(LK_F32, from, n, to);
    else if (dtype == LK_BF16) pack_vector(LK_BF16, from, n, to);
    else pack_vector(LK_F16, from, n, to);
}

/* K or V of consecutive columns, from the context and then from the span. Products read whole groups of columns; what
 * comes of keys past n_keys is not used. */
static void pack_keys(const lk_learn_job *job, const void *context, int64_t context_stride,
                      const void *span, int64_t span_stride, int32_t n, int64_t first,
                      int32_t n_keys, float *to) {
    const ptrdiff_t bytes = (ptrdiff_t)lk_dtype_bytes(job->dtype);
    const int64_t stride = lk_learn_stride(n);
    for (int32_t j = 0; j < n_keys; j++) {
        const int64_t column = first + j, t = column - job->n_context;
        const unsigned char *from =
            t < 0 ? (const unsigned char *)context + column * context_stride * bytes
                  : (const unsigned char *)span + t * span_stride * bytes;
        pack(job->dtype, from, n, to + j * stride);
    }
}

/* Rows [first, first + ROWS) of q or do; 0 for padding columns, whatever the array holds there, and past the end. */
static void pack_query_rows(const lk_learn_job *job, const void *data, const int64_t stride[2],
                            int32_t n, int64_t first, float *to) {
    const int64_t width = lk_learn_stride(n), begin = lk_learn_first_real(job);
    const int32_t n_rows = lk_learn_n_rows(job, first);
    for (int32_t i = 0; i < LK_LEARN_ROWS; i++) {
        if (i < n_rows && first + i >= begin)
            pack(job->dtype, lk_learn_row(job, data, stride, first + i), n, to + i * width);
        else memset(to + i * width, 0, (size_t)width * sizeof *to);
    }
}

/* [ROWS, stride] -> [n, ROWS], each channel times its factor (NULL: 1) and times `scale`. */
static void transpose(const float *from, int32_t n, const float *factor, float scale, float *to) {
    const int64_t stride = lk_learn_stride(n);
    for (int32_t c = 0; c < n; c++) {
        const float by = factor ? factor[c] * scale : scale;
        for (int32_t i = 0; i < LK_LEARN_ROWS; i++)
            to[c * LK_LEARN_ROWS + i] = from[i * stride + c] * by;
    }
}

static void pack_queries(const lk_learn_job *job, int64_t first_row) {
    const lk_learn_scratch *s = &job->scratch;
    pack_query_rows(job, job->q, job->q_stride, job->head_dim, first_row, s->q);
    transpose(s->q, job->head_dim, NULL, job->scale_log2, s->qt);
    transpose(s->q, job->head_dim, job->alpha, job->scale_log2, s->aqt);
}

/* What the backward needs of a block of query rows: q, do, the shift of the logits and delta. */
static void pack_gradients(const lk_learn_job *job, int64_t first_row) {
    const lk_learn_scratch *s = &job->scratch;
    const int64_t stride = lk_learn_stride(job->v_dim), begin = lk_learn_first_real(job);
    const int32_t n_rows = lk_learn_n_rows(job, first_row);
    pack_queries(job, first_row);
    pack_query_rows(job, job->d_o, job->d_o_stride, job->v_dim, first_row, s->d_o);
    transpose(s->d_o, job->v_dim, NULL, 1.0f, s->d_ot);
    for (int32_t i = 0; i < LK_LEARN_ROWS; i++) {
        s->shift[i] = s->delta[i] = 0.0f;
        const int64_t row = first_row + i;
        if (i >= n_rows || row < begin) continue;
        const int64_t t = row / job->heads_per_kv, r = row % job->heads_per_kv;
        const float lse = job->lse[r * job->n_columns + t];
        /* A row whose logits all overflowed has none to subtract from. */
        if (lse != -INFINITY) s->shift[i] = (float)(lse * LK_LOG2_E);
        const unsigned char *o = lk_learn_row(job, job->o, job->o_stride, row);
        double sum = 0.0;
        for (int32_t d = 0; d < job->v_dim; d++)
            sum += (double)s->d_o[i * stride + d] * lk_half_load(job->dtype, o, d);
        s->delta[i] = (float)sum;
    }
}

/* ----------------------------------------------------------------------------------- one block of both */

/* Rows [visible[j], middle[j]) have key j in their window, rows from middle[j] on have it in the middle, the others do
 * not see it. All are row numbers within the block. */
typedef struct {
    int32_t n_keys, n_rows, width; /* width: rows, up to whole vectors */
    int32_t visible[LK_LEARN_KEYS], middle[LK_LEARN_KEYS];
    bool has_window, has_middle; /* some pair is of that kind */
    bool has_unseen;             /* some pair is not attended */
} pairs;

static void find_pairs(const lk_learn_job *job, int64_t first_key, int32_t n_keys,
                       int64_t first_row, pairs *out) {
    const int32_t n_rows = lk_learn_n_rows(job, first_row);
    *out = (pairs){.n_keys = n_keys, .n_rows = n_rows};
    out->width = (int32_t)lk_learn_stride(n_rows);
    for (int32_t j = 0; j < n_keys; j++) {
        const int64_t column = first_key + j;
        const int64_t first_seen = (column - job->n_context) * job->heads_per_kv - first_row;
        const int64_t first_middle = first_seen + job->recent * job->heads_per_kv;
        const bool is_sink = column - job->start < job->sink;
        out->visible[j] = (int32_t)lk_min(lk_max(first_seen, 0), LK_LEARN_ROWS);
        out->middle[j] = (int32_t)lk_min(lk_max(first_middle, 0), LK_LEARN_ROWS);
        if (is_sink) out->middle[j] = LK_LEARN_ROWS;
        out->has_window |= out->visible[j] < lk_min(out->middle[j], n_rows);
        out->has_middle |= out->middle[j] < n_rows;
        out->has_unseen |= out->visible[j] > 0;
    }
    if (job->hidden && out->has_middle) {
        out->has_unseen = true;
        out->has_middle = false;
    }
}

/* Logits of a block as they count; false where no pair is attended. */
static bool find_logits(const lk_learn_job *job, int64_t first_key, int32_t n_keys,
                        int64_t first_row, pairs *at) {
    const lk_learn_scratch *s = &job->scratch;
    find_pairs(job, first_key, n_keys, first_row, at);
    if (!at->has_window && !at->has_middle) return false;
    pack_keys(job, job->k_context, job->k_context_stride, job->k, job->k_stride, job->head_dim,
              first_key, n_keys, s->k);
    product a = {.w = s->k,
                 .w_column = lk_learn_stride(job->head_dim),
                 .w_row = 1,
                 .x = at->has_window ? s->qt : s->aqt,
                 .x_stride = LK_LEARN_ROWS,
                 .y = s->p,
                 .y_stride = LK_LEARN_ROWS,
                 .n_columns = n_keys,
                 .n_rows = job->head_dim,
                 .width = at->width};
    multiply(&a);
    const bool both = at->has_window && at->has_middle;
    if (both) {
        a.x = s->aqt;
        a.y = s->mid;
        multiply(&a);
    }
    if (!both && !at->has_unseen) return true;
    const lk_vec unseen = v_set1(-INFINITY);
    for (int32_t j = 0; j < n_keys; j++) {
        float *p = s->p + j * LK_LEARN_ROWS;
        const float *mid = s->mid + j * LK_LEARN_ROWS;
        const int32_t end = job->hidden ? at->middle[j] : LK_LEARN_ROWS;
        for (int32_t i = 0; i < at->width; i += LK_LANES) {
            lk_vec x = v_load(p + i);
            if (both) x = v_pick(v_load(mid + i), x, i, at->middle[j], LK_LEARN_ROWS);
            v_store(p + i, v_pick(x, unseen, i, at->visible[j], end));
        }
    }
    return true;
}

/* ---------------------------------------------------------------------------------------------- forward */

/* Logits -> exp2 of what is left after the shift; m, l and factor go on. */
static void update_softmax(const lk_learn_scratch *s, const pairs *at) {
    for (int32_t i = 0; i < at->width; i += LK_LANES) {
        /* Two chains, since a maximum waits for the one before. */
        lk_vec top[2] = {v_set1(-INFINITY), v_set1(-INFINITY)};
        for (int32_t j = 0; j < at->n_keys; j++)
            top[j & 1] = v_max(top[j & 1], v_load(s->p + j * LK_LEARN_ROWS + i));
        float logit[LK_LANES];
        v_store(logit, v_max(top[0], top[1]));
        for (int32_t lane = 0; lane < LK_LANES; lane++)
            s->factor[i + lane] = lk_state_raise(&s->m[i + lane], logit[lane], &s->shift[i + lane]);
        const lk_vec shift = v_load(s->shift + i);
        lk_vec sum = v_set1(0.0f);
        for (int32_t j = 0; j < at->n_keys; j++) {
            float *p = s->p + j * LK_LEARN_ROWS + i;
            const lk_vec x = v_exp2(v_sub(v_load(p), shift));
            v_store(p, x);
            sum = v_add(sum, x);
        }
        v_store(s->l + i, v_fma(v_load(s->l + i), v_load(s->factor + i), sum));
    }
}

/* Columns past the last one that rows of the block see. */
static int64_t end_of_keys(const lk_learn_job *job, int64_t first_row) {
    const int64_t last = first_row + lk_learn_n_rows(job, first_row) - 1;
    return job->n_context + last / job->heads_per_kv + 1;
}

LK_INLINE void forward(const lk_learn_job *job) {
    const lk_learn_scratch *s = &job->scratch;
    const int64_t end = end_of_keys(job, job->first_row);
    const int64_t v_stride = lk_learn_stride(job->v_dim);
    lk_state_init(s->m, s->l, s->sum_v, LK_LEARN_ROWS, v_stride);
    pack_queries(job, job->first_row);
    for (int64_t key = job->start; key < end; key += LK_LEARN_KEYS) {
        pairs at;
        const int32_t n_keys = (int32_t)lk_min(LK_LEARN_KEYS, end - key);
        if (!find_logits(job, key, n_keys, job->first_row, &at)) continue;
        update_softmax(s, &at);
        pack_keys(job, job->v_context, job->v_context_stride, job->v, job->v_stride, job->v_dim,
                  key, n_keys, s->v);
        multiply(&(product){.w = s->p,
                            .w_column = 1,
                            .w_row = LK_LEARN_ROWS,
                            .x = s->v,
                            .x_stride = v_stride,
                            .y = s->sum_v,
                            .y_stride = v_stride,
                            .factor = s->factor,
                            .n_columns = at.n_rows,
                            .n_rows = n_keys,
                            .width = (int32_t)v_stride});
    }
}

/* --------------------------------------------------------------------------------------------- backward */

/* p and ds of a block, whose query rows are packed already; false where no pair is attended. Where the block has
 * window and middle pairs, ds has the first and mid the others; else ds has all. */
static bool find_gradients(const lk_learn_job *job, int64_t first_key, int32_t n_keys,
                           int64_t first_row, pairs *at) {
    const lk_learn_scratch *s = &job->scratch;
    if (!find_logits(job, first_key, n_keys, first_row, at)) return false;
    pack_keys(job, job->v_context, job->v_context_stride, job->v, job->v_stride, job->v_dim,
              first_key, n_keys, s->v);
    multiply(&(product){.w = s->v,
                        .w_column = lk_learn_stride(job->v_dim),
                        .w_row = 1,
                        .x = s->d_ot,
                        .x_stride = LK_LEARN_ROWS,
                        .y = s->ds,
                        .y_stride = LK_LEARN_ROWS,
                        .n_columns = n_keys,
                        .n_rows = job->v_dim,
                        .width = at->width});
    const bool both = at->has_window && at->has_middle;
    const lk_vec zero = v_set1(0.0f);
    for (int32_t j = 0; j < n_keys; j++) {
        float *p = s->p + j * LK_LEARN_ROWS, *ds = s->ds + j * LK_LEARN_ROWS;
        float *mid = s->mid + j * LK_LEARN_ROWS;
        for (int32_t i = 0; i < at->width; i += LK_LANES) {
            const lk_vec a = v_exp2(v_sub(v_load(p + i), v_load(s->shift + i)));
            const lk_vec x = v_mul(a, v_sub(v_load(ds + i), v_load(s->delta + i)));
            v_store(p + i, a);
            v_store(ds + i, both ? v_pick(zero, x, i, at->middle[j], LK_LEARN_ROWS) : x);
            if (both) v_store(mid + i, v_pick(x, zero, i, at->middle[j], LK_LEARN_ROWS));
        }
    }
    return true;
}

/* a, which adds to sums of window pairs with weights ds, for the pairs that there are. */
static void multiply_kinds(const lk_learn_scratch *s, const pairs *at, product *a) {
    a->add = true;
    a->w = s->ds;
    a->y = at->has_window ? s->sum_window : s->sum_middle;
    multiply(a);
    if (!at->has_window || !at->has_middle) return;
    a->w = s->mid;
    a->y = s->sum_middle;
    multiply(a);
}

static void clear(float *sum, int64_t stride) {
    memset(sum, 0, (size_t)(LK_LEARN_ROWS * stride) * sizeof *sum);
}

/* Sums of dS * k for the query rows of an item. */
LK_INLINE void backward_rows(const lk_learn_job *job) {
    const lk_learn_scratch *s = &job->scratch;
    const int64_t end = end_of_keys(job, job->first_row), stride = lk_learn_stride(job->head_dim);
    clear(s->sum_window, stride);
    clear(s->sum_middle, stride);
    pack_gradients(job, job->first_row);
    for (int64_t key = job->start; key < end; key += LK_LEARN_KEYS) {
        pairs at;
        const int32_t n_keys = (int32_t)lk_min(LK_LEARN_KEYS, end - key);
        if (!find_gradients(job, key, n_keys, job->first_row, &at)) continue;
        multiply_kinds(s, &at,
                       &(product){.w_column = 1,
                                  .w_row = LK_LEARN_ROWS,
                                  .x = s->k,
                                  .x_stride = stride,
                                  .y_stride = stride,
                                  .n_columns = at.n_rows,
                                  .n_rows = n_keys,
                                  .width = (int32_t)stride});
    }
}

/* Sums of P * do and dS * q for the keys of an item, over all query rows that see any of them. */
LK_INLINE void backward_keys(const lk_learn_job *job) {
    const lk_learn_scratch *s = &job->scratch;
    const int64_t k_stride = lk_learn_stride(job->head_dim), v_stride = lk_learn_stride(job->v_dim);
    const int64_t n_rows = job->n_columns * job->heads_per_kv;
    const int64_t first_seen = (job->first_key - job->n_context) * job->heads_per_kv;
    const int32_t n_keys = (int32_t)job->n_keys;
    clear(s->sum_window, k_stride);
    clear(s->sum_middle, k_stride);
    clear(s->sum_v, v_stride);
    for (int64_t row = first_seen / LK_LEARN_ROWS * LK_LEARN_ROWS; row < n_rows;
         row += LK_LEARN_ROWS) {
        pairs at;
        pack_gradients(job, row);
        if (!find_gradients(job, job->first_key, n_keys, row, &at)) continue;
        product a = {.w = s->p,
                     .w_column = LK_LEARN_ROWS,
                     .w_row = 1,
                     .x = s->d_o,
                     .x_stride = v_stride,
                     .y = s->sum_v,
                     .y_stride = v_stride,
                     .add = true,
                     .n_columns = n_keys,
                     .n_rows = at.n_rows,
                     .width = (int32_t)v_stride};
        multiply(&a);
        a.x = s->q;
        a.x_stride = a.y_stride = k_stride;
        a.width = (int32_t)k_stride;
        multiply_kinds(s, &at, &a);
    }
}

#define LK_ISA_NAME_(op, isa) lk_learn_##op##_##isa
#define LK_ISA_NAME(op, isa) LK_ISA_NAME_(op, isa)

void LK_ISA_NAME(forward, LK_ISA)(const lk_learn_job *job) { forward(job); }
void LK_ISA_NAME(backward_rows, LK_ISA)(const lk_learn_job *job) { backward_rows(job); }
void LK_ISA_NAME(backward_keys, LK_ISA)(const lk_learn_job *job) { backward_keys(job); }
