/* learn_avx512.c: mask learning for x86 with AVX-512 F, BW, DQ and VL. */
#include "lk_internal.h"

#ifdef LK_BUILD_AVX512

#define LK_ISA avx512

#include "lk_vec_avx512.h"

#include "learn_body.h"

#endif
