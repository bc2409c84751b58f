"""The report of a run: numbers, pictures, and what is printed."""

import dataclasses
import json
import sys

import numpy as np
import pytest

pytest.importorskip("torch")
pytest.importorskip("transformers")
pytest.importorskip("rich")

from rich.console import Console  # noqa: E402

from leank import ChannelMask  # noqa: E402
from leank.inspection import predicted_bytes  # noqa: E402
from leank.learning import evaluate  # noqa: E402
from leank.learning.report import print_report, read_log, write_report  # noqa: E402
from leank.learning.tasks import ALL_KINDS, CONTINUATION  # noqa: E402
from leank.learning.train import Step, trapezoid  # noqa: E402

N, HKV, D = 5, 3, 64
HEADER = {"kind": "header", "command": "leank learn tiny --ratio 0.7", "seed": 3, "text": "a|b"}


def factors():
    return np.random.default_rng(0).beta(0.4, 1, (N, HKV, D)).astype(np.float32)


def some_mask(**fields):
    fields = {"sink": 64, "recent": 512, "model": "tiny"} | fields
    return ChannelMask.from_scores(factors(), 0.7, 16, **fields)


def evaluation(name="learned", keep=None, kinds=ALL_KINDS):
    """An evaluation of made-up items; dense scores over 20% on all kinds but copies."""
    rng, n = np.random.default_rng(1), 50
    names = np.repeat(np.array(kinds), n)
    dense = (rng.random(len(names)) < np.where(names == "copy", 0.05, 0.9)).astype(float)
    mask = dense * (rng.random(len(names)) < 0.95)
    dense[names == CONTINUATION] = mask[names == CONTINUATION] = np.nan
    items = evaluate.Items(names, dense, mask, rng.random(len(names)), rng.random(len(names)))
    return evaluate._evaluation(name, some_mask().keep if keep is None else keep, items)


def steps():
    made = []
    for stage, n in ((1, 40), (2, 30)):
        for i in range(n):
            validation = 0.5 / (i + 1) if stage == 2 and i % 10 == 9 or i == n - 1 else None
            numbers = (0.1 + 1 / (i + 1), 1 - i / 60, i / 80, 0.03 * trapezoid(i, n))
            made.append(Step(stage, i, *numbers, validation, validation is not None and i < 25))
    return made


@pytest.fixture
def log(tmp_path):
    return write_log(tmp_path / "log.jsonl", [HEADER, *map(dataclasses.asdict, steps())])


def write_log(path, lines):
    path.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    return path


def rows(text, first):
    """Cells of the Markdown table rows that begin with a word."""
    found = [[c.strip() for c in x.strip("|").split(" | ")] for x in text.splitlines()]
    return [row for row in found if row[0].strip("|* ") == first]


def test_the_report_holds_the_numbers(tmp_path, log):
    mask, learned = some_mask(), evaluation()
    random = evaluation("random", np.roll(mask.keep, 1, 0))
    write_report(tmp_path / "new" / "run", [learned, random], mask, log, factors())
    report = json.loads((tmp_path / "new" / "run" / "report.json").read_text())
    assert report["evaluations"] == [learned.as_json(), random.as_json()]
    assert report["header"] == {key: HEADER[key] for key in ("command", "seed", "text")}
    assert report["n_steps"] == 70
    lengths = [dataclasses.asdict(line) for line in predicted_bytes(mask)]
    assert report["bytes"] == {"dtype": "bfloat16", "lengths": lengths}
    assert report["best"] == {"stage": 2, "step": 19, "validation": 0.5 / 20}
    assert report["mask"]["ratio"] == mask.ratio and report["mask"]["shape"] == [N, HKV, D]

    text = (tmp_path / "new" / "run" / "report.md").read_text()
    single = learned.kinds[0]
    [row] = rows(text, "single")
    assert row[1:6] == [
        "50",
        f"{single.dense:.1%}",
        f"{single.mask:.1%}",
        f"{single.loss_points:+.2f}",
        f"{single.upper_points:+.2f}",
    ]
    [row] = rows(text, "continuation")
    assert row[2:6] == ["-"] * 4 and row[6] == f"{learned.kinds[-1].kl:.4f}"
    [row] = rows(text, f"mean of {len(learned.counted)}")
    assert row[4].strip("*") == f"{learned.loss_points:+.2f}"
    assert [len(rows(text, name)) for name in ("learned", "random", "copy", "`seed`")] == [1] * 4
    for n in (4096, 32768, 131072):
        [row] = rows(text, f"{n:,}")
        held = mask.predict_memory([n], "bfloat16")["total_bytes"]
        assert row[1:3] == [f"{2 * 2 * n * N * HKV * D:,}", f"{held:,}"]
    for said in ("```\nleank learn tiny --ratio 0.7\n```", "stage 2, step 20", "a\\|b"):
        assert said in text
    assert "(30.00%" not in text and f"{mask.kept_ratio:.2%} of K is kept" in text


def test_pictures(tmp_path, log):
    image = pytest.importorskip("matplotlib.image")
    write_report(tmp_path, [evaluation()], some_mask(), log, factors())
    for name in ("alpha.png", "losses.png"):
        pixels = image.imread(tmp_path / name)
        assert min(pixels.shape[:2]) > 500 and np.ptp(pixels[..., :3]) > 0.9
        assert f"]({name})" in (tmp_path / "report.md").read_text()
    assert "matplotlib.pyplot" not in sys.modules, "its global state is the caller's"


