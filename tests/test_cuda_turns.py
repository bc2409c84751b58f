"""Patched models on a GPU with several tokens per row and call: turns, chunks, drafts, crops."""

import copy
import dataclasses

import numpy as np
import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

import leank  # noqa: E402
from leank.evaluation.ask import Generating  # noqa: E402
from leank.evaluation.items import CONTINUATION  # noqa: E402
from leank.evaluation.methods import DENSE, Method  # noqa: E402

from .cuda_model_tools import (  # noqa: E402
    WINDOW,
    D,
    Models,
    draw,
    filled,
    forward,
    pruned,
    run,
    steps,
)
from .eval_tools import LONG, make_corpus, make_suite  # noqa: E402
from .families import FAMILIES  # noqa: E402
from .test_eval import Numbers  # noqa: E402
from .tiny_models import generate, prompts, tiny  # noqa: E402

SLACK = WINDOW["slack"]


def turn(models, cache, ids, real, new, n_prompt=80):
    """Go on with all columns of new [B, T] in one call, where it is 0 for padding."""
    ids, real = torch.cat([ids, new], 1), torch.cat([real, (new > 0).long()], 1)
    got = forward(models, new, cache, real)
    models.assert_rule(got, ids, real, n_prompt)
    assert cache.n_columns == ids.shape[1]
    return ids, real


def ragged(n_columns, counts, seed=7):
    """Draw tokens, with padding before the last counts[b] of row b."""
    new = draw(len(counts), n_columns, seed)
    for row, count in zip(new, counts, strict=True):
        row[: n_columns - count] = 0
    return new


@pytest.mark.parametrize("n_columns", [2, SLACK + 1, SLACK + 2, 23])
def test_turns_equal_the_rule(one, n_columns):
    with one.patch():
        cache, ids, real = filled(one, max_cache_len=140)
        ids, real = turn(one, cache, ids, real, draw(3, n_columns))
        ids, real = steps(one, cache, ids, real, draw(3, 2, seed=1))
        turn(one, cache, ids, real, ragged(n_columns, [n_columns, 1, 0], seed=2))
        lengths = [80 + 2 * n_columns + 2, 12 + n_columns + 3, 25 + n_columns + 2]
        assert [layer.store.lengths.tolist() for layer in cache.packed] == [lengths] * 3


@pytest.mark.parametrize("name", ["gpt_oss", "phi3", "gpt_neox", "falcon"])
def test_turns_of_other_models(place, name):
    """Sinks, sliding layers, fused projections, attention outside of the interface."""
    model = FAMILIES[name].make(
        torch.bfloat16, **{"head_dim": D} if name == "gpt_oss" else {"hidden_size": 256}
    )
    layout = leank.models.inspect_structure(model)
    mask = pruned(layout.n_layers, layout.n_kv_heads)
    keep = mask.keep.copy()
    keep[list(layout.outside) if layout.interface else slice(None)] = True
    models = Models(model, place, leank.ChannelMask(keep, sink=mask.sink, recent=mask.recent))
    if name == "gpt_oss":
        models.double.set_experts_implementation("eager")  # the only one in float64
    with models.patch():
        cache, ids, real = filled(models, [40, 12], max_cache_len=60)
        turn(models, cache, ids, real, draw(2, 9), n_prompt=40)


def test_crop_between_turns(one):
    """Up to slack columns are as if they had never been."""
    with one.patch():
        cache, ids, real = filled(one, max_cache_len=140)
        for n in (SLACK, 2, SLACK):
            turn(one, cache, ids, real, draw(3, n, seed=n))
            cache.crop(-n)
            ids, real = turn(one, cache, ids, real, draw(3, SLACK + 3, seed=n + 1))
        cache.crop(-3)
        turn(one, cache, ids[:, :-3], real[:, :-3], draw(3, 7))


def test_crop_into_the_prompt(one):
    """A query inside of the prompt sees all of it whole, also what later tokens let go."""
    with one.patch():
        cache, ids, real = filled(one, [72, 40])
        cache.crop(-1)
        assert cache.packed[0].store.prompt_lengths.tolist() == [72, 40]
        turn(one, cache, ids[:, :-1], real[:, :-1], draw(2, 9), n_prompt=72)
        assert cache.packed[0].store.lo.tolist() == [64, WINDOW["sink"]]


