"""CUDA faults: memory runs out, CUDA refuses a part of a change, a mask or the length is wrong.

Each leaves a cache as it was, or unusable until a reset, which every later use says.
tests/test_cuda_devices.py has those that only a GPU shows.
"""

import contextlib
import copy

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

from torch.utils._python_dispatch import TorchDispatchMode  # noqa: E402

import leank  # noqa: E402

from . import cuda_emulated  # noqa: E402
from .cuda_model_tools import (  # noqa: E402
    WINDOW,
    D,
    Models,
    draw,
    filled,
    forward,
    pruned,
    steps,
)
from .families import FAMILIES  # noqa: E402
from .tiny_models import prompts  # noqa: E402

SLACK = WINDOW["slack"]
HALF_CHANGED = "cache: expected one that is whole, got one that {} left half changed"


# ------------------------------------------------------------------------------------------- faults


class Faults(TorchDispatchMode):
    """Let the n-th allocation of a tensor fail, or what comes after a call of an operator."""

    def __init__(self, n=None, after=None):
        super().__init__()
        self.n, self.after, self.happened = n, after, False

    def allocate(self):
        self.n -= 1
        if self.n == 0:
            self.happened = True
            raise torch.OutOfMemoryError("no memory, as the test wants it")

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        returns_new = any(x.alias_info is None for x in func._schema.returns)
        # torch.empty is counted where Python calls it, also inside of operators.
        if self.n and returns_new and func._schema.name != "aten::empty":
            self.allocate()
        out = func(*args, **(kwargs or {}))
        if func._schema.name == self.after:
            self.happened = True
            raise RuntimeError(f"{self.after}: CUDA error, as the test wants it")
        return out


@contextlib.contextmanager
def out_of_memory(monkeypatch, n):
    """Let the n-th allocation fail; `happened` of what it yields tells whether one did."""
    faults, empty = Faults(n), torch.empty

    def counted(*args, **kwargs):
        faults.allocate()
        return empty(*args, **kwargs)

    with monkeypatch.context() as patches:
        patches.setattr(torch, "empty", counted)
        with faults, contextlib.suppress(torch.OutOfMemoryError):
            yield faults


def make(place, lengths=(90, 70), seed=1, **options):
    """Return a leank.cuda.LayerCache with a prompt, left-padded."""
    from leank.cuda import LayerCache

    cache = LayerCache(
        pruned().keep[1], n_rows=len(lengths), max_tokens=200, device=place, **WINDOW | options
    )
    cache.append(*columns(cache, max(lengths), seed)[1:], valid=padded(cache, lengths))
    return cache


def columns(cache, n, seed=2):
    """Draw q, k and v of n columns."""
    generator = torch.Generator().manual_seed(seed)
    shapes = [(cache.n_rows, cache.n_heads * r, n, D) for r in (2, 1, 1)]
    return [
        torch.randn(shape, generator=generator).to(cache.device, cache.dtype) for shape in shapes
    ]


def padded(cache, lengths):
    n = max(lengths)
    return torch.tensor([[i >= n - x for i in range(n)] for x in lengths], device=cache.device)


def snapshot(cache):
    """Return all that a leank.cuda.LayerCache tells, as bytes."""
    cache.check()
    rows = [x.view(torch.int16).cpu() for b in range(cache.n_rows) for x in cache.gather(b)]
    told = cache.lengths, cache.lo, cache.prompt_lengths, cache.columns
    arrays = [x.cpu().numpy() for x in (*rows, *told)] + [cache.real]
    return cache.n_rows, cache.n_columns, cache.is_empty, [x.tobytes() for x in arrays]


def decoding(n):
    def run(cache):
        from leank.cuda import decode

        return decode(cache, *columns(cache, n), return_lse=True)

    return run


def appending(cache):
    # Not contiguous, so that it is copied.
    valid = padded(cache, (1, 9)).T.contiguous().T
    cache.append(*columns(cache, 9)[1:], valid=valid)


OPERATIONS = {
    "append": appending,
    "step": decoding(1),
    "turn": decoding(SLACK + 1),
    "long turn": decoding(23),
    "reorder": lambda cache: cache.select([1, 0]),
    "repeat": lambda cache: cache.select([1, 1]),
    "grow": lambda cache: cache.select([1, 0, 1]),
    "shrink": lambda cache: cache.select([1]),
    "crop": lambda cache: cache.crop(75),
    "copy": lambda cache: snapshot(cache.copy()),
    "reset": lambda cache: cache.reset(),
}


# --------------------------------------------------------------------------------------- one layer


