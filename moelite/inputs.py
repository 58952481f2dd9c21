"""What a user names as a model: a folder, a file, a hub id, the built-in model, or a store."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

from platformdirs import user_cache_path

from moelite.checkpoint import Source
from moelite.hub import Progress, resolve
from moelite.sources import open_folder, read_small
from moelite.storefile import MANIFEST, FileEntry, Manifest, read_json, read_manifest

BUILTIN = "smollm2-moe"


def open_source(
    src: Source | str | Path, *, offline: bool = False, progress: Progress | None = None
) -> Source:
    """The checkpoint that `src` means: a folder, a GGUF file, a hub id, "smollm2-moe", or a Source
    itself. Quantized ones are decoded as they are read.
    """
    if not isinstance(src, str | Path):
        return src
    if str(src) == BUILTIN and not Path(src).exists():
        from moelite.demo import open_builtin

        def fetching(done: int, total: int) -> None:
            if progress is not None:
                progress(done, total, "fetching the base model")

        found: Source = open_builtin(user_cache_path("moelite"), offline=offline, progress=fetching)
        return found
    return open_folder(resolve(str(src), offline=offline, progress=progress))


class Facts(NamedTuple):
    """What small files tell of a model. manifest: None for what is not a store."""

    config: dict[str, Any]
    tokenizer_bytes: int
    manifest: Manifest | None = None


def read_config(path: str | Path, *, offline: bool = False) -> Facts:
    """The facts of a store or a checkpoint. Of a hub id only the small files are fetched."""
    folder = Path(path).expanduser()
    if (folder / MANIFEST).exists():
        manifest = read_manifest(folder / MANIFEST)
        size = manifest.files.get("tokenizer.json", FileEntry(bytes=0, sha256="")).bytes
        return Facts(read_json(folder / "config.json"), size, manifest)
    if not folder.exists() and str(path) == BUILTIN:
        source = open_source(BUILTIN, offline=offline)
        return Facts(source.config, len(source.files.get("tokenizer.json", b"")))
    folder = resolve(str(path), offline=offline, weights=False)
    files, config = read_small(folder)
    return Facts(config, len(files.get("tokenizer.json", b"")))
