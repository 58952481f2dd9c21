"""Which device computes: names, and what is there, found without importing torch."""

from __future__ import annotations

import ctypes.util
import importlib.util
import sys
from pathlib import Path
from typing import NamedTuple

from moelite.errors import UsageError
from moelite.units import MIB

NAMES = ("auto", "cpu", "cuda", "mps", "xpu", "torch:cpu")

# What a CUDA context takes beside torch's allocator, by the driver's own count: docs/log/gpu.md
CONTEXT_BYTES = 512 * MIB


class Free(NamedTuple):
    """Video memory: all of it, and what nobody holds now. name: the card's."""

    total_bytes: int
    free_bytes: int
    name: str


def choose(name: str) -> str | None:
    """The device that a --device names, None for the CPU path. Raises UsageError.

    auto is a CUDA device where torch and a driver are there, else the CPU path. cuda:1 is the
    second card.
    """
    kind, _, number = name.partition(":")
    if name not in NAMES and not (kind in {"cuda", "xpu"} and number.isdigit()):
        raise UsageError(f"device {name!r} is not known", fix=f"one of {', '.join(NAMES)}")
    if name == "cpu":
        return None
    if name == "auto":
        return _found()
    if importlib.util.find_spec("torch") is None:
        raise UsageError(
            f"--device {name} needs torch", fix="pip install 'moelite[gpu]', or --device cpu"
        )
    import torch

    missing = {
        "cuda": not torch.cuda.is_available(),
        "mps": not torch.backends.mps.is_available(),
        "xpu": not torch.xpu.is_available(),
    }.get(kind, False)
    if missing:
        raise UsageError(
            f"torch {torch.__version__} finds no {kind} device here",
            fix="--device cpu, or install a torch build for it (pytorch.org)",
        )
    count = getattr(torch, kind).device_count() if kind in {"cuda", "xpu"} else 1
    if number.isdigit() and int(number) >= count:
        raise UsageError(f"device {name!r} is not there: {count} found", fix=f"{kind}:0")
    return name


def torch_name(name: str) -> str:
    """What torch calls a device that `choose` gave."""
    return name.removeprefix("torch:")


def _found() -> str | None:
    if importlib.util.find_spec("torch") is None or not _driver():
        return None
    import torch

    return "cuda" if torch.cuda.is_available() else None


def _driver() -> bool:
    """Whether a driver for a card is there, so that torch is worth importing."""
    if sys.platform.startswith("linux"):
        cards = Path("/dev/nvidiactl"), Path("/dev/dxg"), Path("/dev/kfd")
        return any(card.exists() for card in cards)
    return sys.platform == "win32" and ctypes.util.find_library("nvcuda") is not None


def video_memory(name: str) -> Free | None:
    """What a card has and what is free: by NVIDIA's library, which needs no context, else by torch.

    None where nobody can tell: torch's own CPU, and mps, which shares the machine's memory.
    """
    kind, _, number = name.partition(":")
    if kind == "cuda" and (found := _by_nvml(int(number or 0))) is not None:
        return found
    if kind not in {"cuda", "xpu"}:
        return None
    import torch

    streams = getattr(torch, kind)
    free, total = streams.mem_get_info(int(number or 0))
    return Free(total, free, streams.get_device_name(int(number or 0)))


def _by_nvml(number: int) -> Free | None:
    try:
        import pynvml
    except ImportError:
        return None
    try:
        pynvml.nvmlInit()
        try:
            card = pynvml.nvmlDeviceGetHandleByIndex(number)
            info, label = pynvml.nvmlDeviceGetMemoryInfo(card), pynvml.nvmlDeviceGetName(card)
        finally:
            pynvml.nvmlShutdown()
    except (pynvml.NVMLError, ValueError):
        return None
    return Free(int(info.total), int(info.free), str(label))
