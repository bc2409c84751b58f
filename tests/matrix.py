"""The suite in one environment per combination of versions: python -m tests.matrix; see --help.

Each combination gets a virtual environment with the package built for it, and a copy of the tests
beside which there is no source of the package. torch is taken as a CPU wheel or, with --any-torch,
as the wheel there is, whose CUDA is gigabytes. What is not to be had from pip's sources, and what
has no interpreter, is said to be untested. What pip and pytest said is in log.txt of each
combination's folder.
"""

from __future__ import annotations

import argparse
import dataclasses
import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
COPIED = ("tests", "examples", "README.md", "CHANGELOG.md", "pyproject.toml", "constraints.txt")
ARRAYS = ("mask", "masks_file", "cache", "cache_errors", "cache_ops", "boundary", "shipped")
MODELS = (
    "families",
    "sliding",
    "hybrid",
    "generate",
    "generate_calls",
    "assisted",
    "static",
    "compile",
    "several_models",
    "hf_cache",
    "hf_refusals",
    "patch",
    "models",
    "memory_report",
    "mask_source",
)
_PINS = dict(re.findall(r"^([\w.-]+)==([\w.]+)$", (ROOT / "constraints.txt").read_text(), re.M))


@dataclasses.dataclass(frozen=True)
class Combination:
    """Versions to test together; without torch only what needs NumPy alone."""

    python: str = "3.11"
    numpy: str = _PINS["numpy"]
    torch: str | None = _PINS["torch"]
    transformers: str | None = _PINS["transformers"]

    @property
    def name(self) -> str:
        """Name of its folder."""
        parts = ("python", self.python, "numpy", self.numpy, "torch", self.torch)
        return "-".join(str(part) for part in (*parts, "transformers", self.transformers))

    def requirements(self, any_torch: bool) -> list[str]:
        """What pip is asked for; only a wheel for the CPU has the local version."""
        packages = [f"numpy=={self.numpy}", "safetensors", "pytest", "hypothesis"]
        if self.torch is not None:
            local = "" if any_torch else "+cpu"
            packages += [f"torch=={self.torch}{local}", f"transformers=={self.transformers}"]
            packages += ["accelerate", "jinja2"]
        return packages


def _alone(python: str, numpy: str) -> Combination:
    return Combination(python, numpy, None, None)


# The oldest and the newest of each, and the pins; pyproject.toml allows what passes here.
COMBINATIONS = (
    Combination(),
    Combination(transformers="5.21.0"),
    Combination(transformers="5.24.0"),
    Combination(numpy="1.26.4"),
    *(Combination(torch=x) for x in ("2.9.1", "2.10.0", "2.11.0", "2.12.1", "2.15.0")),
    Combination(python="3.12"),
    Combination(python="3.13"),
    _alone("3.11", "1.26.4"),
    _alone("3.12", "1.26.4"),
    _alone("3.12", _PINS["numpy"]),
    _alone("3.13", "2.1.3"),
    _alone("3.13", _PINS["numpy"]),
)


def run(combination: Combination, folder: Path, any_torch: bool) -> str:
    """Make the environment, run the tests, and return what came out."""
    python = shutil.which(f"python{combination.python}")
    if python is None:
        return f"untested: no python{combination.python} in PATH"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    tree = folder / "tree"
    tree.mkdir()
    for name in COPIED:
        source = ROOT / name
        (shutil.copytree if source.is_dir() else shutil.copy)(source, tree / name)
    pip = [str(folder / "venv" / "bin" / "python"), "-m", "pip", "--disable-pip-version-check"]
    with open(folder / "log.txt", "w") as log:
        if not _call([python, "-m", "venv", str(folder / "venv")], log):
            return f"untested: python{combination.python} makes no environment"
        # Before the package, so that nothing else decides on these versions.
        packages = combination.requirements(any_torch)
        if not _call([*pip, "install", "--only-binary", ":all:", *packages], log):
            return "untested: pip finds no wheels of all these"
        environment = os.environ | {"LEANK_CUDA": "0"}
        if not _call([*pip, "install", "--no-deps", str(ROOT)], log, env=environment):
            return "FAILED to build"
        names = ARRAYS if combination.torch is None else ARRAYS + MODELS
        tests = [f"tests/test_{name}.py" for name in names]
        words = [pip[0], "-m", "pytest", "-q", "-p", "no:cacheprovider", "-W", "default"]
        words += ["-m", "not model and not long", *tests]
        passed = _call(words, log, cwd=tree)
    last = (folder / "log.txt").read_text().strip().splitlines()[-1].strip("= ")
    return last if passed else f"FAILED: {last}"


def _call(words: list[str], log, **options) -> bool:
    log.flush()
    return subprocess.run(words, stdout=log, stderr=log, **options).returncode == 0


def main() -> int:
    """Run all, or those whose names match; returns 1 if one failed."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", default="", metavar="REGEX", help="of a combination's name")
    parser.add_argument("--any-torch", action="store_true", help="also wheels with CUDA")
    parser.add_argument("--folder", type=Path, default=ROOT / "build" / "matrix")
    arguments = parser.parse_args()
    print("| Python | NumPy | torch | transformers | result | seconds |")
    print("| --- | --- | --- | --- | --- | --- |")
    failed = False
    for combination in COMBINATIONS:
        if not re.search(arguments.only, combination.name):
            continue
        start = time.monotonic()
        result = run(combination, arguments.folder / combination.name, arguments.any_torch)
        failed |= result.startswith("FAILED")
        versions = (text or "-" for text in dataclasses.astuple(combination))
        seconds = f"{time.monotonic() - start:.0f}"
        print(f"| {' | '.join((*versions, result, seconds))} |", flush=True)
        if not result.startswith("FAILED"):
            shutil.rmtree(arguments.folder / combination.name / "venv", ignore_errors=True)
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
