/* fuzz_plan.c: how attention is cut into pieces, on the CPU (decode.c) and on CUDA (kernels/plan.h): every page that a
 * query sees is in exactly one piece of its unit. No page exists here, so rows may be as long as one likes. */
#include "input.h"

#include "../../csrc/decode.c"
#include "../../kernels/plan.c"

/* ---------------------------------------------------------------------------------------------- CPU */

#define MAX_T 80

/* Whether a query column of the unit attends to a key of the page, by the rule at the top of leank.h. */
static bool page_is_seen(const plan *p, const unit *u, int64_t page) {
    const lk_geom *geom = p->geom;
    const lk_row *row = &p->args->cache->row[u->row];
    const int64_t T = p->args->n_columns, first = page * LK_PAGE_TOKENS;
    for (int32_t c = 0; c < u->n_cols; c++) {
        const int64_t position = p->position[u->row * T + (u->first_col + c) / p->heads_per_kv];
        if (position < first) continue;
        if (geom->n_kept[u->head] > 0 || first < geom->sink) return true;
        const int64_t last = lk_min(position, first + LK_PAGE_TOKENS - 1);
        if (last >= row->lo && (position - last < geom->recent || position < row->n0)) return true;
    }
    return false;
}

static void check_unit(const plan *p, int64_t index) {
    const unit *u = &p->units[index];
    int64_t covered = 0, n_pieces = 0;
    for (int64_t i = 0; i < p->n_items; i++) {
        const item *one = &p->items[i];
        if (one->unit != index) continue;
        n_pieces++;
        CHECK(one->page_begin >= 0 && one->page_begin <= one->page_end);
        CHECK(one->page_end <= u->n_pages || one->page_begin == one->page_end);
        CHECK(u->n_slots == 0 ? one->slot == -1
                              : one->slot >= u->slot && one->slot < u->slot + u->n_slots);
        covered += one->page_end - one->page_begin;
        bool goes_on = one->page_end == u->n_pages || one->page_end == u->sink_pages;
        for (int64_t j = 0; j < p->n_items; j++) {
            const item *other = &p->items[j];
            if (other->unit != index || j == i) continue;
            goes_on = goes_on || other->page_begin == one->page_end;
            CHECK(u->n_slots > 0 && one->slot != other->slot);
            CHECK(one->page_end <= other->page_begin || other->page_end <= one->page_begin);
        }
        CHECK(goes_on);
    }
    CHECK(n_pieces >= 1 && (u->n_slots == 0 ? n_pieces == 1 : n_pieces == u->n_slots));
    CHECK(covered <= u->n_pages);
    const int64_t step = u->n_pages / 64 + 1; /* a row may have 2^26 pages: some of them */
    for (int64_t page = 0; page < u->n_pages; page += step) {
        if (!page_is_seen(p, u, page)) continue;
        int n = 0;
        for (int64_t i = 0; i < p->n_items; i++)
            n += p->items[i].unit == index && p->items[i].page_begin <= page &&
                 page < p->items[i].page_end;
        CHECK(n == 1);
    }
}

static void fuzz_cpu(fuzz_input *in) {
    uint8_t keep[3 * 32], real[3][MAX_T];
    const lk_config config = take_config(in, keep);
    lk_cache *cache;
    CHECK_OK(lk_cache_create(&config, 1 + take_below(in, 3), &cache));
    const int64_t T = 1 + take_below(in, MAX_T);
    const uint8_t pattern = take_byte(in);
    for (int64_t b = 0; b < cache->n_rows; b++) {
        int64_t n_real = 0;
        for (int64_t t = 0; t < T; t++)
            n_real += real[b][t] = pattern == 0 || (pattern >> (b + t) % 8 & 1);
        lk_row *row = &cache->row[b];
        row->len = n_real + (int64_t)(take_u32(in) >> take_below(in, 32));
        row->n0 = take_byte(in) % 2 ? row->len : row->len / 2;
        row->lo = config.sink + (take_byte(in) % 2 ? 0 : row->len / 64 * 60);
        row->real = real[b];
    }
    cache->n_columns = T; /* what the rows had before has no column here */
    const lk_decode_args args = {.cache = cache,
                                 .q = keep,
                                 .o = keep,
                                 .n_q_heads = config.n_heads * (1 + take_below(in, 9)),
                                 .n_columns = T,
                                 .scale = 1,
                                 .n_threads = 1 + (int)take_below(in, 4)};
    CHECK_OK(check_args(&args));
    plan p = {.args = &args, .geom = cache->geom};
    CHECK_OK(make_plan(&p));
    CHECK(p.n_threads >= 1 && p.n_threads <= p.n_items);
    for (int64_t i = 0; i < p.n_units; i++) check_unit(&p, i);
    free_plan(&p);
    for (int64_t b = 0; b < cache->n_rows; b++) cache->row[b].real = NULL;
    lk_cache_free(cache);
}

