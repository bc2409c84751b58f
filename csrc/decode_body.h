/* decode_body.h: attention of one lk_job, written once over a few vector operations.
 *
 * Included by each decode_<isa>.c after it has included lk_vec_<isa>.h (lk_vec.h says what that defines) and defined
 * LK_ISA and LK_BF16_DOT (1: bf16 pairs go to a dot instruction, and no other dtype is compiled; 0: they are widened).
 *
 * Both halves of attention are the same product y[c] += sum over rows r of w[c][r] * x[r]: for logits x is a K
 * block (rows are channels, elements are tokens, w is q), for the output x is a V block (rows are tokens,
 * elements are value indices, w are probabilities). So vectors always lie along memory and w is broadcast; the
 * only horizontal steps are one maximum and one sum per tile and column.
 *
 * A tile (one page, one head) is read from memory once per job: all columns pass over it in groups of
 * LK_GROUP_COLUMNS. Consecutive tiles mostly touch, so what is read next is what follows in memory. */
#include "lk_internal.h"
#include "decode_softmax.h"

/* From what is read to what is prefetched: some hundred nanoseconds, and little of L1. */
#define LK_AHEAD_BYTES 6144

/* The address may lie behind the slab; a prefetch of it then does nothing. */
LK_INLINE void prefetch_after(const unsigned char *p) {
    __builtin_prefetch((const void *)((uintptr_t)p + LK_AHEAD_BYTES));
}

#if LK_LANES <= LK_CHANNEL_STEP /* sizes are whole vectors then */
#define v_load_half_f32 v_load_f32
#define v_load_half_f16 v_load_f16
#endif

/* Rows of a product over which all its elements go before the next rows. Narrow vectors take many passes over
 * the elements, and blocks of rows keep the order of reads nearly that of memory (AVX2, f32: 10.2 -> 11.9 GB/s
 * on one core). With AVX-512 a pass takes whole rows. */
#define LK_ROW_BLOCK (LK_LANES == 16 ? LK_PAGE_TOKENS : 16)

typedef struct {
    const unsigned char *x; /* [n_rows] rows, x_stride bytes apart; bf16: of 32-bit pairs */
    size_t x_stride;
    const float *w;      /* [n_cols] rows, w_stride apart; dot: 32-bit pairs in place of floats */
    const float *y_init; /* like y; NULL = zeros */
    const float *alpha;  /* [n_cols] factor for y_init; NULL = 1 */
    float *y;            /* [n_cols] rows, y_stride apart */
    int64_t w_stride, y_stride;
    int32_t n_rows, n_cols;
    int32_t begin, end; /* elements */
} lk_product;

LK_INLINE size_t lane_bytes(const lk_dtype dtype) { return dtype == LK_F16 ? 2 : 4; }

/* One row of x, n_vecs vectors. bf16 pairs fill even and odd; other dtypes even alone. */
LK_INLINE void load_row(const lk_dtype dtype, const int n_vecs, const bool half,
                        const unsigned char *x, lk_vec *even, lk_vec *odd) {
    LK_UNROLL
    for (int i = 0; i < n_vecs; i++) {
        const unsigned char *p = x + (size_t)i * LK_LANES * lane_bytes(dtype);
        if (dtype == LK_F32) {
            even[i] = half ? v_load_half_f32(p) : v_load_f32(p);
        } else if (dtype == LK_F16) {
            even[i] = half ? v_load_half_f16(p) : v_load_f16(p);
        } else {
            const lk_vec pairs = half ? v_load_half_f32(p) : v_load_f32(p);
            even[i] = LK_BF16_DOT ? pairs : v_pair_even(pairs);
            odd[i] = v_pair_odd(pairs);
        }
    }
}

/* Elements [e, e + n_vecs * LK_LANES), rows [row, row_end) of a product; half: only the lower half of the one
 * vector exists. */
