"""Times a decoder on torch's CPU whose experts come over a simulated link: what a chunk and a token
take beside their computing and their copies alone, and what a pipeline without any loss would.

An expert is tiny and takes its time asleep, as a GPU leaves the host alone: so the figures are of
how things overlap, not of what else this machine does.

    python tests/link_overlap.py
"""

from __future__ import annotations

import statistics
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import tiny_checkpoint
import torch

import moelite
from moelite.gpu import model as model_file
from moelite.gpu.decoder import DeviceDecoder
from moelite.gpu.device import Link
from moelite.gpu.products import HostKernels

EXPERTS, TOP_K, LAYERS = 20, 4, 4
CONFIG = {
    "hidden_size": 64,
    "moe_intermediate_size": 64,
    "num_experts": EXPERTS,
    "mlp_only_layers": [],
    "num_hidden_layers": LAYERS,
    "num_experts_per_tok": TOP_K,
    "num_attention_heads": 4,
    "head_dim": 16,
    "vocab_size": 500,
    "max_position_embeddings": 512,
}
CHUNK = 48  # tokens; they use all experts
RUNS, ONES = 3, 9  # chunks and tokens, of whose times the median counts
PACE_S = 0.004  # of one expert
LATENCY_S = 20e-6
ROOM = 16  # experts on the device: two slots times four for a token float, two a layer are kept


class Paced(HostKernels):
    """Kernels that take PACE_S for each expert, what this machine does for it included."""

    one = False
    _began, _owed, _down = 0.0, 0.0, False

    def linear(self, *args: Any) -> torch.Tensor:
        if self.one:
            return super().linear(*args)
        down, self._down = self._down, False
        if not down:  # of a chunk's expert, if `gated` is next
            self._began = time.perf_counter()
        found = super().linear(*args)
        if down:
            self._end(1)
        return found

    def experts(self, fmt: str, x: torch.Tensor, *args: Any, **to: Any) -> torch.Tensor:
        if not to:
            self._began = time.perf_counter()
        found = super().experts(fmt, x, *args, **to)
        if to:
            self._end(len(args[1]))
        return found

    def gated(self, both: torch.Tensor, size: int, fmt_down: str) -> torch.Tensor:
        self._down = not self.one
        return super().gated(both, size, fmt_down)

    def _end(self, experts: int) -> None:
        # sleeping takes a tenth of a millisecond too long: the next expert is as much shorter
        until = self._began + experts * PACE_S - self._owed
        time.sleep(max(0.0, until - time.perf_counter()))
        self._owed = min(time.perf_counter() - until, PACE_S / 2)


@contextmanager
def paced(tokens: int) -> Iterator[None]:
    """While entered, models compute at that pace."""
    before, Paced.one = model_file.kernels_for, tokens == 1
    model_file.kernels_for = Paced
    try:
        yield
    finally:
        model_file.kernels_for = before


class Told:
    """In the place of the router's guess of the next layer: of the experts that `routes` [N, moe
    layers, K] will have a token take, `recall` are named, the others are any that it will not."""

    def __init__(self, recall: float, routes: np.ndarray, experts: int = EXPERTS) -> None:
        self.recall, self.routes, self._experts = recall, routes, experts
        self._rng = np.random.default_rng(7)

    def guess(self, decoder: DeviceDecoder, layer: int, x: torch.Tensor) -> torch.Tensor | None:
        """As DeviceDecoder._next_guess, whose own product is made, too: it takes its time."""
        found = _guessed(decoder, layer, x)
        if found is None:
            return None
        at = int(decoder._token[1]) % len(self.routes)
        right = self.routes[at, layer + 1].tolist()
        others = [e for e in range(self._experts) if e not in right]
        self._rng.shuffle(others)
        guess = [e if self._rng.random() < self.recall else others.pop() for e in right]
        return torch.tensor([guess])


_guessed = DeviceDecoder._next_guess


@contextmanager
def told(model: Any, recall: float | None) -> Iterator[None]:
    """While entered, tokens take in turn all experts of every layer, so that none is kept until it
    is used again, and a share `recall` of guesses comes true; None: all is as the router has it."""
    if recall is None:
        yield
        return
    rng = np.random.default_rng(5)
    order = np.array([rng.permutation(EXPERTS) for _ in range(LAYERS)], np.int32)
    routes = order.reshape(LAYERS, -1, TOP_K).transpose(1, 0, 2).copy()
    model.force_routes(routes)
    teller = Told(recall, routes)
    DeviceDecoder._next_guess = (  # type: ignore[method-assign]
        lambda decoder, layer, x: teller.guess(decoder, layer, x)
    )
    try:
        yield
    finally:
        DeviceDecoder._next_guess = _guessed  # type: ignore[method-assign]


class Seen(NamedTuple):
    """Seconds of one step: all of it, its computing alone, its copies alone, and what it would take
    where nothing but knowledge keeps a copy from beginning. recall: of the guesses."""

    step: float
    compute: float
    copies: float
    ideal: float
    recall: float | None = None

    @property
    def over(self) -> float:
        """How many times as long as the longer of the two."""
        return self.step / max(self.compute, self.copies)

    @property
    def least(self) -> float:
        """`over` of a pipeline without any loss."""
        return self.ideal / max(self.compute, self.copies)


