/* attend.c: the whole step of a layer in its one right order: store, attend, retire. */
#include "lk_internal.h"

lk_status lk_attend(lk_cache *cache, const lk_span *span, const lk_decode_args *args) {
    const int64_t n_columns = cache->n_columns;
    LK_CHECK(args->cache == cache && args->n_columns == span->n_columns, LK_E_SHAPE);
    lk_span limited = *span;
    limited.n_threads = args->n_threads;
    LK_TRY(lk_cache_put(cache, &limited));
    const lk_status status = lk_decode(args);
    if (status == LK_OK) lk_cache_settle(cache);
    else lk_cache_undo(cache, n_columns);
    return status;
}
