/* append.c: new tokens into pages and twins, and what happens to dropped channels after them.
 *
 * An append works in two steps: count and take what is needed (tables, pages), which may fail and changes nothing
 * that a caller can see, then write, which cannot fail. */
#include "lk_pack.h"
#include "lk_pool.h"

#include <string.h>

/* From this many elements on, a call's tokens are packed by several threads. */
#define PARALLEL_PACK_ELEMS (1 << 18)

/* ------------------------------------------------------------------------------------------ tables */

/* A larger block with the first n_used items of the old one, which is freed; NULL, and the old one stays. */
static void *grow(void *old, size_t item_bytes, int64_t n_used, int64_t n_wanted) {
    void *larger = lk_alloc((size_t)n_wanted, item_bytes);
    if (!larger) return NULL;
    if (n_used > 0) memcpy(larger, old, (size_t)n_used * item_bytes);
    lk_dealloc(old);
    return larger;
}

/* Half as much again as asked for, so that one token at a time stays cheap. */
lk_status lk_row_grow_tables(lk_row *row, int64_t n_pages) {
    if (n_pages <= row->capacity) return LK_OK;
    const int64_t capacity = lk_max(n_pages, row->capacity + row->capacity / 2 + 4);
    lk_page **page = grow(row->page, sizeof *page, row->n_pages, capacity);
    if (page) row->page = page;
    lk_page **twin = page ? grow(row->twin, sizeof *twin, row->n_pages, capacity) : NULL;
    LK_CHECK(twin, LK_E_NOMEM);
    row->twin = twin;
    row->capacity = capacity;
    return LK_OK;
}

static lk_status grow_columns(lk_cache *cache, int64_t n_columns) {
    if (n_columns <= cache->column_capacity) return LK_OK;
    const int64_t capacity =
        lk_max(n_columns, cache->column_capacity + cache->column_capacity / 2 + 64);
    for (int64_t b = 0; b < cache->n_rows; b++) {
        uint8_t *real = grow(cache->row[b].real, 1, cache->n_columns, capacity);
        LK_CHECK(real, LK_E_NOMEM);
        cache->row[b].real = real;
    }
    cache->column_capacity = capacity;
    return LK_OK;
}

int64_t lk_settled_lo(const lk_geom *geom, int64_t lo, int64_t len) {
    const int64_t old = lk_max(0, len - geom->recent - geom->slack);
    return lk_max(lk_max(lo, geom->sink), old / LK_PAGE_TOKENS * LK_PAGE_TOKENS);
}

/* How long a row of len tokens and prompt n0 is for lo: a held one may be cropped again to what follows its prompt. */
static int64_t len_for_lo(const lk_row *row, int64_t n0, int64_t len) {
    return lk_min(len, lk_max(row->held, n0));
}

/* Whether page i keeps its dropped channels, given lo. */
static bool twin_stays(const lk_geom *geom, int64_t i, int64_t lo) {
    return i * LK_PAGE_TOKENS < geom->sink || (i + 1) * LK_PAGE_TOKENS > lo;
}

/* -------------------------------------------------------------------------------------------- plan */

/* What one row gets from one call. Pages first..end - 1 are touched. */
typedef struct {
    int64_t n_new, first, end;
    int64_t twin_lo;    /* lo that decides which twins are written */
    int64_t settled_lo; /* lo, as far as one can tell, once the prompt is complete and settled */
    bool reserved;      /* all twins of this call are part of the reservation */
    const int64_t *column;
} row_plan;

/* How many items a call takes, and how many of them take the place of others. */
typedef struct {
    int64_t n_pages, n_twins[LK_N_TWIN_KINDS], n_replaced;
} demand;

static bool twin_wanted(const lk_geom *geom, const row_plan *plan, int64_t i) {
    return geom->twin_bytes > 0 && twin_stays(geom, i, plan->twin_lo);
}

static int twin_kind(const lk_geom *geom, const row_plan *plan, int64_t i) {
    if (i * LK_PAGE_TOKENS < geom->sink) return LK_TWIN_SINK;
    const bool recent = plan->reserved || twin_stays(geom, i, plan->settled_lo);
    return recent ? LK_TWIN_RECENT : LK_TWIN_PASSING;
}

/* Whether the row needs a new item at i: it has none yet, or shares the one it has. */
static bool needs_item(lk_page *const *table, const lk_row *row, int64_t i) {
    return i >= row->n_pages || !table[i] || !lk_page_mine(table[i]);
}

