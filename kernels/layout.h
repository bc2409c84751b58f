/* layout.h: the order of elements inside a block of a page or twin, the same on host and device.
 *
 * A block holds 64 tokens of one head in 4 groups of 16, one group after the other. In a group stand tiles, each the
 * A operand of one mma instruction in the order of its registers: a lane's one load of 16 bytes is its operand.
 *   K, n channels: n/16 tiles of 16 tokens x 16 channels (m16n8k16), 512 bytes each; then, if n is 8 more than a
 *                  multiple of 16, one of 16 tokens x 8 channels (m16n8k8), 256 bytes
 *   V:             Dv/16 tiles of 16 value indices x 16 tokens, 512 bytes each
 * Row r, column c of a tile: lane (r % 8) * 4 + (c % 8) / 2, register r / 8 + 2 * (c / 8), half c % 2. */
#ifndef LEANK_LAYOUT_H
#define LEANK_LAYOUT_H

#include "plan.h"

/* Byte of row r, column c of a tile of n_cols columns (16 or 8). */
LK_PLAN int32_t lk_tile_at(int32_t r, int32_t c, int32_t n_cols) {
    const int32_t lane = (r % 8) * 4 + (c % 8) / 2, reg = r / 8 + 2 * (c / 8);
    return lane * (n_cols == 16 ? 16 : 8) + reg * 4 + (c % 2) * 2;
}

/* Byte of the channel at place c of n, token slot j, in a K block of n channels. */
LK_PLAN int32_t lk_k_at(int32_t c, int32_t j, int32_t n) {
    const int32_t tail = c >= n / 16 * 16;
    return (j / 16) * 32 * n + (c / 16) * 512 + lk_tile_at(j % 16, c % 16, tail ? 8 : 16);
}

/* Byte of token slot j, value index d, in a V block. */
LK_PLAN int32_t lk_v_at(int32_t j, int32_t d, int32_t v_dim) {
    return (j / 16) * 32 * v_dim + (d / 16) * 512 + lk_tile_at(d % 16, j % 16, 16);
}

#endif
