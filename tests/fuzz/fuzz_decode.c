/* fuzz_decode.c: the arguments of lk_decode: sizes, factors, sinks and strides of any kind. A wrong one is the status that
 * leank.h promises, with nothing written; else the outputs, and nothing beside them, are written, the same with one
 * thread and two. Values are any bits: what the numbers are is for fuzz_cache.c, which compares them. */
#include "input.h"

#include <float.h>

/* A place for [B, H, T, dim]: axes in any order, with gaps, forwards or backwards. */
typedef struct {
    unsigned char *memory;
    size_t n_bytes;
    void *first; /* element 0 */
    int64_t stride[3];
} place;

static place make_place(fuzz_input *in, lk_dtype dtype, const int64_t n[3], int64_t dim) {
    static const int orders[6][3] = {{0, 1, 2}, {0, 2, 1}, {1, 0, 2},
                                     {1, 2, 0}, {2, 0, 1}, {2, 1, 0}};
    const uint8_t choice = take_byte(in);
    const int *order = orders[choice % 6];
    const size_t elem_bytes = lk_dtype_bytes(dtype);
    int64_t step = dim + choice / 8 % 4, first = 0;
    place made;
    for (int i = 2; i >= 0; i--) {
        const int axis = order[i];
        const bool backwards = choice >> (5 + i) & 1;
        made.stride[axis] = backwards ? -step : step;
        if (backwards) first += step * (n[axis] - 1);
        step *= n[axis];
    }
    made.n_bytes = (size_t)step * elem_bytes;
    made.memory = malloc(made.n_bytes);
    CHECK(made.memory != NULL);
    made.first = made.memory + (size_t)first * elem_bytes;
    return made;
}

static void fill(fuzz_input *in, place *p, lk_dtype dtype) {
    if (take_byte(in) % 2) { /* numbers */
        void *values = random_array(dtype, (int64_t)(p->n_bytes / lk_dtype_bytes(dtype)));
        memcpy(p->memory, values, p->n_bytes);
        free(values);
        return;
    }
    const uint32_t bits = take_u32(in); /* NaN, infinities, denormals: two values in turn */
    for (size_t i = 0; i < p->n_bytes; i++) p->memory[i] = (uint8_t)(bits >> i % 4 * 8);
}

static lk_status expected_status(const lk_decode_args *args, const lk_config *config,
                                 int64_t n_columns) {
    const double log2_e = 1.4426950408889634;
    if (!isfinite((float)((double)args->scale * log2_e))) return LK_E_VALUE;
    if (!(args->softcap >= 0) || !isfinite((float)((double)args->softcap * log2_e)))
        return LK_E_VALUE;
    if (args->n_q_heads < 1 || args->n_q_heads % config->n_heads != 0) return LK_E_SHAPE;
    if (n_columns == 0) return LK_E_STATE;
    if (args->n_columns < 1 || args->n_columns > n_columns) return LK_E_SHAPE;
    if (args->n_q_heads > INT64_MAX / LK_MAX_HEAD_DIM / 4 / args->n_columns) return LK_E_SHAPE;
    return LK_OK;
}

static float take_factor(fuzz_input *in) {
    static const float usual[] = {0, 1, 0.25f, 30, -1, 1e-30f, 3e38f, FLT_MIN / 4};
    const uint8_t choice = take_byte(in);
    return choice < 128 ? usual[choice % 8] : take_float(in);
}

/* Bits that no output has by chance, to see what was not written. */
static void mark(place *p) { memset(p->memory, 0x5a, p->n_bytes); }

