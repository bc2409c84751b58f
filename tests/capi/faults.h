/* faults.h: every operation that allocates, with each of its allocations failing in turn: LK_E_NOMEM, and the cache and
 * those that share its pages are as they were, to the byte. That nothing is lost is for LeakSanitizer and valgrind. */
#ifndef LK_TEST_FAULTS_H
#define LK_TEST_FAULTS_H

#include "learn.h"

typedef struct {
    unsigned char *data;
    size_t n_bytes;
} cache_bytes;

static void add_bytes(cache_bytes *to, const void *data, size_t n_bytes) {
    to->data = realloc(to->data, to->n_bytes + n_bytes + 1);
    CHECK(to->data != NULL);
    if (n_bytes > 0) memcpy(to->data + to->n_bytes, data, n_bytes);
    to->n_bytes += n_bytes;
}

/* All that a caller can see of a cache. */
static cache_bytes bytes_of(const lk_cache *cache, const lk_config *config) {
    cache_bytes all = {NULL, 0};
    const lk_memory memory = lk_cache_memory(cache);
    const int64_t n_rows = lk_cache_n_rows(cache), n_columns = lk_cache_n_columns(cache);
    const int64_t sizes[] = {n_rows, n_columns, memory.n_pages, memory.n_twins};
    const size_t sums[] = {memory.k_bytes, memory.v_bytes, memory.slab_bytes};
    add_bytes(&all, sizes, sizeof sizes);
    add_bytes(&all, sums, sizeof sums);
    for (int64_t b = 0; b < n_rows; b++) {
        const int64_t row[] = {lk_cache_length(cache, b), lk_cache_prompt(cache, b),
                               lk_cache_lo(cache, b)};
        const size_t per_dim = (size_t)(config->n_heads * row[0]) * lk_dtype_bytes(config->dtype);
        const size_t k_bytes = per_dim * (size_t)config->head_dim;
        const size_t v_bytes = per_dim * (size_t)config->v_dim;
        void *k = malloc(k_bytes + 1), *v = malloc(v_bytes + 1);
        uint8_t *real = malloc((size_t)n_columns + 1);
        CHECK(k != NULL && v != NULL && real != NULL);
        lk_cache_real(cache, b, real);
        CHECK_OK(lk_cache_gather(cache, b, k, v));
        add_bytes(&all, row, sizeof row);
        add_bytes(&all, real, (size_t)n_columns);
        add_bytes(&all, k, k_bytes);
        add_bytes(&all, v, v_bytes);
        free(k), free(v), free(real);
    }
    return all;
}

static void check_bytes(const lk_cache *cache, const lk_config *config, const cache_bytes *told) {
    const cache_bytes got = bytes_of(cache, config);
    CHECK(got.n_bytes == told->n_bytes && memcmp(got.data, told->data, got.n_bytes) == 0);
    free(got.data);
}

/* What an operation is given besides the cache. */
typedef struct {
    const lk_config *config;
    const lk_span *span;
    lk_decode_args decode; /* of the span's columns; o is written */
} fault_args;

typedef lk_status (*fault_op)(lk_cache *cache, const fault_args *args);

static lk_status op_append(lk_cache *cache, const fault_args *args) {
    return lk_cache_append(cache, args->span);
}

static lk_status op_put(lk_cache *cache, const fault_args *args) {
    const lk_status status = lk_cache_put(cache, args->span);
    if (status == LK_OK) lk_cache_settle(cache);
    return status;
}

static lk_status op_attend(lk_cache *cache, const fault_args *args) {
    lk_decode_args decode = args->decode;
    decode.cache = cache;
    return lk_attend(cache, args->span, &decode);
}

static lk_status op_decode(lk_cache *cache, const fault_args *args) {
    lk_decode_args decode = args->decode;
    decode.cache = cache;
    decode.n_columns = 1;
    return lk_decode(&decode);
}

