/* decode_avx512bf16.c: bf16 decode with the dot instruction of AVX512-BF16, which takes the stored pairs as they
 * are. Products of q and k are exact in it; probabilities are rounded to bf16. f32 and f16 have nothing to gain
 * and stay with decode_avx512.c. */
#include "lk_internal.h"

#ifdef LK_BUILD_AVX512BF16

#define LK_ISA avx512bf16
#define LK_BF16_DOT 1

#include "lk_vec_avx512.h"

static inline lk_vec v_dot(lk_vec sum, lk_vec a, lk_vec b) {
    return _mm512_dpbf16_ps(sum, (__m512bh)a, (__m512bh)b);
}
/* 32 consecutive floats -> 16 pairs, in order. */
static inline lk_vec v_to_pairs(lk_vec low, lk_vec high) {
    return (lk_vec)_mm512_cvtne2ps_pbh(high, low);
}

#include "decode_body.h"

#endif
