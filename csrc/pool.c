/* pool.c: geometry of a layer's pages and twins, and the slabs that they live in. */
#include "lk_pool.h"

#include <string.h>

/* Slabs are this large at most (a page that is larger has one of its own). */
#define SLAB_BYTES_MAX ((size_t)16 << 20)
/* A slab that a growing cache adds is larger than asked for by this share of what is live: few slabs, and
 * never more than 1% of unused memory. */
#define SLAB_GROWTH_SHARE 128

struct lk_slab {
    lk_arena *arena;
    struct lk_slab *next, *prev; /* in arena->open, if listed: it has a free item */
    unsigned char *data;
    int64_t n_items, n_used;
    lk_page *free; /* linked through lk_page.next_free */
    bool listed;
    lk_page item[];
};

/* -------------------------------------------------------------------------------------- geometry */

/* The arrays of a geometry lie in one block: each call meets them cold, and one block is one translation. */
static lk_status geom_alloc(lk_geom *geom, size_t n_heads, size_t head_dim) {
    const size_t n_sizes = 2 * (n_heads + 1) + n_heads;
    size_t *sizes = lk_alloc(1, n_sizes * sizeof(size_t) + n_heads * sizeof(int32_t) +
                                    n_heads * head_dim * sizeof(uint16_t));
    LK_CHECK(sizes, LK_E_NOMEM);
    geom->page_off = sizes;
    geom->twin_off = geom->page_off + n_heads + 1;
    geom->v_off = geom->twin_off + n_heads + 1;
    geom->n_kept = (int32_t *)(void *)(sizes + n_sizes);
    geom->order = (uint16_t *)(void *)(geom->n_kept + n_heads);
    return LK_OK;
}

static void geom_clear(lk_geom *geom) { lk_dealloc(geom->page_off); }

static lk_status geom_check(const lk_config *config) {
    LK_CHECK(lk_dtype_bytes(config->dtype) != 0, LK_E_VALUE);
    LK_CHECK(config->n_heads > 0 && config->n_heads <= INT16_MAX, LK_E_SHAPE);
    LK_CHECK(config->v_dim > 0 && config->v_dim <= LK_MAX_HEAD_DIM, LK_E_SHAPE);
    LK_CHECK(config->v_dim % LK_CHANNEL_STEP == 0, LK_E_SHAPE);
    LK_CHECK(config->sink >= 0 && config->recent >= 1 && config->slack >= 0, LK_E_VALUE);
    /* Positions, windows and their sums then stay far from overflow. */
    const int64_t most = INT64_MAX / 8;
    LK_CHECK(config->sink < most && config->recent < most && config->slack < most, LK_E_VALUE);
    int64_t bad_head;
    return lk_mask_check(config->keep, config->n_heads, config->head_dim, LK_CHANNEL_STEP,
                         &bad_head);
}

static lk_status geom_init(lk_geom *geom, const lk_config *config) {
    LK_TRY(geom_check(config));
    const size_t n_heads = (size_t)config->n_heads, head_dim = (size_t)config->head_dim;
    *geom = (lk_geom){
        .dtype = config->dtype,
        .n_heads = config->n_heads,
        .head_dim = config->head_dim,
        .v_dim = config->v_dim,
        .group = config->dtype == LK_BF16 ? 2 : 1,
        .elem_bytes = lk_dtype_bytes(config->dtype),
        .sink = config->sink,
        .recent = config->recent,
        .slack = config->slack,
    };
    LK_TRY(geom_alloc(geom, n_heads, head_dim));
    /* At most 2^15 heads * 2^9 channels * 64 tokens * 4 bytes: no overflow in size_t. */
    const size_t channel_bytes = LK_PAGE_TOKENS * geom->elem_bytes;
    const size_t v_bytes = channel_bytes * (size_t)config->v_dim;
    for (size_t g = 0; g < n_heads; g++) {
        int32_t order[LK_MAX_HEAD_DIM];
        const int32_t n_kept = lk_mask_order(config->keep + g * head_dim, config->head_dim, order);
        for (size_t c = 0; c < head_dim; c++) geom->order[g * head_dim + c] = (uint16_t)order[c];
        const size_t kept_bytes = channel_bytes * (size_t)n_kept;
        const size_t dropped_bytes = channel_bytes * (head_dim - (size_t)n_kept);
        geom->n_kept[g] = n_kept;
        geom->page_bytes += kept_bytes + (n_kept > 0 ? v_bytes : 0);
        geom->twin_bytes += dropped_bytes + (n_kept > 0 ? 0 : v_bytes);
        geom->page_k_bytes += kept_bytes;
        geom->twin_k_bytes += dropped_bytes;
        geom->page_off[g + 1] = geom->page_bytes;
        geom->twin_off[g + 1] = geom->twin_bytes;
        geom->v_off[g] = n_kept > 0 ? kept_bytes : dropped_bytes;
    }
    return LK_OK;
}

