"""Running a script in two processes that torchrun joins."""

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def run_two(*command):
    """Run a script, or ``"-m", module``, with arguments in two processes; both must succeed."""
    done = subprocess.run(
        [*f"{sys.executable} -m torch.distributed.run --standalone --nproc-per-node=2".split()]
        + [*command],
        env=os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert done.returncode == 0, done.stderr
