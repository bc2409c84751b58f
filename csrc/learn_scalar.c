/* learn_scalar.c: mask learning without vector instructions; always built. */
#include "lk_vec_scalar.h"

#define LK_ISA scalar

#include "learn_body.h"
