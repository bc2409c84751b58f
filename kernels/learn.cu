/* learn.cu: check the arguments of a call of mask learning, cut its work into blocks, pick its kernels and launch them. */
#include "learn_merge.cuh"

typedef lk_status launch_fn(learn_params *p, int32_t smem_bytes, cudaStream_t stream,
                            int32_t *cuda_error);
launch_fn launch_learn_forward_bf16_64, launch_learn_forward_bf16_80, launch_learn_forward_bf16_96,
    launch_learn_forward_bf16_128, launch_learn_forward_f16_64, launch_learn_forward_f16_80,
    launch_learn_forward_f16_96, launch_learn_forward_f16_128;
launch_fn launch_learn_backward_bf16_64, launch_learn_backward_bf16_80,
    launch_learn_backward_bf16_96, launch_learn_backward_bf16_128, launch_learn_backward_f16_64,
    launch_learn_backward_f16_80, launch_learn_backward_f16_96, launch_learn_backward_f16_128;

#define INSTANCE(id, name, D)                                                                      \
    {id, D, launch_learn_forward_##name##_##D, launch_learn_backward_##name##_##D}
static const struct {
    lk_dtype dtype;
    int32_t head_dim;
    launch_fn *forward, *backward;
} instances[] = {
    INSTANCE(LK_BF16, bf16, 64),  INSTANCE(LK_BF16, bf16, 80), INSTANCE(LK_BF16, bf16, 96),
    INSTANCE(LK_BF16, bf16, 128), INSTANCE(LK_F16, f16, 64),   INSTANCE(LK_F16, f16, 80),
    INSTANCE(LK_F16, f16, 96),    INSTANCE(LK_F16, f16, 128),
};

/* ------------------------------------------------------------------------------------------------- plan */

/* What a block costs beside its tiles, in tiles of 64 keys, and splits beyond which merging them would take as long. */
#define TILES_PER_BLOCK 6
#define MOST_SPLITS 32

/* How many blocks share the keys of a block of query rows. Blocks run in waves of as many as fit on the device (slots); the
 * time is that of all waves, in tiles. 64 blocks in 264 slots, 1024 tiles: 1 split takes 1 wave of 1030 tiles, 4 splits take
 * 1 wave of 262, 8 splits 2 waves of 134. Depends on sizes alone, so that two runs agree bit for bit. */
static int32_t choose_splits(int64_t n_blocks, int64_t n_keys, int64_t slots) {
    const int64_t n_tiles = (n_keys + LEARN_FORWARD_KEYS - 1) / LEARN_FORWARD_KEYS;
    int64_t best = 1, least = INT64_MAX;
    for (int64_t n = 1; n <= MOST_SPLITS && n <= n_tiles; n++) {
        const int64_t waves = (n_blocks * n + slots - 1) / slots;
        const int64_t time = waves * ((n_tiles + n - 1) / n + TILES_PER_BLOCK);
        if (time >= least) continue;
        least = time;
        best = n;
    }
    return (int32_t)best;
}

static int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

/* Sizes and counts of a call, and the number of floats in front of its states. */
static lk_status make_plan(const lk_learn_args *a, int32_t n_processors, learn_params *p) {
    if (n_processors < 1) return LK_E_VALUE;
    if (a->n_rows < 1 || a->n_heads < 1 || a->n_q_heads < 1) return LK_E_SHAPE;
    if (a->n_q_heads % a->n_heads != 0 || a->v_dim != a->head_dim) return LK_E_SHAPE;
    if (a->n_context < 0 || a->n_columns < 1) return LK_E_SHAPE;
    if (a->n_context > LEARN_MOST_COLUMNS || a->n_columns > LEARN_MOST_COLUMNS - a->n_context)
        return LK_E_SHAPE;
    /* Query rows of all heads, B * Hq * T, fit in int32. */
    if (a->n_rows > LEARN_MOST_COLUMNS || a->n_q_heads > LEARN_MOST_COLUMNS / a->n_rows ||
        a->n_columns > LEARN_MOST_COLUMNS / (a->n_rows * a->n_q_heads))
        return LK_E_SHAPE;
    *p = {};
    p->head_dim = a->head_dim;
    p->n_rows = (int32_t)a->n_rows;
    p->n_heads = (int32_t)a->n_heads;
    p->r = (int32_t)(a->n_q_heads / a->n_heads);
    p->n_context = (int32_t)a->n_context;
    p->n_columns = (int32_t)a->n_columns;
    p->n_query_rows = p->n_columns * p->r;
    p->row_blocks = (int32_t)ceil_div(p->n_query_rows, LEARN_ROWS);
    p->key_blocks = (int32_t)ceil_div(p->n_columns, LEARN_SPAN_KEYS);
    p->n_splits = choose_splits(a->n_rows * a->n_heads * p->row_blocks, a->n_context + a->n_columns,
                                (int64_t)n_processors * LEARN_BLOCKS_PER_PROCESSOR(a->head_dim));
    return LK_OK;
}

/* Cuts the workspace unless it is NULL; returns its size. */
static size_t carve(learn_params *p, bool backward, void *work) {
    const size_t n_units = (size_t)p->n_rows * p->n_heads, D = (size_t)p->head_dim;
    const size_t n_all = n_units * p->n_query_rows, n_splits = (size_t)p->n_splits;
    const size_t n_sums = n_splits * n_all * D;
    const size_t n_states = backward ? n_all : n_splits * n_all;
    const size_t n_parts = backward ? n_units * p->row_blocks * n_splits * D : 0;
    if (work) {
        p->sums = static_cast<float *>(work);
        p->dalpha_parts = p->sums + n_sums;
        p->states = reinterpret_cast<float2 *>(p->dalpha_parts + n_parts);
    }
    return (n_sums + n_parts + 2 * n_states) * sizeof(float);
}

size_t lk_cuda_learn_work_bytes(const lk_learn_args *args, bool backward, int32_t n_blocks) {
    learn_params p;
    return make_plan(args, n_blocks, &p) == LK_OK ? carve(&p, backward, NULL) : 0;
}

/* ----------------------------------------------------------------------------------------------- public */

static bool is_given(const lk_strided &x) { return x.data != NULL; }

static int32_t limited(int64_t x) {
    return (int32_t)(x < LEARN_MOST_COLUMNS ? x : LEARN_MOST_COLUMNS);
}

static lk_status make_params(const lk_learn_args *a, const lk_cuda_learn_launch *launch,
                             bool backward, learn_params *p) {
    *launch->cuda_error = 0;
    if (!a->alpha || !launch->work) return LK_E_VALUE;
    if (!is_given(a->q) || !is_given(a->k) || !is_given(a->v)) return LK_E_VALUE;
    if (a->n_context > 0 && (!is_given(a->k_context) || !is_given(a->v_context))) return LK_E_VALUE;
    if (!isfinite((float)((double)a->scale * LK_LOG2_E))) return LK_E_VALUE;
    if (a->sink < 0 || a->recent < 1) return LK_E_VALUE;
    const lk_status status = make_plan(a, launch->n_blocks, p);
    if (status != LK_OK) return status;
    carve(p, backward, launch->work);
    p->q = a->q;
    p->k_context = a->k_context;
    p->v_context = a->v_context;
    p->k = a->k;
    p->v = a->v;
    p->alpha = a->alpha;
    p->start = a->start;
    p->hidden = a->hidden;
    p->sink = limited(a->sink);
    p->recent = limited(a->recent);
    const int64_t recent_rows = (int64_t)p->recent * p->r;
    p->recent_rows = limited(recent_rows);
    p->scale = a->scale;
    p->scale_log2 = (float)((double)a->scale * LK_LOG2_E);
    return LK_OK;
}

static launch_fn *find_instance(const lk_learn_args *a, bool backward) {
    for (const auto &instance : instances)
        if (instance.dtype == a->dtype && instance.head_dim == a->head_dim)
            return backward ? instance.backward : instance.forward;
    return NULL;
}

lk_status lk_cuda_learn_forward(const lk_learn_args *args, void *o, float *lse,
                                const lk_cuda_learn_launch *launch) {
    learn_params p;
    const lk_status status = make_params(args, launch, false, &p);
    if (status != LK_OK) return status;
    if (!o || !lse) return LK_E_VALUE;
    launch_fn *const instance = find_instance(args, false);
    if (!instance) return LK_E_SHAPE;
    p.out = o;
    p.lse_out = lse;
    const cudaStream_t stream = static_cast<cudaStream_t>(launch->stream);
    const lk_status launched = instance(&p, launch->smem_bytes, stream, launch->cuda_error);
    if (launched != LK_OK) return launched;
    return launch_learn_merge_forward(p, args->dtype, stream, launch->cuda_error);
}

lk_status lk_cuda_learn_backward(const lk_learn_args *args, const lk_learn_grads *grads,
                                 const lk_cuda_learn_launch *launch) {
    learn_params p;
    const lk_status status = make_params(args, launch, true, &p);
    if (status != LK_OK) return status;
    if (!is_given(grads->o) || !is_given(grads->d_o) || !grads->lse) return LK_E_VALUE;
    if (!grads->dq || !grads->dk || !grads->dv || !grads->dalpha) return LK_E_VALUE;
    launch_fn *const instance = find_instance(args, true);
    if (!instance) return LK_E_SHAPE;
    p.o = grads->o;
    p.d_o = grads->d_o;
    p.lse = grads->lse;
    p.out = grads->dq;
    p.dk = grads->dk;
    p.dv = grads->dv;
    p.dalpha = grads->dalpha;
    const cudaStream_t stream = static_cast<cudaStream_t>(launch->stream);
    const lk_status launched = instance(&p, launch->smem_bytes, stream, launch->cuda_error);
    if (launched != LK_OK) return launched;
    return launch_learn_merge_backward(p, args->dtype, stream, launch->cuda_error);
}
