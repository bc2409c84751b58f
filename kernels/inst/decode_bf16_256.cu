#include "../decode.cuh"

LK_DECODE_INSTANCE(bf16, __nv_bfloat16, 256)
