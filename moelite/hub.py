"""From a name to a folder: a local path, or `org/name[@revision]` through huggingface_hub's cache.

Only safetensors, configs, templates and tokenizer files of the repository's top folder are fetched.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from moelite.errors import CheckpointError, DownloadError, MoeliteError, OfflineError

_SMALL = ("*.json", "*.jinja", "tokenizer*", "merges.txt", "vocab*")
# subfolders and Mistral's second copy hold the same weights once more
_IGNORED = ("*/*", "consolidated*")
_HUB_ID = re.compile(r"(\w[\w.-]*/[\w.-]+)(?:@([\w./-]+))?")

Progress = Callable[[int, int, str], None]  # (bytes done, bytes in all, what is being done)


def resolve(
    name: str, *, offline: bool, progress: Progress | None = None, weights: bool = True
) -> Path:
    """A local path (a checkpoint's folder, a GGUF file) as it is, else the snapshot of a hub id.

    weights=False fetches the small files only.

    Raises CheckpointError (no such folder, or no safetensors in the repository), OfflineError (not
    in the local cache) or DownloadError.
    """
    local = Path(name).expanduser()
    if local.exists():
        return local
    if name.endswith(".gguf"):
        raise CheckpointError(
            f"there is no file {name}", fix="check the path; a GGUF is read from your own disk"
        )
    match = _HUB_ID.fullmatch(name)
    if match is None:
        raise CheckpointError(
            f"{name!r} is neither a folder nor a hub id", fix="write org/name, or check the path"
        )
    folder = _snapshot(match[1], match[2], offline, progress, weights)
    if weights and not any(folder.glob("*.safetensors")):
        raise CheckpointError(
            f"{name} holds no safetensors files; moelite never opens pickled weights",
            fix="use one that has model.safetensors, or download its GGUF file and name that",
        )
    return folder


def _snapshot(
    repo: str, revision: str | None, offline: bool, progress: Progress | None, weights: bool
) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    # httpx or httpx2, as the hub's version has it
    transport: type[BaseException] = next(
        c for c in HfHubHTTPError.__mro__ if c.__name__ == "HTTPError"
    )
    patterns = [*_SMALL, "*.safetensors"] if weights else list(_SMALL)
    try:
        return Path(
            snapshot_download(
                repo,
                revision=revision,
                local_files_only=offline,
                allow_patterns=patterns,
                ignore_patterns=list(_IGNORED),
                tqdm_class=_reporter(progress),
            )
        )
    except LocalEntryNotFoundError as problem:
        raise _absent(repo, offline, problem) from problem
    except HFValidationError as problem:
        raise CheckpointError(f"{repo!r} is no hub id: {problem}") from problem
    except (transport, OSError) as problem:
        raise DownloadError(
            f"{repo} could not be fetched from the hub: {_first_line(problem)}",
            fix=_advice(problem),
        ) from problem


def _absent(repo: str, offline: bool, problem: Exception) -> MoeliteError:
    """Not cached: because we may not ask the hub, or because the hub did not answer."""
    from huggingface_hub.errors import OfflineModeIsEnabled

    if offline or isinstance(problem.__cause__, OfflineModeIsEnabled):
        return OfflineError(
            f"{repo} is not (completely) in the local cache, and the network is off",
            fix="run once without --offline (and without HF_HUB_OFFLINE)",
        )
    return DownloadError(
        f"the hub did not deliver {repo}: {_first_line(problem)}",
        fix="check the connection and try again; what has arrived is kept",
    )


def _advice(problem: BaseException) -> str:
    from huggingface_hub.errors import (
        GatedRepoError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    if isinstance(problem, GatedRepoError):
        return "accept its licence on the hub, then `hf auth login`"
    if isinstance(problem, RevisionNotFoundError):
        return "check the revision after the @"
    if isinstance(problem, RepositoryNotFoundError):
        return "check the spelling; for a private repository, `hf auth login`"
    return "check the connection and the free disk space, then try again; what has arrived is kept"


def _first_line(problem: BaseException) -> str:
    return next(
        (line for line in str(problem).splitlines() if line.strip()), type(problem).__name__
    )


def _reporter(progress: Progress | None) -> type[Any]:
    """A silent progress bar class that tells `progress` about the one bar that counts bytes."""
    from huggingface_hub.utils.tqdm import tqdm

    class Reporter(tqdm):
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            self._counts = kwargs.get("unit") == "B" and not str(kwargs.get("name", "")).endswith(
                "transfer"
            )
            self._done = 0
            kwargs["disable"] = True
            super().__init__(*args, **kwargs)  # type: ignore[no-untyped-call]

        def update(self, n: float | None = 1) -> None:
            self._done += int(n or 0)
            if self._counts and progress is not None:
                progress(self._done, int(self.total or 0), "downloading")

    return Reporter
