/* plan.h: how the work of one attend launch is cut. Pure arithmetic, the same on host and device.
 *
 * A tile is one page of one KV head of one row: what a block fetches and uses at once. A unit is all tiles of a
 * (row, head), in the order of their pages; units follow each other by row, then head. A tile costs what it reads, in
 * kilobytes. A chunk is a range of costs: the tiles that begin in it are computed by one block, and nothing of them
 * depends on which. Blocks differ in how fast memory answers them (seen: by half), so the work is cut into one equal
 * share per block, and each share into n + 1 chunks: a half of it, a quarter and so on, the last two equal. Blocks take
 * chunks as they get to them, first the first one of each share.
 *
 * Example: 2 blocks, n = 2, total 64: a quantum is 64 / (2 * 4) = 8; share 0 has the chunks that begin at 0, 16 and 24, share
 * 1 those at 32, 48 and 56. They are taken in the order 0, 32, 16, 48, 24, 56. */
#ifndef LEANK_PLAN_H
#define LEANK_PLAN_H

#include "leank.h"

#include <stdint.h>

#ifdef __CUDACC__
#define LK_PLAN static __host__ __device__ __forceinline__
#else
#define LK_PLAN static inline
#endif

/* Tiles [0, sink_tiles) and [tail_tile, n_tiles) read every channel (whole), those between only the kept ones.
 * A unit that has nothing to read is void: one tile of cost 1 that reads nothing, so that its output has an owner. */
typedef struct {
    int32_t n_tiles, sink_tiles, tail_tile;
    int32_t tail_page; /* page of tile tail_tile */
    uint32_t whole_cost, middle_cost;
    int32_t is_void;
} lk_unit;

/* Cost of a whole tile: no tile has more. */
LK_PLAN uint32_t lk_whole_cost(int32_t head_dim) { return (uint32_t)(2 * head_dim) / 8; }

/* end: tokens j < end are visible; full_lo: from here on tokens are window; n_kept: Dk. */
LK_PLAN lk_unit lk_unit_make(int32_t end, int32_t full_lo, int32_t sink, int32_t n_kept,
                             int32_t head_dim) {
    const int32_t n_pages = (end + LK_PAGE_TOKENS - 1) / LK_PAGE_TOKENS;
    int32_t sink_pages = (sink + LK_PAGE_TOKENS - 1) / LK_PAGE_TOKENS;
    if (sink_pages > n_pages) sink_pages = n_pages;
    int32_t tail_page = full_lo / LK_PAGE_TOKENS;
    if (tail_page < sink_pages) tail_page = sink_pages;
    if (tail_page > n_pages) tail_page = n_pages;
    lk_unit u;
    u.sink_tiles = sink_pages;
    u.tail_page = tail_page;
    u.tail_tile = n_kept > 0 ? tail_page : sink_pages;
    u.n_tiles = u.tail_tile + n_pages - tail_page;
    u.whole_cost = lk_whole_cost(head_dim);
    u.middle_cost = (uint32_t)(head_dim + n_kept) / 8;
    u.is_void = u.n_tiles == 0;
    if (u.is_void) {
        u.n_tiles = 1;
        u.whole_cost = u.middle_cost = 1;
    }
    return u;
}

LK_PLAN int32_t lk_unit_is_whole(const lk_unit *u, int32_t tile) {
    return tile < u->sink_tiles || tile >= u->tail_tile;
}

LK_PLAN int32_t lk_unit_page(const lk_unit *u, int32_t tile) {
    return tile < u->tail_tile ? tile : u->tail_page + (tile - u->tail_tile);
}

/* Cost of the tiles before `tile`. */
LK_PLAN uint32_t lk_unit_cost_before(const lk_unit *u, int32_t tile) {
    const int32_t middle_end = tile < u->tail_tile ? tile : u->tail_tile;
    const int32_t n_middle = middle_end > u->sink_tiles ? middle_end - u->sink_tiles : 0;
    return (uint32_t)(tile - n_middle) * u->whole_cost + (uint32_t)n_middle * u->middle_cost;
}

LK_PLAN uint32_t lk_unit_cost(const lk_unit *u) { return lk_unit_cost_before(u, u->n_tiles); }

/* First tile that begins at `cost` or later, where the unit begins at `base`; n_tiles if there is none. */
LK_PLAN int32_t lk_unit_first_tile(const lk_unit *u, uint32_t base, uint32_t cost) {
    if (cost <= base) return 0;
    cost -= base;
    const uint32_t sink_cost = (uint32_t)u->sink_tiles * u->whole_cost;
    const uint32_t tail_cost =
        sink_cost + (uint32_t)(u->tail_tile - u->sink_tiles) * u->middle_cost;
    const uint32_t first = cost <= sink_cost ? 0 : cost <= tail_cost ? sink_cost : tail_cost;
    const uint32_t each = cost > sink_cost && cost <= tail_cost ? u->middle_cost : u->whole_cost;
    const int32_t before = cost <= sink_cost ? 0 : cost <= tail_cost ? u->sink_tiles : u->tail_tile;
    const uint32_t n = (cost - first + each - 1) / each;
    return n < (uint32_t)(u->n_tiles - before) ? before + (int32_t)n : u->n_tiles;
}

/* ---------------------------------------------------------------------------------------------------- chunks */

#define LK_PLAN_HALVINGS 8 /* n, at most */
/* Cost of the smallest chunks, about. Smaller ones pay more for their start and their merge. */
#define LK_PLAN_LEAST_COST 192u

typedef struct {
    uint32_t total, quantum;
    int32_t n_blocks, n_halvings, n_chunks; /* chunks of a share */
} lk_cut;

/* most_cost: of a tile. A quantum is not less, so that every chunk between the first and the last of a unit has a tile of
 * it. */
LK_PLAN lk_cut lk_cut_make(uint32_t total, int32_t n_units, int32_t n_blocks, uint32_t most_cost,
                           int32_t most_halvings) {
    lk_cut cut;
    cut.total = total;
    cut.n_blocks = n_blocks;
    cut.n_halvings = 0;
    const uint32_t share = total / (uint32_t)n_blocks;
    while (cut.n_halvings < most_halvings && share >> (cut.n_halvings + 1) >= LK_PLAN_LEAST_COST)
        cut.n_halvings++;
    cut.n_chunks = cut.n_halvings + 1;
    uint32_t n_quanta = (uint32_t)n_blocks << cut.n_halvings;
    /* With one chunk per block, units that cost the same get as many whole chunks each. */
    if (cut.n_halvings == 0 && n_units < n_blocks) n_quanta -= (uint32_t)(n_blocks % n_units);
    const uint32_t quantum = (total - 1) / n_quanta + 1;
    cut.quantum = quantum > most_cost ? quantum : most_cost;
    return cut;
}

/* The chunk that is taken as the n-th. Chunks are numbered in the order of their costs. */
LK_PLAN int32_t lk_cut_chunk_taken(const lk_cut *cut, int32_t n) {
    return n % cut->n_blocks * cut->n_chunks + n / cut->n_blocks;
}

/* Cost at which a chunk begins; that of chunk n_blocks * n_chunks is the total. */
LK_PLAN uint32_t lk_cut_begin(const lk_cut *cut, int32_t chunk) {
    const int32_t n = cut->n_halvings, share = chunk / cut->n_chunks, place = chunk % cut->n_chunks;
    const uint64_t n_quanta = ((uint64_t)share << n) + (1u << n) - (1u << (n - place));
    const uint64_t cost = n_quanta * cut->quantum;
    return cost < cut->total ? (uint32_t)cost : cut->total;
}

#endif