LK_INLINE void product_block(const lk_dtype dtype, const int n_cols, const int n_vecs,
                             const bool half, const lk_product *a, int32_t e, int32_t row,
                             int32_t row_end) {
    const float *y_init = row == 0 ? a->y_init : a->y;
    const float *alpha = row == 0 ? a->alpha : NULL;
    lk_vec y[LK_GROUP_COLUMNS][LK_VECS];
    LK_UNROLL
    for (int c = 0; c < n_cols; c++) {
        LK_UNROLL
        for (int i = 0; i < n_vecs; i++) {
            y[c][i] = v_set1(0.0f);
            if (y_init) y[c][i] = v_load(y_init + c * a->y_stride + e + i * LK_LANES);
            if (alpha) y[c][i] = v_mul(y[c][i], v_set1(alpha[c]));
        }
    }

    const size_t x_stride = a->x_stride;
    const size_t x_offset = (size_t)e * lane_bytes(dtype) + (size_t)row * x_stride;
    const size_t x_bytes = (size_t)n_vecs * LK_LANES * lane_bytes(dtype);
    const int w_step = dtype == LK_BF16 && !LK_BF16_DOT ? 2 : 1;
    const unsigned char *x = a->x + x_offset;
    const float *w = a->w + (int64_t)row * w_step;
    const int64_t w_stride = a->w_stride;
    for (int32_t r = row; r < row_end; r++, x += x_stride, w += w_step) {
        lk_vec even[LK_VECS], odd[LK_VECS];
        load_row(dtype, n_vecs, half, x, even, odd);
        LK_UNROLL
        for (size_t line = 0; line < x_bytes; line += 64) prefetch_after(x + line);
        LK_UNROLL
        for (int c = 0; c < n_cols; c++) {
            const float *wc = w + c * w_stride;
            LK_UNROLL
            for (int i = 0; i < n_vecs; i++) {
#if LK_BF16_DOT
                y[c][i] = v_dot(y[c][i], even[i], v_set1(wc[0]));
#else
                y[c][i] = v_fma(even[i], v_set1(wc[0]), y[c][i]);
                if (dtype == LK_BF16) y[c][i] = v_fma(odd[i], v_set1(wc[1]), y[c][i]);
#endif
            }
        }
    }

    LK_UNROLL
    for (int c = 0; c < n_cols; c++) {
        LK_UNROLL
        for (int i = 0; i < n_vecs; i++)
            v_store(a->y + c * a->y_stride + e + i * LK_LANES, y[c][i]);
    }
}

LK_INLINE void product_cols(const lk_dtype dtype, const int n_cols, const lk_product *a) {
    for (int32_t row = 0; row < a->n_rows; row += LK_ROW_BLOCK) {
        const int32_t row_end = (int32_t)lk_min(row + LK_ROW_BLOCK, a->n_rows);
        int32_t e = a->begin;
        for (; e + LK_VECS * LK_LANES <= a->end; e += LK_VECS * LK_LANES)
            product_block(dtype, n_cols, LK_VECS, false, a, e, row, row_end);
        for (; e + LK_LANES <= a->end; e += LK_LANES)
            product_block(dtype, n_cols, 1, false, a, e, row, row_end);
#if LK_LANES > LK_CHANNEL_STEP
        /* Sizes are multiples of 8, so what is left is exactly half of a 16-lane vector. */
        if (e < a->end) product_block(dtype, n_cols, 1, true, a, e, row, row_end);
#endif
    }
}

LK_INLINE void product_any(const lk_dtype dtype, const lk_product *a) {
    switch (a->n_cols) {
    case 4: product_cols(dtype, 4, a); return;
    case 3: product_cols(dtype, 3, a); return;
    case 2: product_cols(dtype, 2, a); return;
    default: product_cols(dtype, 1, a);
    }
}

/* One copy of the unrolled code per dtype, not one per call. */
LK_NOINLINE void product_bf16(const lk_product *a) { product_any(LK_BF16, a); }
#if !LK_BF16_DOT
LK_NOINLINE void product_f32(const lk_product *a) { product_any(LK_F32, a); }
LK_NOINLINE void product_f16(const lk_product *a) { product_any(LK_F16, a); }
#endif

