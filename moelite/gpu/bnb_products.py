"""Kernels whose products of nf4 are bitsandbytes', and whether they are the faster ones here.

A matrix is laid in bitsandbytes' order once, where it lies (`settle`); what is not nf4 goes to the
kernels below. A token's launches need addresses on the host, so no graph keeps them.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Mapping
from typing import NamedTuple

import numpy as np
import torch

from moelite.arch import Arch, Layer, MoE
from moelite.gpu import bnb
from moelite.gpu.device import Device, captured
from moelite.gpu.plan import DevicePlan
from moelite.gpu.probe import best, launch_seconds
from moelite.gpu.products import Kernels
from moelite.quant import FORMATS
from moelite.quant.base import ALIGN, pad, pair_rows
from moelite.storefile import LayerEntry

Tensor = torch.Tensor
Shape = tuple[int, int]
_BESIDE = 20  # launches of a layer beside its experts
_CLOSE = 1e-4  # of the largest value: what two ways to compute a product may differ by


class BitsandbytesKernels(Kernels):
    """nf4 by bitsandbytes, all else by torch; over other kernels: see `over`."""

    blind = False

    def settle(self, fmt: str, packed: Tensor, base: int, rows: int, cols: int) -> None:
        if fmt != "nf4":
            return super().settle(fmt, packed, base, rows, cols)
        bnb.in_place(packed[base : base + FORMATS[fmt].nbytes(rows, cols)], rows, cols)
        return None

    def unpack(self, fmt: str, packed: Tensor, base: int, rows: int, cols: int) -> Tensor:
        if fmt != "nf4":
            return super().unpack(fmt, packed, base, rows, cols)
        return bnb.dequantized(bnb.views(packed[base:], rows, cols))

    def take(self, fmt: str, packed: Tensor, rows: int, cols: int, ids: Tensor) -> Tensor:
        if fmt != "nf4":
            return super().take(fmt, packed, rows, cols, ids)
        return bnb.dequantized(bnb.taken(bnb.views(packed, rows, cols), ids))

    def linear(
        self, fmt: str, x: Tensor, packed: Tensor, base: int, rows: int, cols: int
    ) -> Tensor:
        if fmt != "nf4":
            return super().linear(fmt, x, packed, base, rows, cols)
        return bnb.product(x, bnb.views(packed[base:], rows, cols))

    def experts(  # noqa: PLR0913 - as of Kernels
        self,
        fmt: str,
        x: Tensor,
        arena: Tensor,
        bases: Tensor,
        rows: int,
        cols: int,
        *,
        out: Tensor | None = None,
        target: Tensor | None = None,
    ) -> Tensor:
        if fmt != "nf4":  # what lies below may read them on the device
            bases = bases.to(self.device)
            target = None if target is None else target.to(self.device)
            return super().experts(fmt, x, arena, bases, rows, cols, out=out, target=target)
        return Kernels.experts(self, fmt, x, arena, bases, rows, cols, out=out, target=target)


def over(below: Kernels) -> Kernels:
    """`below`, but for nf4, of whose matrices `settle` then has to be told before anything else."""
    # after BitsandbytesKernels in the order of methods, so that `super()` there is `below`
    bases = (BitsandbytesKernels, type(below))
    made = type(f"Bitsandbytes{type(below).__name__}", bases, {})
    found: Kernels = made(below.device)
    return found


class Chosen(NamedTuple):
    """The kernels of a model; by: whose products of nf4 they are and why, empty without nf4."""

    kernels: Kernels
    by: str


class Sample(NamedTuple):
    """Matrices of nf4 that one token multiplies by, `each` of each shape. what: they are."""

    shapes: list[Shape]
    each: int
    what: str

    @property
    def nbytes(self) -> int:
        """Of one of each shape, each at a multiple of ALIGN."""
        return sum(pad(FORMATS["nf4"].nbytes(*shape), ALIGN) for shape in self.shapes)


def choose(
    below: Kernels,
    device: Device,
    arch: Arch,
    layers: Mapping[int, LayerEntry],
    dense: Mapping[str, str],
    plan: DevicePlan,
) -> Chosen:
    """bitsandbytes' products of nf4 on CUDA, where they are faster than those of the kernels below;
    without Triton they are. dense: formats by key.

    What is timed is a layer's experts of one token, or where those are not nf4, its dense matrices,
    as a run has them: where every expert stays on the device those below are one launch, and so are
    the rest of the layer's; where not, the host launches both, and what comes is laid anew. Nothing
    else may be on the device yet.
    """
    sample, name = sample_of(arch, layers, dense), _name(below)
    if sample is None:
        return Chosen(below, "")
    if isinstance(below, BitsandbytesKernels):
        return Chosen(below, "bitsandbytes")
    if device.torch.type != "cuda":
        return Chosen(below, name)
    if importlib.util.find_spec("bitsandbytes") is None:
        return Chosen(below, f"{name}: bitsandbytes is not installed")
    try:
        ours = over(below)
        if not agree(ours, below):
            return Chosen(below, f"{name}: bitsandbytes gives other numbers here")
        if name == "torch":
            return Chosen(ours, "bitsandbytes: triton is not installed")
        away = 1 - plan.experts_resident / max(1, sum(x.experts for x in layers.values()))
        mine, other = _timed(ours, below, device, _within(sample, plan), away)
    except (ImportError, OSError, RuntimeError) as problem:  # as many ways as it can be broken
        reason = str(problem).strip().partition("\n")[0] or type(problem).__name__
        return Chosen(below, f"{name}: bitsandbytes does not work here: {reason}")
    told = f"{1e3 * mine:.3g} ms for {sample.what}, {name} {1e3 * other:.3g}"
    if mine < other:
        return Chosen(ours, f"bitsandbytes: {told}")
    return Chosen(below, f"{name}: bitsandbytes takes {told}")


def sample_of(
    arch: Arch, layers: Mapping[int, LayerEntry], dense: Mapping[str, str]
) -> Sample | None:
    """What is timed; None where no product is of nf4."""
    for layer, entry in layers.items():
        mlp = arch.layers[layer].mlp
        for tier in entry.tiers:
            shapes = zip(tier.formats, (tier.gate_up_shape, tier.down_shape), strict=True)
            found = [shape for fmt, shape in shapes if fmt == "nf4"]
            if found and isinstance(mlp, MoE):
                return Sample(found, mlp.router.top_k, "a token's experts of a layer")
    head = arch.head.weight.key, (arch.head.rows, arch.head.cols)
    for part in (*map(_dense_of, arch.layers), [head]):
        if found := [shape for key, shape in part if dense[key] == "nf4"]:
            return Sample(found, 1, "a token's dense matrices of a layer")
    return None


def _dense_of(layer: Layer) -> list[tuple[str, Shape]]:
    # (key, shape) of attention and of what every token goes through behind it
    a, mlp = layer.attention, layer.mlp
    parts = [(part.weight.key, (part.rows, part.cols)) for part in (a.q, a.k, a.v, a.o)]
    gated = mlp.shared if isinstance(mlp, MoE) else mlp
    if gated is not None:
        wide = pair_rows(gated.gate.rows), gated.gate.cols
        parts.append((gated.gate.weight.key, wide))
        parts.append((gated.down.weight.key, (gated.down.rows, gated.down.cols)))
    return parts


def _within(sample: Sample, plan: DevicePlan) -> Sample:
    # no more than will lie there: what was planned for experts, or the dense matrices themselves
    most = max(1, plan.parts[-1].bytes // max(1, sample.nbytes))
    return sample._replace(each=min(sample.each, most))


def agree(ours: Kernels, below: Kernels) -> bool:
    """Whether both give the same products of a small matrix, of one token and of several."""
    shape, rng = (64, 256), np.random.default_rng(0)
    packed = FORMATS["nf4"].pack(rng.normal(size=shape).astype(np.float32))
    x = torch.from_numpy(rng.normal(size=(9, shape[1])).astype(np.float32)).to(ours.device)
    there = torch.from_numpy(packed).to(ours.device)
    wants = [below.linear("nf4", rows, there, 0, *shape) for rows in (x, x[:1])]
    ours.settle("nf4", there, 0, *shape)
    gots = [ours.linear("nf4", rows, there, 0, *shape) for rows in (x, x[:1])]
    return all(
        bool((got - want).abs().max() <= _CLOSE * want.abs().max())
        for got, want in zip(gots, wants, strict=True)
    )


def _timed(
    ours: Kernels, below: Kernels, device: Device, sample: Sample, away: float
) -> tuple[float, float]:
    """Seconds by bitsandbytes and below. Any bytes will do: zeros are read like others.

    away: the share of experts that are laid anew before they are used.
    """
    arena = device.zeros((sample.each * sample.nbytes,), torch.uint8)
    try:
        mine = best(device, _products(ours, arena, sample))
        work = _products(below, arena, sample)
        if away > 0:
            mine += away * best(device, lambda: _settle(ours, arena, sample))
            return mine, best(device, work)
        if below.blind:
            return mine + _BESIDE * launch_seconds(device), best(device, captured(device, work))
        return mine, best(device, work)
    finally:
        device.give_back(arena)


def _places(sample: Sample) -> list[tuple[Shape, list[int]]]:
    # where the matrices of each shape begin
    found, at = [], 0
    for shape in sample.shapes:
        found.append((shape, [at + k * sample.nbytes for k in range(sample.each)]))
        at += pad(FORMATS["nf4"].nbytes(*shape), ALIGN)
    return found


def _settle(kernels: Kernels, arena: Tensor, sample: Sample) -> None:
    for shape, places in _places(sample):
        for base in places:
            kernels.settle("nf4", arena, base, *shape)


def _products(kernels: Kernels, arena: Tensor, sample: Sample) -> Callable[[], None]:
    # what it needs is on the device before: a graph keeps no copies from the host
    where = kernels.device if kernels.blind else torch.device("cpu")
    given = [
        (shape, torch.ones((1, shape[1]), device=kernels.device), torch.tensor(at, device=where))
        for shape, at in _places(sample)
    ]

    def work() -> None:
        for shape, x, bases in given:
            kernels.experts("nf4", x, arena, bases, *shape)

    return work


def _name(kernels: Kernels) -> str:
    return "Triton" if kernels.blind else "torch"
