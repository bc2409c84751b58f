/* learn_merge.cuh: the launches that add up what the blocks of a call left, in the order of splits and blocks. */
#ifndef LEANK_LEARN_MERGE_CUH
#define LEANK_LEARN_MERGE_CUH

#include "learn.cuh"

/* States of the splits -> o and lse. */
lk_status launch_learn_merge_forward(const learn_params &p, lk_dtype dtype, cudaStream_t stream,
                                     int32_t *cuda_error);
/* Sums of the splits -> dq, and parts of the blocks -> dalpha. */
lk_status launch_learn_merge_backward(const learn_params &p, lk_dtype dtype, cudaStream_t stream,
                                      int32_t *cuda_error);

#endif
