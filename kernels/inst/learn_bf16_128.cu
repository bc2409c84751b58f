#include "../learn_launch.cuh"

LK_LEARN_INSTANCE(bf16, __nv_bfloat16, 128)
