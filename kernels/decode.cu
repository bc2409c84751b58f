/* decode.cu: check the arguments of an attend, pick its kernel, and launch it and the one that merges. */
#include "combine.cuh"

#include <math.h>

typedef lk_status launch_fn(decode_params *p, int32_t smem_bytes, cudaStream_t stream,
                            int32_t *cuda_error);
launch_fn launch_decode_bf16_64, launch_decode_bf16_80, launch_decode_bf16_96,
    launch_decode_bf16_128;
launch_fn launch_decode_f16_64, launch_decode_f16_80, launch_decode_f16_96, launch_decode_f16_128;

static const struct {
    lk_dtype dtype;
    int32_t head_dim;
    launch_fn *launch;
} instances[] = {
    {LK_BF16, 64, launch_decode_bf16_64}, {LK_BF16, 80, launch_decode_bf16_80},
    {LK_BF16, 96, launch_decode_bf16_96}, {LK_BF16, 128, launch_decode_bf16_128},
    {LK_F16, 64, launch_decode_f16_64},   {LK_F16, 80, launch_decode_f16_80},
    {LK_F16, 96, launch_decode_f16_96},   {LK_F16, 128, launch_decode_f16_128},
};

/* n_taken, then unit_chunks, then states: the same places for every layer, so that layers can share the workspace. */
#define HEADER_BYTES 128

size_t lk_cuda_attend_work_bytes(int32_t head_dim, int32_t r, int32_t n_blocks) {
    const size_t n_states = 2 * (size_t)n_blocks * 2 * LK_PLAN_HALVINGS;
    return HEADER_BYTES + LK_CUDA_MAX_UNITS * sizeof(int2) +
           n_states * (size_t)part_floats(r, head_dim) * sizeof(float);
}

lk_status lk_cuda_attend(const lk_cuda_attend_args *args) {
    const lk_cuda_layer *layer = args->layer;
    *args->cuda_error = 0;
    if (layer->n_rows < 1 || layer->n_heads < 1 || args->n_blocks < 1) return LK_E_SHAPE;
    if (args->n_q_heads < 1 || args->n_q_heads % layer->n_heads != 0) return LK_E_SHAPE;
    const int32_t r = args->n_q_heads / layer->n_heads;
    if (r > LK_CUDA_MAX_R) return LK_E_SHAPE;
    if ((int64_t)layer->n_rows * layer->n_heads > LK_CUDA_MAX_UNITS) return LK_E_SHAPE;
    if (!args->q || !args->o || !args->work || (args->k == NULL) != (args->v == NULL))
        return LK_E_VALUE;
    if (!isfinite(args->scale) || !isfinite(args->softcap) || args->softcap < 0) return LK_E_VALUE;

    unsigned char *work = static_cast<unsigned char *>(args->work);
    decode_params p = {};
    p.layer = *layer;
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
    p.r = r;
    p.n_blocks = args->n_blocks;
    p.scale = args->scale;
    p.softcap = args->softcap;
    p.n_taken = reinterpret_cast<int32_t *>(work);
    p.unit_chunks = reinterpret_cast<int2 *>(work + HEADER_BYTES);
    p.states = reinterpret_cast<float *>(p.unit_chunks + LK_CUDA_MAX_UNITS);
    const cudaStream_t stream = static_cast<cudaStream_t>(args->stream);
    for (const auto &instance : instances) {
        if (instance.dtype != layer->dtype || instance.head_dim != layer->head_dim) continue;
        const lk_status status = instance.launch(&p, args->smem_bytes, stream, args->cuda_error);
        if (status != LK_OK) return status;
        const lk_status merged = launch_combine(p, stream, args->cuda_error);
        /* The combine would have done it, and the next launch depends on it. */
        if (merged != LK_OK) (void)cudaMemsetAsync(p.n_taken, 0, sizeof *p.n_taken, stream);
        return merged;
    }
    return LK_E_SHAPE;
}