def write(folder: Path) -> Path:
    """A store of many small experts, in float32: rounding activations would take real time."""
    tiny_checkpoint.write_checkpoint(folder / "c", {**tiny_checkpoint.QWEN3_MOE, **CONFIG})
    (folder / "c" / "tokenizer.json").unlink()
    moelite.quantize(folder / "c", folder / "s", experts="f32", dense="f32")
    return folder / "s"


def _how(lookahead: str = "off") -> dict[str, Any]:
    how: dict[str, Any] = {"ram": "2GiB", "context": 512, "threads": 1, "device": "torch:cpu"}
    return {**how, "miss": "copy", "lookahead": lookahead}


def _steps(model: Any, chunk: int) -> tuple[float, float]:
    """(median seconds, mean bytes copied) of steps of `chunk` tokens, after two that warm up."""
    runs = ONES if chunk == 1 else RUNS
    ids = np.random.default_rng(0).integers(3, 500, chunk * (runs + 2)).tolist()
    session, times, copied = model.session(), [], []
    session.advance(np.random.default_rng(1).integers(3, 500, 60))  # memory has them all then
    for run in range(runs + 2):
        before = model.stats().upper.bytes_read
        start = time.perf_counter()
        session.advance(ids[run * chunk : (run + 1) * chunk])
        times.append(time.perf_counter() - start)
        copied.append(model.stats().upper.bytes_read - before)
    return statistics.median(times[2:]), statistics.mean(copied[2:])


def resident(store: Path, chunk: int, recall: float | None = None) -> float:
    """Seconds of a step with every expert on the device."""
    with (
        paced(chunk),
        moelite.load(store, **_how(), vram="2GiB") as model,
        told(model, recall),
    ):
        return _steps(model, chunk)[0]


def step(
    store: Path, chunk: int, share: float, lookahead: str = "off", recall: float | None = None
) -> Seen:
    """A step of `chunk` tokens whose copies of needed experts take `share` of its computing, with
    ROOM for few experts on the device. recall: see `told`."""
    compute = resident(store, chunk, recall)
    with moelite.load(store, **_how(), vram="2GiB") as model:
        plan, record = model.footprint.device, model.footprint.record_bytes
    kept = (ROOM - 2 * TOP_K) // LAYERS  # which a chunk finds
    needed = LAYERS * (TOP_K if chunk == 1 else EXPERTS - kept)
    link, room = (
        Link(needed * record / (share * compute), LATENCY_S),
        plan.minimum_bytes + (ROOM - 2) * record,
    )
    with (
        paced(chunk),
        moelite.load(store, **_how(lookahead), vram=room, link=link) as model,
        told(model, recall),
    ):
        took, copied = _steps(model, chunk)
        known = model.lookahead.recall
    each = copied / record / LAYERS, record / link.bytes_s
    ahead = chunk > 1 or recall == 1.0
    return Seen(took, compute, copied / link.bytes_s, ideal(chunk, compute, *each, ahead), known)


def ideal(chunk: int, compute: float, copies: float, copy_s: float, ahead: bool) -> float:
    """Seconds of a step with endless slots and no time but for computing and copying.

    A layer routes, computes what is there, then each of `copies` experts as it comes. ahead: its
    copies begin as soon as the layer before has routed, or, for a chunk, at any time.
    """
    experts = TOP_K if chunk == 1 else EXPERTS
    before = compute / LAYERS - experts * PACE_S  # attention and all else of a layer
    clock = link = routed = 0.0
    for layer in range(LAYERS):
        known, routed = (0.0 if chunk > 1 else routed), clock + before
        link = max(link, known if ahead and (layer or chunk > 1) else routed)
        clock = routed + max(0.0, experts - copies) * PACE_S
        whole, rest = divmod(copies, 1)
        for part in [*[1.0] * int(whole), rest]:
            link += part * copy_s
            clock = max(clock, link) + part * PACE_S
    return clock


def prompt(store: Path, share: float) -> Seen:
    """A chunk of a prompt whose copies take `share` of what its computing takes."""
    return step(store, CHUNK, share)


def token(store: Path, share: float, lookahead: str, recall: float | None = None) -> Seen:
    """As `prompt`, one token at a time."""
    return step(store, 1, share, lookahead, recall)


def main() -> None:
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        store = write(Path(folder))
        for share in (0.25, 0.5, 0.9, 2.0, 4.0):
            seen = prompt(store, share)
            print(
                f"prompt, copies {share:4.2f} of computing: {seen.over:.3f}, "
                f"{seen.least:.3f} without loss"
            )
        for share in (0.5, 1.0, 2.0):
            off, on = (token(store, share, lookahead) for lookahead in ("off", "on"))
            print(
                f"token, copies {share:4.2f} of computing: {off.over:.3f} without lookahead, "
                f"{on.over:.3f} with ({on.recall:.2f} right); "
                f"{off.step / on.step:.2f} times as fast"
            )
        for share in (0.5, 1.0, 2.0):
            for recall in (1.0, 0.9, 0.78, 0.0):
                seen = token(store, share, "on", recall)
                best = f", {seen.least:.3f} without loss" if recall == 1.0 else ""
                print(
                    f"token, copies {share:4.2f} of computing, {seen.recall:.2f} of guesses right: "
                    f"{seen.over:.3f}{best}"
                )


if __name__ == "__main__":
    main()
