"""`leank eval`: both ways to ask agree, baselines are what they say, a killed run goes on."""

import dataclasses
import json

import numpy as np
import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

import leank  # noqa: E402
from leank.evaluation import run as run_module  # noqa: E402
from leank.evaluation.ask import Forcing, Generating, bytes_share  # noqa: E402
from leank.evaluation.items import CONTINUATION, Suite, SuiteSettings  # noqa: E402
from leank.evaluation.methods import DENSE, EvalError, Method, make_methods, think  # noqa: E402
from leank.evaluation.run import Evaluation, Request  # noqa: E402
from leank.learning.folder import ResumeError  # noqa: E402
from leank.learning.tasks import ADJECTIVES, NOUNS  # noqa: E402

from .eval_tools import long_tiny, make_corpus, make_suite, text  # noqa: E402
from .learn_run_tools import character_tokenizer  # noqa: E402
from .test_learn_scores import rotated  # noqa: E402
from .tiny_models import all_keeping, oracle, pruned, tiny  # noqa: E402

SHORT = 900
METHODS = [
    Method(DENSE),
    Method("all", all_keeping()),
    Method("pruned", pruned()),
    Method("wider", dataclasses.replace(pruned(), sink=20, recent=100)),
    Method("think", pruned()),
]


@pytest.fixture(scope="module")
def corpus():
    return make_corpus()


class Numbers:
    """Stands for a tokenizer: what is said are the numbers of the tokens."""

    pad_token_id = 0

    def decode(self, ids, **options):
        return " ".join(map(str, ids.tolist()))


def asked(items, model, methods=METHODS, prefill="dense", chunk=64):
    ask = Generating(model, Numbers(), methods, prefill, chunk)
    return [ask(item) for item in items]


def with_answer(item, ids):
    """Return an item whose right answer is these tokens."""
    sample, first = item.sample, item.sample.answer[0]
    span = np.concatenate([sample.span[:first], ids])
    whole = first, len(span)
    sample = dataclasses.replace(sample, kind="x", span=span, answer=whole, values=(whole,))
    return dataclasses.replace(item, sample=sample)


@pytest.mark.parametrize("second_turn", [0, 150])
def test_generated_and_forced_agree(corpus, second_turn):
    """Forced is right where generate() begins with the answer, for each method's own answers."""
    model = long_tiny()
    suite = make_suite(
        corpus,
        tasks=("single", "copy"),
        lengths=(SHORT,),
        second_turn=second_turn,
    )
    items = [dataclasses.replace(item, max_new_tokens=5) for item in suite]
    force, seen = Forcing(model, METHODS), set()
    for item, answers in zip(items, asked(items, model), strict=True):
        assert (item.n_first < len(item.prompt)) == bool(second_turn)
        assert answers[0].said == answers[1].said, "the mask that keeps everything is dense"
        for m, answer in enumerate(answers):
            ids = np.array(answer.said.split(), np.int64)
            for forced, other in zip(force(with_answer(item, ids)), answers, strict=True):
                assert forced.score == (other.said == answer.said), METHODS[m].name
                seen.add(forced.score)
    assert seen == {0, 1}


@pytest.mark.parametrize("second_turn", [0, 150])
def test_text_is_measured_alike(corpus, second_turn):
    model = long_tiny()
    [item] = make_suite(corpus, tasks=(CONTINUATION,), lengths=(SHORT,), second_turn=second_turn)
    [generated], forced = asked([item], model), Forcing(model, METHODS)(item)
    for method, a, b in zip(METHODS, generated, forced, strict=True):
        assert a.score is b.score is a.said is None
        assert a.kl == pytest.approx(b.kl, abs=1e-4, rel=1e-3), method.name
        assert a.nll == pytest.approx(b.nll, abs=1e-4)
    assert abs(forced[1].kl) < 1e-5 < 0.01 < forced[2].kl
    assert generated[0].nll == pytest.approx(rule_nll(model, item, all_keeping(), 1), abs=1e-4)
    assert generated[2].nll == pytest.approx(
        rule_nll(model, item, pruned(), item.n_first), abs=1e-4
    )


