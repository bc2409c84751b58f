/* learn.h: the attention of mask learning in the C tests: o against one softmax in double per query, gradients of each
 * variant against those of the others. That the gradients are right
 * is for tests/test_learn_op.py. */
#ifndef LK_TEST_LEARN_H
#define LK_TEST_LEARN_H

#include "naive.h"

enum { LEARN_O, LEARN_LSE, LEARN_DQ, LEARN_DK, LEARN_DV, LEARN_DALPHA, LEARN_OUTPUTS };

/* o of query t of head h in row b, in double. */
static void naive_learn(const lk_learn_args *a, int64_t b, int64_t h, int64_t t, double *o) {
    const int64_t g = h / (a->n_q_heads / a->n_heads), query = a->n_context + t;
    const int64_t start = a->start[b], D = a->head_dim, Dv = a->v_dim;
    double total = 0;
    for (int64_t d = 0; d < Dv; d++) o[d] = 0;
    for (int64_t j = start; j <= query; j++) {
        const bool window = j - start < a->sink || query - j < a->recent;
        if (!window && a->hidden[g]) continue;
        const bool old = j < a->n_context;
        const lk_strided *k = old ? &a->k_context : &a->k, *v = old ? &a->v_context : &a->v;
        const int64_t at = old ? j : j - a->n_context;
        double logit = 0;
        for (int64_t c = 0; c < D; c++)
            logit +=
                value_at(a->dtype, a->q.data, b * a->q.stride[0] + h * a->q.stride[1] + t * D + c) *
                value_at(a->dtype, k->data, b * k->stride[0] + g * k->stride[1] + at * D + c) *
                (window ? 1.0 : (double)a->alpha[g * D + c]);
        const double p =
            exp(logit * (double)a->scale); /* logits of random_array are small enough */
        total += p;
        for (int64_t d = 0; d < Dv; d++)
            o[d] +=
                p * value_at(a->dtype, v->data, b * v->stride[0] + g * v->stride[1] + at * Dv + d);
    }
    for (int64_t d = 0; d < Dv && total > 0; d++) o[d] /= total;
}

static lk_strided random_strided(lk_dtype dtype, int64_t B, int64_t H, int64_t n, int64_t dim) {
    return (lk_strided){random_array(dtype, B * H * n * dim), {H * n * dim, n * dim, dim}};
}

/* Forward and backward; outputs are made here. */
static void run_learn(const lk_learn_args *a, const lk_strided *d_o, const int64_t *sizes,
                      void **out) {
    for (int i = 0; i < LEARN_OUTPUTS; i++)
        out[i] = random_array(i == LEARN_LSE || i == LEARN_DALPHA ? LK_F32 : a->dtype, sizes[i]);
    CHECK_OK(lk_learn_forward(a, out[LEARN_O], out[LEARN_LSE]));
    const int64_t T = a->n_columns, Dv = a->v_dim;
    const lk_learn_grads grads = {.d_o = *d_o,
                                  .o = {out[LEARN_O], {a->n_q_heads * T * Dv, T * Dv, Dv}},
                                  .lse = out[LEARN_LSE],
                                  .dq = out[LEARN_DQ],
                                  .dk = out[LEARN_DK],
                                  .dv = out[LEARN_DV],
                                  .dalpha = out[LEARN_DALPHA]};
    CHECK_OK(lk_learn_backward(a, &grads));
}

/* Exactly, or near the largest value. */
static void check_learn_same(const lk_learn_args *a, const int64_t *sizes, void **got, void **told,
                             double most) {
    for (int i = 0; i < LEARN_OUTPUTS; i++) {
        const lk_dtype dtype = i == LEARN_LSE || i == LEARN_DALPHA ? LK_F32 : a->dtype;
        if (most == 0) {
            CHECK(memcmp(got[i], told[i], (size_t)sizes[i] * lk_dtype_bytes(dtype)) == 0);
            continue;
        }
        double largest = 0;
        for (int64_t j = 0; j < sizes[i]; j++) {
            const double value = fabs(value_at(dtype, told[i], j));
            if (isfinite(value) && value > largest) largest = value;
        }
        for (int64_t j = 0; j < sizes[i]; j++) {
            const double x = value_at(dtype, got[i], j), y = value_at(dtype, told[i], j);
            CHECK(x == y || fabs(x - y) <= most * largest);
        }
    }
}

