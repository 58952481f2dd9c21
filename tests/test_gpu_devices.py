"""Which device is chosen, and what its library tells, with stand-ins for both."""

from __future__ import annotations

import ctypes.util
import importlib.util
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

torch = pytest.importorskip("torch")

from moelite.errors import UsageError  # noqa: E402
from moelite.gpu import devices  # noqa: E402
from moelite.gpu.devices import Free, Place, choose, seek, video_memory  # noqa: E402

pytestmark = pytest.mark.parity


class NVMLError(Exception):
    pass


class Library:
    """NVIDIA's, of two cards; `fails`: the functions that refuse. log: what was called."""

    NVMLError = NVMLError
    NVML_CLOCK_MEM = 2

    def __init__(self) -> None:
        self.fails: set[str] = set()
        self.log: list[str] = []

    def __getattr__(self, name: str) -> Any:
        answers: dict[str, Any] = {
            "Init": None,
            "Shutdown": None,
            "DeviceGetMemoryInfo": SimpleNamespace(total=900, free=700),
            "DeviceGetName": "a card",
            "DeviceGetMemoryBusWidth": 384,
            "DeviceGetMaxClockInfo": 9751,
            "DeviceGetMaxPcieLinkGeneration": 4,
            "DeviceGetMaxPcieLinkWidth": 16,
        }
        name = name.removeprefix("nvml")

        def call(*args: Any) -> Any:
            self.log.append(f"{name}{args}")
            if name in self.fails:
                raise NVMLError(name)
            return args[0] if name == "DeviceGetHandleByIndex" else answers[name]

        return call


@pytest.fixture
def library(monkeypatch: pytest.MonkeyPatch) -> Library:
    made = Library()
    monkeypatch.setitem(sys.modules, "pynvml", made)
    return made


@pytest.fixture
def here(monkeypatch: pytest.MonkeyPatch) -> dict[str, int]:
    """Which devices torch finds: {kind: how many}."""
    found: dict[str, int] = {}

    def streams(kind: str) -> Any:
        return SimpleNamespace(
            is_available=lambda: found.get(kind, 0) > 0,
            device_count=lambda: found[kind],
            mem_get_info=lambda number: (300 + number, 500),
            get_device_name=lambda number: f"{kind} {number}",
        )

    for kind in ("cuda", "xpu"):
        monkeypatch.setattr(torch, kind, streams(kind))
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: found.get("mps", 0) > 0)
    return found


def test_a_device_is_chosen_that_is_there(here: dict[str, int]) -> None:
    here |= {"cuda": 2, "xpu": 1, "mps": 1}
    for name in ("cuda", "cuda:0", "cuda:1", "xpu", "xpu:0", "mps", "torch:cpu"):
        assert choose(name) == name
    with pytest.raises(UsageError, match="'cuda:2' is not there: 2 found") as refused:
        choose("cuda:2")
    assert refused.value.fix == "cuda:0"
    with pytest.raises(UsageError, match="'xpu:1' is not there: 1 found"):
        choose("xpu:1")
    for name in ("cuda:", "cuda:x", "mps:0", "torch", "gpu"):
        with pytest.raises(UsageError, match="is not known"):
            choose(name)


def test_a_device_that_is_not_there_is_refused(
    here: dict[str, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("cuda", "mps", "xpu"):
        with pytest.raises(UsageError, match=f"finds no {name} device here"):
            choose(name)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UsageError, match="cuda needs torch"):
        choose("cuda")
    assert choose("auto") is None
    assert choose("cpu") is None


def test_auto_is_a_cuda_device_where_a_driver_and_torch_have_one(
    here: dict[str, int], library: Library, monkeypatch: pytest.MonkeyPatch
) -> None:
    driver = [False]
    monkeypatch.setattr(devices, "_driver", lambda: driver[0])
    here["cuda"] = 1
    assert choose("auto") is None
    assert seek("auto") is None
    driver[0] = True
    assert choose("auto") == "cuda"
    assert seek("auto") == Place("cuda", video_memory("cuda"))
    here["cuda"] = 0
    assert choose("auto") is None


def test_what_is_sought_may_be_elsewhere(
    here: dict[str, int], library: Library, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(devices, "_driver", lambda: True)
    found = seek("cuda:1")
    assert found is not None
    assert found.here
    assert found.free is not None
    assert found.free.free_bytes == 700
    assert "DeviceGetHandleByIndex(1,)" in library.log
    library.fails.add("Init")  # a driver of another make: torch may know
    assert seek("cuda") == Place("cuda", None, False)
    here["cuda"] = 1
    assert seek("cuda") == Place("cuda", Free(500, 300, "cuda 0"))
    monkeypatch.setattr(devices, "_driver", lambda: False)
    assert seek("cuda") == Place("cuda", None, False)
    assert seek("xpu") == Place("xpu", None, False)
    here["xpu"] = 1
    assert seek("xpu") == Place("xpu", Free(500, 300, "xpu 0"))
    assert seek("torch:cpu") == Place("torch:cpu", None)


def test_nvidias_library_is_asked_and_let_go_of(library: Library) -> None:
    want = Free(900, 700, "a card", 2e6 * 9751 * 384 / 8, 16 * 1.969e9)
    assert video_memory("cuda:1") == want
    assert library.log[0] == "Init()"
    assert library.log[1] == "DeviceGetHandleByIndex(1,)"
    assert library.log[-1] == "Shutdown()"
    # speeds that it does not know, as those of a virtual card, leave the rest known
    library.fails = {"DeviceGetMaxClockInfo", "DeviceGetMaxPcieLinkWidth"}
    assert video_memory("cuda:1") == want._replace(memory_bytes_s=None, link_bytes_s=None)


@pytest.mark.parametrize("fails", ["Init", "DeviceGetHandleByIndex", "DeviceGetMemoryInfo"])
def test_where_nvidias_library_fails_torch_is_asked(
    here: dict[str, int], library: Library, fails: str
) -> None:
    library.fails.add(fails)
    assert video_memory("cuda:1") == Free(500, 301, "cuda 1")
    assert ("Shutdown()" in library.log) == (fails != "Init")


def test_nobody_tells_of_memory_that_is_shared(here: dict[str, int]) -> None:
    assert video_memory("mps") is None
    assert video_memory("torch:cpu") is None


def test_a_driver_is_a_file_or_a_library(monkeypatch: pytest.MonkeyPatch) -> None:
    there: set[str] = set()
    monkeypatch.setattr(Path, "exists", lambda self: str(self) in there)
    monkeypatch.setattr(sys, "platform", "linux")
    assert not devices._driver()
    for card in ("/dev/nvidiactl", "/dev/dxg", "/dev/kfd"):
        there.add(card)
        assert devices._driver()
        there.clear()
    monkeypatch.setattr(sys, "platform", "win32")
    monkeypatch.setattr(ctypes.util, "find_library", lambda name: None)
    assert not devices._driver()
    monkeypatch.setattr(ctypes.util, "find_library", lambda name: f"{name}.dll")
    assert devices._driver()
    monkeypatch.setattr(sys, "platform", "darwin")
    assert not devices._driver()
