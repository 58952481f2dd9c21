"""Dense weights on a device: packed as in the store, in one block of its memory."""

from __future__ import annotations

from typing import Literal, NamedTuple

import numpy as np
import torch

from moelite.arch import Arch, GatedMLP, Linear, Norm, TensorRef
from moelite.errors import UnsupportedError
from moelite.gpu.device import Device
from moelite.gpu.plan import block_bytes
from moelite.gpu.products import Kernels
from moelite.quant import FORMATS
from moelite.quant.base import ALIGN, U8, pad, pair_rows, put_half
from moelite.store import Store


class Matrix(NamedTuple):
    """A packed [rows, cols] matrix and its bias; packed uint8 [nbytes] on the device."""

    format: str
    packed: torch.Tensor
    rows: int
    cols: int
    bias: torch.Tensor | None = None


class NormOf(NamedTuple):
    """A norm's numbers on the device; kind "rms" or "layer"."""

    weight: torch.Tensor | None
    bias: torch.Tensor | None
    size: int
    eps: float
    kind: Literal["rms", "layer"]


class GatedOf(NamedTuple):
    """A dense feed-forward part: gate and up interleaved tile by tile, down; size: between them."""

    gate_up: Matrix
    down: Matrix
    size: int


class Weights:
    """Reads the dense tensors of a store onto a device, one after another, as its kernels read
    them."""

    def __init__(self, store: Store, arch: Arch, device: Device, kernels: Kernels) -> None:
        self._store, self._used, self._kernels = store, 0, kernels
        formats = {key: store.dense_entry(key).format for key in store.dense_keys()}
        self._block = device.zeros((block_bytes(arch, formats),), torch.uint8)
        self._matrices: dict[str, Matrix] = {}

    def matrix(self, part: Linear) -> Matrix:
        """A linear part; that of tied embeddings and head is there once."""
        key = part.weight.key
        if key not in self._matrices:
            fmt, packed = (
                self._store.dense_entry(key).format,
                self._store.read_dense(key, verify=True),
            )
            made = self._settled(fmt, packed, part.rows, part.cols)
            self._matrices[key] = Matrix(fmt, made, part.rows, part.cols, self.vector(part.bias))
        return self._matrices[key]

    def vector(self, ref: TensorRef | None) -> torch.Tensor | None:
        """A float32 vector, or None."""
        if ref is None:
            return None
        return self._put(self._store.read_dense(ref.key, verify=True)).view(torch.float32)

    def norm(self, norm: Norm | None) -> NormOf | None:
        """A norm; its offset is in the weight, float32 as on the CPU."""
        if norm is None:
            return None
        weight = self.vector(norm.weight)
        if weight is not None and norm.offset:
            weight += norm.offset
        return NormOf(weight, self.vector(norm.bias), norm.size, norm.eps, norm.kind)

    def gated(self, spec: GatedMLP) -> GatedOf:
        """A dense feed-forward part, as an expert's record holds one."""
        keys = [part.weight.key for part in (spec.gate, spec.up)]
        formats = {self._store.dense_entry(key).format for key in keys}
        if len(formats) > 1:
            raise UnsupportedError(f"{keys[0]} and {keys[1]} differ in format")
        fmt, rows, cols = formats.pop(), pair_rows(spec.gate.rows), spec.gate.cols
        both = np.zeros(FORMATS[fmt].nbytes(rows, cols), np.uint8)
        for half, key in enumerate(keys):
            part = self._store.read_dense(key, verify=True)
            put_half(both, half, part, FORMATS[fmt].tile_bytes(cols))
        gate_up = Matrix(fmt, self._settled(fmt, both, rows, cols), rows, cols)
        return GatedOf(gate_up, self.matrix(spec.down), spec.gate.rows)

    def _settled(self, fmt: str, packed: U8, rows: int, cols: int) -> torch.Tensor:
        there = self._put(packed)
        self._kernels.settle(fmt, there, 0, rows, cols)
        return there

    def _put(self, data: U8) -> torch.Tensor:
        start, end = self._used, self._used + data.size
        self._used = pad(end, ALIGN)
        room = self._block[start:end]
        room.copy_(torch.from_numpy(data))
        return room