LK_INLINE void product(const lk_dtype dtype, const lk_product *a) {
#if LK_BF16_DOT
    (void)dtype;
    product_bf16(a);
#else
    if (dtype == LK_F32) product_f32(a);
    else if (dtype == LK_BF16) product_bf16(a);
    else product_f16(a);
#endif
}

/* --------------------------------------------------------------------------------------------- one tile */

/* The blocks of one head in one page and its twin. NULL: not there, or not needed by any column. */
typedef struct {
    const unsigned char *kept, *dropped, *v;
} lk_tile;

/* first_full: smallest full_lo of the columns. A tile that no column can see has v = NULL. */
LK_INLINE lk_tile tile_at(const lk_job *job, int64_t page, int64_t first_full, int64_t end) {
    const lk_geom *geom = job->geom;
    const int64_t first = page * LK_PAGE_TOKENS;
    const int32_t n_kept = geom->n_kept[job->head];
    const bool window = first < geom->sink || first + LK_PAGE_TOKENS > first_full;
    lk_tile t = {NULL, NULL, NULL};
    if (first >= end) return t;
    if (n_kept > 0) {
        t.kept = lk_region(job->page[page], geom->page_off, job->head);
        t.v = t.kept + geom->v_off[job->head];
    }
    if (window && n_kept < geom->head_dim && job->twin[page]) {
        t.dropped = lk_region(job->twin[page], geom->twin_off, job->head);
        if (n_kept == 0) t.v = t.dropped + geom->v_off[job->head];
    }
    return t;
}

/* Probabilities of the group that starts at column c0; false where it sees nothing of this tile. */
LK_INLINE bool group_logits(const lk_job *job, const lk_dtype dtype, const lk_tile *tile,
                            int64_t first, int32_t c0, int32_t n_cols, lk_view *view) {
    const lk_geom *geom = job->geom;
    const int32_t n_kept = geom->n_kept[job->head], n_dropped = geom->head_dim - n_kept;
    bool window = false, middle = false;
    for (int32_t c = 0; c < n_cols; c++) {
        const bool as_before = c > 0 && job->end[c0 + c] == job->end[c0 + c - 1] &&
                               job->full_lo[c0 + c] == job->full_lo[c0 + c - 1];
        view[c] = as_before ? view[c - 1] : view_of(job, c0 + c, first);
        window |= view[c].window;
        middle |= view[c].middle;
    }
    if (!window && (!middle || n_kept == 0)) return false;

    lk_product a = {.x_stride = LK_PAGE_TOKENS * lane_bytes(dtype),
                    .w = job->scratch.q + (int64_t)c0 * geom->head_dim,
                    .w_stride = geom->head_dim,
                    .y = job->scratch.kept,
                    .y_stride = LK_PAGE_TOKENS,
                    .n_rows = n_kept / geom->group,
                    .n_cols = n_cols,
                    .end = LK_PAGE_TOKENS};
    float *logits = job->scratch.kept;
    if (n_kept > 0) {
        a.x = tile->kept;
        product(dtype, &a);
    }
    if (window && n_dropped > 0) {
        logits = job->scratch.full;
        a.x = tile->dropped;
        a.w += LK_BF16_DOT ? n_kept / 2 : n_kept;
        a.y_init = n_kept > 0 ? job->scratch.kept : NULL;
        a.y = job->scratch.full;
        a.n_rows = n_dropped / geom->group;
        product(dtype, &a);
    }
    const bool capped = job->softcap_log2 > 0.0f;
    float scale[LK_GROUP_COLUMNS];
    for (int32_t c = 0; c < n_cols; c++) {
        float *mine = logits + c * LK_PAGE_TOKENS;
        /* Most tiles are of one kind as a whole, for all columns; then scaling is left to the softmax. */
        const bool of_this_kind =
            view[c].window ? !view[c].middle : n_kept > 0 && logits == job->scratch.kept;
        const bool as_it_is = of_this_kind && view[c].visible == LK_PAGE_TOKENS && !capped;
        if (!as_it_is) mask_logits(job, &view[c], job->scratch.kept + c * LK_PAGE_TOKENS, mine);
        scale[c] = as_it_is ? job->scale_log2 : 1.0f;
    }
    group_softmax(job, c0, n_cols, logits, scale);
    return true;
}