/* ------------------------------------------------------------------------------------------ slabs */

static void slab_list(lk_arena *arena, struct lk_slab *slab) {
    slab->prev = NULL;
    slab->next = arena->open;
    if (arena->open) arena->open->prev = slab;
    arena->open = slab;
    slab->listed = true;
}

static void slab_unlist(lk_arena *arena, struct lk_slab *slab) {
    if (slab->prev) slab->prev->next = slab->next;
    else arena->open = slab->next;
    if (slab->next) slab->next->prev = slab->prev;
    slab->listed = false;
}

static lk_status arena_grow(lk_arena *arena, int64_t n_items) {
    size_t data_bytes, item_bytes;
    LK_CHECK(lk_mul((size_t)n_items, arena->item_bytes, &data_bytes), LK_E_NOMEM);
    LK_CHECK(lk_mul((size_t)n_items, sizeof(lk_page), &item_bytes), LK_E_NOMEM);
    LK_CHECK(item_bytes <= SIZE_MAX - sizeof(struct lk_slab), LK_E_NOMEM);
    struct lk_slab *slab = lk_alloc(1, sizeof *slab + item_bytes);
    LK_CHECK(slab, LK_E_NOMEM);
    if (arena->item_bytes) {
        slab->data = lk_alloc_pages(data_bytes);
        if (!slab->data) {
            lk_dealloc(slab);
            return LK_E_NOMEM;
        }
    }
    slab->arena = arena;
    slab->n_items = n_items;
    for (int64_t i = n_items - 1; i >= 0; i--) {
        lk_page *page = &slab->item[i];
        page->slab_data = slab->data;
        page->slab_items = (size_t)n_items;
        page->slab_index = (size_t)i;
        page->slab = slab;
        page->next_free = slab->free;
        slab->free = page;
    }
    slab_list(arena, slab);
    arena->n_items += n_items;
    arena->n_free += n_items;
    return LK_OK;
}

/* Give an unused slab back if the arena may do without it. */
static void arena_shrink(lk_arena *arena, struct lk_slab *slab) {
    if (slab->n_used > 0 || arena->n_items - slab->n_items < arena->reserved) return;
    slab_unlist(arena, slab);
    arena->n_items -= slab->n_items;
    arena->n_free -= slab->n_items;
    lk_dealloc(slab->data);
    lk_dealloc(slab);
}

static void arena_shrink_all(lk_arena *arena) {
    for (struct lk_slab *slab = arena->open, *next; slab; slab = next) {
        next = slab->next;
        arena_shrink(arena, slab);
    }
}

/* Grow until `n` items are free. `extra` items more are welcome in the last slab. */
static lk_status arena_fill(lk_arena *arena, int64_t n, int64_t extra) {
    const int64_t per_slab =
        arena->item_bytes ? lk_max(1, (int64_t)(SLAB_BYTES_MAX / arena->item_bytes)) : 1024;
    while (arena->n_free < n) {
        const lk_status status = arena_grow(arena, lk_min(per_slab, n - arena->n_free + extra));
        if (status != LK_OK) {
            arena_shrink_all(arena);
            return status;
        }
    }
    return LK_OK;
}

static lk_page *arena_pop(lk_arena *arena) {
    struct lk_slab *slab = arena->open;
    lk_page *page = slab->free;
    slab->free = page->next_free;
    slab->n_used++;
    if (!slab->free) slab_unlist(arena, slab);
    arena->n_free--;
    page->next_free = NULL;
    page->mark = 0;
    atomic_store_explicit(&page->refs, 1, memory_order_relaxed);
    return page;
}

