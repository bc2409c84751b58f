"""leank.learn: masks and their metadata, several targets, resuming, divergence, two processes."""

import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

import leank  # noqa: E402
from leank.learning import DivergedError, ResumeError  # noqa: E402
from leank.learning import run as run_module  # noqa: E402
from leank.learning.feed import Batches  # noqa: E402
from leank.learning.folder import read_state  # noqa: E402

from .learn_run_tools import OPTIONS, character_tokenizer, learn, write_text  # noqa: E402
from .tiny_models import tiny  # noqa: E402

ROOT = Path(__file__).resolve().parents[1]
N_TOTAL = OPTIONS["stage1_steps"] + OPTIONS["stage2_steps"]


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    return write_text(tmp_path_factory.mktemp("text") / "text.txt")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("whole")


@pytest.fixture(scope="module")
def whole(text, folder):
    """The mask of a run that nobody stopped."""
    return learn(text, folder=folder)


@pytest.fixture(scope="module")
def whole_log(whole, folder):
    return without_time(log_of(folder)[1])


def log_of(folder):
    header, *steps = map(json.loads, (folder / "log.jsonl").read_text().splitlines())
    return header, steps


def without_time(steps):
    return [{k: v for k, v in step.items() if k != "time"} for step in steps]


# ---------------------------------------------------------------------------------- the result


def test_a_mask_with_its_window_and_how_it_was_learned(whole, text, tmp_path):
    assert whole.ratio == 0.5 and (whole.sink, whole.recent, whole.align) == (4, 60, 8)
    assert whole.model == "LlamaForCausalLM"
    for part in ("ratio 0.5 of k, align 8", "stage 1: 6 steps, lr 0.1", "260 to 300 tokens, kinds"):
        assert part in whole.method
    assert re.search(r"seed 3, text \w{16}; validation loss 0\.\d+ at stage \d", whole.method)
    whole.save(tmp_path / "mask")
    assert leank.ChannelMask.load(tmp_path / "mask") == whole
    with leank.patch(tiny(), whole):
        pass


def test_the_seed_decides(whole, text):
    other = learn(text, seed=4, stage2_steps=0)
    assert other != whole and (other.keep != whole.keep).any()


def test_progress_sees_every_step(text):
    events = []
    learn(text, progress=events.append)
    assert [e.n_done for e in events] == list(range(1, N_TOTAL + 1))
    assert {e.n_total for e in events} == {N_TOTAL}
    assert [e.target for e in events] == [None] * 6 + [(0.5, 8)] * 6


def test_files_of_a_run(whole, text, tmp_path):
    output = tmp_path / "new" / "mask.safetensors"
    assert learn(text, output=output) == whole == leank.ChannelMask.load(output)
    folder = tmp_path / "new" / "mask.safetensors.run"
    header, steps = log_of(folder)
    assert header["sink"] == 4 and header["seed"] == 3 and header["lengths"] == [260, 300]
    assert {"leank", "torch", "python", "name", "model", "text", "device"} <= header.keys()
    assert [(s["stage"], s["step"]) for s in steps] == [(i, j) for i in (1, 2) for j in range(6)]
    assert "ratio" not in steps[0] and steps[6]["ratio"] == 0.5 and steps[6]["align"] == 8
    assert sorted(path.name for path in folder.iterdir()) == ["alpha.npy", "log.jsonl", "state.pt"]


def test_several_masks_from_one_stage_1(whole, text, tmp_path):
    """Each is what a run for it alone gives, and has a file of its own."""
    events = []
    options = OPTIONS | {"text": (text,), "progress": events.append}
    masks = leank.learn_many(
        tiny(),
        character_tokenizer(),
        [0.5, 0.75],
        [16, 8],
        output=tmp_path / "m-{ratio}-{align}",
        **options,
    )
    assert list(masks) == [(0.5, 16), (0.5, 8), (0.75, 16), (0.75, 8)]
    assert masks[0.5, 8] == whole
    assert masks[0.75, 8] == learn(text, 0.75)
    assert len(events) == events[0].n_total == 6 + 4 * 6
    for (ratio, align), mask in masks.items():
        assert leank.ChannelMask.load(tmp_path / f"m-{ratio}-{align}") == mask
    header, steps = log_of(tmp_path / "m-all-all.run")
    assert header["ratios"] == [0.5, 0.75] and len(steps) == 30


@pytest.mark.parametrize("start", ["moments", "mask", "factors"])
def test_other_starts(whole, text, tmp_path, start):
    if start == "mask":
        whole.save(start := tmp_path / "mask.safetensors")
    elif start == "factors":
        np.save(start := tmp_path / "alpha.npy", np.full((3, 2, 16), 0.5))
    first = []
    mask = learn(text, start=start, progress=first.append)
    assert mask.ratio == 0.5 and f"start {start};" in mask.method
    assert first[0].step.mean_alpha < 0.85


