/* learn_neon.c: mask learning for aarch64. */
#include "lk_internal.h"

#ifdef LK_BUILD_NEON

#define LK_ISA neon

#include "lk_vec_neon.h"

#include "learn_body.h"

#endif
