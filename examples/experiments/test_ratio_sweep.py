"""What do answers lose as a mask drops more of K, and what do they gain in bytes?

    leank learn NAME_OR_PATH --ratio 0.5,0.7 --align 8,16 -o 'mask-{ratio}-a{align}.safetensors'
    pytest examples/experiments/test_ratio_sweep.py --leank-model NAME_OR_PATH \
        --leank-mask 'mask-{ratio}-a{align}.safetensors'

Each test takes the mask of its own ratio and alignment. A table and the folder leank-results tell
what came out; more needles (N) make scores that can be trusted.
"""

from statistics import mean

import pytest

N = 4
LENGTHS = [1024, 2048]  # beyond the masks' window, or nothing is pruned


@pytest.mark.parametrize("length", LENGTHS)
def test_dense(leank_model, leank_needles, leank_ask, leank_memory, leank_record, length):
    replies = [leank_ask(leank_model, item) for item in leank_needles(length, N)]
    leank_record(score=mean(r.score for r in replies), **leank_memory(replies[-1].cache))


@pytest.mark.parametrize("length", LENGTHS)
@pytest.mark.parametrize("align", [8, 16])
@pytest.mark.parametrize("ratio", [0.5, 0.7])
def test_pruned(
    leank_patched, leank_needles, leank_ask, leank_memory, leank_record, ratio, align, length
):
    replies = [leank_ask(leank_patched, item) for item in leank_needles(length, N)]
    used = leank_memory(replies[-1].cache)
    leank_record(score=mean(r.score for r in replies), **used)
    assert used["bytes"] < used["dense_bytes"]
