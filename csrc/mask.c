/* mask.c: which channels a head keeps: checks, order lists, and the choice that meets a budget exactly. */
#include "lk_internal.h"

#include <math.h>
#include <stdlib.h>

lk_status lk_mask_check(const uint8_t *keep, int64_t n_heads, int64_t head_dim, int64_t align,
                        int64_t *bad_head) {
    *bad_head = -1;
    LK_CHECK(n_heads > 0, LK_E_SHAPE);
    LK_CHECK(head_dim > 0 && head_dim <= LK_MAX_HEAD_DIM && head_dim % LK_CHANNEL_STEP == 0,
             LK_E_SHAPE);
    LK_CHECK(align > 0 && align % LK_CHANNEL_STEP == 0, LK_E_VALUE);
    for (int64_t g = 0; g < n_heads; g++) {
        int64_t n_kept = 0;
        for (int64_t c = 0; c < head_dim; c++) n_kept += keep[g * head_dim + c] != 0;
        if (n_kept % align != 0) {
            *bad_head = g;
            return LK_E_VALUE;
        }
    }
    return LK_OK;
}

int32_t lk_mask_order(const uint8_t *keep, int32_t head_dim, int32_t *order) {
    int32_t n_kept = 0;
    for (int32_t c = 0; c < head_dim; c++)
        if (keep[c]) order[n_kept++] = c;
    int32_t n = n_kept;
    for (int32_t c = 0; c < head_dim; c++)
        if (!keep[c]) order[n++] = c;
    return n_kept;
}

typedef struct {
    double score;
    int64_t index;
} ranked;

/* Largest score first; equal scores in order of index, so that the choice is defined. */
static int compare_ranked(const void *a, const void *b) {
    const ranked *x = a, *y = b;
    if (x->score != y->score) return x->score > y->score ? -1 : 1;
    return x->index < y->index ? -1 : x->index > y->index;
}

lk_status lk_mask_select(const float *scores, int64_t n_heads, int64_t head_dim, double ratio,
                         int64_t align, uint8_t *keep) {
    LK_CHECK(n_heads > 0 && head_dim > 0 && head_dim <= LK_MAX_HEAD_DIM, LK_E_SHAPE);
    LK_CHECK(align > 0 && head_dim % align == 0, LK_E_VALUE);
    LK_CHECK(ratio >= 0.0 && ratio <= 1.0, LK_E_VALUE); /* false for NaN too */
    size_t n = 0;
    LK_CHECK(lk_mul((size_t)n_heads, (size_t)head_dim, &n), LK_E_SHAPE);

    const int64_t blocks_per_head = head_dim / align;
    const int64_t n_blocks = n_heads * blocks_per_head;
    const int64_t budget = llround((double)n * (1.0 - ratio) / (double)align);

    ranked *channel = lk_alloc(n, sizeof *channel);
    ranked *block = lk_alloc((size_t)n_blocks, sizeof *block);
    if (!channel || !block) {
        lk_dealloc(channel);
        lk_dealloc(block);
        return LK_E_NOMEM;
    }
    /* Each score is read once, so that what was checked is what is sorted. */
    bool finite = true;
    for (size_t i = 0; i < n; i++) {
        channel[i] = (ranked){.score = scores[i], .index = (int64_t)i % head_dim};
        finite = finite && isfinite(channel[i].score);
    }
    if (!finite) {
        lk_dealloc(channel);
        lk_dealloc(block);
        return LK_E_VALUE;
    }
    for (int64_t g = 0; g < n_heads; g++) {
        ranked *mine = channel + g * head_dim;
        qsort(mine, (size_t)head_dim, sizeof *mine, compare_ranked);
        for (int64_t i = 0; i < blocks_per_head; i++) {
            double sum = 0.0;
            for (int64_t c = 0; c < align; c++) sum += mine[i * align + c].score;
            block[g * blocks_per_head + i] =
                (ranked){.score = sum, .index = g * blocks_per_head + i};
        }
    }
    /* A head's block sums fall with the block's number, so what is kept of a head is always its top channels. */
    qsort(block, (size_t)n_blocks, sizeof *block, compare_ranked);
    for (size_t i = 0; i < n; i++) keep[i] = 0;
    for (int64_t i = 0; i < budget; i++) {
        const int64_t g = block[i].index / blocks_per_head, part = block[i].index % blocks_per_head;
        for (int64_t c = part * align; c < (part + 1) * align; c++)
            keep[g * head_dim + channel[g * head_dim + c].index] = 1;
    }
    lk_dealloc(channel);
    lk_dealloc(block);
    return LK_OK;
}
