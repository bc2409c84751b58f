/* cache_report.c: what a cache holds: lengths, contents back in dense form, bytes now and in advance. */
#include "lk_pack.h"
#include "lk_pool.h"

#include <string.h>

int64_t lk_cache_n_rows(const lk_cache *cache) { return cache->n_rows; }
int64_t lk_cache_n_columns(const lk_cache *cache) { return cache->n_columns; }
int64_t lk_cache_length(const lk_cache *cache, int64_t row) { return cache->row[row].len; }
int64_t lk_cache_lo(const lk_cache *cache, int64_t row) { return cache->row[row].lo; }

int64_t lk_cache_prompt(const lk_cache *cache, int64_t row) {
    const int64_t n0 = cache->row[row].n0;
    return n0 == LK_PROMPT_OPEN ? -1 : n0;
}

void lk_cache_real(const lk_cache *cache, int64_t row, uint8_t *real) {
    if (cache->n_columns) memcpy(real, cache->row[row].real, (size_t)cache->n_columns);
}

lk_status lk_cache_gather(const lk_cache *cache, int64_t b, void *k, void *v) {
    LK_CHECK(b >= 0 && b < cache->n_rows, LK_E_VALUE);
    const lk_geom *geom = cache->geom;
    const lk_row *row = &cache->row[b];
    const size_t k_token = (size_t)geom->head_dim * geom->elem_bytes;
    const size_t v_token = (size_t)geom->v_dim * geom->elem_bytes;
    /* All bits set is a NaN in f32, bf16 and f16 alike. */
    memset(k, 0xff, (size_t)geom->n_heads * (size_t)row->len * k_token);
    memset(v, 0xff, (size_t)geom->n_heads * (size_t)row->len * v_token);
    for (int32_t g = 0; g < geom->n_heads; g++) {
        for (int64_t i = 0; i < row->n_pages; i++) {
            const int64_t base = i * LK_PAGE_TOKENS;
            const int64_t n = lk_min(LK_PAGE_TOKENS, row->len - base);
            const unsigned char *page = lk_region(row->page[i], geom->page_off, g);
            const unsigned char *twin =
                row->twin[i] ? lk_region(row->twin[i], geom->twin_off, g) : NULL;
            /* Slots [from, to) are middle: what a twin may still hold of them does not count as stored. */
            const int64_t from = lk_max(0, lk_min(geom->sink - base, n));
            const int64_t to = lk_max(from, lk_min(row->lo - base, n));
            const int64_t edge[4] = {0, from, to, n};
            for (int part = 0; part < 3; part++) {
                const int64_t slot = edge[part], at = (int64_t)g * row->len + base + slot;
                lk_pack_load(geom, g, slot, edge[part + 1] - slot, page, part == 1 ? NULL : twin,
                             (unsigned char *)k + (size_t)at * k_token,
                             (unsigned char *)v + (size_t)at * v_token);
            }
        }
    }
    return LK_OK;
}

/* Whether n_rows * n_items items of item_bytes can be counted at all. */
static bool countable(int64_t n_rows, int64_t n_items, size_t item_bytes) {
    size_t n, bytes;
    return lk_mul((size_t)n_rows, (size_t)n_items, &n) && n < INT64_MAX / 4 &&
           lk_mul(n, item_bytes, &bytes) && bytes < SIZE_MAX / 4;
}

static lk_memory memory_of(const lk_geom *geom, int64_t n_pages, int64_t n_twins) {
    lk_memory memory = {.n_pages = n_pages, .n_twins = n_twins};
    memory.k_bytes = (size_t)n_pages * geom->page_k_bytes + (size_t)n_twins * geom->twin_k_bytes;
    memory.v_bytes = (size_t)n_pages * (geom->page_bytes - geom->page_k_bytes) +
                     (size_t)n_twins * (geom->twin_bytes - geom->twin_k_bytes);
    memory.slab_bytes = memory.k_bytes + memory.v_bytes;
    return memory;
}

