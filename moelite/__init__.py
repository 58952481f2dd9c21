"""Run a mixture-of-experts language model that is bigger than your computer's memory.

    import moelite

    with moelite.load("store", ram="4GiB") as model:
        print(model.generate("Hello").text)

Public names load on first use, so that `import moelite` costs neither numba nor a compiled kernel.
"""

from __future__ import annotations

import importlib
import logging
from typing import TYPE_CHECKING, Any

from moelite.errors import (
    BudgetError,
    CheckpointError,
    DownloadError,
    MoeliteError,
    OfflineError,
    QuantizationError,
    StoreError,
    UnsupportedError,
    UsageError,
    VerificationError,
)

if TYPE_CHECKING:
    from moelite import quant
    from moelite.budget import Footprint
    from moelite.convert import quantize
    from moelite.engine import Model, load
    from moelite.generate import Completion, SamplingOptions
    from moelite.session import Session
    from moelite.sizing import footprint

    __version__: str

__all__ = [
    "BudgetError",
    "CheckpointError",
    "Completion",
    "DownloadError",
    "Footprint",
    "Model",
    "MoeliteError",
    "OfflineError",
    "QuantizationError",
    "SamplingOptions",
    "Session",
    "StoreError",
    "UnsupportedError",
    "UsageError",
    "VerificationError",
    "__version__",
    "footprint",
    "load",
    "quant",
    "quantize",
]

_LAZY = {
    "Completion": "moelite.generate",
    "Footprint": "moelite.budget",
    "Model": "moelite.engine",
    "SamplingOptions": "moelite.generate",
    "Session": "moelite.session",
    "footprint": "moelite.sizing",
    "load": "moelite.engine",
    "quantize": "moelite.convert",
}

logging.getLogger("moelite").addHandler(logging.NullHandler())


def __getattr__(name: str) -> Any:
    if name == "__version__":
        from importlib.metadata import version

        value: Any = version("moelite")
    elif name == "quant":
        value = importlib.import_module("moelite.quant")
    elif name in _LAZY:
        value = getattr(importlib.import_module(_LAZY[name]), name)
    else:
        raise AttributeError(f"module 'moelite' has no attribute {name!r}")
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
