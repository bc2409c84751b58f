/* cache.c: rows of pages and twins: create, free, copy, select, crop. What adds to rows is in append.c.
 *
 * In every call that can fail, what may fail comes first and changes nothing that a caller can see. */
#include "lk_pool.h"

#include <string.h>

/* ----------------------------------------------------------------------------------------- one row */

static void row_clear(lk_cache *cache, lk_row *row) {
    for (int64_t i = 0; i < row->n_pages; i++) {
        lk_page_release(cache->pool, row->page[i]);
        lk_page_release(cache->pool, row->twin[i]);
    }
    lk_dealloc(row->page);
    lk_dealloc(row->twin);
    lk_dealloc(row->real);
    *row = (lk_row){0};
}

/* A row that shares the pages of `from`. */
static lk_status row_share(const lk_cache *cache, const lk_row *from, lk_row *to) {
    lk_row row = *from;
    row.page = lk_alloc((size_t)row.capacity, sizeof *row.page);
    row.twin = lk_alloc((size_t)row.capacity, sizeof *row.twin);
    row.real = lk_alloc((size_t)cache->column_capacity, 1);
    if (!row.page || !row.twin || !row.real) {
        lk_dealloc(row.page);
        lk_dealloc(row.twin);
        lk_dealloc(row.real);
        return LK_E_NOMEM;
    }
    for (int64_t i = 0; i < row.n_pages; i++) {
        row.page[i] = from->page[i];
        row.twin[i] = from->twin[i];
        lk_page_retain(row.page[i]);
        if (row.twin[i]) lk_page_retain(row.twin[i]);
    }
    if (cache->n_columns) memcpy(row.real, from->real, (size_t)cache->n_columns);
    *to = row;
    return LK_OK;
}

static int64_t count_real(const lk_row *row, int64_t n_columns) {
    int64_t n = 0;
    for (int64_t i = 0; i < n_columns; i++) n += row->real[i];
    return n;
}

int64_t lk_row_prompt(const lk_cache *cache, int64_t b) {
    const lk_row *row = &cache->row[b];
    if (row->n0 != LK_PROMPT_OPEN) return row->n0;
    if (cache->n_columns < cache->prompt_columns || row->len == 0) return LK_PROMPT_OPEN;
    const int64_t announced =
        cache->prompt_columns > 0 ? count_real(row, cache->prompt_columns) : 0;
    return announced > 0 ? announced : row->len;
}

/* ---------------------------------------------------------------------------------------- lifetime */

lk_reservation lk_reserved_per_row(const lk_geom *geom, int64_t max_tokens, int64_t max_call) {
    lk_reservation row = {.n_pages = lk_ceil_div(max_tokens, LK_PAGE_TOKENS)};
    if (geom->twin_bytes == 0) return row;
    const int64_t window = geom->recent + geom->slack + max_call;
    row.n_sink_twins = lk_min(row.n_pages, lk_ceil_div(geom->sink, LK_PAGE_TOKENS));
    row.n_recent_twins =
        lk_min(row.n_pages - row.n_sink_twins, lk_ceil_div(window, LK_PAGE_TOKENS) + 1);
    return row;
}

/* Take (n_rows > 0) or give back (n_rows < 0) what that many rows reserve; giving back cannot fail. */
static lk_status reserve_rows(lk_cache *cache, int64_t n_rows) {
    if (cache->max_tokens < 0 || n_rows == 0) return LK_OK;
    const lk_reservation row = lk_reserved_per_row(cache->geom, cache->max_tokens, cache->max_call);
    lk_pool *pool = cache->pool;
    lk_arena *arena[3] = {&pool->pages, &pool->twins[LK_TWIN_SINK], &pool->twins[LK_TWIN_RECENT]};
    const int64_t per_row[3] = {row.n_pages, row.n_sink_twins, row.n_recent_twins};
    lk_status status = LK_OK;
    for (int i = 0; i < 3 && status == LK_OK; i++) {
        int64_t n;
        if (__builtin_mul_overflow(per_row[i], n_rows, &n)) status = LK_E_SHAPE;
        else status = lk_pool_reserve(pool, arena[i], n);
        for (int done = 0; status != LK_OK && done < i; done++)
            (void)lk_pool_reserve(pool, arena[done], -per_row[done] * n_rows);
    }
    return status;
}

