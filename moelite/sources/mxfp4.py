"""quant_method "mxfp4", the layout of gpt-oss: 32 E2M1 numbers and an exponent.

    X_blocks  U8 [..., rows, cols / 32, 16]: the low 4 bits of byte i are number 2i, the high 2i + 1
    X_scales  U8 [..., rows, cols / 32]: w = E2M1[code] * 2^(scale - 127); 255 is no number

X is a parameter of transformers: a Linear's "weight", or all experts of a layer in one,
`experts.gate_up_proj` [E, 2 I, H] and `experts.down_proj` [E, H, I]. The models that moelite runs
keep gate's rows before up's (gpt-oss alone has them in turn), and are given here expert by expert.
Checked against transformers.integrations.mxfp4.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from moelite.config import HFConfig
from moelite.errors import CheckpointError
from moelite.quant.base import F32
from moelite.sources.codes import Codes
from moelite.sources.tensor import E2M1, E2M1_TWICE, E8M0, Parts, Stored, Tensor, unpack_bits

BLOCK = 32
_EXPERTS = {  # block of the layer, as config.json's model has it: gate, up, down
    "block_sparse_moe": ("w1", "w3", "w2"),
    "mlp": ("gate_proj", "up_proj", "down_proj"),
}


class MXFP4:
    """Rows first..first + rows of all rows that `blocks` [..., cols / 32, 16] holds."""

    dtype = "mxfp4"

    def __init__(self, blocks: Stored, scales: Stored, first: int, rows: int) -> None:
        *_, count, size = blocks.shape
        self.shape = (rows, count * BLOCK)
        self.nbytes = rows * count * (size + 1)
        self._first = first
        self._blocks = _flat(blocks, (count * size,))
        self._scales = _flat(scales, (count,))

    def rows(self, start: int, stop: int) -> F32:
        codes, scales = self._read(start, stop)
        values = E2M1[codes].reshape(*scales.shape, BLOCK)
        values *= E8M0[scales][..., None]
        decoded: F32 = values.reshape(codes.shape)
        return decoded

    def coded(self, start: int, stop: int) -> Codes | None:
        codes, scales = self._read(start, stop)
        return Codes("mxfp4", E2M1_TWICE, codes, E8M0[scales] / np.float32(2), BLOCK)

    def _read(self, start: int, stop: int) -> tuple[np.ndarray, np.ndarray]:
        where = self._first + start, self._first + stop
        return unpack_bits(self._blocks.rows(*where), 4, self.shape[1]), self._scales.rows(*where)


def _flat(stored: Stored, width: tuple[int, ...]) -> Stored:
    """The same bytes as a matrix of rows of `width`."""
    shape = (stored.nbytes // width[0], *width)
    return replace(stored, info=replace(stored.info, shape=shape))


def find(parts: Parts, config: HFConfig) -> dict[str, Tensor]:
    """The logical tensors of an mxfp4 checkpoint."""
    found: dict[str, Tensor] = {}
    for name in parts.names:
        if not name.endswith("_blocks") or name.removesuffix("_blocks") + "_scales" not in parts:
            continue
        logical = name.removesuffix("_blocks")
        shape = parts.look(name).shape
        if len(shape) not in {3, 4} or shape[-1] != BLOCK // 2:
            raise CheckpointError(
                f"tensor {name!r} is {list(shape)};"
                f" mxfp4 calls for [rows, blocks, 16] or [experts, rows, blocks, 16]"
            )
        blocks = parts.take(name, ("U8",), (None,) * (len(shape) - 1) + (BLOCK // 2,))
        scales = parts.take(f"{logical}_scales", ("U8", "F8_E8M0"), shape[:-1])
        if len(shape) == 3:
            found[logical] = MXFP4(blocks, scales, 0, shape[0])
        else:
            found |= _experts(logical, blocks, scales)
    return found


def _experts(logical: str, blocks: Stored, scales: Stored) -> dict[str, Tensor]:
    """Each expert's matrices of a tensor that holds all experts of a layer."""
    stem, _, part = logical.rpartition(".")
    holder = stem.removesuffix(".experts")
    names = _EXPERTS.get(holder.rpartition(".")[2])
    experts, rows = blocks.shape[:2]
    wanted = {"gate_up_proj": (0, 1), "down_proj": (2,)}.get(part)
    if names is None or wanted is None or holder == stem or rows % len(wanted):
        raise CheckpointError(
            f"tensor {logical!r} {list(blocks.shape)} is no part that moelite knows of experts",
            fix="use the unquantized checkpoint of this model",
        )
    size = rows // len(wanted)
    return {
        f"{stem}.{expert}.{names[which]}.weight": MXFP4(
            blocks, scales, expert * rows + i * size, size
        )
        for expert in range(experts)
        for i, which in enumerate(wanted)
    }
