"""Which device computes: names, and what is there, found without importing torch."""

from __future__ import annotations

import ctypes.util
import importlib.util
import sys
from pathlib import Path
from typing import Any, NamedTuple

from moelite.errors import UsageError

NAMES = ("auto", "cpu", "cuda", "mps", "xpu", "torch:cpu")
LANE_BYTES_S = {1: 0.25e9, 2: 0.5e9, 3: 0.985e9, 4: 1.969e9, 5: 3.938e9, 6: 7.56e9}  # PCI-SIG


class Free(NamedTuple):
    """Video memory: all of it, and what nobody holds now. name: the card's.

    memory_bytes_s, link_bytes_s: what its memory and its slot give at best, by clocks and widths;
    None if nobody tells.
    """

    total_bytes: int
    free_bytes: int
    name: str
    memory_bytes_s: float | None = None
    link_bytes_s: float | None = None


class Place(NamedTuple):
    """A device to plan for. free: None where nobody can tell; here: whether it was found."""

    name: str
    free: Free | None = None
    here: bool = True


def choose(name: str) -> str | None:
    """The device that a --device names, None for the CPU path. Raises UsageError.

    auto is a CUDA device where torch and a driver are there, else the CPU path. cuda:1 is the
    second card.
    """
    kind, number = _known(name)
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


def seek(name: str) -> Place | None:
    """As `choose`, to plan for a device that may be elsewhere; None for the CPU path.

    Torch is imported only where a device may be here and NVIDIA's library does not tell of it.
    """
    kind, number = _known(name)
    if name in {"auto", "cpu"}:
        chosen = choose(name)
        return None if chosen is None else Place(chosen, video_memory(chosen))
    if kind == "cuda":
        free = _by_nvml(int(number or 0))
        if free is not None or not _driver():
            return Place(name, free, free is not None)
    try:
        choose(name)
    except UsageError:
        return Place(name, None, False)
    return Place(name, video_memory(name))


def check(device: str | None, vram: str | int | None, *, low: bool) -> None:
    """Refuses what goes with no device, or not with one. device: as `choose` gave it."""
    if low and device is not None:
        raise UsageError(
            f"on_miss low answers from memory on the CPU, not on {device}",
            fix="--device cpu, or --on-miss wait",
        )
    if vram is not None and device is None:
        raise UsageError(
            "--vram is for a device, and the CPU computes here",
            fix="leave it out, or name one with --device",
        )


def _known(name: str) -> tuple[str, str]:
    kind, _, number = name.partition(":")
    if name not in NAMES and not (kind in {"cuda", "xpu"} and number.isdigit()):
        raise UsageError(f"device {name!r} is not known", fix=f"one of {', '.join(NAMES)}")
    return kind, number


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
            memory, link = _memory_speed(pynvml, card), _link_speed(pynvml, card)
        finally:
            pynvml.nvmlShutdown()
    except (pynvml.NVMLError, ValueError):
        return None
    return Free(int(info.total), int(info.free), str(label), memory, link)


def _memory_speed(nvml: Any, card: Any) -> float | None:
    """Two transfers a clock over the whole bus: 936 GB/s of an RTX 3090 (384 bits, 9751 MHz)."""
    try:
        bits = nvml.nvmlDeviceGetMemoryBusWidth(card)
        mhz = nvml.nvmlDeviceGetMaxClockInfo(card, nvml.NVML_CLOCK_MEM)
    except nvml.NVMLError:
        return None
    return 2e6 * mhz * bits / 8 or None


def _link_speed(nvml: Any, card: Any) -> float | None:
    """Of the slot, one way: 31.5 GB/s of 16 lanes of PCIe 4."""
    try:
        generation = nvml.nvmlDeviceGetMaxPcieLinkGeneration(card)
        lanes = nvml.nvmlDeviceGetMaxPcieLinkWidth(card)
    except nvml.NVMLError:
        return None
    return LANE_BYTES_S.get(generation, 0.0) * lanes or None