def rule_nll(model, item, mask, n_prompt):
    """Return the mean over the answer by the rule, all in one forward without a cache."""
    ids = torch.from_numpy(np.concatenate([item.sample.context, item.sample.span]))
    first = len(ids) - (item.sample.answer[1] - max(1, item.sample.answer[0]))
    with oracle(model, mask, n_prompt), torch.no_grad():
        log_p = model(ids[None]).logits[0].log_softmax(-1)
    return -float(log_p[first - 1 : -1].gather(-1, ids[first:, None]).mean())


@pytest.mark.parametrize("second_turn", [0, 150])
def test_pruned_prefill(corpus, second_turn):
    """Of a prompt in one chunk nothing is pruned; in several, all but the first."""
    model = long_tiny()
    suite = make_suite(
        corpus, tasks=("single", CONTINUATION), lengths=(SHORT,), second_turn=second_turn
    )
    methods = METHODS[:3]
    dense = asked(suite, model, methods)
    whole, cut = (asked(suite, model, methods, "pruned", chunk) for chunk in (1000, 64))
    for a, b, c in zip(dense, whole, cut, strict=True):
        assert [x.said for x in b] == [x.said for x in a]
        assert c[0].said == c[1].said == a[0].said, "nothing to prune"
        for x, y in zip(a, b, strict=True):
            assert x.kl == y.kl is None or x.kl == pytest.approx(y.kl, abs=1e-5)
    assert abs(cut[1][2].nll - dense[1][2].nll) > 1e-3
    assert cut[1][2].nll == pytest.approx(rule_nll(model, suite[1], pruned(), 64), abs=1e-4)
    ids = torch.from_numpy(suite[0].prompt)[None]
    with oracle(model, pruned(), 64):
        best = model(ids).logits[0, -1].argmax()
    assert cut[0][2].said.split()[0] == str(int(best))


def test_think_is_its_definition():
    """The Frobenius norm of Q_c K_c^T over the last 32 queries of the heads that share keys."""
    model, ids = tiny(), np.random.default_rng(0).integers(3, 97, 60)
    mask = think(model, ids, pruned())
    n_kept = round(pruned().keep.mean() * 16 / 8) * 8
    assert (mask.keep.sum(-1) == n_kept).all() and (mask.sink, mask.recent) == (3, 5)
    with torch.no_grad():
        for i in range(3):
            q, k = (x.double() for x in rotated(model, torch.from_numpy(ids), i))
            for g in range(2):
                queries = q[4 * g : 4 * g + 4, -32:].reshape(-1, 16)
                norms = [
                    float(torch.linalg.matrix_norm(torch.outer(queries[:, c], k[g, :, c])))
                    for c in range(16)
                ]
                assert set(np.argsort(norms)[-n_kept:]) == set(np.flatnonzero(mask.keep[i, g]))


def test_baselines_keep_as_much_as_the_mask(corpus):
    model = long_tiny()
    samples = run_module.moments_text(corpus, character_tokenizer(), 0)
    names = ("random", "lowest", "moments", "think", "fp8")
    methods = make_methods(model, {"m": pruned()}, names, text=samples, seed=3)
    assert [m.name for m in methods] == [DENSE, "m", *names]
    for method in methods[2:5]:
        assert method.mask.ratio == pytest.approx(pruned().ratio, abs=8 / pruned().keep.size)
        assert (method.mask.sink, method.mask.recent) == (3, 5)
    assert methods[5].shares() is None and methods[1].shares()["kept_k"] == pruned().kept_ratio
    [item] = make_suite(corpus, tasks=("single",), lengths=(SHORT,))
    [[dense, _, fp8]] = asked([item], model, [*methods[:2], methods[-1]])
    assert fp8.share == pytest.approx(0.25, abs=0.01), "1 byte instead of 4"
    assert dense.share == 1 > bytes_share(pruned(), 900, torch.float32)


def test_what_is_not_installed_is_named(corpus, monkeypatch):
    monkeypatch.setattr("transformers.cache_utils.is_optimum_quanto_available", lambda: False)
    with pytest.raises(EvalError, match="baseline quanto: transformers' QuantizedCache: You need"):
        make_methods(long_tiny(), {"m": pruned()}, ("quanto",), text=None, seed=0)


