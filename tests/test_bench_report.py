"""What ``leank bench`` prints and draws, of numbers that were made up."""

import dataclasses
import io
import itertools
import json

import pytest

pytest.importorskip("typer")
pytest.importorskip("matplotlib")

from rich.console import Console  # noqa: E402

from leank.bench import picture  # noqa: E402
from leank.bench.lines import (  # noqa: E402
    AppendLine,
    Case,
    GenerateLine,
    LayerLine,
    LearnLine,
    Line,
    Result,
    Shape,
    Table,
    Timing,
    as_json,
)
from leank.bench.report import print_report  # noqa: E402


def timing(us):
    return Timing(us, us * 0.95, us * 1.1)


def decode(shape, us=1000.0):
    peers = ("cudnn", "flash", "flex", "flashinfer fa2", "flashinfer fa3")
    return Line(
        shape=shape,
        us=timing(us),
        needed_bytes=4.84e9,
        dense_us={name: timing(us * (2 + i)) for i, name in enumerate(peers)},
        dense_bytes=8.59e9,
        peak_gb_s=6050.0,
    )


def append(shape, us=5.0):
    return AppendLine(
        shape=shape,
        us=timing(us),
        attending_us=timing(11_234.0),
        needed_bytes=4096,
        dense_us={"index_copy_": timing(15.0)},
        dense_bytes=4096,
        peak_gb_s=40.96,
    )


def learn(shape):
    return LearnLine(
        shape=shape,
        us=timing(2000.0),
        needed_bytes=5e8,
        dense_us={"eager": timing(25_000.0)},
        dense_bytes=5e8,
        peak_gb_s=2500.0,
        n_flop=5e11,
        product_tflop_s=500.0,
        extra_bytes={"leank": 16 << 20, "eager": 8447 << 20},
    )


def generate(case, **fields):
    gib = 1 << 30
    parts = {
        "shape": case,
        "us": timing(20_000.0),
        "needed_bytes": 40e9,
        "dense_us": {"dynamic": timing(90_000.0), "static": timing(32_000.0)},
        "dense_bytes": 80e9,
        "peak_gb_s": 4000.0,
        "own_us": {"pages": timing(30_000.0), "eager": timing(50_000.0)},
        "own_bytes": {"pages": 80e9, "eager": 40e9},
        "weight_bytes": 15 * gib,
        "dense_cache_bytes": 64 * gib,
        "cache_bytes": {"dynamic": 64 * gib, "static": 64 * gib, "leank": 36 * gib},
        "peak_memory": {"static": 99 * gib, "leank": 52 * gib},
        "first_s": {"static": 1.5, "leank": 1.25},
    }
    return GenerateLine(**parts | fields)


def result_of(*lines):
    table = Table("a mask", "32 layers", 1e-2, "of the largest", 1e-3, list(lines))
    return Result({"GPU": "a GPU", "dtype": "bfloat16"}, "How it was done.", [table])


def printed(result, width=80):
    console = Console(file=io.StringIO(), width=width, color_system=None)
    print_report(result, console)
    text = console.file.getvalue()
    assert max(map(len, text.splitlines())) <= width and "…" not in text
    return text


def rows(text, first):
    lines = [line.strip("│ ").split("│") for line in text.splitlines() if line.startswith("│")]
    return [[x.strip() for x in line[1:]] for line in lines if line[0].strip() == first]


BIG = Shape(64, 131072)


def test_append():
    own, peer = rows(printed(result_of(append(BIG))), str(BIG))
    assert own == ["5.0", "-5% +10%", "11,234.0", "0.0%", "4.1", "0.82", "0.10"]
    assert peer == ["3.00x", "index_copy_", "15.0", "-5% +10%"]


@pytest.mark.parametrize("us", [-2.0, 0.0])
def test_a_difference_that_is_not_above_zero_has_no_rate(us):
    result = result_of(append(BIG, us))
    own, peer = rows(printed(result), str(BIG))
    assert own[0] == f"{us:.1f}" and own[5] == "-" and peer[:2] == ["-", "index_copy_"]
    (line,) = as_json(result)["tables"][0]["lines"]
    assert line["gb_s"] is line["share"] is line["gain"] is None


def test_learn():
    own, peer, memory = rows(printed(result_of(learn(BIG))), str(BIG))
    assert own == ["2,000.0", "-5% +10%", "500.00", "250", "50%", "200.0"]
    assert peer == ["12.50x", "eager", "25,000.0", "-5% +10%"]
    assert memory == ["16.0", "8,447.0"]


