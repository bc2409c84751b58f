"""``leank bench`` on a GPU, as small as it can be; no test asserts a time."""

import json

import numpy as np
import pytest

from leank import ChannelMask

from .conftest import random_keep
from .cuda_tools import needs_gpu, torch

pytest.importorskip("typer")
pytest.importorskip("leank.cuda", reason="leank was built without CUDA")

from typer.testing import CliRunner  # noqa: E402

from leank.bench import layers as bench_layers  # noqa: E402
from leank.bench.lines import Shape  # noqa: E402
from leank.bench.peers import PEERS  # noqa: E402
from leank.bench.truth import attend64, error_bound, relative_error  # noqa: E402
from leank.bench.work import Options  # noqa: E402
from leank.cli import app  # noqa: E402

from . import bench_tools  # noqa: E402

# Other libraries warn about what they do not take, and about things that they use themselves.
pytestmark = [*needs_gpu, pytest.mark.filterwarnings("ignore")]


def bench(*words, command="decode"):
    """Run the command."""
    env = {"COLUMNS": "100", "NO_COLOR": "1", "TERM": "dumb"}
    options = ["--device", "cuda", "--layers", "2", "--rounds", "2"]
    return CliRunner().invoke(app, ["bench", command, *options, *map(str, words)], env=env)


def found(path):
    return json.loads(path.read_text())["tables"]


def test_both_profiles_end_to_end(tmp_path):
    result = bench("--shapes", "2x2048", "--json", tmp_path / "out.json")
    assert result.exit_code == 0, result.output
    tables = found(tmp_path / "out.json")
    assert [table["name"] for table in tables] == ["llama-3.1-8b", "qwen-2.5-7b"]
    for table in tables:
        assert 0 < table["error"] <= table["bound"] and table["about"].startswith("2 layers")
        (line,) = table["lines"]
        refused = {refusal["who"]: refusal["reason"] for refusal in table["refusals"]}
        assert line["dense_us"].keys() | refused.keys() == set(PEERS)
        assert not line["dense_us"].keys() & refused.keys()
        assert "cudnn" in line["dense_us"] and "flash" in line["dense_us"], refused
        assert not any(reason.startswith("wrong result") for reason in refused.values())
        assert all(us["low"] > 0 for us in (line["us"], *line["dense_us"].values()))
        assert line["gain"] == line["dense_us"][line["best"]]["median"] / line["us"]["median"]
        assert line["peak_gb_s"] > 0 and line["bound_us"] > 0
    assert "flex" in tables[0]["lines"][0]["dense_us"], tables[0]["refusals"]
    assert result.stdout.count("2x2048") >= 2


def test_a_mask_file_in_float16(tmp_path):
    keep = random_keep(np.random.default_rng(0), 64, (8, 0))
    ChannelMask(keep[None]).save(tmp_path / "mask.safetensors")
    words = "--mask", tmp_path / "mask.safetensors", "--q-heads", 4, "--dtype", "float16"
    result = bench(*words, "--layers", 1, "--shapes", "1x1500", "--sink", 4, "--recent", 100)
    assert result.exit_code == 0, result.output
    assert "1x1500" in result.stdout and "bound 2.0e-03" in result.stdout


def test_single_layers_and_mixed_widths(tmp_path):
    words = "--profile", "qwen-2.5-7b", "--shapes", "1x2048", "--json", tmp_path / "out.json"
    result = bench(*words, "--per-layer", "--mixed")
    assert result.exit_code == 0, result.output
    (table,) = found(tmp_path / "out.json")
    kinds = [line["kind"] for line in table["lines"]]
    assert kinds == ["LayerLine", "LayerLine", "MixedLine"]
    assert [line["layer"] for line in table["lines"][:2]] == [0, 1]
    assert all(line["plain_tb_s"] > 0 for line in table["lines"][:2])
    assert table["lines"][2]["widths"] == [16, 48, 80, 112]


