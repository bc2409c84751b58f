/* learn_avx2.c: mask learning for x86 with AVX2, FMA and F16C. */
#include "lk_internal.h"

#ifdef LK_BUILD_AVX2

#define LK_ISA avx2

#include "lk_vec_avx2.h"

#include "learn_body.h"

#endif