def test_row_whose_prompt_comes_later(one):
    most = SLACK + 1
    with one.patch():
        cache, ids, real = filled(one, [80, 12, 0])
        message = f"k: expected at most {most} columns because row 2 has no token yet"
        more = torch.cat([real, torch.ones(3, most + 1, dtype=torch.long)], 1)
        with pytest.raises(ValueError, match=message):
            forward(one, draw(3, most + 1), cache, more)
        assert cache.n_columns == 80
        new = ragged(most, [most, 0, 3])
        forward(one, new, cache, torch.cat([real, (new > 0).long()], 1))
        assert cache.packed[0].store.prompt_lengths.tolist() == [80, 12, 3]


@pytest.mark.parametrize("sizes", [[50, 30], [79, 1], [1, 78, 1], [30, 30, 25], [70, 30]])
@pytest.mark.parametrize("lengths", [[80], [80, 33, 1]])
def test_prompt_in_several_calls(one, sizes, lengths):
    """It attends densely, however it is cut, and what comes with its end follows the rule."""
    ids, real = prompts(lengths)
    extra = sum(sizes) - 80
    ids = torch.cat([ids, draw(len(ids), extra)], 1)
    real = torch.cat([real, torch.ones(len(ids), extra, dtype=torch.long)], 1)
    with one.patch():
        cache = leank.make_cache(one.model, max_cache_len=120)
        cache.expect_prompt(80)
        end, got = 0, []
        for size in sizes:
            end += size
            new = ids[:, end - size : end]
            got.append(forward(one, new, cache, real[:, :end] if len(ids) > 1 else None))
            assert cache.n_columns == int(cache.get_seq_length()) == end
        one.assert_rule(torch.cat(got, 1), ids, real, 80)
        assert cache.packed[0].store.prompt_lengths.tolist() == lengths
        ids, real = turn(one, cache, ids, real, draw(len(ids), 7, seed=1))
        steps(one, cache, ids, real, draw(len(ids), 2, seed=2))


def test_rows_crops_and_copies_of_an_unfinished_prompt(one):
    ids, real = prompts([80, 33, 12])
    with one.patch():
        cache = leank.make_cache(one.model, max_cache_len=120)
        cache.expect_prompt(80)
        forward(one, ids[:, :50], cache, real[:, :50])
        other = copy.deepcopy(cache)
        cache.crop(-10)
        cache.batch_select_indices(torch.tensor([2, 0]))
        cache.batch_repeat_interleave(2)
        rows = [2, 2, 0, 0]
        got = forward(one, ids[rows][:, 40:], cache, real[rows])
        one.assert_rule(got, ids[rows], real[rows], 80)
        got = forward(one, ids[:, 50:], other, real)
        one.assert_rule(got, ids, real, 80)
        other.crop(-80)
        forward(one, ids, other, real)
        cache.reset()
        forward(one, ids[:, :30], cache, real[:, :30])
        assert cache.n_columns == 30 and cache.packed[0].prompt is None


@pytest.mark.parametrize("chunk", [7, 64])
@pytest.mark.parametrize("lengths", [[90], [90, 23, 1]])
def test_chunked_prefill(one, lengths, chunk):
    with one.patch():
        run(one, lengths, prefill_chunk_size=chunk, disable_compile=True)


def test_pruned_prefill(one):
    """Its first chunk alone is the prompt."""
    ids, _ = prompts([90])
    with one.patch(prefill="pruned"):
        out = generate(one.model, ids.to(one.place), prefill_chunk_size=20, disable_compile=True)
        assert out.past_key_values.packed[0].store.prompt_lengths.tolist() == [20]
        sequences = out.sequences.cpu()[:, :-1]
        real = torch.ones_like(sequences)
        one.assert_rule(torch.stack(out.logits, 1), sequences, real, 20)


def test_second_turn_of_generate(one):
    with one.patch():
        first = run(one, [40, 12], disable_compile=True)
        n = first.past_key_values.n_columns
        ids = torch.cat([first.sequences.cpu(), draw(2, 9)], 1)
        real = torch.cat([prompts([40, 12])[1], torch.ones(2, ids.shape[1] - 40).long()], 1)
        cache = leank.make_cache(one.model, max_cache_len=100)
        forward(one, ids[:, :40], cache, real[:, :40])
        out = generate(
            one.model,
            ids.to(one.place),
            real.to(one.place),
            past_key_values=cache,
            disable_compile=True,
        )
        assert n == 51 and cache.n_columns == ids.shape[1] + 11
        real = torch.cat([real, torch.ones(2, 11).long()], 1)
        got, sequences = torch.stack(out.logits, 1), out.sequences.cpu()[:, :-1]
        one.assert_rule(got, sequences, real, 40)