def test_generate():
    text = printed(result_of(generate(Case(16, 32768, 128))))
    assert rows(text, "leank") == [["20.00", "-5% +10%", "800.0", "1.250", "52.00", "36.00"]]
    assert len(rows(text, "16x32768x128")) == 0  # a table has one case, in its heading
    assert rows(text, "dynamic") == [["90.00", "-5% +10%", "177.8", "-", "-", "64.00"]]
    words = " ".join(text.split())
    for said in (
        "against static 1.60x as fast",
        "against pages 1.50x as fast",
        "bytes 40.000 GB a step, 2.00x fewer than dense, bound 10.00 ms",
        "rate 2,000.0 GB/s, 50% of peak",
        "KV 0.562 of a dense cache",
        "peak memory 52.00 of at most 53.02 GiB",
    ):
        assert said in words, said


def test_times_that_vary_much_are_pointed_out():
    line = decode(BIG)
    assert "something else running" not in printed(result_of(line))
    for us in (Timing(9.0, 8.0, 14.0), Timing(9.0, 5.0, 9.0)):
        assert "something else running" in printed(result_of(dataclasses.replace(line, us=us)))
    peers = {"cudnn": Timing(9.0, 5.0, 9.0)}
    assert "something else" in printed(result_of(dataclasses.replace(line, dense_us=peers)))


def test_what_was_not_compared_says_so():
    result = result_of(decode(BIG))
    result.tables[0].error = None
    assert "not checked: there was nothing to compare with" in printed(result)


def test_json_of_each_kind_of_line():
    lines = decode(BIG), append(BIG), learn(BIG), generate(Case(1, 2, 3))
    (table,) = json.loads(json.dumps(as_json(result_of(*lines))))["tables"]
    told = {line["kind"]: line for line in table["lines"]}
    assert told["AppendLine"]["added"] == pytest.approx(5 / 11_234)
    assert told["AppendLine"]["attending_us"]["median"] == 11_234.0
    assert told["LearnLine"]["of_product"] == 0.5 and told["LearnLine"]["bound_us"] == 200.0
    assert told["GenerateLine"]["shape"] == {"B": 1, "L": 2, "new": 3}
    assert told["GenerateLine"]["pages_gain"] == 1.5


@pytest.mark.parametrize(
    "lines, x_label",
    [
        ([decode(BIG), decode(Shape(1, 4096), 9.0)], "GB that a step must move"),
        ([append(BIG), append(Shape(1, 4), 6.0)], "KB that a step must move"),
        ([learn(BIG)], "GFLOP of a step"),
        ([generate(Case(1, 2, 3))], "GB that a step must move"),
    ],
)
def test_pictures(lines, x_label, tmp_path, monkeypatch):
    """Each contender at each shape has its mark, at its amount and rate."""
    figures = []
    monkeypatch.setattr(picture, "save", lambda figure, *rest: figures.append(figure))
    assert picture.draw(tmp_path / "x.png", result_of(*lines))
    (axes,) = figures[0].axes
    assert axes.get_xlabel() == f"{x_label} (faint lines: the same time)"
    scale = 1e12 if x_label.startswith("GFLOP") else 1e9
    marks = [line for line in axes.lines if line.get_marker() not in (None, "None", "")]
    drawn = [(x, y) for line in marks for x, y in zip(*line.get_data(), strict=True)]
    rates = [n / us.median * 1e6 / scale for line in lines for n, us in line.amounts().values()]
    assert sorted(y for _, y in drawn) == pytest.approx(sorted(rates))
    left, right = axes.get_xlim()
    assert all(left < x < right for x, _ in drawn)
    names = {text.get_text() for legend in figures[0].legends for text in legend.get_texts()}
    assert names >= {name for line in lines for name in line.amounts()}


def test_names_of_marks_do_not_overlap(tmp_path, monkeypatch):
    figures = []
    monkeypatch.setattr(picture, "save", lambda figure, *rest: figures.append(figure))
    shapes = [Shape(1, 4096 * n) for n in range(1, 5)]
    lines = [append(shape, us) for shape, us in zip(shapes, (6.0, 6.1, 6.0, 5.9), strict=True)]
    assert picture.draw(tmp_path / "x.png", result_of(*lines))
    figures[0].draw_without_rendering()
    names = [x for x in figures[0].axes[0].texts if x.get_text() in map(str, shapes)]
    assert len(names) == 8
    boxes = [name.get_window_extent() for name in names]
    assert not any(a.overlaps(b) for a, b in itertools.combinations(boxes, 2))


def test_a_picture_of_nothing_is_not_drawn(tmp_path):
    layers = result_of(LayerLine(BIG, 0, 10.0, 1000, 2.0), append(BIG, -2.0))
    assert not picture.draw(tmp_path / "x.png", layers)
    assert not (tmp_path / "x.png").exists()


def test_pictures_are_written(tmp_path):
    assert picture.draw(tmp_path / "x.png", result_of(decode(BIG)))
    assert (tmp_path / "x.png").read_bytes().startswith(b"\x89PNG")