/* o of the group += P V over the token slots [a->begin, a->end) reinterpreted as rows. */
LK_INLINE void rows_product(const lk_dtype dtype, lk_product *a, const unsigned char *v,
                            const float *p, int32_t row, int32_t n_rows) {
    if (n_rows <= 0) return;
    a->x = v + (size_t)row * a->x_stride;
    a->w = p + (dtype == LK_BF16 && !LK_BF16_DOT ? 2 * row : row);
    a->n_rows = n_rows;
    product(dtype, a);
    a->alpha = NULL; /* what follows adds to it */
}

/* A pair of tokens of which only one may be touched: the other one's V may be garbage, and 0 * NaN is NaN. */
LK_INLINE void edge_product(const lk_job *job, const lk_dtype dtype, lk_product *a,
                            const unsigned char *v, const float *p, int32_t token, int32_t edge) {
    const size_t row_bytes = a->x_stride;
    const uint32_t mask = token % 2 ? 0xffff0000u : 0x0000ffffu;
    unsigned char *copy = job->scratch.edge + (size_t)edge * row_bytes;
    const unsigned char *pairs = v + (size_t)(token / 2) * row_bytes;
    for (size_t i = 0; i < row_bytes; i += 4) {
        uint32_t pair;
        memcpy(&pair, pairs + i, 4);
        pair &= mask;
        memcpy(copy + i, &pair, 4);
    }
    a->x = copy;
    a->w = p + (LK_BF16_DOT ? token / 2 : token / 2 * 2);
    a->n_rows = 1;
    product(dtype, a);
    a->alpha = NULL;
}

/* o of columns with the same view, over a slice of the value indices: rescale, then add P V. */
LK_INLINE void view_values(const lk_job *job, const lk_dtype dtype, const lk_tile *tile,
                           const lk_view *view, int32_t c0, int32_t n_cols, int32_t d_begin) {
    const lk_geom *geom = job->geom;
    const int32_t group = geom->group;
    const int64_t o_stride = lk_o_stride(geom);
    const float *p = job->scratch.p + (int64_t)c0 * LK_PAGE_TOKENS;
    const size_t slice = (size_t)d_begin * LK_PAGE_TOKENS * geom->elem_bytes;
    const int32_t width = (int32_t)lk_min(LK_VALUE_SLICE, geom->v_dim - d_begin);
    const unsigned char *v = tile->v + slice;
    float *o = job->o + c0 * o_stride + d_begin;
    lk_product a = {.x_stride = (size_t)width * lane_bytes(dtype),
                    .w_stride = LK_PAGE_TOKENS,
                    .y_init = o,
                    .alpha = job->scratch.alpha + c0,
                    .y = o,
                    .y_stride = o_stride,
                    .n_cols = n_cols,
                    .end = width};

    /* Token slots to go over: [0, sink_end) and [begin, end). A live head has V of every token up to the last
     * visible one; an empty head has V of window tokens only. */
    const bool live = geom->n_kept[job->head] > 0;
    const int32_t end = view->visible;
    int32_t begin = live ? 0 : view->middle_end, sink_end = 0;
    if (!live) sink_end = end < view->middle_begin ? end : view->middle_begin;
    if (group == 1) {
        rows_product(dtype, &a, v, p, 0, sink_end);
        rows_product(dtype, &a, v, p, begin, end - begin);
    } else {
        rows_product(dtype, &a, v, p, 0, sink_end / 2);
        if (sink_end % 2) edge_product(job, dtype, &a, v, p, sink_end - 1, 0);
        if (begin < end && begin % 2) edge_product(job, dtype, &a, v, p, begin++, 1);
        rows_product(dtype, &a, v, p, begin / 2, end / 2 - begin / 2);
        if (begin < end && end % 2) edge_product(job, dtype, &a, v, p, end - 1, 2);
    }
}

/* The same for a group. Columns that see different tokens go apart: p is 0 where a column sees nothing, but a V that is
 * not finite would still reach it, and a query must not depend on what was sent along with it. */