@pytest.mark.parametrize("name", OPERATIONS)
def test_a_call_runs_out_of_memory(place, monkeypatch, name):
    """Each allocation fails in turn; each time the cache is as it was, and the call works after."""
    base, expected = make(place), make(place)
    before = snapshot(base)
    out = OPERATIONS[name](expected)
    after = snapshot(expected)
    for n in range(1, 300):
        cache = base.copy()
        with out_of_memory(monkeypatch, n) as faults:
            OPERATIONS[name](cache)
        assert snapshot(cache) == (before if faults.happened else after), f"allocation {n}"
        if not faults.happened:
            break
        got = OPERATIONS[name](cache)
        assert snapshot(cache) == after, f"allocation {n}"
        for x, y in zip(got or (), out or (), strict=True):
            assert x == y if isinstance(x, int | list) else torch.equal(x, y)
    assert not faults.happened and snapshot(base) == before
    if name in ("reorder", "repeat", "grow", "shrink", "copy"):
        assert n > 3


def assert_unusable_until_reset(cache, what):
    message = HALF_CHANGED.format(what)
    uses = [run for name, run in OPERATIONS.items() if name != "reset"]
    uses += [lambda x: x.gather(0), lambda x: x.lengths, lambda x: x.real, lambda x: x.check()]
    for use in uses:
        with pytest.raises(RuntimeError, match=message):
            use(cache)
    cache.reset()
    fresh = make(cache.device)
    fresh.reset()
    assert snapshot(cache) == snapshot(fresh)
    for x in (cache, fresh):
        x.append(*columns(x, 90)[1:], valid=padded(x, (30, 90)))
        decoding(1)(x)
    assert snapshot(cache) == snapshot(fresh)


@pytest.mark.parametrize(
    "name, after, what",
    [
        ("append", "leank::append", "append"),
        ("repeat", "leank::copy_pages", "select"),
        ("repeat", "aten::copy_", "select"),
        ("reset", "aten::zero_", "reset"),
    ],
)
def test_a_change_that_stops_half_way(place, name, after, what):
    cache = make(place)
    with pytest.raises(RuntimeError, match=f"{after}: CUDA error"), Faults(after=after):
        OPERATIONS[name](cache)
    assert_unusable_until_reset(cache, what)


@pytest.mark.parametrize("name", ["grow", "copy"])
def test_a_copy_that_stops_half_way(place, name):
    """It is the new pages that are lost."""
    cache = make(place)
    before = snapshot(cache)
    with pytest.raises(RuntimeError, match="CUDA error"), Faults(after="leank::copy_pages"):
        OPERATIONS[name](cache)
    assert snapshot(cache) == before


def test_a_turn_that_stops_between_pieces(place, monkeypatch):
    if place == "cuda":
        pytest.skip("test_a_refused_span has it: pieces are the extension's")
    cache, pieces = make(place), []
    append = cuda_emulated._append

    def once(*args):
        if pieces:
            raise RuntimeError("span: CUDA error")
        pieces.append(append(*args))

    with monkeypatch.context() as patches:
        patches.setattr(cuda_emulated, "_append", once)
        with pytest.raises(RuntimeError, match="span: CUDA error"):
            OPERATIONS["long turn"](cache)
    assert len(pieces) == 1
    assert_unusable_until_reset(cache, "decode")


# ------------------------------------------------------------------------------------------ a model


def layers_of(cache):
    """Return all that the layers of a LeanKCache tell, as bytes."""
    of_prompts = []
    for p in (layer.prompt for layer in cache.packed if layer.prompt is not None):
        there = p.k[:, :, : p.n_columns], p.v[:, :, : p.n_columns], p.valid[:, : p.n_columns]
        of_prompts.append([x.cpu().contiguous().view(torch.uint8).numpy().tobytes() for x in there])
    return [snapshot(layer.store) for layer in cache.packed], of_prompts, cache.n_columns


@pytest.mark.parametrize("n_new", [1, SLACK])
def test_a_forward_runs_out_of_memory(one, monkeypatch, n_new):
    """Wherever that is, a crop goes back to what was, and the forward works after it."""
    with one.patch():
        base, ids, real = filled(one, [20, 12], max_cache_len=40)
        before, new = layers_of(base), draw(2, n_new)
        more = torch.cat([real, torch.ones_like(new)], 1)
        expected = forward(one, new, base, more)
        base.crop(-n_new)
        cache, last, stopped = base, False, 0
        for n in [*range(1, 1000, 23), 1000]:
            with out_of_memory(monkeypatch, n) as faults:
                forward(one, new, cache, more)
            last = not faults.happened
            lengths = {layer.n_columns for layer in cache.packed}
            if len(lengths) > 1:
                stopped += 1
                with pytest.raises(RuntimeError, match=r"did not finish; cache.crop\(0\) goes"):
                    forward(one, new, cache, more)
                cache.crop(0)
            if last:
                break
            cache.crop(20 - cache.n_columns)
            assert layers_of(cache) == before, f"allocation {n}"
            got = forward(one, new, cache, more)
            torch.testing.assert_close(got, expected, rtol=2e-2, atol=2e-2)
            cache.crop(-n_new)
        assert last and stopped