/* One random shape with each variant that can run, with one thread and two. Returns how many outputs were compared. */
static int64_t test_learn(lk_dtype dtype, double most) {
    const int64_t B = 2, Hkv = 2, R = 1 + random_below(3), T = 1 + random_below(90);
    const int64_t Lc = random_below(150), D = 1 + random_below(80), Dv = 1 + random_below(80);
    const int64_t start[2] = {0, random_below(Lc + T + 1)};
    const uint8_t hidden[2] = {0, (uint8_t)random_below(2)};
    const lk_learn_args one = {.dtype = dtype,
                               .n_rows = B,
                               .n_q_heads = Hkv * R,
                               .n_heads = Hkv,
                               .n_context = Lc,
                               .n_columns = T,
                               .head_dim = (int32_t)D,
                               .v_dim = (int32_t)Dv,
                               .sink = random_below(70),
                               .recent = 1 + random_below(70),
                               .scale = 0.02f,
                               .q = random_strided(dtype, B, Hkv * R, T, D),
                               .k_context = random_strided(dtype, B, Hkv, Lc, D),
                               .v_context = random_strided(dtype, B, Hkv, Lc, Dv),
                               .k = random_strided(dtype, B, Hkv, T, D),
                               .v = random_strided(dtype, B, Hkv, T, Dv),
                               .alpha = random_array(LK_F32, Hkv * D),
                               .start = start,
                               .hidden = hidden,
                               .n_threads = 1};
    lk_learn_args two = one;
    two.n_threads = 2;
    const lk_strided d_o = random_strided(dtype, B, Hkv * R, T, Dv);
    const int64_t n = B * Hkv * T;
    const int64_t sizes[LEARN_OUTPUTS] = {n * R * Dv, n * R, n * R * D, n * D, n * Dv, Hkv * D};
    void *first[LEARN_OUTPUTS] = {NULL}, *other[LEARN_OUTPUTS], *again[LEARN_OUTPUTS];
    const char *before, *name;
    int available;
    int64_t n_compared_here = 0;
    CHECK_OK(lk_isa(&before));
    for (int i = 0; (name = lk_isa_built(i, &available)) != NULL; i++) {
        if (!available) continue;
        CHECK_OK(lk_isa_force(name));
        run_learn(&one, &d_o, sizes, other);
        run_learn(&two, &d_o, sizes, again);
        check_learn_same(&one, sizes, again, other, 0);
        if (first[0]) check_learn_same(&one, sizes, other, first, most);
        for (int j = 0; j < LEARN_OUTPUTS; j++) {
            free(again[j]);
            if (first[j]) free(other[j]);
            else first[j] = other[j];
            n_compared_here += sizes[j];
        }
    }
    CHECK_OK(lk_isa_force(before));
    double o[80];
    for (int64_t i = 0; i < n * R; i++) {
        naive_learn(&one, i / T / (Hkv * R), i / T % (Hkv * R), i % T, o);
        for (int64_t d = 0; d < Dv; d++)
            CHECK(fabs(value_at(dtype, first[LEARN_O], i * Dv + d) - o[d]) <= most * 4);
    }
    two.recent = 0;
    CHECK(lk_learn_forward(&two, first[LEARN_O], first[LEARN_LSE]) == LK_E_VALUE);
    two = one;
    two.n_q_heads = Hkv * R + 1;
    CHECK(lk_learn_forward(&two, first[LEARN_O], first[LEARN_LSE]) == LK_E_SHAPE);
    const lk_strided *inputs[] = {&one.q, &one.k_context, &one.v_context, &one.k, &one.v, &d_o};
    for (int i = 0; i < 6; i++) free((void *)inputs[i]->data);
    free((void *)one.alpha);
    for (int j = 0; j < LEARN_OUTPUTS; j++) free(first[j]);
    return n_compared_here;
}

#endif
