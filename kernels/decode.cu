/* decode.cu: check the arguments of an attend, pick its kernel, and launch it and the one that merges. */
#include "combine.cuh"

#include <math.h>

typedef lk_status launch_fn(decode_params *p, int32_t smem_bytes, cudaStream_t stream,
                            int32_t *cuda_error);
launch_fn launch_decode_bf16_64, launch_decode_bf16_80, launch_decode_bf16_96,
    launch_decode_bf16_128, launch_decode_bf16_256;
launch_fn launch_decode_f16_64, launch_decode_f16_80, launch_decode_f16_96, launch_decode_f16_128,
    launch_decode_f16_256;

static const struct {
    lk_dtype dtype;
    int32_t head_dim;
    launch_fn *launch;
} instances[] = {
    {LK_BF16, 64, launch_decode_bf16_64},   {LK_BF16, 80, launch_decode_bf16_80},
    {LK_BF16, 96, launch_decode_bf16_96},   {LK_BF16, 128, launch_decode_bf16_128},
    {LK_F16, 64, launch_decode_f16_64},     {LK_F16, 80, launch_decode_f16_80},
    {LK_F16, 96, launch_decode_f16_96},     {LK_F16, 128, launch_decode_f16_128},
    {LK_BF16, 256, launch_decode_bf16_256}, {LK_F16, 256, launch_decode_f16_256},
};

/* n_taken, then unit_chunks, then states: the same places for every layer, so that layers can share the workspace. */
#define HEADER_BYTES 128

size_t lk_cuda_attend_work_bytes(int32_t head_dim, int32_t r, int32_t n_blocks) {
    const size_t of_steps = 2 * (LK_PLAN_HALVINGS + 1) * (size_t)part_floats(r, head_dim);
    const size_t floats = of_steps > LK_SPAN_STATE_FLOATS ? of_steps : LK_SPAN_STATE_FLOATS;
    return HEADER_BYTES + LK_CUDA_MAX_UNITS * sizeof(int2) +
           (size_t)n_blocks * floats * sizeof(float);
}

lk_status begin_attend(decode_params *p, const lk_cuda_layer *layer, int32_t n_q_heads, float scale,
                       float softcap, void *work, int32_t n_blocks) {
    if (layer->n_rows < 1 || layer->n_heads < 1 || n_blocks < 1) return LK_E_SHAPE;
    if (n_q_heads < 1 || n_q_heads % layer->n_heads != 0) return LK_E_SHAPE;
    if (n_q_heads / layer->n_heads > LK_CUDA_MAX_R) return LK_E_SHAPE;
    if ((int64_t)layer->n_rows * layer->n_heads > LK_CUDA_MAX_UNITS) return LK_E_SHAPE;
    if (!work || !isfinite(scale) || !isfinite(softcap) || softcap < 0) return LK_E_VALUE;
    p->layer = *layer;
    p->n_q_heads = n_q_heads;
    p->n_blocks = n_blocks;
    p->scale = scale;
    p->softcap = softcap;
    unsigned char *at = static_cast<unsigned char *>(work);
    p->n_taken = reinterpret_cast<int32_t *>(at);
    p->unit_chunks = reinterpret_cast<int2 *>(at + HEADER_BYTES);
    p->states = reinterpret_cast<float *>(p->unit_chunks + LK_CUDA_MAX_UNITS);
    return LK_OK;
}

lk_status lk_cuda_attend(const lk_cuda_attend_args *args) {
    const lk_cuda_layer *layer = args->layer;
    *args->cuda_error = 0;
    decode_params p = {};
    const lk_status begun = begin_attend(&p, layer, args->n_q_heads, args->scale, args->softcap,
                                         args->work, args->n_blocks);
    if (begun != LK_OK) return begun;
    if (!args->q || !args->o || (args->k == NULL) != (args->v == NULL)) return LK_E_VALUE;
    p.q = args->q;
    p.k = args->k;
    p.v = args->v;
    for (int i = 0; i < 2; i++) {
        p.q_stride[i] = args->q_stride[i];
        p.k_stride[i] = args->k_stride[i];
        p.v_stride[i] = args->v_stride[i];
    }
    p.o = args->o;
    p.lse = args->lse;
    p.valid = args->valid;
    p.sinks = args->sinks;
    p.r = p.n_columns = args->n_q_heads / layer->n_heads;
    p.column_blocks = p.n_t = p.o_stride = 1;
    const cudaStream_t stream = static_cast<cudaStream_t>(args->stream);
    for (const auto &instance : instances) {
        if (instance.dtype != layer->dtype || instance.head_dim != layer->head_dim) continue;
        const lk_status status = instance.launch(&p, args->smem_bytes, stream, args->cuda_error);
        return status == LK_OK ? launch_combine(p, stream, args->cuda_error) : status;
    }
    return LK_E_SHAPE;
}
