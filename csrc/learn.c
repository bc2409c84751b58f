/* learn.c: the mixed attention of mask learning, forward and backward, as a list of independent items.
 *
 * An item owns LK_LEARN_ROWS query rows of one KV head of one row of the batch, and goes over all keys that they see:
 * it gives o and lse, or dq and a part of dalpha. In the backward, other items own LK_LEARN_KEYS keys of the span and go
 * over the query rows that see them: dk and dv. Both compute logits anew from lse, so that nothing of size T x L exists.
 * Items and the order in which parts of dalpha are added depend on sizes alone: results are the same bit for bit
 * however many threads there are. */
#include "lk_learn.h"
#include "lk_softmax.h"

#ifdef _OPENMP
#include <omp.h>
#endif

/* Pairs of query rows and columns below which waking threads costs more than it brings. */
#define ONE_THREAD_PAIRS 16384.0

/* ---------------------------------------------------------------------------------------------- scratch */

/* Returns the bytes of a thread's scratch; cuts `memory` unless it is NULL. */
static size_t carve(int64_t head_dim, int64_t v_dim, float *memory, lk_learn_scratch *out) {
    const int64_t n = LK_LEARN_ROWS, k = n * lk_learn_stride(head_dim),
                  v = n * lk_learn_stride(v_dim);
    lk_learn_scratch s;
    const struct {
        float **part;
        int64_t size;
    } parts[] = {
        {&s.k, k},     {&s.v, v},          {&s.q, k},          {&s.d_o, v},    {&s.qt, k},
        {&s.aqt, k},   {&s.d_ot, v},       {&s.p, n * n},      {&s.ds, n * n}, {&s.mid, n * n},
        {&s.sum_v, v}, {&s.sum_window, k}, {&s.sum_middle, k}, {&s.m, n},      {&s.l, n},
        {&s.shift, n}, {&s.factor, n},     {&s.delta, n},
    };
    size_t total = 0;
    for (size_t i = 0; i < sizeof parts / sizeof parts[0]; i++) {
        *parts[i].part = memory ? memory + total : NULL;
        total += (size_t)parts[i].size;
    }
    if (out) *out = s;
    return total * sizeof(float);
}

/* ------------------------------------------------------------------------------------------------- plan */

typedef struct {
    const lk_learn_args *args;
    const lk_learn_grads *grads; /* NULL: forward */
    const lk_learn_kernels *kernels;
    void *o; /* forward */
    float *lse;
    int64_t heads_per_kv, n_query_rows; /* R, T * R */
    int64_t row_blocks, key_blocks;     /* of one KV head of one row */
    int64_t n_row_items, n_key_items;
    double *dalpha; /* [n_row_items, D] parts, in the order of items */
    unsigned char *scratch;
    size_t scratch_bytes;
    int n_threads;
} plan;

static bool is_given(const lk_strided *x) { return x->data != NULL; }

static lk_status check_args(const lk_learn_args *a) {
    LK_CHECK(a && a->alpha, LK_E_VALUE);
    LK_CHECK(lk_dtype_bytes(a->dtype) != 0, LK_E_VALUE);
    LK_CHECK(is_given(&a->q) && is_given(&a->k) && is_given(&a->v), LK_E_VALUE);
    LK_CHECK(a->n_context == 0 || (is_given(&a->k_context) && is_given(&a->v_context)), LK_E_VALUE);
    LK_CHECK(isfinite((float)((double)a->scale * LK_LOG2_E)), LK_E_VALUE);
    LK_CHECK(a->sink >= 0 && a->recent >= 1, LK_E_VALUE);
    LK_CHECK(a->n_rows >= 1 && a->n_heads >= 1 && a->n_q_heads >= 1, LK_E_SHAPE);
    LK_CHECK(a->n_q_heads % a->n_heads == 0, LK_E_SHAPE);
    LK_CHECK(a->head_dim >= 1 && a->head_dim <= LK_MAX_HEAD_DIM, LK_E_SHAPE);
    LK_CHECK(a->v_dim >= 1 && a->v_dim <= LK_MAX_HEAD_DIM, LK_E_SHAPE);
    LK_CHECK(a->n_context >= 0 && a->n_columns >= 1, LK_E_SHAPE);
    /* Row numbers, columns times R and the bytes of outputs all stay below this product. */
    size_t n_keys, size;
    LK_CHECK(!__builtin_add_overflow((size_t)a->n_context, (size_t)a->n_columns, &n_keys),
             LK_E_SHAPE);
    LK_CHECK(lk_mul((size_t)a->n_rows, (size_t)a->n_q_heads, &size), LK_E_SHAPE);
    LK_CHECK(lk_mul(size, n_keys, &size) && size <= INT64_MAX / LK_MAX_HEAD_DIM / 16, LK_E_SHAPE);
    for (int64_t b = 0; a->start && b < a->n_rows; b++)
        LK_CHECK(a->start[b] >= 0 && a->start[b] <= (int64_t)n_keys, LK_E_VALUE);
    return LK_OK;
}

