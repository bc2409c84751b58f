/* alloc.c: the one door to the system allocator, with the hooks by which tests provoke failures. */
#define _DEFAULT_SOURCE /* madvise */
#include "lk_internal.h"

#include <stdlib.h>
#include <string.h>
#ifdef __linux__
#include <sys/mman.h>
#endif

/* From this size on a block is aligned to a huge page and asks for one: decode streams through pages of
 * tens to hundreds of kilobytes in scattered order, and 4 KiB translations cost bandwidth there. */
#define HUGE_PAGE_BYTES ((size_t)2 << 20)

static _Atomic int64_t fail_countdown;
static atomic_bool poison;

void lk_test_fail_allocation(int64_t n) { atomic_store(&fail_countdown, n > 0 ? n : 0); }
void lk_test_poison(int on) { atomic_store(&poison, on != 0); }
bool lk_poison_on(void) { return atomic_load_explicit(&poison, memory_order_relaxed); }

static bool must_fail(void) {
    if (atomic_load_explicit(&fail_countdown, memory_order_relaxed) == 0) return false;
    return atomic_fetch_sub(&fail_countdown, 1) == 1;
}

void *lk_alloc(size_t n_items, size_t item_bytes) {
    if (must_fail()) return NULL;
    /* One byte at least, so that NULL always means failure. */
    return calloc(n_items ? n_items : 1, item_bytes ? item_bytes : 1);
}

void *lk_alloc_pages(size_t bytes) {
    if (must_fail()) return NULL;
    size_t align = bytes >= HUGE_PAGE_BYTES ? HUGE_PAGE_BYTES : 64;
    void *p = NULL;
    if (posix_memalign(&p, align, bytes ? bytes : 64) != 0) return NULL;
#if defined(__linux__) && defined(MADV_HUGEPAGE)
    /* Advice only: whole huge pages inside the block, so that resident memory never passes its size. */
    size_t whole = bytes / HUGE_PAGE_BYTES * HUGE_PAGE_BYTES;
    if (whole) (void)madvise(p, whole, MADV_HUGEPAGE);
#endif
    return p;
}

void lk_dealloc(void *p) { free(p); }
