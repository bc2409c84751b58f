/* lk_pack.h: moving tokens between dense rows and the element order of pages. Used by
 * pack.c, append.c and cache_report.c. */
#ifndef LK_PACK_H
#define LK_PACK_H

#include "lk_internal.h"

/* Consecutive tokens of one row and head that go into one page: slots slot..slot + n_tokens - 1. */
typedef struct {
    const unsigned char *k, *v; /* of (row, head), column 0 */
    int64_t k_stride, v_stride; /* between columns, in elements */
    const int64_t *column;      /* [n_tokens] which column of the call each token is */
    int64_t slot, n_tokens;
} lk_run;

/* Here `page` and `twin` are the regions of head g in them (lk_region); NULL where there is none. */

/* Write a run of head g. twin NULL: dropped channels are not stored (nor V, if the head is empty). */
void lk_pack_store(const lk_geom *geom, int32_t g, const lk_run *run, unsigned char *page,
                   unsigned char *twin);

/* Start to load the cache lines that storing one token of head g into slot j writes: one line per channel or pair of
 * channels, which stores alone would wait for nearly one by one. */
void lk_pack_prefetch(const lk_geom *geom, int32_t g, int64_t j, unsigned char *page,
                      unsigned char *twin);

/* Read slots slot..slot + n_tokens - 1 of head g into k [n_tokens, D] and v [n_tokens, Dv]; elements that neither
 * page nor twin holds stay as they are. Either may be NULL. */
void lk_pack_load(const lk_geom *geom, int32_t g, int64_t slot, int64_t n_tokens,
                  const unsigned char *page, const unsigned char *twin, unsigned char *k,
                  unsigned char *v);

#endif
