"""`leank.memory_report` against the mask's prediction, and against what is really allocated."""

import html
import json
import re

import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

from transformers import DynamicCache, StaticCache  # noqa: E402

import leank  # noqa: E402
from leank.models import inspect_structure  # noqa: E402

from .families import FAMILIES, mask_for  # noqa: E402
from .hf_tools import forward  # noqa: E402
from .tiny_models import HKV, RECENT, SINK, D, N, generate, prompts, pruned, tiny  # noqa: E402

LENGTHS = [900, 420]


def pruned_cache(model, mask, lengths):
    with leank.patch(model, mask):
        cache = leank.make_cache(model)
        forward(model, *prompts(lengths)[:1], cache, prompts(lengths)[1])
        return cache, model._leank_patch.mask


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_pruned_is_as_the_mask_predicts(dtype):
    cache, mask = pruned_cache(tiny(dtype=dtype), pruned(), LENGTHS)
    report, name = leank.memory_report(cache), str(dtype).removeprefix("torch.")
    predicted = mask.predict_memory(LENGTHS, name)
    total = report.total
    assert total.k_bytes == predicted["k_bytes"] and total.v_bytes == predicted["v_bytes"]
    assert (total.n_pages, total.n_twins) == (predicted["n_pages"], predicted["n_twins"])
    assert total.total_bytes == predicted["total_bytes"]
    assert total.allocated_bytes == cache.memory()["slab_bytes"] >= total.total_bytes
    assert total.dense_bytes == N * sum(LENGTHS) * HKV * 2 * D * dtype.itemsize
    assert total.saved == 1 - total.total_bytes / total.dense_bytes > 0.1
    assert report.lengths == tuple(LENGTHS) and report.dtype == name
    assert report.window == {"sink": SINK, "recent": RECENT, "slack": 64}
    for layer, keep in zip(report.layers, mask.keep, strict=True):
        alone = leank.ChannelMask(keep[None], sink=SINK, recent=RECENT)
        assert layer.total_bytes == alone.predict_memory(LENGTHS, name)["total_bytes"]
        assert layer.kind == "pruned" and layer.n_twins > 0


def test_rows_that_share_pages_count_once():
    model = tiny()
    with leank.patch(model, pruned()):
        cache = leank.make_cache(model)
        forward(model, prompts([300])[0], cache)
        before = leank.memory_report(cache)
        cache.batch_repeat_interleave(3)
        after = leank.memory_report(cache)
    assert after.total.total_bytes == before.total.total_bytes
    assert after.total.dense_bytes == 3 * before.total.dense_bytes
    assert after.lengths == (300,) * 3


@pytest.mark.parametrize("name", ["llama", "gemma2"])
def test_fixed_length_is_beside_a_static_cache(name):
    """Both take all their bytes at the first token."""
    model = FAMILIES[name].make()
    layout = inspect_structure(model)
    with leank.patch(model, mask_for(layout)) as handle:
        cache = leank.make_cache(model, max_cache_len=900)
        dense = StaticCache(config=model.config, max_cache_len=900)
        for each in (cache, dense):
            forward(model, prompts([300, 20])[0], each)
        report = leank.memory_report(cache)
        reserved = handle.mask.predict_memory([1, 1], max_tokens=900, max_call=64)
    assert report.lengths == (300, 300)
    assert report.total.total_bytes == reserved["total_bytes"]
    assert report.total.saved > 0
    for i, (layer, theirs) in enumerate(zip(report.layers, dense.layers, strict=True)):
        assert layer.kind == ("window" if i in layout.outside else "pruned")
        assert layer.dense_bytes == theirs.keys.nbytes + theirs.values.nbytes
        assert (layer.total_bytes == layer.dense_bytes) == (i in layout.outside)


def test_dense_is_what_is_allocated():
    model = tiny()
    cache = DynamicCache(config=model.config)
    forward(model, prompts([300])[0], cache)
    report = leank.memory_report(cache)
    held = sum(t.untyped_storage().nbytes() for x in cache.layers for t in (x.keys, x.values))
    total = report.total
    assert total.allocated_bytes == held == total.total_bytes == total.dense_bytes
    assert total.k_bytes == N * HKV * 300 * D * 4 and total.saved == 0
    assert (report.window, report.lengths, report.dtype) == (None, (300,), "float32")
    pruned_report = leank.memory_report(pruned_cache(model, pruned(), [300])[0])
    assert pruned_report.total.dense_bytes == total.total_bytes
    # A layer that is a view of more holds all of it.
    cache.layers[0].keys = cache.layers[0].keys[:, :, :10]
    assert leank.memory_report(cache).total.allocated_bytes == held


