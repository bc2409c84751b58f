"""What masks cost: against a patched model item by item, real generation, and plain statistics."""

import copy
import json
from dataclasses import replace
from statistics import NormalDist

import numpy as np
import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

import leank  # noqa: E402
from leank.learning import evaluate as module  # noqa: E402
from leank.learning.data import samples  # noqa: E402
from leank.learning.evaluate import evaluate  # noqa: E402
from leank.learning.sample import Sample, collate  # noqa: E402
from leank.learning.span import SpanModel, loss_of  # noqa: E402
from leank.learning.tasks import ALL_KINDS, CONTINUATION  # noqa: E402
from leank.learning.text import split  # noqa: E402

from .tiny_models import RECENT, SINK, VOCAB, pruned, tiny  # noqa: E402

WINDOW = {"sink": SINK, "recent": RECENT}


def draw(rng, n):
    return rng.integers(3, VOCAB, n)


def light():
    """A mask that drops a quarter of each head, so that it is often right."""
    keep = np.ones((3, 2, 16), bool)
    keep[:, :, :8] = False
    keep[::2] = True
    return leank.ChannelMask(keep, **WINDOW)


MASKS = {"all": np.ones((3, 2, 16), bool), "light": light().keep, "pruned": pruned().keep}


def generated(model, mask, context, question, n):
    """What generate() says after a question, with a cache that read the context."""
    with leank.patch(model, mask), torch.no_grad():
        cache = leank.make_cache(model)
        ids = torch.from_numpy(np.concatenate([context, question]))[None]
        model(ids[:, : len(context)], past_key_values=cache, logits_to_keep=1)
        out = model.generate(
            ids, past_key_values=cache, max_new_tokens=n, do_sample=False, pad_token_id=0
        )
    return out[0, ids.shape[1] :].numpy()


def sample(kind, context, question, answer, values):
    n = len(question)
    values = tuple((n + a, n + b) for a, b in values)
    span = np.concatenate([question, answer])
    return Sample(kind, context, span, (n, len(span)), ("",) * len(values), (), values)


@pytest.fixture(scope="module")
def made():
    """A model, items that one of the masks answers right, and what each mask makes it say."""
    whole, rng = tiny(), np.random.default_rng(5)
    masks = [leank.ChannelMask(keep, **WINDOW) for keep in MASKS.values()]
    items, said = [], []
    for i in range(18):
        context, question = draw(rng, int(rng.integers(8, 40))), draw(rng, int(rng.integers(2, 6)))
        n = int(rng.integers(1, 4))
        answers = [generated(whole, mask, context, question, n) for mask in masks]
        said.append(answers)
        items.append(sample("single", context, question, answers[i % 3], [(0, n)]))
    for _ in range(5):
        context, question, answer = draw(rng, int(rng.integers(8, 40))), draw(rng, 3), draw(rng, 6)
        items.append(sample("multi_value", context, question, answer, [(0, 2), (3, 6)]))
    for _ in range(2):
        context, question, answer = draw(rng, int(rng.integers(8, 40))), draw(rng, 3), draw(rng, 6)
        items.append(sample("copy", context, question, answer, [(0, 6)]))
    for _ in range(4):
        context, span = draw(rng, int(rng.integers(12, 40))), draw(rng, int(rng.integers(5, 9)))
        whole_span = 0, len(span)
        items.append(Sample(CONTINUATION, context, span, whole_span, ("",), (), (whole_span,)))
    # The values of these are the dense model's own best tokens, the first, or both.
    dense = SpanModel(whole, **WINDOW)
    places = [(4,), (6, 7, 8), (3, 4, 6, 7, 8), (), (3, 4, 5, 6, 7, 8), (3, 4, 6), (4, 5)]
    for item, right in zip(items[18:25], places, strict=True):
        for place in right:
            best = dense.logits(dense.dense(collate([item])).target)[0, place - 1].argmax()
            item.span[place] = int(best)
    return whole, items, said


def run(made, items=None, batch_size=4, masks=MASKS):
    model = SpanModel(made[0], **WINDOW, chunk=16)
    return evaluate(model, masks, made[1] if items is None else items, batch_size=batch_size)


