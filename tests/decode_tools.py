"""What tests of decode share: its terms, the truth of a row, a cache with a prompt in it."""

import numpy as np
import pytest

from leank import LayerCache

from .compare import truth_and_plain
from .conftest import draw, left_padded, random_keep

CAP_AND_SINKS = {"softcap": 2.0, "sinks": np.linspace(-2, 3, 8, dtype=np.float32)}
with_and_without = pytest.mark.parametrize("options", [{}, CAP_AND_SINKS], ids=["plain", "capped"])


def options_of(case, keep):
    """Return softcap and sinks of every call of a case, which may have neither."""
    options = {"softcap": case.get("softcap")}
    if case.get("sinks"):
        own = np.random.default_rng(7)  # the steps draw the same with sinks and without
        n_q_heads = len(keep) * case["R"]
        options["sinks"] = own.normal(0, case["sinks"], n_q_heads).astype(np.float32)
    return options


def expected(history, b, q, keep, dtype, *, scale=None, **options):
    """Truth and plain result of row b for the last columns."""
    row = history.rows[b]
    positions = history.positions(b, q.shape[1])
    if not row.k:
        return None
    k, v = (np.stack(x, axis=1) for x in (row.k, row.v))
    rule = {"sink": history.sink, "recent": history.recent, "lo": row.lo, "n0": row.n0}
    scale = scale or q.shape[-1] ** -0.5
    return truth_and_plain(q, k, v, positions, keep, dtype, scale=scale, **rule, **options)


def fresh(rng, dtype="float32", widths=(0, 8, 24, 64), n_rows=2, lengths=(300, 100), **options):
    """Return a cache with a prompt, and q, k, v of one more column for it."""
    options = {"sink": 10, "recent": 40, "slack": 20} | options
    cache = LayerCache(random_keep(rng, 64, widths), n_rows=n_rows, dtype=dtype, **options)
    valid = left_padded(lengths)
    shape = (n_rows, len(widths))
    n_columns = valid.shape[1]
    cache.append(
        draw(rng, dtype, *shape, n_columns, 64), draw(rng, dtype, *shape, n_columns, 64), valid
    )
    q = draw(rng, dtype, n_rows, 2 * len(widths), 1, 64)
    return cache, q, *(draw(rng, dtype, *shape, 1, 64) for _ in "kv")
