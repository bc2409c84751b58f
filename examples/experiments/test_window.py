"""How large must the window be in which all channels stay?

    pytest examples/experiments/test_window.py --leank-model smollm2 \
        --leank-mask smollm2-135m-instruct-70

The mask was learned for one window and is tried with others.
"""

import dataclasses
from statistics import mean

import pytest

N = 4
LENGTH = 1024


@pytest.fixture
def leank_mask(leank_mask, sink, recent):
    """Give the mask the window of a test; `leank_patched` takes this mask."""
    return dataclasses.replace(leank_mask, sink=sink, recent=recent)


@pytest.mark.parametrize("sink", [0, 16, 64])
@pytest.mark.parametrize("recent", [32, 128, 512])
def test_window(leank_patched, leank_needles, leank_ask, leank_memory, leank_record, recent, sink):
    replies = [leank_ask(leank_patched, item) for item in leank_needles(LENGTH, N)]
    used = leank_memory(replies[-1].cache)
    leank_record(score=mean(r.score for r in replies), **used)
    assert used["bytes"] < used["dense_bytes"]
