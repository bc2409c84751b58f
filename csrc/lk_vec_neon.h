/* lk_vec_neon.h: the vector operations for aarch64, whose baseline has everything needed. */
#ifndef LK_VEC_NEON_H
#define LK_VEC_NEON_H

#include <arm_neon.h>

#define LK_LANES 4
#define LK_VECS 4

typedef float32x4_t lk_vec;

static inline lk_vec v_set1(float x) { return vdupq_n_f32(x); }
static inline lk_vec v_load(const float *p) { return vld1q_f32(p); }
static inline void v_store(float *p, lk_vec a) { vst1q_f32(p, a); }
static inline lk_vec v_add(lk_vec a, lk_vec b) { return vaddq_f32(a, b); }
static inline lk_vec v_sub(lk_vec a, lk_vec b) { return vsubq_f32(a, b); }
static inline lk_vec v_mul(lk_vec a, lk_vec b) { return vmulq_f32(a, b); }
static inline lk_vec v_div(lk_vec a, lk_vec b) { return vdivq_f32(a, b); }
static inline lk_vec v_fma(lk_vec a, lk_vec b, lk_vec c) { return vfmaq_f32(c, a, b); }
static inline lk_vec v_max(lk_vec a, lk_vec b) { return vmaxq_f32(a, b); }
static inline float v_hmax(lk_vec a) { return vmaxvq_f32(a); }
static inline float v_hsum(lk_vec a) { return vaddvq_f32(a); }

/* Blocks are byte arrays; a load of bytes has no alignment to break. */
static inline lk_vec v_load_f32(const unsigned char *p) {
    return vreinterpretq_f32_u8(vld1q_u8(p));
}
static inline lk_vec v_load_f16(const unsigned char *p) {
    return vcvt_f32_f16(vreinterpret_f16_u8(vld1_u8(p)));
}
static inline lk_vec v_pair_even(lk_vec pairs) {
    return vreinterpretq_f32_u32(vshlq_n_u32(vreinterpretq_u32_f32(pairs), 16));
}
static inline lk_vec v_pair_odd(lk_vec pairs) {
    const uint32x4_t high_u32x4 = vdupq_n_u32(0xffff0000u);
    return vreinterpretq_f32_u32(vandq_u32(vreinterpretq_u32_f32(pairs), high_u32x4));
}

static inline lk_vec v_pick(lk_vec inside, lk_vec outside, int32_t first, int32_t begin,
                            int32_t end) {
    static const int32_t lanes[4] = {0, 1, 2, 3};
    const int32x4_t lane_s32x4 = vld1q_s32(lanes);
    const uint32x4_t after_begin_u32x4 = vcgeq_s32(lane_s32x4, vdupq_n_s32(begin - first));
    const uint32x4_t before_end_u32x4 = vcltq_s32(lane_s32x4, vdupq_n_s32(end - first));
    return vbslq_f32(vandq_u32(after_begin_u32x4, before_end_u32x4), inside, outside);
}
static inline lk_vec v_zero_below(lk_vec x, float limit, lk_vec a) {
    const uint32x4_t below_u32x4 = vcltq_f32(x, vdupq_n_f32(limit));
    return vreinterpretq_f32_u32(vbicq_u32(vreinterpretq_u32_f32(a), below_u32x4));
}
static inline lk_vec v_if_below(lk_vec x, float limit, lk_vec a, lk_vec b) {
    return vbslq_f32(vcltq_f32(x, vdupq_n_f32(limit)), a, b);
}
static inline lk_vec v_copysign(lk_vec a, lk_vec b) {
    return vbslq_f32(vdupq_n_u32(0x80000000u), b, a);
}
static inline lk_vec v_pow2_shifted(lk_vec shifted) {
    const uint32x4_t exponent_u32x4 = vshlq_n_u32(vreinterpretq_u32_f32(shifted), 23);
    return vreinterpretq_f32_u32(vaddq_u32(exponent_u32x4, vdupq_n_u32(0x3f800000u)));
}

#endif
