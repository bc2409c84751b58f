/* decode.cuh: one step of one token per row; see lk_cuda_attend in leank_cuda.h and the picture in README.md.
 *
 * Grid: one block per multiprocessor; each takes chunks of the work (plan.h). Its warps have three roles:
 *   the last one fetches tiles into a ring of shared memory, always as far ahead as the ring is long, also across units
 *   and chunks, and says which part of which unit comes next;
 *   teams of 4 compute: they take turns with the tiles, and warp w of a team has tokens 16 w .. 16 w + 15 of its tile, with
 *   a softmax state of its own (at D 256, teams of 2 have half a tile each). Tokens are the rows of the first product and query heads its columns, so that R <= 8
 *   heads (16 in two column tiles) cost one pass over K and V;
 *   the others help: they bring the next part's q into the order of its operands, store the new token in its page, and
 *   merge the warps' states of the last part. Units that are cut into several parts are merged by combine.cu. */
#ifndef LEANK_DECODE_CUH
#define LEANK_DECODE_CUH

#include "decode_fetch.cuh"
#include "decode_merge.cuh"
#include "decode_plan.cuh"
#include "decode_tile.cuh"

template <typename T, int D, int COLUMN_TILES>
__device__ __forceinline__ void
compute(const decode_params &p, const decode_smem<T, D, COLUMN_TILES> &s, int warp, int lane) {
    using shape = decode_shape<D, COLUMN_TILES>;
    const int32_t group = warp % shape::GROUPS, team = warp / shape::GROUPS;
    constexpr int STAGES = 4 / shape::GROUPS; /* of a tile */
    ring_place at = {0, 0};
    for (int32_t index = 0;; index++) {
        const int slot = index & 1;
        barrier_wait(&s.q_full[slot], (index >> 1) & 1);
        const decode_part part = s.part[slot];
        if (part.row < 0) return;
        const int32_t n_kept = s.n_kept[part.head];
        const lk_unit u = lk_unit_make(part.end, part.full_lo, p.layer.sink, n_kept, D);
        warp_state<T, D, COLUMN_TILES> w;
        w.begin(s.q_operand + slot * shape::Q_WORDS, lane);
        const tile_layout<D> layout(n_kept);
        const T *new_k = s.q + (slot * (p.r + 2) + p.r) * D;
        const bool with_new = p.k && part.ends;
        const bool q_is_read = !with_new && warp_state<T, D, COLUMN_TILES>::Q_IN_REGISTERS;
        if (q_is_read) barrier_arrive(&s.part_empty[slot]);

        const int32_t n_stages = u.is_void ? 0 : (part.tile_end - part.tile_begin) * STAGES;
        for (int32_t i = 0; i < n_stages; i++) {
            /* Each team waits for every tile and releases its stage: who waits for a phase must have seen the phase
             * before, and must see this one before the next begins. */
            barrier_wait(&s.full[at.stage], at.phase);
            if (i % shape::TEAMS == team) {
                const int32_t tile = part.tile_begin + i / STAGES;
                const int32_t first = lk_unit_page(&u, tile) * LK_PAGE_TOKENS +
                                      16 * (i % STAGES * shape::GROUPS + group);
                unsigned char *stage = s.stage + (size_t)at.stage * shape::STAGE_BYTES;
                if (p.k && part.end - 1 >= first && part.end - 1 < first + 16)
                    patch_new<T, D>(s, part, n_kept, new_k, new_k + D, stage, lane);
                const unsigned char *kept_k = stage + group * 32 * n_kept;
                const unsigned char *v = stage + layout.v + group * 32 * D;
                if (!lk_unit_is_whole(&u, tile)) take_middle(p, w, kept_k, v, n_kept, lane);
                else if (first < part.end)
                    take_whole(p, part, w, kept_k,
                               stage + layout.dropped + group * 32 * (D - n_kept), v, first, n_kept,
                               lane);
            }
            barrier_arrive_warp(&s.empty[at.stage], lane);
            at.advance(p.n_stages);
        }
        if (!q_is_read) barrier_arrive(&s.part_empty[slot]);
        barrier_wait(s.states_empty, (index & 1) ^ 1);
#pragma unroll
        for (int n = 0; n < COLUMN_TILES; n++)
            w.put(n, s.states + (warp * p.r + 8 * n) * shape::STATE_FLOATS, p.r - 8 * n, lane);
        barrier_arrive(s.states_full);
    }
}

