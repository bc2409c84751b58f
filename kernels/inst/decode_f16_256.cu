#include "../decode.cuh"

LK_DECODE_INSTANCE(f16, __half, 256)
