/* decode.c: attention over a cache as a list of independent pieces of work.
 *
 * A query column is one (query token t, query head r of the KV head) pair, number t * R + r. A unit is up to
 * LK_JOB_COLUMNS columns of one KV head of one row; it may be cut into items along the pages, whose partial
 * states are merged in page order. How it is cut depends on sizes alone, never on the number of threads, so
 * results are the same bit for bit however many there are. */
#include "lk_internal.h"
#include "lk_softmax.h"

#include <float.h>

#ifdef _OPENMP
#include <omp.h>
#endif

/* Pages of an item, at least. Fewer pay more often for the merge (8: 1%); threads take many in a row. */
#define ITEM_PAGES 16
/* Items of a call, about, at most: bounds the memory of partial states, and still feeds many threads. */
#define MAX_ITEMS 512
/* With so many units there is nothing to gain from splitting pages as well. */
#define ENOUGH_UNITS 64
/* Work (elements of K and V times column groups) below which waking threads costs more than it brings. */
#define ONE_THREAD_WORK 65536.0

/* Pages [0, sink_pages) and [tail_page, n_pages) have something to attend to. */
typedef struct {
    int64_t row, first_col;
    int32_t head, n_cols;
    int64_t sink_pages, tail_page, n_pages;
    int64_t full_page;     /* pages from here on are read with all channels */
    int64_t slot, n_slots; /* partial states, if more than one item */
} unit;

typedef struct {
    int64_t unit, page_begin, page_end;
    int64_t slot; /* -1: the only item of its unit */
    double work;
} item;

typedef struct {
    const lk_decode_args *args;
    const lk_geom *geom;
    lk_job_fn kernel;
    float scale_log2, softcap_log2, two_over_softcap; /* see lk_job */
    int64_t heads_per_kv, n_cols, block_cols;         /* R, T * R, columns of a full unit */
    int64_t *position; /* [B, T] of a column's token in its row, -1 for padding */
    unit *units;
    item *items;
    int64_t n_units, n_items, n_slots, piece_pages;
    bool is_split; /* along the pages */
    double work;
    float *states;          /* [n_slots] of state_floats: m, l, o */
    unsigned char *threads; /* [n_threads] of thread_bytes: scratch, one state */
    size_t state_floats, scratch_bytes, thread_bytes;
    int n_threads;
} plan;

/* ---------------------------------------------------------------------------------------------- scratch */

static size_t round_up_64(size_t bytes) { return (bytes + 63) & ~(size_t)63; }

static size_t carve(const lk_geom *geom, int32_t n_cols, unsigned char *memory, lk_scratch *out) {
    const size_t cols = (size_t)n_cols, page_floats = LK_PAGE_TOKENS * sizeof(float);
    const size_t bytes[] = {
        round_up_64(cols * (size_t)geom->head_dim * sizeof(float)),
        cols * page_floats,
        round_up_64(cols * sizeof(float)),
        LK_GROUP_COLUMNS * page_floats,
        LK_GROUP_COLUMNS * page_floats,
        geom->group == 2 ? round_up_64(LK_EDGE_ROWS * (size_t)geom->v_dim * 4) : 0,
    };
    unsigned char *part[6];
    size_t total = 0;
    for (int i = 0; i < 6; i++) {
        part[i] = memory ? memory + total : NULL;
        total += bytes[i];
    }
    if (out)
        *out = (lk_scratch){.q = (float *)(void *)part[0],
                            .p = (float *)(void *)part[1],
                            .alpha = (float *)(void *)part[2],
                            .kept = (float *)(void *)part[3],
                            .full = (float *)(void *)part[4],
                            .edge = part[5]};
    return total;
}

size_t lk_scratch_bytes(const lk_geom *geom, int32_t n_cols) {
    return carve(geom, n_cols, NULL, NULL);
}

void lk_scratch_carve(const lk_geom *geom, int32_t n_cols, void *memory, lk_scratch *out) {
    (void)carve(geom, n_cols, memory, out);
}

