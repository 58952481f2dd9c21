"""What a text's activations say of every expert's inputs, gathered while the experts are packed.

Layer by layer the residual stream of the whole text passes the layers as they will be stored: dense
weights from the dense file, routed experts as soon as they are packed. So what an expert is
calibrated with carries the error of all that lies before it, its own gate and up included.

    enter a layer   its dense matrices are packed, if they are to be (`calibrate_dense`)
                    attention, norm, router; the shared expert, or all of a dense layer
    each expert     H of its inputs -> pack gate, up; H of what they hand down -> pack down;
                    down's output, times the routing weights, into the residual

A token counts by (routing weight)^2 / mean(residual^2): an error is added to the residual with that
weight, and whoever reads the residual norms it first.

An expert that n tokens reached (as many as weigh the same; Kish's n) knows the mean squares of its
I inputs well, but not all their I^2 products: these are believed by n / (n + I), which is what a
held-out text bore out between 200 and 2,500 tokens (docs/LOG.md). The mean squares themselves are
those of all experts, or all alike for what is handed down, as if PRIOR tokens had shown it.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from moelite.arch import Arch, Linear, MoE
from moelite.belief import believed
from moelite.calibrate_dense import DensePacker, pack_layer, packing_bytes
from moelite.forward import (
    EMBED_ROWS,
    Normed,
    Projection,
    SelfAttention,
    Weights,
    dense_mlp,
    silu_gate,
    unrouted,
)
from moelite.quant.base import F32, U8, QuantFormat
from moelite.quant.curvature import Curvature, curvature
from moelite.quant.record import pack_gate_up, unpack_gate_up
from moelite.routing import route
from moelite.stream import Stream
from moelite.tokenizer import Tokenizer

I64 = npt.NDArray[np.int64]
Matrices = tuple[F32, F32, F32]  # gate, up, down

CONTEXT = 512  # tokens of a sequence
TOKENS = 32_768  # of the text
FEW = 256  # an expert that met fewer tokens is reported
_ROWS = 1024  # tokens of an expert multiplied at once


@dataclass(frozen=True, slots=True)
class Text:
    """Token ids, one sequence after the other; each is read from its own first token on.

    sha256: of the file it was, or empty.
    """

    sequences: tuple[tuple[int, ...], ...]
    sha256: str = ""

    @property
    def tokens(self) -> int:
        return sum(map(len, self.sequences))

    @property
    def digest(self) -> str:
        """Tells two texts apart."""
        return hashlib.sha256(repr(self.sequences).encode()).hexdigest()


def cut(ids: Sequence[int], context: int = CONTEXT, bos_id: int | None = None) -> Text:
    """`ids` in sequences of `context` tokens, each with the BOS token before it if there is one."""
    head = () if bos_id is None else (bos_id,)
    step = context - len(head)
    return Text(tuple((*head, *ids[at : at + step]) for at in range(0, len(ids), step)))


def tokenize(tokenizer: Tokenizer, text: str, tokens: int, context: int = CONTEXT) -> Text:
    """The first `tokens` tokens of `text`; with a BOS token if the tokenizer adds one."""
    around = tokenizer.encode("", special=True)
    bos_id = tokenizer.bos_id if around[:1] == [tokenizer.bos_id] else None
    return cut(tokenizer.encode(text, special=False)[:tokens], context, bos_id)


class Inputs(NamedTuple):
    """What an expert met: Curvature of gate and up's inputs, and of down's; weight: the sum over
    its tokens of (routing weight)^2 / mean(residual^2)."""

    gate_up: Curvature
    down: Curvature
    weight: float


class Rare(NamedTuple):
    """An expert that few tokens of the calibration text reached."""

    layer: int
    expert: int
    tokens: int


class Calibrator:
    """Hands every expert's Curvature to its formats, expert after expert in their order.

    finished(layer, expert) -> gate, up, down as stored, of a layer that an earlier run packed.
    spill: a folder in which the residual lies in a file, instead of in memory. dense: packs the
    dense matrices of a layer as it is entered; they are then read from `weights`.
    """

    def __init__(
        self,
        arch: Arch,
        weights: Weights,
        text: Text,
        finished: Callable[[int, int], Matrices],
        spill: Path | None = None,
        dense: DensePacker | None = None,
    ) -> None:
        self.rare: list[Rare] = []
        self._arch, self._weights, self._finished = arch, weights, finished
        self._dense = dense
        shape = (text.tokens, arch.hidden_size)
        self._x, self._normed = Stream(shape, spill), Stream(shape, spill)
        self._spans: list[slice] = []
        self._layer, self._expert = -1, 0  # what comes next in the layer that was entered
        at = 0
        for ids in text.sequences:
            self._spans.append(slice(at, at + len(ids)))
            at += len(ids)
        for rows, x in weights.embed(arch.embed, [i for ids in text.sequences for i in ids]):
            self._x.write(rows, x)

    def pack(
        self,
        layer: int,
        expert: int,
        formats: Sequence[tuple[QuantFormat, QuantFormat]],
        matrices: Matrices,
    ) -> list[tuple[U8, U8]]:
        """gate_up and down of an expert, packed in each pair of formats: of gate and up, of down.

        What comes behind it is calibrated with the first pair. Experts are asked for one after the
        other, from 0 to the last of each layer.
        """
        self._reach(layer, expert)
        tokens, (gate, up, down) = self._tokens_of(expert), matrices
        curve = None
        if any(wide.curved for wide, _ in formats):
            curve = self._curve(tokens, self._typical, None)
        packed: list[tuple[U8, U8]] = []
        for wide, narrow in formats:
            both = pack_gate_up(wide, gate, up, curve)
            first = unpack_gate_up(wide, both, *gate.shape)
            last = narrow.pack(down, self._curve(tokens, None, first) if narrow.curved else None)
            if not packed:
                stored = *first, narrow.unpack(last, *down.shape)
            packed.append((both, last))
        self._feed(tokens, stored)
        self._expert += 1
        return packed

    def look(self, layer: int, expert: int, matrices: Matrices) -> Inputs:
        """What an expert meets if it and all before it are `matrices`, unquantized; in order."""
        self._reach(layer, expert)
        tokens = self._tokens_of(expert)
        first = self._curve(tokens, self._typical, None)
        last = self._curve(tokens, None, matrices[:2])
        rows, shares = tokens
        weight = float(np.sum(shares * shares / self._energy[rows]))
        self._feed(tokens, matrices)
        self._expert += 1
        return Inputs(first, last, weight)

    def enter(self, layer: int) -> None:
        """Goes to the first expert of a layer; before it, the layer's dense matrices are packed."""
        while self._layer < layer:
            self._complete()
            self._layer += 1
            self._enter()

    def close(self) -> None:
        """Gives the streams' memory or files back."""
        self._x.close()
        self._normed.close()

    # --- the way to a layer ---

    def _reach(self, layer: int, expert: int) -> None:
        self.enter(layer)
        assert (layer, expert) == (self._layer, self._expert), "experts come in their order"

    def _complete(self) -> None:
        # the experts of the layer that was entered, as an earlier run stored them
        mlp = self._arch.layers[self._layer].mlp if self._layer >= 0 else None
        if isinstance(mlp, MoE):
            for expert in range(self._expert, mlp.num_experts):
                self._feed(self._tokens_of(expert), self._finished(self._layer, expert))

    def _enter(self) -> None:
        layer, weights = self._arch.layers[self._layer], self._weights
        mlp, self._expert = layer.mlp, 0
        if self._dense is not None:
            pack_layer(layer, weights, self._residual, self._dense)
        before, after = Normed(weights, layer.input_norm), Normed(weights, layer.post_norm)
        attention, dense = SelfAttention(weights, layer.attention), dense_mlp(weights, mlp)
        router = Projection(weights, mlp.router.linear) if isinstance(mlp, MoE) else None
        chosen: list[tuple[npt.NDArray[np.int32], F32]] = []
        energy = []
        for span in self._spans:
            rows = np.arange(span.start, span.stop)
            x = self._x.read(rows)
            x += attention(before(x))
            normed = after(x)
            energy.append(np.mean(x * x, -1))
            if dense is not None:
                x += dense(normed)
            self._x.write(rows, x)
            if router is not None and isinstance(mlp, MoE):
                self._normed.write(rows, normed)
                chosen.append(route(mlp.router, router(normed)))
        if isinstance(mlp, MoE):
            self._choose(mlp, chosen, np.concatenate(energy))

    def _residual(self) -> Iterator[F32]:
        for span in self._spans:
            yield self._x.read(np.arange(span.start, span.stop))

    def _choose(
        self, mlp: MoE, chosen: list[tuple[npt.NDArray[np.int32], F32]], energy: F32
    ) -> None:
        self._selected = np.concatenate([selected for selected, _ in chosen])
        self._shares = np.concatenate([shares for _, shares in chosen])
        self._energy = energy
        counts = np.bincount(self._selected.reshape(-1), minlength=mlp.num_experts)
        few = np.flatnonzero(counts < FEW)
        self.rare += [Rare(self._layer, int(e), int(counts[e])) for e in few]
        total, seen = np.zeros(self._arch.hidden_size), 0.0
        for span in self._spans:
            x = self._normed.read(np.arange(span.start, span.stop))
            count = np.float32(1) / energy[span]
            total += count @ (x * x)
            seen += float(count.sum())
        self._typical = (total / seen).astype(np.float32)

    # --- an expert ---

    def _tokens_of(self, expert: int) -> tuple[I64, F32]:
        # its tokens, ascending, and their routing weights
        rows, place = np.nonzero(self._selected == expert)
        return rows, self._shares[rows, place]

    def _inputs(
        self, tokens: tuple[I64, F32], first: tuple[F32, F32] | None
    ) -> Iterator[tuple[slice, F32]]:
        # what gate and up read, or with these two given, what they hand down
        rows, _ = tokens
        for at in range(0, rows.size, _ROWS):
            span = slice(at, min(at + _ROWS, rows.size))
            x = self._normed.read(rows[span])
            yield span, x if first is None else silu_gate(x @ first[0].T, x @ first[1].T)

    def _curve(
        self, tokens: tuple[I64, F32], typical: F32 | None, first: tuple[F32, F32] | None
    ) -> Curvature:
        rows, shares = tokens
        count = shares * shares / self._energy[rows]
        size = self._arch.hidden_size if first is None else len(first[0])
        hessian = np.zeros((size, size), np.float32)
        if count.sum() > 0:
            count = count / count.sum()
            for span, x in self._inputs(tokens, first):
                x *= np.sqrt(count[span])[:, None]
                hessian += x.T @ x
        known = 1 / float(np.sum(count * count)) if count.size else 0.0
        return curvature(believed(hessian, known, typical))

    def _feed(self, tokens: tuple[I64, F32], matrices: Matrices) -> None:
        rows, shares = tokens
        for span, hidden in self._inputs(tokens, matrices[:2]):
            x = self._x.read(rows[span])
            x += shares[span, None] * (hidden @ matrices[2].T)
            self._x.write(rows[span], x)


