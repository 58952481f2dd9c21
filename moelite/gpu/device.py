"""A torch device: its memory within a bound, and copies to it that run beside computing.

Every part also runs with torch's "cpu" device, where a link of a given speed can be simulated:
tests see overlap and waiting there as on a GPU.
"""

from __future__ import annotations

import threading
import time
import warnings
from collections.abc import Callable, Sequence
from queue import SimpleQueue
from typing import Any, NamedTuple, Protocol

import torch

from moelite.cache.upper import Arrival
from moelite.errors import UsageError
from moelite.gpu.devices import torch_name
from moelite.gpu.plan import CONTEXT_BYTES
from moelite.quant.base import U8
from moelite.units import show_bytes

STREAMED = ("cuda", "xpu")  # devices that copy on a stream of their own


class Copies(Protocol):
    """Copies from memory to the device, in order, several under way."""

    def start(self, to: torch.Tensor, source: torch.Tensor) -> Arrival:
        """Begins to copy; after all that was computed so far, which may still read `to`."""
        ...

    def close(self) -> None: ...


class Link(NamedTuple):
    """A simulated connection: bytes a second, and seconds until a copy that is through shows."""

    bytes_s: float
    latency_s: float = 0.0


# --- streams ------------------------------------------------------------------------------------


class _Event:
    """An arrival on a stream."""

    __slots__ = ("_event", "_streams")

    def __init__(self, event: Any, streams: Any) -> None:
        self._event, self._streams = event, streams

    def gate(self) -> None:
        self._streams.current_stream().wait_event(self._event)

    def landed(self) -> bool:
        return bool(self._event.query())

    def wait(self) -> None:
        self._event.synchronize()


class _StreamCopies:
    """Copies on a stream beside the one that computes. torch.cuda and torch.xpu name it alike."""

    def __init__(self, device: torch.device) -> None:
        self._streams = getattr(torch, device.type)
        self._stream = self._streams.Stream(device)

    def start(self, to: torch.Tensor, source: torch.Tensor) -> Arrival:
        self._stream.wait_stream(self._streams.current_stream())
        with self._streams.stream(self._stream):
            to.copy_(source, non_blocking=True)
            return _Event(self._stream.record_event(), self._streams)

    def close(self) -> None:
        self._stream.synchronize()


# --- without streams ----------------------------------------------------------------------------


class _There:
    """A copy that was finished when it was asked for."""

    def gate(self) -> None:
        pass

    def landed(self) -> bool:
        return True

    def wait(self) -> None:
        pass


class _PlainCopies:
    """Copies one after another, on the caller's thread."""

    def start(self, to: torch.Tensor, source: torch.Tensor) -> Arrival:
        to.copy_(source)
        return _There()

    def close(self) -> None:
        pass


class _Parcel:
    """A copy over a simulated link."""

    __slots__ = ("_there", "asked", "at", "source", "to")

    def __init__(self, to: torch.Tensor, source: torch.Tensor) -> None:
        self.to, self.source = to, source
        self.asked = time.perf_counter()
        self.at = float("inf")  # when it shows
        self._there = threading.Event()

    def arrive(self, at: float) -> None:
        self.at = at
        self._there.set()

    def gate(self) -> None:
        self.wait()

    def landed(self) -> bool:
        return self._there.is_set() and time.perf_counter() >= self.at

    def wait(self) -> None:
        self._there.wait()
        if (left := self.at - time.perf_counter()) > 0:  # sleep(0) takes 70 us
            time.sleep(left)


class _SimulatedCopies:
    """A thread that copies at a link's pace: one copy at a time has the link, latencies overlap."""

    def __init__(self, link: Link) -> None:
        self._link = link
        self._queue: SimpleQueue[_Parcel | None] = SimpleQueue()
        self._thread = threading.Thread(target=self._run, name="moelite-link", daemon=True)
        self._thread.start()

    def start(self, to: torch.Tensor, source: torch.Tensor) -> Arrival:
        parcel = _Parcel(to, source)
        self._queue.put(parcel)
        return parcel

    def close(self) -> None:
        self._queue.put(None)
        self._thread.join()

    def _run(self) -> None:
        free = 0.0  # when the link is
        while (parcel := self._queue.get()) is not None:
            # from when it was asked for: this thread wakes up a tenth of a millisecond late
            free = max(free, parcel.asked) + parcel.to.numel() / self._link.bytes_s
            parcel.to.copy_(parcel.source)
            time.sleep(max(0.0, free - time.perf_counter()))
            parcel.arrive(free + self._link.latency_s)


