"""Patched models on a GPU: generate() and plain forwards, eager and compiled, against the rule."""

import contextlib
import copy
import functools

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

from torch._dynamo.utils import counters  # noqa: E402

import leank  # noqa: E402
from leank import ChannelMask, _deferred  # noqa: E402

from . import cuda_parallel  # noqa: E402
from .cuda_emulated import no_reads  # noqa: E402
from .cuda_model_tools import (  # noqa: E402
    NAMES,
    WINDOW,
    D,
    Forced,
    Models,
    compiled,
    draw,
    eager,
    filled,
    forward,
    pruned,
    run,
    small,
    steps,
)
from .families import FAMILIES  # noqa: E402
from .hf_tools import graphs  # noqa: E402
from .processes import run_two  # noqa: E402
from .tiny_models import VOCAB, N, generate, oracle, prompts, tiny  # noqa: E402

pytestmark = [
    pytest.mark.filterwarnings("ignore"),  # what inductor imports warns about itself
    pytest.mark.usefixtures("fresh_compiler"),
]

# Lengths of the rows' prompts. Pages retire their dropped channels in the long ones.
CASES = {"one row": [30], "padded": [40, 12, 1], "one token": [1, 1], "long": [150, 90, 60]}


@pytest.fixture(scope="module", params=[torch.bfloat16, torch.float16], ids=NAMES.get)
def models(request, place):
    return small(place, request.param)


# ---------------------------------------------------------------------------------- generate


@pytest.mark.parametrize("how", [eager, compiled])
@pytest.mark.parametrize("name", CASES)
def test_generate_equals_the_rule(models, name, how):
    with models.patch():
        cache = run(models, CASES[name], **how(models)).past_key_values
    n_columns = max(CASES[name]) + 11
    assert cache.n_columns == int(cache.get_seq_length()) == n_columns
    assert cache.get_max_length() == n_columns
    sizes = {"slack": WINDOW["slack"], "max_tokens": n_columns}
    predicted = models.mask.predict_memory([1] * len(CASES[name]), models.dtype, **sizes)
    assert cache.memory() == cache.memory() | predicted
    report = leank.memory_report(cache)
    assert report.dtype == models.dtype and report.total.total_bytes == predicted["total_bytes"]
    assert cache.memory()["slab_bytes"] == predicted["total_bytes"]
    graphs(0 if how is eager else 1)


def test_one_graph_for_all_caches(one):
    """A new cache, a longer prompt in it, and the same cache after a reset."""
    with one.patch() as handle, torch._dynamo.config.patch(error_on_recompile=True):
        options = compiled(one)
        assert run(one, [80, 30], **options).past_key_values.get_max_length() == 91
        cache = run(one, [40, 12], **options).past_key_values
        assert cache.get_max_length() == handle.max_cache_len == 91
        cache.reset()
        assert run(one, [50, 60], past_key_values=cache, **options).past_key_values is cache
        stores = [layer.store for layer in cache.packed]
        cache.reset()
        run(one, [9], past_key_values=cache, disable_compile=True)
        assert all(
            layer.store is not store for layer, store in zip(cache.packed, stores, strict=True)
        )
        graphs(1)
        # Without graphs there is nothing to keep a length for.
        assert run(one, [20], disable_compile=True).past_key_values.get_max_length() == 31


def test_a_prompt_after_graphs_waits_once(one, monkeypatch):
    """Not in each layer, so that the host stays ahead of the GPU."""
    from leank.cuda import LayerCache

    columns = LayerCache.columns.fget

    def guarded(store):
        assert store is cache.packed[0].store  # what the model asks for
        return columns(store)

    with one.patch():
        cache = run(one, [40], **compiled(one)).past_key_values
        cache.reset()
        with monkeypatch.context() as patches:
            patches.setattr(LayerCache, "columns", property(guarded))
            with torch.no_grad():
                one.model(draw(1, 30).to(one.place), past_key_values=cache)
        assert cache.counts() == [30] * len(cache)
        # After a replay the host does not rely on what it knew.
        cache.reset()
        cache = run(one, [40], past_key_values=cache, **compiled(one)).past_key_values
        assert cache.counts() == [layer.n_columns for layer in cache.packed] == [51] * len(cache)


