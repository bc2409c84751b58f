/* combine.cu: merge the parts of the units that several chunks of a launch had. An item is 128 value indices (or as many as
 * there are) of one query column of a unit: its warps take turns with the parts, a lane has 4 value indices, and the
 * warps' results are merged last. The order is
 * fixed, so that two runs agree bit for bit. Items of units that one chunk had are finished already. The last block lets
 * lengths advance: everybody has read them.
 *
 * There are no more blocks than can be resident beside those of the decode kernel: they are there when it ends, and once
 * they are, blocks of the kernel after them can come too. */
#include "combine.cuh"
#include "decode_merge.cuh"
#include "decode_plan.cuh"

#define COMBINE_WARPS 8
#define LOADS 4 /* parts whose loads are in flight together */

typedef struct {
    float m, l, o[4];
} state_part;

/* Take n other states into x, `step` from each other. */
template <int N>
__device__ __forceinline__ void merge(state_part *x, const state_part *other, int step) {
    float top = x->m;
#pragma unroll
    for (int i = 0; i < N; i++) top = fmaxf(top, other[i * step].m);
    const float shift = top == -INFINITY ? 0.0f : top; /* no -inf - -inf where nothing was seen */
    const float factor = exp2_fast(x->m - shift);
    x->m = top;
    x->l *= factor;
#pragma unroll
    for (int k = 0; k < 4; k++) x->o[k] *= factor;
#pragma unroll
    for (int i = 0; i < N; i++) {
        const state_part &part = other[i * step];
        const float part_factor = exp2_fast(part.m - shift);
        x->l += part.l * part_factor;
#pragma unroll
        for (int k = 0; k < 4; k++) x->o[k] += part.o[k] * part_factor;
    }
}

#define ITEM_VALUES 128
static __host__ __device__ __forceinline__ int32_t count_items(const decode_params &p) {
    const int32_t n_units = p.layer.n_rows * p.layer.n_heads * p.column_blocks;
    return n_units * p.r * (p.layer.head_dim > ITEM_VALUES ? p.layer.head_dim / ITEM_VALUES : 1);
}

/* item_warps: warps of an item, a power of two up to COMBINE_WARPS; above 1 a warp has one item at most. With 4 blocks to a
 * multiprocessor, one has the registers that a block of the decode kernel leaves at D up to 128. */
template <typename T>
__global__ void __launch_bounds__(COMBINE_WARPS *LK_WARP, 4)
    combine_kernel(const __grid_constant__ decode_params p, int32_t item_warps) {
    __shared__ state_part states[COMBINE_WARPS][LK_WARP];
    const int32_t D = p.layer.head_dim, n_items = count_items(p);
    const int warp = threadIdx.x / LK_WARP, lane = threadIdx.x % LK_WARP;
    const int32_t rank = warp % item_warps;
    const float *lane_m = p.states + p.r * D;
    let_next_kernel_come();
    wait_for_earlier_kernels();
    const int32_t n_blocks = (int32_t)gridDim.x - 1; /* that merge */
    if ((int32_t)blockIdx.x == n_blocks) {
        advance_rows(p);
        return;
    }
    /* Neighbours share a unit: the second one finds its chunks in L1. */
    const int32_t n_groups = n_blocks * COMBINE_WARPS / item_warps;
    const int32_t n_each = (n_items + n_groups - 1) / n_groups;
    int32_t item = ((int32_t)blockIdx.x * COMBINE_WARPS + warp) / item_warps * n_each;
    const int32_t end = min(item + n_each, n_items);
    const int32_t n_splits = D > ITEM_VALUES ? D / ITEM_VALUES : 1;
    const auto chunks_of = [&](int32_t i) {
        return i < end ? p.unit_chunks[i / n_splits / p.r] : make_int2(0, 0);
    };
    int2 next = chunks_of(item); /* asked for while an item before it is merged */
#pragma unroll 1
    do {
        const int2 chunks = next;
        next = chunks_of(item + 1);
        const int32_t unit = item / n_splits / p.r;
        const int32_t column = item / n_splits % p.r;
        const int32_t d = 4 * lane + item % n_splits * ITEM_VALUES;
        const float *lane_o = p.states + min(d, D - 4);
        const bool has_parts = chunks.x < chunks.y;
        state_part x = {-INFINITY, 0.0f, {}};
#pragma unroll 1
        for (int32_t c = chunks.x + rank; has_parts && c <= chunks.y; c += item_warps * LOADS) {
            state_part part[LOADS];
#pragma unroll
            for (int i = 0; i < LOADS; i++) {
                const int32_t chunk = min(c + i * item_warps, chunks.y);
                const int32_t at = part_place(p, chunk, chunk == chunks.x);
                const float4 o = __ldcg(reinterpret_cast<const float4 *>(lane_o + at + column * D));
                part[i] = {__ldcg(lane_m + at + column),
                           __ldcg(lane_m + at + p.r + column),
                           {o.x, o.y, o.z, o.w}};
            }
#pragma unroll
            for (int i = 0; i < LOADS; i++)
                if (c + i * item_warps > chunks.y) part[i].m = -INFINITY;
            merge<LOADS>(&x, part, 1);
        }
        if (item_warps > 1) {
            states[warp][lane] = x;
            __syncthreads();
            if (rank == 0 && item_warps == 8) merge<7>(&x, &states[warp + 1][lane], LK_WARP);
            if (rank == 0 && item_warps == 4) merge<3>(&x, &states[warp + 1][lane], LK_WARP);
            if (rank == 0 && item_warps == 2) merge<1>(&x, &states[warp + 1][lane], LK_WARP);
        }
        if (has_parts && rank == 0 && d < D) {
            const int32_t query = find_query(p, unit, column);
            /* A column that saw no key is one of padding. */
            if (query >= 0) write_out<T>(p, query, x.l > 0.0f, d, x.m, x.l, x.o);
        }
    } while (++item < end);
}

static lk_status launch(const decode_params &p, cudaStream_t stream, int32_t *cuda_error) {
    const auto kernel =
        p.layer.dtype == LK_BF16 ? combine_kernel<__nv_bfloat16> : combine_kernel<__half>;
    /* Or a multiprocessor that is set for more L1 has no room for the next kernel's shared memory. */
    const cudaError_t error = cudaFuncSetAttribute(
        kernel, cudaFuncAttributePreferredSharedMemoryCarveout, cudaSharedmemCarveoutMaxShared);
    if (error != cudaSuccess) return lk_cuda_launched(error, stream, cuda_error);
    /* Few items have many parts each, and many have few. */
    const int32_t n_items = count_items(p);
    const int32_t most_blocks = p.n_blocks > 1 ? p.n_blocks - 1 : 1;
    const int32_t n_warps = most_blocks * COMBINE_WARPS;
    int32_t item_warps = COMBINE_WARPS;
    while (item_warps > 1 && n_items > n_warps / item_warps) item_warps /= 2;
    const int32_t wanted = (n_items * item_warps + COMBINE_WARPS - 1) / COMBINE_WARPS;
    const int32_t n_blocks = 1 + (wanted < most_blocks ? wanted : most_blocks);
    return launch_early(dim3((unsigned)n_blocks), COMBINE_WARPS * LK_WARP, 0, stream, cuda_error,
                        kernel, p, item_warps);
}

lk_status launch_combine(const decode_params &p, cudaStream_t stream, int32_t *cuda_error) {
    const lk_status status = launch(p, stream, cuda_error);
    /* The kernel would have done it, and the next launch depends on it. */
    if (status != LK_OK) (void)cudaMemsetAsync(p.n_taken, 0, sizeof *p.n_taken, stream);
    return status;
}
