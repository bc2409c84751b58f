/* checks.h: a cache against naive.h: lengths, bytes, contents, and attention with each variant. */
#ifndef LK_TEST_CHECKS_H
#define LK_TEST_CHECKS_H

#include "naive.h"

static const double tolerance[] = {[LK_F32] = 4e-5, [LK_BF16] = 6e-2, [LK_F16] = 8e-3};
static int64_t n_compared, n_predicted;

static inline lk_span random_span(const lk_config *config, int64_t n_rows, int64_t n_columns,
                                  const uint8_t *valid) {
    const int64_t T = n_columns, Hkv = config->n_heads, D = config->head_dim, Dv = config->v_dim;
    lk_span span = {
        .k_stride = {Hkv * T * D, T * D, D},
        .v_stride = {Hkv * T * Dv, T * Dv, Dv},
        .valid = valid,
        .n_columns = T,
    };
    span.k = random_array(config->dtype, n_rows * Hkv * T * D);
    span.v = random_array(config->dtype, n_rows * Hkv * T * Dv);
    return span;
}

static inline void free_span(lk_span *span) {
    free((void *)span->k);
    free((void *)span->v);
}

static inline void check_state(const lk_cache *cache, const naive_cache *naive) {
    CHECK(lk_cache_n_rows(cache) == naive->n_rows);
    CHECK(lk_cache_n_columns(cache) == naive->n_columns);
    for (int64_t b = 0; b < naive->n_rows; b++) {
        CHECK(lk_cache_length(cache, b) == naive->row[b].len);
        CHECK(lk_cache_lo(cache, b) == naive->row[b].lo);
        CHECK(lk_cache_prompt(cache, b) == naive->row[b].n0);
    }
}

/* How many there are in all rows, those that rows share once. */
static inline int64_t count_shared_once(const naive_cache *naive, bool twins) {
    int64_t n = 0;
    for (int64_t b = 0; b < naive->n_rows; b++) {
        for (int64_t i = 0; i < MAX_PAGES; i++) {
            const naive_row *row = naive->row;
            const int64_t own = twins ? row[b].twin[i] : row[b].page[i];
            bool first = own != 0;
            for (int64_t a = 0; a < b; a++)
                first = first && own != (twins ? row[a].twin[i] : row[a].page[i]);
            n += first;
        }
    }
    return n;
}

static inline bool same_memory(lk_memory a, lk_memory b) {
    return a.n_pages == b.n_pages && a.n_twins == b.n_twins && a.k_bytes == b.k_bytes &&
           a.v_bytes == b.v_bytes;
}

/* Bytes of a growing cache that is settled: what lk_predict_memory says, unless rows share pages, or have more twins
 * than it supposes (an open prompt, a hold) or fewer (a crop); and always what those that are there take. */
static inline void check_memory(const lk_cache *cache, const naive_cache *naive) {
    const lk_config *config = &naive->config;
    const int64_t D = config->head_dim;
    size_t n_kept = 0, n_live = 0;
    for (int64_t g = 0; g < config->n_heads; g++) {
        size_t n = 0;
        for (int64_t c = 0; c < D; c++) n += config->keep[g * D + c] != 0;
        n_kept += n;
        n_live += n > 0;
    }
    const size_t n_channels = (size_t)(config->n_heads * D), Dv = (size_t)config->v_dim;
    const size_t n_empty = (size_t)config->n_heads - n_live;
    const size_t each = LK_PAGE_TOKENS * lk_dtype_bytes(config->dtype);
    const int64_t n_pages = count_shared_once(naive, false);
    const int64_t n_twins = n_kept < n_channels ? count_shared_once(naive, true) : 0;
    const size_t pages = (size_t)n_pages * each, twins = (size_t)n_twins * each;
    const lk_memory got = lk_cache_memory(cache);
    CHECK(got.n_pages == n_pages && got.n_twins == n_twins);
    CHECK(got.k_bytes == pages * n_kept + twins * (n_channels - n_kept));
    CHECK(got.v_bytes == (pages * n_live + twins * n_empty) * Dv);
    CHECK(got.slab_bytes >= got.k_bytes + got.v_bytes);

    lk_memory predicted;
    int64_t lengths[MAX_ROWS], n_unshared = 0;
    bool as_supposed = true;
    for (int64_t b = 0; b < naive->n_rows; b++) {
        const naive_row *row = &naive->row[b];
        const int64_t old = row->len - config->recent - config->slack;
        const int64_t lo = old > 0 ? old / LK_PAGE_TOKENS * LK_PAGE_TOKENS : 0;
        lengths[b] = row->len;
        n_unshared += (row->len + LK_PAGE_TOKENS - 1) / LK_PAGE_TOKENS;
        as_supposed = as_supposed && row->lo == (lo > config->sink ? lo : config->sink);
    }
    CHECK_OK(lk_predict_memory(config, lengths, naive->n_rows, -1, 1, &predicted));
    CHECK(predicted.n_pages == n_unshared);
    if (as_supposed && n_pages == n_unshared) {
        CHECK(same_memory(got, predicted));
        n_predicted++;
    }
}

