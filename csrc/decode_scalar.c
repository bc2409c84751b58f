/* decode_scalar.c: decode without vector instructions; always built. */
#include "lk_vec_scalar.h"

#define LK_ISA scalar
#define LK_BF16_DOT 0

#include "decode_body.h"
