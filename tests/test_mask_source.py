"""Every way to name a mask, and the Hugging Face Hub, which no test reaches."""

import builtins
import json
import types

import pytest

pytest.importorskip("safetensors")
pytest.importorskip("huggingface_hub.errors")
hub = pytest.importorskip("huggingface_hub")

import leank  # noqa: E402
from leank import ChannelMask, MaskFileError, load_mask  # noqa: E402
from leank.mask_source import FILE  # noqa: E402

from .test_shipped import leank_masks, some_mask  # noqa: E402

COMMIT = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture(autouse=True)
def offline(monkeypatch, tmp_path):
    """A cache of huggingface_hub without a file, and no way to the network."""
    monkeypatch.setattr(hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def cached(tmp_path):
    """A repository in that cache, as it is laid out after a download; returns its mask."""
    folder = tmp_path / "hub" / "models--org--name"
    for revision in ("main", "v1"):
        path = folder / "refs" / revision
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(COMMIT)
    path = folder / "snapshots" / COMMIT / "leank_mask.safetensors"  # documented, so not FILE
    path.parent.mkdir(parents=True)
    some_mask().save(path)
    return some_mask()


def downloads(monkeypatch, result):
    """Let hf_hub_download return or raise; returns the list of its calls."""
    calls = []

    def download(*args, **options):
        calls.append((args, options))
        if isinstance(result, Exception):
            raise result
        return str(result)

    monkeypatch.setattr(hub, "hf_hub_download", download)
    return calls


@pytest.mark.parametrize("name", ["org/name", "org/name@v1", f"org/name@{COMMIT}"])
def test_offline_from_the_cache(cached, name):
    assert load_mask(name) == cached


def test_revision_as_an_argument(cached):
    assert load_mask("org/name", revision="v1") == cached
    with pytest.raises(MaskFileError, match="^org/name@v2: .* was never read before"):
        load_mask("org/name", revision="v2")


def test_what_the_hub_is_asked_for(monkeypatch, tmp_path):
    some_mask().save(tmp_path / "mask.safetensors")
    calls = downloads(monkeypatch, tmp_path / "mask.safetensors")
    for words in (("org/name",), ("org/na.me-1@refs/pr/1",)):
        assert load_mask(*words) == some_mask()
    load_mask("org/name", revision="abc")
    assert calls == [
        (("org/name", FILE), {"revision": None}),
        (("org/na.me-1", FILE), {"revision": "refs/pr/1"}),
        (("org/name", FILE), {"revision": "abc"}),
    ]


def http_error(kind):
    response = types.SimpleNamespace(headers={}, request=None, status_code=404, text="said")
    return kind("said", response=response)


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (http_error(hub.errors.RepositoryNotFoundError), "no such repository .* unless .* private"),
        (http_error(hub.errors.GatedRepoError), "asks for a token .*HF_TOKEN"),
        (http_error(hub.errors.RevisionNotFoundError), "the repository has no such revision"),
        (
            http_error(hub.errors.RemoteEntryNotFoundError),
            "expected a file leank_mask.safetensors in the repository, got none",
        ),
        (hub.errors.LocalEntryNotFoundError("said"), "cannot be reached .*HF_HUB_OFFLINE"),
        (hub.errors.OfflineModeIsEnabled("said"), "cannot be reached .*HF_HUB_OFFLINE"),
        (http_error(hub.errors.HfHubHTTPError), "the Hugging Face Hub answered: said"),
    ],
)
def test_errors_of_the_hub(monkeypatch, error, message):
    downloads(monkeypatch, error)
    with pytest.raises(MaskFileError, match=f"^org/name@v1: .*{message}") as caught:
        load_mask("org/name@v1")
    assert caught.value.__cause__ is error


def test_the_real_client_offline_and_unknown():
    with pytest.raises(MaskFileError, match="^org/name: no such file, .* cannot be reached"):
        load_mask("org/name")
    with pytest.raises(
        MaskFileError, match="^org/-name: no such file, and no name of a repository"
    ):
        load_mask("org/-name")


