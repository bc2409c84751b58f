"""Compiled models over a LeanKCache of fixed length: the same results, and one graph for all steps.

Most graphs run by torch's own operators (eager, aot_eager), since making C++ of them takes seconds.
"""

import copy

import numpy as np
import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

from torch._dynamo.utils import counters  # noqa: E402
from transformers import CompileConfig  # noqa: E402

import leank  # noqa: E402
from leank.models import inspect_structure  # noqa: E402

from .families import FAMILIES, mask_for  # noqa: E402
from .hf_tools import close, forward, graphs  # noqa: E402
from .test_generate import case  # noqa: E402
from .test_hf_refusals import stop_half_way  # noqa: E402
from .test_static import assert_stored, both, ids_of, stored  # noqa: E402
from .tiny_models import (  # noqa: E402
    assert_same,
    generate,
    logits,
    oracle,
    prompts,
    pruned,
    tiny,
    wide,
)

pytestmark = pytest.mark.usefixtures("fresh_compiler")


def no_more_graphs():
    return torch._dynamo.config.patch(error_on_recompile=True)


def static(backend, **options):
    """Options by which generate() compiles its decoding on the CPU too."""
    config = CompileConfig(fullgraph=True, backend=backend, mode=None)
    config._compile_all_devices = True
    return {"cache_implementation": "static", "compile_config": config} | options


def compiled(model, backend="eager"):
    return torch.compile(model, backend=backend, fullgraph=True)


@pytest.fixture(scope="module")
def model():
    model = tiny()
    with leank.patch(model, pruned()):
        yield model


# ---------------------------------------------------------------------------------- generate


@pytest.mark.parametrize(
    ("base", "name", "backend", "n_graphs"),
    [
        ("sdpa", "padded", "aot_eager", 1),
        ("eager", "padded", "eager", 1),
        ("sdpa", "greedy", "eager", 1),
        ("eager", "returned", "eager", 1),
        # Decoding, chunks, and the last, shorter chunk.
        ("sdpa", "padded chunks", "eager", 3),
        ("eager", "chunks", "eager", 3),
    ],
)
def test_generate_equals_the_rule(base, name, backend, n_graphs):
    model = tiny(attn_implementation=base)
    double = wide(model)
    ids, mask, options = case(name)
    n_columns = ids.shape[1]
    with oracle(model, pruned(), n_columns), oracle(double, pruned(), n_columns):
        plain, truth = (generate(m, ids, mask, **options) for m in (model, double))
    with leank.patch(model, pruned()):
        out = generate(model, ids, mask, **static(backend, **options))
        graphs(n_graphs)
        # Another cache, and the same one after a reset.
        with no_more_graphs():
            again = generate(model, ids, mask, **static(backend, **options))
            cache = again.past_key_values
            cache.reset()
            options = static(backend, **options, past_key_values=cache)
            third = generate(model, ids, mask, **options | {"cache_implementation": None})
    for result in (out, again, third):
        assert_same(result, truth, plain, name)
    assert third.past_key_values is cache and cache.get_seq_length() == n_columns + 11


def test_beam_search():
    """Which generate() itself does not compile; rows are reordered between the calls of a graph."""
    model = tiny()
    ids, mask = prompts([40, 12])
    with leank.patch(model, pruned()):
        expected = generate(model, ids, mask, num_beams=3)
        model.forward = torch.compile(model.forward, backend="aot_eager", fullgraph=True)
        out = generate(model, ids, mask, num_beams=3, cache_implementation="static")
    graphs(2)  # the prompt, and all steps
    assert torch.equal(out.sequences, expected.sequences)
    np.testing.assert_allclose(logits(out), logits(expected), atol=2e-4)


@pytest.mark.parametrize("name", ["gemma2", "gpt_oss", "falcon"])
def test_softcap_sinks_sliding_layers_and_other_attention(name):
    model = FAMILIES[name].make()
    ids, mask = prompts([40, 12])
    with leank.patch(model, mask_for(inspect_structure(model))):
        expected = generate(model, ids, mask)
        options = static("eager")
        out = generate(model, ids, mask, **options)
        # Transformers' layers with a sliding window have a graph each for filling and being full.
        assert counters["stats"]["unique_graphs"] <= 2 and not counters["graph_break"]
        with no_more_graphs():
            again = generate(model, ids, mask, **options)
    for result in (out, again):
        assert torch.equal(result.sequences, expected.sequences)
        np.testing.assert_allclose(logits(result), logits(expected), atol=2e-4)


@pytest.fixture
def sliding():
    """A model whose first layer has a sliding window."""
    model = FAMILIES["gemma2"].make()
    with leank.patch(model, mask_for(inspect_structure(model))):
        yield model


