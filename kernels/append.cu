/* append.cu: T columns into pages and twins, for a prompt or a span; crop; and what a step's mask says. See leank_cuda.h. */
#include "append.cuh"
#include "state.cuh"

#define PLACE_THREADS 256
#define STEP_COLUMNS 8 /* of one thread of step_columns_kernel */
#define STORE_TOKENS                                                                               \
    16 /* tokens of one block of store_kernel: a group of a page, if they are in one */

/* ------------------------------------------------------------------------------------------ device kernels */

/* Exclusive sum of one flag per thread over the block; *total is the number of flags. */
__device__ static int32_t block_rank(bool flag, int32_t *warp_sums, int32_t *total) {
    const int warp = threadIdx.x / LK_WARP, lane = threadIdx.x % LK_WARP;
    const uint32_t flags = __ballot_sync(LK_ALL, flag);
    __syncthreads(); /* warp_sums of the last round were read */
    if (lane == 0) warp_sums[warp] = __popc(flags);
    __syncthreads();
    int32_t before = 0;
    *total = 0;
    for (int i = 0; i < PLACE_THREADS / LK_WARP; i++) {
        if (i < warp) before += warp_sums[i];
        *total += warp_sums[i];
    }
    return before + __popc(flags & ((1u << lane) - 1));
}

/* One block per row: position of each column's token, then the row's new state. All columns fit. Of padding it is -1 minus
 * the position of the next token (tokens_before). valid and position [B, stride]. */
__global__ void __launch_bounds__(PLACE_THREADS)
    place_kernel(const __grid_constant__ lk_cuda_layer layer, const uint8_t *valid,
                 int32_t *position, int32_t stride, int32_t n_columns, int32_t columns_before) {
    __shared__ int32_t warp_sums[PLACE_THREADS / LK_WARP];
    const int64_t b = blockIdx.x;
    const int32_t len = state_len(layer)[b];
    int32_t n_new = 0;
    for (int32_t first = 0; first < n_columns; first += PLACE_THREADS) {
        const int32_t t = first + (int32_t)threadIdx.x;
        const bool real = t < n_columns && (!valid || valid[b * stride + t]);
        int32_t total;
        const int32_t at = len + n_new + block_rank(real, warp_sums, &total);
        n_new += total;
        if (t >= n_columns) continue;
        position[b * stride + t] = real ? at : -1 - at;
        layer.real[b * layer.real_stride + columns_before + t] = real;
    }
    __syncthreads();
    if (threadIdx.x != 0) return;
    settle_row(layer, (int32_t)b, len + n_new, state_lo(layer)[b], state_n0(layer)[b]);
    if (b == 0) layer.state[LK_STATE_COLUMNS] = columns_before + n_columns;
}

/* One block per (16 columns, head, row). A warp has one column at a time, a lane every 32nd channel. */
template <typename T>
__global__ void __launch_bounds__(128)
    store_kernel(const __grid_constant__ lk_cuda_layer layer, const T *k, const T *v, int64_t k_b,
                 int64_t k_g, int64_t k_t, int64_t v_b, int64_t v_g, int64_t v_t,
                 const int32_t *position, int32_t stride, int32_t n_columns) {
    const int32_t D = layer.head_dim, g = blockIdx.y;
    const int64_t b = blockIdx.z;
    const int32_t n_kept = head_kept(layer, g), n_dropped = D - n_kept;
    const uint8_t *order = head_order(layer, g);
    const int32_t lo = state_lo(layer)[b];
    const int warp = threadIdx.x / LK_WARP, lane = threadIdx.x % LK_WARP;
    for (int32_t i = warp; i < STORE_TOKENS; i += 4) {
        const int32_t t = (int32_t)blockIdx.x * STORE_TOKENS + i;
        if (t >= n_columns) break;
        const int32_t at = position[b * stride + t];
        if (at < 0) continue;
        const int32_t slot = at % LK_PAGE_TOKENS;
        const head_blocks blocks =
            find_blocks(layer, b, g, at, twin_stays(layer, at / LK_PAGE_TOKENS, lo));
        const T *k_token = k + b * k_b + g * k_g + t * k_t;
        const T *v_token = v + b * v_b + g * v_g + t * v_t;
        for (int32_t c = lane; c < D; c += LK_WARP) {
            if (c < n_kept) {
                *reinterpret_cast<T *>(blocks.kept + lk_k_at(c, slot, n_kept)) = k_token[order[c]];
            } else if (blocks.dropped) {
                const int32_t place = lk_k_at(c - n_kept, slot, n_dropped);
                *reinterpret_cast<T *>(blocks.dropped + place) = k_token[order[c]];
            }
            if (blocks.v) *reinterpret_cast<T *>(blocks.v + lk_v_at(slot, c, D)) = v_token[c];
        }
    }
}

/* One warp per row. */
__global__ void crop_kernel(const __grid_constant__ lk_cuda_layer layer, int32_t n_columns) {
    const int64_t b = blockIdx.x;
    const int lane = threadIdx.x;
    int32_t len = 0;
    for (int32_t first = 0; first < n_columns; first += LK_WARP) {
        const int32_t column = first + lane;
        const bool real = column < n_columns && layer.real[b * layer.real_stride + column];
        len += __popc(__ballot_sync(LK_ALL, real));
    }
    if (lane != 0) return;
    state_len(layer)[b] = len;
    state_lo(layer)[b] = max(layer.sink, min(state_lo(layer)[b], len));
    if (len == 0) state_n0(layer)[b] = LK_STATE_OPEN;
    if (b != 0) return;
    layer.state[LK_STATE_COLUMNS] = n_columns;
    layer.state[LK_STATE_OVERFLOW] = 0;
}