def direct(whole, keep, item):
    """Score, KL and loss of one item from a patched model that is asked step by step."""
    ids = torch.from_numpy(np.concatenate([item.context, item.span]))[None]
    n, hidden, logits = len(item.context), [], []
    with torch.no_grad():
        for mask in (
            leank.ChannelMask.dense(3, 2, 16, **WINDOW),
            leank.ChannelMask(keep, **WINDOW),
        ):
            with leank.patch(whole, mask):
                cache = leank.make_cache(whole)
                whole.model(ids[:, :n], past_key_values=cache)
                steps = [
                    whole.model(ids[:, i : i + 1], past_key_values=cache).last_hidden_state[0]
                    for i in range(n, ids.shape[1])
                ]
            hidden.append(torch.cat(steps))
            logits.append(whole.lm_head(hidden[-1]).double().numpy())
    target, first = item.span, max(1, item.answer[0])
    p = [np.exp(x) / np.exp(x).sum(-1, keepdims=True) for x in logits]
    kl = [
        sum(p[0][t - 1] * np.log(p[0][t - 1] / p[1][t - 1])) for t in range(first, item.answer[1])
    ]
    right = []
    for x in logits:
        hit = [[x[t - 1].argmax() == target[t] for t in range(a, b)] for a, b in item.values]
        if item.kind == "copy":
            right.append([*hit[0], False].index(False) / len(hit[0]))
        else:
            right.append(np.nan if item.kind == CONTINUATION else np.mean([all(h) for h in hit]))
    counted = slice(max(0, item.answer[0] - 1), item.answer[1])
    loss = (hidden[0] - hidden[1])[counted].square().mean()
    return [*right, np.mean(kl), float(loss)]


def test_it_is_what_a_patched_model_gives_step_by_step(made):
    whole, items, _ = made
    results = run(made)
    for evaluation in results:
        expected = np.array([direct(whole, MASKS[evaluation.name], item) for item in items]).T
        found = evaluation.items
        np.testing.assert_array_equal(found.dense, expected[0])
        np.testing.assert_array_equal(found.mask, expected[1])
        np.testing.assert_allclose(found.kl, expected[2], atol=2e-5, rtol=1e-3)
        np.testing.assert_allclose(found.loss, expected[3], atol=1e-6, rtol=1e-3)
    scores = results[-1].items
    assert {0, 0.5, 1} <= set(scores.dense[18:23].tolist()), "values are counted apart"


def test_the_score_of_one_value_is_whether_generation_gives_it(made):
    whole, items, said = made
    for m, evaluation in enumerate(run(made)):
        for i, answers in enumerate(said):
            expected = items[i].span[items[i].answer[0] :]
            exact = np.array_equal(answers[m], expected)
            assert evaluation.items.mask[i] == exact, (evaluation.name, i)
        assert set(evaluation.items.mask[:18]) == {0, 1}, "both occur"


def test_the_mask_that_keeps_everything_costs_nothing(made):
    everything = run(made)[0]
    assert everything.kept_k == everything.kept_v == everything.kv_bytes == 1
    assert everything.loss_points == everything.upper_points == 0
    assert 0 <= abs(everything.kl) < 1e-6 and everything.loss < 1e-9
    worse = run(made)[2]
    assert worse.kl > 0.1 and worse.loss > 0.01 and worse.mask < worse.dense


@pytest.mark.parametrize("batch_size, grouped", [(1, 64), (27, 64), (3, 2)])
def test_batches_and_order_do_not_matter(made, monkeypatch, batch_size, grouped):
    items = made[1]
    order = np.random.default_rng(0).permutation(len(items))
    before = run(made)
    monkeypatch.setattr(module, "_SORTED", grouped)
    after = run(made, [items[i] for i in order], batch_size)
    for a, b in zip(before, after, strict=True):
        for field in ("kind", "dense", "mask"):
            np.testing.assert_array_equal(
                getattr(a.items, field)[order], getattr(b.items, field), field
            )
        for field in ("kl", "loss"):
            np.testing.assert_allclose(
                getattr(a.items, field)[order], getattr(b.items, field), atol=2e-5, rtol=1e-3
            )
        assert a.loss_points == pytest.approx(b.loss_points)


def test_few_logits_are_in_memory_at_once(made, monkeypatch):
    before = run(made)
    monkeypatch.setattr(module, "_ROWS", 3)
    seen = []
    logits = SpanModel.logits
    monkeypatch.setattr(SpanModel, "logits", lambda self, h: seen.append(len(h)) or logits(self, h))
    after = run(made)
    assert max(seen) == 3
    for a, b in zip(before, after, strict=True):
        np.testing.assert_allclose(a.items.kl, b.items.kl, atol=1e-5)
        np.testing.assert_array_equal(a.items.mask, b.items.mask)