/* --------------------------------------------------------------------------------------------- CUDA */

#define MAX_PARTS (4 * 6 + 200 * (LK_PLAN_HALVINGS + 1))

static void fuzz_cuda(fuzz_input *in) {
    static int32_t parts[MAX_PARTS][5];
    static const int32_t head_dims[] = {64, 80, 96, 128, 256};
    const int32_t head_dim = head_dims[take_below(in, 5)], sink = (int32_t)take_below(in, 250) * 2;
    const int32_t n_rows = 1 + (int32_t)take_below(in, 4), n_heads = 1 + (int32_t)take_below(in, 6);
    const int32_t n_blocks = 1 + (int32_t)take_below(in, 200);
    int32_t end[4], full_lo[4], n_kept[6];
    uint64_t most = 0; /* cost, in kilobytes */
    for (int32_t b = 0; b < n_rows; b++) {
        end[b] = (int32_t)(take_u32(in) >> (4 + take_below(in, 28)));
        full_lo[b] = end[b] - (int32_t)((int64_t)end[b] * take_byte(in) / 255);
        most += (uint64_t)(end[b] / LK_PAGE_TOKENS + 1) * 64u * (uint64_t)n_heads;
    }
    for (int32_t g = 0; g < n_heads; g++) n_kept[g] = 8 * (int32_t)take_below(in, head_dim / 8 + 1);
    if (most > INT32_MAX) return; /* 2 TB of pages: more than a device has */
    const int64_t n = lk_cuda_plan_parts(end, full_lo, n_rows, n_kept, n_heads, head_dim, sink,
                                         n_blocks, parts, MAX_PARTS);
    CHECK(n >= n_rows * n_heads && n <= MAX_PARTS);
    for (int32_t b = 0; b < n_rows; b++) {
        for (int32_t g = 0; g < n_heads; g++) {
            const lk_unit u = lk_unit_make(end[b], full_lo[b], sink, n_kept[g], head_dim);
            const int32_t n_pages = (end[b] + LK_PAGE_TOKENS - 1) / LK_PAGE_TOKENS;
            /* Tiles are pages in order; those left out are middle pages of an empty head. */
            int32_t next_page = 0, next_tile = 0, last_chunk = -1;
            for (int32_t tile = 0; tile <= u.n_tiles && !u.is_void; tile++) {
                if (tile == 1000 && u.n_tiles > 4000) { /* the ends are what may go wrong */
                    tile = u.n_tiles - 1000;
                    next_page = lk_unit_page(&u, tile);
                }
                const int32_t page = tile < u.n_tiles ? lk_unit_page(&u, tile) : n_pages;
                const int64_t gap = (int64_t)next_page * LK_PAGE_TOKENS;
                CHECK(page >= next_page && page <= n_pages);
                CHECK(page == next_page || (n_kept[g] == 0 && gap >= sink &&
                                            (int64_t)page * LK_PAGE_TOKENS <= full_lo[b]));
                next_page = page + 1;
            }
            for (int64_t i = 0; i < n; i++) {
                if (parts[i][1] != b || parts[i][2] != g) continue;
                CHECK(parts[i][3] == next_tile && parts[i][4] > parts[i][3]);
                CHECK(last_chunk < 0 || parts[i][0] == last_chunk + 1);
                next_tile = parts[i][4];
                last_chunk = parts[i][0];
            }
            CHECK(next_tile == u.n_tiles);
        }
    }
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size) {
    fuzz_input in = {data, size};
    if (take_byte(&in) % 2) fuzz_cuda(&in);
    else fuzz_cpu(&in);
    return 0;
}
