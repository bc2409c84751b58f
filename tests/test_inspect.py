"""What a mask keeps: hand-computed masks, known facts of published ones, and the two commands."""

import doctest
import json
import sys

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import leank
from leank import ChannelMask, info, inspection, mask_overlap
from leank.bench.profiles import load_profiles
from leank.inspection import Inspection, Rotary, predicted_bytes, relate
from leank.mask_overlap import compare

D = 16


def by_hand(**fields):
    """Pairs are (c, c + 8). Head 0: pairs 0 to 3 whole; 1: pair 7 whole, halves of 1 to 6; 2: 0."""
    keep = np.zeros((2, 3, D), bool)
    keep[0, 0, [0, 1, 2, 3, 8, 9, 10, 11]] = True
    keep[0, 1, [7, 15, 1, 2, 3, 12, 13, 14]] = True
    keep[1, 0] = True
    return ChannelMask(keep, **{"sink": 4, "recent": 60} | fields)


# ------------------------------------------------------------------------------------ by hand


def test_heads_pairs_and_bands():
    found = Inspection(by_hand())
    assert found.widths.tolist() == [[8, 8, 0], [16, 0, 0]]
    assert found.heads_of_width == {0: 3, 8: 2, 16: 1}
    assert found.whole_pairs.tolist() == [[4, 1, 0], [8, 0, 0]]
    assert found.half_pairs.tolist() == [[0, 6, 0], [0, 0, 0]]
    assert [band.tolist() for band in found.rotary.bands()] == [[0, 1], [2, 3], [4, 5], [6, 7]]
    assert found.bands[0].tolist() == [[1, 1, 0, 0], [0.25, 0.5, 0.5, 0.75], [0] * 4]
    assert found.pair_shares * 12 == pytest.approx([4, 5, 5, 5, 3, 3, 3, 4])
    assert found.low_half == (3 + 3 + 3 + 4) / 32


def test_the_outstanding_pair():
    keep = np.zeros((1, 8, D), bool)
    keep[0, :, [3, 11]] = True  # in all heads; the six others are spread
    for g, first in enumerate((0, 0, 0, 0, 1, 1, 1, 1)):
        others = [c for c in range(D) if c % 8 != 3][first::2]
        keep[0, g, others[:6]] = True
    shares = Inspection(ChannelMask(keep)).pair_shares
    number, share, usual = Inspection(ChannelMask(keep)).outstanding_pair
    assert (number, share) == (3, 1.0) and usual == np.median(shares[[1, 2, 4, 5]])
    assert Inspection(ChannelMask.dense(1, 1, D)).outstanding_pair is None


def test_channels_that_do_not_turn_are_in_no_pair():
    found = Inspection(by_hand(), Rotary.halves(8))
    assert found.rotary.pairs.tolist() == [[0, 4], [1, 5], [2, 6], [3, 7]]
    assert found.whole_pairs.tolist() == [[0, 1, 0], [4, 0, 0]]  # of 1, 2, 3, 7 the last two
    assert found.half_pairs.tolist() == [[4, 2, 0], [0, 0, 0]]
    nothing = Inspection(by_hand(), Rotary.halves(0))
    assert nothing.bands.shape == (2, 3, 0) and nothing.low_half is None
    assert nothing.outstanding_pair is None and not nothing.turned.any()


def test_layers_without_rotary_and_layers_outside_count_in_nothing():
    keep = np.concatenate([np.ones((1, 3, D), bool), by_hand().keep])
    mask = ChannelMask(keep, sink=4, recent=60, outside=(0,))
    found = Inspection(mask, Rotary.halves(D, without=[2]))
    assert found.layers == [1, 2] and found.turned.tolist() == [True, False]
    assert np.isnan(found.bands[1]).all() and not found.whole_pairs[1].any()
    assert found.pair_shares * 6 == pytest.approx([2, 3, 3, 3, 1, 1, 1, 2])
    lines = found.as_json()["heads"]
    assert [line["layer"] for line in lines] == [1] * 3 + [2] * 3 and lines[3]["bands"] is None
    assert found.bytes() == Inspection(by_hand()).bytes()


