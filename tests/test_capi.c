/* test_capi.c: the C library without Python, for sanitizers, valgrind and emulators.
 *
 *   test_capi [SETTINGS]                  random calls against naive.h, errors, failing allocations
 *   test_capi soak COLUMNS                as many columns through one long cache of each dtype
 *   test_capi vectors FILE [VARIANT...]   the cases that tests/capi/neon.py wrote, on each variant
 *
 * Built by tests/capi/build.py. The error bounds here are coarse; tests/compare.py has the budget. */
#include "capi/checks.h"
#include "capi/faults.h"
#include "capi/shared.h"

/* ------------------------------------------------------------------------------------- random calls */

static const int64_t call_sizes[] = {1, 1, 1, 2, 17, 63, 64, 65, 130};

/* One call through one of the ways there are; returns its columns. `look`: compare the outputs too. */
static int64_t append_some(lk_cache *cache, naive_cache *naive, bool attend, int64_t n_q_heads,
                           bool look) {
    const int64_t n_sizes = sizeof call_sizes / sizeof *call_sizes;
    const int64_t T = call_sizes[random_below(n_sizes)];
    uint8_t valid[MAX_ROWS * 130];
    const bool ragged = random_below(3) == 0;
    for (int64_t i = 0; i < naive->n_rows * T; i++) valid[i] = !ragged || random_below(4) > 0;
    lk_span span = random_span(&naive->config, naive->n_rows, T, ragged ? valid : NULL);
    naive_put(naive, &span);
    if (attend) {
        CHECK_OK(lk_cache_put(cache, &span));
        if (look) check_decode(cache, naive, n_q_heads, T);
        lk_cache_settle(cache);
        naive_settle(naive);
    } else {
        CHECK_OK(lk_cache_append(cache, &span));
        naive_settle(naive);
        if (look && T == 1) check_decode(cache, naive, n_q_heads, 1);
    }
    free_span(&span);
    return T;
}

typedef struct {
    int64_t n_columns, most_columns; /* appended in all; and at a time, about */
    int64_t look_every;              /* calls; at all that is stored 8 times more rarely */
} run_size;

/* The longer the cache is, the more often most of it goes; else a few columns, as drafts do. */
static int64_t crop_to(int64_t n_columns, int64_t most_columns) {
    if (random_below(most_columns) < n_columns && random_below(2))
        return random_below(n_columns + 1);
    return n_columns - random_below(n_columns < 100 ? n_columns + 1 : 100);
}

static int64_t n_random_calls, n_longest; /* of a soak: calls, and columns at a time */

static void run_random_calls(const lk_config *config, int64_t n_q_heads, run_size size) {
    lk_cache *cache, *copy = NULL;
    naive_cache *naive = malloc(sizeof *naive), *naive_of_copy = malloc(sizeof *naive_of_copy);
    CHECK(naive != NULL && naive_of_copy != NULL);
    naive_init(naive, config, 1 + random_below(3));
    CHECK_OK(lk_cache_create(config, naive->n_rows, &cache));
    for (int64_t n_appended = 0; n_appended < size.n_columns; n_random_calls++) {
        const bool look = n_random_calls % size.look_every == 0;
        const int64_t kind = naive->n_columns > size.most_columns ? 8 : random_below(13);
        if (naive->n_columns == 0 && random_below(2)) {
            naive->announced = 1 + random_below(200);
            CHECK_OK(lk_cache_expect_prompt(cache, naive->announced));
        }
        if (kind < 8) n_appended += append_some(cache, naive, kind % 2 == 0, n_q_heads, look);
        else if (kind == 8) {
            const int64_t n = crop_to(naive->n_columns, size.most_columns);
            CHECK_OK(lk_cache_crop(cache, n));
            naive_crop(naive, n);
        } else if (kind == 9) {
            const int64_t n = 1 + random_below(MAX_ROWS);
            int64_t rows[MAX_ROWS];
            for (int64_t b = 0; b < n; b++) rows[b] = random_below(naive->n_rows);
            CHECK_OK(lk_cache_select(cache, rows, n));
            naive_select(naive, rows, n);
        } else if (kind == 10 && copy == NULL) {
            CHECK_OK(lk_cache_copy(cache, &copy));
            *naive_of_copy = *naive;
            for (int64_t b = 0; b < MAX_ROWS; b++) naive_of_copy->row[b] = naive_copy_row(naive, b);
        } else if (kind == 11 && copy != NULL) { /* go on with either of the two */
            check_state(copy, naive_of_copy);
            check_gather(copy, naive_of_copy);
            const bool swap = random_below(2);
            lk_cache_free(swap ? cache : copy);
            naive_free_rows(swap ? naive : naive_of_copy);
            if (swap) {
                cache = copy;
                *naive = *naive_of_copy;
            }
            copy = NULL;
        } else if (kind == 12) {
            const bool on = random_below(3) > 0;
            CHECK_OK(lk_cache_hold(cache, on));
            naive_hold(naive, on);
        }
        if (naive->n_columns > n_longest) n_longest = naive->n_columns;
        check_state(cache, naive);
        check_memory(cache, naive);
        if (n_random_calls % (8 * size.look_every) == 0) check_gather(cache, naive);
    }
    check_gather(cache, naive);
    if (copy != NULL) {
        check_gather(copy, naive_of_copy);
        lk_cache_free(copy);
        naive_free_rows(naive_of_copy);
    }
    CHECK_OK(lk_cache_crop(cache, 0));
    CHECK(lk_cache_memory(cache).slab_bytes == 0); /* no page was lost on the way */
    lk_cache_free(cache);
    naive_free_rows(naive);
    free(naive);
    free(naive_of_copy);
}