def test_a_budget_of_bytes(text):
    mask = learn(text, budget="kv")
    kept = (mask.kept_ratio + 1 - mask.empty_heads) / 2
    assert 0.4 <= kept <= 0.5 and mask.method.startswith(f"leank {leank.__version__} learn, ratio")


def test_half_weights(text):
    assert learn(text, model=tiny(dtype=torch.bfloat16)).ratio == 0.5


# ------------------------------------------------------------------------------------- the report


def read_report(folder):
    return json.loads((folder / "report.json").read_text())


def test_a_report_at_the_end(whole, text, tmp_path):
    learn(text, folder=tmp_path, report=True)
    report = read_report(tmp_path)
    [evaluation] = report["evaluations"]
    assert evaluation["name"] == "r0.5-a8" and evaluation["kept_k"] == whole.kept_ratio
    assert sum(kind["n"] for kind in evaluation["kinds"]) == OPTIONS["n_test"]
    assert report["n_steps"] == N_TOTAL and report["header"]["lr"] == OPTIONS["lr"]
    alpha = np.load(tmp_path / "alpha.npy")
    assert alpha.shape == (3, 2, 16) and alpha.dtype == np.float32


def test_a_report_for_each_mask(text, tmp_path):
    options = OPTIONS | {"text": (text,), "folder": tmp_path, "report": True}
    masks = leank.learn_many(tiny(), character_tokenizer(), [0.5, 0.75], [8], **options)
    for target, mask in masks.items():
        report = read_report(tmp_path / str(target))
        # Its own first, then the other to compare with.
        first, second = report["evaluations"]
        assert first["name"] == str(target) != second["name"]
        assert report["mask"]["ratio"] == mask.ratio and report["n_steps"] == N_TOTAL


def test_a_report_says_what_its_own_mask_was_chosen_by(text, tmp_path):
    """Stage 1 is shared, its mask is not: each report had the loss of the first mask."""
    options = OPTIONS | {"text": (text,), "folder": tmp_path, "report": True, "stage2_lr": 0.0}
    masks = leank.learn_many(tiny(), character_tokenizer(), [0.5, 0.75], [8], **options)
    losses = []
    for target, mask in masks.items():
        best = read_report(tmp_path / str(target))["best"]
        assert (best["stage"], best["step"]) == (1, 5)
        assert f"validation loss {best['validation']:.6g} at stage 1, step 6" in mask.method
        written = (tmp_path / str(target) / "report.md").read_text()
        assert "Chosen in stage 1, step 6" in written, "both count from 1"
        losses.append(best["validation"])
    assert losses[0] != losses[1]


# ------------------------------------------------------------------------------------- resuming


class Stopped(Exception):
    """As if somebody had pressed Ctrl-C."""


def stop_after(n):
    def progress(event):
        if event.n_done == n:
            raise Stopped

    return progress


@pytest.mark.parametrize("every, cuts", [(1, (1, 6, 7, 11)), (4, (5, 6, 9)), (10, (3,))])
def test_a_stopped_run_goes_on_to_the_same_mask(
    monkeypatch, whole, whole_log, text, tmp_path, every, cuts
):
    monkeypatch.setattr(run_module, "_SAVE_STEPS", every)
    for cut in cuts:
        with pytest.raises(Stopped):
            learn(text, folder=tmp_path, resume=True, progress=stop_after(cut))
    events = []
    assert learn(text, folder=tmp_path, resume=True, progress=events.append) == whole
    at_stage_2 = 6 if cuts[-1] >= 6 else 0
    assert events[0].n_done == max(cuts[-1] // every * every, at_stage_2) + 1
    assert without_time(log_of(tmp_path)[1]) == whole_log
    # Once more, there is nothing left to do.
    assert learn(text, folder=tmp_path, resume=True, progress=stop_after(12)) == whole


def test_several_masks_go_on_where_they_stopped(text, tmp_path):
    options = OPTIONS | {"text": (text,)}
    targets = tiny(), character_tokenizer(), [0.5, 0.75], [8]
    masks = leank.learn_many(*targets, **options)
    for cut in (8, 13):
        with pytest.raises(Stopped):
            leank.learn_many(
                *targets, **options, folder=tmp_path, resume=True, progress=stop_after(cut)
            )
    assert leank.learn_many(*targets, **options, folder=tmp_path, resume=True) == masks


def test_a_killed_process_goes_on_to_the_same_mask(whole, text, tmp_path):
    """SIGKILL in the middle of stage 2, while the next state is being written."""
    code = f"""if True:
        import os, signal, torch, leank
        from leank.learning import run
        from tests.learn_run_tools import OPTIONS, character_tokenizer
        from tests.tiny_models import tiny
        run._SAVE_STEPS = 3
        save, n = torch.save, 0
        def killed(state, file):
            global n
            n += 1
            if n == 4:  # after steps 3, 6 and 9
                file.write(b"half a state")
                file.flush()
                os.kill(os.getpid(), signal.SIGKILL)
            save(state, file)
        torch.save = killed
        options = OPTIONS | {{"text": ({str(text)!r},)}}
        options["output"] = {str(tmp_path / "m")!r}
        leank.learn(tiny(), character_tokenizer(), 0.5, 8, **options)
        """
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=environment)
    assert done.returncode == -signal.SIGKILL
    folder = tmp_path / "m.run"
    assert read_state(folder / "state.pt")["n_done"] == 9
    assert not (tmp_path / "m").exists() and len(log_of(folder)[1]) == 12
    assert learn(text, output=tmp_path / "m", resume=True) == whole
    assert leank.ChannelMask.load(tmp_path / "m") == whole
    assert len(log_of(folder)[1]) == N_TOTAL
    assert sorted(path.name for path in folder.iterdir()) == ["alpha.npy", "log.jsonl", "state.pt"]


