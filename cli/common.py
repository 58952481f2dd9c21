"""What the commands share: options, folders, and finding the model that a name means."""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from moelite.errors import UsageError

if TYPE_CHECKING:
    from rich.console import Console

    from moelite.engine import Model

BUILTIN = "smollm2-moe"
STDERR = 2  # file descriptor
KV = Literal["f16", "int8", "f32"]

ModelArgument = Annotated[
    str | None,
    typer.Argument(
        help=f"A store, a checkpoint folder or a hub id (org/name[@revision]). Default: {BUILTIN}.",
        show_default=False,
    ),
]
RamOption = Annotated[
    str | None,
    typer.Option(
        "--ram",
        metavar="SIZE",
        help="Memory for everything, e.g. 4GiB or 50%. Default: four fifths of what is free.",
        show_default=False,
    ),
]
ContextOption = Annotated[
    int | None,
    typer.Option(
        "--context",
        metavar="TOKENS",
        help="Prompt and answers together. Default: 4096, or fewer if the model knows fewer.",
        show_default=False,
    ),
]
ThreadsOption = Annotated[
    int | None,
    typer.Option("--threads", metavar="N", help="Default: one per core.", show_default=False),
]
KVOption = Annotated[
    KV, typer.Option("--kv", help="Format of the keys and values that attention keeps.")
]
ReadsOption = Annotated[
    Literal["auto", "direct", "page-cache"],
    typer.Option("--reads", help="Read experts past the system's page cache, or through it."),
]
LookaheadOption = Annotated[
    Literal["auto", "on", "off"],
    typer.Option("--lookahead", help="Read ahead what the next layer will perhaps need."),
]
OnMissOption = Annotated[
    Literal["wait", "low"],
    typer.Option(
        "--on-miss",
        help="Wait for an expert that is not in memory, or take its low plane (tokens change).",
    ),
]
DeviceOption = Annotated[
    str,
    typer.Option(
        "--device",
        metavar="NAME",
        help="auto, cpu, cuda (cuda:1), mps, xpu, or torch:cpu. auto: cuda where torch finds one.",
    ),
]
VramOption = Annotated[
    str | None,
    typer.Option(
        "--vram",
        metavar="SIZE",
        help="Memory of the device for everything. Default: nine tenths of what is free there.",
        show_default=False,
    ),
]
MissOption = Annotated[
    Literal["auto", "copy", "cpu"],
    typer.Option(
        "--miss",
        help="Where an expert that is not on the device is computed: copied there, on the CPU, or "
        "where it is ready sooner.",
    ),
]
RecipeOption = Annotated[
    str | None,
    typer.Option(
        "--recipe",
        metavar="FILE|NAME",
        help="Formats by kind, layer and expert, instead of --experts and --dense.",
        show_default=False,
    ),
]
OfflineOption = Annotated[
    bool, typer.Option("--offline", help="Use what is on this machine; never the network.")
]


def cache_folder() -> Path:
    """Where built and quantized models are kept. MOELITE_HOME moves it."""
    return _folder("cache")


def state_folder() -> Path:
    """Where the input history and saved conversations are kept. MOELITE_HOME moves it."""
    return _folder("state")


def _folder(kind: Literal["cache", "state"]) -> Path:
    import platformdirs

    home = os.environ.get("MOELITE_HOME")
    if home:
        return Path(home).expanduser() / kind
    if kind == "cache":
        return platformdirs.user_cache_path("moelite")
    return platformdirs.user_state_path("moelite")


def stderr_console() -> Console:
    """Notes for people, beside what stdout carries."""
    from rich.console import Console

    return Console(stderr=True, highlight=False, soft_wrap=True)


def is_store(path: Path) -> bool:
    """Whether a folder is a finished store."""
    return (path / "moelite.json").is_file()


