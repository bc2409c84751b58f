/* fuzz_cache.c: any sequence of calls on caches that share pages, each call with an allocation that may fail, against
 * the naive store. */
#include "input.h"

#define MAX_CACHES 3
#define MOST_COLUMNS 270 /* more than the largest window; the naive store is slow */
#define MAX_TOKENS 200   /* of reserved caches */
#define MAX_CALL 70

typedef struct {
    lk_cache *cache; /* NULL: no such cache */
    naive_cache naive;
} pair;

static pair pairs[MAX_CACHES];
static int64_t max_tokens; /* -1: growing */

static void naive_duplicate(const naive_cache *from, naive_cache *to) {
    *to = *from;
    for (int64_t b = 0; b < MAX_ROWS; b++) to->row[b] = naive_copy_row(from, b);
}

static void drop(pair *p) {
    lk_cache_free(p->cache);
    naive_free_rows(&p->naive);
    p->cache = NULL;
}

/* Whether a call with these tokens passes a limit of a reserved cache. */
static bool passes_limit(const naive_cache *naive, const lk_span *span) {
    for (int64_t b = 0; b < naive->n_rows && max_tokens >= 0; b++) {
        int64_t n_new = 0;
        for (int64_t t = 0; t < span->n_columns; t++)
            n_new += span->valid == NULL || span->valid[b * span->n_columns + t];
        if (naive->row[b].len + n_new > MAX_TOKENS) return true;
        if (naive->row[b].n0 >= 0 && n_new > MAX_CALL) return true;
    }
    return false;
}

/* What the call must return, unless an allocation fails. */
static bool succeeded(lk_status status, lk_status expected, bool may_fail) {
    CHECK(status == expected || (may_fail && status == LK_E_NOMEM));
    return status == LK_OK;
}

static void add_tokens(fuzz_input *in, pair *p, bool attend, int64_t fail_at) {
    naive_cache *naive = &p->naive;
    static const int64_t sizes[] = {1, 1, 2, 3, 17, 63, 64, 65, 70, 0};
    int64_t T = sizes[take_below(in, sizeof sizes / sizeof *sizes)];
    if (attend && T == 0) T = 1;
    if (naive->n_columns + T > MOST_COLUMNS) return;
    uint8_t valid[MAX_ROWS * 130];
    const uint8_t pattern = take_byte(in);
    for (int64_t i = 0; i < naive->n_rows * T; i++) valid[i] = pattern >> i % 8 & 1;
    lk_span span = random_span(&naive->config, naive->n_rows, T, pattern == 0 ? NULL : valid);
    span.n_threads = 1;
    const lk_status expected = passes_limit(naive, &span) ? LK_E_LIMIT : LK_OK;
    lk_test_fail_allocation(fail_at);
    const lk_status status =
        attend ? lk_cache_put(p->cache, &span) : lk_cache_append(p->cache, &span);
    lk_test_fail_allocation(0);
    if (succeeded(status, expected, fail_at > 0)) {
        naive_put(naive, &span);
        if (attend) check_decode(p->cache, naive, naive->config.n_heads * 2, T);
        lk_cache_settle(p->cache);
        naive_settle(naive);
    }
    free_span(&span);
}

static void select_rows(fuzz_input *in, pair *p, int64_t fail_at) {
    const int64_t n = 1 + take_below(in, MAX_ROWS);
    int64_t rows[MAX_ROWS];
    for (int64_t b = 0; b < n; b++) rows[b] = take_below(in, p->naive.n_rows);
    lk_test_fail_allocation(fail_at);
    const lk_status status = lk_cache_select(p->cache, rows, n);
    lk_test_fail_allocation(0);
    if (succeeded(status, LK_OK, fail_at > 0)) naive_select(&p->naive, rows, n);
}

static void copy_to_other(fuzz_input *in, pair *p, int64_t fail_at) {
    pair *to = &pairs[take_below(in, MAX_CACHES)];
    if (to == p) return;
    lk_cache *copy = NULL;
    lk_test_fail_allocation(fail_at);
    const lk_status status = lk_cache_copy(p->cache, &copy);
    lk_test_fail_allocation(0);
    if (!succeeded(status, LK_OK, fail_at > 0)) return;
    if (to->cache) drop(to);
    to->cache = copy;
    naive_duplicate(&p->naive, &to->naive);
}

static void one_call(fuzz_input *in, pair *p) {
    naive_cache *naive = &p->naive;
    const uint8_t op = take_byte(in);
    const int64_t fail_at = op >= 128 ? 1 + take_below(in, 16) : 0;
    switch (op % 8) {
    case 0:
    case 1: add_tokens(in, p, false, fail_at); break;
    case 2: add_tokens(in, p, true, fail_at); break;
    case 3: {
        const int64_t n = naive->n_columns * take_byte(in) / 255;
        CHECK_OK(lk_cache_crop(p->cache, n));
        naive_crop(naive, n);
        break;
    }
    case 4: select_rows(in, p, fail_at); break;
    case 5: copy_to_other(in, p, fail_at); break;
    case 6: {
        const bool on = take_byte(in) % 2;
        const lk_status status = lk_cache_hold(p->cache, on);
        CHECK(status == (max_tokens < 0 ? LK_OK : LK_E_STATE));
        if (status == LK_OK) naive_hold(naive, on);
        break;
    }
    default: {
        const int64_t n = 1 + take_byte(in);
        const lk_status status = lk_cache_expect_prompt(p->cache, n);
        CHECK(status == (naive->n_columns == 0 ? LK_OK : LK_E_STATE));
        if (status == LK_OK) naive->announced = n;
    }
    }
    check_state(p->cache, naive);
    if (max_tokens < 0) check_memory(p->cache, naive);
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size) {
    fuzz_input in = {data, size};
    uint8_t keep[3 * 32];
    random_state = 20250820;
    lk_test_poison(1);
    const lk_config config = take_config(&in, keep);
    const int64_t n_rows = 1 + take_below(&in, 2);
    max_tokens = take_byte(&in) % 4 == 0 ? MAX_TOKENS : -1;
    pair *first = &pairs[0];
    naive_init(&first->naive, &config, n_rows);
    CHECK_OK(max_tokens < 0
                 ? lk_cache_create(&config, n_rows, &first->cache)
                 : lk_cache_create_reserved(&config, n_rows, MAX_TOKENS, MAX_CALL, &first->cache));
    for (int i = 0; i < 40 && in.left > 0; i++) {
        pair *p = &pairs[take_below(&in, MAX_CACHES)];
        one_call(&in, p->cache ? p : first);
    }
    /* The first one is freed last, and what its copies did must not have touched it. */
    for (int i = MAX_CACHES - 1; i >= 0; i--) {
        if (!pairs[i].cache) continue;
        check_gather(pairs[i].cache, &pairs[i].naive);
        drop(&pairs[i]);
    }
    return 0;
}