# --------------------------------------------------------------------------------- whole runs


@pytest.fixture
def request_of(tmp_path):
    """Return what makes a request of seconds."""
    (tmp_path / "text.txt").write_text(text())
    pruned().save(tmp_path / "light.safetensors")

    def make(folder, **options):
        suite = {"tasks": ("single", CONTINUATION), "lengths": (700, SHORT), "n_items": 1}
        suite |= options.pop("suite", {})
        options = {
            "masks": (str(tmp_path / "light.safetensors"),),
            "folder": tmp_path / folder,
            "suite": SuiteSettings(**suite),
            "text": (tmp_path / "text.txt",),
            "fast": True,
        } | options
        return Request(**options)

    return make


def evaluate(request, progress=None):
    return Evaluation(request, character_tokenizer(), "tiny").run(long_tiny(), progress)


@pytest.mark.parametrize("fast", [True, False])
def test_a_killed_run_goes_on_and_ends_alike(request_of, fast):
    whole = request_of("whole", fast=fast)
    summary = evaluate(whole)

    def stop(n_done, n_all):
        assert n_all == 4
        if n_done == 2:
            raise KeyboardInterrupt

    cut = request_of("cut", fast=fast)
    with pytest.raises(KeyboardInterrupt):
        evaluate(cut, stop)
    assert not (cut.folder / "results.json").exists()
    log = cut.folder / "log.jsonl"
    log.write_bytes(log.read_bytes()[:-20])  # the second line is half there
    done = []
    again = evaluate(dataclasses.replace(cut, resume=True), lambda n, _: done.append(n))
    assert done == [2, 3, 4] and again == summary
    for name in ("log.jsonl", "results.json"):
        assert (cut.folder / name).read_bytes() == (whole.folder / name).read_bytes()
    evaluate(dataclasses.replace(cut, resume=True), lambda *_: pytest.fail("nothing is left"))
    results = json.loads((whole.folder / "results.json").read_text())
    assert results["methods"] == json.loads(json.dumps(summary))
    assert results["settings"]["suite"]["lengths"] == [700, SHORT]
    assert results["settings"]["masks"]["light"].endswith("window 3 + 5")


def test_another_run_is_not_gone_on_with(request_of):
    evaluate(request_of("a"))
    with pytest.raises(ResumeError, match="resume: expected a run with suite .*'seed': 1"):
        evaluate(request_of("a", suite={"seed": 1}, resume=True))
    (request_of("a").folder / "log.jsonl").write_text('{"a": 1}\n[]\n')
    with pytest.raises(ResumeError, match="expected the log of an evaluation, got another file"):
        evaluate(request_of("a", resume=True))


def test_a_stopped_run_is_not_written_over_and_one_that_ended_is(request_of):
    def stop(n_done, n_all):
        raise KeyboardInterrupt

    stopped = request_of("a")
    log, results = stopped.folder / "log.jsonl", stopped.folder / "results.json"
    with pytest.raises(KeyboardInterrupt):
        evaluate(stopped, stop)
    kept = log.read_bytes()
    with pytest.raises(ResumeError, match="output: .* stopped after 1 items; go on with --resume"):
        evaluate(request_of("a", suite={"seed": 1}))
    assert log.read_bytes() == kept
    evaluate(dataclasses.replace(stopped, resume=True))
    with pytest.raises(KeyboardInterrupt):
        evaluate(request_of("a", suite={"seed": 1}), stop)
    assert not results.exists() and b'"seed": 1' in log.read_bytes()