def find_store(name: str | None, *, offline: bool, console: Console) -> Path:
    """The store that `name` means; a checkpoint is quantized into the cache folder first.

    name: a store's folder, a checkpoint's folder, a hub id, or None for the built-in model.
    """
    if name is None or name == BUILTIN:
        return _builtin(console, offline=offline)
    path = Path(name).expanduser()
    if is_store(path):
        return path
    if path.is_file():
        raise UsageError(f"{name} is a file", fix="name the model's folder")
    if path.is_dir():
        slug = f"{path.resolve().name}-{_fingerprint(path)}"
        return _quantized(path, slug, console, offline=offline)
    if name.startswith((".", "/", "~")) or name.count("/") != 1:
        raise UsageError(
            f"there is no folder {name}",
            fix=f"name a store, a checkpoint folder, a hub id (org/name), or {BUILTIN}",
        )
    from moelite.hub import resolve

    with progress(console, "downloading") as update:
        folder = resolve(name, offline=offline, progress=update)
    slug = f"{name.partition('@')[0].replace('/', '--')}-{_fingerprint(folder)}"
    return _quantized(folder, slug, console, offline=offline)


def _builtin(console: Console, *, offline: bool) -> Path:
    """The built-in model's store; one made from other trained weights is replaced."""
    updates = files("moelite").joinpath("data/smollm2_moe.safetensors")
    slug = f"{BUILTIN}-{hashlib.sha256(updates.read_bytes()).hexdigest()[:12]}"
    for old in (cache_folder() / "stores").glob(f"{BUILTIN}-*"):
        if not old.name.startswith(slug):
            shutil.rmtree(old)
    return _quantized(BUILTIN, slug, console, offline=offline)


def _fingerprint(folder: Path) -> str:
    """Tells apart checkpoints of one name: the place, and the weights' sizes and times."""
    parts = [str(folder.resolve())]
    for file in sorted(folder.glob("*.safetensors")):
        stat = file.stat()
        parts.append(f"{file.name} {stat.st_size} {stat.st_mtime_ns}")
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()[:12]


def _quantized(source: str | Path, name: str, console: Console, *, offline: bool) -> Path:
    """The store of `source` in the cache folder; written now if it is not there."""
    from moelite.storefile import VERSION

    out = cache_folder() / "stores" / f"{name}.v{VERSION}"
    for old in (out.parent / name, *out.parent.glob(f"{name}.v*")):
        if old != out and old.is_dir():
            shutil.rmtree(old)  # made by another moelite: this one cannot read it
    if is_store(out):
        return out
    from rich.text import Text

    what = "Building the built-in model" if source == BUILTIN else "Quantizing the checkpoint"
    console.print(Text(f"{what} {Path(source).name} (once), into {out}"))
    out.parent.mkdir(parents=True, exist_ok=True)
    command = ["quantize", str(source), str(out), *(["--offline"] if offline else [])]
    # in a process of its own: what packing took must not count against the model's budget
    done = subprocess.run([sys.executable, "-m", "moelite.cli", *command], stdout=STDERR)
    if done.returncode:  # it has said why
        raise typer.Exit(abs(done.returncode))
    return out


@contextmanager
def progress(console: Console, title: str) -> Iterator[Any]:
    """A bar while something long runs; gives a function (done_bytes, total_bytes, note)."""
    from rich.progress import (
        BarColumn,
        DownloadColumn,
        Progress,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )

    columns = (
        TextColumn("  {task.description}", markup=False),
        BarColumn(bar_width=30),
        DownloadColumn(binary_units=True),
        TimeElapsedColumn(),
        TextColumn("eta", markup=False),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console, disable=not console.is_terminal) as bar:
        task = bar.add_task(title, total=None)

        def update(done: int, total: int, note: str = title) -> None:
            bar.update(task, completed=done, total=total or None, description=note)

        yield update


@contextmanager
def open_model(
    name: str | None,
    *,
    ram: str | None,
    context: int | None,
    threads: int | None,
    kv: KV,
    offline: bool,
    **options: Any,
) -> Iterator[Model]:
    """The model that `name` means, loaded within its budget; closed afterwards.

    options: further ones of moelite.engine.load.
    """
    console = stderr_console()
    store = find_store(name, offline=offline, console=console)
    from rich.markup import escape

    from moelite.engine import load

    with console.status("loading") as status:
        model = load(
            store,
            ram=ram,
            context=context,
            threads=threads,
            kv=kv,
            **options,
            on_compile=lambda note: status.update(escape(note)),
            on_note=lambda note: console.print(escape(note)),
        )
    with model:
        yield model


def both_terminals() -> bool:
    """Whether a person sits at both ends: keys come in and text goes out."""
    return sys.stdin.isatty() and sys.stdout.isatty()
