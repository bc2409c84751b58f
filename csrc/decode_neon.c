/* decode_neon.c: decode for aarch64, whose baseline has everything needed. */
#include "lk_internal.h"

#ifdef LK_BUILD_NEON

#define LK_ISA neon
#define LK_BF16_DOT 0

#include "lk_vec_neon.h"

#include "decode_body.h"

#endif