@contextlib.contextmanager
def no_waiting(models, patches):
    """Fail where a step waits for the device."""
    if models.place != "cuda":
        with no_reads(patches):
            yield
        return
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("how", [eager, compiled])
def test_steps_do_not_wait_for_the_device(one, how, monkeypatch):
    """Neither what generate() prepares nor the forward; what it does with logits is not ours."""
    waits = []

    def guarded(function):
        @functools.wraps(function)
        def call(*args, **kwargs):
            ids = kwargs.get("input_ids", args[0] if args else None)
            n_new = kwargs.get("next_sequence_length") or ids.shape[1]
            if n_new > 1:
                return function(*args, **kwargs)
            waits.append(function)
            with no_waiting(one, monkeypatch):
                return function(*args, **kwargs)

        return call

    model, options = one.model, how(one)
    with one.patch():
        run(one, [30, 12], **options)  # compiles
        with monkeypatch.context() as patches:
            prepare = guarded(model.prepare_inputs_for_generation)
            patches.setattr(model, "prepare_inputs_for_generation", prepare)
            if how is eager:
                patches.setattr(model, "forward", guarded(model.forward))
            else:
                compile_call = model.get_compiled_call
                patches.setattr(model, "get_compiled_call", lambda x: guarded(compile_call(x)))
            run(one, [30, 12], **options)
    assert len(waits) == 2 * 11


@pytest.fixture
def undone(monkeypatch):
    """How many steps each generate() took back, of those that are told late to stop."""
    numbers, finish = [], _deferred._StopCheck.finish
    monkeypatch.setattr(
        _deferred._StopCheck, "finish", lambda self: numbers.append(finish(self)) or numbers[-1]
    )
    return numbers


@pytest.mark.parametrize("how", [eager, compiled])
def test_a_stop_that_is_told_late_is_undone(one, how, undone):
    """generate() has queued one step too many when it learns on a GPU that all rows are done."""
    ids, mask = prompts([30, 12])
    tokens = draw(2, 12).clamp(max=VOCAB - 2)
    tokens[0, 3] = tokens[:, 5] = end = VOCAB - 1
    with one.patch():
        out = generate(
            one.model,
            ids.to(one.place),
            mask.to(one.place),
            logits_processor=[Forced(tokens, 30)],
            eos_token_id=end,
            **how(one),
        )
        assert undone == [1]
        sequences, cache = out.sequences.cpu(), out.past_key_values
        tokens[0, 4:] = 0  # padding after its end
        assert torch.equal(sequences, torch.cat([ids, tokens[:, :6]], 1))
        assert cache.n_columns == int(cache.get_seq_length()) == 35
        real = torch.cat([mask, torch.ones(2, 5, dtype=torch.long)], 1)
        one.assert_rule(torch.stack(out.logits, 1), sequences[:, :35], real, 30)
        steps(one, cache, sequences[:, :35], real, draw(2, 3), 30)


def stopped(models, ids, mask=None, **options):
    """Let all rows end with their third token; returns the output."""
    tokens = draw(len(ids), 12).clamp(max=VOCAB - 2)
    tokens[:, 2] = end = VOCAB - 1
    options = {"return_dict_in_generate": True, "max_new_tokens": 12} | options
    return models.model.generate(
        ids.to(models.place),
        attention_mask=None if mask is None else mask.to(models.place),
        logits_processor=[Forced(tokens, ids.shape[1])],
        eos_token_id=end,
        pad_token_id=0,
        do_sample=False,
        **options,
    )


@pytest.mark.parametrize("how", [eager, compiled])
@pytest.mark.parametrize("n_free, expected", [(2, 0), (3, 1)])
def test_no_step_too_many_in_a_full_cache(one, how, n_free, expected, undone):
    with one.patch():
        cache = leank.make_cache(one.model, max_cache_len=30 + n_free)
        out = stopped(one, prompts([30])[0], past_key_values=cache, **how(one))
    assert undone == [expected]
    assert out.sequences.shape[1] == 33 and cache.n_columns == 32


@pytest.mark.parametrize("how", [eager, compiled])
def test_what_went_wrong_is_told_although_a_step_is_undone(one, how):
    """The second turn brings one token, and a mask that shows the padding of the first."""
    with one.patch():
        cache = leank.make_cache(one.model, max_cache_len=60)
        ids, mask = prompts([30, 12])
        forward(one, ids, cache, mask)
        turn = torch.cat([ids, draw(2, 1)], 1), torch.ones(2, 31, dtype=torch.long)
        with pytest.raises(ValueError, match="attention_mask: expected the padding that the"):
            stopped(one, *turn, past_key_values=cache, **how(one))


def test_sliding_windows_of_a_returned_cache_undo_nothing(place, undone):
    model = FAMILIES["gpt_oss"].make(torch.bfloat16, head_dim=D)
    layout = leank.models.inspect_structure(model)
    models = Models(model, place, pruned(layout.n_layers, layout.n_kv_heads))
    keep = models.mask.keep.copy()
    keep[list(layout.outside)] = True
    models.mask = ChannelMask(keep, sink=WINDOW["sink"], recent=WINDOW["recent"])
    with models.patch():
        out = stopped(models, *prompts([40, 12]), disable_compile=True)
        assert out.past_key_values.n_columns == 42 and undone == []
        options = {"return_dict_in_generate": False, "disable_compile": True}
        tokens = stopped(models, *prompts([40, 12]), **options)
        assert torch.equal(tokens, out.sequences) and undone == [1]


