"""Build tests/test_capi.c with csrc, natively or for another machine, with the flags of setup.py.

python -m tests.capi.build --out build/capi [--cc COMPILER] [--static] [--sanitize LIST]
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


def load_setup():
    """setup.py as a module: the one home of the table of variants and flags."""
    spec = importlib.util.spec_from_file_location("leank_setup", ROOT / "setup.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def build(cc, out, *, static=False, sanitize=None):
    """Compile everything and link `out`/test_capi; returns its path."""
    setup = load_setup()
    command = shlex.split(cc)
    flags = [*setup.LANGUAGE, *setup.WARNINGS, "-Werror", "-O1", "-g", f"-I{ROOT}/csrc"]
    linking = ["-static"] if static else []
    if sanitize:
        flags += ["-fno-omit-frame-pointer", f"-fsanitize={sanitize}", "-fno-sanitize-recover=all"]
        linking += [f"-fsanitize={sanitize}"]
    if setup.compiles(command, setup.OPENMP_PROBE, ["-fopenmp"], link=True):
        flags, linking = [*flags, "-fopenmp"], [*linking, "-fopenmp"]
    isas = setup.built_isas(command)
    sources = [path for path in (ROOT / "csrc").glob("*.c") if not path.name.startswith("py_")]
    out.mkdir(parents=True, exist_ok=True)

    def compile_one(source):
        target = out / f"{source.stem}.o"
        extra = setup.source_flags(source, isas)
        run([*command, *flags, *extra, "-c", str(source), "-o", str(target)])
        return str(target)

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        objects = list(pool.map(compile_one, [*sorted(sources), ROOT / "tests" / "test_capi.c"]))
    program = out / "test_capi"
    run([*command, *objects, *linking, "-lm", "-o", str(program)])
    return program


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
    args = parser.parse_args()
    print(build(args.cc, args.out, static=args.static, sanitize=args.sanitize))


if __name__ == "__main__":
    main()