def test_a_layer_is_reserved_or_not(place, monkeypatch):
    from leank.cuda_layer import LeanKCudaLayer

    layer = LeanKCudaLayer(pruned().keep[1], max_cache_len=90, **WINDOW)
    k = torch.zeros(2, len(layer.keep), 9, D, dtype=torch.bfloat16, device=place)
    for n in range(1, 100):
        with out_of_memory(monkeypatch, n) as faults:
            layer.lazy_initialization(k, k)
        assert layer.is_initialized != faults.happened
        if not faults.happened:
            break
        assert layer.store is None and layer.n_columns == 0
    assert layer.store.n_columns == 0 and n > 3
    layer.check()


@pytest.mark.parametrize("n_first", [80, 50])
def test_a_prompt_runs_out_of_memory(one, monkeypatch, n_first):
    """Pages are reserved in it, and dense K and V, if it comes in two calls."""
    ids, real = prompts([80, 33])
    with one.patch():
        cache, last = leank.make_cache(one.model, max_cache_len=90), False
        for n in [*range(1, 1000, 31), 1000]:
            cache.reset()
            cache.packed[0].store = None
            cache.expect_prompt(80)
            with out_of_memory(monkeypatch, n) as faults:
                forward(one, ids[:, :n_first], cache, real[:, :n_first])
            last = not faults.happened
            if last:
                break
            cache.crop(-cache.n_columns)
            cache.expect_prompt(80)
            got = forward(one, ids[:, :n_first], cache, real[:, :n_first])
            one.assert_rule(got, ids[:, :n_first], real[:, :n_first], 80, f"allocation {n}")
        assert last and cache.n_columns == n_first
        if n_first < 80:
            forward(one, ids[:, n_first:], cache, real)
        steps(one, cache, ids, real, draw(2, 2))


def test_a_prompt_that_stops_half_way(one):
    """What follows says so, and a reset is enough."""
    with one.patch():
        cache, ids, real = filled(one, [40, 12], max_cache_len=50)
        cache.reset()
        with pytest.raises(RuntimeError, match="CUDA error"), Faults(after="leank::append"):
            forward(one, ids, cache, real)
        message = HALF_CHANGED.format("append")
        for use in (
            lambda: forward(one, ids, cache, real),
            lambda: forward(one, ids[:, :1], cache),
            lambda: cache.crop(0),
            lambda: cache.reorder_cache(torch.tensor([1, 0])),
            lambda: cache.check(),
        ):
            with pytest.raises(RuntimeError, match=message):
                use()
        cache.reset()
        forward(one, ids, cache, real)
        steps(one, cache, ids, real, draw(2, 2), n_prompt=40)


# What changes rows, and which former rows are there then.
CHANGES = {
    "more rows": (
        lambda cache: cache.batch_select_indices(torch.tensor([2, 0, 1, 1, 0])),
        [2, 0, 1, 1, 0],
    ),
    "fewer rows": (
        lambda cache: cache.batch_select_indices(torch.tensor([True, False, True])),
        [0, 2],
    ),
    "repeated rows": (lambda cache: cache.batch_repeat_interleave(2), [0, 0, 1, 1, 2, 2]),
    "other order": (lambda cache: cache.reorder_cache(torch.tensor([2, 2, 0])), [2, 2, 0]),
}


@pytest.mark.parametrize("prompt", ["complete", "unfinished"])
@pytest.mark.parametrize("name", CHANGES)
def test_rows_of_all_layers_or_of_none(one, monkeypatch, name, prompt):
    change, rows = CHANGES[name]
    ids, real = prompts([80, 33, 12])
    n_first = 80 if prompt == "complete" else 50
    with one.patch():
        caches = []
        for _ in range(2):
            cache = leank.make_cache(one.model, max_cache_len=90)
            cache.expect_prompt(80)
            forward(one, ids[:, :n_first], cache, real[:, :n_first])
            caches.append(cache)
        cache, expected = caches
        before = layers_of(cache)
        change(expected)
        for n in range(1, 300):
            with out_of_memory(monkeypatch, n) as faults:
                change(cache)
            if not faults.happened:
                break
            assert layers_of(cache) == before, f"allocation {n}"
        assert not faults.happened and n > 3 * len(cache.packed)
        assert layers_of(cache) == layers_of(expected) != before
        ids, real = ids[rows], real[rows]
        if n_first < 80:
            forward(one, ids[:, n_first:], cache, real)
        steps(one, cache, ids, real, draw(len(rows), 2))