static int choose_threads(const plan *p) {
    const double n_keys = (double)(p->args->n_context + p->args->n_columns);
    const int64_t n_heads = p->args->n_rows * p->args->n_heads;
    if ((double)(n_heads * p->n_query_rows) * n_keys < ONE_THREAD_PAIRS) return 1;
    return (int)lk_min(lk_thread_count(p->args->n_threads), p->n_row_items + p->n_key_items);
}

static lk_status make_plan(plan *p) {
    const lk_learn_args *args = p->args;
    const lk_isa_table *isa = lk_dispatch();
    LK_CHECK(isa, LK_E_ISA);
    p->kernels = &isa->learn;
    p->heads_per_kv = args->n_q_heads / args->n_heads;
    p->n_query_rows = args->n_columns * p->heads_per_kv;
    p->row_blocks = lk_ceil_div(p->n_query_rows, LK_LEARN_ROWS);
    p->key_blocks = p->grads ? lk_ceil_div(args->n_columns, LK_LEARN_KEYS) : 0;
    p->n_row_items = args->n_rows * args->n_heads * p->row_blocks;
    p->n_key_items = args->n_rows * args->n_heads * p->key_blocks;
    p->n_threads = choose_threads(p);
    p->scratch_bytes = carve(args->head_dim, args->v_dim, NULL, NULL);
    size_t bytes;
    LK_CHECK(lk_mul((size_t)p->n_threads, p->scratch_bytes, &bytes), LK_E_SHAPE);
    p->scratch = lk_alloc_pages(bytes);
    LK_CHECK(p->scratch, LK_E_NOMEM);
    if (p->grads) {
        LK_CHECK(lk_mul((size_t)p->n_row_items, (size_t)args->head_dim, &bytes), LK_E_SHAPE);
        p->dalpha = lk_alloc(bytes, sizeof *p->dalpha);
        LK_CHECK(p->dalpha, LK_E_NOMEM);
    }
    return LK_OK;
}

static void free_plan(plan *p) {
    lk_dealloc(p->scratch);
    lk_dealloc(p->dalpha);
}

/* ------------------------------------------------------------------------------------------------ items */

/* The part of an array that belongs to row b and head h. */
static const void *head_at(const plan *p, const lk_strided *x, int64_t b, int64_t h) {
    const int64_t offset = b * x->stride[0] + h * x->stride[1];
    if (!x->data) return NULL;
    return (const unsigned char *)x->data + offset * (ptrdiff_t)lk_dtype_bytes(p->args->dtype);
}

