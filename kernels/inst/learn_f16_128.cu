#include "../learn_launch.cuh"

LK_LEARN_INSTANCE(f16, __half, 128)