static lk_status op_select(lk_cache *cache, const fault_args *args) {
    (void)args;
    return lk_cache_select(cache, (const int64_t[]){1, 1, 0, 1}, 4);
}

static lk_status op_copy(lk_cache *cache, const fault_args *args) {
    (void)args;
    lk_cache *copy = NULL;
    const lk_status status = lk_cache_copy(cache, &copy);
    CHECK((copy != NULL) == (status == LK_OK));
    lk_cache_free(copy);
    return status;
}

/* Returns how many allocations the operation makes; `cache` has gone through it at the end. */
static int fail_each(lk_cache *cache, const fault_args *args, fault_op op) {
    const cache_bytes before = bytes_of(cache, args->config);
    for (int n = 1;; n++) {
        lk_test_fail_allocation(n);
        const lk_status status = op(cache, args);
        lk_test_fail_allocation(0);
        if (status == LK_OK) {
            free(before.data);
            return n - 1;
        }
        CHECK(status == LK_E_NOMEM);
        check_bytes(cache, args->config, &before);
    }
}

/* On a copy, whose pages are shared and must be copied first, then on the cache alone. */
static void fail_each_way(lk_cache *cache, const fault_args *args, fault_op op, int at_least) {
    const cache_bytes before = bytes_of(cache, args->config);
    lk_cache *copy;
    CHECK_OK(lk_cache_copy(cache, &copy));
    CHECK(fail_each(copy, args, op) >= at_least);
    lk_cache_free(copy); /* before the bytes of slabs are compared, which copies have in common */
    check_bytes(cache, args->config, &before);
    free(before.data);
    CHECK(fail_each(cache, args, op) >= at_least);
}

/* What may not fail does not allocate: the next allocation still fails after all of it. */
static void check_no_allocation(lk_cache *cache, const lk_config *config) {
    const int64_t length = lk_cache_length(cache, 0);
    void *k = random_array(config->dtype, config->n_heads * length * config->head_dim);
    void *v = random_array(config->dtype, config->n_heads * length * config->v_dim);
    lk_memory memory;
    lk_cache *other = NULL;
    lk_test_fail_allocation(1);
    const lk_status held = lk_cache_hold(cache, 1);
    CHECK(held == LK_OK || held == LK_E_STATE); /* reserved */
    CHECK_OK(lk_cache_gather(cache, 0, k, v));
    lk_cache_settle(cache);
    (void)lk_cache_memory(cache);
    CHECK_OK(lk_cache_crop(cache, lk_cache_n_columns(cache) / 2));
    CHECK(lk_cache_hold(cache, 0) == held);
    CHECK_OK(lk_cache_crop(cache, 0));
    CHECK_OK(lk_cache_expect_prompt(cache, 3));
    CHECK(lk_cache_create(config, 1, &other) == LK_E_NOMEM);
    CHECK(other == NULL);
    lk_test_fail_allocation(1);
    CHECK(lk_predict_memory(config, &length, 1, -1, 1, &memory) == LK_E_NOMEM);
    lk_test_fail_allocation(0);
    free(k), free(v);
}

static lk_cache *create_with_failures(const lk_config *config, int64_t max_tokens) {
    for (int n = 1;; n++) {
        lk_cache *cache = NULL;
        lk_test_fail_allocation(n);
        const lk_status status = max_tokens < 0
                                     ? lk_cache_create(config, 2, &cache)
                                     : lk_cache_create_reserved(config, 2, max_tokens, 70, &cache);
        lk_test_fail_allocation(0);
        CHECK((cache != NULL) == (status == LK_OK));
        if (status == LK_OK) {
            CHECK(n > 4); /* the pool, its geometry, the cache, its rows */
            return cache;
        }
        CHECK(status == LK_E_NOMEM);
    }
}

