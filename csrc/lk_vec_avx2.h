/* lk_vec_avx2.h: the vector operations for x86 with AVX2, FMA and F16C. */
#ifndef LK_VEC_AVX2_H
#define LK_VEC_AVX2_H

#include <immintrin.h>

#define LK_LANES 8
#define LK_VECS 2 /* 2 x 4 sums, 2 x 2 row vectors and a broadcast fit 16 registers */

typedef __m256 lk_vec;

static inline lk_vec v_set1(float x) { return _mm256_set1_ps(x); }
static inline lk_vec v_load(const float *p) { return _mm256_loadu_ps(p); }
static inline void v_store(float *p, lk_vec a) { _mm256_storeu_ps(p, a); }
static inline lk_vec v_add(lk_vec a, lk_vec b) { return _mm256_add_ps(a, b); }
static inline lk_vec v_sub(lk_vec a, lk_vec b) { return _mm256_sub_ps(a, b); }
static inline lk_vec v_mul(lk_vec a, lk_vec b) { return _mm256_mul_ps(a, b); }
static inline lk_vec v_div(lk_vec a, lk_vec b) { return _mm256_div_ps(a, b); }
static inline lk_vec v_fma(lk_vec a, lk_vec b, lk_vec c) { return _mm256_fmadd_ps(a, b, c); }
static inline lk_vec v_max(lk_vec a, lk_vec b) { return _mm256_max_ps(a, b); }
static inline float v_hmax(lk_vec a) {
    __m128 max_f32x4 = _mm_max_ps(_mm256_castps256_ps128(a), _mm256_extractf128_ps(a, 1));
    max_f32x4 = _mm_max_ps(max_f32x4, _mm_movehl_ps(max_f32x4, max_f32x4));
    return _mm_cvtss_f32(_mm_max_ss(max_f32x4, _mm_movehdup_ps(max_f32x4)));
}
static inline float v_hsum(lk_vec a) {
    __m128 sum_f32x4 = _mm_add_ps(_mm256_castps256_ps128(a), _mm256_extractf128_ps(a, 1));
    sum_f32x4 = _mm_add_ps(sum_f32x4, _mm_movehl_ps(sum_f32x4, sum_f32x4));
    return _mm_cvtss_f32(_mm_add_ss(sum_f32x4, _mm_movehdup_ps(sum_f32x4)));
}

static inline lk_vec v_load_f32(const unsigned char *p) {
    return _mm256_castsi256_ps(_mm256_loadu_si256((const __m256i *)(const void *)p));
}
static inline lk_vec v_load_f16(const unsigned char *p) {
    return _mm256_cvtph_ps(_mm_loadu_si128((const __m128i *)(const void *)p));
}
static inline lk_vec v_pair_even(lk_vec pairs) {
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_castps_si256(pairs), 16));
}
static inline lk_vec v_pair_odd(lk_vec pairs) {
    return _mm256_and_ps(pairs, _mm256_castsi256_ps(_mm256_set1_epi32((int32_t)0xffff0000u)));
}

static inline lk_vec v_pick(lk_vec inside, lk_vec outside, int32_t first, int32_t begin,
                            int32_t end) {
    const __m256i lane_i32x8 = _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7);
    const __m256i below_i32x8 = _mm256_cmpgt_epi32(_mm256_set1_epi32(begin - first), lane_i32x8);
    const __m256i before_end_i32x8 = _mm256_cmpgt_epi32(_mm256_set1_epi32(end - first), lane_i32x8);
    const __m256i mask_i32x8 = _mm256_andnot_si256(below_i32x8, before_end_i32x8);
    return _mm256_blendv_ps(outside, inside, _mm256_castsi256_ps(mask_i32x8));
}
static inline lk_vec v_zero_below(lk_vec x, float limit, lk_vec a) {
    return _mm256_andnot_ps(_mm256_cmp_ps(x, _mm256_set1_ps(limit), _CMP_LT_OQ), a);
}
static inline lk_vec v_if_below(lk_vec x, float limit, lk_vec a, lk_vec b) {
    return _mm256_blendv_ps(b, a, _mm256_cmp_ps(x, _mm256_set1_ps(limit), _CMP_LT_OQ));
}
static inline lk_vec v_copysign(lk_vec a, lk_vec b) {
    const __m256 sign = _mm256_set1_ps(-0.0f);
    return _mm256_or_ps(_mm256_andnot_ps(sign, a), _mm256_and_ps(sign, b));
}
static inline lk_vec v_pow2_shifted(lk_vec shifted) {
    const __m256i exponent_i32x8 = _mm256_slli_epi32(_mm256_castps_si256(shifted), 23);
    return _mm256_castsi256_ps(_mm256_add_epi32(exponent_i32x8, _mm256_set1_epi32(0x3f800000)));
}

#endif
