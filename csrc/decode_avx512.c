/* decode_avx512.c: decode for x86 with AVX-512 F, BW, DQ and VL. */
#include "lk_internal.h"

#ifdef LK_BUILD_AVX512

#define LK_ISA avx512
#define LK_BF16_DOT 0

#include "lk_vec_avx512.h"

#include "decode_body.h"

#endif