static void check_marks(const place *p, const int64_t n[3], int64_t dim, size_t elem_bytes) {
    uint8_t *is_output = calloc(p->n_bytes, 1);
    CHECK(is_output != NULL);
    for (int64_t b = 0; b < n[0]; b++)
        for (int64_t h = 0; h < n[1]; h++)
            for (int64_t t = 0; t < n[2]; t++) {
                const ptrdiff_t at = (unsigned char *)p->first - p->memory +
                                     (ptrdiff_t)elem_bytes *
                                         (b * p->stride[0] + h * p->stride[1] + t * p->stride[2]);
                memset(is_output + at, 1, (size_t)dim * elem_bytes);
            }
    for (size_t i = 0; i < p->n_bytes; i++) CHECK(is_output[i] || p->memory[i] == 0x5a);
    free(is_output);
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size) {
    fuzz_input in = {data, size};
    uint8_t keep[3 * 32], valid[2 * 256];
    random_state = 20250820;
    lk_test_poison(1);
    const lk_config config = take_config(&in, keep);
    const size_t elem_bytes = lk_dtype_bytes(config.dtype);
    const int64_t B = 1 + take_below(&in, 2), D = config.head_dim, Dv = config.v_dim;
    lk_cache *cache;
    CHECK_OK(lk_cache_create(&config, B, &cache));
    /* Old columns, then those that are put and may be attended. */
    const int64_t calls[2] = {take_byte(&in), take_below(&in, 70)};
    const uint8_t pattern = take_byte(&in);
    for (int64_t i = 0; i < 2 * 256; i++) valid[i] = pattern >> i % 8 & 1;
    for (int i = 0; i < 2; i++) {
        if (calls[i] == 0) continue;
        const int64_t shape[3] = {B, config.n_heads, calls[i]};
        place k = make_place(&in, config.dtype, shape, D);
        place v = make_place(&in, config.dtype, shape, Dv);
        fill(&in, &k, config.dtype);
        fill(&in, &v, config.dtype);
        lk_span span = {.k = k.first,
                        .v = v.first,
                        .valid = pattern ? valid : NULL,
                        .n_columns = calls[i],
                        .n_threads = 1};
        memcpy(span.k_stride, k.stride, sizeof k.stride);
        memcpy(span.v_stride, v.stride, sizeof v.stride);
        CHECK_OK(i == 0 ? lk_cache_append(cache, &span) : lk_cache_put(cache, &span));
        free(k.memory), free(v.memory);
    }
    const int64_t heads[] = {config.n_heads, 2 * config.n_heads, 7 * config.n_heads};
    const int64_t wrong[] = {0, -1, INT64_MIN, INT64_MAX,
                             config.n_heads == 1 ? 0 : config.n_heads + 1};
    const int64_t wrong_columns[] = {0, -1, INT64_MAX, calls[0] + calls[1] + 1};
    const uint8_t wrong_one = take_byte(&in);
    const int64_t Hq = heads[take_below(&in, 3)];
    const int64_t T = calls[1] > 0 ? calls[1] : 1;
    const int64_t shape[3] = {B, Hq, T};
    place q = make_place(&in, config.dtype, shape, D), o = make_place(&in, config.dtype, shape, Dv);
    fill(&in, &q, config.dtype);
    mark(&o);
    float sinks[7 * 3];
    for (int i = 0; i < 7 * 3; i++) sinks[i] = i < 3 ? take_float(&in) : (float)i;
    lk_decode_args args = {.cache = cache,
                           .q = q.first,
                           .o = o.first,
                           .n_q_heads = Hq,
                           .n_columns = T,
                           .scale = take_factor(&in),
                           .softcap = take_factor(&in),
                           .sinks = take_byte(&in) % 2 ? sinks : NULL,
                           .n_threads = 1};
    memcpy(args.q_stride, q.stride, sizeof q.stride);
    memcpy(args.o_stride, o.stride, sizeof o.stride);
    if (wrong_one >= 251) args.n_q_heads = wrong[wrong_one - 251];
    else if (wrong_one >= 247) args.n_columns = wrong_columns[wrong_one - 247];
    else if (wrong_one >= 236) lk_test_fail_allocation(wrong_one - 235);
    const lk_status status = lk_decode(&args);
    lk_test_fail_allocation(0);
    const lk_status expected = expected_status(&args, &config, calls[0] + calls[1]);
    CHECK(status == expected ||
          (expected == LK_OK && status == LK_E_NOMEM && wrong_one >= 236 && wrong_one < 247));
    check_marks(&o, shape, status == LK_OK ? Dv : 0, elem_bytes);
    if (status == LK_OK) {
        place again = o;
        again.memory = malloc(o.n_bytes);
        CHECK(again.memory != NULL);
        again.first = again.memory + ((unsigned char *)o.first - o.memory);
        mark(&again);
        args.o = again.first;
        args.n_threads = 2;
        CHECK_OK(lk_decode(&args));
        CHECK(memcmp(o.memory, again.memory, o.n_bytes) == 0);
        free(again.memory);
    }
    free(q.memory), free(o.memory);
    lk_cache_free(cache);
    return 0;
}