def test_inductor(one):
    """It makes graphs functional and computes again what it sees through: pages are not copied.

    GPUs run it in the other tests too.
    """
    options = compiled(one)
    options["compile_config"].backend = "inductor"
    with one.patch():
        run(one, [70, 12], **options)
    graphs(1)


def test_positions_from_the_cache_in_a_graph(one):
    """Every layer rotates by the columns before the step, which the layers before it change."""
    call = torch.compile(one.model, backend="inductor", fullgraph=True)
    ids = draw(2, 80)
    with one.patch(), torch.no_grad():
        cache = leank.make_cache(one.model, max_cache_len=90)
        forward(one, ids[:, :76], cache)
        got = [
            call(ids[:, i : i + 1].to(one.place), past_key_values=cache).logits
            for i in range(76, 80)
        ]
    cache.check()
    one.assert_rule(torch.cat(got, 1), ids, torch.ones_like(ids), 76)
    graphs(1)


@pytest.mark.parametrize("how", [eager, compiled])
@pytest.mark.parametrize("name", ["gpt_oss", "phi3", "gpt_neox", "falcon"])
def test_sinks_sliding_layers_fused_projections_and_other_attention(place, name, how):
    model = FAMILIES[name].make(
        torch.bfloat16, **{"head_dim": D} if name == "gpt_oss" else {"hidden_size": 256}
    )
    layout = leank.models.inspect_structure(model)
    mask = pruned(layout.n_layers, layout.n_kv_heads)
    keep = mask.keep.copy()
    # Falcon does not attend by the interface, so that the oracle does not reach it: dense.
    keep[list(layout.outside) if layout.interface else slice(None)] = True
    models = Models(model, place, ChannelMask(keep, sink=mask.sink, recent=mask.recent))
    if name == "gpt_oss":
        models.double.set_experts_implementation("eager")  # the only one in float64
    with models.patch():
        run(models, [40, 12], **how(models))
    assert not counters["graph_break"]


def test_beam_search(one):
    """The score of what it found is that of the rule."""
    ids, mask = prompts([70, 12])
    with one.patch():
        out = generate(
            one.model,
            ids.to(one.place),
            mask.to(one.place),
            num_beams=3,
            num_return_sequences=2,
            output_scores=True,
            length_penalty=0.0,
        )
    sequences = out.sequences.cpu()
    real = torch.cat([mask.repeat_interleave(2, 0), torch.ones(4, 12, dtype=torch.long)], 1)
    position = (real.cumsum(1) - 1).clamp(min=0)
    with torch.no_grad(), oracle(one.double, one.mask, 70):
        logits = one.double(sequences, attention_mask=real, position_ids=position).logits
    of_tokens = torch.log_softmax(logits[:, 69:-1], -1).gather(2, sequences[:, 70:, None])
    torch.testing.assert_close(
        out.sequences_scores.cpu().double(), of_tokens.sum((1, 2)), rtol=0, atol=0.3
    )


# ---------------------------------------------------------------------------- plain forwards


def test_ragged_steps_and_a_row_whose_prompt_comes_later(one):
    with one.patch():
        cache, ids, real = filled(one, [80, 12, 0])
        new = draw(3, 6)
        new[0, 1:3] = new[1, 4] = new[2, :2] = 0
        steps(one, cache, ids, real, new)
        lengths = [layer.store.lengths.tolist() for layer in cache.packed]
        assert lengths == [[84, 17, 4]] * N


def test_rows_crops_and_copies(one):
    with one.patch():
        cache, ids, real = filled(one)
        ids, real = steps(one, cache, ids, real, draw(3, 3))
        cache.batch_repeat_interleave(2)
        order = torch.tensor([5, 0, 0, 2, 1, 4])
        cache.reorder_cache(order.to(one.place))
        ids, real = (x.repeat_interleave(2, 0)[order] for x in (ids, real))
        twin = copy.deepcopy(cache)
        assert twin.memory() == cache.memory()
        after = steps(one, cache, ids, real, draw(6, 4, seed=1))
        cache.crop(-3)
        cut = [x[:, :-3] for x in after]
        cache.batch_select_indices(torch.tensor([3, 1]))
        steps(one, cache, *(x[[3, 1]] for x in cut), draw(2, 2))
        steps(one, twin, ids, real, draw(6, 2, seed=2))
        twin.crop(-1000)
        assert twin.n_columns == 0
        forward(one, ids[:, :30], twin)
        assert twin.get_seq_length() == 30


