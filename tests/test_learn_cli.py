"""``leank learn`` end to end on a tiny random model, and what it says when it cannot run."""

import dataclasses
import inspect
import os
import re
import subprocess
import sys

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")
typer = pytest.importorskip("typer")

from typer.testing import CliRunner  # noqa: E402

from leank import ChannelMask, cli_learn  # noqa: E402
from leank.cli import app  # noqa: E402
from leank.learning import DataSettings, Settings, learn  # noqa: E402
from leank.learning import run as run_module  # noqa: E402
from leank.learning.feed import Batches  # noqa: E402
from leank.learning.folder import read_state  # noqa: E402
from leank.learning.tasks import ALL_KINDS  # noqa: E402

from .learn_run_tools import OPTIONS, character_tokenizer, write_model, write_text  # noqa: E402
from .processes import interrupt, run_two  # noqa: E402
from .tiny_models import tiny  # noqa: E402


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Make a model with a tokenizer, and a text."""
    folder = tmp_path_factory.mktemp("learn")
    write_model(folder / "model")
    write_text(folder / "text.txt")
    return folder


def words(folder, **options):
    """Make a command line of options that work, but for those given; None leaves one out."""
    flags = {"n_validation": "validation", "n_test": "test", "start": "start-from"}
    options = {flags.get(name, name): value for name, value in options.items()}
    mine = {flags.get(name, name): value for name, value in OPTIONS.items()}
    mine |= {"text": folder / "text.txt", "ratio": 0.5, "align": 8, "output": folder / "mask"}
    mine["lengths"], mine["kinds"] = "260,300", "single,continuation"
    result = ["learn", str(options.pop("model", folder / "model"))]
    for name, value in (mine | options).items():
        flag = f"--{name.replace('_', '-')}"
        result += [] if value is None else [flag] if value is True else [flag, str(value)]
    return result


def leank_learn(folder, columns=80, **options):
    env = {"COLUMNS": str(columns), "NO_COLOR": "1", "TERM": "dumb"}
    return CliRunner().invoke(app, words(folder, **options), env=env)


def test_the_same_mask_as_the_function(folder, tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["/bin/leank", "learn", "my model", "-o", "mask"])
    result = leank_learn(folder, output=tmp_path / "mask")
    assert result.exit_code == 0, result.output
    mask = ChannelMask.load(tmp_path / "mask")
    options = OPTIONS | {"text": (folder / "text.txt",)}
    alone = learn(tiny(), character_tokenizer(), 0.5, 8, **options)
    assert mask == dataclasses.replace(alone, model="model")
    line = " ".join(result.stdout.split())
    assert line.startswith(f"{tmp_path / 'mask'}: 50.0% of K dropped, ")
    assert re.search(r"% of K and V kept .*; validation loss [\d.]+ at stage \d, step \d", line)
    report = tmp_path / "mask.run" / "report.md"
    assert report.exists() and line.endswith(f"Report: {report}")
    assert "```\nleank learn 'my model' -o mask\n```" in report.read_text()
    assert "r0.5-a8, dense against mask" in line and "KV bytes" in line
    for part in ("stage 2 r0.5-a8", "12/12", "loss", "valid", "alpha", "test ", "3/3"):
        assert part in result.stderr


def test_several_masks(folder, tmp_path):
    result = leank_learn(
        folder,
        ratio="0.5,0.75",
        align="8,16",
        output=tmp_path / "m-{ratio}-a{align}.st",
        stage1_steps=1,
        stage2_steps=1,
        n_test=0,
    )
    assert result.exit_code == 0, result.output
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "m-0.5-a16.st",
        "m-0.5-a8.st",
        "m-0.75-a16.st",
        "m-0.75-a8.st",
        "m-all-aall.st.run",
    ]
    assert len(result.stdout.splitlines()) == 4


def test_show_data_needs_no_weights(folder, monkeypatch):
    monkeypatch.setattr(cli_learn, "_learn", None)
    monkeypatch.setattr("leank.loading.Source.model", None)
    result = leank_learn(folder, show_data=2, output=None)
    assert result.exit_code == 0, result.output
    assert (
        len(re.findall(r"^(single|continuation): [\d,]+ \+ \d+ tokens", result.stdout, re.M)) == 2
    )


@pytest.mark.parametrize("columns", [60, 120])
def test_fits_a_narrow_terminal_without_colours(folder, tmp_path, columns):
    output = tmp_path / "mask"
    result = leank_learn(folder, columns, output=output, stage1_steps=1, stage2_steps=1)
    assert result.exit_code == 0 and "\x1b" not in result.output
    assert max(map(len, result.stderr.splitlines())) <= columns


def test_defaults_are_those_of_the_settings():
    """--help must not import torch, so they are written twice."""
    mine = {name: p.default for name, p in inspect.signature(cli_learn.learn).parameters.items()}
    for kind in (Settings, DataSettings):
        for field in dataclasses.fields(kind):
            value = mine[field.name]
            if field.name in ("ratio", "align"):
                value = float(value)
            assert value == field.default or value is None, field.name


def test_torchrun_takes_no_option_for_its_own():
    """It refused --start as short for two of its options, though that came after the program."""
    from torch.distributed.run import get_args_parser

    options = typer.main.get_command(app).commands["learn"].params
    names = [name for option in options for name in option.opts if name.startswith("-")]
    assert {"--start-from", "-o", "--resume"} <= set(names)
    words = ["leank", "learn", "model", *names]
    parsed = get_args_parser().parse_args(["--nproc-per-node", "2", "-m", *words])
    assert [parsed.training_script, *parsed.training_script_args] == words


def test_help_does_not_need_torch():
    code = "import sys; sys.modules['torch'] = None; from leank.__main__ import main; main()"
    run = subprocess.run(
        [sys.executable, "-c", code, "learn", "--help"],
        env=os.environ | {"COLUMNS": "80"},
        capture_output=True,
        text=True,
        check=True,
    )
    for part in ("What to learn", "From what", "--stage2-steps", "--resume", "smollm2"):
        assert part in run.stdout
    text = " ".join(run.stdout.replace("│", "").split())
    assert f"Of {', '.join(ALL_KINDS[:-1])} and {ALL_KINDS[-1]}; default: all." in text
    assert "learn [OPTIONS] [NAME_OR_PATH]" in text
    # No line of the text is broken: rich breaks those that are too long, then writes on below.
    assert " Text and tasks are made offline. Stage 1 learns a factor per channel, stage" in (
        line.rstrip() for line in run.stdout.splitlines()
    )
    run = subprocess.run([sys.executable, "-c", code, "learn"], capture_output=True, text=True)
    assert run.returncode == 2
    assert run.stderr == "leank learn: needs torch: pip install 'leank[learn]'\n"


# ------------------------------------------------------------------------------ stopping


def test_ctrl_c_keeps_what_is_done_and_resume_goes_on(folder, tmp_path, monkeypatch):
    monkeypatch.setattr(run_module, "_SAVE_STEPS", 4)
    log = run_module.Run._log

    def interrupted(self, step, target):
        log(self, step, target)
        if self.n_done == 9:
            raise KeyboardInterrupt

    monkeypatch.setattr(run_module.Run, "_log", interrupted)
    output = tmp_path / "mask"
    result = leank_learn(folder, output=output)
    assert result.exit_code == 130 and not output.exists()
    said = f"stopped after 9 of 12 steps; 8 are kept in {output}.run, --resume goes on\n"
    assert result.stderr.endswith(f"\nleank learn: {said}")
    monkeypatch.setattr(run_module.Run, "_log", log)
    again = leank_learn(folder, output=output)
    assert again.exit_code == 2
    assert "has a run that stopped after 8 steps; go on with resume" in again.stderr
    assert leank_learn(folder, output=output, resume=True, n_test=0).exit_code == 0
    assert leank_learn(folder, output=tmp_path / "whole").exit_code == 0
    assert ChannelMask.load(output) == ChannelMask.load(tmp_path / "whole")
    other = leank_learn(folder, output=output, resume=True, lr=0.2)
    assert other.exit_code == 2
    assert "resume: expected a run with lr 0.2, got one with 0.1" in other.stderr


@pytest.mark.parametrize("n_workers", [0, 2])
def test_a_signal_while_it_learns(folder, tmp_path, n_workers):
    """A real Ctrl-C, which all processes get: one line, the state is there, nobody stays."""
    output = tmp_path / "mask"
    state = tmp_path / "mask.run" / "state.pt"
    before = f"from leank.learning import run; run.workers_for = lambda device: {n_workers}"
    command = words(folder, output=output, stage1_steps=10_000, n_test=0)
    status, stdout, stderr = interrupt(command, state.exists, before)
    assert status == 130 and stdout == "" and "Traceback" not in stderr
    n = read_state(state)["n_done"]
    said = rf"leank learn: stopped after \d+ of 10006 steps; {n} are kept in {output}.run, --resume"
    assert n > 0 and re.search(said, stderr.splitlines()[-1])


def test_a_signal_before_it_learns(folder, tmp_path):
    command = words(folder, output=tmp_path / "mask")
    before = """if True:
        from leank.loading import Source
        def model(*args):
            open(PATH, "x").close()
            import time
            time.sleep(60)
        Source.model = model
        """.replace("PATH", repr(str(tmp_path / "begun")))
    status, stdout, stderr = interrupt(command, (tmp_path / "begun").exists, before)
    assert (status, stdout) == (130, "")
    assert stderr == "leank learn: stopped before the first step\n"
    assert not list(tmp_path.glob("mask*"))


def test_divergence_is_one_line(folder, tmp_path, monkeypatch):
    make = Batches.__call__

    def poisoned(self, i):
        batch = make(self, i)
        return batch._replace(weights=batch.weights * float("nan")) if i == 8 else batch

    monkeypatch.setattr(Batches, "__call__", poisoned)
    output = tmp_path / "mask"
    result = leank_learn(folder, output=output)
    assert result.exit_code == 1 and result.stdout == ""
    last = result.stderr.splitlines()[-1]
    assert last.startswith("leank learn: diverged: stage 2, step 3: the loss is nan; the last good")
    assert ChannelMask.load(output).ratio == 0.5


# ------------------------------------------------------------------------------ mistakes


def long_vocabulary(folder):
    character_tokenizer(extra=3).save_pretrained(folder / "other")
    tiny().save_pretrained(folder / "other")
    return {"model": folder / "other"}


def other_attention(folder):
    character_tokenizer().save_pretrained(folder / "gpt2")
    (folder / "gpt2" / "config.json").write_text('{"model_type": "gpt2", "vocab_size": 97}')
    return {"model": folder / "gpt2"}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda f: {"output": None}, "output: expected a file for the mask, got none; give -o"),
        (lambda f: {"output": "/proc/none/mask"}, "output: cannot write to /proc/none"),
        (lambda f: {"output": f}, "output: expected a file, got the folder"),
        (
            lambda f: {"run_folder": f / "text.txt"},
            "folder: expected a folder, got the file /.*txt",
        ),
        (lambda f: {"ratio": "0.5,0.7"}, "output: expected the fields {ratio} and {align}"),
        (lambda f: {"ratio": "half"}, "ratio: expected numbers with commas between, got 'half'"),
        (lambda f: {"align": "8.5"}, "align: expected whole numbers with commas between"),
        (lambda f: {"align": "24"}, "align"),
        (lambda f: {"ratio": "1.5"}, "ratio"),
        (lambda f: {"live": 2}, "live: expected 0 with budget k, .*, got 2; give budget kv$"),
        (lambda f: {"lr": "-1"}, "lr: expected 0 to 1, got -1"),
        (lambda f: {"lengths": "1,2,3"}, "lengths: expected 1 <= least <= greatest"),
        (lambda f: {"lengths": "2000"}, "lengths: expected at most 1,024 tokens, the model's"),
        (lambda f: {"recent": 900}, "lengths: expected more than the 904 tokens of the window"),
        (lambda f: {"kinds": "riddle"}, "kinds: .*riddle"),
        (lambda f: {"text": f / "none"}, "text: .*none: No such file or directory$"),
        (lambda f: {"text": f}, "text: .*: Is a directory$"),
        (lambda f: {"start": f / "none"}, "start: .*none: No such file"),
        (lambda f: {"device": "tpu"}, "device: expected auto, cpu, cuda or cuda:N, got tpu"),
        (lambda f: {"model": f / "none"}, "model: .*none: "),
        (long_vocabulary, "tokenizer: expected at most 97 tokens, .* got 100; is it"),
        (other_attention, "model: learning a mask expects .*, got GPT2LMHeadModel with its layers"),
    ],
)
def test_errors_are_one_line_before_weights_are_read(folder, monkeypatch, change, message):
    monkeypatch.setattr("leank.loading.Source.model", None)
    result = leank_learn(folder, **change(folder))
    assert result.exit_code == 2, result.output
    assert result.stdout == ""
    (line,) = result.stderr.splitlines()
    assert re.search(f"^leank learn: {message}", line), line


def test_processes_say_the_same_mistake_once(folder):
    for change in ({"ratio": "half"}, {"text": folder / "none"}):
        done = run_two("-m", "leank", *words(folder, **change), check=False)
        (name,) = change
        said = [line for line in done.stderr.splitlines() if f"leank learn: {name}: " in line]
        assert done.returncode != 0 and len(said) == 1, done.stderr


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_says_so(folder):
    result = leank_learn(folder, device="cuda")
    assert result.exit_code == 2
    assert "device: expected a GPU that torch can use, got none for cuda" in result.stderr


@pytest.mark.parametrize("dtype", ["float32", "auto"])
def test_what_a_gpu_cannot_run_is_refused_before_weights_are_read(folder, monkeypatch, dtype):
    """It ended with a traceback of the first step."""
    built = pytest.importorskip("leank._cuda")
    monkeypatch.setattr(cli_learn, "find_device", lambda name: torch.device("cuda", 0))
    monkeypatch.setattr("leank.loading.Source.model", None)
    result = leank_learn(folder, dtype=dtype)
    said = f"a head dim of {built.LEARN_HEAD_DIMS} on CUDA, got 16"
    if dtype == "float32":
        said = "bfloat16 or float16 on CUDA, got torch.float32"
    assert result.exit_code == 2
    assert result.stderr == f"leank learn: device: cuda:0: q: expected {said}\n"


def test_a_build_without_cuda_says_so(folder, monkeypatch):
    monkeypatch.setattr(cli_learn, "find_device", lambda name: torch.device("cuda", 0))
    monkeypatch.setattr("leank.loading.Source.model", None)
    monkeypatch.delitem(sys.modules, "leank.learning.ops_cuda", raising=False)
    monkeypatch.delitem(sys.modules, "leank._cuda_built", raising=False)
    monkeypatch.setitem(sys.modules, "leank._cuda", None)
    monkeypatch.delattr("leank._cuda", raising=False)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    result = leank_learn(folder)
    assert result.exit_code == 2 and "leank was built without CUDA: install it" in result.stderr


@pytest.mark.parametrize(
    ("n_gpus", "n_processes", "options", "message"),
    [
        (0, 1, {}, "expected GPUs that torch can use, got none"),
        (2, 1, {"device": "cuda:1"}, "expected device auto or cuda beside it, got cuda:1"),
        (2, 2, {}, "expected one process, since it takes all GPUs, got 2"),
    ],
)
def test_device_map_needs_all_gpus(folder, monkeypatch, n_gpus, n_processes, options, message):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: n_gpus > 0)
    monkeypatch.setenv("WORLD_SIZE", str(n_processes))
    result = leank_learn(folder, device_map="auto", **options)
    assert result.exit_code == 2
    assert f"leank learn: device-map: {message}" in " ".join(result.stderr.split())


def test_one_gpu_for_several_processes_is_refused(folder, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setenv("WORLD_SIZE", "2")
    result = leank_learn(folder, device="cuda:0")
    assert result.exit_code == 2
    message = "device: expected auto or cuda, a GPU for each process, got cuda:0"
    assert message in " ".join(result.stderr.split())


@pytest.mark.parametrize("wrong", [{"recent": 0}, {"dtype": "int8"}, {"budget": "v"}, {"seed": -1}])
def test_options_outside_their_range(folder, wrong):
    result = leank_learn(folder, columns=200, **wrong)
    assert result.exit_code == 2 and f"--{next(iter(wrong))}" in result.stderr