/* q of part i + 1 is made before part i is finished: the fetching warp is always a part ahead. */
template <typename T, int D, int COLUMN_TILES>
__device__ __forceinline__ void help(const decode_params &p,
                                     const decode_smem<T, D, COLUMN_TILES> &s, int32_t thread) {
    using shape = decode_shape<D, COLUMN_TILES>;
    decode_part last;
    last.row = -1;
    for (int32_t index = 0;; index++) {
        const int slot = index & 1;
        barrier_wait(&s.part_full[slot], (index >> 1) & 1);
        const decode_part part = s.part[slot];
        if (part.row >= 0)
            make_q_operand<D>(reinterpret_cast<const uint16_t *>(s.q + slot * (p.r + 2) * D), D,
                              s.order + part.head * D, p.r, COLUMN_TILES, s.n_kept[part.head],
                              s.q_operand + slot * shape::Q_WORDS, thread, shape::HELPER_THREADS);
        barrier_arrive(&s.q_full[slot]);
        if (part.row >= 0 && p.k && part.ends && part.end > 0) {
            const T *new_k = s.q + (slot * (p.r + 2) + p.r) * D;
            store_new<T, D>(p, s, part, new_k, new_k + D, thread, shape::HELPER_THREADS);
        }
        barrier_arrive(&s.part_empty[slot]);
        if (last.row >= 0) {
            barrier_wait(s.states_full, (index - 1) & 1);
            finish_part<T, D, COLUMN_TILES>(p, s, last, thread);
        }
        if (part.row < 0) return;
        last = part;
    }
}

template <typename T, int D, int COLUMN_TILES>
__global__ void __launch_bounds__(decode_shape<D, COLUMN_TILES>::BOUND_THREADS, 1)
    decode_kernel(const __grid_constant__ decode_params p) {
    using shape = decode_shape<D, COLUMN_TILES>;
    extern __shared__ __align__(128) unsigned char memory[];
    decode_smem<T, D, COLUMN_TILES> s(memory, p);
    const int warp = threadIdx.x / LK_WARP, lane = threadIdx.x % LK_WARP;
    s.init(p);
    const uint32_t *order = reinterpret_cast<const uint32_t *>(head_order(p.layer, 0));
#pragma unroll 1
    for (int32_t i = threadIdx.x; i < p.layer.n_heads * D / 4; i += shape::THREADS)
        reinterpret_cast<uint32_t *>(s.order)[i] = order[i];
    __syncthreads();
    let_next_kernel_come();
    /* The plan is made while earlier kernels run, so that its reads and the first tiles are under way when they end. If they
     * change what a row sees, it is made again. */
    fetcher<T, D, COLUMN_TILES> fetch(p, s, lane);
#pragma unroll 1
    for (int round = 0;; round++) {
        make_plan(p, s);
        __syncthreads();
        if (warp == shape::FETCH_WARP) fetch.prepare();
        if (round == 1) break;
        wait_for_earlier_kernels();
        if (__syncthreads_and(plan_holds(p, s))) break;
        s.clear_plan(p);
        __syncthreads();
    }
    if (warp == shape::FETCH_WARP) {
        fetch.run();
    } else if (warp < shape::COMPUTE_WARPS) {
        compute<T, D, COLUMN_TILES>(p, s, warp, lane);
    } else {
        help<T, D, COLUMN_TILES>(p, s, threadIdx.x - shape::COMPUTE_THREADS);
    }
}

template <typename T, int D, int COLUMN_TILES>
static lk_status launch_decode(decode_params *p, int32_t smem_bytes, cudaStream_t stream,
                               int32_t *cuda_error) {
    using shape = decode_shape<D, COLUMN_TILES>;
    const size_t fixed = decode_smem<T, D, COLUMN_TILES>::fixed_bytes(*p);
    const int64_t n_stages = ((int64_t)smem_bytes - (int64_t)fixed) / shape::STAGE_BYTES;
    if (n_stages < 2) return LK_E_SHAPE;
    const int64_t enough = LK_RING_BYTES / shape::STAGE_BYTES;
    p->n_stages = (int32_t)(n_stages < enough ? n_stages : enough);
    const size_t bytes = fixed + (size_t)p->n_stages * shape::STAGE_BYTES;
    const auto kernel = decode_kernel<T, D, COLUMN_TILES>;
    const cudaError_t error =
        cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, (int)bytes);
    if (error != cudaSuccess) return lk_cuda_launched(error, stream, cuda_error);
    return launch_early(dim3((unsigned)p->n_blocks), shape::THREADS, bytes, stream, cuda_error,
                        kernel, *p);
}

/* inst/decode_<name>_<D>.cu: the kernels of one dtype and head dim, for up to 8 and up to 16 query heads per KV head. */
#define LK_DECODE_INSTANCE(name, T, D)                                                             \
    lk_status launch_decode_##name##_##D(decode_params *p, int32_t smem_bytes,                     \
                                         cudaStream_t stream, int32_t *cuda_error) {               \
        if (p->r <= 8) return launch_decode<T, D, 1>(p, smem_bytes, stream, cuda_error);           \
        return launch_decode<T, D, 2>(p, smem_bytes, stream, cuda_error);                          \
    }

#endif
