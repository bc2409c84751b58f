/* dispatch.c: which instruction set variant runs. A variant counts as available when the CPU has the
 * instructions and the operating system saves the registers; both are asked. */
#include "lk_learn.h"

#include <stdlib.h>
#include <string.h>

#if defined(__x86_64__) || defined(__i386__)
#include <cpuid.h>
#endif

enum { CPU_AVX2 = 1, CPU_AVX512 = 2, CPU_AVX512BF16 = 4, CPU_FAST_BF16_DOT = 8 };

#if defined(__x86_64__) || defined(__i386__)

/* XCR0: the register state that the operating system saves on a task switch. */
static uint64_t os_saved_state(void) {
    uint32_t low, high;
    __asm__ volatile("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
    return (uint64_t)high << 32 | low;
}

static bool all_bits(uint64_t word, uint64_t bits) { return (word & bits) == bits; }

/* The BF16 dot instruction does the work of two widening steps and two FMAs. On AMD (Zen 5) as many start per cycle
 * as FMAs: bf16 takes half the time where several columns read a tile (T = 16: 1.56 -> 0.86 ms), and the same where
 * memory limits (T = 1: 0 to 1.5% more). A Xeon with AMX starts fewer: 6% slower at T = 1, 28% at T = 200. */
static bool has_fast_bf16_dot(void) {
    uint32_t eax, ebx, ecx, edx;
    return __get_cpuid(0, &eax, &ebx, &ecx, &edx) && ebx == signature_AMD_ebx &&
           ecx == signature_AMD_ecx && edx == signature_AMD_edx;
}

static unsigned detect_cpu(void) {
    const uint32_t fma = 1u << 12, osxsave = 1u << 27, avx = 1u << 28, f16c = 1u << 29; /* 1, ecx */
    const uint32_t avx2 = 1u << 5;                                     /* leaf 7, ebx */
    const uint32_t avx512 = 1u << 16 | 1u << 17 | 1u << 30 | 1u << 31; /* F, DQ, BW, VL */
    const uint32_t avx512bf16 = 1u << 5;                               /* leaf 7.1, eax */
    const uint64_t ymm = 0x6, zmm = 0xe6; /* XCR0: SSE and AVX; also opmask and both zmm halves */

    uint32_t eax, ebx, ecx, edx;
    if (!__get_cpuid(1, &eax, &ebx, &ecx, &edx)) return 0;
    if (!all_bits(ecx, osxsave | avx | fma | f16c)) return 0;
    const uint64_t saved = os_saved_state();
    if (!all_bits(saved, ymm) || !__get_cpuid_count(7, 0, &eax, &ebx, &ecx, &edx)) return 0;
    const uint32_t n_subleaves = eax;
    if (!all_bits(ebx, avx2)) return 0;
    unsigned cpu = CPU_AVX2;
    if (!all_bits(saved, zmm) || !all_bits(ebx, avx512)) return cpu;
    cpu |= CPU_AVX512;
    if (n_subleaves >= 1 && __get_cpuid_count(7, 1, &eax, &ebx, &ecx, &edx) &&
        all_bits(eax, avx512bf16))
        cpu |= CPU_AVX512BF16 | (has_fast_bf16_dot() ? CPU_FAST_BF16_DOT : 0u);
    return cpu;
}

#else

static unsigned detect_cpu(void) { return 0; }

#endif

#define LEARN(isa)                                                                                 \
    {lk_learn_forward_##isa, lk_learn_backward_rows_##isa, lk_learn_backward_keys_##isa}

/* What was built, best first but for variant_at. need: CPU bits, all of them. */
static const struct {
    lk_isa_table table;
    unsigned need;
} variants[] = {
#ifdef LK_BUILD_AVX512
    {{"avx512", {lk_decode_f32_avx512, lk_decode_bf16_avx512, lk_decode_f16_avx512}, LEARN(avx512)},
     CPU_AVX512},
#endif
#if defined(LK_BUILD_AVX512) && defined(LK_BUILD_AVX512BF16)
    {{"avx512bf16",
      {lk_decode_f32_avx512, lk_decode_bf16_avx512bf16, lk_decode_f16_avx512},
      LEARN(avx512)},
     CPU_AVX512 | CPU_AVX512BF16},
#endif
#ifdef LK_BUILD_AVX2
    {{"avx2", {lk_decode_f32_avx2, lk_decode_bf16_avx2, lk_decode_f16_avx2}, LEARN(avx2)},
     CPU_AVX2},
#endif
#ifdef LK_BUILD_NEON
    {{"neon", {lk_decode_f32_neon, lk_decode_bf16_neon, lk_decode_f16_neon}, LEARN(neon)}, 0},
#endif
    {{"scalar", {lk_decode_f32_scalar, lk_decode_bf16_scalar, lk_decode_f16_scalar}, LEARN(scalar)},
     0},
};

enum { N_VARIANTS = sizeof variants / sizeof variants[0] };

static _Atomic(const lk_isa_table *) current;

/* Asking the CPU can trap into a hypervisor, but happens only at start and in tests: no need to keep it. */
static bool can_run(int i) { return (detect_cpu() & variants[i].need) == variants[i].need; }

/* Place in the table of the i-th best for this CPU: the first two change places where the BF16 dot is fast. */
static int variant_at(int i) {
#if defined(LK_BUILD_AVX512) && defined(LK_BUILD_AVX512BF16)
    if (i < 2 && (detect_cpu() & CPU_FAST_BF16_DOT)) return 1 - i;
#endif
    return i;
}

/* The named variant, or the best one for NULL; NULL if there is none that can run here. */
static const lk_isa_table *find_variant(const char *name) {
    for (int rank = 0; rank < N_VARIANTS; rank++) {
        const int i = variant_at(rank);
        if (name && strcmp(name, variants[i].table.name) != 0) continue;
        if (can_run(i)) return &variants[i].table;
    }
    return NULL;
}

const lk_isa_table *lk_dispatch(void) {
    const lk_isa_table *table = atomic_load_explicit(&current, memory_order_acquire);
    if (table) return table;
    const char *name = getenv("LEANK_ISA");
    const lk_isa_table *chosen = find_variant(name && *name ? name : NULL);
    if (!chosen) return NULL;
    /* Whoever comes first decides, so that a concurrent lk_isa_force is not undone. */
    if (atomic_compare_exchange_strong(&current, &table, chosen)) return chosen;
    return table;
}

lk_status lk_isa(const char **name) {
    const lk_isa_table *table = lk_dispatch();
    *name = table ? table->name : NULL;
    return table ? LK_OK : LK_E_ISA;
}

lk_status lk_isa_force(const char *name) {
    LK_CHECK(name != NULL, LK_E_ISA);
    const lk_isa_table *table = find_variant(name);
    LK_CHECK(table != NULL, LK_E_ISA);
    atomic_store_explicit(&current, table, memory_order_release);
    return LK_OK;
}

const char *lk_isa_built(int i, int *available) {
    if (i < 0 || i >= N_VARIANTS) return NULL;
    const int at = variant_at(i);
    if (available) *available = can_run(at);
    return variants[at].table.name;
}