static lk_status plan_row(const lk_cache *cache, const lk_span *span, bool settle, int64_t b,
                          int64_t *column, row_plan *plan) {
    const lk_row *row = &cache->row[b];
    const int64_t T = span->n_columns;
    int64_t n_new = 0, n_prompt = row->len; /* of the row, if it is open */
    for (int64_t t = 0; t < T; t++) {
        if (span->valid && !span->valid[b * T + t]) continue;
        column[n_new++] = t;
        n_prompt += cache->n_columns + t < cache->prompt_columns;
    }
    const int64_t len = row->len + n_new;
    const bool open = row->n0 == LK_PROMPT_OPEN;
    LK_CHECK(cache->max_tokens < 0 || len <= cache->max_tokens, LK_E_LIMIT);
    LK_CHECK(cache->max_tokens < 0 || open || n_new <= cache->max_call, LK_E_LIMIT);
    const int64_t to_come = open ? lk_max(0, cache->prompt_columns - cache->n_columns - T) : 0;
    const int64_t n0 = open ? (n_prompt > 0 ? n_prompt : len) + to_come : row->n0;
    *plan = (row_plan){.n_new = n_new,
                       .first = row->len / LK_PAGE_TOKENS,
                       .end = n_new ? lk_ceil_div(len, LK_PAGE_TOKENS) : 0,
                       .settled_lo =
                           lk_settled_lo(cache->geom, row->lo, len_for_lo(row, n0, len + to_come)),
                       .reserved = cache->max_tokens >= 0 && !open,
                       .column = column};
    plan->twin_lo = settle && to_come == 0 ? plan->settled_lo : row->lo;
    return LK_OK;
}

static lk_status plan_rows(const lk_cache *cache, const lk_span *span, bool settle, row_plan *plan,
                           int64_t *column, demand *need) {
    *need = (demand){0};
    for (int64_t b = 0; b < cache->n_rows; b++) {
        const lk_row *row = &cache->row[b];
        LK_TRY(plan_row(cache, span, settle, b, column + b * span->n_columns, &plan[b]));
        for (int64_t i = plan[b].first; i < plan[b].end; i++) {
            const bool page = needs_item(row->page, row, i);
            const bool twin =
                twin_wanted(cache->geom, &plan[b], i) && needs_item(row->twin, row, i);
            need->n_pages += page;
            if (twin) need->n_twins[twin_kind(cache->geom, &plan[b], i)]++;
            if (i < row->n_pages) need->n_replaced += page + twin;
        }
    }
    return LK_OK;
}

/* ------------------------------------------------------------------------------------------- write */

/* Move a new item into the table. What it takes the place of, a shared item or none, is copied and kept for undo. */
static void place(lk_cache *cache, lk_page **entry, lk_page **item, const size_t *off) {
    for (int32_t g = 0; *entry && g < cache->geom->n_heads; g++) {
        unsigned char *to = lk_region(*item, off, g);
        if (to) memcpy(to, lk_region(*entry, off, g), off[g + 1] - off[g]);
    }
    cache->replaced[cache->n_replaced++] = (lk_replaced){.entry = entry, .old = *entry};
    *entry = *item;
    *item = NULL;
}

static void prefetch_head(const lk_geom *geom, int32_t g, int64_t slot, const lk_page *page,
                          const lk_page *twin) {
    lk_pack_prefetch(geom, g, slot, lk_region(page, geom->page_off, g),
                     twin ? lk_region(twin, geom->twin_off, g) : NULL);
}

static void pack_row_head(const lk_cache *cache, const lk_span *span, const row_plan *plan,
                          int64_t b, int32_t g) {
    const lk_row *row = &cache->row[b];
    const lk_geom *geom = cache->geom;
    const size_t elem = geom->elem_bytes;
    lk_run run = {
        .k = (const unsigned char *)span->k +
             (ptrdiff_t)elem * (b * span->k_stride[0] + g * span->k_stride[1]),
        .v = (const unsigned char *)span->v +
             (ptrdiff_t)elem * (b * span->v_stride[0] + g * span->v_stride[1]),
        .k_stride = span->k_stride[2],
        .v_stride = span->v_stride[2],
    };
    for (int64_t done = 0; done < plan->n_new; done += run.n_tokens) {
        const int64_t position = row->len + done, i = position / LK_PAGE_TOKENS;
        run.slot = position % LK_PAGE_TOKENS;
        run.n_tokens = lk_min(plan->n_new - done, LK_PAGE_TOKENS - run.slot);
        run.column = plan->column + done;
        const lk_page *twin = twin_wanted(geom, plan, i) ? row->twin[i] : NULL;
        if (run.n_tokens == 1) {
            if (g == 0) prefetch_head(geom, 0, run.slot, row->page[i], twin);
            if (g + 1 < geom->n_heads) prefetch_head(geom, g + 1, run.slot, row->page[i], twin);
        }
        lk_pack_store(geom, g, &run, lk_region(row->page[i], geom->page_off, g),
                      twin ? lk_region(twin, geom->twin_off, g) : NULL);
    }
}

