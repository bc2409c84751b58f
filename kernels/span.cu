/* span.cu: check the arguments of a span, and launch its pieces: each is stored, attends, and its parts are merged. */
#include "append.cuh"
#include "combine.cuh"
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

/* Whether a row's pieces may be that long: see piece in leank_cuda.h. */
static bool is_piece(const lk_cuda_span_args *a) {
    return a->piece >= 1 && a->piece <= LK_CUDA_MOST_PIECE && a->piece <= a->layer->slack + 1;
}

/* Sizes of a piece of n_t tokens. */
static lk_status plan_piece(span_params *p, const span_instance *instance, int32_t n_t,
                            int32_t smem_bytes) {
    p->n_t = n_t;
    p->n_columns = p->n_q_heads / p->layer.n_heads * n_t;
    const lk_status status = instance->plan(p, smem_bytes);
    if (status != LK_OK) return status;
    const int64_t n_units = (int64_t)p->layer.n_rows * p->layer.n_heads * p->column_blocks;
    if (n_units > LK_CUDA_MAX_UNITS) return LK_E_SHAPE;
    /* A block has to get ready for each part, so that only halves of its share pay, where the workspace has room for twice
     * the states. */
    const int64_t room =
        2 * LK_PLAN_HALVINGS * (int64_t)part_floats(LK_CUDA_MAX_R, LK_CUDA_MAX_HEAD_DIM);
    p->most_halvings = 2 * (int64_t)part_floats(p->r, p->layer.head_dim) <= room;
    return LK_OK;
}

/* Store and attend with the n_t columns from column t on. */
static lk_status run_piece(const lk_cuda_span_args *a, span_params *p,
                           const span_instance *instance, int32_t t, int32_t n_t) {
    const cudaStream_t stream = static_cast<cudaStream_t>(a->stream);
    const int64_t d = a->layer->head_dim;
    const uint16_t *k = static_cast<const uint16_t *>(a->k) + t * a->k_stride[2];
    const uint16_t *v = static_cast<const uint16_t *>(a->v) + t * a->v_stride[2];
    int32_t *first_new = a->position + (int64_t)a->layer->n_rows * a->n_columns;
    lk_status status = plan_piece(p, instance, n_t, a->smem_bytes);
    if (status != LK_OK) return status;
    lk_cuda_append_args append = {};
    append.layer = a->layer;
    append.k = k;
    append.v = v;
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
    status = append_columns(&append, a->n_columns, first_new);
    if (status != LK_OK) return status;
    p->q = static_cast<const uint16_t *>(a->q) + t * a->q_stride[2];
    p->q_t = a->q_stride[2];
    p->o = static_cast<uint16_t *>(a->o) + t * d;
    p->lse = a->lse ? a->lse + t : NULL;
    p->position = a->position + t;
    p->first_new = first_new;
    p->position_stride = p->o_stride = a->n_columns;
    status = instance->launch(p, stream, a->cuda_error);
    return status == LK_OK ? launch_combine(*p, stream, a->cuda_error) : status;
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
    if (!args->q || !args->k || !args->v || !args->o || !args->position || !is_piece(args))
        return LK_E_VALUE;
    /* find_query counts them in int32. */
    if ((int64_t)layer->n_rows * args->n_q_heads > INT32_MAX / LK_CUDA_MOST_PIECE)
        return LK_E_SHAPE;
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