def test_the_context_is_read_once_for_all_masks(made, monkeypatch):
    calls, done = [], []
    dense = SpanModel.dense
    monkeypatch.setattr(SpanModel, "dense", lambda self, b: calls.append(1) or dense(self, b))
    model = SpanModel(made[0], **WINDOW)
    evaluate(model, MASKS, made[1], batch_size=10, progress=lambda *x: done.append(x))
    assert len(calls) == 3 and done == [(10, 29), (20, 29), (29, 29)]


def test_items_of_one_length_are_read_without_padding(made, monkeypatch):
    """Where their spans are not equally long, contexts were padded, or batches small."""
    rng, dense, starts = np.random.default_rng(2), SpanModel.dense, []
    monkeypatch.setattr(
        SpanModel, "dense", lambda self, b: starts.append(b.start.tolist()) or dense(self, b)
    )
    items = [
        sample("single", draw(rng, 30 - n - 2), draw(rng, n), draw(rng, 2), [(0, 2)])
        for n in (3, 9, 5, 4)
    ]
    run(made, items, 4)
    assert starts == [[0, 0, 0, 0]]
    # An item as short as the span of another is not read with it.
    short = sample("single", draw(rng, 6), draw(rng, 2), draw(rng, 2), [(0, 2)])
    starts.clear()
    run(made, [items[1], short], 4)
    assert starts == [[0], [0]]


def test_the_loss_is_that_of_learning(made):
    item = made[1][20]
    [evaluation] = run(made, [item], masks={"pruned": MASKS["pruned"]})
    model, batch = SpanModel(made[0], **WINDOW), collate([item])
    dense, keep = model.dense(batch), torch.tensor(MASKS["pruned"])
    with torch.no_grad():
        loss = loss_of(model.mixed(batch, dense, keep.float(), ~keep.any(-1)), dense, batch)
    assert evaluation.loss == pytest.approx(float(loss), rel=1e-5)


def test_samples_of_every_kind_are_tested():
    tokenizers = pytest.importorskip("tokenizers")
    from transformers import PreTrainedTokenizerFast

    letters = ["<unk>", "\n", *map(chr, range(32, 127))]
    vocabulary = {c: i for i, c in enumerate(letters)}
    fast = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, "<unk>"))
    fast.pre_tokenizer = tokenizers.pre_tokenizers.Split("", "isolated")
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=fast, unk_token="<unk>")
    assert len(letters) == VOCAB
    corpus = split(["\n".join(f"The number {i} has the square {i * i}.\n" for i in range(9000))])
    items = samples(corpus, "test", tokenizer, lengths=900, n=40, seed=2)
    model = SpanModel(tiny(), **WINDOW)
    everything, less = evaluate(
        model, {name: MASKS[name] for name in ("all", "pruned")}, items, batch_size=10
    )
    assert [kind.kind for kind in less.kinds] == list(ALL_KINDS)
    assert sum(kind.n for kind in less.kinds) == 40
    assert everything.items.kind.tolist() == [item.kind for item in items]
    assert max(kind.loss for kind in everything.kinds) < 1e-6
    assert min(kind.loss for kind in less.kinds) > 0.01


def test_half_precision(made):
    half = SpanModel(copy.deepcopy(made[0]).bfloat16(), **WINDOW)
    first, _, last = evaluate(half, MASKS, made[1], batch_size=5)
    assert first.items.kl.dtype == np.float64
    assert first.kl < 0.05 < last.kl


# --------------------------------------------------------------------------------- statistics


def items_of(scores):
    """Items of {kind: (dense scores, mask scores)}."""
    kinds = np.array([kind for kind, (dense, _) in scores.items() for _ in dense])
    dense, mask = (np.concatenate([np.array(s[i], float) for s in scores.values()]) for i in (0, 1))
    other = np.arange(len(kinds), dtype=float)
    return module.Items(kinds, dense, mask, other, 2 * other)


