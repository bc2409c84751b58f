/* lk_half.h: bf16 and f16 to and from f32, one value at a time; the only such conversions in the tree.
 * Narrowing rounds to nearest even, overflow becomes infinity, a NaN stays a NaN of the same sign. */
#ifndef LK_HALF_H
#define LK_HALF_H

#include "leank.h"

#include <string.h>

static inline uint32_t lk_f32_bits(float x) {
    uint32_t bits;
    memcpy(&bits, &x, sizeof bits);
    return bits;
}

static inline float lk_f32_from_bits(uint32_t bits) {
    float x;
    memcpy(&x, &bits, sizeof x);
    return x;
}

static inline float lk_bf16_to_f32(uint16_t h) { return lk_f32_from_bits((uint32_t)h << 16); }

static inline uint16_t lk_f32_to_bf16(float x) {
    uint32_t bits = lk_f32_bits(x);
    /* A NaN whose payload sits in the low half would be cut to infinity: set the quiet bit instead. */
    if ((bits & 0x7fffffffu) > 0x7f800000u) return (uint16_t)((bits >> 16) | 0x40u);
    return (uint16_t)((bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16);
}

static inline float lk_f16_to_f32(uint16_t h) {
    uint32_t sign = (uint32_t)(h & 0x8000u) << 16;
    uint32_t magnitude = (uint32_t)(h & 0x7fffu) << 13;
    if (magnitude >= 0x0f800000u)
        return lk_f32_from_bits(sign | (magnitude + 0x70000000u)); /* inf, NaN */
    if (magnitude >= 0x00800000u)
        return lk_f32_from_bits(sign | (magnitude + 0x38000000u)); /* normal */
    /* Subnormal: count * 2^-24, exact in f32. */
    float value = (float)(magnitude >> 13) * 0x1p-24f;
    return sign ? -value : value;
}

static inline uint16_t lk_f32_to_f16(float x) {
    uint32_t bits = lk_f32_bits(x);
    uint32_t sign = (bits >> 16) & 0x8000u;
    uint32_t magnitude = bits & 0x7fffffffu;
    if (magnitude > 0x7f800000u) return (uint16_t)(sign | 0x7e00u | ((magnitude >> 13) & 0x3ffu));
    if (magnitude >= 0x477ff000u) return (uint16_t)(sign | 0x7c00u); /* 65520 and more */
    if (magnitude < 0x38800000u) {
        /* Below 2^-14: one unit of 0.5f is one unit of a subnormal half, so the addition rounds for us. */
        float shifted = lk_f32_from_bits(magnitude) + 0.5f;
        return (uint16_t)(sign | (lk_f32_bits(shifted) - 0x3f000000u));
    }
    uint32_t odd = (magnitude >> 13) & 1u;
    return (uint16_t)(sign | ((magnitude - 0x38000000u + 0xfffu + odd) >> 13));
}

/* Element i of an array of the given dtype. */
static inline float lk_half_load(lk_dtype dtype, const void *p, int64_t i) {
    switch (dtype) {
    case LK_F32: return ((const float *)p)[i];
    case LK_BF16: return lk_bf16_to_f32(((const uint16_t *)p)[i]);
    case LK_F16: break;
    }
    return lk_f16_to_f32(((const uint16_t *)p)[i]);
}

static inline void lk_half_store(lk_dtype dtype, void *p, int64_t i, float x) {
    switch (dtype) {
    case LK_F32: ((float *)p)[i] = x; return;
    case LK_BF16: ((uint16_t *)p)[i] = lk_f32_to_bf16(x); return;
    case LK_F16: break;
    }
    ((uint16_t *)p)[i] = lk_f32_to_f16(x);
}

#endif