@pytest.mark.parametrize(
    ("name", "kind"),
    [("qwen2 sliding", "window"), ("qwen3_next", "state"), ("nemotron_h", "none")],
)
def test_layers_outside_are_in_no_total(name, kind):
    model = FAMILIES[name].make()
    layout = inspect_structure(model)
    cache, mask = pruned_cache(model, mask_for(layout), [200])
    report = leank.memory_report(cache)
    outside = [report.layers[i] for i in layout.outside]
    assert kind in {layer.kind for layer in outside}
    assert {layer.kind for layer in report.layers} <= {"pruned", "window", "state", "none"}
    assert report.total.total_bytes == mask.predict_memory([200])["total_bytes"]
    dense = DynamicCache(config=model.config)
    forward(model, prompts([200])[0], dense)
    theirs = leank.memory_report(dense)
    assert [theirs.layers[i] for i in layout.outside] == outside
    assert theirs.total.total_bytes == report.total.dense_bytes
    if kind == "window":
        (window,) = {layer.total_bytes for layer in outside}
        assert window == theirs.layers[2].k_bytes * 2 and window < 200 * HKV * 2 * D * 4
    if kind == "state":
        layer = cache.layers[layout.outside[0]]
        states = (layer.conv_states[0], layer.recurrent_states[0])
        assert outside[0].state_bytes == sum(x.numel() * x.element_size() for x in states)


def test_state_beside_k_and_v():
    model = FAMILIES["falcon_h1"].make()
    cache, mask = pruned_cache(model, mask_for(inspect_structure(model)), [200])
    report = leank.memory_report(cache)
    assert report.total.total_bytes == mask.predict_memory([200])["total_bytes"]
    assert all(layer.kind == "pruned" and layer.state_bytes > 0 for layer in report.layers)
    assert report.total.state_bytes == 0
    assert f"pruned, state {report.layers[0].state_bytes:,}" in repr(report)


def test_text_html_and_dict():
    cache, _ = pruned_cache(tiny(), pruned(), LENGTHS)
    report = leank.memory_report(cache)
    lines = str(report).splitlines()
    assert lines[0] == "LeanKCache: 1,320 tokens in 2 rows, float32, window 3 + 5, slack 64"
    assert lines[1].split() == ["layer", "K", "V", "K", "and", "V", "allocated", "dense", *_ENDS]
    assert len(lines) == 2 + N + 1 and len({len(line) for line in lines[1:]}) == 1
    total = report.total
    numbers = (total.k_bytes, total.v_bytes, total.total_bytes, total.allocated_bytes)
    expected = ["all", "total", *(f"{n:,}" for n in (*numbers, total.dense_bytes))]
    expected += [f"{total.saved:.1%}", str(total.n_pages), str(total.n_twins)]
    assert lines[-1].split() == expected
    page = report._repr_html_()
    cells = [html.unescape(text) for text in re.findall("<td>(.*?)</td>", page)]
    assert cells[-len(expected) :] == expected and len(cells) == (N + 1) * len(expected)
    said = json.loads(json.dumps(report.as_dict()))
    assert said["total"]["total_bytes"] == total.total_bytes
    assert said["total"]["saved"] == total.saved and len(said["layers"]) == N
    assert said["window"] == {"sink": 3, "recent": 5, "slack": 64} and said["lengths"] == LENGTHS


_ENDS = ("saved", "pages", "twins")


def test_empty_caches():
    model = tiny()
    with leank.patch(model, pruned()):
        ours = leank.make_cache(model)
    for cache in (ours, DynamicCache(config=model.config), DynamicCache()):
        report = leank.memory_report(cache)
        assert report.total.total_bytes == 0 and report.total.saved == 0 and report.dtype is None
        assert str(report).startswith(f"{type(cache).__name__}: empty")


def test_what_generate_returns():
    model = tiny()
    with leank.patch(model, pruned()):
        out = generate(model, prompts([100])[0])
    assert leank.memory_report(out.past_key_values).lengths == (111,)


def test_other_caches_are_refused():
    model = tiny()
    for cache in (StaticCache(config=model.config, max_cache_len=8), None):
        with pytest.raises(TypeError, match="cache: expected a LeanKCache or a DynamicCache, got"):
            leank.memory_report(cache)
