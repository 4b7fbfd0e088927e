"""Hub references in the local Hugging Face cache: ``org/name[@revision]`` to the folder of a snapshot. No network."""

from __future__ import annotations

import os
import re
from pathlib import Path

from ..errors import InputError

__all__ = ["cache_folder", "looks_like_hub", "snapshot"]

_PART = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,95}")
_COMMIT = re.compile(r"[0-9a-f]{40}")
_REVISION = re.compile(r"[A-Za-z0-9][A-Za-z0-9._/-]{0,199}")


def looks_like_hub(reference: str) -> bool:
    """Whether `reference` has the form ``org/name``."""
    parts = reference.split("/")
    return len(parts) == 2 and all(_PART.fullmatch(p) and ".." not in p and "--" not in p for p in parts)


def cache_folder() -> Path:
    """The hub cache: HF_HUB_CACHE, else HF_HOME/hub, else the user's cache folder."""
    environ = os.environ
    explicit = environ.get("HF_HUB_CACHE") or environ.get("HUGGINGFACE_HUB_CACHE")
    if explicit:
        return Path(explicit).expanduser()
    home = environ.get("HF_HOME")
    if not home:
        home = os.path.join(environ.get("XDG_CACHE_HOME") or "~/.cache", "huggingface")
    return Path(home).expanduser() / "hub"


def snapshot(reference: str, revision: str | None = None) -> Path:
    """The folder of the cached snapshot of ``org/name`` at `revision` (a branch, tag or commit; "main" if None).

    Raises
    ------
    InputError : it is not in the cache; the hint is the command that downloads it.
    """
    wanted = revision or "main"
    if not _REVISION.fullmatch(wanted) or ".." in wanted.split("/"):
        raise InputError("not a revision of a hub model", code="hub.revision", got=repr(wanted))
    folder = cache_folder() / ("models--" + reference.replace("/", "--"))
    commit: str | None = wanted
    if not _COMMIT.fullmatch(wanted):
        try:
            commit = (folder / "refs" / wanted).read_text().strip()
        except (OSError, UnicodeDecodeError):
            commit = None
    if commit is not None and _COMMIT.fullmatch(commit):
        path = folder / "snapshots" / commit
        if path.is_dir():
            return path
    at = f" at revision '{revision}'" if revision else ""
    raise InputError(
        f"model '{reference}'{at} is neither a local folder nor in the hub cache",
        code="hub.missing",
        hint=f"Download it with: {download_command(reference, revision)}",
    )


def download_command(reference: str, revision: str | None = None) -> str:
    """The command that puts the model into the local cache."""
    return f"hf download {reference}" + (f" --revision {revision}" if revision else "")