/* -------------------------------------------------------------------- memory and limits */

static void test_memory(const lk_config *config) {
    lk_cache *cache;
    lk_memory predicted;
    CHECK_OK(lk_cache_create(config, 1, &cache));
    for (int64_t n = 0; n < 400; n += 50) {
        lk_span span = random_span(config, 1, 50, NULL);
        CHECK_OK(lk_cache_append(cache, &span));
        free_span(&span);
        const int64_t length = lk_cache_length(cache, 0);
        CHECK_OK(lk_predict_memory(config, &length, 1, -1, 1, &predicted));
        CHECK(same_memory(predicted, lk_cache_memory(cache)));
    }
    lk_cache_free(cache);

    CHECK_OK(lk_cache_create_reserved(config, 2, 100, 60, &cache));
    CHECK(lk_cache_hold(cache, 1) == LK_E_STATE);
    CHECK_OK(lk_predict_memory(config, NULL, 2, 100, 60, &predicted));
    CHECK(same_memory(predicted, lk_cache_memory(cache)));
    lk_span span = random_span(config, 2, 60, NULL);
    CHECK_OK(lk_cache_append(cache, &span));
    CHECK(lk_cache_append(cache, &span) == LK_E_LIMIT);
    CHECK(lk_cache_n_columns(cache) == 60 && lk_cache_length(cache, 1) == 60);
    CHECK(same_memory(predicted, lk_cache_memory(cache)));
    free_span(&span);
    lk_cache_free(cache);
}

static void test_errors(const lk_config *config) {
    lk_cache *cache;
    lk_config wrong = *config;
    wrong.recent = 0;
    CHECK(lk_cache_create(&wrong, 1, &cache) == LK_E_VALUE);
    wrong = *config;
    wrong.head_dim = 12;
    CHECK(lk_cache_create(&wrong, 1, &cache) == LK_E_SHAPE);
    CHECK_OK(lk_cache_create(config, 1, &cache));
    CHECK(lk_cache_crop(cache, 1) == LK_E_VALUE);
    const int64_t row = 1;
    CHECK(lk_cache_select(cache, &row, 1) == LK_E_VALUE);
    lk_span span = random_span(config, 1, 2, NULL);
    CHECK_OK(lk_cache_append(cache, &span));
    CHECK(lk_cache_expect_prompt(cache, 5) == LK_E_STATE);
    lk_decode_args args = {
        .cache = cache, .q = span.k, .o = (void *)span.v, .n_q_heads = 4, .n_columns = 2};
    const float bad[] = {-1, -INFINITY, INFINITY, NAN, 3e38f};
    for (int i = 0; i < 5; i++) {
        args.softcap = bad[i];
        CHECK(lk_decode(&args) == LK_E_VALUE && lk_attend(cache, &span, &args) == LK_E_VALUE);
        CHECK(lk_cache_n_columns(cache) == 2 && lk_cache_length(cache, 0) == 2);
    }
    free_span(&span);
    lk_cache_free(cache);
    lk_cache_free(NULL);
    CHECK(lk_isa_force("no such set") == LK_E_ISA);
    for (int i = 0; i <= LK_E_ISA; i++) CHECK(strlen(lk_status_text((lk_status)i)) > 0);
}