def calibration_bytes(
    arch: Arch, tokens: int, context: int = CONTEXT, curved: Sequence[Linear] = ()
) -> int:
    """Memory that a Calibrator and its formats take at most, its two streams in a file.

    Twice what is held at once where numpy needs room for intermediate results. curved: the dense
    matrices that are packed on the way.
    """
    hidden, most = arch.hidden_size, 0
    packing = max(map(packing_bytes, curved), default=0)
    for layer in arch.layers:
        a, mlp = layer.attention, layer.mlp
        dense = unrouted(mlp)
        parts = [*a.linears, *(dense.matrices if dense is not None else ())]
        sizes = [part.rows * part.cols for part in parts]
        scores = a.num_heads // a.num_kv_heads * context * context
        widths = 2 * hidden + 2 * a.q.rows + 2 * a.k.rows
        widths += 0 if dense is None else 2 * dense.gate.rows
        entering = sum(sizes) + 3 * max(sizes) + 3 * scores + 4 * context * widths
        most = max(
            most, 4 * entering + packing, 0 if not isinstance(mlp, MoE) else _packing_bytes(mlp)
        )
    chosen = max(x.mlp.router.top_k for x in arch.layers if isinstance(x.mlp, MoE))
    # ids, routing and energy of all tokens, and their concatenation
    return most + 12 * EMBED_ROWS * hidden + tokens * (64 + 24 * chosen)


def stream_bytes(arch: Arch, tokens: int) -> int:
    """Of the residual and of what the experts read, where both are in memory."""
    return 2 * 4 * tokens * arch.hidden_size


def _packing_bytes(mlp: MoE) -> int:
    inner, hidden = mlp.experts.gate.rows, mlp.experts.gate.cols
    # as read and as stored, and the largest once more while it is unpacked
    matrices = 4 * 9 * inner * hidden
    squares = 52 * max(inner, hidden) ** 2  # 5 times as float64, 3 times as float32
    return matrices + squares + 4 * _ROWS * (2 * hidden + 4 * inner)
