"""Times a decoder on torch's CPU whose experts come over a simulated link: what a chunk and a token
take beside their computing and their copies alone.

An expert is tiny and then takes its time asleep, as a GPU leaves the host alone: so the figures are
of how things overlap, not of what else this machine does.

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
from moelite.gpu.device import Link
from moelite.gpu.products import HostKernels

EXPERTS, TOP_K = 20, 4
CONFIG = {
    "hidden_size": 64,
    "moe_intermediate_size": 64,
    "num_experts": EXPERTS,
    "mlp_only_layers": [],
    "num_hidden_layers": 4,
    "num_experts_per_tok": TOP_K,
    "num_attention_heads": 4,
    "head_dim": 16,
    "vocab_size": 500,
    "max_position_embeddings": 512,
}
RUNS = 3
PACE_S = 0.003  # of one expert


class Paced(HostKernels):
    """Kernels that take PACE_S for each expert."""

    def gated(self, both: torch.Tensor, size: int, fmt_down: str) -> torch.Tensor:
        # a chunk's experts come one by one; a token's, all that are there, as rows of one call
        experts = len(both) if self.one else 1
        time.sleep(experts * PACE_S)
        return super().gated(both, size, fmt_down)

    one = False


@contextmanager
def paced(tokens: int) -> Iterator[None]:
    """While entered, models compute at that pace."""
    before, Paced.one = model_file.kernels_for, tokens == 1
    model_file.kernels_for = Paced
    try:
        yield
    finally:
        model_file.kernels_for = before


class Seen(NamedTuple):
    """Seconds of one step: all of it, its computing alone, its copies alone."""

    step: float
    compute: float
    copies: float

    @property
    def over(self) -> float:
        """How many times as long as the longer of the two."""
        return self.step / max(self.compute, self.copies)


def write(folder: Path) -> Path:
    """A store of many small experts."""
    tiny_checkpoint.write_checkpoint(folder / "c", {**tiny_checkpoint.QWEN3_MOE, **CONFIG})
    (folder / "c" / "tokenizer.json").unlink()
    moelite.quantize(folder / "c", folder / "s", experts="int8", dense="int8")
    return folder / "s"


def _how(lookahead: str = "off") -> dict[str, Any]:
    how: dict[str, Any] = {"ram": "2GiB", "context": 512, "threads": 1, "device": "torch:cpu"}
    return {**how, "miss": "copy", "lookahead": lookahead}


def _steps(model: Any, chunk: int) -> tuple[float, float]:
    """(median seconds, bytes copied) of a step of `chunk` tokens, after two that warm up."""
    ids = np.random.default_rng(0).integers(3, 500, chunk * (RUNS + 2)).tolist()
    session, times = model.session(), []
    session.advance(np.random.default_rng(1).integers(3, 500, 60))  # memory has them all then
    for run in range(RUNS + 2):
        before = model.stats().upper.bytes_read
        start = time.perf_counter()
        session.advance(ids[run * chunk : (run + 1) * chunk])
        times.append(time.perf_counter() - start)
    return statistics.median(times[2:]), model.stats().upper.bytes_read - before


def resident(store: Path, chunk: int) -> float:
    """Seconds of a step with every expert on the device."""
    with paced(chunk), moelite.load(store, **_how(), vram="2GiB") as model:
        return _steps(model, chunk)[0]


def over_link(store: Path, chunk: int, link: Link, lookahead: str = "off") -> tuple[float, float]:
    """(seconds, seconds of its copies alone) of a step with no expert kept on the device."""
    with moelite.load(store, **_how(), vram="2GiB") as model:
        plan = model.footprint.device
    room = plan.minimum_bytes + (4 * TOP_K - 2) * model.footprint.record_bytes
    options = _how(lookahead)
    with paced(chunk), moelite.load(store, **options, vram=room, link=link) as model:
        step, copied = _steps(model, chunk)
    return step, copied / link.bytes_s


def prompt(store: Path, share: float) -> Seen:
    """A chunk of a prompt whose copies take `share` of what its computing takes."""
    chunk, compute = 48, resident(store, 48)
    with moelite.load(store, **_how(), vram="2GiB") as model:
        record = model.footprint.record_bytes
        layers = len(model.arch.moe_layers)
    link = Link(layers * EXPERTS * record / (share * compute), 20e-6)
    step, copies = over_link(store, chunk, link)
    return Seen(step, compute, copies)


def token(store: Path, share: float, lookahead: str) -> Seen:
    """As `prompt`, one token at a time."""
    compute = resident(store, 1)
    with moelite.load(store, **_how(), vram="2GiB") as model:
        record = model.footprint.record_bytes
        layers = len(model.arch.moe_layers)
    link = Link(layers * TOP_K * record / (share * compute), 20e-6)
    step, copies = over_link(store, 1, link, lookahead)
    return Seen(step, compute, copies)


def main() -> None:
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        store = write(Path(folder))
        for share in (0.25, 0.5, 0.9, 2.0, 4.0):
            print(f"prompt, copies {share:4.2f} of computing: {prompt(store, share).over:.3f}")
        for share in (0.5, 1.0, 2.0):
            off, on = (token(store, share, lookahead) for lookahead in ("off", "on"))
            print(
                f"token, copies {share:4.2f} of computing: {off.over:.3f} without lookahead, "
                f"{on.over:.3f} with; {off.step / on.step:.2f} times as fast"
            )


if __name__ == "__main__":
    main()