@pytest.mark.parametrize(
    "change, message",
    [
        ({"lr": 0.2}, "lr 0.2, got one with 0.1"),
        ({"seed": 4}, "seed 4, got one with 3"),
        ({"recent": 61}, "recent 61, got one with 60"),
        ({"ratio": 0.75}, r"ratios \[0.75\], got one with \[0.5\]"),
        ({"lengths": (260, 290)}, r"lengths \[260, 290\], got one with \[260, 300\]"),
        ({"start": "moments"}, "start moments, got one with ones"),
        ({"model": lambda: tiny(seed=1)}, "model .{16}, got one with .{16};"),
        ({"model": lambda: tiny(dtype=torch.bfloat16)}, "dtype bfloat16, got one with float32"),
    ],
)
def test_another_run_is_not_resumed(stopped, text, change, message):
    folder, before = stopped
    if "model" in change:
        change = {"model": change["model"]()}
    with pytest.raises(ResumeError, match=f"resume: expected a run with {message}"):
        learn(text, **{"folder": folder, "resume": True} | change)
    assert (folder / "state.pt").read_bytes() == before


@pytest.fixture(scope="module")
def stopped(text, tmp_path_factory):
    """A folder with a run that stopped in stage 2, and its state."""
    folder = tmp_path_factory.mktemp("stopped")
    with pytest.raises(Stopped):
        learn(text, folder=folder, progress=stop_after(8))
    return folder, (folder / "state.pt").read_bytes()


def test_a_stopped_run_is_not_overwritten(stopped, text, tmp_path):
    folder, before = stopped
    with pytest.raises(ResumeError, match="a run that stopped after 6 steps; go on with resume"):
        learn(text, folder=folder)
    assert (folder / "state.pt").read_bytes() == before
    with pytest.raises(ResumeError, match="with text .{16}, got one with .{16}; give the options"):
        learn(write_text(tmp_path / "other.txt", seed=1), folder=folder, resume=True)
    (tmp_path / "state.pt").write_bytes(before[:100])
    with pytest.raises(ResumeError, match="expected a state of a run, got another file"):
        learn(text, folder=tmp_path, resume=True)


def test_a_finished_run_makes_room(whole, text, tmp_path):
    learn(text, folder=tmp_path, stage1_steps=1, stage2_steps=0)
    assert learn(text, folder=tmp_path) == whole
    assert log_of(tmp_path)[0]["stage1_steps"] == 6 and len(log_of(tmp_path)[1]) == N_TOTAL


# ----------------------------------------------------------------------------------- divergence


@pytest.mark.parametrize("step", [0, 4, 9])
def test_divergence_saves_the_last_good_mask(monkeypatch, text, tmp_path, step):
    make = Batches.__call__

    def poisoned(self, i):
        batch = make(self, i)
        return batch._replace(weights=batch.weights * float("nan")) if i == step else batch

    monkeypatch.setattr(Batches, "__call__", poisoned)
    output = tmp_path / "m"
    with pytest.raises(DivergedError) as caught:
        learn(text, output=output)
    stage = f"stage {1 if step < 6 else 2}, step {step % 6 + 1}: the loss is nan"
    if step == 0:
        assert str(caught.value) == f"{stage}; there is no good mask yet" and not output.exists()
        assert caught.value.mask is None
        return
    assert str(caught.value) == f"{stage}; the last good mask is in {output}"
    mask = leank.ChannelMask.load(output)
    assert mask == caught.value.mask and mask.ratio == 0.5
    assert mask.method.endswith(f"then it diverged: {stage}")