static lk_learn_job job_of(const plan *p, int64_t b, int64_t g, unsigned char *memory) {
    const lk_learn_args *a = p->args;
    const int64_t h = g * p->heads_per_kv;
    lk_learn_job job = {
        .dtype = a->dtype,
        .head_dim = a->head_dim,
        .v_dim = a->v_dim,
        .n_context = a->n_context,
        .n_columns = a->n_columns,
        .heads_per_kv = p->heads_per_kv,
        .start = a->start ? a->start[b] : 0,
        .sink = a->sink,
        /* No more than there are columns, so that its product with R does not overflow. */
        .recent = lk_min(a->recent, a->n_context + a->n_columns),
        .hidden = a->hidden && a->hidden[g],
        .scale_log2 = (float)((double)a->scale * LK_LOG2_E),
        .alpha = a->alpha + g * a->head_dim,
        .k_context = head_at(p, &a->k_context, b, g),
        .v_context = head_at(p, &a->v_context, b, g),
        .k = head_at(p, &a->k, b, g),
        .v = head_at(p, &a->v, b, g),
        .k_context_stride = a->k_context.stride[2],
        .v_context_stride = a->v_context.stride[2],
        .k_stride = a->k.stride[2],
        .v_stride = a->v.stride[2],
        .q = head_at(p, &a->q, b, h),
        .q_stride = {a->q.stride[1], a->q.stride[2]},
    };
    if (p->grads) {
        const lk_learn_grads *grads = p->grads;
        job.o = head_at(p, &grads->o, b, h);
        job.d_o = head_at(p, &grads->d_o, b, h);
        for (int i = 0; i < 2; i++) {
            job.o_stride[i] = grads->o.stride[i + 1];
            job.d_o_stride[i] = grads->d_o.stride[i + 1];
        }
        job.lse = grads->lse + (b * a->n_q_heads + h) * a->n_columns;
    }
    (void)carve(a->head_dim, a->v_dim, (float *)(void *)memory, &job.scratch);
    return job;
}

/* Number of a query row of KV head g among all [B, Hq, T]. */
static int64_t output_row(const plan *p, int64_t b, int64_t g, int64_t row) {
    const int64_t t = row / p->heads_per_kv, h = g * p->heads_per_kv + row % p->heads_per_kv;
    return (b * p->args->n_q_heads + h) * p->args->n_columns + t;
}

static unsigned char *vector_at(const plan *p, void *data, int64_t row, int64_t n) {
    return (unsigned char *)data + row * n * (ptrdiff_t)lk_dtype_bytes(p->args->dtype);
}

static void finish_forward(const plan *p, const lk_learn_job *job, int64_t b, int64_t g) {
    const lk_learn_scratch *s = &job->scratch;
    for (int32_t i = 0; i < lk_learn_n_rows(job, job->first_row); i++) {
        const int64_t at = output_row(p, b, g, job->first_row + i);
        lk_state_finish(s->l[i], s->sum_v + i * lk_learn_stride(job->v_dim), job->v_dim, job->dtype,
                        vector_at(p, p->o, at, job->v_dim));
        p->lse[at] = (float)(((double)s->m[i] + log2((double)s->l[i])) / LK_LOG2_E);
    }
}

/* scale * (window + alpha * middle), the form of dq and dk. */
static void store_gradient(const plan *p, const lk_learn_job *job, int32_t i, void *out) {
    const int64_t offset = i * lk_learn_stride(job->head_dim);
    const float *window = job->scratch.sum_window + offset;
    const float *middle = job->scratch.sum_middle + offset;
    for (int32_t c = 0; c < job->head_dim; c++)
        lk_half_store(job->dtype, out, c, p->args->scale * (window[c] + job->alpha[c] * middle[c]));
}

static void finish_rows(const plan *p, const lk_learn_job *job, int64_t b, int64_t g,
                        double *part) {
    const int64_t stride = lk_learn_stride(job->head_dim);
    for (int32_t i = 0; i < lk_learn_n_rows(job, job->first_row); i++) {
        const int64_t at = output_row(p, b, g, job->first_row + i);
        store_gradient(p, job, i, vector_at(p, p->grads->dq, at, job->head_dim));
        const float *q = job->scratch.q + i * stride,
                    *middle = job->scratch.sum_middle + i * stride;
        for (int32_t c = 0; c < job->head_dim; c++) part[c] += (double)q[c] * middle[c];
    }
}

static void run_row_item(const plan *p, int64_t index, unsigned char *memory) {
    const int64_t b = index / p->row_blocks / p->args->n_heads;
    const int64_t g = index / p->row_blocks % p->args->n_heads;
    lk_learn_job job = job_of(p, b, g, memory);
    job.first_row = index % p->row_blocks * LK_LEARN_ROWS;
    if (p->grads) {
        p->kernels->backward_rows(&job);
        finish_rows(p, &job, b, g, p->dalpha + index * p->args->head_dim);
    } else {
        p->kernels->forward(&job);
        finish_forward(p, &job, b, g);
    }
}