/* 1 the first time in this walk that the page is met; the caller holds the lock. */
static int64_t first_visit(lk_page *page, uint64_t stamp) {
    if (!page || page->mark == stamp) return 0;
    page->mark = stamp;
    return 1;
}

lk_memory lk_cache_memory(const lk_cache *cache) {
    lk_pool *pool = cache->pool;
    int64_t n_pages = 0, n_twins = 0;
    pthread_mutex_lock(&pool->lock);
    const uint64_t stamp = ++pool->stamp;
    for (int64_t b = 0; b < cache->n_rows; b++) {
        for (int64_t i = 0; i < cache->row[b].n_pages; i++) {
            n_pages += first_visit(cache->row[b].page[i], stamp);
            n_twins += first_visit(cache->row[b].twin[i], stamp);
        }
    }
    size_t slab_bytes = (size_t)pool->pages.n_items * pool->pages.item_bytes;
    for (int kind = 0; kind < LK_N_TWIN_KINDS; kind++)
        slab_bytes += (size_t)pool->twins[kind].n_items * pool->twins[kind].item_bytes;
    pthread_mutex_unlock(&pool->lock);
    if (cache->max_tokens >= 0) {
        const lk_reservation row =
            lk_reserved_per_row(cache->geom, cache->max_tokens, cache->max_call);
        n_pages = lk_max(n_pages, cache->n_rows * row.n_pages);
        n_twins = lk_max(n_twins, cache->n_rows * (row.n_sink_twins + row.n_recent_twins));
    }
    lk_memory memory = memory_of(cache->geom, n_pages, n_twins);
    memory.slab_bytes = slab_bytes;
    return memory;
}

lk_status lk_predict_memory(const lk_config *config, const int64_t *lengths, int64_t n_rows,
                            int64_t max_tokens, int64_t max_call, lk_memory *out) {
    LK_CHECK(n_rows >= 0 && n_rows <= INT32_MAX, LK_E_SHAPE);
    LK_CHECK(max_tokens < INT64_MAX / 8 && max_call < INT64_MAX / 8, LK_E_VALUE);
    for (int64_t b = 0; b < n_rows && max_tokens < 0; b++)
        LK_CHECK(lengths[b] >= 0 && lengths[b] < INT64_MAX / 8, LK_E_VALUE);
    LK_CHECK(max_tokens < 0 || max_call >= 1, LK_E_VALUE);
    lk_pool *pool; /* nothing is taken from it: it is the way to a checked geometry */
    LK_TRY(lk_pool_create(config, &pool));
    const lk_geom *geom = &pool->geom;
    int64_t n_pages = 0, n_twins = 0, longest = lk_max(0, max_tokens);
    for (int64_t b = 0; b < n_rows && max_tokens < 0; b++) longest = lk_max(longest, lengths[b]);
    const int64_t most_pages = lk_ceil_div(longest, LK_PAGE_TOKENS);
    if (!countable(n_rows, most_pages, geom->page_bytes + geom->twin_bytes)) {
        lk_pool_release(pool);
        return LK_E_SHAPE;
    }
    if (max_tokens >= 0) {
        const lk_reservation row = lk_reserved_per_row(geom, max_tokens, max_call);
        n_pages = n_rows * row.n_pages;
        n_twins = n_rows * (row.n_sink_twins + row.n_recent_twins);
    }
    for (int64_t b = 0; b < n_rows && max_tokens < 0; b++) {
        const int64_t pages = lk_ceil_div(lengths[b], LK_PAGE_TOKENS);
        const int64_t sink_pages = lk_min(pages, lk_ceil_div(geom->sink, LK_PAGE_TOKENS));
        const int64_t first = lk_settled_lo(geom, 0, lengths[b]) / LK_PAGE_TOKENS;
        n_pages += pages;
        if (geom->twin_bytes) n_twins += sink_pages + lk_max(0, pages - lk_max(first, sink_pages));
    }
    *out = memory_of(geom, n_pages, n_twins);
    lk_pool_release(pool);
    return LK_OK;
}