/* A state of the plan's full units: m [block_cols], l [block_cols] in whole lines, then o. */
static int64_t state_head_floats(const plan *p) { return lk_ceil_div(2 * p->block_cols, 16) * 16; }

/* ------------------------------------------------------------------------------------------------- plan */

static lk_status check_args(const lk_decode_args *args) {
    LK_CHECK(args && args->cache && args->q && args->o, LK_E_VALUE);
    const lk_cache *cache = args->cache;
    LK_CHECK(isfinite((float)((double)args->scale * LK_LOG2_E)), LK_E_VALUE);
    LK_CHECK(args->softcap >= 0.0f && isfinite((float)((double)args->softcap * LK_LOG2_E)),
             LK_E_VALUE);
    LK_CHECK(args->n_q_heads > 0 && args->n_q_heads % cache->geom->n_heads == 0, LK_E_SHAPE);
    LK_CHECK(cache->n_columns > 0, LK_E_STATE);
    LK_CHECK(args->n_columns >= 1 && args->n_columns <= cache->n_columns, LK_E_SHAPE);
    size_t n_cols;
    LK_CHECK(lk_mul((size_t)args->n_q_heads, (size_t)args->n_columns, &n_cols), LK_E_SHAPE);
    LK_CHECK(n_cols <= INT64_MAX / LK_MAX_HEAD_DIM / sizeof(float), LK_E_SHAPE);
    return LK_OK;
}

/* The inverse of a tiny cap may be too large for float32; every logit but 0 is at the cap then. */
static void find_scales(plan *p) {
    const double scale = p->args->scale, softcap = p->args->softcap;
    p->scale_log2 = (float)(scale * LK_LOG2_E);
    p->softcap_log2 = (float)(softcap * LK_LOG2_E);
    if (softcap > 0) p->two_over_softcap = (float)fmin(2 / softcap, FLT_MAX);
}

/* Tokens of a row's last T columns are its last ones, so positions count back from the length. */
static void find_positions(plan *p) {
    const lk_cache *cache = p->args->cache;
    const int64_t n_new = p->args->n_columns;
    for (int64_t b = 0; b < cache->n_rows; b++) {
        const lk_row *row = &cache->row[b];
        const uint8_t *real = row->real + (cache->n_columns - n_new);
        int64_t next = row->len;
        for (int64_t t = n_new - 1; t >= 0; t--) p->position[b * n_new + t] = real[t] ? --next : -1;
    }
}

/* First position of the recent part of a query's window. */
static int64_t full_lo_of(const plan *p, int64_t b, int64_t n0, int64_t position) {
    const int64_t lo = lk_max(p->geom->sink, p->args->cache->row[b].lo);
    return position < n0 ? lo : lk_max(lo, position + 1 - p->geom->recent);
}

/* What one block of columns of row b sees: keys before *end, all channels from *full_lo on. */
static void block_bounds(const plan *p, int64_t b, int64_t first_col, int32_t n_cols, int64_t *end,
                         int64_t *full_lo) {
    const int64_t n0 = lk_row_prompt(p->args->cache, b);
    const int64_t first_t = first_col / p->heads_per_kv;
    const int64_t last_t = (first_col + n_cols - 1) / p->heads_per_kv;
    *end = 0;
    *full_lo = INT64_MAX;
    for (int64_t t = first_t; t <= last_t; t++) {
        const int64_t position = p->position[b * p->args->n_columns + t];
        if (position < 0) continue;
        *end = lk_max(*end, position + 1);
        *full_lo = lk_min(*full_lo, full_lo_of(p, b, n0, position));
    }
}

