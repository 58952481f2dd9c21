"""What a Device asks of a driver that is not here: a stand-in for torch.cuda keeps the order."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from moelite.errors import UsageError  # noqa: E402
from moelite.gpu.device import Device, Link, captured, timed  # noqa: E402
from moelite.gpu.plan import CONTEXT_BYTES  # noqa: E402
from moelite.units import GIB  # noqa: E402

pytestmark = pytest.mark.parity


class Card:
    """torch.cuda or torch.xpu, as far as Device knows it; log: all that was asked, in order."""

    def __init__(self) -> None:
        self.log: list[str] = []
        self.now = self._stream_of("computing")
        self.refuses = 0  # what cudaHostRegister answers
        self.capturing: BaseException | None = None  # raised while a graph is made

    def _stream_of(self, name: str) -> Any:
        card = self

        class Stream:
            def __init__(self, device: Any = None) -> None:
                self.name = "side" if device is not None else name

            def wait_stream(self, other: Any) -> None:
                card.log.append(f"{self.name} waits for {other.name}")

            def synchronize(self) -> None:
                card.log.append(f"{self.name} is through")

        self.Stream = Stream
        return Stream()

    def current_stream(self) -> Any:
        return self.now

    @contextmanager
    def stream(self, stream: Any) -> Iterator[None]:
        before, self.now = self.now, stream
        yield
        self.now = before

    def CUDAGraph(self) -> Any:
        return SimpleNamespace(replay=lambda: self.log.append("replayed"))

    @contextmanager
    def graph(self, graph: Any) -> Iterator[None]:
        self.log.append("capturing")
        if self.capturing is not None:
            raise self.capturing
        yield
        self.log.append("captured")

    def get_device_properties(self, device: Any) -> Any:
        return SimpleNamespace(total_memory=24 * GIB)

    def set_per_process_memory_fraction(self, share: float, device: Any) -> None:
        self.log.append(f"at most {share:.4f} of {device}")

    def synchronize(self, device: Any) -> None:
        self.log.append(f"{device} is through")

    def max_memory_allocated(self, device: Any) -> int:
        return 123

    def empty_cache(self) -> None:
        self.log.append("emptied")

    def cudart(self) -> Any:
        def register(address: int, size: int, flags: int) -> int:
            self.log.append(f"pin {address} {size}")
            return self.refuses

        return SimpleNamespace(
            cudaHostRegister=register,
            cudaHostUnregister=lambda address: self.log.append(f"unpin {address}"),
        )


@pytest.fixture
def card(monkeypatch: pytest.MonkeyPatch) -> Card:
    made = Card()
    for kind in ("cuda", "xpu"):
        monkeypatch.setattr(torch, kind, made)
    return made


@pytest.mark.parametrize(
    ("bound", "share"),
    [(6 * GIB, (6 * GIB - CONTEXT_BYTES) / (24 * GIB)), (1 << 20, 0.0), (99 * GIB, 1.0)],
)
def test_torchs_own_memory_is_bound_beside_the_context(
    card: Card, bound: int, share: float
) -> None:
    Device("cuda:1", bound)
    assert card.log == [f"at most {share:.4f} of cuda:1"]


def test_what_is_pinned_is_given_back_after_the_copies_from_it(card: Card) -> None:
    device, block, other = Device("cuda", GIB), np.zeros(4096, np.uint8), np.zeros(8, np.uint8)
    card.log.clear()
    assert device.pin(block)
    card.refuses = 1
    assert not device.pin(other)
    device.close()
    device.close()
    at = block.ctypes.data
    pinned = [f"pin {at} 4096", f"pin {other.ctypes.data} 8"]
    assert card.log == [*pinned, "side is through", f"unpin {at}", "side is through"]


def test_memory_of_other_devices_is_neither_bound_nor_pinned(card: Card) -> None:
    device = Device("xpu", GIB)
    assert not device.pin(np.zeros(4096, np.uint8))
    assert card.log == []
    assert not Device("torch:cpu", GIB).pin(np.zeros(4096, np.uint8))


@pytest.mark.parametrize("kind", ["cuda", "xpu"])
def test_a_streamed_device_is_waited_for_and_tells_its_peak(card: Card, kind: str) -> None:
    device = Device(kind, GIB)
    card.log.clear()
    assert device.streamed
    assert timed(device, lambda: card.log.append("work")) > 0
    assert card.log == [f"{kind} is through", "work", f"{kind} is through"]
    assert device.peak_bytes() == 123
    device.drop_cached()
    assert card.log[-1] == "emptied"


def test_mps_is_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    device, waited = Device("mps", GIB), []
    monkeypatch.setattr(torch.mps, "synchronize", lambda: waited.append(1))
    assert not device.streamed
    device.synchronize()
    assert waited == [1]
    assert device.peak_bytes() is None


def test_a_link_is_simulated_on_the_cpu_alone(card: Card) -> None:
    with pytest.raises(UsageError, match="simulated link needs torch:cpu, not cuda"):
        Device("cuda", GIB, Link(1e9))


def test_what_a_device_holds_is_bound() -> None:
    device = Device("torch:cpu", 1000)
    held = device.zeros((10, 20), torch.float32)
    with pytest.raises(torch.OutOfMemoryError, match=r"800 B \+ 201 B exceed 1000 B"):
        device.zeros((201,), torch.uint8)
    assert device.held == 800
    device.give_back(held)
    device.zeros((1000,), torch.uint8)
    assert device.held == 1000


# --- graphs -------------------------------------------------------------------------------------


def test_a_graph_is_made_after_work_that_ran_on_a_stream_beside(card: Card) -> None:
    device = Device("cuda", GIB)
    card.log.clear()
    replay = captured(device, lambda: card.log.append(f"work on {card.now.name}"))
    replay()
    assert card.log == [
        "side waits for computing",
        "work on side",
        "work on side",
        "computing waits for side",
        "capturing",
        "work on computing",
        "captured",
        "replayed",
    ]


def test_without_a_graph_the_work_is_done_as_it_is(card: Card) -> None:
    def work() -> None:
        card.log.append("work")

    assert captured(Device("torch:cpu", GIB), work) is work
    assert captured(Device("xpu", GIB), work) is work
    card.capturing = RuntimeError("operation not permitted")
    with pytest.warns(RuntimeWarning, match="no CUDA graph could be made: operation not"):
        assert captured(Device("cuda", GIB), work) is work
    card.capturing = torch.OutOfMemoryError("out of memory")
    with pytest.raises(torch.OutOfMemoryError):  # the decoder then makes room
        captured(Device("cuda", GIB), work)
