/* lk_vec_avx512.h: the vector operations for AVX-512 (F, BW, DQ, VL), with or without BF16. */
#ifndef LK_VEC_AVX512_H
#define LK_VEC_AVX512_H

#include <immintrin.h>

#define LK_LANES 16
#define LK_VECS                                                                                    \
    4 /* 4 x 4 sums hide the latency of two FMA units; 2 x 4 row vectors fit beside them */

typedef __m512 lk_vec;

static inline lk_vec v_set1(float x) { return _mm512_set1_ps(x); }
static inline lk_vec v_load(const float *p) { return _mm512_loadu_ps(p); }
static inline void v_store(float *p, lk_vec a) { _mm512_storeu_ps(p, a); }
static inline lk_vec v_add(lk_vec a, lk_vec b) { return _mm512_add_ps(a, b); }
static inline lk_vec v_sub(lk_vec a, lk_vec b) { return _mm512_sub_ps(a, b); }
static inline lk_vec v_mul(lk_vec a, lk_vec b) { return _mm512_mul_ps(a, b); }
static inline lk_vec v_div(lk_vec a, lk_vec b) { return _mm512_div_ps(a, b); }
static inline lk_vec v_fma(lk_vec a, lk_vec b, lk_vec c) { return _mm512_fmadd_ps(a, b, c); }
static inline lk_vec v_max(lk_vec a, lk_vec b) { return _mm512_max_ps(a, b); }
static inline float v_hmax(lk_vec a) { return _mm512_reduce_max_ps(a); }
static inline float v_hsum(lk_vec a) { return _mm512_reduce_add_ps(a); }

/* Half a vector: 8 lanes from memory, the upper ones 0. */
#define LK_HALF_MASK ((__mmask16)0x00ff)

static inline lk_vec v_load_f32(const unsigned char *p) {
    return _mm512_castsi512_ps(_mm512_loadu_si512(p));
}
static inline lk_vec v_load_half_f32(const unsigned char *p) {
    return _mm512_castsi512_ps(_mm512_maskz_loadu_epi32(LK_HALF_MASK, p));
}
static inline lk_vec v_load_f16(const unsigned char *p) {
    return _mm512_cvtph_ps(_mm256_loadu_si256((const __m256i *)(const void *)p));
}
static inline lk_vec v_load_half_f16(const unsigned char *p) {
    return _mm512_cvtph_ps(_mm256_maskz_loadu_epi16(LK_HALF_MASK, p));
}
static inline lk_vec v_pair_even(lk_vec pairs) {
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_castps_si512(pairs), 16));
}
static inline lk_vec v_pair_odd(lk_vec pairs) {
    const __m512i high_i32x16 = _mm512_set1_epi32((int32_t)0xffff0000u);
    return _mm512_castsi512_ps(_mm512_and_si512(_mm512_castps_si512(pairs), high_i32x16));
}

static inline lk_vec v_pick(lk_vec inside, lk_vec outside, int32_t first, int32_t begin,
                            int32_t end) {
    const __m512i lane_i32x16 =
        _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
    const __mmask16 after_begin =
        _mm512_cmpge_epi32_mask(lane_i32x16, _mm512_set1_epi32(begin - first));
    const __mmask16 both =
        _mm512_mask_cmplt_epi32_mask(after_begin, lane_i32x16, _mm512_set1_epi32(end - first));
    return _mm512_mask_blend_ps(both, outside, inside);
}
static inline lk_vec v_zero_below(lk_vec x, float limit, lk_vec a) {
    const __mmask16 keep = _mm512_cmp_ps_mask(x, _mm512_set1_ps(limit), _CMP_NLT_UQ);
    return _mm512_maskz_mov_ps(keep, a);
}
static inline lk_vec v_if_below(lk_vec x, float limit, lk_vec a, lk_vec b) {
    return _mm512_mask_blend_ps(_mm512_cmp_ps_mask(x, _mm512_set1_ps(limit), _CMP_LT_OQ), b, a);
}
static inline lk_vec v_copysign(lk_vec a, lk_vec b) {
    const __m512 sign = _mm512_set1_ps(-0.0f);
    return _mm512_or_ps(_mm512_andnot_ps(sign, a), _mm512_and_ps(sign, b));
}
static inline lk_vec v_pow2_shifted(lk_vec shifted) {
    const __m512i exponent_i32x16 = _mm512_slli_epi32(_mm512_castps_si512(shifted), 23);
    return _mm512_castsi512_ps(_mm512_add_epi32(exponent_i32x16, _mm512_set1_epi32(0x3f800000)));
}

#endif