def test_second_turn_of_a_model_with_sliding_layers(sliding):
    """Of which compiled steps tell nothing while they run: the next prompt begins anew."""
    ids, mask = prompts([50, 20])
    results = []
    for cache, options in (
        (leank.make_cache(sliding), {}),
        (leank.make_cache(sliding, max_cache_len=80), static("eager", cache_implementation=None)),
    ):
        out = generate(sliding, ids, mask, 5, past_key_values=cache, **options)
        more = torch.cat([out.sequences, ids_of(2, 9)], 1)
        both_turns = torch.cat([mask, torch.ones(2, 14, dtype=torch.long)], 1)
        results.append(generate(sliding, more, both_turns, 8, past_key_values=cache, **options))
    assert torch.equal(results[0].sequences, results[1].sequences)
    np.testing.assert_allclose(logits(results[1]), logits(results[0]), atol=2e-4)


# --------------------------------------------------------------------------- plain torch.compile


@pytest.mark.parametrize(
    ("backend", "mode"), [("eager", torch.no_grad), ("aot_eager", torch.inference_mode)]
)
def test_compiled_calls(model, backend, mode):
    """One graph for a cache, a copy of it, and a third one that is longer already."""
    ids = ids_of(3, 12)
    compile_model = compiled(model, backend)
    with mode():
        grown, cache, mask = both(model, 64)
        other = copy.deepcopy(cache)
        full = torch.cat([mask, torch.ones(3, 24, dtype=torch.long)], 1)

        def steps(cache, ids):
            call = {"attention_mask": full, "past_key_values": cache}
            return torch.cat([compile_model(x, **call).logits for x in ids.split(1, 1)], 1)

        expected = model(ids, attention_mask=full[:, :52], past_key_values=grown).logits
        out = steps(cache, ids)
        with no_more_graphs():
            out_of_copy = steps(other, ids)
            longer = both(model, 64)[1]
            forward(model, ids[:, :3], longer, full[:, :43])
            out_of_longer = steps(longer, ids[:, 3:])
    graphs(1)
    close(out, expected)
    close(out_of_copy, expected)
    close(out_of_longer, expected[:, 3:])
    for each in (cache, other, longer):
        assert each.get_seq_length() == 52 == int(each.state[1])


def test_the_whole_is_compiled(model):
    """From an empty cache, without a mask, with more tokens than the reservation takes at once."""
    ids = ids_of(2, 130)
    grown, cache = leank.make_cache(model), leank.make_cache(model, max_cache_len=400)
    for each in (grown, cache):
        each.expect_prompt(40)
    call = compiled(model, "aot_eager")
    for start, stop in ((0, 30), (30, 31), (31, 32), (32, 37), (37, 50), (50, 130)):
        out = forward(call, ids[:, start:stop], cache)
        close(out, forward(model, ids[:, start:stop], grown))
    assert_stored(cache, stored(grown), atol=1e-5)
    graphs(3)  # the first length, one token, any length


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_every_call_counts_and_in_its_order(backend):
    """Two forwards in one graph; of the first, only what it stores is used."""
    model = tiny()

    def step(ids, cache):
        model(ids[:, :1], past_key_values=cache)
        return model(ids[:, 1:], past_key_values=cache).logits

    with leank.patch(model, pruned()), torch.no_grad():
        grown, cache, _ = both(model, 64, [40, 40])
        call = torch.compile(step, backend=backend, fullgraph=True)
        for seed in (7, 8, 9):
            ids = ids_of(2, 2, seed)
            close(call(ids, cache), step(ids, grown))
        assert_stored(cache, stored(grown), atol=1e-5)
    graphs(1)
    assert cache.state.tolist()[1] == cache.get_seq_length() == 46


# --------------------------------------------------------------------------------- refusals


def test_past_the_length(model):
    _, cache, mask = both(model, 41)
    full = torch.cat([mask, torch.ones(3, 1, dtype=torch.long)], 1)
    call, ids = compiled(model, "aot_eager"), ids_of(3, 1)
    forward(call, ids, cache, full)
    before = stored(cache)
    message = "max_cache_len: expected at least 42, the columns .* the 1 of this call, got 41"
    for _ in range(2):
        with pytest.raises(ValueError, match=message):
            forward(call, ids, cache, full)
    assert_stored(cache, before)
    assert int(cache.state[1]) == 41
    cache.crop(-1)
    forward(call, ids, cache, full)
    assert_stored(cache, before)
    cache.reset()
    options = static("eager", past_key_values=cache, cache_implementation=None)
    with pytest.raises(ValueError, match="max_cache_len: expected at least 42"):
        generate(model, ids_of(3, 35), **options)
    assert cache.get_seq_length() == 41


