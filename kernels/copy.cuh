/* copy.cuh: declares how twins are lent for a piece of a span that is longer than slack allows: storing its tokens in the
 * ring of a row's twins would free channels that queries of the piece see. See copy.cu. */
#ifndef LEANK_COPY_CUH
#define LEANK_COPY_CUH

#include "common.cuh"

/* table [B, table_stride] becomes the layer's table of twins, but for n_lent pages of each row from that of its next token on,
 * or past the sink: these are in `lent` [B, n_lent] of twin_bytes. What is stored of the first one is copied there. */
lk_status lend_twins(const lk_cuda_layer *layer, int64_t *table, int64_t lent, int32_t n_lent,
                     int64_t twin_bytes, cudaStream_t stream, int32_t *cuda_error);

/* Settle rows that have grown, and copy lent twins that stay to where they belong. */
lk_status take_back_twins(const lk_cuda_layer *layer, const int64_t *table, int32_t n_lent,
                          int64_t twin_bytes, cudaStream_t stream, int32_t *cuda_error);

#endif
