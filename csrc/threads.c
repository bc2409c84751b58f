/* threads.c: how many OpenMP threads a call may have. */
#include "lk_internal.h"

#include <pthread.h>
#ifdef _OPENMP
#include <omp.h>
#endif

/* After fork a child has no worker threads, and OpenMP runtimes wait for them for ever: it goes on alone. */
static atomic_bool forked;
static void in_child(void) { atomic_store(&forked, true); }
static void watch(void) { (void)pthread_atfork(NULL, NULL, in_child); }

void lk_watch_forks(void) {
    static pthread_once_t once = PTHREAD_ONCE_INIT;
    (void)pthread_once(&once, watch);
}

int lk_thread_count(int wanted) {
    lk_watch_forks();
#ifdef _OPENMP
    if (atomic_load_explicit(&forked, memory_order_relaxed)) return 1;
    /* An OpenMP runtime ends the process when it cannot make the threads it was asked for. */
    const int most = (int)lk_max(omp_get_max_threads(), omp_get_num_procs());
    return wanted > 0 ? (int)lk_min(wanted, most) : omp_get_max_threads();
#else
    (void)wanted;
    return 1;
#endif
}