static void plan_units(plan *p) {
    const lk_geom *geom = p->geom;
    int64_t n = 0, n_pages = 0;
    for (int64_t b = 0; b < p->args->cache->n_rows; b++) {
        for (int64_t col = 0; col < p->n_cols; col += p->block_cols) {
            const int32_t n_cols = (int32_t)lk_min(p->block_cols, p->n_cols - col);
            int64_t end, full_lo;
            block_bounds(p, b, col, n_cols, &end, &full_lo);
            for (int32_t g = 0; g < geom->n_heads; g++) {
                unit *u = &p->units[n++];
                *u = (unit){.row = b, .first_col = col, .head = g, .n_cols = n_cols};
                u->n_pages = lk_ceil_div(end, LK_PAGE_TOKENS);
                u->full_page = lk_min(full_lo / LK_PAGE_TOKENS, u->n_pages);
                if (geom->n_kept[g] == 0) {
                    u->sink_pages = lk_min(lk_ceil_div(geom->sink, LK_PAGE_TOKENS), u->n_pages);
                    u->tail_page = lk_max(u->full_page, u->sink_pages);
                }
                n_pages += u->sink_pages + u->n_pages - u->tail_page;
            }
        }
    }
    p->is_split = p->n_cols <= LK_JOB_COLUMNS || p->n_units < ENOUGH_UNITS;
    p->piece_pages = p->is_split ? lk_max(ITEM_PAGES, lk_ceil_div(n_pages, MAX_ITEMS)) : INT64_MAX;
}

/* Elements read, times the passes over them in registers. */
static double work_of(const plan *p, const unit *u, int64_t page_begin, int64_t page_end) {
    const lk_geom *geom = p->geom;
    const int32_t n_kept = geom->n_kept[u->head];
    const int64_t n_full = page_end - lk_min(lk_max(u->full_page, page_begin), page_end);
    const double columns = (double)(page_end - page_begin) * (n_kept + geom->v_dim) +
                           (double)n_full * (geom->head_dim - n_kept);
    return columns * LK_PAGE_TOKENS * (double)lk_ceil_div(u->n_cols, LK_GROUP_COLUMNS);
}

/* Cut the unit; count only while p->items is NULL. An empty unit keeps one empty item, which stores zeros. */
static void plan_items_of(plan *p, int64_t index) {
    unit *u = &p->units[index];
    const int64_t first_item = p->n_items;
    const int64_t begin[2] = {0, u->tail_page}, end[2] = {u->sink_pages, u->n_pages};
    for (int part = 0; part < 2; part++) {
        for (int64_t page = begin[part];
             page < end[part] || (part == 1 && p->n_items == first_item);) {
            const int64_t left = lk_max(end[part] - page, 0);
            const int64_t n = lk_min(left, p->piece_pages);
            if (p->items)
                p->items[p->n_items] = (item){.unit = index,
                                              .page_begin = page,
                                              .page_end = page + n,
                                              .slot = p->n_items - first_item,
                                              .work = work_of(p, u, page, page + n)};
            p->n_items++;
            page += n;
        }
    }
    const int64_t n_items = p->n_items - first_item;
    u->slot = p->n_slots;
    u->n_slots = n_items > 1 ? n_items : 0;
    if (p->items) {
        for (item *i = p->items + first_item; i < p->items + p->n_items; i++) {
            i->slot = n_items > 1 ? i->slot + u->slot : -1;
            p->work += i->work;
        }
    }
    p->n_slots += u->n_slots;
}

/* Largest work first, so that what is left at the end of the call is small; heap sort, in place. */
static void sift_down(item *items, int64_t root, int64_t n) {
    const item moving = items[root];
    for (int64_t child; (child = 2 * root + 1) < n; root = child) {
        if (child + 1 < n && items[child + 1].work < items[child].work) child++;
        if (moving.work <= items[child].work) break;
        items[root] = items[child];
    }
    items[root] = moving;
}

static void sort_items(item *items, int64_t n) {
    for (int64_t i = n / 2 - 1; i >= 0; i--) sift_down(items, i, n);
    for (int64_t i = n - 1; i > 0; i--) {
        const item smallest = items[0];
        items[0] = items[i];
        items[i] = smallest;
        sift_down(items, 0, i);
    }
}

static int choose_threads(const plan *p) {
    if (p->work < ONE_THREAD_WORK) return 1;
    return (int)lk_min(lk_thread_count(p->args->n_threads), p->n_items);
}

