"""Build C programs of the tests with csrc, natively or for another machine, with setup.py's flags.

python -m tests.capi.build --out build/capi [--cc COMPILER] [--static] [--sanitize LIST]
    [--isas LIST] [--fuzz]

The program is tests/test_capi.c; with --fuzz those of tests/fuzz, which replay files unless
`fuzzer` is among the sanitizers (clang).
"""

import argparse
import importlib.util
import os
import shlex
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
# What a program has inside, by #include, and is not to be linked with again.
INCLUDED = {"fuzz_plan": {"decode"}}


def load_setup():
    """setup.py as a module: the one home of the table of variants and flags."""
    spec = importlib.util.spec_from_file_location("leank_setup", ROOT / "setup.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def programs(fuzz, sanitize):
    """Return the sources of each program, by its name, and the files that a program includes."""
    if not fuzz:
        return {"test_capi": [ROOT / "tests" / "test_capi.c"]}
    engine = [] if "fuzzer" in (sanitize or "").split(",") else [ROOT / "tests/fuzz/replay.c"]
    return {path.stem: [path, *engine] for path in sorted((ROOT / "tests/fuzz").glob("fuzz_*.c"))}


def build(cc, out, *, static=False, sanitize=None, isas=None, fuzz=False):
    """Compile everything and link the programs into `out`; returns the path of the first one."""
    setup = load_setup()
    command = shlex.split(cc)
    flags = [*setup.LANGUAGE, *setup.C_WARNINGS, "-Werror", "-O1", "-g", f"-I{ROOT}/csrc"]
    linking = ["-static"] if static else []
    if sanitize:
        flags += ["-fno-omit-frame-pointer", f"-fsanitize={sanitize}", "-fno-sanitize-recover=all"]
        linking += [f"-fsanitize={sanitize}"]
    if setup.compiles(command, setup.OPENMP_PROBE, ["-fopenmp"], link=True):
        flags, linking = [*flags, "-fopenmp"], [*linking, "-fopenmp"]
    isas = [name for name in setup.built_isas(command) if isas is None or name in isas]
    library = [path for path in (ROOT / "csrc").glob("*.c") if not path.name.startswith("py_")]
    wanted = programs(fuzz, sanitize)
    out.mkdir(parents=True, exist_ok=True)

    def compile_one(source):
        target = out / f"{source.stem}.o"
        extra = setup.source_flags(source, isas)
        run([*command, *flags, *extra, "-c", str(source), "-o", str(target)])
        return target

    own = dict.fromkeys(source for sources in wanted.values() for source in sources)
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        objects = list(pool.map(compile_one, [*sorted(library), *own]))
    for name, sources in wanted.items():
        others = {path.stem for path in own} - {path.stem for path in sources}
        left_out = others | INCLUDED.get(name, set())
        parts = [str(path) for path in objects if path.stem not in left_out]
        run([*command, *parts, *linking, "-lm", "-o", str(out / name)])
    return out / next(iter(wanted))


def run(command):
    """Run a compiler; its messages are the error."""
    done = subprocess.run(command, check=False)
    if done.returncode != 0:
        sys.exit(f"failed: {shlex.join(command)}")


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--cc", default="cc")
    parser.add_argument("--static", action="store_true")
    parser.add_argument("--sanitize")
    parser.add_argument("--isas", help="variants to build beside scalar; default: all that can be")
    parser.add_argument("--fuzz", action="store_true")
    args = parser.parse_args()
    options = {"static": args.static, "sanitize": args.sanitize, "fuzz": args.fuzz}
    isas = args.isas.split(",") if args.isas else None
    print(build(args.cc, args.out, isas=isas, **options))


if __name__ == "__main__":
    main()
