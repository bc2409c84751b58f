/* combine.cuh: declares how every launch of attention begins (decode.cu) and ends, with the merge of parts (combine.cu). */
#ifndef LEANK_COMBINE_CUH
#define LEANK_COMBINE_CUH

#include "decode_shape.cuh"

/* Check what is common to them, and fill it in; what depends on their query columns is not. */
lk_status begin_attend(decode_params *p, const lk_cuda_layer *layer, int32_t n_q_heads, float scale,
                       float softcap, void *work, int32_t n_blocks);

lk_status launch_combine(const decode_params &p, cudaStream_t stream, int32_t *cuda_error);

#endif