@pytest.mark.parametrize("prefill, chunk", [("dense", 64), ("pruned", 40)])
def test_what_leank_eval_asks(place, prefill, chunk):
    """A mask that keeps everything says what the dense model says, after a second turn too."""
    models = Models(tiny(head_dim=D, dtype=torch.bfloat16, **LONG), place)
    whole = dataclasses.replace(models.mask, keep=np.ones_like(models.mask.keep))
    methods = [Method(DENSE), Method("whole", whole), Method("cut", models.mask)]
    ask = Generating(models.model, Numbers(), methods, prefill, chunk)
    for second_turn in (0, 30):
        settings = {"tasks": ("single", CONTINUATION), "lengths": (190,)}
        for item in make_suite(make_corpus(), **settings, second_turn=second_turn):
            dense, whole, cut = ask(dataclasses.replace(item, max_new_tokens=3))
            if item.task == CONTINUATION:
                assert whole.nll == pytest.approx(dense.nll, abs=0.02) and cut.kl > whole.kl
            else:
                assert len(cut.said.split()) == 3


# ------------------------------------------------------------------------------------------- drafts


@pytest.mark.parametrize("how", ["prompt lookup", "draft model"])
def test_drafts(one, how):
    """Drafts change no token, and what they leave is what a plain run leaves."""
    ids = prompts([30])[0].repeat(1, 3).to(one.place)
    with one.patch():
        plain = generate(one.model, ids, disable_compile=True)
        options = {"prompt_lookup_num_tokens": SLACK - 1, "max_matching_ngram_size": 1}
        if how == "draft model":
            drafter = copy.deepcopy(one.plain).to(one.place)
            drafter.generation_config.num_assistant_tokens = SLACK - 1
            drafter.generation_config.num_assistant_tokens_schedule = "constant"
            options = {"assistant_model": drafter}
        out = generate(one.model, ids, disable_compile=True, **options)
        assert out.sequences.shape == plain.sequences.shape
        sequences = out.sequences.cpu()[:, :-1]
        got = torch.stack(out.logits, 1)
        one.assert_rule(got, sequences, torch.ones_like(sequences), ids.shape[1])
        assert not out.past_key_values.packed[0].record_past


def test_drafts_that_slack_cannot_take_back(one):
    message = f"k: expected at most slack = {SLACK} columns between crops .* got {SLACK + 1}"
    with one.patch():
        cache, ids, real = filled(one, max_cache_len=140)
        cache.activate_past_recording()
        more = torch.cat([real, torch.ones(3, SLACK + 1, dtype=torch.long)], 1)
        with pytest.raises(NotImplementedError, match=message):
            forward(one, draw(3, SLACK + 1), cache, more)
        assert cache.n_columns == 80
        for seed in range(3):
            turn(one, cache, ids, real, draw(3, SLACK, seed=seed))
            cache.crop(-SLACK)
        ids, real = turn(one, cache, ids, real, draw(3, SLACK - 1))
        more = torch.cat([real, torch.ones(3, 2, dtype=torch.long)], 1)
        with pytest.raises(NotImplementedError, match=message):
            forward(one, draw(3, 2), cache, more)
        cache.crop(-1)
        ids, real = turn(one, cache, ids[:, :-1], real[:, :-1], draw(3, 2, seed=5))
        cache.stop_past_recording()
        turn(one, cache, ids, real, draw(3, SLACK + 1))


def test_gradients(one):
    """None goes through what is stored, or kept of an unfinished prompt."""
    ids = draw(1, 40).to(one.place)
    with one.patch():
        for n_prompt in (20, 40):
            cache = leank.make_cache(one.model, max_cache_len=60)
            cache.expect_prompt(n_prompt)
            one.model(ids[:, :20], past_key_values=cache)
            out = one.model(ids[:, 20:], past_key_values=cache)
            with pytest.raises(RuntimeError, match="there is no gradient through a pruned cache"):
                out.logits.sum().backward()