static lk_status make_plan(plan *p) {
    const lk_cache *cache = p->args->cache;
    const lk_geom *geom = p->geom;
    size_t n_positions, n_units;
    p->heads_per_kv = p->args->n_q_heads / geom->n_heads;
    p->n_cols = p->args->n_columns * p->heads_per_kv;
    p->block_cols = lk_min(p->n_cols, LK_JOB_COLUMNS);
    LK_CHECK(lk_mul((size_t)cache->n_rows, (size_t)p->args->n_columns, &n_positions), LK_E_SHAPE);
    LK_CHECK(lk_mul((size_t)cache->n_rows * (size_t)geom->n_heads,
                    (size_t)lk_ceil_div(p->n_cols, p->block_cols), &n_units),
             LK_E_SHAPE);
    p->n_units = (int64_t)n_units;
    p->position = lk_alloc(n_positions, sizeof *p->position);
    p->units = lk_alloc(n_units, sizeof *p->units);
    LK_CHECK(p->position && p->units, LK_E_NOMEM);
    find_scales(p);
    find_positions(p);
    plan_units(p);

    for (int64_t i = 0; i < p->n_units; i++) plan_items_of(p, i);
    p->items = lk_alloc((size_t)p->n_items, sizeof *p->items);
    LK_CHECK(p->items, LK_E_NOMEM);
    p->n_items = p->n_slots = 0;
    for (int64_t i = 0; i < p->n_units; i++) plan_items_of(p, i);
    if (!p->is_split) sort_items(p->items, p->n_items);

    p->n_threads = choose_threads(p);
    p->state_floats = (size_t)(state_head_floats(p) + p->block_cols * lk_o_stride(geom));
    p->scratch_bytes = lk_scratch_bytes(geom, (int32_t)p->block_cols);
    p->thread_bytes = p->scratch_bytes + p->state_floats * sizeof(float);
    size_t states_bytes, threads_bytes;
    LK_CHECK(lk_mul((size_t)p->n_slots, p->state_floats * sizeof(float), &states_bytes),
             LK_E_SHAPE);
    LK_CHECK(lk_mul((size_t)p->n_threads, p->thread_bytes, &threads_bytes), LK_E_SHAPE);
    p->threads = lk_alloc_pages(threads_bytes);
    LK_CHECK(p->threads, LK_E_NOMEM);
    if (p->n_slots > 0) {
        p->states = lk_alloc_pages(states_bytes);
        LK_CHECK(p->states, LK_E_NOMEM);
    }
    return LK_OK;
}

static void free_plan(plan *p) {
    lk_dealloc(p->states);
    lk_dealloc(p->threads);
    lk_dealloc(p->items);
    lk_dealloc(p->units);
    lk_dealloc(p->position);
}

/* -------------------------------------------------------------------------------------------------- run */

/* Bytes from the start of q or o to the vector of the unit's column c; stride in elements. */
static ptrdiff_t column_offset(const plan *p, const unit *u, int32_t c, const int64_t stride[3]) {
    const int64_t col = u->first_col + c, t = col / p->heads_per_kv;
    const int64_t h = u->head * p->heads_per_kv + col % p->heads_per_kv;
    return (u->row * stride[0] + h * stride[1] + t * stride[2]) * (ptrdiff_t)p->geom->elem_bytes;
}

static void finish_unit(const plan *p, const unit *u, float *m, float *l, float *o) {
    const lk_decode_args *args = p->args;
    const int64_t o_stride = lk_o_stride(p->geom);
    for (int32_t c = 0; c < u->n_cols; c++) {
        const int64_t col = u->first_col + c, t = col / p->heads_per_kv;
        const bool is_token = p->position[u->row * args->n_columns + t] >= 0;
        if (args->sinks && is_token) {
            const float sink = args->sinks[u->head * p->heads_per_kv + col % p->heads_per_kv];
            const float sink_log2 = (float)((double)sink * LK_LOG2_E);
            lk_state_add_sink(&m[c], &l[c], o + c * o_stride, sink_log2, p->geom->v_dim);
        }
        unsigned char *out = (unsigned char *)args->o + column_offset(p, u, c, args->o_stride);
        lk_state_finish(l[c], o + c * o_stride, p->geom->v_dim, p->geom->dtype, out);
    }
}

