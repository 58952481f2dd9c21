"""Copies over a simulated link run beside computing; misses are computed where it is faster."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import moelite

torch = pytest.importorskip("torch")

import link_overlap  # noqa: E402

from moelite.gpu.device import Device, Link  # noqa: E402
from moelite.gpu.host import HostExperts  # noqa: E402

pytestmark = pytest.mark.parity
# `python tests/link_overlap.py` on a quiet machine: docs/log/gpu.md. Other programs run beside
# these tests, so bounds are loose and the best of some tries counts; what is computed beside which
# copy tests/test_gpu_streams.py knows exactly.
TRIES = 3
CHUNK_OVER, TOKEN_OVER, GAIN = 1.2, 1.5, 1.02


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.set_num_threads(1)
    return link_overlap.write(tmp_path_factory.mktemp("link"))


def test_a_simulated_link_keeps_its_pace() -> None:
    device = Device("torch:cpu", 1 << 20, Link(1e6, 0.02))
    source, to = torch.arange(20_000).to(torch.uint8), torch.zeros(20_000, dtype=torch.uint8)
    start = time.perf_counter()
    copies = [device.copies.start(to[i : i + 5000], source[i : i + 5000]) for i in (0, 5000, 10000)]
    assert time.perf_counter() - start < 0.005  # nobody waits yet
    assert not copies[0].landed()
    copies[0].gate()
    first = time.perf_counter() - start
    copies[2].wait()
    last = time.perf_counter() - start
    device.close()
    # 5 ms each on the link one after another, 20 ms more until it shows
    assert 0.025 <= first < 0.035
    assert 0.035 <= last < 0.045
    assert torch.equal(to[:15000], source[:15000])


@pytest.mark.parametrize("share", [0.5, 0.9, 2.0])
def test_a_prompt_takes_as_long_as_the_longer_of_copies_and_computing(
    store: Path, share: float
) -> None:
    assert any(link_overlap.prompt(store, share).over < CHUNK_OVER for _ in range(TRIES))


@pytest.mark.parametrize("recall", [1.0, 0.78])
def test_a_token_whose_experts_were_guessed_takes_as_long_as_the_longer(
    store: Path, recall: float
) -> None:
    tries = (link_overlap.token(store, 1.0, "on", recall) for _ in range(TRIES))
    assert any(seen.over < TOKEN_OVER for seen in tries)


def test_lookahead_hides_copies_behind_the_layer_before(store: Path) -> None:
    def faster() -> bool:
        off, on = (link_overlap.token(store, 1.0, lookahead, 1.0) for lookahead in ("off", "on"))
        assert on.recall == 1.0
        assert off.recall is None
        return on.step * GAIN < off.step

    assert any(faster() for _ in range(TRIES))


def test_a_simulated_link_rests_only_where_nothing_is_asked_for() -> None:
    """Copies asked for at once take what their bytes take, however late its thread wakes up."""
    device = Device("torch:cpu", 1 << 20, Link(1e6))
    source, to = torch.zeros(40_000, dtype=torch.uint8), torch.zeros(40_000, dtype=torch.uint8)
    copies = [
        device.copies.start(to[i : i + 1000], source[i : i + 1000]) for i in range(0, 40_000, 1000)
    ]
    copies[-1].wait()
    device.close()
    free = 0.0
    for copy in copies:
        free = max(free, copy.asked) + 1e-3
        assert copy.at == pytest.approx(free, abs=1e-9)


def seconds(store: Path, miss: str, link: Link) -> tuple[float, Any]:
    how: dict[str, Any] = {"ram": "2GiB", "context": 512, "threads": 1, "device": "torch:cpu"}
    with moelite.load(store, **how, vram="2GiB", miss="copy") as model:
        plan, record = model.footprint.device, model.footprint.record_bytes
    room = plan.minimum_bytes + 20 * record
    with moelite.load(store, **how, vram=room, miss=miss, link=link) as model:
        session = model.session()
        session.advance(np.random.default_rng(1).integers(3, 500, 60))
        split = model.upper.split
        ids = np.random.default_rng(2).integers(3, 500, 12).tolist()
        times = []
        for token in ids:
            start = time.perf_counter()
            session.advance([token])
            times.append(time.perf_counter() - start)
        return float(np.median(times)), split


@pytest.mark.parametrize(("bytes_s", "faster"), [(6e6, "cpu"), (2e10, "copy")])
def test_misses_go_where_they_are_ready_sooner(
    store: Path, bytes_s: float, faster: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A record of 48 KiB takes 8 ms over the one link, next to nothing over the other, and 3 ms on
    a CPU that is made to be slow."""
    compute = HostExperts.compute

    def slow(self: Any, layer: int, x: Any, experts: Any) -> Any:
        time.sleep(0.003 * len(experts))
        return compute(self, layer, x, experts)

    monkeypatch.setattr(HostExperts, "compute", slow)
    link = Link(bytes_s, 1e-6)
    auto, split = seconds(store, "auto", link)
    assert split.copied(4) == {"cpu": 1, "copy": 4}[faster]  # one copy hides behind three computed
    slower = {"cpu": "copy", "copy": "cpu"}[faster]
    assert auto < 0.8 * seconds(store, slower, link)[0]