/* A cache with empty rows over `pool`, which it takes over (also on failure). */
static lk_status cache_create(lk_pool *pool, int64_t n_rows, int64_t max_tokens, int64_t max_call,
                              lk_cache **out) {
    lk_cache *cache = lk_alloc(1, sizeof *cache);
    if (!cache) {
        lk_pool_release(pool);
        return LK_E_NOMEM;
    }
    *cache = (lk_cache){.pool = pool,
                        .geom = &pool->geom,
                        .prompt_columns = -1,
                        .max_tokens = max_tokens,
                        .max_call = max_call};
    lk_status status = LK_OK;
    cache->row = lk_alloc((size_t)n_rows, sizeof *cache->row);
    if (!cache->row) status = LK_E_NOMEM;
    if (status == LK_OK) status = reserve_rows(cache, n_rows);
    if (status != LK_OK) {
        lk_cache_free(cache);
        return status;
    }
    cache->n_rows = n_rows;
    for (int64_t b = 0; b < n_rows; b++)
        cache->row[b] =
            (lk_row){.lo = cache->geom->sink, .n0 = LK_PROMPT_OPEN, .held = LK_NOT_HELD};
    *out = cache;
    return LK_OK;
}

lk_status lk_cache_create(const lk_config *config, int64_t n_rows, lk_cache **out) {
    LK_CHECK(n_rows >= 1 && n_rows <= INT32_MAX, LK_E_SHAPE);
    lk_pool *pool;
    LK_TRY(lk_pool_create(config, &pool));
    return cache_create(pool, n_rows, -1, -1, out);
}

lk_status lk_cache_create_reserved(const lk_config *config, int64_t n_rows, int64_t max_tokens,
                                   int64_t max_call, lk_cache **out) {
    LK_CHECK(n_rows >= 1 && n_rows <= INT32_MAX, LK_E_SHAPE);
    LK_CHECK(max_tokens >= 1 && max_tokens < INT64_MAX / 8, LK_E_VALUE);
    LK_CHECK(max_call >= 1 && max_call < INT64_MAX / 8, LK_E_VALUE);
    lk_pool *pool;
    LK_TRY(lk_pool_create(config, &pool));
    lk_cache *cache;
    LK_TRY(cache_create(pool, n_rows, max_tokens, max_call, &cache));
    for (int64_t b = 0; b < n_rows; b++) {
        const lk_status status =
            lk_row_grow_tables(&cache->row[b], lk_ceil_div(max_tokens, LK_PAGE_TOKENS));
        if (status != LK_OK) {
            lk_cache_free(cache);
            return status;
        }
    }
    *out = cache;
    return LK_OK;
}

void lk_cache_free(lk_cache *cache) {
    if (!cache) return;
    lk_forget_replaced(cache);
    for (int64_t b = 0; b < cache->n_rows; b++) row_clear(cache, &cache->row[b]);
    (void)reserve_rows(cache, -cache->n_rows); /* giving back cannot fail */
    lk_dealloc(cache->row);
    lk_pool_release(cache->pool);
    lk_dealloc(cache);
}

lk_status lk_cache_copy(const lk_cache *cache, lk_cache **out) {
    lk_cache *copy;
    lk_pool_retain(cache->pool);
    LK_TRY(cache_create(cache->pool, cache->n_rows, cache->max_tokens, cache->max_call, &copy));
    copy->n_columns = cache->n_columns;
    copy->column_capacity = cache->column_capacity;
    copy->prompt_columns = cache->prompt_columns;
    for (int64_t b = 0; b < cache->n_rows; b++) {
        const lk_status status = row_share(cache, &cache->row[b], &copy->row[b]);
        if (status != LK_OK) {
            lk_cache_free(copy);
            return status;
        }
    }
    *out = copy;
    return LK_OK;
}

