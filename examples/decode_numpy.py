"""Fill a pruned cache and attend to it, with NumPy alone: python examples/decode_numpy.py."""

import numpy as np

import leank

L, HQ, HKV, D = 4096, 8, 2, 64
rng = np.random.default_rng(0)


def draw(n_heads, n_tokens):
    """Return random values for one row, [1, heads, tokens, D]."""
    return rng.standard_normal((1, n_heads, n_tokens, D), dtype=np.float32)


# Keep a quarter of the K channels of one layer; a real mask is learned, this one is drawn.
mask = leank.ChannelMask.from_scores(rng.random((1, HKV, D)), 0.75, align=8, sink=64, recent=512)
cache = leank.LayerCache(mask.keep[0], n_rows=1, sink=mask.sink, recent=mask.recent)
cache.append(draw(HKV, L), draw(HKV, L))  # a prompt; its own attention is the model's business
for _ in range(8):
    o = leank.decode(cache, draw(HQ, 1), draw(HKV, 1), draw(HKV, 1))  # stores a token, attends

n_tokens = int(cache.lengths[0])
dense_bytes = 2 * HKV * n_tokens * D * 4
total_bytes = cache.memory()["total_bytes"]
print(f"{mask}\n{n_tokens} tokens, o {o.shape}, cache {total_bytes:,} bytes, dense {dense_bytes:,}")
assert total_bytes == mask.predict_memory([n_tokens])["total_bytes"]