@pytest.mark.parametrize("shape", [(30, 3, 64), (32, 8, 128), (1, 1, 16)])
def test_each_head_has_pixels_of_its_own(tmp_path, shape):
    picture, image = (
        pytest.importorskip(f"{name}") for name in ("leank.learning.picture", "matplotlib.image")
    )
    alpha, keep = np.zeros(shape), np.zeros(shape, bool)
    alpha[::2, ::2] = 1
    keep[:, ::2] = True
    picture.draw_alpha(tmp_path / "x.png", alpha, keep)
    pixels = image.imread(tmp_path / "x.png")
    assert pixels.shape[0] >= 5 * shape[0] * shape[1]
    assert (pixels[:, -2:, :3] == 1).all(), "a title runs out of the picture"
    column = pixels[:, pixels.shape[1] // 2, :3]  # in the panel of the mask
    dark = np.abs(column - [0x1B / 255, 0x4F / 255, 0x72 / 255]).max(-1) < 0.02
    n_runs = int((np.diff(dark.astype(int)) == 1).sum())
    n_kept = shape[0] * -(-shape[1] // 2)
    assert n_runs == n_kept if shape[1] % 2 == 0 else n_runs >= n_kept // 2


@pytest.mark.parametrize(
    "made",
    [
        steps()[:1],
        steps()[40:45],
        [dataclasses.replace(steps()[0], loss=float("nan"))],
        [dataclasses.replace(steps()[0], loss=0.0, validation=0.0, improved=True)],
    ],
)
def test_short_and_broken_runs_are_drawn(tmp_path, made):
    picture = pytest.importorskip("leank.learning.picture")
    picture.draw_losses(tmp_path / "x.png", [dataclasses.asdict(step) for step in made])
    assert (tmp_path / "x.png").stat().st_size > 1000


def test_a_first_loss_of_rounding_alone_does_not_fill_the_axis():
    picture = pytest.importorskip("leank.learning.picture")
    assert picture._bottom(np.array([1e-13, 0.2, 0.4])) == pytest.approx(1e-4)
    assert picture._bottom(np.array([0.1, 0.2, 0.4])) == pytest.approx(0.05)


def test_the_running_mean_begins_with_the_first_value():
    picture = pytest.importorskip("leank.learning.picture")
    means = picture._running_mean(np.array([3.0, np.nan, 5.0]))
    assert means[:2].tolist() == [3, 3]
    assert means[2] == pytest.approx((0.9 * 0.1 * 3 + 0.1 * 5) / (0.9 * 0.1 + 0.1))


def test_without_matplotlib_the_rest_is_written(tmp_path, log, monkeypatch):
    for name in list(sys.modules):
        if name.startswith("matplotlib.") or name == "leank.learning.picture":
            monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    (tmp_path / "alpha.png").write_text("of an earlier run")
    write_report(tmp_path, [evaluation()], some_mask(), log, factors())
    assert not (tmp_path / "alpha.png").exists()
    text = (tmp_path / "report.md").read_text()
    assert "None: matplotlib is not installed" in text and ".png" not in text


def test_a_log_that_was_resumed_or_cut(tmp_path):
    made = [dataclasses.asdict(step) for step in steps()]
    again = [made[2] | {"loss": 7.0}, made[3]]
    path = write_log(tmp_path / "log", [HEADER, *made[:4], HEADER | {"command": "b"}, *again])
    with open(path, "a") as file:
        file.write('{"stage": 1, "st')
    header, found = read_log(path)
    assert header["command"] == HEADER["command"]
    assert [step["step"] for step in found] == [0, 1, 2, 3]
    assert found[2]["loss"] == 7
    assert read_log(write_log(tmp_path / "none", [])) == ({}, [])


@pytest.mark.parametrize("line", ["{", "[]", "3", '{"stage": 1}'])
def test_a_damaged_log_is_named(tmp_path, line):
    path = tmp_path / "log"
    path.write_text(f"{json.dumps(HEADER)}\n{line}\n")
    with pytest.raises(ValueError, match="log: line 2: expected a header or a step, got"):
        read_log(path)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"evaluations": []}, "evaluations: expected at least one"),
        ({"evaluations": [evaluation("x", np.ones((N, HKV, D), bool))]}, "evaluations: .* got 'x'"),
        ({"mask": some_mask(sink=None)}, "mask: expected a known window"),
        ({"alpha": factors()[1:]}, r"alpha: expected \(5, 3, 64\) as the mask has, got \(4, 3"),
    ],
)
def test_refusals_write_nothing(tmp_path, log, change, message):
    options = {"evaluations": [evaluation()], "mask": some_mask(), "alpha": factors()} | change
    with pytest.raises(ValueError, match=message):
        write_report(tmp_path / "new", log_path=log, **options)
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize("width", [80, 200])
def test_what_is_printed_fits(width):
    console = Console(width=width, record=True, color_system=None, file=open("/dev/null", "w"))
    long = evaluation("lowest rotary frequencies, aligned")
    with console.file:
        print_report([evaluation(), long], console)
        text = console.export_text()
    assert max(map(len, text.splitlines())) <= width and "…" not in text
    words = " ".join(text.split())
    learned = evaluation()
    mean = f"mean of {len(learned.counted)} │ {50 * len(learned.counted)}"
    assert f"│ {mean} │ {learned.dense:.1%} │ {learned.mask:.1%} │" in words
    assert f"│ learned │ {learned.kept_k:.1%} │ {learned.kept_v:.1%} │" in words
    assert "one-sided 95%" in words