/* Give a row its items, from the front of the lists of those that were taken. */
static void place_items(lk_cache *cache, lk_row *row, const row_plan *plan, lk_page ***page,
                        lk_page **twin[LK_N_TWIN_KINDS]) {
    const lk_geom *geom = cache->geom;
    for (int64_t i = plan->first; i < plan->end; i++) {
        const bool new_page = needs_item(row->page, row, i);
        const bool new_twin = twin_wanted(geom, plan, i) && needs_item(row->twin, row, i);
        lk_page ***twins = &twin[twin_kind(geom, plan, i)];
        if (i < row->n_pages) {
            if (new_page) place(cache, &row->page[i], (*page)++, geom->page_off);
            if (new_twin) place(cache, &row->twin[i], (*twins)++, geom->twin_off);
            continue;
        }
        row->page[i] = *(*page);
        row->twin[i] = new_twin ? **twins : NULL;
        *(*page)++ = NULL;
        if (new_twin) *(*twins)++ = NULL;
        row->n_pages = i + 1;
    }
}

/* The writing half of append, with the pages and twins that plan_rows counted. Those used are set to NULL; a copy of
 * this cache that lets go of a page in another thread meanwhile makes one superfluous. */
static void write_rows(lk_cache *cache, const lk_span *span, const row_plan *plan, lk_page **fresh,
                       const demand *need) {
    const int64_t T = span->n_columns;
    lk_page **page = fresh, **twin[LK_N_TWIN_KINDS];
    twin[0] = fresh + need->n_pages;
    for (int kind = 1; kind < LK_N_TWIN_KINDS; kind++)
        twin[kind] = twin[kind - 1] + need->n_twins[kind - 1];
    for (int64_t b = 0; b < cache->n_rows; b++) {
        lk_row *row = &cache->row[b];
        place_items(cache, row, &plan[b], &page, twin);
        /* From the plan, not from `valid`: another thread of the caller's may have written to that meanwhile. */
        if (T > 0) memset(row->real + cache->n_columns, 0, (size_t)T);
        for (int64_t i = 0; i < plan[b].n_new; i++)
            row->real[cache->n_columns + plan[b].column[i]] = 1;
    }
    const int64_t n_items = cache->n_rows * cache->geom->n_heads;
    const int64_t elems = n_items * T * (cache->geom->head_dim + cache->geom->v_dim);
    const int n_threads = elems < PARALLEL_PACK_ELEMS ? 1 : lk_thread_count(span->n_threads);
    if (n_threads == 1) { /* without OpenMP's start of a region, which a single token would feel */
        for (int64_t b = 0; b < cache->n_rows; b++)
            for (int32_t g = 0; g < cache->geom->n_heads; g++)
                pack_row_head(cache, span, &plan[b], b, g);
    } else {
        OMP(omp parallel for schedule(dynamic, 1) num_threads(n_threads))
        for (int64_t item = 0; item < n_items; item++) {
            const int64_t b = item / cache->geom->n_heads;
            pack_row_head(cache, span, &plan[b], b, (int32_t)(item % cache->geom->n_heads));
        }
    }
    for (int64_t b = 0; b < cache->n_rows; b++) cache->row[b].len += plan[b].n_new;
    cache->n_columns += T;
}

/* n pages and twins as counted, into out[]; what was taken before a failure stays there, the rest NULL. */
static lk_status take_items(lk_pool *pool, const demand *need, lk_page **out) {
    LK_TRY(lk_pool_take(pool, &pool->pages, need->n_pages, out));
    out += need->n_pages;
    for (int kind = 0; kind < LK_N_TWIN_KINDS; out += need->n_twins[kind++])
        LK_TRY(lk_pool_take(pool, &pool->twins[kind], need->n_twins[kind], out));
    return LK_OK;
}