/* Everything stored is what was appended; what is not stored must be a dropped channel of the middle. */
static inline void check_gather(const lk_cache *cache, const naive_cache *naive) {
    const lk_config *config = &naive->config;
    const int64_t Hkv = config->n_heads, D = config->head_dim, Dv = config->v_dim;
    for (int64_t b = 0; b < naive->n_rows; b++) {
        const naive_row *row = &naive->row[b];
        const int64_t L = row->len;
        void *k = random_array(config->dtype, Hkv * L * D);
        void *v = random_array(config->dtype, Hkv * L * Dv);
        CHECK_OK(lk_cache_gather(cache, b, k, v));
        for (int64_t g = 0; g < Hkv; g++) {
            bool any_kept = false;
            for (int64_t c = 0; c < D; c++) any_kept = any_kept || config->keep[g * D + c];
            for (int64_t j = 0; j < L; j++) {
                const bool middle = j >= config->sink && j < row->lo;
                for (int64_t c = 0; c < D; c++) {
                    const double got = value_at(config->dtype, k, (g * L + j) * D + c);
                    const bool may_be_gone = middle && !config->keep[g * D + c];
                    CHECK(got == row->k[(j * Hkv + g) * D + c] || (may_be_gone && isnan(got)));
                }
                for (int64_t d = 0; d < Dv; d++) {
                    const double got = value_at(config->dtype, v, (g * L + j) * Dv + d);
                    const bool may_be_gone = middle && !any_kept;
                    CHECK(got == row->v[(j * Hkv + g) * Dv + d] || (may_be_gone && isnan(got)));
                }
            }
        }
        free(k);
        free(v);
    }
}

/* ------------------------------------------------------------------------------------------- decode */

/* Outputs of the last T columns with each variant that can run: the same with one thread and two, and near
 * the naive ones. */
static inline void check_decode(const lk_cache *cache, const naive_cache *naive, int64_t n_q_heads,
                                int64_t n_columns) {
    const lk_config *config = &naive->config;
    const int64_t B = naive->n_rows, Hq = n_q_heads, R = Hq / config->n_heads, T = n_columns;
    const int64_t D = config->head_dim, Dv = config->v_dim, n_out = B * Hq * T * Dv;
    void *q = random_array(config->dtype, B * Hq * T * D);
    const double softcap = (const double[]){0, 0.5, 4, 30}[random_below(4)];
    float *sinks = random_below(2) ? random_array(LK_F32, Hq) : NULL;
    double *truth = calloc((size_t)n_out, sizeof *truth), q_row[LK_MAX_HEAD_DIM];
    CHECK(truth != NULL);
    for (int64_t b = 0; b < B; b++) {
        int64_t position = naive->row[b].len;
        for (int64_t t = T - 1; t >= 0; t--) {
            if (!naive->row[b].real[naive->n_columns - T + t]) continue;
            position--;
            for (int64_t h = 0; h < Hq; h++) {
                const int64_t at = (b * Hq + h) * T + t;
                for (int64_t c = 0; c < D; c++) q_row[c] = value_at(config->dtype, q, at * D + c);
                const double sink = sinks ? sinks[h] : -INFINITY;
                naive_attend(naive, b, position, h / R, q_row, 1 / sqrt((double)D), softcap, sink,
                             truth + at * Dv);
            }
        }
    }
    const char *before, *name;
    CHECK_OK(lk_isa(&before));
    int available;
    for (int i = 0; (name = lk_isa_built(i, &available)) != NULL; i++) {
        if (!available) continue;
        CHECK_OK(lk_isa_force(name));
        const size_t out_bytes = (size_t)n_out * lk_dtype_bytes(config->dtype);
        void *first = NULL;
        for (int n_threads = 1; n_threads <= 2; n_threads++) {
            void *o = random_array(config->dtype, n_out);
            const lk_decode_args args = {
                .cache = cache,
                .q = q,
                .q_stride = {Hq * T * D, T * D, D},
                .o = o,
                .o_stride = {Hq * T * Dv, T * Dv, Dv},
                .n_q_heads = Hq,
                .n_columns = T,
                .scale = (float)(1 / sqrt((double)D)),
                .softcap = (float)softcap,
                .sinks = sinks,
                .n_threads = n_threads,
            };
            CHECK_OK(lk_decode(&args));
            if (n_threads == 2) CHECK(memcmp(o, first, out_bytes) == 0);
            for (int64_t j = 0; j < n_out && n_threads == 1; j++) {
                const double error = fabs(value_at(config->dtype, o, j) - truth[j]);
                if (!(error <= tolerance[config->dtype])) {
                    fprintf(stderr, "%s, dtype %d: element %lld of o: error %g\n", name,
                            (int)config->dtype, (long long)j, error);
                    exit(1);
                }
            }
            if (n_threads == 1) first = o;
            else free(o);
        }
        free(first);
        n_compared += n_out;
    }
    CHECK_OK(lk_isa_force(before));
    free(q);
    free(sinks);
    free(truth);
}

#endif
