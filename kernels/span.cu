/* span.cu: check the arguments of a span, and launch its pieces: each is stored, attends, and its parts are merged. */
#include "append.cuh"
#include "combine.cuh"
#include "copy.cuh"
#include "span_shape.cuh"

typedef lk_status plan_fn(span_params *p, int32_t smem_bytes);
typedef lk_status launch_fn(const span_params *p, cudaStream_t stream, int32_t *cuda_error);
plan_fn plan_span_bf16_64, plan_span_bf16_80, plan_span_bf16_96, plan_span_bf16_128,
    plan_span_bf16_256;
plan_fn plan_span_f16_64, plan_span_f16_80, plan_span_f16_96, plan_span_f16_128, plan_span_f16_256;
launch_fn launch_span_bf16_64, launch_span_bf16_80, launch_span_bf16_96, launch_span_bf16_128,
    launch_span_bf16_256;
launch_fn launch_span_f16_64, launch_span_f16_80, launch_span_f16_96, launch_span_f16_128,
    launch_span_f16_256;

typedef struct {
    lk_dtype dtype;
    int32_t head_dim;
    plan_fn *plan;
    launch_fn *launch;
} span_instance;

#define INSTANCES(dtype, name)                                                                     \
    {dtype, 64, plan_span_##name##_64, launch_span_##name##_64},                                   \
        {dtype, 80, plan_span_##name##_80, launch_span_##name##_80},                               \
        {dtype, 96, plan_span_##name##_96, launch_span_##name##_96},                               \
        {dtype, 128, plan_span_##name##_128, launch_span_##name##_128},                            \
        {dtype, 256, plan_span_##name##_256, launch_span_##name##_256},

static const span_instance instances[] = {INSTANCES(LK_BF16, bf16) INSTANCES(LK_F16, f16)};

static const span_instance *find_instance(const lk_cuda_layer *layer) {
    for (const span_instance &x : instances)
        if (x.dtype == layer->dtype && x.head_dim == layer->head_dim) return &x;
    return NULL;
}

/* Sizes of a piece of n_t tokens. */
static lk_status plan_piece(span_params *p, const span_instance *instance, int32_t n_t,
                            int32_t smem_bytes) {
    const lk_cuda_layer *layer = &p->layer;
    p->n_t = n_t;
    p->n_columns = p->n_q_heads / layer->n_heads * n_t;
    /* find_query counts them in int32. */
    if ((int64_t)layer->n_rows * p->n_q_heads * n_t > INT32_MAX) return LK_E_SHAPE;
    const lk_status status = instance->plan(p, smem_bytes);
    if (status != LK_OK) return status;
    /* From about so many columns on it is not memory that a tile waits for: products of D value indices, and as much again
     * for exponentials and the like, weigh more than what is read. */
    p->tile_cost = p->r >= 128 ? (uint32_t)layer->head_dim / 8 : 0;
    const int64_t n_units = (int64_t)layer->n_rows * layer->n_heads * p->column_blocks;
    const int64_t n_pages = ((int64_t)layer->max_tokens + LK_PAGE_TOKENS - 1) / LK_PAGE_TOKENS;
    const int64_t unit_cost = n_pages * (lk_whole_cost(layer->head_dim) + p->tile_cost);
    if (n_units > LK_CUDA_MAX_UNITS || unit_cost > UINT32_MAX / n_units) return LK_E_SHAPE;
    return LK_OK;
}

/* Columns of a piece that frees no channel that one of them needs. */
static int32_t short_piece(const lk_cuda_layer *layer) {
    return layer->slack < LK_CUDA_MOST_PIECE ? layer->slack + 1 : LK_CUDA_MOST_PIECE;
}

/* Pages of a row that a piece may put tokens in. */
static int32_t count_lent(int32_t piece) {
    return (piece + LK_PAGE_TOKENS - 1) / LK_PAGE_TOKENS + 1;
}

/* Bytes of the table of twins in scratch, which the twins follow: they are copied 16 bytes at a time. */
static size_t table_bytes(const lk_cuda_layer *layer) {
    const size_t n_bytes = sizeof(int64_t) * (size_t)layer->n_rows * (size_t)layer->table_stride;
    return (n_bytes + 127) / 128 * 128;
}

lk_status lk_cuda_span_piece(const lk_cuda_layer *layer, int32_t n_q_heads, int32_t n_columns,
                             int64_t twin_bytes, int32_t smem_bytes, int32_t *piece,
                             size_t *scratch_bytes) {
    const span_instance *instance = find_instance(layer);
    if (!instance || layer->n_rows < 1 || layer->n_heads < 1 || n_q_heads < 1) return LK_E_SHAPE;
    span_params p = {};
    p.layer = *layer;
    p.n_q_heads = n_q_heads;
    *piece = n_columns < LK_CUDA_MOST_LONG_PIECE ? n_columns : LK_CUDA_MOST_LONG_PIECE;
    for (; *piece > short_piece(layer); *piece /= 2) {
        *scratch_bytes = table_bytes(layer) +
                         (size_t)layer->n_rows * (size_t)count_lent(*piece) * (size_t)twin_bytes;
        if (*scratch_bytes <= LK_CUDA_MOST_SCRATCH_BYTES &&
            plan_piece(&p, instance, *piece, smem_bytes) == LK_OK)
            return LK_OK;
    }
    *scratch_bytes = 0;
    while (*piece > 1 && plan_piece(&p, instance, *piece, smem_bytes) != LK_OK) *piece /= 2;
    return LK_OK;
}

/* Store and attend with the n_t columns from column t on. */
static lk_status run_piece(const lk_cuda_span_args *a, span_params *p,
                           const span_instance *instance, int32_t t, int32_t n_t) {
    const cudaStream_t stream = static_cast<cudaStream_t>(a->stream);
    const int64_t d = a->layer->head_dim;
    int64_t *table = static_cast<int64_t *>(a->scratch);
    const int32_t n_lent = count_lent(n_t);
    lk_status status = plan_piece(p, instance, n_t, a->smem_bytes);
    if (status != LK_OK) return status;
    if (table) {
        const int64_t lent = reinterpret_cast<int64_t>(table) + (int64_t)table_bytes(a->layer);
        status = lend_twins(a->layer, table, lent, n_lent, a->twin_bytes, stream, a->cuda_error);
        if (status != LK_OK) return status;
        /* With the lent twins there is room for the piece, so that nothing retires. */
        p->layer.twin = table;
        p->layer.slack = a->layer->slack + n_t;
    }
    lk_cuda_append_args append = {};
    append.layer = &p->layer;
    append.k = static_cast<const uint16_t *>(a->k) + t * a->k_stride[2];
    append.v = static_cast<const uint16_t *>(a->v) + t * a->v_stride[2];
    for (int i = 0; i < 3; i++) {
        append.k_stride[i] = a->k_stride[i];
        append.v_stride[i] = a->v_stride[i];
    }
    append.valid = a->valid ? a->valid + t : NULL;
    append.position = a->position + t;
    append.n_columns = n_t;
    append.columns_before = a->columns_before + t;
    append.stream = a->stream;
    append.cuda_error = a->cuda_error;
    status = append_columns(&append, a->n_columns);
    if (status != LK_OK) return status;
    p->q = static_cast<const uint16_t *>(a->q) + t * a->q_stride[2];
    p->q_t = a->q_stride[2];
    p->o = static_cast<uint16_t *>(a->o) + t * d;
    p->lse = a->lse ? a->lse + t : NULL;
    p->position = a->position + t;
    p->position_stride = p->o_stride = a->n_columns;
    status = instance->launch(p, stream, a->cuda_error);
    if (status == LK_OK) status = launch_combine(*p, stream, a->cuda_error);
    if (status != LK_OK || !table) return status;
    return take_back_twins(a->layer, table, n_lent, a->twin_bytes, stream, a->cuda_error);
}

lk_status lk_cuda_span(const lk_cuda_span_args *args) {
    const lk_cuda_layer *layer = args->layer;
    *args->cuda_error = 0;
    span_params p = {};
    lk_status status = begin_attend(&p, layer, args->n_q_heads, args->scale, args->softcap,
                                    args->work, args->n_blocks);
    if (status != LK_OK) return status;
    if (layer->n_rows > 65535 || args->n_columns < 0 || args->columns_before < 0) return LK_E_SHAPE;
    if (args->n_columns > layer->max_tokens - args->columns_before) return LK_E_LIMIT;
    const int32_t most = args->scratch ? LK_CUDA_MOST_LONG_PIECE : short_piece(layer);
    if (args->piece < 1 || args->piece > most || args->twin_bytes % 16 != 0) return LK_E_VALUE;
    if (!args->q || !args->k || !args->v || !args->o || !args->position) return LK_E_VALUE;
    for (int i = 0; i < 2; i++) p.q_stride[i] = args->q_stride[i];
    p.sinks = args->sinks;
    const span_instance *instance = find_instance(layer);
    if (!instance) return LK_E_SHAPE;
    for (int32_t t = 0; t < args->n_columns; t += args->piece) {
        const int32_t left = args->n_columns - t;
        status = run_piece(args, &p, instance, t, left < args->piece ? left : args->piece);
        if (status != LK_OK) return status;
    }
    return LK_OK;
}
