/* append.cuh: declares the launches of an append; see append.cu. */
#ifndef LEANK_APPEND_CUH
#define LEANK_APPEND_CUH

#include "leank_cuda.h"

/* Append checked columns. valid and position [B, stride]; see place_kernel. */
lk_status append_columns(const lk_cuda_append_args *args, int32_t stride);

#endif