def test_storing_a_token(tmp_path):
    words = "--profile", "qwen-2.5-7b", "--shapes", "1x2048", "--json", tmp_path / "out.json"
    result = bench(*words, command="append")
    assert result.exit_code == 0, result.output
    ((line,),) = (table["lines"] for table in found(tmp_path / "out.json"))
    assert line["kind"] == "AppendLine" and line["attending_us"]["low"] > 0
    assert line["dense_us"]["index_copy_"]["low"] > 0


def test_learn(tmp_path):
    for package in ("transformers", "matplotlib"):
        pytest.importorskip(package)
    words = "--device", "cuda", "--shapes", "1x700,2x64", "--span", 64, "--rounds", 2
    (table,), _ = bench_tools.found("learn", tmp_path, *words)
    assert 0 < table["error"] <= table["bound"]
    for line in table["lines"]:
        assert line["us"]["low"] > 0 and line["dense_us"]["eager"]["low"] > 0
        assert all(n >= 0 for n in line["extra_bytes"].values())


@pytest.mark.parametrize("options", [(), ("--prompt",)], ids=["filled", "prompt"])
def test_generate(options, tmp_path):
    for package in ("transformers", "matplotlib"):
        pytest.importorskip(package)
    words = "--device", "cuda", "--shape", "small", "--cases", "2x1500x4", "--rounds", 1, *options
    (table,), _ = bench_tools.found("generate", tmp_path, *words)
    assert 0 <= table["error"] <= table["bound"] and table["refusals"] == []
    (line,) = table["lines"]
    assert line["dense_us"].keys() == {"dynamic", "static"}
    assert line["own_us"].keys() == {"pages", "eager"}
    assert line["cache_bytes"]["leank"] < line["peak_memory"]["leank"]
    assert len(line["first_s"]) == (5 if options else 0)


def test_a_shape_that_does_not_fit_is_reported():
    gib = torch.cuda.get_device_properties().total_memory >> 30
    n_rows = gib * 32  # of 128 MiB each, dense: a pruned layer does not fit either
    result = bench("--profile", "llama-3.1-8b", "--shapes", f"{n_rows}x32768,1x1024")
    assert result.exit_code == 0, result.output
    assert f"no leank at {n_rows}x32768" in result.stdout and "│ 1x1024" in result.stdout


def test_a_wrong_result_ends_it(monkeypatch):
    right = bench_layers.decode
    monkeypatch.setattr(bench_layers, "decode", lambda *args: right(*args) * 1.05)
    result = bench("--profile", "qwen-2.5-7b", "--shapes", "1x1024")
    assert result.exit_code == 1 and result.stdout == ""
    (line,) = result.stderr.splitlines()
    assert line.startswith(
        "leank bench decode: WRONG RESULT: qwen-2.5-7b, layer 0, row 0: expected"
    )


@pytest.mark.parametrize("length", [1, 2, 1025, 2500])
def test_what_is_timed_is_decode_of_all_tokens(length):
    """The caches of the timed layers hold L - 1 tokens; spans of 1024 tokens are alike."""
    keep = random_keep(np.random.default_rng(1), 64, (8, 64))
    options = Options(rounds=2)
    layers = bench_layers.Layers([keep], 4, Shape(2, length), options)
    (cache,) = layers.caches
    layers.store_and_attend()
    assert cache.lengths.tolist() == [length] * 2
    (us,) = bench_layers.Timer(2)(layers.attend)
    assert us.low > 0 and cache.lengths.tolist() == [length] * 2
    out = bench_layers.decode(cache, layers.q)
    k, v = cache.gather(0)
    # What is not stored any more is NaN, and not seen by the rule.
    k, v = (torch.nan_to_num(x) for x in (k, v))
    truth = attend64(layers.q[0, :, 0], k, v, keep, **options.window)
    assert relative_error(out[0, :, 0], truth) <= error_bound(torch.bfloat16)
