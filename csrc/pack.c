/* pack.c: tokens into the element order of pages and twins, and back. Bits are moved, never converted. */
#include "lk_pack.h"

#include <string.h>

/* The functions below exist for 4-byte (f32, G = 1) and 2-byte elements (f16, G = 1; bf16, G = 2); element size
 * and group are compile-time constants in each, so that the inner loops are plain strided moves. */
#define LK_INLINE static inline __attribute__((always_inline))

LK_INLINE void copy_elem(unsigned char *dst, const unsigned char *src, size_t elem) {
    memcpy(dst, src, elem);
}

/* Byte offset of channel c (its place in the block), slot j. */
LK_INLINE size_t k_at(int64_t c, int64_t j, int64_t group, size_t elem) {
    return (size_t)(((c / group) * LK_PAGE_TOKENS + j) * group + c % group) * elem;
}

/* Byte offset of slot j, value index d. */
LK_INLINE size_t v_at(int64_t j, int64_t d, int64_t v_dim, int64_t group, size_t elem) {
    const int64_t first = d / LK_VALUE_SLICE * LK_VALUE_SLICE;
    const int64_t width = lk_min(LK_VALUE_SLICE, v_dim - first);
    return (size_t)(first * LK_PAGE_TOKENS + ((j / group) * width + d - first) * group +
                    j % group) *
           elem;
}

/* A K block of one token, as each step of decode stores it. */
LK_INLINE void store_k_token(unsigned char *block, const lk_run *run, const uint16_t *order,
                             int32_t n, int64_t group, size_t elem) {
    const unsigned char *k = run->k + run->column[0] * run->k_stride * (ptrdiff_t)elem;
    unsigned char *dst = block + k_at(0, run->slot, group, elem);
    const size_t step = (size_t)(LK_PAGE_TOKENS * group) * elem;
    for (int64_t c = 0; c < n; c += group, dst += step) {
        unsigned char column[8];
        for (int64_t i = 0; i < group; i++)
            copy_elem(column + (size_t)i * elem, k + (size_t)order[c + i] * elem, elem);
        /* cppcheck-suppress [uninitvar]: the group is at least 1 */
        memcpy(dst, column, (size_t)group * elem);
    }
}

/* V of one token where tokens lie in pairs (bf16): whole pairs are written, which takes a quarter of the stores. The
 * token after this one is not there yet. */
LK_INLINE void store_v_pairs(unsigned char *restrict block, const lk_run *run, int64_t v_dim) {
    const unsigned char *restrict v = run->v + run->column[0] * run->v_stride * 2;
    for (int64_t first = 0; first < v_dim; first += LK_VALUE_SLICE) {
        const int64_t width = lk_min(LK_VALUE_SLICE, v_dim - first);
        unsigned char *dst = block + v_at(run->slot & ~1, first, v_dim, 2, 2);
        for (int64_t d = 0; d < width; d++) {
            uint16_t value;
            uint32_t pair = 0;
            memcpy(&value, v + 2 * (first + d), 2);
            if (run->slot % 2) {
                memcpy(&pair, dst + 4 * d, 4);
                pair = (pair & 0xffffu) | (uint32_t)value << 16;
            } else {
                pair = value;
            }
            memcpy(dst + 4 * d, &pair, 4);
        }
    }
}

LK_INLINE void store_k(unsigned char *block, const lk_run *run, const uint16_t *order, int32_t n,
                       int64_t group, size_t elem) {
    if (run->n_tokens == 1) {
        store_k_token(block, run, order, n, group, elem);
        return;
    }
    for (int64_t c = 0; c < n; c++) {
        unsigned char *dst = block + k_at(c, run->slot, group, elem);
        for (int64_t i = 0; i < run->n_tokens; i++, dst += (size_t)group * elem) {
            const int64_t at = run->column[i] * run->k_stride + order[c];
            copy_elem(dst, run->k + at * (ptrdiff_t)elem, elem);
        }
    }
}

LK_INLINE void store_v(unsigned char *block, const lk_run *run, int64_t v_dim, int64_t group,
                       size_t elem) {
    if (run->n_tokens == 1 && group == 2) {
        store_v_pairs(block, run, v_dim);
        return;
    }
    for (int64_t first = 0; first < v_dim; first += LK_VALUE_SLICE) {
        const int64_t width = lk_min(LK_VALUE_SLICE, v_dim - first);
        for (int64_t i = 0; i < run->n_tokens; i++) {
            const int64_t at = run->column[i] * run->v_stride + first;
            const unsigned char *src = run->v + at * (ptrdiff_t)elem;
            unsigned char *dst = block + v_at(run->slot + i, first, v_dim, group, elem);
            for (int64_t d = 0; d < width; d++)
                copy_elem(dst + (size_t)(d * group) * elem, src + (size_t)d * elem, elem);
        }
    }
}

