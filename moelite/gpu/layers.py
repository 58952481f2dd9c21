"""One layer's weights on a device, and rotary embedding there."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch

from moelite.arch import Layer, MoE, Rope
from moelite.gpu.device import Device
from moelite.gpu.weights import GatedOf, Matrix, NormOf, Weights


class DeviceLayer(NamedTuple):
    """One layer's weights on the device; router, shared, dense, shared_gate: None if not there."""

    input_norm: NormOf | None
    q: Matrix
    k: Matrix
    v: Matrix
    o: Matrix
    q_norm: NormOf | None
    k_norm: NormOf | None
    cos: torch.Tensor | None
    sin: torch.Tensor | None
    post_norm: NormOf | None
    router: Matrix | None
    dense: GatedOf | None
    shared_gate: Matrix | None


class RopeTables:
    """cos and sin [context, n] of every position, once for each distinct Rope."""

    def __init__(self, context: int, device: Device) -> None:
        self._context, self._device = context, device
        self._made: dict[Rope, tuple[torch.Tensor, torch.Tensor]] = {}

    def of(self, rope: Rope | None) -> tuple[torch.Tensor | None, torch.Tensor | None]:
        """The tables of a Rope; None, None if there is none."""
        if rope is None:
            return None, None
        if rope not in self._made:
            # the angle is a float32 product, as on the CPU
            freq = np.array(rope.inv_freq, np.float32)
            angles = np.arange(self._context, dtype=np.float32)[:, None] * freq
            tables = []
            for turn in (np.cos, np.sin):
                table = (turn(angles.astype(np.float64)) * rope.scale).astype(np.float32)
                room = self._device.zeros(table.shape, torch.float32)
                room.copy_(torch.from_numpy(table))
                tables.append(room)
            self._made[rope] = tables[0], tables[1]
        return self._made[rope]


def load_layer(layer: Layer, weights: Weights, ropes: RopeTables) -> DeviceLayer:
    """A layer, its weights read."""
    spec, mlp = layer.attention, layer.mlp
    cos, sin = ropes.of(spec.rope)
    dense = mlp.shared if isinstance(mlp, MoE) else mlp
    gate = mlp.shared_gate if isinstance(mlp, MoE) else None
    return DeviceLayer(
        input_norm=weights.norm(layer.input_norm),
        q=weights.matrix(spec.q),
        k=weights.matrix(spec.k),
        v=weights.matrix(spec.v),
        o=weights.matrix(spec.o),
        q_norm=weights.norm(spec.q_norm),
        k_norm=weights.norm(spec.k_norm),
        cos=cos,
        sin=sin,
        post_norm=weights.norm(layer.post_norm),
        router=weights.matrix(mlp.router.linear) if isinstance(mlp, MoE) else None,
        dense=None if dense is None else weights.gated(dense),
        shared_gate=None if gate is None else weights.matrix(gate),
    )


def rotated(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, style: str) -> torch.Tensor:
    """x [T, heads, D] with its first 2 * n dimensions rotated by cos, sin [T, 1, n]."""
    n = cos.shape[-1]
    if style == "interleaved":
        a, b = x[..., 0 : 2 * n : 2], x[..., 1 : 2 * n : 2]
    else:
        a, b = x[..., :n], x[..., n : 2 * n]
    turned = (a * cos - b * sin, b * cos + a * sin)
    rest = x[..., 2 * n :]
    if style == "interleaved":
        return torch.cat([torch.stack(turned, -1).flatten(-2), rest], -1)
    return torch.cat([*turned, rest], -1)
