#include "../span.cuh"

LK_SPAN_INSTANCE(bf16, __nv_bfloat16, 80)