# --- a device -----------------------------------------------------------------------------------


class Device:
    """Where torch computes. name: as --device takes it, "torch:cpu" for torch's own CPU.

    bound: bytes that `zeros` may hold, all together; more is refused as a device that
    is full refuses it, by torch.OutOfMemoryError. link: simulated, on the CPU alone.
    """

    def __init__(self, name: str, bound: int, link: Link | None = None) -> None:
        self.name, self.torch = name, torch.device(torch_name(name))
        self.bound, self.held = bound, 0
        kind = self.torch.type
        if link is not None and kind != "cpu":
            raise UsageError(f"a simulated link needs torch:cpu, not {name}")
        self.copies: Copies
        if kind in STREAMED:
            self.copies = _StreamCopies(self.torch)
        elif link is not None:
            self.copies = _SimulatedCopies(link)
        else:
            self.copies = _PlainCopies()
        self._pinned: list[int] = []
        if kind == "cuda":  # what torch keeps for later counts, too
            total = torch.cuda.get_device_properties(self.torch).total_memory
            share = max(0.0, min(1.0, (bound - CONTEXT_BYTES) / total))
            torch.cuda.set_per_process_memory_fraction(share, self.torch)

    @property
    def streamed(self) -> bool:
        """Whether computing returns before it is done."""
        return self.torch.type in STREAMED

    def zeros(self, shape: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
        """A buffer that lasts, counted against the bound."""
        size = dtype.itemsize
        for n in shape:
            size *= n
        if self.held + size > self.bound:
            raise torch.OutOfMemoryError(
                f"{show_bytes(self.held)} + {show_bytes(size)} exceed {show_bytes(self.bound)}"
            )
        made = torch.zeros(shape, dtype=dtype, device=self.torch)
        self.held += size
        return made

    def give_back(self, tensor: torch.Tensor) -> None:
        """Counts a buffer no more; drop it."""
        self.held -= tensor.numel() * tensor.element_size()

    def pin(self, block: U8) -> bool:
        """Makes copies from a block of memory run beside everything else; whether that was done."""
        if self.torch.type != "cuda":
            return False
        failed = _cudart().cudaHostRegister(block.ctypes.data, block.size, 0)
        if int(failed):
            return False  # copies from it are then staged by the driver: slower, not wrong
        self._pinned.append(block.ctypes.data)
        return True

    def synchronize(self) -> None:
        """Returns once all that was asked for is computed."""
        if self.streamed:
            getattr(torch, self.torch.type).synchronize(self.torch)
        elif self.torch.type == "mps":
            torch.mps.synchronize()

    def peak_bytes(self) -> int | None:
        """The most that torch's allocator has held on the device; None where it does not count."""
        if self.streamed:
            return int(getattr(torch, self.torch.type).max_memory_allocated(self.torch))
        return None

    def drop_cached(self) -> None:
        """Gives back what torch's allocator keeps for later."""
        if self.streamed:
            getattr(torch, self.torch.type).empty_cache()

    def close(self) -> None:
        """Ends copies; memory that was pinned is no longer."""
        self.copies.close()
        for address in self._pinned:
            _cudart().cudaHostUnregister(address)
        self._pinned = []


def _cudart() -> Any:
    return torch.cuda.cudart()  # type: ignore[no-untyped-call]


def captured(device: Device, work: Callable[[], None]) -> Callable[[], object]:
    """`work` as one launch, where the device can keep it (a CUDA graph); else as it is.

    work reads and writes buffers that stay where they are, and never looks at a result.
    """
    if device.torch.type != "cuda":
        return work
    try:
        return _graph_of(device, work)
    except torch.OutOfMemoryError:
        raise
    except RuntimeError as problem:
        warnings.warn(f"no CUDA graph could be made: {problem}", RuntimeWarning, stacklevel=2)
        return work


def _graph_of(device: Device, work: Callable[[], None]) -> Callable[[], object]:
    side = torch.cuda.Stream(device.torch)  # type: ignore[no-untyped-call]
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):  # what is compiled or set up at first use must not be captured
        work()
        work()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        work()
    return graph.replay


def timed(device: Device, work: Callable[[], object]) -> float:
    """Seconds that `work` takes on the device, the host's part included."""
    device.synchronize()
    start = time.perf_counter()
    work()
    device.synchronize()
    return time.perf_counter() - start
