/* input.h: bytes of a fuzzer's input as choices; past its end every choice is 0. */
#ifndef LK_FUZZ_INPUT_H
#define LK_FUZZ_INPUT_H

#include "../capi/checks.h"

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size);

typedef struct {
    const uint8_t *data;
    size_t left;
} fuzz_input;

static inline uint8_t take_byte(fuzz_input *in) {
    if (in->left == 0) return 0;
    in->left--;
    return *in->data++;
}

static inline int64_t take_below(fuzz_input *in, int64_t n) { return take_byte(in) % n; }

static inline uint32_t take_u32(fuzz_input *in) {
    uint32_t value = 0;
    for (int i = 0; i < 4; i++) value = value << 8 | take_byte(in);
    return value;
}

static inline float take_float(fuzz_input *in) {
    const uint32_t bits = take_u32(in);
    float value;
    memcpy(&value, &bits, sizeof value);
    return value;
}

/* A layer with up to 3 heads of up to 32 channels; keep [3 * 32] is filled in and used by the config. */
static inline lk_config take_config(fuzz_input *in, uint8_t *keep) {
    lk_config config = {.dtype = (lk_dtype)take_below(in, 3), .keep = keep};
    config.n_heads = 1 + (int32_t)take_below(in, 3);
    config.head_dim = 8 * (1 + (int32_t)take_below(in, 4));
    config.v_dim = 8 * (1 + (int32_t)take_below(in, 4));
    config.sink = take_below(in, 140);
    config.recent = 1 + take_below(in, 140);
    config.slack = take_below(in, 140);
    memset(keep, 0, 3 * 32);
    for (int32_t g = 0; g < config.n_heads; g++) {
        const int64_t n_kept = 8 * take_below(in, config.head_dim / 8 + 1);
        for (int64_t c = 0; c < n_kept; c++) /* spread; 3 divides no head_dim but 24 */
            keep[g * config.head_dim +
                 (config.head_dim == 24 ? c + g : c * 3 + g) % config.head_dim] = 1;
    }
    return config;
}

#endif
