#include "../span.cuh"

LK_SPAN_INSTANCE(f16, __half, 128)
