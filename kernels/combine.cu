/* combine.cu: merge the parts of the units that several chunks of a decode launch had. Grid: one block per query head of
 * each unit; its warps take turns with the parts, a lane has 4 value indices, and the warps' results are merged last. The
 * order is fixed, so that two runs agree bit for bit. Units that one chunk had are finished: their blocks do nothing. */
#include "combine.cuh"
#include "decode_merge.cuh"

#define COMBINE_WARPS 8
#define LOADS 4 /* parts whose loads are in flight together */

/* Take another state into (m, l, o). */
__device__ static void merge(float *m, float *l, float o[4], float other_m, float other_l,
                             const float4 &other_o) {
    const float top = fmaxf(*m, other_m);
    const float shift = top == -INFINITY ? 0.0f : top; /* no -inf - -inf where nothing was seen */
    const float factor = exp2_fast(*m - shift), other_factor = exp2_fast(other_m - shift);
    *m = top;
    *l = *l * factor + other_l * other_factor;
    o[0] = o[0] * factor + other_o.x * other_factor;
    o[1] = o[1] * factor + other_o.y * other_factor;
    o[2] = o[2] * factor + other_o.z * other_factor;
    o[3] = o[3] * factor + other_o.w * other_factor;
}

template <typename T>
__global__ void __launch_bounds__(COMBINE_WARPS *LK_WARP)
    combine_kernel(const __grid_constant__ decode_params p, int32_t n_blocks) {
    __shared__ float4 warp_o[COMBINE_WARPS][LK_WARP];
    __shared__ float warp_m[COMBINE_WARPS], warp_l[COMBINE_WARPS];
    const int32_t D = p.layer.head_dim, unit = blockIdx.x, column = blockIdx.y;
    const int warp = threadIdx.x / LK_WARP, lane = threadIdx.x % LK_WARP, d = 4 * lane;
    wait_for_earlier_kernels();
    let_next_kernel_come();
    const uint2 place = p.unit_place[unit];
    const lk_cut cut = lk_cut_make(*p.total, n_blocks, D);
    const int32_t first = lk_cut_chunk_of(&cut, place.x), last = lk_cut_chunk_of(&cut, place.y);
    if (first == last) return;

    float m = -INFINITY, l = 0.0f, o[4] = {0.0f, 0.0f, 0.0f, 0.0f};
#pragma unroll 1
    for (int32_t c = first + warp; c <= last; c += COMBINE_WARPS * LOADS) {
        float part_m[LOADS], part_l[LOADS];
        float4 part_o[LOADS];
#pragma unroll
        for (int i = 0; i < LOADS; i++) {
            const int32_t chunk = min(c + i * COMBINE_WARPS, last);
            const float *state = part_state(p, chunk, chunk == first);
            part_m[i] = __ldcg(state + p.r * D + column);
            part_l[i] = __ldcg(state + p.r * (D + 1) + column);
            part_o[i] = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
            if (d < D) part_o[i] = __ldcg(reinterpret_cast<const float4 *>(state + column * D + d));
        }
#pragma unroll
        for (int i = 0; i < LOADS; i++)
            if (c + i * COMBINE_WARPS <= last) merge(&m, &l, o, part_m[i], part_l[i], part_o[i]);
    }
    warp_o[warp][lane] = make_float4(o[0], o[1], o[2], o[3]);
    if (lane == 0) {
        warp_m[warp] = m;
        warp_l[warp] = l;
    }
    __syncthreads();
    if (warp != 0 || d >= D) return;
#pragma unroll
    for (int k = 1; k < COMBINE_WARPS; k++) merge(&m, &l, o, warp_m[k], warp_l[k], warp_o[k][lane]);
    write_out<T>(p, unit / p.layer.n_heads, unit % p.layer.n_heads, true, column, d, m, l, o);
}

lk_status launch_combine(const decode_params &p, int32_t n_blocks, cudaStream_t stream,
                         int32_t *cuda_error) {
    const auto kernel =
        p.layer.dtype == LK_BF16 ? combine_kernel<__nv_bfloat16> : combine_kernel<__half>;
    cudaLaunchAttribute early = {};
    const cudaLaunchConfig_t config =
        early_launch(kernel, dim3((unsigned)(p.layer.n_rows * p.layer.n_heads), (unsigned)p.r),
                     COMBINE_WARPS * LK_WARP, 0, stream, &early);
    (void)cudaLaunchKernelEx(&config, kernel, p, n_blocks); /* its error is the last error */
    return lk_cuda_launched(stream, cuda_error);
}
