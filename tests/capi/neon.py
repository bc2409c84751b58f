"""Check the scalar and the NEON variant on an emulated AArch64 machine.

Writes inputs with the float64 truth of tests/reference.py and the error budget of tests/compare.py,
builds tests/test_capi.c as a static AArch64 program, and runs it on them and alone. Where the
compiler or the emulator is not installed it says so and does nothing; with CI=true that fails.

python -m tests.capi.neon --out build/capi-neon
"""

import argparse
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np

from tests.capi.build import build
from tests.compare import EPS, encode, truth_and_plain
from tests.reference import History

COMPILER, EMULATOR = "aarch64-linux-gnu-gcc", "qemu-aarch64"
DTYPES = ("float32", "bfloat16", "float16")  # the order of lk_dtype
N_COLUMNS = (1, 17)
PROMPT = 140  # two pages and a part; with the windows below some of it is middle
PAGE = 64


def budgets(truth, plain, dtype):
    """Largest allowed error of each row; the formula of compare.assert_within_budget."""
    floor = (8 if dtype == "float32" else 0.5) * EPS[dtype]
    axes = tuple(range(1, truth.ndim))
    return 2 * np.abs(plain - truth).max(axes) + floor * np.abs(truth).max(axes)


def write_ints(file, *values):
    file.write(np.array(values, "<i8").tobytes())


def write_case(file, rng, dtype, *, width, n_rep, head_dim, v_dim, sink, recent, softcap, sinks):
    """One cache of two rows, the second shorter: a prompt, then calls of 1 and of 17 columns.

    sinks: standard deviation of the sinks' logits; None: all -inf.
    """
    n_rows, n_heads = 2, 2
    keep = np.zeros((n_heads, head_dim), bool)
    for head in keep:
        head[rng.permutation(head_dim)[:width]] = True
    history = History(n_rows, sink=sink, recent=recent, slack=0, page=PAGE)
    sizes = (PROMPT, *N_COLUMNS, 1)
    write_ints(file, DTYPES.index(dtype), n_rows, n_heads * n_rep, n_heads, head_dim, v_dim)
    write_ints(file, sink, recent, 0, len(sizes))
    file.write(np.array(softcap, "<f8").tobytes())
    file.write(keep.astype(np.uint8).tobytes())
    logits = (
        np.full(n_heads * n_rep, -np.inf)
        if sinks is None
        else rng.normal(0, sinks, n_heads * n_rep)
    )
    logits = logits.astype("<f4")
    file.write(logits.tobytes())
    options = {"softcap": softcap, "sinks": logits}
    scale = head_dim**-0.5
    for size in sizes:
        k = encode(rng.standard_normal((n_rows, n_heads, size, head_dim)), dtype)
        v = encode(rng.standard_normal((n_rows, n_heads, size, v_dim)), dtype)
        q = encode(rng.standard_normal((n_rows, n_heads * n_rep, size, head_dim)), dtype)
        valid = np.ones((n_rows, size), bool)
        valid[1, : size // 3] = False
        history.put(k, v, valid)
        truth = np.zeros((*q.shape[:3], v_dim))
        plain = np.zeros_like(truth)
        for b, row in enumerate(history.rows):
            _, positions = history.attend(b, q[b].astype(np.float32), keep, scale)
            rule = {"sink": sink, "recent": recent, "lo": row.lo, "n0": row.n0, "scale": scale}
            stored = (np.stack(x, axis=1) for x in (row.k, row.v))
            truth[b], plain[b] = truth_and_plain(
                q[b], *stored, positions, keep, dtype, **rule, **options
            )
        history.settle()
        write_ints(file, size)
        for array in (valid.astype(np.uint8), k, v, q, truth, budgets(truth, plain, dtype)):
            file.write(np.ascontiguousarray(array).tobytes())


def write_vectors(path):
    rng = np.random.default_rng(20250820)
    shapes = [
        {"width": width, "n_rep": n_rep, "head_dim": head_dim, "v_dim": v_dim, **window, **more}
        for head_dim, v_dim, n_rep in ((32, 32, 3), (40, 24, 1))
        for width in (0, 8, 24, head_dim)
        for window in ({"sink": 0, "recent": 1}, {"sink": 20, "recent": 40})
        for more in (
            {"softcap": 0, "sinks": None},
            {"softcap": 1.5, "sinks": 2},
            {"softcap": 50, "sinks": None},
        )
    ]
    with open(path, "wb") as file:
        write_ints(file, len(shapes) * len(DTYPES))
        for shape in shapes:
            for dtype in DTYPES:
                write_case(file, rng, dtype, **shape)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    missing = [name for name in (COMPILER, EMULATOR) if shutil.which(name) is None]
    if missing:
        message = f"NEON was not checked: {' and '.join(missing)} not installed"
        print(f"{message} (Debian: apt-get install gcc-aarch64-linux-gnu qemu-user)")
        sys.exit(1 if os.environ.get("CI") == "true" else 0)
    program = build(COMPILER, args.out, static=True)
    vectors = args.out / "vectors.bin"
    write_vectors(vectors)
    # Waiting threads would spin, which is slow under emulation.
    quiet = os.environ | {"OMP_WAIT_POLICY": "passive"}
    for arguments in (["vectors", str(vectors), "scalar", "neon"], ["1"]):
        subprocess.run([EMULATOR, str(program), *arguments], env=quiet, check=True)


if __name__ == "__main__":
    main()