def test_means_and_limits():
    rng = np.random.default_rng(1)
    a, b = ((rng.random((2, n)) < [[0.8], [0.6]]).astype(float) for n in (400, 900))
    scores = {
        "single": (a[0], a[1]),
        "lines": (b[0], b[1]),
        "copy": (np.full(10, 0.2), np.zeros(10)),  # not over 20%
        CONTINUATION: ([np.nan] * 3, [np.nan] * 3),
    }
    keep = MASKS["pruned"]
    result = module._evaluation("x", keep, items_of(scores))
    assert [kind.kind for kind in result.kinds] == ["single", "lines", "copy", CONTINUATION]
    assert result.counted == ("single", "lines")
    z, variance = NormalDist().inv_cdf(0.95), 0
    for kind, drawn in zip(result.kinds, (a, b), strict=False):
        difference = 100 * (drawn[0] - drawn[1])
        se = difference.std(ddof=1) / np.sqrt(len(difference))
        assert kind.n == len(difference)
        assert kind.loss_points == pytest.approx(difference.mean())
        assert kind.upper_points == pytest.approx(difference.mean() + z * se)
        variance += se**2 / 4
    mean = (result.kinds[0].loss_points + result.kinds[1].loss_points) / 2
    assert result.loss_points == pytest.approx(mean)
    assert result.upper_points == pytest.approx(mean + z * variance**0.5)
    assert result.dense - result.mask == pytest.approx(mean / 100)
    last = result.kinds[-1]
    assert (last.dense, last.mask, last.loss_points, last.upper_points) == (None,) * 4
    assert last.kl == 1311 and last.loss == 2622
    assert result.kept_k == keep.mean() and result.empty_heads == pytest.approx(2 / 6)
    assert result.kept_v == pytest.approx(4 / 6)
    assert result.kv_bytes == pytest.approx((keep.mean() + 4 / 6) / 2)


def test_the_limit_is_above_the_true_loss_in_95_of_100_tests():
    rng, above = np.random.default_rng(2), 0
    for _ in range(400):
        dense, mask = rng.random((2, 200)) < [[0.9], [0.8]]
        result = module._evaluation("x", MASKS["all"], items_of({"single": (dense, mask)}))
        above += result.upper_points > 10
    assert 0.92 < above / 400 < 0.98


def test_without_items_enough_there_is_no_limit():
    one = module._evaluation("x", MASKS["all"], items_of({"single": ([1], [1])}))
    assert (one.loss_points, one.upper_points) == (0, None)
    none = module._evaluation("x", MASKS["all"], items_of({"single": ([0, 0], [0, 1])}))
    assert none.counted == () and none.loss_points is none.upper_points is none.dense is None
    for result in (one, none):
        assert json.loads(json.dumps(result.as_json(), allow_nan=False)) == result.as_json()


def test_items_are_saved(made, tmp_path):
    result = run(made)[2]
    result.save_items(tmp_path / "items")
    with np.load(tmp_path / "items") as saved:
        for name in ("kind", "dense", "mask", "kl", "loss"):
            np.testing.assert_array_equal(saved[name], getattr(result.items, name))
        assert len(saved.files) == 5


@pytest.mark.parametrize(
    "change, message",
    [
        ({"masks": {}}, "masks: expected at least one, got none"),
        ({"masks": {"x": np.ones((3, 2, 8), bool)}}, r"masks: expected bool \(3, 2, 16\) .* 'x'"),
        ({"masks": {"x": np.ones((3, 2, 16))}}, "masks: expected bool .*, got float64"),
        ({"items": []}, "items: expected at least one, got none"),
        ({"batch_size": 0}, "batch_size: expected at least 1, got 0"),
        ({"values": ()}, "items: expected the places of its values, got none in item 0"),
        ({"answer": (0, 3)}, "items: expected a question before the answer, got none in item 0"),
        ({"context": np.zeros(0, np.int64)}, "items: expected a context, got none in item 0"),
        ({"answer": (3, 3)}, "items: expected an answer behind the span's first token in item 0"),
    ],
)
def test_refusals_name_the_argument(change, message):
    whole, rng = tiny(), np.random.default_rng(0)
    options = {"masks": MASKS, "items": None, "batch_size": 2} | change
    fields = {key: options.pop(key) for key in ("values", "answer", "context") if key in options}
    item = sample("single", draw(rng, 9), draw(rng, 2), draw(rng, 2), [(0, 2)])
    if options["items"] is None:
        options["items"] = [replace(item, **fields)]
    with pytest.raises(ValueError, match=message):
        evaluate(SpanModel(whole, **WINDOW), **options)