def test_bytes_by_hand():
    [line] = predicted_bytes(by_hand(), [1000], "float32")
    # Heads keep 8, 8, 0 and 16, 0, 0: whole window of 64 tokens, Dk + D of 936 others.
    assert line.dense == line.dense_read == 4 * 1000 * 2 * D * 6
    assert line.mask_read == 4 * (64 * 2 * D * 6 + 936 * (24 + 24 + 32))
    assert line.mask == by_hand().predict_memory([1000], "float32")["total_bytes"]
    assert line.speedup == line.dense_read / line.mask_read
    assert line.saved == 1 - line.mask / line.dense
    [short] = predicted_bytes(by_hand(), [10])
    assert short.speedup == 1 and short.saved < 0, "a page is longer than the row"


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: predicted_bytes(by_hand(), [0]), "lengths: expected at least 1, got 0"),
        (lambda: predicted_bytes(by_hand(sink=None)), "mask: expected a known window"),
        (lambda: Inspection(by_hand(), Rotary.halves(32)), "rotary: expected pairs of 16"),
        (lambda: Inspection(by_hand(), Rotary(np.array([[0, 1], [1, 2]]))), "each in one pair"),
        (lambda: Inspection(by_hand(), mass=np.ones((2, 4))), r"mass: expected \(2, a multiple of"),
        (lambda: Inspection(by_hand(), mass=np.ones((3, 3))), r"got \(3, 3\)"),
        (lambda: compare(by_hand(), ChannelMask.dense(1, 3, D)), "b: expected a mask of shape"),
    ],
)
def test_refusals(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_masks_with_other_layers_outside_are_not_compared():
    a, b = (ChannelMask.dense(2, 1, D, outside=outside) for outside in ((), (1,)))
    with pytest.raises(ValueError, match=r"b: expected \[\] as layers outside, got \[1\]"):
        compare(a, b)


def test_mass_beside_widths():
    mass = np.array([[0.1, 0.3, 0.5, 0.7, 0.0, 0.2], [0.9, 0.9, 0.0, 0.0, 0.1, 0.1]])
    found = Inspection(by_hand(), mass=mass)
    assert found.kv_mass == pytest.approx(np.array([[0.2, 0.6, 0.1], [0.9, 0.0, 0.1]]))
    relation = found.mass_relation
    assert relation.by_width[8] == (2, pytest.approx(0.2), pytest.approx(0.4), pytest.approx(0.6))
    assert relation.by_width[0][0] == 3 and relation.by_width[16][2] == pytest.approx(0.9)
    # Ranks of widths 8, 8, 0, 16, 0, 0 and of the masses, ties shared.
    ranks = np.corrcoef([3.5, 3.5, 1, 5, 1, 1], [3, 4, 1.5, 5, 0, 1.5])[0, 1]
    assert relation.correlation == pytest.approx(ranks)
    assert found.as_json()["heads"][1]["mass"] == [0.5, 0.7]
    assert relate(np.full((1, 2), 8), np.array([[0.1, 0.2]])).correlation is None


# ---------------------------------------------------------------------------------- two masks


def test_overlap_by_hand():
    a = by_hand()
    keep = np.array(a.keep)
    keep[0, 0] = np.roll(keep[0, 0], 2)  # pairs 2 to 5: four of the eight channels in common
    keep[0, 1] = False
    found = compare(a, ChannelMask(keep))
    first, second = found.layers
    assert (first.kept_a, first.kept_b, first.both, first.most) == (16, 8, 4, 8)
    assert first.chance == 8 * 8 / 16 and first.above_chance == 0
    assert first.share == 4 / 20
    assert (first.empty_a, first.empty_b, first.empty_both) == (1, 2, 1)
    assert second.above_chance is None and second.share == 1  # the widths leave no choice
    assert found.total.both == 20 and found.total.layer is None
    assert found.as_json()["layers"][0]["share"] == 0.2


@st.composite
def masks(draw):
    """Two masks of one shape."""
    n_layers, n_heads = draw(st.integers(1, 3)), draw(st.integers(1, 3))
    head_dim = draw(st.sampled_from([8, 16, 40]))
    rng = np.random.default_rng(draw(st.integers(0, 999)))
    made = []
    for _ in range(2):
        widths = 8 * rng.integers(0, head_dim // 8 + 1, (n_layers, n_heads, 1))
        ranks = np.tile(np.arange(head_dim), (n_layers, n_heads, 1))
        made.append(ChannelMask(rng.permuted(ranks, axis=-1) < widths, sink=1, recent=7))
    return made


@given(masks(), st.integers(0, 20))
def test_parts_add_up(pair, n_turned):
    a, b = pair
    found = Inspection(a, Rotary.halves(min(2 * n_turned, a.head_dim)))
    kept = found.keep[..., found.rotary.pairs.reshape(-1)].sum(-1)
    assert (2 * found.whole_pairs + found.half_pairs == kept).all()
    sizes = [len(band) for band in found.rotary.bands()]
    assert sum(sizes) == len(found.rotary.pairs)
    by_band = (found.bands * 2 * np.array(sizes)).sum(-1)
    assert not found.turned.any() or by_band == pytest.approx(kept)
    assert 2 * found.pair_shares.sum() * kept.size == pytest.approx(kept.sum())
    assert found.low_half is None or 0 <= found.low_half <= 1
    assert sum(found.heads_of_width.values()) == found.widths.size
    json.dumps(found.as_json(), allow_nan=False)

    overlap = compare(a, b)
    turned = compare(b, a).total
    total = overlap.total
    assert (total.kept_a, total.kept_b, total.both) == (turned.kept_b, turned.kept_a, turned.both)
    for name in ("kept_a", "both", "most", "empty_both"):
        assert sum(getattr(layer, name) for layer in overlap.layers) == getattr(total, name)
    assert total.both <= total.most and total.chance <= total.most
    itself = compare(a, a).total
    assert itself.both == itself.kept_a and itself.above_chance in (None, 1)


# -------------------------------------------------------------------- facts of published masks

FACTS = {
    "llama-3.1-8b": dict(
        file="llama3.1-8b-instruct.pth",
        dropped=0.6875,
        heads={0: 47, 32: 120, 64: 67, 96: 22},
        low_half=0.85,
        pair=(22, 0.36),
        ratios={2048: 1.28, 4096: 1.49, 8192: 1.62, 32768: 1.73, 131072: 1.76},
    ),
    "qwen-2.5-7b": dict(
        file="qwen2.5-7b-insturct.pth",
        dropped=0.7098,
        heads={0: 35, 32: 34, 64: 33, 96: 10},
        low_half=0.76,
        pair=(31, 0.45),
        ratios={4096: 1.62, 8192: 1.81, 32768: 1.98},
    ),
}


@pytest.mark.parametrize("name", FACTS)
def test_facts_that_widths_alone_tell(name):
    facts = FACTS[name]
    mask = ChannelMask(load_profiles()[name].keep(0), sink=128, recent=896)
    found = Inspection(mask)
    assert found.heads_of_width == facts["heads"]
    assert mask.ratio == pytest.approx(facts["dropped"], abs=5e-5)
    for line in found.bytes(list(facts["ratios"])):
        assert line.speedup == pytest.approx(facts["ratios"][line.tokens], abs=5e-3)


@pytest.mark.parametrize("name", FACTS)
def test_facts_of_the_channels(name, reference_mask):
    facts = FACTS[name]
    pytest.importorskip("torch")
    found = Inspection(ChannelMask.from_pth(reference_mask(facts["file"])))
    assert found.low_half == pytest.approx(facts["low_half"], abs=5e-3)
    number, share, usual = found.outstanding_pair
    assert number == facts["pair"][0] and share == pytest.approx(facts["pair"][1], abs=5e-3)
    assert share > 1.7 * usual


@pytest.mark.parametrize("module", [inspection, mask_overlap, info])
def test_doctests(module):
    pytest.importorskip("safetensors")
    result = doctest.testmod(module, extraglobs={"leank": leank})
    assert result.attempted and not result.failed


# ---------------------------------------------------------------------------------- pictures


@pytest.mark.parametrize(
    ("n_turned", "mass"), [(D, None), (8, np.ones((2, 6)) / 3), (0, np.zeros((2, 3)))]
)
def test_pictures(tmp_path, n_turned, mass):
    pictures = pytest.importorskip("leank.pictures")
    image = pytest.importorskip("matplotlib.image")
    (tmp_path / "frequencies.png").write_text("of an earlier run")
    paths = pictures.draw(tmp_path, Inspection(by_hand(), Rotary.halves(n_turned), mass), "title")
    names = ["mask.png", "frequencies.png", "heads.png"]
    assert [path.name for path in paths] == (names if n_turned else names[::2])
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(p.name for p in paths)
    for path in paths:
        pixels = image.imread(path)
        assert min(pixels.shape[:2]) > 300 and np.ptp(pixels[..., :3]) > 0.5
    assert "matplotlib.pyplot" not in sys.modules, "its global state is the caller's"


def test_a_mask_that_keeps_everything_is_drawn_dark(tmp_path):
    pictures = pytest.importorskip("leank.pictures")
    image = pytest.importorskip("matplotlib.image")
    pictures.draw_mask(tmp_path / "x.png", Inspection(ChannelMask.dense(2, 2, D)))
    pixels = image.imread(tmp_path / "x.png")[..., :3]
    dark = np.abs(pixels - [0x1B / 255, 0x4F / 255, 0x72 / 255]).max(-1) < 0.02
    assert dark.mean() > 0.5


# -------------------------------------------------------------------------------- the commands


def leank_cli(*words, columns=80):
    testing, cli = pytest.importorskip("typer.testing"), pytest.importorskip("leank.cli")
    env = {"COLUMNS": str(columns), "NO_COLOR": "1", "TERM": "dumb"}
    return testing.CliRunner().invoke(cli.app, list(map(str, words)), env=env)


@pytest.fixture
def file(tmp_path):
    pytest.importorskip("safetensors")
    by_hand(model="tiny").save(tmp_path / "mask.safetensors")
    return tmp_path / "mask.safetensors"


def test_inspect_prints(file):
    result = leank_cli("inspect", file)
    assert result.exit_code == 0, result.output
    lines = result.stdout.splitlines()
    assert max(map(len, lines)) <= 80
    words = " ".join(result.stdout.split())
    for said in (
        "2 layers x 3 KV heads x 16 channels",
        "3 keep 0, 2 keep 8, 1 keep 16 channels",
        "40.6% of the kept channels are in the lower half of the 8 rotary pairs",
        "27.1% kept whole, 12.5% half",
        "0 8 8 0 33% 42% 50% 17% 25% 5 6",
        "1 16 0 0 33% 33% 33% 33% 33% 8 0",
    ):
        assert said in words
    [line] = predicted_bytes(by_hand(), [4096])
    said = f"4,096 {line.dense:,} {line.mask:,} {line.saved:.1%} {line.speedup:.2f}x"
    assert said in words


def test_wide_models_fit_80_columns(tmp_path):
    pytest.importorskip("rich")
    from rich.console import Console

    from leank.inspection_report import print_comparison, print_inspection

    keep = load_profiles()["llama-3.1-8b"].keep(0)
    keep = np.concatenate([keep] * 4, 1)  # as many KV heads as Llama 2 has
    mask = ChannelMask(keep, sink=128, recent=896)
    console = Console(width=80, file=open(tmp_path / "out", "w", encoding="utf-8"))
    with console.file:
        found = Inspection(mask, mass=np.random.default_rng(0).random((32, 32)))
        print_inspection(found, "wide", console, dtype="bfloat16", n_queries=7)
        print_comparison(compare(mask, mask), ["wide", "wide"], console)
    text = (tmp_path / "out").read_text(encoding="utf-8")
    assert max(map(len, text.splitlines())) <= 80 and "…" not in text
    assert "mean over 7 queries" in " ".join(text.split())


def test_inspect_json(file):
    result = leank_cli("inspect", file, "--json", "--recent", 28, "--dtype", "float32")
    line = json.loads(result.stdout)
    mask = by_hand(recent=28, model="tiny")
    assert line == json.loads(
        json.dumps({"name": str(file), **Inspection(mask).as_json(dtype="float32"), "n_queries": 0})
    )
    assert line["recent"] == 28 and line["bytes"][0]["tokens"] == 4096


def test_without_a_window_there_are_no_bytes(tmp_path):
    pytest.importorskip("safetensors")
    by_hand(sink=None, recent=None).save(tmp_path / "x.safetensors")
    result = leank_cli("inspect", tmp_path / "x.safetensors")
    assert result.exit_code == 0 and "give --sink and --recent" in " ".join(result.stdout.split())
    assert "dense bytes" not in result.stdout
    assert (
        json.loads(leank_cli("inspect", tmp_path / "x.safetensors", "--json").stdout)["bytes"]
        is None
    )
    given = leank_cli("inspect", tmp_path / "x.safetensors", "--sink", 4, "--recent", 60)
    assert "dense bytes" in given.stdout


def test_inspect_two(file, tmp_path):
    ChannelMask.dense(2, 3, D).save(tmp_path / "dense.safetensors")
    result = leank_cli("inspect", file, tmp_path / "dense.safetensors")
    assert result.exit_code == 0, result.output
    assert max(map(len, result.stdout.splitlines())) <= 80
    assert "all 32 96 32 32 33.3% - 3 0 0" in " ".join(result.stdout.split())
    line = json.loads(leank_cli("inspect", file, file, "--json").stdout)
    assert line["total"]["both"] == 32 and line["a"] == line["b"] == str(file)


def test_inspect_draws(file, tmp_path):
    pytest.importorskip("matplotlib")
    result = leank_cli("inspect", file, "--pictures", tmp_path / "new" / "folder")
    assert result.exit_code == 0, result.output
    assert len(list((tmp_path / "new" / "folder").iterdir())) == 3


def test_without_matplotlib_pictures_are_refused(file, tmp_path, monkeypatch):
    for name in list(sys.modules):
        if name.startswith("matplotlib.") or name == "leank.pictures":
            monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    result = leank_cli("inspect", file, "--pictures", tmp_path / "p")
    assert (result.exit_code, result.stdout) == (2, "")
    assert "leank inspect: pictures: needs matplotlib: pip install 'leank[learn]'" in result.stderr


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["nothing-of-this-name"], "mask: nothing-of-this-name: no such file, and as a"),
        (["no.safetensors"], "mask: no.safetensors: No such file or directory"),
        (["{file}", "{file}", "--model", "x"], "model: expected none with two masks, got x"),
        (["{file}", "{file}", "--pictures", "x"], "pictures: expected none with two masks, got x"),
        (["{file}", "--text", "x"], "text: expected --model beside it, got none"),
        (["{file}", "--tokens", "9"], "tokens: expected --text beside it, got none"),
        (["{file}", "--pictures", "{file}"], "pictures: {file}: File exists"),
    ],
)
def test_mistakes_are_one_line(file, words, message):
    result = leank_cli("inspect", *(word.format(file=file) for word in words))
    assert result.exit_code == 2
    assert result.stderr.count("\n") == 1
    assert result.stderr.startswith(f"leank inspect: {message.format(file=file)}")


