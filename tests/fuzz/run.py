"""Run the fuzzers for some time each and say how much was tried and what was found.

python -m tests.fuzz.run --programs build/fuzz --seconds 60 [--only cache,pth] [--minimise]

The C programs are built by tests/capi/build.py with clang; those of tests/fuzz/border.py need
atheris. New inputs are added to build/fuzz-corpus, findings to build/fuzz-found. --minimise
then writes to tests/fuzz/corpus the fewest inputs that reach all that was reached, for those in C.
"""

import argparse
import os
import re
import shutil
import subprocess
import sys
import time
from importlib.util import find_spec
from pathlib import Path

from . import border

ROOT = Path(__file__).resolve().parents[2]
CORPUS = ROOT / "tests" / "fuzz" / "corpus"
# Threads that wait sleep; the decode tests ask for two.
ENVIRONMENT = {"OMP_WAIT_POLICY": "passive", "OMP_NUM_THREADS": "2"} | border.OFFLINE
# More would be spent on long inputs than on many.
COMMON = ["-max_len=512", "-timeout=60", "-rss_limit_mb=4096", "-print_final_stats=1"]


def targets(programs):
    """Return the command of each fuzzer by name."""
    found = {
        path.name.removeprefix("fuzz_"): [str(path)]
        for path in sorted(programs.glob("fuzz_*"))
        if os.access(path, os.X_OK)
    }
    if find_spec("atheris"):
        for name in border.TARGETS:
            found[name] = [sys.executable, "-m", "tests.fuzz.border", name]
        found["cli"].append(f"-dict={ROOT / 'tests/fuzz/cli.dict'}")
    else:
        print(f"skipped: {', '.join(border.TARGETS)}: atheris is not installed")
    return found


def run(name, command, seconds, build):
    """Fuzz for `seconds`; returns whether nothing was found."""
    grown, artifacts = build / "fuzz-corpus" / name, build / "fuzz-found"
    grown.mkdir(parents=True, exist_ok=True)
    artifacts.mkdir(parents=True, exist_ok=True)
    log = build / "fuzz-found" / f"{name}.log"
    options = [f"-max_total_time={seconds}", f"-artifact_prefix={artifacts}/{name}-", *COMMON]
    begin = time.monotonic()
    with open(log, "wb") as file:
        done = subprocess.run(
            [*command, *options, str(grown), str(CORPUS / name)],
            env=os.environ | ENVIRONMENT,
            cwd=ROOT,
            stdout=file,
            stderr=subprocess.STDOUT,
            check=False,
        )
    text = log.read_text(errors="replace")
    # libFuzzer's words, and what atheris says without final statistics.
    count = re.search(r"number_of_executed_units: (\d+)|^Done (\d+) runs", text, re.MULTILINE)
    executions = next(filter(None, count.groups())) if count else "?"
    verdict = "nothing found" if done.returncode == 0 else f"FOUND SOMETHING, see {log}"
    print(f"{name}: {executions} executions in {time.monotonic() - begin:.0f} s: {verdict}")
    return done.returncode == 0


def minimise(name, command, build):
    """Write the fewest inputs that reach what all do to the committed corpus.

    Merging needs a program that libFuzzer can start anew, which atheris is not: what its targets
    found to reach more is added as it is.
    """
    if name in border.TARGETS:
        shutil.copytree(build / "fuzz-corpus" / name, CORPUS / name, dirs_exist_ok=True)
        return
    fewest = build / "fuzz-fewest" / name
    shutil.rmtree(fewest, ignore_errors=True)
    fewest.mkdir(parents=True)
    sources = [path for path in (CORPUS / name, build / "fuzz-corpus" / name) if path.is_dir()]
    subprocess.run(
        [*command, "-merge=1", *COMMON, str(fewest), *map(str, sources)],
        env=os.environ | ENVIRONMENT,
        cwd=ROOT,
        check=True,
    )
    shutil.rmtree(CORPUS / name, ignore_errors=True)
    shutil.copytree(fewest, CORPUS / name)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--programs", type=Path, required=True)
    parser.add_argument("--seconds", type=int, default=60)
    parser.add_argument("--only", help="names, separated by commas")
    parser.add_argument("--minimise", action="store_true")
    args = parser.parse_args()
    found = targets(args.programs.resolve())
    names = args.only.split(",") if args.only else list(found)
    if unknown := set(names) - set(found):
        parser.error(f"--only: expected some of {', '.join(found)}, got {', '.join(unknown)}")
    build = args.programs.resolve().parent
    clean = [run(name, found[name], args.seconds, build) for name in names]
    if args.minimise:
        for name in names:
            minimise(name, found[name], build)
    sys.exit(0 if all(clean) else 1)


if __name__ == "__main__":
    main()
