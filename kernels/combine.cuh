/* combine.cuh: declares what merges the parts of units; see combine.cu. */
#ifndef LEANK_COMBINE_CUH
#define LEANK_COMBINE_CUH

#include "decode_shape.cuh"

lk_status launch_combine(const decode_params &p, cudaStream_t stream, int32_t *cuda_error);

#endif