static void run_key_item(const plan *p, int64_t index, unsigned char *memory) {
    const lk_learn_args *a = p->args;
    const int64_t b = index / p->key_blocks / a->n_heads, g = index / p->key_blocks % a->n_heads;
    const int64_t first = index % p->key_blocks * LK_LEARN_KEYS; /* column of the span */
    const int64_t end = lk_min(first + LK_LEARN_KEYS, a->n_columns);
    lk_learn_job job = job_of(p, b, g, memory);
    const int64_t real = lk_min(lk_max(first, job.start - a->n_context), end);
    job.first_key = a->n_context + real;
    job.n_keys = end - real;
    if (job.n_keys > 0) p->kernels->backward_keys(&job);
    const size_t elem_bytes = lk_dtype_bytes(a->dtype);
    for (int64_t t = first; t < end; t++) {
        const int64_t at = (b * a->n_heads + g) * a->n_columns + t;
        void *dk = vector_at(p, p->grads->dk, at, a->head_dim);
        void *dv = vector_at(p, p->grads->dv, at, a->v_dim);
        if (t < real) {
            memset(dk, 0, (size_t)a->head_dim * elem_bytes);
            memset(dv, 0, (size_t)a->v_dim * elem_bytes);
            continue;
        }
        const int32_t j = (int32_t)(t - real);
        const float *sum_v = job.scratch.sum_v + j * lk_learn_stride(a->v_dim);
        store_gradient(p, &job, j, dk);
        for (int32_t d = 0; d < a->v_dim; d++) lk_half_store(a->dtype, dv, d, sum_v[d]);
    }
}

static void merge_dalpha(const plan *p) {
    const int64_t n_heads = p->args->n_heads, head_dim = p->args->head_dim;
    for (int64_t g = 0; g < n_heads; g++) {
        for (int64_t c = 0; c < head_dim; c++) {
            double sum = 0.0;
            for (int64_t b = 0; b < p->args->n_rows; b++)
                for (int64_t block = 0; block < p->row_blocks; block++)
                    sum += p->dalpha[((b * n_heads + g) * p->row_blocks + block) * head_dim + c];
            p->grads->dalpha[g * head_dim + c] = (float)(p->args->scale * sum);
        }
    }
}

static void run_plan(const plan *p) {
    OMP(omp parallel num_threads(p->n_threads)) {
#ifdef _OPENMP
        unsigned char *memory = p->scratch + (size_t)omp_get_thread_num() * p->scratch_bytes;
#else
        unsigned char *memory = p->scratch;
#endif
        /* The larger items first, so that what is left at the end is small. */
        OMP(omp for schedule(dynamic, 1))
        for (int64_t i = 0; i < p->n_row_items + p->n_key_items; i++) {
            if (i < p->n_row_items) run_row_item(p, i, memory);
            else run_key_item(p, i - p->n_row_items, memory);
        }
    }
}

/* ----------------------------------------------------------------------------------------------- public */

lk_status lk_learn_forward(const lk_learn_args *args, void *o, float *lse) {
    LK_TRY(check_args(args));
    LK_CHECK(o && lse, LK_E_VALUE);
    plan p = {.args = args, .o = o, .lse = lse};
    const lk_status status = make_plan(&p);
    if (status == LK_OK) run_plan(&p);
    free_plan(&p);
    return status;
}

lk_status lk_learn_backward(const lk_learn_args *args, const lk_learn_grads *grads) {
    LK_TRY(check_args(args));
    LK_CHECK(grads && is_given(&grads->o) && is_given(&grads->d_o) && grads->lse, LK_E_VALUE);
    LK_CHECK(grads->dq && grads->dk && grads->dv && grads->dalpha, LK_E_VALUE);
    plan p = {.args = args, .grads = grads};
    const lk_status status = make_plan(&p);
    if (status == LK_OK) {
        run_plan(&p);
        merge_dalpha(&p);
    }
    free_plan(&p);
    return status;
}