/* After a put that was not settled nothing else may be added, and the cache may still be freed. */
static void test_unsettled(const lk_config *config) {
    lk_cache *cache, *copy;
    CHECK_OK(lk_cache_create(config, 1, &cache));
    lk_span span = random_span(config, 1, 3, NULL);
    void *o = random_array(config->dtype, 3 * 4 * config->v_dim);
    void *q = random_array(config->dtype, 3 * 4 * config->head_dim);
    for (int i = 0; i < 2; i++) { /* into a page of its own, and into one that is shared */
        CHECK_OK(lk_cache_put(cache, &span));
        const lk_decode_args args = {
            .cache = cache,
            .q = q,
            .q_stride = {0, 3 * config->head_dim, config->head_dim},
            .o = o,
            .o_stride = {0, 3 * config->v_dim, config->v_dim},
            .n_q_heads = 4,
            .n_columns = 3,
            .scale = 1,
        };
        CHECK(lk_cache_put(cache, &span) == LK_E_STATE);
        CHECK(lk_cache_append(cache, &span) == LK_E_STATE);
        CHECK(lk_attend(cache, &span, &args) == LK_E_STATE);
        CHECK(lk_cache_n_columns(cache) == 3 * i + 3 && lk_cache_length(cache, 0) == 3 * i + 3);
        if (i == 1) break;
        lk_cache_settle(cache);
        CHECK_OK(lk_cache_copy(cache, &copy));
    }
    lk_cache_free(cache);
    CHECK_OK(lk_cache_append(copy, &span)); /* the page is its own again */
    CHECK(lk_cache_memory(copy).n_pages == 1);
    CHECK_OK(lk_cache_crop(copy, 0));
    CHECK(lk_cache_memory(copy).slab_bytes == 0);
    lk_cache_free(copy);
    free_span(&span), free(o), free(q);
}

/* ------------------------------------------------------------------------------------------ vectors */

static void read_into(FILE *file, void *data, size_t bytes) {
    CHECK(fread(data, 1, bytes, file) == bytes);
}

static int64_t read_int(FILE *file) {
    int64_t value;
    read_into(file, &value, sizeof value);
    return value;
}

static double read_double(FILE *file) {
    double value;
    read_into(file, &value, sizeof value);
    return value;
}

static void *read_array(FILE *file, int64_t n, size_t item_bytes) {
    void *data = malloc((size_t)n * item_bytes + 1);
    CHECK(data != NULL);
    read_into(file, data, (size_t)n * item_bytes);
    return data;
}

/* One case; the order of the fields is that of write_case() in neon.py. Returns the worst error / budget. */
static double run_case(FILE *file) {
    lk_config config = {.dtype = (lk_dtype)read_int(file)};
    const size_t elem_bytes = lk_dtype_bytes(config.dtype);
    const int64_t B = read_int(file), Hq = read_int(file), Hkv = read_int(file);
    const int64_t D = read_int(file), Dv = read_int(file);
    config.n_heads = (int32_t)Hkv;
    config.head_dim = (int32_t)D;
    config.v_dim = (int32_t)Dv;
    config.sink = read_int(file);
    config.recent = read_int(file);
    config.slack = read_int(file);
    const int64_t n_calls = read_int(file);
    const double softcap = read_double(file);
    uint8_t *keep = read_array(file, Hkv * D, 1);
    float *sinks = read_array(file, Hq, sizeof *sinks);
    config.keep = keep;
    lk_cache *cache;
    CHECK_OK(lk_cache_create(&config, B, &cache));
    double worst = 0;
    for (int64_t i = 0; i < n_calls; i++) {
        const int64_t T = read_int(file), n_out = Hq * T * Dv;
        uint8_t *valid = read_array(file, B * T, 1);
        void *k = read_array(file, B * Hkv * T * D, elem_bytes);
        void *v = read_array(file, B * Hkv * T * Dv, elem_bytes);
        void *q = read_array(file, B * Hq * T * D, elem_bytes);
        double *truth = read_array(file, B * n_out, sizeof *truth);
        double *budget = read_array(file, B, sizeof *budget);
        void *o = random_array(config.dtype, B * n_out);
        const lk_span span = {
            .k = k,
            .v = v,
            .k_stride = {Hkv * T * D, T * D, D},
            .v_stride = {Hkv * T * Dv, T * Dv, Dv},
            .valid = valid,
            .n_columns = T,
        };
        const lk_decode_args args = {
            .cache = cache,
            .q = q,
            .q_stride = {Hq * T * D, T * D, D},
            .o = o,
            .o_stride = {n_out, T * Dv, Dv},
            .n_q_heads = Hq,
            .n_columns = T,
            .scale = (float)(1 / sqrt((double)D)),
            .softcap = (float)softcap,
            .sinks = sinks,
            .n_threads = 1,
        };
        CHECK_OK(lk_cache_put(cache, &span));
        CHECK_OK(lk_decode(&args));
        lk_cache_settle(cache);
        for (int64_t j = 0; j < B * n_out; j++) {
            const double error = fabs(value_at(config.dtype, o, j) - truth[j]);
            const double share = error == 0 ? 0 : error / budget[j / n_out];
            if (!(share <= worst)) worst = share; /* keeps a NaN */
            CHECK(share <= 1);
        }
        free(valid), free(k), free(v), free(q), free(truth), free(budget), free(o);
    }
    lk_cache_free(cache);
    free(keep), free(sinks);
    return worst;
}

