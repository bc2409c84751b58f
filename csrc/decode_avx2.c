/* decode_avx2.c: decode for x86 with AVX2, FMA and F16C. */
#include "lk_internal.h"

#ifdef LK_BUILD_AVX2

#define LK_ISA avx2
#define LK_BF16_DOT 0

#include "lk_vec_avx2.h"

#include "decode_body.h"

#endif
