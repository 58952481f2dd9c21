"""The routed experts of a layer, computed in the slots of a device's arena as they come."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import closing
from typing import Protocol

import numpy as np
import torch

from moelite.cache.upper import UpperCache
from moelite.gpu.device import Device, timed
from moelite.gpu.host import HostExperts
from moelite.gpu.products import Kernels
from moelite.quant import FORMATS
from moelite.quant.base import PAGE
from moelite.storefile import LayerEntry
from moelite.words import I32

_PROBES = 5
_RING = 64  # small arrays on their way to the device


class Inputs(Protocol):
    """The tokens' normed residual, rounded as a format wants it."""

    def of(self, fmt: str) -> torch.Tensor: ...


class DeviceExperts:
    """Computes what the UpperCache hands out. parts float32 [chunk * K, H]: outputs by token and
    rank in the router's order, in which they are added up, whichever came first.

    host: computes misses of one token on the CPU; None where all are copied.
    """

    def __init__(
        self,
        device: Device,
        kernels: Kernels,
        cache: UpperCache,
        arena: torch.Tensor,
        layers: Mapping[int, LayerEntry],
        parts: torch.Tensor,
        host: HostExperts | None,
    ) -> None:
        self.cache, self.arena, self.parts, self.host = cache, arena, parts, host
        self._device, self._kernels, self._layers = device, kernels, layers
        where = device.torch
        self._bases = {
            n: torch.full((entry.experts,), -1, dtype=torch.int64, device=where)
            for n, entry in layers.items()
        }
        self._tier_of = {
            n: torch.tensor(entry.tier_of, device=where) for n, entry in layers.items()
        }
        longest = max(entry.experts for entry in layers.values())
        self._ring = torch.zeros((_RING, 2 * longest), dtype=torch.int64)
        if device.torch.type == "cuda":
            self._ring = self._ring.pin_memory()
        self._turn = 0
        # kernels that are not blind read where experts lie on the host
        self._places_at = where if kernels.blind else torch.device("cpu")
        self._fresh: dict[int, int] = {}  # {slot: layer} of copies that no kernel has seen yet
        self.piece = longest  # see set_piece

    def sent(self, layer: int, slot: int) -> None:
        """A copy into this slot has begun: what comes there lies as in a record."""
        self._fresh[slot] = layer

    def one(
        self, layer: int, wanted: Sequence[int], inputs: Inputs, between: Callable[[], None]
    ) -> None:
        """One token's experts, in the router's order. between: called once copies are under way."""
        ranks = {expert: rank for rank, expert in enumerate(wanted)}
        with closing(self.cache.batches(layer, wanted, one=True)) as batches:  # if one fails, too
            for batch in batches:
                between()
                for piece in batch.pieces(self.piece):
                    piece.gate()
                    if not piece.host:
                        self._settle(layer, piece.experts)
                    ranked = [(ranks[e], e, page) for e, page in piece.experts]
                    compute = self._from_host if piece.host else self._one
                    compute(layer, ranked, inputs)

    def table(self) -> None:
        """Tells the device where experts are, before it looks for them itself."""
        if self.cache.changed:
            for slot, layer in [*self._fresh.items()]:  # of what was cut short when it had come
                found = np.flatnonzero(self.cache.bases[layer] == slot * PAGE)
                self._settle(layer, [(int(expert), slot) for expert in found])
            for layer, bases in self.cache.bases.items():
                self._bases[layer].copy_(torch.from_numpy(bases))
            self.cache.changed = False

    def _settle(self, layer: int, pairs: Sequence[tuple[int, int]]) -> None:
        """Has the kernels lay (expert, slot) as they read them, of what has come since."""
        for expert, slot in pairs:
            if slot not in self._fresh:
                continue
            layout, at = self._layers[layer].layout_of(expert), slot * PAGE
            fmt, down, k = layout.gate_up_format, layout.down_format, self._kernels
            try:
                k.settle(fmt, self.arena, at, *layout.gate_up_shape)
                k.settle(down, self.arena, at + layout.down, *layout.down_shape)
            except BaseException:  # what is half done is of no use to anyone
                self.cache.forget(layer, expert)
                raise
            del self._fresh[slot]

    def found(self, layer: int, selected: torch.Tensor, inputs: Inputs) -> torch.Tensor:
        """One token's experts selected [1, K], where the table says; whether one was not there,
        bool [] on the device: its part is then stale."""
        entry, k = self._layers[layer], self._kernels
        bases = self._bases[layer][selected[0]]
        tiers = self._tier_of[layer][selected[0]]
        for tier, layout in enumerate(entry.tiers):
            mine = bases
            if len(entry.tiers) > 1:
                mine = torch.where(tiers == tier, bases, -1)
            x, rows = inputs.of(layout.gate_up_format), layout.gate_up_shape[0]
            both = k.experts(layout.gate_up_format, x, self.arena, mine, rows, x.shape[1])
            hidden = k.gated(both, layout.expert_size, layout.down_format)
            below = torch.where(mine < 0, mine, mine + layout.down)
            out, fmt = self.parts[: len(bases)], layout.down_format
            k.experts(fmt, hidden, self.arena, below, *layout.down_shape, out=out)
        return (bases < 0).any()

    def speed(self, entry: LayerEntry, slots: int) -> float:
        """Bytes a second of experts multiplied by, whatever lies in the first `slots` of them."""
        layout, k = entry.tiers[0], self._kernels
        (fmt, down_fmt), size = (layout.gate_up_format, layout.down_format), entry.slot_bytes
        bases = torch.arange(slots, dtype=torch.int64, device=self._places_at) * size
        x = torch.ones((1, layout.down_shape[0]), device=self._device.torch)
        x = k.rounded(fmt, x)

        def work() -> None:
            both = k.experts(fmt, x, self.arena, bases, layout.gate_up_shape[0], x.shape[1])
            hidden = k.gated(both, layout.expert_size, down_fmt)
            k.experts(down_fmt, hidden, self.arena, bases + layout.down, *layout.down_shape)

        work()
        seconds = min(timed(self._device, work) for _ in range(_PROBES))
        return slots * layout.payload_bytes / max(seconds, 1e-9)

    def set_piece(self, layer: int, count: int) -> None:
        """How many of a token's experts that come are computed at once: so many that computing them
        takes as long as asking for it, or splitting gains nothing. On a card that will be all of
        them (assumed: 10 us an expert, 100 us to launch its kernels); where experts take longer,
        each by itself beside the copies of the others.

        count: of experts to try it with, whatever lies in the first slots.
        """
        entry, inputs = self._layers[layer], _Same(self._kernels, self.parts.shape[1])
        ranked = [(i, 0, i * entry.slot_bytes // PAGE) for i in range(count)]
        if not all(FORMATS[fmt].exact for fmt in entry.tiers[entry.tier_of[0]].formats):
            return  # what lies there is no matrix of a format whose codes tell where rows are

        def seconds(n: int) -> float:
            return min(
                timed(self._device, lambda: self._one(layer, ranked[:n], inputs)) for _ in range(3)
            )

        seconds(1)  # what is set up at first use
        one = seconds(1)
        each = max(1e-9, (seconds(count) - one) / max(1, count - 1))
        self.piece = max(1, min(count, math.ceil((one - each) / each)))

    def many(self, layer: int, ids: I32, inputs: Inputs, between: Callable[[], None]) -> None:
        """A chunk's experts ids [T, K]: each is computed once, for all its tokens."""
        flat, top_k = ids.reshape(-1), ids.shape[1]
        order = np.argsort(flat, kind="stable")
        found, first = np.unique(flat[order], return_index=True)
        ends = np.append(first[1:], flat.size)
        runs = {int(e): (int(a), int(b)) for e, a, b in zip(found, first, ends, strict=True)}
        positions = torch.from_numpy(order).to(self._device.torch)
        with closing(self.cache.batches(layer, found.tolist(), one=False)) as batches:
            for batch in batches:
                between()
                for piece in batch.pieces(1):  # the first is computed while the others come
                    piece.gate()
                    self._settle(layer, piece.experts)
                    for expert, page in piece.experts:
                        start, end = runs[expert]
                        self._many(layer, expert, page, positions[start:end], top_k, inputs)

    def _one(self, layer: int, ranked: Sequence[tuple[int, int, int]], inputs: Inputs) -> None:
        entry, k = self._layers[layer], self._kernels
        for tier, layout in enumerate(entry.tiers):
            mine = [(r, page) for r, expert, page in ranked if entry.tier_of[expert] == tier]
            if not mine:
                continue
            ranks, bases = self._sent([r for r, _ in mine], [page * PAGE for _, page in mine])
            rows, size = layout.gate_up_shape[0], layout.expert_size
            x = inputs.of(layout.gate_up_format)
            both = k.experts(layout.gate_up_format, x, self.arena, bases, rows, x.shape[1])
            hidden = k.gated(both, size, layout.down_format)
            below, shape = bases + layout.down, layout.down_shape
            out, fmt = self.parts, layout.down_format
            k.experts(fmt, hidden, self.arena, below, *shape, out=out, target=ranks)

    def _many(
        self,
        layer: int,
        expert: int,
        page: int,
        positions: torch.Tensor,
        top_k: int,
        inputs: Inputs,
    ) -> None:
        layout, k = self._layers[layer].layout_of(expert), self._kernels
        x = inputs.of(layout.gate_up_format)[positions // top_k]
        wide, down, at = layout.gate_up_format, layout.down_format, page * PAGE
        both = k.linear(wide, x, self.arena, at, *layout.gate_up_shape)
        hidden = k.gated(both, layout.expert_size, down)
        below = at + layout.down
        self.parts[positions] = k.linear(down, hidden, self.arena, below, *layout.down_shape)

    def _from_host(
        self, layer: int, ranked: Sequence[tuple[int, int, int]], inputs: Inputs
    ) -> None:
        assert self.host is not None
        x = inputs.of("f32")[0].cpu().numpy()  # the kernels there round it themselves
        rows = torch.from_numpy(self.host.compute(layer, x, ranked)).to(self._device.torch)
        self.parts[[rank for rank, _, _ in ranked]] = rows

    def _sent(self, ranks: list[int], bases: list[int]) -> tuple[torch.Tensor, torch.Tensor]:
        if self._places_at != self._device.torch:
            return torch.tensor(ranks), torch.tensor(bases)
        self._turn = (self._turn + 1) % _RING
        room = self._ring[self._turn, : 2 * len(ranks)]  # in one piece, or it is copied once more
        room.copy_(torch.tensor(ranks + bases))
        sent = room.to(self._device.torch, non_blocking=True)
        return sent[: len(ranks)], sent[len(ranks) :]


class _Same:
    """Inputs for a probe: ones."""

    def __init__(self, kernels: Kernels, cols: int) -> None:
        self._kernels = kernels
        self._x = torch.ones((1, cols), device=kernels.device)

    def of(self, fmt: str) -> torch.Tensor:
        """[1, cols] float32."""
        return self._kernels.rounded(fmt, self._x)
