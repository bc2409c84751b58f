#!/usr/bin/env bash
# dist_smoke.sh FOLDER: build the sdist, the wheel from it, and install each into an empty environment
# where nothing but NumPy is pulled in. Run by `make dist-smoke` from the top folder.
set -euo pipefail

python=${PYTHON:-python3}
out=$1
root=$PWD
# Also for the environments that pip and build make for themselves.
export PIP_CONSTRAINT=$root/constraints.txt PIP_BUILD_CONSTRAINT=$root/constraints.txt
export PIP_DISABLE_PIP_VERSION_CHECK=1

rm -rf "$out"
mkdir -p "$out"
out=$(cd "$out" && pwd)
"$python" -m build --outdir "$out/dist" . >"$out/build.log" 2>&1 || {
    cat "$out/build.log"
    exit 1
}

# Whoever has the sdist can run everything that the README and CONTRIBUTING name.
tar -tzf "$out"/dist/*.tar.gz | cut -d/ -f2- >"$out/sdist.txt"
for file in .ci/run .clang-format kernels/decode.cuh kernels/inst/decode_bf16_128.cu Makefile constraints.txt tests/dist_smoke.sh docs/conf.py docs/picture.png leank/data/masks/README.md notebooks/README.md; do
    grep -qxF "$file" "$out/sdist.txt" || {
        echo "dist smoke: the sdist has no $file"
        exit 1
    }
done

for dist in "$out"/dist/*.whl "$out"/dist/*.tar.gz; do
    # The wheel has been built with whatever toolkit there is; once is enough.
    case $dist in *.tar.gz) export LEANK_CUDA=0 ;; esac
    venv=$out/venv
    rm -rf "$venv"
    "$python" -m venv "$venv"
    "$venv/bin/pip" install --quiet "$dist"
    cd "$out" # not the source tree: what is installed has to be found
    "$venv/bin/python" - <<'PYTHON'
import importlib.metadata, importlib.util, pathlib, sys
import leank

home = pathlib.Path(leank.__file__).parent
assert "site-packages" in home.parts, home
assert importlib.util.find_spec("torch") is None and "torch" not in sys.modules
assert importlib.metadata.version("leank") == leank.__version__
for name in ("py.typed", "_C.pyi"):
    assert (home / name).is_file(), name
assert list(home.rglob("*.safetensors")), "the shipped mask is not installed"
from leank.bench.profiles import load_profiles
assert load_profiles(), "the benchmark's profiles are not installed"
from leank.shipped import shipped_masks
shipped_masks() # the index of shipped masks is installed
print(leank.__version__, leank.capabilities())
PYTHON
    "$venv/bin/python" "$root/examples/decode_numpy.py"
    cd "$root"
    echo "dist smoke: $(basename "$dist") works without torch"
done