static lk_status add(lk_cache *cache, const lk_span *span, bool settle) {
    const int64_t T = span->n_columns;
    LK_CHECK(T >= 0 && T < INT64_MAX / 8 - cache->n_columns, LK_E_SHAPE);
    LK_CHECK(!cache->unsettled, LK_E_STATE);
    size_t n_cells;
    LK_CHECK(lk_mul((size_t)cache->n_rows, (size_t)T, &n_cells), LK_E_SHAPE);
    /* One token of one row, the usual call, needs no allocation unless it takes pages. */
    row_plan one_plan;
    int64_t one_column;
    lk_page *no_page = NULL;
    const bool one = n_cells == 1;
    /* cppcheck-suppress [uninitvar]: their addresses are taken */
    row_plan *plan = one ? &one_plan : lk_alloc((size_t)cache->n_rows, sizeof *plan);
    /* cppcheck-suppress [uninitvar] */
    int64_t *column = one ? &one_column : lk_alloc(n_cells, sizeof *column);
    demand need = {0};
    lk_page **fresh = NULL;
    lk_replaced *replaced = NULL;
    int64_t n_fresh = 0;
    lk_status status = plan && column ? LK_OK : LK_E_NOMEM;
    if (status == LK_OK) status = plan_rows(cache, span, settle, plan, column, &need);
    if (status == LK_OK) status = grow_columns(cache, cache->n_columns + T);
    for (int64_t b = 0; b < cache->n_rows && status == LK_OK; b++)
        status = lk_row_grow_tables(&cache->row[b], plan[b].end);
    if (status == LK_OK) {
        n_fresh = need.n_pages;
        for (int kind = 0; kind < LK_N_TWIN_KINDS; kind++) n_fresh += need.n_twins[kind];
        if (!one || n_fresh > 0) {
            fresh = lk_alloc((size_t)n_fresh, sizeof *fresh);
            replaced = lk_alloc((size_t)need.n_replaced, sizeof *replaced);
            status = fresh && replaced ? take_items(cache->pool, &need, fresh) : LK_E_NOMEM;
        }
    }
    if (status == LK_OK) {
        cache->replaced = replaced;
        cache->unsettled = true;
        replaced = NULL;
        write_rows(cache, span, plan, fresh ? fresh : &no_page, &need);
        if (settle) lk_cache_settle(cache);
    }
    for (int64_t i = 0; fresh && i < n_fresh; i++) lk_page_release(cache->pool, fresh[i]);
    lk_dealloc(replaced);
    lk_dealloc(fresh);
    if (!one) {
        lk_dealloc(column);
        lk_dealloc(plan);
    }
    return status;
}

lk_status lk_cache_append(lk_cache *cache, const lk_span *span) { return add(cache, span, true); }
lk_status lk_cache_put(lk_cache *cache, const lk_span *span) { return add(cache, span, false); }

/* ------------------------------------------------------------------------------- settle and undo */

void lk_forget_replaced(lk_cache *cache) {
    for (int64_t i = 0; i < cache->n_replaced; i++)
        lk_page_release(cache->pool, cache->replaced[i].old);
    lk_dealloc(cache->replaced);
    cache->replaced = NULL;
    cache->n_replaced = 0;
    cache->unsettled = false;
}

void lk_cache_settle(lk_cache *cache) {
    lk_forget_replaced(cache);
    for (int64_t b = 0; b < cache->n_rows; b++) {
        lk_row *row = &cache->row[b];
        row->n0 = lk_row_prompt(cache, b);
        if (row->n0 == LK_PROMPT_OPEN) continue;
        const int64_t lo = lk_settled_lo(cache->geom, row->lo, len_for_lo(row, row->n0, row->len));
        for (int64_t i = row->lo / LK_PAGE_TOKENS; i < lo / LK_PAGE_TOKENS; i++) {
            if (i * LK_PAGE_TOKENS < cache->geom->sink) continue;
            lk_page_release(cache->pool, row->twin[i]);
            row->twin[i] = NULL;
        }
        row->lo = lo;
    }
}

void lk_cache_undo(lk_cache *cache, int64_t n_columns) {
    const int64_t prompt_columns = cache->prompt_columns;
    for (int64_t i = 0; i < cache->n_replaced; i++) {
        lk_page *taken_back = *cache->replaced[i].entry;
        *cache->replaced[i].entry = cache->replaced[i].old;
        cache->replaced[i].old = taken_back;
    }
    lk_forget_replaced(cache);
    (void)lk_cache_crop(cache, n_columns);  /* cannot fail: there were as many columns before */
    cache->prompt_columns = prompt_columns; /* a crop to 0 columns forgets the announcement */
}
