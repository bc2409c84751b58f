/* lk_softmax.h: the running state (m, l, o) of an online softmax (Milakov 2018), in base 2.
 *
 * For logits s_j and values v_j seen so far: m = max s_j, l = sum 2^(s_j - m), o = sum 2^(s_j - m) v_j.
 * While nothing is visible m = -inf, l = 0, o = 0. That case is handled here and nowhere else: the formulas
 * below would meet -inf - -inf = NaN, so a state without a logit subtracts 0 instead of m. */
#ifndef LK_SOFTMAX_H
#define LK_SOFTMAX_H

#include "lk_half.h"

#include <math.h>

#define LK_LOG2_E 1.44269504088896340736

/* 2^f = 1 + f (c1 + f (c2 + ...)) on [-1/2, 1/2]: smallest relative error with p(0) = 1, by iterated weighted
 * least squares (Lawson) on 4001 Chebyshev points in float64, coefficients rounded to f32 afterwards.
 * Largest relative error of lk_exp2 on [-126, 0]: 1.03e-7 (rounding included). */
#define LK_EXP2_C1 0x1.62e430p-1f
#define LK_EXP2_C2 0x1.ebfbdcp-3f
#define LK_EXP2_C3 0x1.c6aee8p-5f
#define LK_EXP2_C4 0x1.3b2d4cp-7f
#define LK_EXP2_C5 0x1.5f3e54p-10f
#define LK_EXP2_C6 0x1.41fbbcp-13f
#define LK_EXP2_MIN (-126.0f) /* below it the result is 0: no subnormals, and 2^-inf is exactly 0 */
#define LK_EXP2_ROUND                                                                              \
    0x1.8p23f /* x + this - this rounds to an integer, which stands in the low bits */

/* 2^x for x <= 0; NaN stays NaN. The vector bodies do the same steps. */
static inline float lk_exp2(float x) {
    if (x < LK_EXP2_MIN) return 0.0f;
    float shifted = x + LK_EXP2_ROUND;
    float f = x - (shifted - LK_EXP2_ROUND);
    float p = LK_EXP2_C5 + f * LK_EXP2_C6;
    p = LK_EXP2_C4 + f * p;
    p = LK_EXP2_C3 + f * p;
    p = LK_EXP2_C2 + f * p;
    p = LK_EXP2_C1 + f * p;
    p = 1.0f + f * p;
    return p * lk_f32_from_bits((lk_f32_bits(shifted) << 23) + 0x3f800000u);
}

static inline void lk_state_init(float *m, float *l, float *o, int32_t n_cols, int64_t o_stride) {
    for (int32_t c = 0; c < n_cols; c++) {
        m[c] = -INFINITY;
        l[c] = 0.0f;
    }
    memset(o, 0, (size_t)n_cols * (size_t)o_stride * sizeof *o);
}

/* Take a logit into m. Returns the factor for l and o; *shift is what to subtract from logits from now on. */
static inline float lk_state_raise(float *m, float logit, float *shift) {
    const float old = *m;
    /* Most tiles hold no new maximum: as a branch, so that what follows need not wait for the comparison. */
    if (!(logit > old)) {
        *shift = old == -INFINITY ? 0.0f : old;
        return 1.0f;
    }
    *m = *shift = logit;
    return lk_exp2(old - logit);
}

/* Add the state of other keys to one column. */
static inline void lk_state_merge(float *m, float *l, float *o, float other_m, float other_l,
                                  const float *other_o, int32_t v_dim) {
    float shift;
    float factor = lk_state_raise(m, other_m, &shift);
    float other_factor = lk_exp2(other_m - shift);
    *l = *l * factor + other_l * other_factor;
    for (int32_t d = 0; d < v_dim; d++) o[d] = o[d] * factor + other_o[d] * other_factor;
}

/* Add a key that has no value to one column. -inf adds nothing, and beside +inf nothing counts. */
static inline void lk_state_add_sink(float *m, float *l, float *o, float logit, int32_t v_dim) {
    float shift;
    const float factor = lk_state_raise(m, logit, &shift);
    *l = *l * factor + (logit == shift ? 1.0f : lk_exp2(logit - shift)); /* no inf - inf */
    if (factor == 1.0f) return;
    for (int32_t d = 0; d < v_dim; d++) o[d] *= factor;
}

/* Divide by l and store; 0 where nothing was visible. */
static inline void lk_state_finish(float l, const float *o, int32_t v_dim, lk_dtype dtype,
                                   void *out) {
    float scale = l == 0.0f ? 0.0f : 1.0f / l;
    if (dtype == LK_BF16) { /* a loop that compilers turn into vectors */
        uint16_t *out_bf16 = out;
        for (int32_t d = 0; d < v_dim; d++) out_bf16[d] = lk_f32_to_bf16(o[d] * scale);
        return;
    }
    for (int32_t d = 0; d < v_dim; d++) lk_half_store(dtype, out, d, o[d] * scale);
}

#endif
