/* naive.h: what test_capi.c compares with. Stores every token as double and attends by the rule at the
 * top of leank.h, one key at a time, and knows which pages and twins there must be. Shares no code with csrc. */
#ifndef LK_TEST_NAIVE_H
#define LK_TEST_NAIVE_H

#include "leank.h"

#include <math.h>
#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#define MAX_ROWS 4
#define MAX_COLUMNS 16384
#define MAX_PAGES (MAX_COLUMNS / LK_PAGE_TOKENS)

/* A broken promise ends the run: what follows it would only confuse. */
#define CHECK(cond)                                                                                \
    do {                                                                                           \
        if (!(cond)) {                                                                             \
            fprintf(stderr, "%s:%d: failed: %s\n", __FILE__, __LINE__, #cond);                     \
            exit(1);                                                                               \
        }                                                                                          \
    } while (0)
#define CHECK_OK(call) CHECK((call) == LK_OK)

/* ----------------------------------------------------------------------------------------- values */

static uint64_t random_state = 20250820;

static inline uint64_t random_bits(void) { /* splitmix64 */
    uint64_t z = random_state += 0x9E3779B97F4A7C15u;
    z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9u;
    z = (z ^ (z >> 27)) * 0x94D049BB133111EBu;
    return z ^ (z >> 31);
}

static inline int64_t random_below(int64_t n) { return (int64_t)(random_bits() % (uint64_t)n); }

/* The i-th element of an array of the dtype, exactly. */
static inline double value_at(lk_dtype dtype, const void *data, int64_t i) {
    if (dtype == LK_F32) return ((const float *)data)[i];
    const uint16_t bits = ((const uint16_t *)data)[i];
    if (dtype == LK_BF16) {
        const uint32_t wide = (uint32_t)bits << 16;
        float value;
        memcpy(&value, &wide, sizeof value);
        return value;
    }
    const int exponent = bits >> 10 & 31, fraction = bits & 1023;
    const double size = exponent == 31  ? (fraction ? NAN : INFINITY)
                        : exponent == 0 ? ldexp(fraction, -24)
                                        : ldexp(1024 + fraction, exponent - 25);
    return bits >> 15 ? -size : size;
}

/* n elements of the dtype with absolute values in [1/32, 4). */
static inline void *random_array(lk_dtype dtype, int64_t n) {
    void *data = malloc((size_t)n * lk_dtype_bytes(dtype) + 1);
    CHECK(data != NULL);
    for (int64_t i = 0; i < n; i++) {
        const uint64_t r = random_bits();
        const uint32_t sign = r & 1, power = (uint32_t)(r >> 1 & 1023) % 7;
        if (dtype == LK_F32) {
            const uint32_t bits = sign << 31 | (122 + power) << 23 | (uint32_t)(r >> 41);
            memcpy((float *)data + i, &bits, sizeof bits);
        } else if (dtype == LK_BF16)
            ((uint16_t *)data)[i] = (uint16_t)(sign << 15 | (122 + power) << 7 | (r >> 57));
        else ((uint16_t *)data)[i] = (uint16_t)(sign << 15 | (10 + power) << 10 | (r >> 54));
    }
    return data;
}

/* ------------------------------------------------------------------------------------------ store */

typedef struct {
    int64_t len, lo, n0; /* n0 is -1 while the prompt is not complete */
    int64_t held;        /* INT64_MAX: not */
    double *k, *v;       /* [len, Hkv, D], [len, Hkv, Dv] */
    int64_t room;        /* tokens that fit into k and v */
    /* Who they are, 0: not there. Rows that share a page have the same number at the same place. */
    int64_t page[MAX_PAGES], twin[MAX_PAGES];
    uint8_t real[MAX_COLUMNS];
} naive_row;

typedef struct {
    lk_config config;
    int64_t n_rows, n_columns, announced;
    naive_row row[MAX_ROWS];
} naive_cache;

static inline void naive_init(naive_cache *cache, const lk_config *config, int64_t n_rows) {
    memset(cache, 0, sizeof *cache);
    cache->config = *config;
    cache->n_rows = n_rows;
    cache->announced = -1;
    for (int64_t b = 0; b < MAX_ROWS; b++) {
        cache->row[b].lo = config->sink;
        cache->row[b].n0 = -1;
        cache->row[b].held = INT64_MAX;
    }
}

static inline double *duplicate(const double *data, int64_t n) {
    double *copy = malloc((size_t)n * sizeof *copy + 1);
    CHECK(copy != NULL);
    if (n > 0) memcpy(copy, data, (size_t)n * sizeof *copy);
    return copy;
}

static inline naive_row naive_copy_row(const naive_cache *cache, int64_t b) {
    naive_row row = cache->row[b];
    row.k = duplicate(row.k, row.len * cache->config.n_heads * cache->config.head_dim);
    row.v = duplicate(row.v, row.len * cache->config.n_heads * cache->config.v_dim);
    row.room = row.len;
    return row;
}

static inline void naive_free_rows(naive_cache *cache) {
    for (int64_t b = 0; b < MAX_ROWS; b++) {
        free(cache->row[b].k);
        free(cache->row[b].v);
        cache->row[b].k = cache->row[b].v = NULL;
    }
}

static inline void naive_select(naive_cache *cache, const int64_t *rows, int64_t n_rows) {
    naive_row chosen[MAX_ROWS] = {{0}};
    for (int64_t b = 0; b < n_rows; b++) chosen[b] = naive_copy_row(cache, rows[b]);
    naive_free_rows(cache);
    memcpy(cache->row, chosen, sizeof chosen);
    cache->n_rows = n_rows;
}

/* n0 as soon as it follows from the columns: queries of the call that completes a prompt may be past it. */
static inline void naive_complete_prompt(const naive_cache *cache, naive_row *row) {
    if (row->n0 >= 0 || row->len == 0 || cache->n_columns < cache->announced) return;
    int64_t announced_tokens = 0;
    for (int64_t i = 0; i < cache->announced; i++) announced_tokens += row->real[i];
    row->n0 = announced_tokens > 0 ? announced_tokens : row->len;
}

static inline void naive_grow(naive_row *row, int64_t n_tokens, const lk_config *config) {
    if (n_tokens <= row->room) return;
    row->room = 2 * n_tokens;
    const size_t n = (size_t)(row->room * config->n_heads) * sizeof(double);
    row->k = realloc(row->k, n * (size_t)config->head_dim);
    row->v = realloc(row->v, n * (size_t)config->v_dim);
    CHECK(row->k != NULL && row->v != NULL);
}

/* Pages that a row writes to are its own from then on. */
static inline void naive_own_pages(naive_row *row, int64_t from, int64_t to) {
    static int64_t n_pages = 0;
    for (int64_t i = from / LK_PAGE_TOKENS; i * LK_PAGE_TOKENS < to && from < to; i++)
        row->page[i] = row->twin[i] = ++n_pages;
}

/* The span's strides must be those of contiguous [B, Hkv, T, D] and [B, Hkv, T, Dv]. */
static inline void naive_put(naive_cache *cache, const lk_span *span) {
    const lk_config *config = &cache->config;
    const int64_t T = span->n_columns, Hkv = config->n_heads, D = config->head_dim;
    const int64_t Dv = config->v_dim;
    CHECK(cache->n_columns + T <= MAX_COLUMNS);
    for (int64_t b = 0; b < cache->n_rows; b++) {
        naive_row *row = &cache->row[b];
        const int64_t len = row->len;
        naive_grow(row, len + T, config);
        for (int64_t t = 0; t < T; t++) {
            const bool real = span->valid == NULL || span->valid[b * T + t] != 0;
            row->real[cache->n_columns + t] = real;
            if (!real) continue;
            for (int64_t g = 0; g < Hkv; g++) {
                const int64_t from = (b * Hkv + g) * T + t, to = row->len * Hkv + g;
                for (int64_t c = 0; c < D; c++)
                    row->k[to * D + c] = value_at(config->dtype, span->k, from * D + c);
                for (int64_t d = 0; d < Dv; d++)
                    row->v[to * Dv + d] = value_at(config->dtype, span->v, from * Dv + d);
            }
            row->len++;
        }
        naive_own_pages(row, len, row->len);
    }
    cache->n_columns += T;
    for (int64_t b = 0; b < cache->n_rows; b++) naive_complete_prompt(cache, &cache->row[b]);
}

static inline void naive_settle(naive_cache *cache) {
    const lk_config *config = &cache->config;
    for (int64_t b = 0; b < cache->n_rows; b++) {
        naive_row *row = &cache->row[b];
        const int64_t held = row->held > row->n0 ? row->held : row->n0;
        const int64_t len = row->len < held ? row->len : held;
        const int64_t old = len - config->recent - config->slack;
        if (row->n0 < 0 || old < 0) continue;
        const int64_t lo = old / LK_PAGE_TOKENS * LK_PAGE_TOKENS;
        if (lo > row->lo) row->lo = lo;
        for (int64_t i = 0; i < MAX_PAGES; i++)
            if (i * LK_PAGE_TOKENS >= config->sink && (i + 1) * LK_PAGE_TOKENS <= row->lo)
                row->twin[i] = 0;
    }
}

static inline void naive_hold(naive_cache *cache, bool on) {
    for (int64_t b = 0; b < cache->n_rows; b++)
        cache->row[b].held = on ? cache->row[b].len : INT64_MAX;
    naive_settle(cache);
}

static inline void naive_crop(naive_cache *cache, int64_t n_columns) {
    for (int64_t b = 0; b < cache->n_rows; b++) {
        naive_row *row = &cache->row[b];
        row->len = 0;
        for (int64_t i = 0; i < n_columns; i++) row->len += row->real[i];
        if (row->lo > row->len) row->lo = row->len;
        if (row->lo < cache->config.sink) row->lo = cache->config.sink;
        if (row->len == 0) row->n0 = -1;
        for (int64_t i = 0; i < MAX_PAGES; i++)
            if (i * LK_PAGE_TOKENS >= row->len) row->page[i] = row->twin[i] = 0;
    }
    cache->n_columns = n_columns;
    if (n_columns == 0) cache->announced = -1;
}

/* ---------------------------------------------------------------------------------------- attention */

/* o [Dv] for one query of KV head g at position p. softcap 0: none; sink -inf: none. */
static inline void naive_attend(const naive_cache *cache, int64_t b, int64_t p, int64_t g,
                                const double *q, double scale, double softcap, double sink,
                                double *o) {
    const lk_config *config = &cache->config;
    const naive_row *row = &cache->row[b];
    const int64_t Hkv = config->n_heads, D = config->head_dim, Dv = config->v_dim;
    const uint8_t *keep = config->keep + g * D;
    bool any_kept = false;
    for (int64_t c = 0; c < D; c++) any_kept = any_kept || keep[c];
    double *s = malloc((size_t)(p + 1) * sizeof *s), top = sink, total = 0;
    CHECK(s != NULL);
    for (int64_t j = 0; j <= p; j++) {
        const bool window =
            j < config->sink ||
            (j >= row->lo && (p - j < config->recent || row->n0 < 0 || p < row->n0));
        s[j] = 0;
        for (int64_t c = 0; c < D; c++)
            if (window || keep[c]) s[j] += scale * q[c] * row->k[(j * Hkv + g) * D + c];
        if (softcap > 0) s[j] = softcap * tanh(s[j] / softcap);
        if (!window && !any_kept) s[j] = -INFINITY;
        if (s[j] > top) top = s[j];
    }
    if (sink > -INFINITY) total = exp(sink - top);
    for (int64_t d = 0; d < Dv; d++) o[d] = 0;
    for (int64_t j = 0; j <= p; j++) {
        const double a = s[j] > -INFINITY ? exp(s[j] - top) : 0;
        total += a;
        for (int64_t d = 0; d < Dv; d++) o[d] += a * row->v[(j * Hkv + g) * Dv + d];
    }
    for (int64_t d = 0; d < Dv; d++) o[d] = total > 0 ? o[d] / total : 0;
    free(s);
}

#endif
