"""`moelite demo-checkpoint`: the built-in model as an ordinary checkpoint."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from moelite.cli.common import progress, stderr_console


def demo_checkpoint(
    folder: Annotated[Path, typer.Argument(help="A new folder.", show_default=False)],
) -> None:
    """Write the built-in model as a Hugging Face checkpoint, for other programs to load."""
    from moelite.demo import write_checkpoint

    with progress(stderr_console(), "writing") as update:
        write_checkpoint(folder, progress=update)
    print(folder)