static void test_cache_faults(const lk_config *config, int64_t max_tokens) {
    lk_cache *cache = create_with_failures(config, max_tokens);
    const int64_t sizes[] = {130, 1, 3, 70}, Hq = 2 * config->n_heads;
    const fault_op ops[] = {op_append, op_put, op_attend};
    for (int i = 0; i < 4; i++) {
        const int64_t T = sizes[i], Hkv = config->n_heads, D = config->head_dim, Dv = config->v_dim;
        const lk_span span = {.k = random_array(config->dtype, 4 * Hkv * T * D),
                              .v = random_array(config->dtype, 4 * Hkv * T * Dv),
                              .k_stride = {Hkv * T * D, T * D, D},
                              .v_stride = {Hkv * T * Dv, T * Dv, Dv},
                              .n_columns = T};
        void *q = random_array(config->dtype, 4 * Hq * T * D);
        void *o = random_array(config->dtype, 4 * Hq * T * Dv);
        const fault_args args = {.config = config,
                                 .span = &span,
                                 .decode = {.q = q,
                                            .q_stride = {Hq * T * D, T * D, D},
                                            .o = o,
                                            .o_stride = {Hq * T * Dv, T * Dv, Dv},
                                            .n_q_heads = Hq,
                                            .n_columns = T,
                                            .scale = 0.25f,
                                            .n_threads = 1}};
        fail_each_way(cache, &args, ops[i % 3], 2);
        fail_each_way(cache, &args, op_decode, 4);
        fail_each_way(cache, &args, op_copy, 3);
        if (i == 1) fail_each_way(cache, &args, op_select, 3);
        free((void *)span.k), free((void *)span.v), free(q), free(o);
    }
    check_no_allocation(cache, config);
    lk_cache_free(cache);
}

/* Mask learning and selection: nothing is written before all is allocated. */
static void test_other_faults(void) {
    enum { T = 5, D = 8, N = 2 * T * D };
    float x[N], alpha[2 * D], o[N], lse[2 * T], dq[N], dk[N], dv[N], dalpha[2 * D];
    for (int i = 0; i < N; i++) x[i] = (float)(i % 7) / 8;
    for (int i = 0; i < 2 * D; i++) alpha[i] = 1;
    const lk_strided in = {x, {N, T * D, D}}, out = {o, {N, T * D, D}};
    const lk_learn_args args = {.dtype = LK_F32,
                                .n_rows = 1,
                                .n_q_heads = 2,
                                .n_heads = 2,
                                .n_columns = T,
                                .head_dim = D,
                                .v_dim = D,
                                .recent = 2,
                                .scale = 1,
                                .q = in,
                                .k_context = in,
                                .v_context = in,
                                .k = in,
                                .v = in,
                                .alpha = alpha,
                                .n_threads = 2};
    const lk_learn_grads grads = {
        .d_o = in, .o = out, .lse = lse, .dq = dq, .dk = dk, .dv = dv, .dalpha = dalpha};
    uint8_t keep[2 * D];
    for (int which = 0; which < 3; which++) {
        lk_status status = LK_E_NOMEM;
        int n = 0;
        while (status != LK_OK) {
            const float unwritten = -77;
            o[0] = which == 1 ? o[0] : unwritten;
            dq[0] = dalpha[0] = unwritten;
            keep[0] = 77;
            lk_test_fail_allocation(++n);
            status = which == 0   ? lk_learn_forward(&args, o, lse)
                     : which == 1 ? lk_learn_backward(&args, &grads)
                                  : lk_mask_select(alpha, 2, D, 0.5, 8, keep);
            lk_test_fail_allocation(0);
            if (status == LK_OK) break;
            CHECK(status == LK_E_NOMEM && keep[0] == 77);
            CHECK(dq[0] == unwritten && dalpha[0] == unwritten);
            CHECK(which == 1 || o[0] == unwritten);
        }
        CHECK(n > 1);
    }
}

static void test_faults(const lk_config *config) {
    test_cache_faults(config, -1);
    test_cache_faults(config, 320);
    test_other_faults();
}

#endif