static void arena_push(lk_page *page) {
    struct lk_slab *slab = page->slab;
    lk_arena *arena = slab->arena;
    page->next_free = slab->free;
    slab->free = page;
    slab->n_used--;
    if (!slab->listed) slab_list(arena, slab);
    arena->n_free++;
    arena_shrink(arena, slab);
}

/* ------------------------------------------------------------------------------------------- pool */

lk_status lk_pool_create(const lk_config *config, lk_pool **out) {
    lk_pool *pool = lk_alloc(1, sizeof *pool);
    LK_CHECK(pool, LK_E_NOMEM);
    lk_status status = geom_init(&pool->geom, config);
    if (status == LK_OK && pthread_mutex_init(&pool->lock, NULL) != 0) {
        geom_clear(&pool->geom);
        status = LK_E_NOMEM;
    }
    if (status != LK_OK) {
        lk_dealloc(pool);
        return status;
    }
    pool->pages.item_bytes = pool->geom.page_bytes;
    for (int kind = 0; kind < LK_N_TWIN_KINDS; kind++)
        pool->twins[kind].item_bytes = pool->geom.twin_bytes;
    atomic_store(&pool->refs, 1);
    *out = pool;
    return LK_OK;
}

void lk_pool_retain(lk_pool *pool) { atomic_fetch_add(&pool->refs, 1); }

void lk_pool_release(lk_pool *pool) {
    if (!pool || atomic_fetch_sub(&pool->refs, 1) != 1) return;
    /* Every row table is gone, so every item is free and every slab is listed. */
    lk_arena *arenas[] = {&pool->pages, &pool->twins[0], &pool->twins[1], &pool->twins[2]};
    for (int i = 0; i < 1 + LK_N_TWIN_KINDS; i++) {
        arenas[i]->reserved = 0;
        arena_shrink_all(arenas[i]);
    }
    pthread_mutex_destroy(&pool->lock);
    geom_clear(&pool->geom);
    lk_dealloc(pool);
}

static void poison(const lk_pool *pool, const lk_arena *arena, const lk_page *page) {
    const lk_geom *geom = &pool->geom;
    const size_t *off = arena == &pool->pages ? geom->page_off : geom->twin_off;
    for (int32_t g = 0; g < geom->n_heads; g++) {
        unsigned char *region = lk_region(page, off, g);
        if (region) memset(region, 0xff, off[g + 1] - off[g]);
    }
}

lk_status lk_pool_take(lk_pool *pool, lk_arena *arena, int64_t n, lk_page **out) {
    if (n == 0) return LK_OK;
    pthread_mutex_lock(&pool->lock);
    const lk_status status =
        arena_fill(arena, n, (arena->n_items - arena->n_free) / SLAB_GROWTH_SHARE);
    if (status == LK_OK)
        for (int64_t i = 0; i < n; i++) out[i] = arena_pop(arena);
    pthread_mutex_unlock(&pool->lock);
    if (status == LK_OK && lk_poison_on())
        for (int64_t i = 0; i < n; i++) poison(pool, arena, out[i]);
    return status;
}

void lk_page_retain(lk_page *page) {
    atomic_fetch_add_explicit(&page->refs, 1, memory_order_relaxed);
}

void lk_page_release(lk_pool *pool, lk_page *page) {
    if (!page || atomic_fetch_sub_explicit(&page->refs, 1, memory_order_acq_rel) != 1) return;
    pthread_mutex_lock(&pool->lock);
    arena_push(page);
    pthread_mutex_unlock(&pool->lock);
}

lk_status lk_pool_reserve(lk_pool *pool, lk_arena *arena, int64_t n) {
    pthread_mutex_lock(&pool->lock);
    lk_status status = LK_OK;
    /* Items in use by rows that count in the reservation are part of it, so what must be there is the sum. */
    const int64_t wanted = arena->reserved + n;
    /* One slab, so that a size beyond this machine is refused at once instead of filling its memory. */
    if (wanted > arena->n_items) status = arena_grow(arena, wanted - arena->n_items);
    if (status == LK_OK) arena->reserved = wanted;
    if (n < 0) arena_shrink_all(arena);
    pthread_mutex_unlock(&pool->lock);
    return status;
}
