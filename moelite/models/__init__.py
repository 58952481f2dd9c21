"""Architectures: one file each, named after the config's `model_type` and found by that name.

Each file offers `build(raw: Mapping[str, Any]) -> Arch`. A leading underscore marks shared parts.
"""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

from moelite.arch import Arch
from moelite.config import HFConfig, short
from moelite.errors import UnsupportedError


def supported() -> tuple[str, ...]:
    """The model types that can be built, sorted."""
    files = Path(__file__).parent.glob("*.py")
    return tuple(sorted(f.stem for f in files if not f.stem.startswith("_")))


def build(raw: Mapping[str, Any]) -> Arch:
    """The architecture that a config.json describes.

    Raises UnsupportedError naming the model type or setting that is not implemented, and
    CheckpointError naming a value that is missing, malformed or out of range.
    """
    model_type = HFConfig(raw).text("model_type")
    if model_type not in supported():
        raise UnsupportedError(
            f"model_type {short(model_type)} is not supported; supported: {', '.join(supported())}",
            fix="use a checkpoint of one of these architectures",
        )
    return cast(Arch, importlib.import_module(f"{__name__}.{model_type}").build(raw))