LK_INLINE void group_values(const lk_job *job, const lk_dtype dtype, const lk_tile *tile,
                            const lk_view *view, int32_t c0, int32_t n_cols, int32_t d_begin) {
    const bool live = job->geom->n_kept[job->head] > 0;
    for (int32_t c = 0, n; c < n_cols; c += n) {
        n = 1;
        while (c + n < n_cols && view[c + n].visible == view[c].visible &&
               (live || view[c + n].middle_end == view[c].middle_end))
            n++;
        view_values(job, dtype, tile, &view[c], c0 + c, n, d_begin);
    }
}

/* ---------------------------------------------------------------------------------------------- the job */

/* q in the order of the stored channels: kept ones, then dropped ones. */
LK_INLINE void pack_q(const lk_job *job, const lk_dtype dtype) {
    const int32_t head_dim = job->geom->head_dim;
    const uint16_t *order = job->geom->order + (int64_t)job->head * head_dim;
    for (int32_t c = 0; c < job->n_cols; c++) {
        float *out = job->scratch.q + (int64_t)c * head_dim;
        if (LK_BF16_DOT) {
            const uint16_t *q = job->q[c];
            for (int32_t i = 0; i < head_dim; i += 2) {
                const uint32_t pair = (uint32_t)q[order[i]] | (uint32_t)q[order[i + 1]] << 16;
                out[i / 2] = lk_f32_from_bits(pair);
            }
        } else {
            for (int32_t i = 0; i < head_dim; i++)
                out[i] = lk_half_load(dtype, job->q[c], order[i]);
        }
    }
}

LK_INLINE void decode_job(const lk_job *job, const lk_dtype dtype) {
    const lk_geom *geom = job->geom;
    int64_t end = 0, first_full = INT64_MAX;
    for (int32_t c = 0; c < job->n_cols; c++) {
        end = lk_max(end, job->end[c]);
        if (job->end[c] > 0) first_full = lk_min(first_full, job->full_lo[c]);
    }
    if (!job->q_is_packed) pack_q(job, dtype);
    lk_state_init(job->m, job->l, job->o, job->n_cols, lk_o_stride(geom));

    for (int64_t page = job->page_begin; page < job->page_end; page++) {
        const lk_tile tile = tile_at(job, page, first_full, end);
        if (!tile.v) continue;
        const int64_t first = page * LK_PAGE_TOKENS;
        lk_view view[LK_JOB_COLUMNS];
        bool active[LK_JOB_COLUMNS / LK_GROUP_COLUMNS];
        for (int32_t c = 0; c < job->n_cols; c += LK_GROUP_COLUMNS) {
            const int32_t n_cols = (int32_t)lk_min(LK_GROUP_COLUMNS, job->n_cols - c);
            active[c / LK_GROUP_COLUMNS] =
                group_logits(job, dtype, &tile, first, c, n_cols, &view[c]);
        }
        for (int32_t d = 0; d < geom->v_dim; d += LK_VALUE_SLICE) {
            for (int32_t c = 0; c < job->n_cols; c += LK_GROUP_COLUMNS) {
                const int32_t n_cols = (int32_t)lk_min(LK_GROUP_COLUMNS, job->n_cols - c);
                if (active[c / LK_GROUP_COLUMNS])
                    group_values(job, dtype, &tile, &view[c], c, n_cols, d);
            }
        }
    }
}

#define LK_ISA_NAME_(dtype, isa) lk_decode_##dtype##_##isa
#define LK_ISA_NAME(dtype, isa) LK_ISA_NAME_(dtype, isa)

void LK_ISA_NAME(bf16, LK_ISA)(const lk_job *job) { decode_job(job, LK_BF16); }
#if !LK_BF16_DOT /* with it only bf16 differs from the variant without */
void LK_ISA_NAME(f32, LK_ISA)(const lk_job *job) { decode_job(job, LK_F32); }
void LK_ISA_NAME(f16, LK_ISA)(const lk_job *job) { decode_job(job, LK_F16); }
#endif
