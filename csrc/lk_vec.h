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

/* 2^x for x <= 0, the steps of lk_exp2. */
LK_INLINE lk_vec v_exp2(lk_vec x) {
    const lk_vec shifted = v_add(x, v_set1(LK_EXP2_ROUND));
    const lk_vec f = v_sub(x, v_sub(shifted, v_set1(LK_EXP2_ROUND)));
    lk_vec p = v_fma(f, v_set1(LK_EXP2_C6), v_set1(LK_EXP2_C5));
    p = v_fma(f, p, v_set1(LK_EXP2_C4));
    p = v_fma(f, p, v_set1(LK_EXP2_C3));
    p = v_fma(f, p, v_set1(LK_EXP2_C2));
    p = v_fma(f, p, v_set1(LK_EXP2_C1));
    p = v_fma(f, p, v_set1(1.0f));
    return v_zero_below(x, LK_EXP2_MIN, v_mul(p, v_pow2_shifted(shifted)));
}

#endif