@pytest.mark.filterwarnings("ignore")  # what the compiler says about itself
@pytest.mark.parametrize("fullgraph", [False, True])
def test_gradients(fullgraph):
    model = tiny()
    with leank.patch(model, pruned()):
        _, cache, mask = both(model, 64)
        call = torch.compile(model, backend="eager", fullgraph=fullgraph)
        full = torch.cat([mask, torch.ones(3, 1, dtype=torch.long)], 1)
        with pytest.raises(RuntimeError, match=r"torch.compile: expected torch\.no_grad\(\) or"):
            call(ids_of(3, 1), attention_mask=full, past_key_values=cache)
        assert cache.get_seq_length() == 40
        # Frozen weights, but a prompt that was trained.
        model.requires_grad_(False)
        cache.reset()
        model(inputs_embeds=torch.randn(1, 9, 128, requires_grad=True), past_key_values=cache)
        with pytest.raises(RuntimeError, match=r"torch.compile: expected torch\.no_grad\(\) or"):
            call(ids_of(1, 1), past_key_values=cache)
        with torch.no_grad():
            call(ids_of(1, 1), past_key_values=cache)
    assert cache.get_seq_length() == 10


def test_forward_that_stopped_half_way(model):
    grown, cache, mask = both(model, 64)
    call, ids = compiled(model), ids_of(3, 2)
    full = torch.cat([mask, torch.ones(3, 24, dtype=torch.long)], 1)
    stop_half_way(model, ids, cache, full[:, :42])
    with pytest.raises(RuntimeError, match=r"layers hold \[40, 42\] columns .* cache\.crop\(0\)"):
        forward(call, ids, cache, full)
    cache.crop(0)
    close(forward(call, ids, cache, full), forward(model, ids, grown, full[:, :42]))


def test_columns_that_the_graph_does_not_know_of(model):
    """Of a forward that was stopped after its last layer, or a layer that was cropped alone."""
    grown, cache, mask = both(model, 64)
    call, ids = compiled(model), ids_of(3, 1)
    full = torch.cat([mask, torch.ones(3, 24, dtype=torch.long)], 1)
    for each in (cache, grown):
        for layer in each.layers:
            layer.crop(-1)
    with pytest.raises(RuntimeError, match=r"expected 40 columns, .* got 39: .* cache\.crop\(0\)"):
        forward(call, ids, cache, full)
    cache.crop(0)
    close(forward(call, ids, cache, full), forward(model, ids, grown, mask))


def test_wrong_input_when_the_graph_runs(model):
    """Padding that the cache does not have, and another number of rows."""
    _, cache, mask = both(model, 64)
    call, ids = compiled(model), ids_of(3, 1)
    full = torch.cat([mask, torch.ones(3, 24, dtype=torch.long)], 1)
    forward(call, ids, cache, full)
    wrong = full.clone()
    wrong[1, 20] = 1
    with pytest.raises(
        ValueError, match="attention_mask: expected the padding .* row 1, column 20"
    ):
        forward(call, ids, cache, wrong)
    with pytest.raises(ValueError, match=r"k: expected \(3, 2, 1, 16\), got \(2, 2, 1, 16\)"):
        forward(call, ids[:2], cache, full[:2])
    assert cache.get_seq_length() == 41 == int(cache.state[1])


def test_wrong_input_after_a_sliding_window_moved(sliding):
    """The window cannot go back, so that the same step again would be another one."""
    _, cache, mask = both(sliding, 64)
    call, ids = compiled(sliding), ids_of(3, 1)
    full = torch.cat([mask, torch.ones(3, 24, dtype=torch.long)], 1)
    forward(call, ids, cache, full)
    wrong = full.clone()
    wrong[1, 20] = 1
    with pytest.raises(ValueError, match="attention_mask: expected the padding"):
        forward(call, ids, cache, wrong)
    for copied in (copy.deepcopy(cache), cache):
        for again in (call, sliding):
            with pytest.raises(RuntimeError, match=r"windows moved on .*; cache\.reset\(\)"):
                forward(again, ids, copied, full if again is call else full[:, :42])
        with pytest.raises(RuntimeError, match=r"cache\.reset\(\) and feed everything again"):
            copied.crop(0)
    cache.reset()
    grown, other, _ = both(sliding, 64)
    forward(sliding, prompts([40, 12, 25])[0], cache, mask)
    close(forward(call, ids, cache, full), forward(sliding, ids, grown, full[:, :41]))