/* Blocks of column y of the grid share the columns of row y. */
__global__ void __launch_bounds__(PLACE_THREADS)
    step_columns_kernel(const __grid_constant__ lk_cuda_layer layer, const uint8_t *mask,
                        int64_t mask_b, uint8_t *valid, int32_t *misfit) {
    const int64_t b = blockIdx.y;
    const int32_t now = layer.state[LK_STATE_COLUMNS];
    const uint8_t *real = layer.real + b * layer.real_stride, *seen = mask + b * mask_b;
    bool is_wrong = false;
    for (int32_t i = 0; i < STEP_COLUMNS; i++) {
        const int32_t c =
            ((int32_t)blockIdx.x * STEP_COLUMNS + i) * PLACE_THREADS + (int32_t)threadIdx.x;
        if (c >= layer.max_tokens) break;
        const bool is_seen = mask ? seen[c] != 0 : c <= now;
        is_wrong |= c != now && is_seen != (c < now && real[c] != 0);
    }
    if (is_wrong) atomicMin(misfit, now);
    if (blockIdx.x == 0 && threadIdx.x == 0)
        valid[b] = !mask || seen[min(now, layer.max_tokens - 1)] != 0;
}

/* ----------------------------------------------------------------------------------------------- launchers */

template <typename T>
static lk_status store(const lk_cuda_append_args *a, int32_t stride, cudaStream_t stream) {
    const lk_cuda_layer *layer = a->layer;
    const dim3 grid((unsigned)((a->n_columns + STORE_TOKENS - 1) / STORE_TOKENS),
                    (unsigned)layer->n_heads, (unsigned)layer->n_rows);
    store_kernel<T><<<grid, 128, 0, stream>>>(
        *layer, static_cast<const T *>(a->k), static_cast<const T *>(a->v), a->k_stride[0],
        a->k_stride[1], a->k_stride[2], a->v_stride[0], a->v_stride[1], a->v_stride[2], a->position,
        stride, a->n_columns);
    return lk_cuda_launched(cudaGetLastError(), stream, a->cuda_error);
}

lk_status append_columns(const lk_cuda_append_args *args, int32_t stride) {
    const lk_cuda_layer *layer = args->layer;
    cudaStream_t stream = static_cast<cudaStream_t>(args->stream);
    place_kernel<<<(unsigned)layer->n_rows, PLACE_THREADS, 0, stream>>>(
        *layer, args->valid, args->position, stride, args->n_columns, args->columns_before);
    const lk_status status = lk_cuda_launched(cudaGetLastError(), stream, args->cuda_error);
    if (status != LK_OK) return status;
    if (layer->dtype == LK_BF16) return store<__nv_bfloat16>(args, stride, stream);
    if (layer->dtype == LK_F16) return store<__half>(args, stride, stream);
    return LK_E_VALUE;
}

lk_status lk_cuda_append(const lk_cuda_append_args *args) {
    const lk_cuda_layer *layer = args->layer;
    *args->cuda_error = 0;
    if (layer->n_rows < 1 || layer->n_rows > 65535 || layer->n_heads < 1) return LK_E_SHAPE;
    if (args->n_columns < 0 || args->columns_before < 0) return LK_E_SHAPE;
    if (args->n_columns > layer->max_tokens - args->columns_before) return LK_E_LIMIT;
    if (args->n_columns == 0) return LK_OK;
    if (!args->k || !args->v || !args->position) return LK_E_VALUE;
    return append_columns(args, args->n_columns);
}

lk_status lk_cuda_crop(const lk_cuda_layer *layer, int32_t n_columns, void *stream,
                       int32_t *cuda_error) {
    *cuda_error = 0;
    if (n_columns < 0 || n_columns > layer->real_stride) return LK_E_VALUE;
    crop_kernel<<<(unsigned)layer->n_rows, LK_WARP, 0, static_cast<cudaStream_t>(stream)>>>(
        *layer, n_columns);
    return lk_cuda_launched(cudaGetLastError(), static_cast<cudaStream_t>(stream), cuda_error);
}

lk_status lk_cuda_step_columns(const lk_cuda_layer *layer, const uint8_t *mask, int64_t mask_b,
                               uint8_t *valid, int32_t *misfit, void *stream, int32_t *cuda_error) {
    *cuda_error = 0;
    if (layer->n_rows < 1 || layer->n_rows > 65535 || layer->max_tokens < 1) return LK_E_SHAPE;
    if (!valid || !misfit || mask_b < 0) return LK_E_VALUE;
    const int32_t n_each = STEP_COLUMNS * PLACE_THREADS;
    const dim3 grid((unsigned)((layer->max_tokens - 1) / n_each + 1), (unsigned)layer->n_rows);
    step_columns_kernel<<<grid, PLACE_THREADS, 0, static_cast<cudaStream_t>(stream)>>>(
        *layer, mask, mask_b, valid, misfit);
    return lk_cuda_launched(cudaGetLastError(), static_cast<cudaStream_t>(stream), cuda_error);
}