/* before: the item that this thread has done last, or -1. */
static void run_item(const plan *p, const item *i, int64_t before, unsigned char *memory) {
    const lk_decode_args *args = p->args;
    const unit *u = &p->units[i->unit];
    const lk_row *row = &args->cache->row[u->row];
    const int64_t n0 = lk_row_prompt(args->cache, u->row);
    float *state = i->slot >= 0 ? p->states + (size_t)i->slot * p->state_floats
                                : (float *)(void *)(memory + p->scratch_bytes);
    lk_job job = {.geom = p->geom,
                  .head = u->head,
                  .page = row->page,
                  .twin = row->twin,
                  .page_begin = i->page_begin,
                  .page_end = i->page_end,
                  .n_cols = u->n_cols,
                  .q_is_packed = before >= 0 && p->items[before].unit == i->unit,
                  .scale_log2 = p->scale_log2,
                  .softcap_log2 = p->softcap_log2,
                  .two_over_softcap = p->two_over_softcap,
                  .m = state,
                  .l = state + p->block_cols,
                  .o = state + state_head_floats(p)};
    lk_scratch_carve(p->geom, u->n_cols, memory, &job.scratch);
    for (int32_t c = 0; c < u->n_cols; c++) {
        const int64_t t = (u->first_col + c) / p->heads_per_kv;
        const int64_t position = p->position[u->row * args->n_columns + t];
        job.q[c] = (const unsigned char *)args->q + column_offset(p, u, c, args->q_stride);
        job.end[c] = position + 1;
        job.full_lo[c] = full_lo_of(p, u->row, n0, position);
    }
    p->kernel(&job);
    if (i->slot < 0) finish_unit(p, u, job.m, job.l, job.o);
}

static void merge_unit(const plan *p, const unit *u) {
    if (u->n_slots == 0) return;
    float *into = p->states + (size_t)u->slot * p->state_floats;
    float *m = into, *l = into + p->block_cols, *o = into + state_head_floats(p);
    const int64_t o_stride = lk_o_stride(p->geom);
    for (int64_t s = 1; s < u->n_slots; s++) {
        const float *from = into + (size_t)s * p->state_floats;
        for (int32_t c = 0; c < u->n_cols; c++)
            lk_state_merge(&m[c], &l[c], o + c * o_stride, from[c], from[p->block_cols + c],
                           from + state_head_floats(p) + c * o_stride, p->geom->v_dim);
    }
    finish_unit(p, u, m, l, o);
}

static void run_plan(const plan *p) {
    OMP(omp parallel num_threads(p->n_threads)) {
#ifdef _OPENMP
        unsigned char *memory = p->threads + (size_t)omp_get_thread_num() * p->thread_bytes;
#else
        unsigned char *memory = p->threads;
#endif
        if (p->is_split) {
            /* Items are alike. Runs of them, shorter towards the end: threads read the pages of a head on and on. */
            int64_t before = -1;
            OMP(omp for schedule(guided, 1))
            for (int64_t i = 0; i < p->n_items; i++) {
                run_item(p, &p->items[i], before, memory);
                before = i;
            }
        } else {
            OMP(omp for schedule(dynamic, 1))
            for (int64_t i = 0; i < p->n_items; i++) run_item(p, &p->items[i], -1, memory);
        }
        if (p->n_slots > 0) {
            OMP(omp for schedule(dynamic, 1))
            for (int64_t i = 0; i < p->n_units; i++) merge_unit(p, &p->units[i]);
        }
    }
}

lk_status lk_decode(const lk_decode_args *args) {
    LK_TRY(check_args(args));
    const lk_isa_table *isa = lk_dispatch();
    LK_CHECK(isa, LK_E_ISA);
    plan p = {
        .args = args, .geom = args->cache->geom, .kernel = isa->decode[args->cache->geom->dtype]};
    const lk_status status = make_plan(&p);
    if (status == LK_OK) run_plan(&p);
    free_plan(&p);
    return status;
}