def test_info():
    pytest.importorskip("rich")
    result = leank_cli("info")
    assert result.exit_code == 0, result.output
    assert max(map(len, result.stdout.splitlines())) <= 80
    words = " ".join(result.stdout.split())
    assert f"leank {leank.__version__}" in words and f"numpy {np.__version__}" in words
    facts = json.loads(leank_cli("info", "--json").stdout)
    assert facts["isa"] == leank.capabilities()["isa"] and facts["isa"] in words
    assert list(facts["isa_built"]) == list(leank.capabilities()["isa_built"])
    assert 1 <= facts["threads"] and f"{facts['threads']} of {facts['cpus']} CPUs" in words
    assert facts["versions"]["numpy"] == np.__version__


def test_info_tells_what_was_built_for_a_gpu(monkeypatch):
    pytest.importorskip("rich")
    built = {"cuda_built": ["sm_80", "sm_90"], "cuda_devices": {0: (9, 0), 1: (12, 0)}}
    monkeypatch.setattr(leank, "_cuda_capabilities", lambda: built)
    monkeypatch.setattr(info, "find_spec", lambda name: None)  # as without torch
    words = " ".join(leank_cli("info", columns=200).stdout.split())
    assert "sm_80, sm_90" in words and "(9.0);" in words and "in a patched model" not in words
    assert "(12.0, nothing built for it)" in words


def test_info_of_a_wrong_isa(monkeypatch):
    pytest.importorskip("rich")

    def refuse():
        raise ValueError("LEANK_ISA: expected one of scalar, got x")

    monkeypatch.setattr(leank, "capabilities", refuse)
    result = leank_cli("info")
    assert result.exit_code == 2 and result.stderr.startswith("leank info: LEANK_ISA: expected")
