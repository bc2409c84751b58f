/* learn_merge.cu: add up what the splits and blocks of mask learning left. A warp has one query row. */
#include "learn_merge.cuh"

/* The query row of a warp, and where it is in an output [B, Hq, T]. */
typedef struct {
    int64_t row; /* of all units */
    int64_t place;
    bool exists, is_real; /* real: its column is no padding */
} merged_row;

__device__ __forceinline__ merged_row find_row(const learn_params &p) {
    merged_row at = {};
    at.row = (int64_t)blockIdx.x * LEARN_WARPS + threadIdx.x / LK_WARP;
    const int64_t unit = at.row / p.n_query_rows;
    at.exists = unit < (int64_t)p.n_rows * p.n_heads;
    if (!at.exists) return at;
    const int32_t i = (int32_t)(at.row % p.n_query_rows), b = (int32_t)(unit / p.n_heads);
    const int64_t h = unit * p.r + i % p.r; /* b * Hq + head */
    at.place = h * p.n_columns + i / p.r;
    at.is_real = i >= learn_first_real(p, learn_start(p, b));
    return at;
}

template <typename T>
__device__ __forceinline__ void store_4(const learn_params &p, const merged_row &at, int32_t d,
                                        const float4 &x) {
    const uint2 words =
        at.is_real ? make_uint2(pack2<T>(x.x, x.y), pack2<T>(x.z, x.w)) : make_uint2(0, 0);
    *reinterpret_cast<uint2 *>(static_cast<T *>(p.out) + at.place * p.head_dim + d) = words;
}

__device__ __forceinline__ void add(float4 *sum, const float4 &x, float factor) {
    sum->x = fmaf(x.x, factor, sum->x);
    sum->y = fmaf(x.y, factor, sum->y);
    sum->z = fmaf(x.z, factor, sum->z);
    sum->w = fmaf(x.w, factor, sum->w);
}

template <typename T>
__global__ void __launch_bounds__(LEARN_THREADS)
    merge_forward_kernel(const __grid_constant__ learn_params p) {
    wait_for_earlier_kernels();
    const merged_row at = find_row(p);
    if (!at.exists) return;
    const int64_t n_all = (int64_t)p.n_rows * p.n_heads * p.n_query_rows;
    const int32_t d = (int32_t)(threadIdx.x % LK_WARP) * 4;
    float m = -INFINITY;
    for (int32_t i = 0; i < p.n_splits; i++) m = fmaxf(m, p.states[i * n_all + at.row].x);
    const float shift = m == -INFINITY ? 0.0f : m; /* no -inf - -inf where nothing was seen */
    float l = 0.0f;
    float4 sum = {};
#pragma unroll 4
    for (int32_t i = 0; i < p.n_splits; i++) {
        const float2 state = p.states[i * n_all + at.row];
        const float factor = exp2_fast(state.x - shift);
        l = fmaf(state.y, factor, l);
        if (d < p.head_dim)
            add(&sum, *reinterpret_cast<float4 *>(p.sums + (i * n_all + at.row) * p.head_dim + d),
                factor);
    }
    const bool empty = !at.is_real || l == 0.0f;
    if (d == 0) p.lse_out[at.place] = empty ? -INFINITY : (shift + log2f(l)) * LK_LN_2;
    const float by = l == 0.0f ? 0.0f : 1.0f / l;
    if (d < p.head_dim)
        store_4<T>(p, at, d, make_float4(sum.x * by, sum.y * by, sum.z * by, sum.w * by));
}

/* 32 channels of one KV head, by one block. */
__device__ __forceinline__ void merge_dalpha(const learn_params &p, int32_t block) {
    __shared__ double sums[LEARN_WARPS][LK_WARP];
    const int warp = threadIdx.x / LK_WARP, lane = threadIdx.x % LK_WARP;
    const int32_t n_each = (p.head_dim + LK_WARP - 1) / LK_WARP;
    const int32_t g = block / n_each, c = block % n_each * LK_WARP + lane;
    const int32_t n_parts = p.row_blocks * p.n_splits; /* of one unit */
    double sum = 0.0;
    if (c < p.head_dim) {
        for (int32_t b = 0; b < p.n_rows; b++) {
            const float *parts =
                p.dalpha_parts + ((int64_t)b * p.n_heads + g) * n_parts * p.head_dim + c;
#pragma unroll 8
            for (int32_t i = warp; i < n_parts; i += LEARN_WARPS)
                sum += parts[(int64_t)i * p.head_dim];
        }
    }
    sums[warp][lane] = sum;
    __syncthreads();
    if (warp > 0 || c >= p.head_dim) return;
    for (int i = 1; i < LEARN_WARPS; i++) sum += sums[i][lane];
    p.dalpha[(int64_t)g * p.head_dim + c] = (float)(sum * p.scale);
}

static int64_t row_blocks_of(const learn_params &p) {
    const int64_t n_all = (int64_t)p.n_rows * p.n_heads * p.n_query_rows;
    return (n_all + LEARN_WARPS - 1) / LEARN_WARPS;
}

template <typename T>
__global__ void __launch_bounds__(LEARN_THREADS)
    merge_backward_kernel(const __grid_constant__ learn_params p, int32_t n_row_blocks) {
    wait_for_earlier_kernels();
    if ((int32_t)blockIdx.x >= n_row_blocks) {
        merge_dalpha(p, (int32_t)blockIdx.x - n_row_blocks);
        return;
    }
    const merged_row at = find_row(p);
    const int32_t d = (int32_t)(threadIdx.x % LK_WARP) * 4;
    if (!at.exists || d >= p.head_dim) return;
    const int64_t n_all = (int64_t)p.n_rows * p.n_heads * p.n_query_rows;
    float4 sum = {};
#pragma unroll 4
    for (int32_t i = 0; i < p.n_splits; i++)
        add(&sum, *reinterpret_cast<float4 *>(p.sums + (i * n_all + at.row) * p.head_dim + d),
            p.scale);
    store_4<T>(p, at, d, sum);
}

lk_status launch_learn_merge_forward(const learn_params &p, lk_dtype dtype, cudaStream_t stream,
                                     int32_t *cuda_error) {
    const auto kernel =
        dtype == LK_BF16 ? merge_forward_kernel<__nv_bfloat16> : merge_forward_kernel<__half>;
    return launch_early(dim3((unsigned)row_blocks_of(p)), LEARN_THREADS, 0, stream, cuda_error,
                        kernel, p);
}

lk_status launch_learn_merge_backward(const learn_params &p, lk_dtype dtype, cudaStream_t stream,
                                      int32_t *cuda_error) {
    const auto kernel =
        dtype == LK_BF16 ? merge_backward_kernel<__nv_bfloat16> : merge_backward_kernel<__half>;
    const int64_t n_row_blocks = row_blocks_of(p);
    const int64_t n_channel_blocks = (int64_t)p.n_heads * ((p.head_dim + LK_WARP - 1) / LK_WARP);
    return launch_early(dim3((unsigned)(n_row_blocks + n_channel_blocks)), LEARN_THREADS, 0, stream,
                        cuda_error, kernel, p, (int32_t)n_row_blocks);
}
