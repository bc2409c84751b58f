"""How an attend launch is cut: every tile is in exactly one part, and parts follow each other."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

_cuda = pytest.importorskip("leank._cuda", reason="leank was built without CUDA")

PAGE = 64


def tiles_of(end, full_lo, n_kept, sink):
    """Pages of a unit, in order, with their costs in kilobytes; a unit without any has one."""
    n_pages, sink_pages = -(-end // PAGE), -(-sink // PAGE)
    whole = [i < sink_pages or i >= full_lo // PAGE for i in range(n_pages)]
    pages = [i for i in range(n_pages) if n_kept or whole[i]]
    return pages, whole


def costs(end, full_lo, n_kept, head_dim, sink):
    pages, whole = tiles_of(end, full_lo, n_kept, sink)
    return [(2 * head_dim if whole[i] else head_dim + n_kept) // 8 for i in pages] or [1]


def plan(ends, full_los, n_kept, head_dim, sink, n_blocks):
    as_bytes = (np.array(x, np.int32).tobytes() for x in (ends, full_los, n_kept))
    return _cuda.plan_parts(*as_bytes, head_dim, sink, n_blocks)


@st.composite
def launches(draw):
    n_rows = draw(st.integers(1, 6))
    ends = st.one_of(st.sampled_from((0, 1, 63, 64, 65)), st.integers(0, 40_000))
    ends = draw(st.lists(ends, min_size=n_rows, max_size=n_rows))
    head_dim = draw(st.sampled_from((64, 80, 96, 128, 256)))
    widths = st.sampled_from((0, 8, 32, head_dim - 8, head_dim))
    return {
        "ends": ends,
        "full_los": [draw(st.integers(0, end)) for end in ends],
        "n_kept": draw(st.lists(widths, min_size=1, max_size=9)),
        "head_dim": head_dim,
        "sink": draw(st.integers(0, 300)),
        "n_blocks": draw(st.sampled_from((1, 2, 7, 132))),
    }


@given(launches())
def test_every_tile_is_in_one_part(launch):
    units = {}
    for chunk, row, head, begin, end in plan(**launch):
        units.setdefault((row, head), []).append((chunk, begin, end))
    for b, end in enumerate(launch["ends"]):
        for g, n_kept in enumerate(launch["n_kept"]):
            sizes = costs(end, launch["full_los"][b], n_kept, launch["head_dim"], launch["sink"])
            parts = units[b, g]
            assert parts[0][1] == 0 and parts[-1][2] == len(sizes)
            for (chunk, _, stop), (next_chunk, start, _) in zip(parts, parts[1:], strict=False):
                assert stop == start
                # The merge visits every chunk from the first to the last.
                assert next_chunk == chunk + 1


@given(launches())
def test_a_chunk_has_at_most_two_parts_that_are_not_whole_units(launch):
    unfinished = {}
    for chunk, row, head, begin, end in plan(**launch):
        sizes = costs(
            launch["ends"][row],
            launch["full_los"][row],
            launch["n_kept"][head],
            launch["head_dim"],
            launch["sink"],
        )
        if begin > 0 or end < len(sizes):
            unfinished.setdefault(chunk, []).append(begin == 0)
    for firsts in unfinished.values():
        assert sorted(firsts) in ([False], [True], [False, True])


def test_shares_are_equal_and_begin_with_a_half():
    launch = {
        "ends": [32768] * 16,
        "full_los": [32768 - 896] * 16,
        "n_kept": [32] * 8,
        "head_dim": 128,
        "sink": 128,
    }
    n_blocks, n_chunks = 132, 6  # 2 ** 5 parts of a share are above LK_PLAN_LEAST_COST
    cost = np.zeros(n_blocks * n_chunks)
    sizes = costs(32768, 32768 - 896, 32, 128, 128)
    for chunk, _, _, begin, end in plan(n_blocks=n_blocks, **launch):
        cost[chunk] += sum(sizes[begin:end])
    cost = cost.reshape(n_blocks, n_chunks)
    share = cost.sum() / n_blocks
    # A quantum is rounded up, which makes the last shares smaller.
    assert abs(cost[:-2].sum(1) - share).max() <= 0.02 * share
    assert abs(cost[:-2, 0] - share / 2).max() <= 0.02 * share
    assert cost[:, -2:].max() < share / 32 + 32


def piece_of(n_columns, **options):
    """Columns that a span stores before they attend, and the scratch that it takes."""
    addresses = {name: 0 for name in ("page", "twin", "state", "real", "geom")}
    shape = {
        "table_stride": 513,
        "real_stride": 32832,
        "dtype": "bfloat16",
        "n_rows": 1,
        "n_heads": 8,
        "head_dim": 128,
        "sink": 128,
        "recent": 896,
        "slack": 64,
        "max_tokens": 32832,
    }
    sizes = {"n_q_heads": 32, "twin_bytes": 90112, "smem_bytes": 232448}
    sizes |= {name: x for name, x in options.items() if name in sizes}
    shape |= {name: x for name, x in options.items() if name in shape}
    return _cuda.span_piece(_cuda.Layer(**addresses, **shape), n_columns=n_columns, **sizes)


def test_pieces_have_scratch_only_where_slack_is_too_short():
    table = 33 * 128  # 513 addresses
    assert piece_of(64) == (64, 0) and piece_of(20, slack=19) == (20, 0)
    assert piece_of(21, slack=19) == (21, table + 2 * 90112)
    assert piece_of(65) == (65, table + 3 * 90112)
    assert piece_of(2048) == piece_of(9000) == (2048, table + 33 * 90112)
    assert piece_of(2048, twin_bytes=0) == (2048, table)


@pytest.mark.parametrize("n_rows", [100, 1000, 3000])
def test_pieces_of_many_rows_are_shorter(n_rows):
    piece, scratch = piece_of(2048, n_rows=n_rows)
    assert piece < 2048 and scratch <= 256 * 2**20
    assert scratch == 0 or piece > 64


def test_bad_arguments_are_named():
    with pytest.raises(ValueError, match="one end and full_lo per row"):
        plan([1, 2], [0], [8], 64, 0, 1)
    with pytest.raises(ValueError, match="end: expected int32 numbers, got 3 bytes"):
        _cuda.plan_parts(b"abc", b"", b"", 64, 0, 1)
