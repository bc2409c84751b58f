"""One function for every way to name a mask: a file, a shipped name, a Hugging Face Hub repository.

A repository holds one mask, in the file `FILE`. What talks to the Hub is huggingface_hub, which
comes with transformers; it keeps what it has read, so that a repository that was read once is there
without a network too.
"""

from __future__ import annotations

import os
import re
import tempfile
from pathlib import Path

from leank import mask_files, shipped
from leank.mask_files import MaskFileError
from leank.masks import ChannelMask

FILE = "leank_mask.safetensors"  # the name of the mask in a repository
_SUFFIXES = (".safetensors", ".pth")
_REPO = re.compile(r"(?!\.)([\w.-]+/[\w.-]+)(?:@(\S+))?")  # ./name is a path


def load_mask(name: str | os.PathLike[str], *, revision: str | None = None) -> ChannelMask:
    """
    Return the mask that a user names.

    A file is meant if there is one. Else "org/name" is a repository of the Hugging Face Hub, with
    the mask in the file ``leank_mask.safetensors``, and a name without "/" one that ``leank masks``
    lists.

    Parameters
    ----------
    name : str or path
        A file, also a ``.pth`` of the reference implementation (whose window is then unknown), a
        shipped name, or ``"org/name"``, ``"org/name@revision"``.
    revision : str, optional
        Branch, tag or commit of a repository.

    Returns
    -------
    ChannelMask

    Raises
    ------
    MaskFileError
        There is no such name or repository, it holds no mask, it cannot be reached, or the file
        cannot be used.
    OSError
        There is no such file, or it cannot be read.
    ValueError
        A revision of something that has none, or two of them.
    ModuleNotFoundError
        huggingface_hub is not installed, and the name is one of a repository.

    Examples
    --------
    >>> load_mask("smollm2-135m-instruct-70").ratio > 0.6
    True
    """
    path = Path(name)
    is_file = not isinstance(name, str) or path.exists() or path.suffix in _SUFFIXES
    repo = None if is_file else _REPO.fullmatch(name)
    if repo is not None:
        path = _download(*repo.groups(), revision)
    elif revision is not None:
        raise ValueError(
            f"revision: expected None because {name} is no repository, got {revision!r}"
        )
    elif not is_file and path.name == name:
        return _shipped(name)
    return ChannelMask.from_pth(path) if path.suffix == ".pth" else ChannelMask.load(path)


def _shipped(name: str) -> ChannelMask:
    try:
        return shipped.load(name)
    except shipped.ShippedMaskError as error:
        raise MaskFileError(f"{name}: no such file, and as a {error}") from error


def _download(repo: str, named: str | None, revision: str | None) -> Path:
    """Return the file of a repository's mask, in huggingface_hub's own cache."""
    if named is not None and revision is not None:
        raise ValueError(f"revision: expected None with {repo}@{named}, got {revision!r}")
    revision = revision or named
    hub = _hub("a mask from the Hugging Face Hub")
    errors = hub.errors
    where = repo if revision is None else f"{repo}@{revision}"
    try:
        return Path(hub.hf_hub_download(repo, FILE, revision=revision))
    except errors.HFValidationError as error:
        raise MaskFileError(
            f"{where}: no such file, and no name of a repository: {error}"
        ) from error
    except errors.GatedRepoError as error:
        raise MaskFileError(
            f"{where}: expected a repository that may be read, got one that asks for a token whose "
            "owner was given access (HF_TOKEN, or `hf auth login`)"
        ) from error
    except errors.RepositoryNotFoundError as error:
        raise MaskFileError(
            f"{where}: no such file, and no such repository on the Hugging Face Hub, unless it is "
            "private (HF_TOKEN, or `hf auth login`)"
        ) from error
    except errors.RevisionNotFoundError as error:
        raise MaskFileError(f"{where}: the repository has no such revision") from error
    except (errors.LocalEntryNotFoundError, errors.OfflineModeIsEnabled) as error:
        raise MaskFileError(
            f"{where}: no such file, and as a repository it was never read before, and the Hugging "
            "Face Hub cannot be reached (HF_HUB_OFFLINE, or no network)"
        ) from error
    except errors.EntryNotFoundError as error:
        raise MaskFileError(
            f"{where}: expected a file {FILE} in the repository, got none"
        ) from error
    except errors.HfHubHTTPError as error:
        raise MaskFileError(f"{where}: the Hugging Face Hub answered: {error}") from error


def push(
    mask: ChannelMask,
    repo: str,
    *,
    revision: str | None = None,
    private: bool | None = None,
    message: str | None = None,
) -> str:
    """Write a mask into a repository; see `leank.ChannelMask.push_to_hub`."""
    hub = _hub("writing to the Hugging Face Hub")
    api = hub.HfApi()
    api.create_repo(repo, private=private, exist_ok=True)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, FILE)
        mask.save(path)
        done = api.upload_file(
            path_or_fileobj=path,
            path_in_repo=FILE,
            repo_id=repo,
            revision=revision,
            commit_message=message or f"Upload {mask!r}",
        )
    return str(done.commit_url)


def _hub(purpose: str):
    try:
        import huggingface_hub
        import huggingface_hub.errors
    except ModuleNotFoundError as error:
        raise mask_files.missing("huggingface_hub", purpose, "hub") from error
    return huggingface_hub