static void run_vectors(const char *path, char **names, int n_names) {
    FILE *file = fopen(path, "rb");
    CHECK(file != NULL);
    for (int i = 0; i < n_names; i++) {
        CHECK_OK(lk_isa_force(names[i]));
        rewind(file);
        double worst = 0;
        const int64_t n_cases = read_int(file);
        for (int64_t j = 0; j < n_cases; j++) worst = fmax(worst, run_case(file));
        CHECK(fgetc(file) == EOF);
        printf("%s: %lld cases within budget, largest error %.2f of it\n", names[i],
               (long long)n_cases, worst);
    }
    fclose(file);
}

/* --------------------------------------------------------------------------------------------- main */

/* Heads of each kind: empty, with 8 channels, whole, and without 8. Spread, and other ones for each head; 3 divides
 * no head_dim. */
static void fill_keep(uint8_t *keep, int32_t head_dim) {
    memset(keep, 0, (size_t)(4 * head_dim));
    const int32_t kept[] = {0, 8, head_dim, head_dim - 8};
    for (int g = 0; g < 4; g++)
        for (int32_t c = 0; c < kept[g]; c++) keep[g * head_dim + (c * 3 + g) % head_dim] = 1;
}

static void soak(int64_t n_columns) {
    uint8_t keep[4 * 16];
    fill_keep(keep, 16);
    for (lk_dtype dtype = LK_F32; dtype <= LK_F16; dtype++) {
        const lk_config config = {.dtype = dtype,
                                  .n_heads = 4,
                                  .head_dim = 16,
                                  .v_dim = 24,
                                  .sink = 35,
                                  .recent = 100,
                                  .slack = 64,
                                  .keep = keep};
        n_random_calls = n_longest = n_compared = n_predicted = 0;
        run_random_calls(&config, 8, (run_size){n_columns, 15000, 40});
        CHECK(n_compared > 0 && n_predicted > 0);
        printf(
            "dtype %d: %lld columns, up to %lld at a time, in %lld calls; bytes as expected after "
            "each, after %lld what lk_predict_memory says; %lld outputs compared\n",
            (int)dtype, (long long)n_columns, (long long)n_longest, (long long)n_random_calls,
            (long long)n_predicted, (long long)n_compared);
        fflush(stdout);
    }
}

int main(int argc, char **argv) {
    lk_test_poison(1);
    if (argc > 3 && strcmp(argv[1], "vectors") == 0) {
        run_vectors(argv[2], argv + 3, argc - 3);
        return 0;
    }
    if (argc == 3 && strcmp(argv[1], "soak") == 0) {
        soak(atoll(argv[2]));
        return 0;
    }
    const int n_settings = argc > 1 ? atoi(argv[1]) : 9;
    const int32_t dims[] = {16, 64, 80};
    uint8_t keep[4 * 80];
    for (int i = 0; i < n_settings; i++) {
        lk_config config = {.dtype = (lk_dtype)(i % 3), .n_heads = 4, .keep = keep};
        config.head_dim = dims[i / 3 % 3];
        config.v_dim = i % 2 ? config.head_dim : 24;
        config.sink = random_below(3) * 35;
        config.recent = 1 + random_below(100);
        config.slack = random_below(2) * 64;
        fill_keep(keep, config.head_dim);
        run_random_calls(&config, 4 * (1 + random_below(4)), (run_size){1000, 700, 1});
        test_memory(&config);
        if (i < 3) test_faults(&config); /* each dtype */
        test_errors(&config);
        test_unsettled(&config);
        test_shared_pages(&config);
        n_compared += test_learn(config.dtype, tolerance[config.dtype]);
    }
    const char *name;
    int available;
    printf("C tests passed: %lld outputs compared, with", (long long)n_compared);
    for (int i = 0; (name = lk_isa_built(i, &available)) != NULL; i++)
        if (available) printf(" %s", name);
    printf("\n");
    return 0;
}
