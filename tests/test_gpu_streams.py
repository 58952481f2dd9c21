"""Copies on a stream of their own, on a device that does everything as late as it may: the numbers
are right, and wrong as soon as one wait is left out."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import tiny_checkpoint

import moelite

torch = pytest.importorskip("torch")

import fake_streams  # noqa: E402
from link_overlap import Told  # noqa: E402

from moelite.cache import UpperCache  # noqa: E402
from moelite.gpu.decoder import DeviceDecoder  # noqa: E402
from moelite.gpu.device import _Event, _StreamCopies  # noqa: E402

pytestmark = pytest.mark.parity
EXPERTS, LAYERS = 12, 3
IDS = np.random.default_rng(3).integers(3, 100, 40).tolist()
PIECES = (9, *[1] * 8, 12, *[1] * 4, 7)


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("streams")
    config = {**tiny_checkpoint.QWEN3_MOE, "moe_intermediate_size": 64, "num_experts": EXPERTS}
    tiny_checkpoint.write_checkpoint(folder / "c", {**config, "mlp_only_layers": []})
    (folder / "c" / "tokenizer.json").unlink()
    moelite.quantize(folder / "c", folder / "s", experts="int8", dense="int8")
    return folder / "s"


@pytest.fixture(scope="module")
def want(store: Path) -> np.ndarray:
    return logits(store, 1000)


def loaded(store: Path, slots: int, *, ram: str | int = "1GiB", **options: Any) -> Any:
    """A model with room for `slots` experts on the device, at least two."""
    how: dict[str, Any] = {"context": 64, "threads": 1, "device": "torch:cpu", "miss": "copy"}
    with moelite.load(store, **how, ram="1GiB", vram="1GiB") as model:
        found = model.footprint
    room = found.device.minimum_bytes + (slots - 2) * found.record_bytes
    if ram == "least":
        ram = found.minimum_bytes
    return moelite.load(store, **how, ram=ram, vram=room, **options)


def logits(store: Path, slots: int, **how: Any) -> np.ndarray:
    with loaded(store, slots, **how) as model:
        session, at, found = model.session(), 0, []
        for size in PIECES:
            found.append(session.append(IDS[at : at + size]))
            at += size
    return np.concatenate(found)


@pytest.mark.parametrize("eager", [False, True])
@pytest.mark.parametrize(("slots", "ram"), [(2, "1GiB"), (6, "1GiB"), (10, "least"), (20, "1GiB")])
@pytest.mark.parametrize("lookahead", ["off", "on"])
def test_late_copies_and_late_computing_give_the_same_bits(
    store: Path,
    want: np.ndarray,
    monkeypatch: pytest.MonkeyPatch,
    eager: bool,
    slots: int,
    ram: str,
    lookahead: str,
) -> None:
    streams = fake_streams.install(monkeypatch, eager=eager)
    got = logits(store, slots, ram=ram, lookahead=lookahead)
    np.testing.assert_array_equal(got, want)
    assert streams.log.count("copied") > EXPERTS


def no_gate(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(_Event, "gate", lambda self: None)


def no_wait_for_computing(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(fake_streams.Stream, "wait_stream", lambda self, other: None)


def event_of_the_wrong_stream(patch: pytest.MonkeyPatch) -> None:
    def start(self: Any, to: Any, source: Any) -> _Event:
        streams = self._streams
        self._stream.wait_stream(streams.current_stream())
        with streams.stream(self._stream):
            to.copy_(source, non_blocking=True)
        return _Event(streams.current_stream().record_event(), streams)

    patch.setattr(_StreamCopies, "start", start)


def no_wait_before_a_slot_below_is_overwritten(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(UpperCache, "_left", lambda self, page: None)


@pytest.mark.parametrize(
    ("bug", "slots", "ram", "eager"),
    [
        (no_gate, 6, "1GiB", False),
        (no_wait_for_computing, 4, "1GiB", True),
        (event_of_the_wrong_stream, 6, "1GiB", False),
        (no_wait_before_a_slot_below_is_overwritten, 10, "least", False),
    ],
)
def test_a_wait_that_is_left_out_shows(
    store: Path,
    want: np.ndarray,
    monkeypatch: pytest.MonkeyPatch,
    bug: Callable[[pytest.MonkeyPatch], None],
    slots: int,
    ram: str,
    eager: bool,
) -> None:
    fake_streams.install(monkeypatch, eager=eager)
    bug(monkeypatch)
    assert not np.array_equal(logits(store, slots, ram=ram), want)


# --- what is asked for, in order ----------------------------------------------------------------


def test_a_copy_waits_for_computing_and_what_follows_for_the_copy() -> None:
    streams = fake_streams.Streams(eager=False)
    patch = pytest.MonkeyPatch()
    with patch.context() as now:
        now.setattr(torch, "late", streams, raising=False)
        copies = _StreamCopies(SimpleNamespace(type="late"))  # type: ignore[arg-type]
    to, source = torch.zeros(4), torch.ones(4)
    streams.computing.put(lambda: streams.log.append(f"saw {int(to[0])}"))
    first = copies.start(to, source)
    second = copies.start(to, 2 * source)
    assert not first.landed()
    first.gate()
    streams.computing.put(lambda: streams.log.append(f"saw {int(to[0])}"))
    streams.computing.run()
    assert first.landed()
    assert not second.landed()
    second.wait()
    assert int(to[0]) == 2
    third = copies.start(to, 3 * source)
    copies.close()
    assert third.landed()
    assert streams.log == [
        "copies waits for computing 1",
        "copies waits for computing 1",
        "computing waits for copies 2",
        "saw 0",
        "copied",
        "saw 1",
        "copied",
        "copies waits for computing 3",
        "copied",
    ]


def test_a_chunk_computes_an_expert_before_it_needs_the_next_copy(
    store: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing waits for more copies than the expert that comes next."""
    streams = fake_streams.install(monkeypatch, eager=False)
    every = np.arange(EXPERTS, dtype=np.int32).reshape(-1, 2)
    with loaded(store, 8) as model:
        model.force_routes(np.stack([every] * LAYERS, axis=1).astype(np.int32))
        session = model.session()
        session.advance(IDS[: len(every)])
        streams.log.clear()
        session.advance(IDS[: len(every)])
    kinds = [entry.partition(" ")[0] for entry in streams.log if "wait" not in entry]
    ahead = kept = 0
    for kind in kinds:
        ahead += 1 if kind == "copied" else -1
        kept = min(kept, ahead)  # those that were there need no copy
        assert ahead - kept <= 1
    assert kinds.count("computed") == EXPERTS * LAYERS