LK_INLINE void store(const lk_geom *geom, int32_t g, const lk_run *run, unsigned char *page,
                     unsigned char *twin, int64_t group, size_t elem) {
    const int32_t n_kept = geom->n_kept[g], n_dropped = geom->head_dim - n_kept;
    const uint16_t *order = geom->order + (size_t)g * (size_t)geom->head_dim;
    if (n_kept > 0) {
        store_k(page, run, order, n_kept, group, elem);
        store_v(page + geom->v_off[g], run, geom->v_dim, group, elem);
    }
    if (!twin || n_dropped == 0) return;
    store_k(twin, run, order + n_kept, n_dropped, group, elem);
    if (n_kept == 0) store_v(twin + geom->v_off[g], run, geom->v_dim, group, elem);
}

void lk_pack_store(const lk_geom *geom, int32_t g, const lk_run *run, unsigned char *page,
                   unsigned char *twin) {
    if (geom->elem_bytes == 4) store(geom, g, run, page, twin, 1, 4);
    else if (geom->group == 1) store(geom, g, run, page, twin, 1, 2);
    else store(geom, g, run, page, twin, 2, 2);
}

/* Without it compilers read a line where it is asked for to be written, and it is asked for again when it is. x86 CPUs
 * that do not have the instruction skip it. */
#if defined(__x86_64__)
#define LK_PREFETCH_TO_WRITE __attribute__((target("prfchw")))
#else
#define LK_PREFETCH_TO_WRITE
#endif

/* Ask for the cache lines of slot j of a K block of n channels, to be written. */
LK_PREFETCH_TO_WRITE
static void prefetch_k(const lk_geom *geom, unsigned char *block, int64_t n, int64_t j) {
    const size_t stride = (size_t)(LK_PAGE_TOKENS * geom->group) * geom->elem_bytes;
    unsigned char *line = block + (size_t)(j * geom->group) * geom->elem_bytes;
    for (int64_t c = 0; c < n; c += geom->group, line += stride) __builtin_prefetch(line, 1);
}

LK_PREFETCH_TO_WRITE
void lk_pack_prefetch(const lk_geom *geom, int32_t g, int64_t j, unsigned char *page,
                      unsigned char *twin) {
    const int32_t n_kept = geom->n_kept[g], n_dropped = geom->head_dim - n_kept;
    const uint16_t *order = geom->order + (size_t)g * (size_t)geom->head_dim;
    for (int32_t c = 0; c < geom->head_dim; c += 64 / (int32_t)sizeof *order)
        __builtin_prefetch(order + c);
    if (n_kept > 0) prefetch_k(geom, page, n_kept, j);
    if (twin && n_dropped > 0) prefetch_k(geom, twin, n_dropped, j);
    unsigned char *with_v = n_kept > 0 ? page : twin;
    if (!with_v) return;
    unsigned char *v = with_v + geom->v_off[g];
    for (int64_t d = 0; d < geom->v_dim; d += 64 / (int64_t)geom->elem_bytes / geom->group)
        __builtin_prefetch(v + v_at(j, d, geom->v_dim, geom->group, geom->elem_bytes), 1);
}

LK_INLINE void load_k(const unsigned char *block, const uint16_t *order, int32_t n,
                      int32_t head_dim, int64_t slot, int64_t n_tokens, unsigned char *k,
                      int64_t group, size_t elem) {
    for (int64_t i = 0; i < n_tokens; i++)
        for (int64_t c = 0; c < n; c++)
            copy_elem(k + (size_t)(i * head_dim + order[c]) * elem,
                      block + k_at(c, slot + i, group, elem), elem);
}

LK_INLINE void load_v(const unsigned char *block, int64_t v_dim, int64_t slot, int64_t n_tokens,
                      unsigned char *v, int64_t group, size_t elem) {
    for (int64_t i = 0; i < n_tokens; i++)
        for (int64_t d = 0; d < v_dim; d++)
            copy_elem(v + (size_t)(i * v_dim + d) * elem,
                      block + v_at(slot + i, d, v_dim, group, elem), elem);
}

void lk_pack_load(const lk_geom *geom, int32_t g, int64_t slot, int64_t n_tokens,
                  const unsigned char *page, const unsigned char *twin, unsigned char *k,
                  unsigned char *v) {
    const int64_t group = geom->group;
    const size_t elem = geom->elem_bytes;
    const int32_t n_kept = geom->n_kept[g], n_dropped = geom->head_dim - n_kept;
    const uint16_t *order = geom->order + (size_t)g * (size_t)geom->head_dim;
    if (page && n_kept > 0) {
        load_k(page, order, n_kept, geom->head_dim, slot, n_tokens, k, group, elem);
        load_v(page + geom->v_off[g], geom->v_dim, slot, n_tokens, v, group, elem);
    }
    if (!twin || n_dropped == 0) return;
    load_k(twin, order + n_kept, n_dropped, geom->head_dim, slot, n_tokens, k, group, elem);
    if (n_kept == 0) load_v(twin + geom->v_off[g], geom->v_dim, slot, n_tokens, v, group, elem);
}
