/* lk_vec_scalar.h: the vector operations without vector instructions, the plainest set of them. */
#ifndef LK_VEC_SCALAR_H
#define LK_VEC_SCALAR_H

#include "lk_half.h"

#define LK_LANES 1
#define LK_VECS 4

typedef float lk_vec;

static inline lk_vec v_set1(float x) { return x; }
static inline lk_vec v_load(const float *p) { return *p; }
static inline void v_store(float *p, lk_vec a) { *p = a; }
static inline lk_vec v_add(lk_vec a, lk_vec b) { return a + b; }
static inline lk_vec v_sub(lk_vec a, lk_vec b) { return a - b; }
static inline lk_vec v_mul(lk_vec a, lk_vec b) { return a * b; }
static inline lk_vec v_div(lk_vec a, lk_vec b) { return a / b; }
static inline lk_vec v_fma(lk_vec a, lk_vec b, lk_vec c) { return a * b + c; }
/* NaN in b stays; NaN in a may or may not */
static inline lk_vec v_max(lk_vec a, lk_vec b) { return a > b ? a : b; }
static inline float v_hmax(lk_vec a) { return a; }
static inline float v_hsum(lk_vec a) { return a; }

/* One row element of K or V blocks. A bf16 pair travels as the bits of one float. */
static inline lk_vec v_load_f32(const unsigned char *p) {
    float x;
    memcpy(&x, p, sizeof x);
    return x;
}
static inline lk_vec v_load_f16(const unsigned char *p) {
    uint16_t h;
    memcpy(&h, p, sizeof h);
    return lk_f16_to_f32(h);
}
static inline lk_vec v_pair_even(lk_vec pair) { return lk_f32_from_bits(lk_f32_bits(pair) << 16); }
static inline lk_vec v_pair_odd(lk_vec pair) {
    return lk_f32_from_bits(lk_f32_bits(pair) & 0xffff0000u);
}

/* inside where begin <= first + lane < end, else outside */
static inline lk_vec v_pick(lk_vec inside, lk_vec outside, int32_t first, int32_t begin,
                            int32_t end) {
    return begin <= first && first < end ? inside : outside;
}
/* 0 where x < limit, else a; NaN in x keeps a */
static inline lk_vec v_zero_below(lk_vec x, float limit, lk_vec a) { return x < limit ? 0.0f : a; }
/* a where x < limit, else b */
static inline lk_vec v_if_below(lk_vec x, float limit, lk_vec a, lk_vec b) {
    return x < limit ? a : b;
}
/* |a| with the sign of b */
static inline lk_vec v_copysign(lk_vec a, lk_vec b) {
    return lk_f32_from_bits((lk_f32_bits(a) & 0x7fffffffu) | (lk_f32_bits(b) & 0x80000000u));
}
/* 2^n from n + LK_EXP2_ROUND: the low bits of the sum become the exponent */
static inline lk_vec v_pow2_shifted(lk_vec shifted) {
    return lk_f32_from_bits((lk_f32_bits(shifted) << 23) + 0x3f800000u);
}

#endif