def test_a_window_can_be_given_for_masks_that_do_not_tell_theirs(request_of, tmp_path):
    keep = torch.from_numpy(pruned().keep.astype(np.float32))
    torch.save(keep, tmp_path / "other.pth")
    masks = (str(tmp_path / "other.pth"), str(tmp_path / "light.safetensors"))
    with pytest.raises(EvalError, match="mask: .*other.pth does not say its window; give --sink"):
        evaluate(request_of("x", masks=masks))
    with pytest.raises(EvalError, match="mask: .*recent"):
        evaluate(request_of("x", masks=masks, sink=3, recent=0))
    _, other, light = evaluate(request_of("x", masks=masks, sink=20, recent=100))
    assert (other["name"], light["name"]) == ("other", "light")
    assert other | {"name": "light"} == light
    [wide] = evaluate(request_of("y", sink=20, recent=100))[1:]
    assert wide == light
    assert wide["bytes_share"] > evaluate(request_of("z"))[1]["bytes_share"]


@pytest.mark.parametrize(
    "options, message",
    [
        ({"masks": ()}, "mask: expected at least one, got none"),
        ({"baselines": ("x",)}, "baseline: expected some of random, .*, got 'x'"),
        ({"baselines": ("think", "think")}, "baseline: expected each once, got think, think"),
        ({"baselines": ("fp8",)}, "baseline: expected no quantized cache with --fast, .* got fp8"),
        ({"prefill": "pruned"}, "prefill: expected dense with --fast"),
        ({"prefill": "x"}, "prefill: expected dense or pruned, got x"),
        ({"chunk": 0}, "chunk: expected at least 1, got 0"),
        ({"qa": "x"}, "qa: expected --qa and --qa-text together"),
    ],
)
def test_requests_are_checked(request_of, options, message):
    with pytest.raises(EvalError, match=message):
        request_of("x", **options)


def test_what_does_not_fit_is_found_before_the_work(request_of, tmp_path):
    leank.ChannelMask(np.ones((2, 2, 16), bool), sink=3, recent=5).save(tmp_path / "two")
    with pytest.raises(EvalError, match=r"mask: expected \(3, 2, 16\) .*got \(2, 2, 16\)"):
        evaluate(request_of("x", masks=(str(tmp_path / "two"),), fast=False))
    with pytest.raises(EvalError, match="mask: expected files of different names"):
        evaluate(request_of("x", masks=(str(tmp_path / "two"),) * 2))
    with pytest.raises(EvalError, match="mask: nowhere: no such file"):
        evaluate(request_of("x", masks=("nowhere",)))
    with pytest.raises(EvalError, match="mask: no.safetensors: No such file"):
        evaluate(request_of("x", masks=("no.safetensors",)))
    with pytest.raises(EvalError, match="lengths: expected at most 1,024 tokens, .* got 2,000"):
        evaluation = Evaluation(
            request_of("x", suite={"lengths": (2000,)}), character_tokenizer(), "tiny"
        )
        evaluation.check_model(tiny().config)
    assert not (tmp_path / "x").exists()


# ------------------------------------------------------------------------------------ SmolLM2


@pytest.mark.model
def test_generated_and_forced_agree_on_smollm2(tmp_path):
    from leank.learning.text import split
    from leank.loading import Source, quiet

    source = Source("smollm2")
    with quiet():
        model, tokenizer = source.model(torch.float32, torch.device("cpu")), source.tokenizer()
    words = [f"The {a} {b} has the number {i}." for i, (a, b) in enumerate(pairs()[:3000])]
    corpus = split(["\n\n".join(" ".join(words[i : i + 8]) for i in range(0, len(words), 8))])
    tasks = ("niah_single_1", "niah_multikey_1")
    suite = Suite(SuiteSettings(tasks=tasks, lengths=(600,), n_items=1), corpus, tokenizer)
    mask = leank.shipped.load("smollm2-135m-instruct-70")
    methods = [Method(DENSE), Method("narrow", dataclasses.replace(mask, sink=4, recent=32))]
    generate = Generating(model, tokenizer, methods, "dense", 64)
    force, scores = Forcing(model, methods), []
    for item in suite:
        item = dataclasses.replace(item, max_new_tokens=10)
        for said, forced in zip(generate(item), force(item), strict=True):
            assert said.said.startswith(f" {item.sample.expected[0]}") == bool(forced.score)
            assert said.score == forced.score
            scores.append(forced.score)
    assert set(scores[::2]) == {1}, "the dense model finds them"


def pairs():
    return [(a, b) for a in ADJECTIVES for b in NOUNS]
