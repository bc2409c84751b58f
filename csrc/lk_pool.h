/* lk_pool.h: pages and twins of a layer: geometry, slabs, reference counts. Used by the files of the
 * cache. */
#ifndef LK_POOL_H
#define LK_POOL_H

#include "lk_internal.h"

#include <pthread.h>

/* Items of one size in slabs. A slab is one allocation; it goes back when its last item does, unless the
 * arena would then hold fewer than `reserved` items. Items that are freed together should come from one arena:
 * a single long-lived one keeps its whole slab. */
typedef struct {
    size_t item_bytes;
    struct lk_slab *open;    /* slabs with a free item */
    int64_t n_items, n_free; /* in all slabs */
    int64_t reserved;
} lk_arena;

/* Twins by how long they live: those of the sink as long as the row, those of recent tokens until the row has
 * grown by W + slack, passing ones (old tokens of an unfinished prompt or of the call at hand) until it is settled. */
enum { LK_TWIN_SINK, LK_TWIN_RECENT, LK_TWIN_PASSING, LK_N_TWIN_KINDS };

/* What cache copies share. The lock guards the arenas, `stamp` and the pages' marks. */
typedef struct lk_pool {
    lk_geom geom;
    pthread_mutex_t lock;
    lk_arena pages;
    lk_arena twins[LK_N_TWIN_KINDS];
    uint64_t stamp;
    atomic_int_fast32_t refs; /* cache objects */
} lk_pool;

lk_status lk_pool_create(const lk_config *config, lk_pool **out);
void lk_pool_retain(lk_pool *pool);
void lk_pool_release(lk_pool *pool);

/* n items, each with one reference, into out[]; all or none. */
lk_status lk_pool_take(lk_pool *pool, lk_arena *arena, int64_t n, lk_page **out);
void lk_page_retain(lk_page *page);
/* Accepts NULL. */
void lk_page_release(lk_pool *pool, lk_page *page);
/* Only this cache holds it, so it may be written. */
static inline bool lk_page_mine(const lk_page *page) {
    return atomic_load_explicit(&page->refs, memory_order_acquire) == 1;
}

/* Raise (n > 0) or lower the number of items that the arena keeps ready for reserved caches. */
lk_status lk_pool_reserve(lk_pool *pool, lk_arena *arena, int64_t n);

#endif
