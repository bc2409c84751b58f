"""Commands in processes of their own: two that torchrun joins, and one that Ctrl-C stops."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]


def run_two(*command, check=True):
    """Run a script, or ``"-m", module``, with arguments in two processes; both must succeed."""
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    done = subprocess.run(
        [*f"{sys.executable} -m torch.distributed.run --standalone --nproc-per-node=2".split()]
        + [*command],
        env=os.environ | {"PYTHONPATH": path, "OMP_NUM_THREADS": "1"},
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert done.returncode == 0 or not check, done.stderr
    return done


def interrupt(words, is_ready, before=""):
    """Run ``leank`` with `words`, after the Python code `before`, press Ctrl-C when it is ready.

    As in a terminal, its own children get the signal too. Returns status, stdout and stderr, when
    none of them is there any more.
    """
    code = "import sys; exec(sys.argv.pop(1)); from leank.__main__ import main; sys.exit(main())"
    run = subprocess.Popen(
        [sys.executable, "-c", code, before, *map(str, words)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        cwd=ROOT,
        start_new_session=True,
        # A shell lets what it runs in the background ignore the signal, which is inherited.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    deadline = time.monotonic() + 60
    while not is_ready() and run.poll() is None and time.monotonic() < deadline:
        time.sleep(0.05)
    if run.poll() is None:
        os.killpg(run.pid, signal.SIGINT)
    stdout, stderr = run.communicate(timeout=60)
    with pytest.raises(ProcessLookupError):
        os.killpg(run.pid, 0)
    return run.returncode, stdout, stderr