def test_what_was_guessed_comes_while_the_layer_before_is_computed(
    store: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Before a token's first expert of a layer is computed, all copies of the next have begun."""
    streams = fake_streams.install(monkeypatch, eager=False)
    order = np.arange(EXPERTS, dtype=np.int32).reshape(-1, 1, 2).repeat(LAYERS, axis=1)
    with loaded(store, 8, lookahead="on") as model:
        model.force_routes(order)
        session = model.session()
        session.advance(IDS[: len(order)])  # memory has them all then
        teller = Told(1.0, order, EXPERTS)
        monkeypatch.setattr(DeviceDecoder, "_next_guess", lambda *args: teller.guess(*args))
        for token in range(len(order)):
            streams.log.clear()
            session.advance(IDS[token : token + 1])
            begun, seen = 0, []
            for entry in streams.log:
                begun += entry.startswith("copies waits")
                seen += [begun] if entry.startswith("computed") else []
            assert begun == 2 * LAYERS
            # a layer's experts come piece by piece, or both at once
            assert sorted(set(seen)) == [4, 6]
        assert model.lookahead.recall == 1.0


def test_a_tokens_experts_are_split_where_computing_takes_longer_than_asking(
    store: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for seconds, piece in ((lambda n: 1.0 + n, 1), (lambda n: 3.5 + n, 2), (lambda n: 9.0, 2)):

        def timed(device: Any, work: Callable[[], object], seconds: Any = seconds) -> float:
            calls: list[int] = []
            with monkeypatch.context() as patch:
                patch.setattr(
                    "moelite.gpu.experts.DeviceExperts._one",
                    lambda self, layer, ranked, inputs: calls.append(len(ranked)),
                )
                work()
            return float(seconds(calls[0]))

        with loaded(store, 6) as model, monkeypatch.context() as patch:
            patch.setattr("moelite.gpu.experts.timed", timed)
            model._on_device.set_piece(0, 2)
            assert model._on_device.piece == piece


def test_a_chunks_first_layer_is_fetched_before_it_is_routed(
    store: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """If the chunk before, of no more tokens, used nearly all of it."""
    every = np.arange(EXPERTS, dtype=np.int32).reshape(-1, 2)
    begun: list[int] = []
    with loaded(store, 8) as model:
        model.force_routes(np.stack([every] * LAYERS, axis=1).astype(np.int32))
        decoder, attention = model._decoder, model._decoder._attention

        def attending(i: int, *args: Any) -> None:
            if i == 0:
                begun.append(len(model.upper._ahead))
            attention(i, *args)

        monkeypatch.setattr(decoder, "_attention", attending)
        session = model.session()
        for tokens in (len(every), len(every), 3, len(every), 1, len(every), len(every) + 1):
            session.advance(IDS[:tokens])
    assert [count > 0 for count in begun] == [False, True, False, False, False, True, True]