lk_status lk_cache_select(lk_cache *cache, const int64_t *rows, int64_t n_rows) {
    LK_CHECK(n_rows >= 1 && n_rows <= INT32_MAX, LK_E_SHAPE);
    for (int64_t i = 0; i < n_rows; i++)
        LK_CHECK(rows[i] >= 0 && rows[i] < cache->n_rows, LK_E_VALUE);
    lk_row *selected = lk_alloc((size_t)n_rows, sizeof *selected);
    bool *moved = lk_alloc((size_t)cache->n_rows, sizeof *moved);
    lk_status status = selected && moved ? LK_OK : LK_E_NOMEM;
    if (status == LK_OK && n_rows > cache->n_rows)
        status = reserve_rows(cache, n_rows - cache->n_rows);
    if (status != LK_OK) {
        lk_dealloc(selected);
        lk_dealloc(moved);
        return status;
    }
    /* A row moves to its first new place and is shared with the others; what may fail comes first. */
    for (int64_t i = 0; i < n_rows && status == LK_OK; i++) {
        if (moved[rows[i]]) status = row_share(cache, &cache->row[rows[i]], &selected[i]);
        moved[rows[i]] = true;
    }
    if (status != LK_OK) {
        for (int64_t i = 0; i < n_rows; i++) row_clear(cache, &selected[i]);
        if (n_rows > cache->n_rows) (void)reserve_rows(cache, cache->n_rows - n_rows);
        lk_dealloc(selected);
        lk_dealloc(moved);
        return status;
    }
    for (int64_t i = 0; i < n_rows; i++) {
        if (!moved[rows[i]]) continue;
        moved[rows[i]] = false;
        selected[i] = cache->row[rows[i]];
        cache->row[rows[i]] = (lk_row){0};
    }
    for (int64_t b = 0; b < cache->n_rows; b++) row_clear(cache, &cache->row[b]);
    if (n_rows < cache->n_rows) (void)reserve_rows(cache, n_rows - cache->n_rows);
    lk_dealloc(cache->row);
    lk_dealloc(moved);
    cache->row = selected;
    cache->n_rows = n_rows;
    return LK_OK;
}

/* ------------------------------------------------------------------------- prompt, hold and crop */

lk_status lk_cache_expect_prompt(lk_cache *cache, int64_t n_columns) {
    LK_CHECK(n_columns >= 1, LK_E_VALUE);
    LK_CHECK(cache->n_columns == 0, LK_E_STATE);
    cache->prompt_columns = n_columns;
    return LK_OK;
}

lk_status lk_cache_hold(lk_cache *cache, int on) {
    LK_CHECK(cache->max_tokens < 0 && !cache->unsettled, LK_E_STATE);
    for (int64_t b = 0; b < cache->n_rows; b++)
        cache->row[b].held = on ? cache->row[b].len : LK_NOT_HELD;
    lk_cache_settle(cache);
    return LK_OK;
}

lk_status lk_cache_crop(lk_cache *cache, int64_t n_columns) {
    LK_CHECK(n_columns >= 0 && n_columns <= cache->n_columns, LK_E_VALUE);
    const int64_t sink = cache->geom->sink;
    for (int64_t b = 0; b < cache->n_rows; b++) {
        lk_row *row = &cache->row[b];
        row->len = count_real(row, n_columns);
        row->lo = lk_max(sink, lk_min(row->lo, row->len));
        if (row->len == 0) row->n0 = LK_PROMPT_OPEN;
        while (row->n_pages > lk_ceil_div(row->len, LK_PAGE_TOKENS)) {
            const int64_t i = --row->n_pages;
            lk_page_release(cache->pool, row->page[i]);
            lk_page_release(cache->pool, row->twin[i]);
        }
    }
    cache->n_columns = n_columns;
    if (n_columns == 0) cache->prompt_columns = -1;
    return LK_OK;
}