def test_rows_of_sliding_layers_too(place, monkeypatch):
    """Those of transformers, one of which comes before all that are pruned."""
    model = FAMILIES["gpt_oss"].make(torch.bfloat16, head_dim=D)
    layout = leank.models.inspect_structure(model)
    mask = pruned(layout.n_layers, layout.n_kv_heads)
    keep = mask.keep.copy()
    keep[list(layout.outside)] = True
    models = Models(model, place, leank.ChannelMask(keep, sink=mask.sink, recent=mask.recent))
    models.double.set_experts_implementation("eager")  # the only one in float64
    change, rows = CHANGES["more rows"]
    with models.patch():
        cache, ids, real = filled(models, [40, 12, 7], max_cache_len=50)
        sliding = [layer for layer in cache.layers if layer.is_sliding]
        assert cache.layers[0] is sliding[0]
        for n in range(1, 300):
            before = layers_of(cache), [x for layer in sliding for x in (layer.keys, layer.values)]
            with out_of_memory(monkeypatch, n) as faults:
                change(cache)
            if not faults.happened:
                break
            after = layers_of(cache), [x for layer in sliding for x in (layer.keys, layer.values)]
            assert before[0] == after[0], f"allocation {n}"
            assert all(x is y for x, y in zip(before[1], after[1], strict=True))
        assert not faults.happened and n > 3 * len(cache.packed)
        steps(models, cache, ids[rows], real[rows], draw(len(rows), 2), n_prompt=40)


# ------------------------------------------------------------------- what only the GPU knows of


def test_a_wrong_mask_is_not_forgotten_before_its_step_is(one):
    """Assisted generation crops after each round."""
    with one.patch():
        cache, ids, real = filled(one)
        wrong = torch.cat([real, torch.ones(3, 1, dtype=torch.long)], 1)
        wrong[1] = 1
        new = draw(3, 3)
        forward(one, new[:, :1], cache, wrong)
        message = "attention_mask: expected the padding that the cache was filled with"
        for n in (0, 1):
            more = torch.cat([real, torch.ones(3, 2, dtype=torch.long)], 1)
            forward(one, new[:, 1:2], cache, more)
            cache.crop(-n)
            cache.crop(0)
            with pytest.raises(ValueError, match=message):
                cache.check()
            cache.crop(81 - cache.n_columns)
        cache.crop(-1)
        cache.check()
        steps(one, cache, ids, real, new)


@pytest.mark.usefixtures("fresh_compiler")
def test_a_forward_that_is_refused_says_nothing_of_steps_after_it(one):
    """What it knew of the columns is old once a graph ran."""
    call = torch.compile(one.model, backend="eager", fullgraph=True)

    def step(cache, ids, real):
        position = (real.cumsum(1) - 1).clamp(min=0)[:, -1:]
        mask, position = real.to(one.place), position.to(one.place)
        with torch.no_grad():
            new = ids[:, -1:].to(one.place)
            call(new, attention_mask=mask, position_ids=position, past_key_values=cache)

    with one.patch():
        cache, ids, real = filled(one)
        more = draw(3, 4)
        ids, real = torch.cat([ids, more], 1), torch.cat([real, torch.ones_like(more)], 1)
        step(cache, ids[:, :81], real[:, :81])
        with pytest.raises(ValueError, match="attention_mask: expected the padding"):
            forward(one, more[:, 1:3], cache, torch.ones_like(real[:, :83]))
        for n in (82, 83, 84):
            step(cache, ids[:, :n], real[:, :n])
        assert cache.n_columns == 84
        assert cache.counts() == [84] * len(cache)
        twin = copy.deepcopy(cache)
        cache.batch_select_indices(torch.tensor([2, 0]))
        for x, rows in ((twin, [0, 1, 2]), (cache, [2, 0])):
            assert x.n_columns == 84
            steps(one, x, ids[rows], real[rows], draw(len(rows), 2))


def test_a_forward_that_is_refused_says_nothing_of_replays_after_it(one):
    """A graph that was captured by hand runs nothing on the host."""
    from leank._cuda_ops import ops

    with one.patch():
        cache, ids, real = filled(one)
        stores = [layer.store for layer in cache.packed]
        for store in stores:
            store.may_be_replayed = True
        with pytest.raises(ValueError, match="attention_mask: expected the padding"):
            forward(one, draw(3, 2), cache, torch.ones(3, 82, dtype=torch.long))
        for store in stores:  # as a replay, of which the host sees nothing
            _, k, v = columns(store, 1)
            ops.append(k, v, None, *store._buffers, 80, store._limits)
        twin = copy.deepcopy(cache)
        fewer = copy.deepcopy(cache)
        fewer.batch_select_indices(torch.tensor([2, 0]))
        for x in (cache, twin, fewer):
            assert x.n_columns == 81
            for layer in x.packed:
                assert layer.store.n_columns == layer.store.real.shape[1] == 81
        twin.crop(-1)
        steps(one, twin, ids, real, draw(3, 2))
