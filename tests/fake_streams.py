"""Streams of a device that does late what it is asked for: a missing wait shows in the numbers.

In the place of torch.cuda for moelite.gpu.device._StreamCopies, on torch's CPU. What is queued on a
stream runs when something makes it: a lazy stream of copies runs a copy only when it is waited for,
an eager one as soon as its own waits allow. The experts' products are queued, too, and run at the
latest when their sum is wanted. Everything else is computed at once, as the host asks for it.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch.overrides import TorchFunctionMode

from moelite.gpu import device as device_file
from moelite.gpu.decoder import DeviceDecoder
from moelite.gpu.experts import DeviceExperts


class Stream:
    """Work in order: `done` of the `asked` pieces have run."""

    def __init__(self, streams: Streams, name: str, *, eager: bool) -> None:
        self._streams, self.name, self._eager = streams, name, eager
        self._queue: deque[Callable[[], None]] = deque()
        self.asked = self.done = 0

    def put(self, work: Callable[[], None]) -> None:
        self._queue.append(work)
        self.asked += 1
        if self._eager:
            self.run()

    def run(self, until: int | None = None) -> None:
        while self._queue and (until is None or self.done < until):
            work = self._queue.popleft()
            work()  # may run another stream, which may want what ran here
            self.done += 1

    def record_event(self) -> Event:
        return Event(self, self.asked)

    def wait_event(self, event: Event) -> None:
        self._streams.log.append(f"{self.name} waits for {event.stream.name} {event.count}")
        self.put(event.synchronize)

    def wait_stream(self, other: Stream) -> None:
        self.wait_event(other.record_event())

    def synchronize(self) -> None:
        self.run()


class Event:
    """What a stream was asked for up to a moment."""

    def __init__(self, stream: Stream, count: int) -> None:
        self.stream, self.count = stream, count

    def query(self) -> bool:
        return self.stream.done >= self.count

    def synchronize(self) -> None:
        self.stream.run(self.count)


class Streams:
    """As the module torch.cuda, as far as _StreamCopies knows it. log: what was asked for and what
    was done, in order."""

    def __init__(self, *, eager: bool) -> None:
        self.log: list[str] = []
        self._eager = eager
        self._current = self.computing = Stream(self, "computing", eager=False)

    def Stream(self, device: Any) -> Stream:
        return Stream(self, "copies", eager=self._eager)

    def current_stream(self) -> Stream:
        return self._current

    @contextmanager
    def stream(self, stream: Stream) -> Iterator[None]:
        before, self._current = self._current, stream
        try:
            with _Late(self):
                yield
        finally:
            self._current = before


class _Late(TorchFunctionMode):
    """While entered, copies into a tensor are queued."""

    def __init__(self, streams: Streams) -> None:
        super().__init__()
        self._streams = streams

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is not torch.Tensor.copy_:
            return func(*args, **(kwargs or {}))
        to, source = args
        assert kwargs == {"non_blocking": True}  # else the host would wait for each
        streams = self._streams

        def copy() -> None:
            streams.log.append("copied")
            to.copy_(source)

        streams.current_stream().put(copy)
        return to


def install(patch: pytest.MonkeyPatch, *, eager: bool) -> Streams:
    """From now on, models on torch:cpu copy on a stream, and compute experts late."""
    streams = Streams(eager=eager)
    patch.setattr(torch, "late", streams, raising=False)
    patch.setattr(
        device_file,
        "_PlainCopies",
        lambda: device_file._StreamCopies(SimpleNamespace(type="late")),  # type: ignore[arg-type]
    )

    def late(name: str) -> None:
        work = getattr(DeviceExperts, name)

        def put(self: Any, layer: int, *rest: Any) -> None:
            def compute() -> None:
                streams.log.append(f"computed {name}")
                work(self, layer, *rest)

            streams.computing.put(compute)

        patch.setattr(DeviceExperts, name, put)

    late("_one")
    late("_many")
    add = DeviceDecoder._add

    def added(self: Any, *args: Any) -> None:
        streams.computing.run()
        add(self, *args)

    patch.setattr(DeviceDecoder, "_add", added)
    return streams
