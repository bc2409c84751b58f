"""Fuzz targets at the Python border: mask files, and arguments of the command.

python -m tests.fuzz.border TARGET [OPTIONS OF LIBFUZZER] CORPUS...

needs atheris. Without it tests/test_fuzz.py replays the corpus. A target takes any bytes; what it
raises is a finding.
"""

import contextlib
import functools
import io
import os
import sys
import tempfile
import warnings
import zipfile
from pathlib import Path

import numpy as np

META, PICKLE = b"META\n", b"PICKLE\n"
# No target may ask the network for a name that looks like a repository.
OFFLINE = {"HF_HUB_OFFLINE": "1", "NO_COLOR": "1", "COLUMNS": "80"}

METADATA = {
    "format_version": "1",
    "shape": "2,1,16",
    "ratio": "0.500000",
    "align": "8",
    "sink": "4",
    "recent": "16",
    "model": "",
    "method": "",
}


def _read_mask(load, path, data):
    """What a mask file may do: raise MaskFileError with one line that names it, or be a mask."""
    from leank import ChannelMask, MaskFileError

    path.write_bytes(data)
    try:
        mask = load(path)
    except MaskFileError as error:
        assert str(error).startswith(f"{path}: "), error
        return
    mask.save(path)
    assert ChannelMask.load(path) == mask
    if mask.sink is not None and mask.recent is not None:
        lengths = np.array([0, 100])
        assert mask.predict_memory(lengths)["total_bytes"] >= 0


def mask_file(data):
    """Bytes of a safetensors file; after `META`: changes of its metadata, then of its tensor.

    A change is a line KEY=VALUE; the lines end with an empty one.
    """
    from safetensors.numpy import save

    from leank import ChannelMask

    if data.startswith(META):
        lines, _, tensor = data[len(META) :].partition(b"\n\n")
        metadata = dict(METADATA)
        for line in lines.decode("utf-8", "replace").split("\n"):
            key, _, value = line.partition("=")
            metadata[key] = value
        shape = [int(n) for n in metadata["shape"].split(",") if n.isascii() and n.isdigit()][:4]
        shape = [min(n, 40) for n in shape]
        values = np.resize(np.frombuffer(tensor or b"\1", np.uint8) & 1, shape).astype(bool)
        data = save({"mask": values}, metadata)
    with tempfile.TemporaryDirectory() as folder:
        _read_mask(ChannelMask.load, Path(folder, "m.safetensors"), data)


def pth(data):
    """Bytes of a .pth file; after `PICKLE`: the pickle inside of one."""
    from leank import ChannelMask

    if data.startswith(PICKLE):
        file = io.BytesIO()
        with zipfile.ZipFile(file, "w") as archive:
            archive.writestr("m/data.pkl", data[len(PICKLE) :])
            archive.writestr("m/byteorder", "little")
            archive.writestr("m/data/0", np.tile(np.float32([1, 0]), 64).tobytes())
            archive.writestr("m/version", "3\n")
        data = file.getvalue()
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch's, about old formats
        _read_mask(ChannelMask.from_pth, Path(folder, "m.pth"), data)


@functools.cache
def _command():
    """The command, with those parts that load models parsed and then not run."""
    import typer.main

    from leank.cli import app

    command = typer.main.get_command(app)
    for name in ("demo", "learn", "eval"):
        command.commands[name].callback = lambda **_: None
    for part in command.commands["bench"].commands.values():
        part.callback = lambda **_: None
    return command


def cli(data):
    """Arguments of `leank`, one a line: an exit status, never an exception or "unexpected"."""
    arguments = data.decode("utf-8", "replace").replace("\0", "").split("\n")
    # Files and pictures that it would write, and devices and pipes that it would wait for.
    if any("pictures" in one or "/" in one.lstrip("./") for one in arguments):
        return
    out, before = io.StringIO(), os.getcwd()
    with tempfile.TemporaryDirectory() as folder:
        Path(folder, "m.safetensors").write_bytes(b"no mask")
        Path(folder, "text").write_text("Some text.\n")
        os.chdir(folder)
        try:
            with contextlib.redirect_stdout(out), contextlib.redirect_stderr(out):
                _command().main(args=arguments, prog_name="leank")
        except SystemExit as end:
            assert end.code in (0, 1, 2, None), end.code
        finally:
            os.chdir(before)
    assert "unexpected" not in out.getvalue().lower().replace("unexpected extra argument", "")
    assert "Traceback" not in out.getvalue()


TARGETS = {target.__name__: target for target in (mask_file, pth, cli)}


def main():
    import atheris

    if len(sys.argv) < 2 or sys.argv[1] not in TARGETS:
        sys.exit(f"expected one of {', '.join(TARGETS)}, got {sys.argv[1:2]}")
    os.environ.update(OFFLINE)
    target = TARGETS[sys.argv[1]]
    with atheris.instrument_imports(include=["leank"]):
        import leank.cli_learn
        import leank.mask_source  # noqa: F401
    atheris.Setup([sys.argv[0], *sys.argv[2:]], target)
    atheris.Fuzz()


if __name__ == "__main__":
    main()
