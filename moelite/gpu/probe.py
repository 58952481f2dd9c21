"""A short look at how fast a torch device is: its memory, its link, products, launches."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import NamedTuple

import torch

from moelite.gpu.device import Device, timed
from moelite.gpu.products import kernels_for
from moelite.quant import FORMATS
from moelite.units import MIB

_BYTES = 64 * MIB
_ROWS = 512  # of a square product
_LAUNCHES = 100
_PROBE_S = 0.1


class Seen(NamedTuple):
    """Bytes a second of the memory, of weights multiplied by, and over the link; multiply-adds a
    second; seconds a launch. weight_bytes_s: None where a compiler would have to run first."""

    memory_bytes_s: float
    weight_bytes_s: float | None
    link_bytes_s: float
    macs_s: float
    launch_s: float


def probe(name: str, fmt: str) -> Seen:
    """Of a device that is here. name: as `devices.choose` gave it. fmt: of the experts."""
    device = Device(name, 4 * _BYTES)
    try:
        block = device.zeros((_BYTES,), torch.uint8)
        source = torch.zeros(_BYTES // 4, dtype=torch.uint8)
        if device.torch.type == "cuda":
            source = source.pin_memory()
        to = device.zeros((source.numel(),), torch.uint8)
        link = source.numel() / best(device, lambda: to.copy_(source, non_blocking=True))
        memory, weights = read_speed(device, block), _weight_speed(device, fmt)
        return Seen(memory, weights, link, macs_speed(device), launch_seconds(device))
    finally:
        device.close()


def _weight_speed(device: Device, fmt: str) -> float | None:
    kernels = kernels_for(device.torch)
    if device.streamed or not FORMATS[fmt].exact:  # whose codes tell where rows are
        return None
    size = FORMATS[fmt].nbytes(_ROWS, _ROWS)
    packed = torch.zeros(size, dtype=torch.uint8, device=device.torch)  # as good as any numbers
    x = kernels.rounded(fmt, torch.ones((1, _ROWS), device=device.torch))
    return size / best(device, lambda: kernels.linear(fmt, x, packed, 0, _ROWS, _ROWS))


def read_speed(device: Device, block: torch.Tensor) -> float:
    """Bytes a second at which the device reads a block of its memory, uint8 of a whole number of
    pages; nothing is written."""
    words = block.view(torch.int64)
    return block.numel() / best(device, lambda: words.sum())


def macs_speed(device: Device) -> float:
    """Multiply-adds a second of a float32 product."""
    x = torch.zeros((_ROWS, _ROWS), device=device.torch)
    return _ROWS**3 / best(device, lambda: torch.matmul(x, x))


def launch_seconds(device: Device) -> float:
    """Seconds that the host takes to ask for one small operation."""
    x = torch.zeros(8, device=device.torch)

    def many() -> None:
        for _ in range(_LAUNCHES):
            x.add_(1)

    return best(device, many) / _LAUNCHES


def best(device: Device, work: Callable[[], object]) -> float:
    """Seconds that `work` takes, the least of what a tenth of a second has room for."""
    work()  # what is set up at first use
    found, until = [timed(device, work)], time.perf_counter() + _PROBE_S
    while time.perf_counter() < until:
        found.append(timed(device, work))
    return max(min(found), 1e-9)