def test_without_huggingface_hub(monkeypatch):
    real = builtins.__import__

    def fail(name, *args, **options):
        if name.partition(".")[0] == "huggingface_hub":
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
        return real(name, *args, **options)

    monkeypatch.setattr(builtins, "__import__", fail)
    with pytest.raises(
        ModuleNotFoundError, match="Hub needs huggingface_hub: pip install 'leank.hub"
    ):
        load_mask("org/name")


def test_a_file_is_meant_if_there_is_one(tmp_path, monkeypatch):
    calls = downloads(monkeypatch, ValueError("not asked"))
    (tmp_path / "org").mkdir()
    some_mask().save("org/name")
    for name in ("org/name", tmp_path / "org" / "name", "./org/name"):
        assert load_mask(name) == some_mask()
    for name in ("org/mask.safetensors", "org/mask.pth", "./org/other", tmp_path / "a", "a/b/c"):
        with pytest.raises(FileNotFoundError):
            load_mask(name)
    assert calls == []


def test_shipped_names():
    name = "smollm2-135m-instruct-70"
    assert load_mask(name) == leank.shipped.load(name)
    with pytest.raises(
        MaskFileError, match="^smollm2-x: no such file, and as a name: expected one"
    ):
        load_mask("smollm2-x")


def test_revision_of_what_has_none(tmp_path):
    some_mask().save(tmp_path / "mask.safetensors")
    for name in ("mask.safetensors", "smollm2-135m-instruct-70", tmp_path / "none"):
        with pytest.raises(ValueError, match="^revision: expected None because .* got 'v1'"):
            load_mask(name, revision="v1")
    with pytest.raises(ValueError, match="^revision: expected None with org/name@v1, got 'v2'"):
        load_mask("org/name@v1", revision="v2")


def test_push(monkeypatch):
    seen = []

    class Api:
        def create_repo(self, repo_id, **options):
            seen.append((repo_id, options))

        def upload_file(self, *, path_or_fileobj, **options):
            seen.append((ChannelMask.load(path_or_fileobj), options))
            return types.SimpleNamespace(commit_url="address")

    monkeypatch.setattr(hub, "HfApi", Api)
    assert some_mask().push_to_hub("org/name", revision="v1", private=True) == "address"
    assert seen[0] == ("org/name", {"private": True, "exist_ok": True})
    mask, options = seen[1]
    assert mask == some_mask()
    message = options.pop("commit_message")
    assert message.startswith("Upload <ChannelMask SmolLM2-135M-Instruct")
    assert options == {"path_in_repo": FILE, "repo_id": "org/name", "revision": "v1"}


# ----------------------------------------------------------------------- where masks are named


def test_leank_masks_tells_of_any(cached, tmp_path):
    some_mask(sink=None).save(tmp_path / "bare.safetensors")
    for name, window in (("org/name", "the first 64 and"), ("bare.safetensors", "not known")):
        result = leank_masks(name)
        assert result.exit_code == 0, result.output
        words = " ".join(result.stdout.split())
        assert f"window {window}" in words and "16.67% (83.33% dropped)" in words
        assert "learned" not in words
    said = json.loads(leank_masks("org/name", "--json").stdout)
    assert said["kept_k"] == cached.keep.mean() and said["name"] == "org/name"
    for name, message in (
        ("org/none", "org/none: no such file"),
        ("none.pth", "none.pth: No such"),
    ):
        result = leank_masks(name)
        assert result.exit_code == 2 and message in result.stderr


def test_patch_takes_a_repository(tmp_path):
    pytest.importorskip("transformers")
    from .tiny_models import pruned, tiny

    folder = tmp_path / "hub" / "models--org--tiny"
    (folder / "refs").mkdir(parents=True)
    (folder / "refs" / "main").write_text(COMMIT)
    (folder / "snapshots" / COMMIT).mkdir(parents=True)
    pruned().save(folder / "snapshots" / COMMIT / FILE)
    model = tiny()
    for name, options in (
        ("org/tiny", {}),
        (f"org/tiny@{COMMIT}", {}),
        ("org/tiny", {"revision": "main"}),
    ):
        with leank.patch(model, name, **options) as handle:
            assert handle.mask == pruned()
    with pytest.raises(MaskFileError, match="^org/none: no such file"):
        leank.patch(model, "org/none")
    with pytest.raises(ValueError, match="revision: expected None with a ChannelMask, got 'v1'"):
        leank.patch(model, pruned(), revision="v1")
