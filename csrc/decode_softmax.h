/* decode_softmax.h: what a query column sees of a tile, and its logits -> probabilities. Part of decode_body.h. */
#include "lk_internal.h"
#include "lk_vec.h"

/* ------------------------------------------------------------------------------------- what is visible */

/* One column on one tile, in token slots: [0, visible) less [middle_begin, middle_end) is window. */
typedef struct {
    int32_t middle_begin, middle_end, visible;
    bool window, middle; /* some visible slot is of that kind */
} lk_view;

LK_INLINE int32_t to_slot(int64_t token, int64_t first) {
    return (int32_t)lk_min(lk_max(token - first, 0), LK_PAGE_TOKENS);
}

LK_INLINE lk_view view_of(const lk_job *job, int32_t c, int64_t first) {
    lk_view v;
    v.visible = to_slot(job->end[c], first);
    v.middle_begin = to_slot(job->geom->sink, first);
    v.middle_end = to_slot(lk_max(job->full_lo[c], job->geom->sink), first);
    v.window = v.visible > v.middle_end || (v.visible > 0 && v.middle_begin > 0);
    v.middle = v.middle_begin < v.middle_end && v.visible > v.middle_begin;
    return v;
}

/* ----------------------------------------------------------------------------------------------- softmax */

/* Logits of one column as they count: scaled, soft-capped if the call asks for it, and -inf where it sees nothing. Unused
 * slots hold anything, NaN too.
 * kept: over the kept channels    logits: in over all channels (unused if the column has no window here), out */
LK_NOINLINE void mask_logits(const lk_job *job, const lk_view *view, const float *kept,
                             float *logits) {
    const bool empty = job->geom->n_kept[job->head] == 0;
    const bool mixed = view->middle && view->window && !empty;
    const bool hide_middle = empty && view->middle_begin < view->middle_end;
    const bool capped = job->softcap_log2 > 0.0f;
    const lk_vec scale = v_set1(job->scale_log2), hidden = v_set1(-INFINITY), zero = v_set1(0.0f);
    const lk_vec softcap = v_set1(job->softcap_log2), x_per_z = v_set1(job->two_over_softcap);
    for (int32_t t = 0; t < LK_PAGE_TOKENS; t += LK_LANES) {
        lk_vec x = v_load((view->window ? logits : kept) + t);
        if (mixed) x = v_pick(v_load(kept + t), x, t, view->middle_begin, view->middle_end);
        x = v_mul(x, scale);
        if (capped) {
            /* Unused slots may be memory that nobody wrote: no branch of the scalar variant hangs on them. */
            x = v_pick(x, zero, t, 0, view->visible);
            if (hide_middle) x = v_pick(zero, x, t, view->middle_begin, view->middle_end);
            x = v_softcap(x, softcap, x_per_z);
        }
        if (hide_middle) x = v_pick(hidden, x, t, view->middle_begin, view->middle_end);
        v_store(logits + t, v_pick(x, hidden, t, 0, view->visible));
    }
}

/* Logits of the columns from c0 on -> probabilities in their rows of scratch.p; m and l go on, alpha is set. All
 * columns take each step together: one alone would wait most of the time for its own last result.
 * logits [n_cols, P]    scale [n_cols] what is left to multiply them with */
LK_INLINE void softmax_cols(const lk_job *job, const int n_cols, int32_t c0, const float *logits,
                            const float *scale) {
    float *p = job->scratch.p + (int64_t)c0 * LK_PAGE_TOKENS;
    lk_vec top[LK_GROUP_COLUMNS], shift[LK_GROUP_COLUMNS], sum[LK_GROUP_COLUMNS];
    LK_UNROLL
    for (int c = 0; c < n_cols; c++) top[c] = v_set1(-INFINITY);
    for (int32_t t = 0; t < LK_PAGE_TOKENS; t += LK_LANES) {
        LK_UNROLL
        for (int c = 0; c < n_cols; c++) {
            const lk_vec x = v_mul(v_load(logits + c * LK_PAGE_TOKENS + t), v_set1(scale[c]));
            v_store(p + c * LK_PAGE_TOKENS + t, x);
            top[c] = v_max(top[c], x);
        }
    }
    LK_UNROLL
    for (int c = 0; c < n_cols; c++) {
        float subtract;
        job->scratch.alpha[c0 + c] = lk_state_raise(&job->m[c0 + c], v_hmax(top[c]), &subtract);
        shift[c] = v_set1(subtract);
        sum[c] = v_set1(0.0f);
    }
#if LK_BF16_DOT
    /* p is rounded to bf16 for the dot instruction; l sums what is really multiplied with V. */
    const lk_vec ones = v_set1(lk_f32_from_bits(0x3f803f80u));
    for (int32_t t = 0; t < LK_PAGE_TOKENS; t += 2 * LK_LANES) {
        LK_UNROLL
        for (int c = 0; c < n_cols; c++) {
            float *pc = p + c * LK_PAGE_TOKENS;
            const lk_vec low = v_exp2(v_sub(v_load(pc + t), shift[c]));
            const lk_vec high = v_exp2(v_sub(v_load(pc + t + LK_LANES), shift[c]));
            const lk_vec pairs = v_to_pairs(low, high);
            v_store(pc + t / 2, pairs);
            sum[c] = v_dot(sum[c], pairs, ones);
        }
    }
#else
    for (int32_t t = 0; t < LK_PAGE_TOKENS; t += LK_LANES) {
        LK_UNROLL
        for (int c = 0; c < n_cols; c++) {
            const lk_vec x = v_exp2(v_sub(v_load(p + c * LK_PAGE_TOKENS + t), shift[c]));
            v_store(p + c * LK_PAGE_TOKENS + t, x);
            sum[c] = v_add(sum[c], x);
        }
    }
#endif
    LK_UNROLL
    for (int c = 0; c < n_cols; c++)
        job->l[c0 + c] = job->l[c0 + c] * job->scratch.alpha[c0 + c] + v_hsum(sum[c]);
}

LK_NOINLINE void group_softmax(const lk_job *job, int32_t c0, int32_t n_cols, const float *logits,
                               const float *scale) {
    switch (n_cols) {
    case 4: softmax_cols(job, 4, c0, logits, scale); return;
    case 3: softmax_cols(job, 3, c0, logits, scale); return;
    case 2: softmax_cols(job, 2, c0, logits, scale); return;
    default: softmax_cols(job, 1, c0, logits, scale);
    }
}
