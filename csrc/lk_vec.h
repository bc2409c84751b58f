/* lk_vec.h: what the bodies that are compiled per instruction set build on. Include lk_vec_<isa>.h before it, which
 * defines
 *   LK_LANES (floats in a vector; divides 16), LK_VECS (vectors of a column that a kernel keeps in registers), and
 *   lk_vec and the v_ operations on it (lk_vec_scalar.h has the plainest set). */
#ifndef LK_VEC_H
#define LK_VEC_H

#include "lk_softmax.h"

#define LK_INLINE static inline __attribute__((always_inline))
#define LK_NOINLINE static __attribute__((noinline))
#if defined(__clang__)
#define LK_UNROLL _Pragma("clang loop unroll(full)")
#else
#define LK_UNROLL _Pragma("GCC unroll 8")
#endif

/* The mantissa of 2^x, in 1/sqrt(2) to sqrt(2), and n + LK_EXP2_ROUND, so that v_pow2_shifted gives the rest. */
LK_INLINE lk_vec v_exp2_parts(lk_vec x, lk_vec *shifted) {
    *shifted = v_add(x, v_set1(LK_EXP2_ROUND));
    const lk_vec f = v_sub(x, v_sub(*shifted, v_set1(LK_EXP2_ROUND)));
    lk_vec p = v_fma(f, v_set1(LK_EXP2_C6), v_set1(LK_EXP2_C5));
    p = v_fma(f, p, v_set1(LK_EXP2_C4));
    p = v_fma(f, p, v_set1(LK_EXP2_C3));
    p = v_fma(f, p, v_set1(LK_EXP2_C2));
    p = v_fma(f, p, v_set1(LK_EXP2_C1));
    return v_fma(f, p, v_set1(1.0f));
}

/* 2^x for x <= 0, the steps of lk_exp2. */
LK_INLINE lk_vec v_exp2(lk_vec x) {
    lk_vec shifted;
    const lk_vec p = v_exp2_parts(x, &shifted);
    return v_zero_below(x, LK_EXP2_MIN, v_mul(p, v_pow2_shifted(shifted)));
}

/* tanh(y) / y = 1 + x^2 (c1 + x^2 (c2 + ...)), x = 2 log2(e) y, on [0, 1.5]; fitted as the coefficients of lk_exp2 are.
 * Largest relative error 2.3e-8. */
#define LK_TANH_C1 -0x1.47fc9cp-5f
#define LK_TANH_C2 0x1.f7eacap-10f
#define LK_TANH_C3 -0x1.808b40p-14f
#define LK_TANH_C4 0x1.d8d632p-19f
#define LK_TANH_LARGE 1.5f /* tanh is 0.48 */
#define LK_TANH_END 26.0f  /* from here on it is 1 in f32 */

/* cap * tanh(z / cap); z and cap in base 2, x_per_z = 2 log2(e) / cap, which is 2 / softcap. NaN stays NaN. Small z times
 * a factor near 1, which adds little to the error of z; the rest as cap - 2 cap / (2^x + 1): the nearer the cap, the
 * less the quotient and its errors count. Largest error 1.1e-7 of the cap and 1.9e-7 of the result; of
 * cap * tanhf(z / cap) it is 1.4e-7 and 3e-7. */
LK_INLINE lk_vec v_softcap(lk_vec z, lk_vec cap, lk_vec x_per_z) {
    const lk_vec zero = v_set1(0.0f), one = v_set1(1.0f);
    const lk_vec x = v_mul(z, x_per_z), square = v_mul(x, x);
    lk_vec p = v_fma(square, v_set1(LK_TANH_C4), v_set1(LK_TANH_C3));
    p = v_fma(square, p, v_set1(LK_TANH_C2));
    p = v_fma(square, p, v_set1(LK_TANH_C1));
    const lk_vec small = v_fma(z, v_mul(square, p), z);
    const lk_vec minus_size = v_max(v_set1(-LK_TANH_END), v_sub(zero, v_max(v_sub(zero, x), x)));
    const lk_vec size = v_sub(zero, minus_size);
    lk_vec shifted;
    const lk_vec mantissa = v_exp2_parts(size, &shifted);
    const lk_vec quotient = v_div(v_set1(-2.0f), v_fma(mantissa, v_pow2_shifted(shifted), one));
    const lk_vec large = v_copysign(v_fma(cap, quotient, cap), z);
    return v_if_below(size, LK_TANH_LARGE, small, large);
}

#endif
