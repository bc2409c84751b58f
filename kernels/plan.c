/* plan.c: the host's side of layout.h and plan.h: where heads are in a page, and a launch's parts for tests. */
#include "layout.h"
#include "leank_cuda.h"

size_t lk_cuda_geom_bytes(int32_t n_heads, int32_t head_dim) {
    return (size_t)n_heads * (4 * sizeof(int32_t) + (size_t)head_dim);
}

lk_status lk_cuda_geom(const uint8_t *keep, int32_t n_heads, int32_t head_dim, int32_t *geom,
                       size_t *page_bytes, size_t *twin_bytes) {
    int64_t bad_head;
    const lk_status status = lk_mask_check(keep, n_heads, head_dim, LK_CHANNEL_STEP, &bad_head);
    if (status != LK_OK) return status;
    if (head_dim > 256) return LK_E_SHAPE; /* order is in bytes */
    const size_t channel_bytes = 2 * LK_PAGE_TOKENS, v_bytes = channel_bytes * (size_t)head_dim;
    int32_t *n_kept = geom, *kept_off = geom + n_heads, *dropped_off = geom + 2 * n_heads;
    int32_t *v_off = geom + 3 * n_heads, order[LK_MAX_HEAD_DIM];
    uint8_t *places = (uint8_t *)(geom + 4 * n_heads);
    *page_bytes = *twin_bytes = 0;
    for (int32_t g = 0; g < n_heads; g++) {
        n_kept[g] = lk_mask_order(keep + (size_t)g * (size_t)head_dim, head_dim, order);
        for (int32_t c = 0; c < head_dim; c++)
            places[(size_t)g * (size_t)head_dim + (size_t)c] = (uint8_t)order[c];
        const size_t kept_bytes = channel_bytes * (size_t)n_kept[g];
        const size_t all_bytes = *page_bytes + *twin_bytes + 2 * v_bytes;
        if (all_bytes > INT32_MAX) return LK_E_SHAPE; /* offsets are int32 */
        kept_off[g] = (int32_t)*page_bytes;
        dropped_off[g] = (int32_t)*twin_bytes;
        *page_bytes += kept_bytes;
        *twin_bytes += v_bytes - kept_bytes;
        size_t *with_v = n_kept[g] > 0 ? page_bytes : twin_bytes;
        v_off[g] = (int32_t)*with_v;
        *with_v += v_bytes;
    }
    return LK_OK;
}

int64_t lk_cuda_plan_parts(const int32_t *end, const int32_t *full_lo, int32_t n_rows,
                           const int32_t *n_kept, int32_t n_heads, int32_t head_dim, int32_t sink,
                           int32_t n_blocks, int32_t (*parts)[5], int64_t room) {
    uint32_t total = 0;
    for (int32_t b = 0; b < n_rows; b++) {
        for (int32_t g = 0; g < n_heads; g++) {
            const lk_unit u = lk_unit_make(end[b], full_lo[b], sink, n_kept[g], head_dim);
            total += lk_unit_cost(&u);
        }
    }
    const lk_cut cut =
        lk_cut_make(total, n_rows * n_heads, n_blocks, lk_whole_cost(head_dim), LK_PLAN_HALVINGS);
    int64_t n = 0;
    for (int32_t chunk = 0; chunk < n_blocks * cut.n_chunks; chunk++) {
        const uint32_t first = lk_cut_begin(&cut, chunk), last = lk_cut_begin(&cut, chunk + 1);
        uint32_t base = 0;
        for (int32_t b = 0; b < n_rows; b++) {
            for (int32_t g = 0; g < n_heads; g++) {
                const lk_unit u = lk_unit_make(end[b], full_lo[b], sink, n_kept[g], head_dim);
                const int32_t tile_begin = lk_unit_first_tile(&u, base, first);
                const int32_t tile_end = lk_unit_first_tile(&u, base, last);
                base += lk_unit_cost(&u);
                if (tile_begin >= tile_end) continue;
                if (n < room) {
                    const int32_t part[5] = {chunk, b, g, tile_begin, tile_end};
                    for (int i = 0; i < 5; i++) parts[n][i] = part[i];
                }
                n++;
            }
        }
    }
    return n;
}
