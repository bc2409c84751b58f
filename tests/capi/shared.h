/* shared.h: copies of one cache in several threads at once, as leank.h allows: they share pages, and each copies what it
 * writes to. For TSan, and for the contents. */
#ifndef LK_TEST_SHARED_H
#define LK_TEST_SHARED_H

#include "naive.h"

#include <pthread.h>

#define N_SHARERS 3

typedef struct {
    const lk_config *config;
    lk_cache *cache; /* this thread's */
    const lk_span *many, *one;
    const void *q;
    uint16_t o[4 * 4 * 80 * 2]; /* [1, 2 Hkv, 1, Dv] of any dtype */
} sharer;

static void *use_copy(void *argument) {
    sharer *own = argument;
    const lk_config *config = own->config;
    const int64_t Hq = 2 * config->n_heads, D = config->head_dim, Dv = config->v_dim;
    const lk_decode_args args = {.cache = own->cache,
                                 .q = own->q,
                                 .q_stride = {Hq * D, D, D},
                                 .o = own->o,
                                 .o_stride = {Hq * Dv, Dv, Dv},
                                 .n_q_heads = Hq,
                                 .n_columns = 1,
                                 .scale = 0.25f,
                                 .n_threads = 2};
    for (int i = 0; i < 4; i++) {
        lk_cache *other;
        CHECK_OK(lk_cache_append(own->cache, own->one)); /* into the shared last page */
        CHECK_OK(lk_decode(&args));
        CHECK_OK(lk_cache_copy(own->cache, &other));
        CHECK_OK(lk_cache_append(own->cache, own->many));
        CHECK_OK(lk_cache_crop(own->cache, 100));
        (void)lk_cache_memory(own->cache);
        lk_cache_free(other);
    }
    CHECK_OK(lk_attend(own->cache, own->one, &args));
    return NULL;
}

/* All threads do the same, so they come to the same output as one thread alone. */
static void test_shared_pages(const lk_config *config) {
    const int64_t Hkv = config->n_heads, D = config->head_dim, Dv = config->v_dim;
    void *k = random_array(config->dtype, Hkv * 130 * D),
         *v = random_array(config->dtype, Hkv * 130 * Dv);
    void *q = random_array(config->dtype, 2 * Hkv * D);
    lk_span many = {.k = k,
                    .v = v,
                    .k_stride = {Hkv * 130 * D, 130 * D, D},
                    .v_stride = {Hkv * 130 * Dv, 130 * Dv, Dv},
                    .n_columns = 130,
                    .n_threads = 2},
            one = many;
    one.n_columns = 1;
    lk_cache *cache;
    CHECK_OK(lk_cache_create(config, 1, &cache));
    CHECK_OK(lk_cache_append(cache, &many));
    const lk_memory before = lk_cache_memory(cache);
    static sharer sharers[N_SHARERS + 1]; /* the last one alone, afterwards */
    pthread_t thread[N_SHARERS];
    for (int i = 0; i <= N_SHARERS; i++) {
        sharers[i] = (sharer){.config = config, .many = &many, .one = &one, .q = q};
        CHECK_OK(lk_cache_copy(cache, &sharers[i].cache));
    }
    for (int i = 0; i < N_SHARERS; i++)
        CHECK(pthread_create(&thread[i], NULL, use_copy, &sharers[i]) == 0);
    for (int i = 0; i < N_SHARERS; i++) CHECK(pthread_join(thread[i], NULL) == 0);
    (void)use_copy(&sharers[N_SHARERS]);
    for (int i = 0; i <= N_SHARERS; i++) {
        CHECK(memcmp(sharers[i].o, sharers[N_SHARERS].o, sizeof sharers[i].o) == 0);
        lk_cache_free(sharers[i].cache);
    }
    const lk_memory after = lk_cache_memory(cache);
    CHECK(after.n_pages == before.n_pages && after.slab_bytes == before.slab_bytes);
    lk_cache_free(cache);
    free(k), free(v), free(q);
}

#endif