def test_what_inference_mode_made_serves_outside_of_it(one):
    """An unfinished prompt, copies of it, and copies of a cache that has the mask of a step."""
    ids, mask = prompts([60, 12])
    with one.patch():
        cache = leank.make_cache(one.model, max_cache_len=80)
        cache.expect_prompt(60)
        with torch.inference_mode():
            forward(one, ids[:, :20], cache, mask[:, :20])
            twin = copy.deepcopy(cache)
            twin.batch_select_indices(torch.tensor([1, 0]))
        one.assert_rule(forward(one, ids[:, 20:], cache, mask), ids, mask, 60)
        forward(one, ids[[1, 0], 20:], twin, mask[[1, 0]])
        more = torch.cat([mask, torch.ones(2, 1, dtype=torch.long)], 1)
        first = cache.step_mask(1, more)
        with torch.inference_mode():
            twin = copy.deepcopy(cache)
        again = twin.step_mask(1, mask)
        assert first.sum() == again.sum() + 2
        steps(one, twin, ids, mask, draw(2, 2), 60)


def test_compiled_calls(one):
    """One graph, and the host learns from the device what it did."""
    call = torch.compile(
        one.model, backend="inductor" if one.place == "cuda" else "aot_eager", fullgraph=True
    )
    with one.patch(), torch.inference_mode():
        cache, ids, real = filled(one)
        new = draw(3, 4)
        ids, real = torch.cat([ids, new], 1), torch.cat([real, torch.ones_like(new)], 1)
        position = (real.cumsum(1) - 1)[:, 80:].to(one.place)
        got = [
            call(
                new[:, i : i + 1].to(one.place),
                attention_mask=real[:, : 81 + i].to(one.place),
                position_ids=position[:, i : i + 1],
                past_key_values=cache,
            ).logits
            for i in range(4)
        ]
        one.assert_rule(torch.cat(got, 1), ids, real, 80)
        assert cache.n_columns == int(cache.get_seq_length()) == 84
        cache.crop(-2)
        steps(one, cache, ids[:, :82], real[:, :82], draw(3, 3, seed=3))
    assert cache.n_columns == 85


def test_forward_that_stopped_half_way(one):
    with one.patch():
        cache, ids, real = filled(one)
        more = torch.cat([real, torch.ones(3, 1, dtype=torch.long)], 1)
        hook = one.model.model.layers[1].register_forward_pre_hook(lambda *args: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            forward(one, draw(3, 1), cache, more)
        hook.remove()
        with pytest.raises(RuntimeError, match=r"layers hold \[80, 81\] .* cache\.crop\(0\)"):
            forward(one, draw(3, 1), cache, more)
        cache.crop(0)
        steps(one, cache, ids, real, draw(3, 2))


@pytest.mark.cuda
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two NVIDIA GPUs")
def test_layers_on_two_gpus(place):
    accelerate = pytest.importorskip("accelerate")
    models = Models(tiny(head_dim=D, dtype=torch.bfloat16), "cpu")
    places = {"model.embed_tokens": 0, "model.rotary_emb": 0, "model.layers.0": 0}
    places |= {f"model.layers.{i}": 1 for i in (1, 2)} | {"model.norm": 1, "lm_head": 1}
    models.model = accelerate.dispatch_model(models.model, places, skip_keys="past_key_values")
    models.place = "cuda:0"
    with models.patch() as handle:
        assert len(handle.gpus()) == 2
        out = run(models, [80, 12])
        assert [x.store.device.index for x in out.past_key_values.packed] == [0, 1, 1]
        generate(models.model, *(x.to("cuda:0") for x in prompts([40, 12])), num_beams=2)


@pytest.mark.cuda
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two NVIDIA GPUs")
def test_heads_on_two_gpus(tmp_path):
    """Tensor parallelism: each process prunes the heads that it has."""
    models = Models(tiny(head_dim=D, dtype=torch.bfloat16), "cpu")
    models.model.save_pretrained(tmp_path / "model")
    models.mask.save(tmp_path / "mask.safetensors")
    run_two("-m", "tests.cuda_parallel", tmp_path)
    for rank in (0, 1):
        got = torch.load(tmp_path / f"{rank}.pt", weights_only=False)
        for name, out in got.items():
            assert out["heads"] == {1} and out["device"] == {f"cuda:{rank}"}
            n_rows, n_columns = len(out["sequences"]), out["sequences"].shape[1]
            real = prompts(cuda_parallel.LENGTHS)[1][:n_rows]
            new = torch.ones(n_rows, n_columns - 1 - real.shape[1], dtype=torch.long)
            real = torch.cat([real, new], 1)
            models.assert_rule(out["logits"], out["sequences"][:, :-1], real, 80, name)
