"""What a decoder computes on a device, over packed weights: one class per way to compute it.

`Kernels` does everything with torch operations and runs wherever torch does (cpu, mps, xpu, cuda).
On cuda `kernels_for` gives its heir of moelite.gpu.triton_products, which multiplies straight from
packed bytes. Both compute the same in float32, apart from the order of additions; neither uses
atomics, so a result depends on its arguments alone.
"""

from __future__ import annotations

import importlib.util
from typing import Literal

import torch

from moelite.errors import UnsupportedError
from moelite.gpu.unpack import strip_rows, unpack
from moelite.quant import FORMATS
from moelite.quant.base import BLOCK, TILE_ROWS, pad

Tensor = torch.Tensor
Norm = Literal["rms", "layer"]
Which = Literal["auto", "triton", "torch", "bitsandbytes"]

FEW = 4  # tokens up to which `linear` reads packed weights once for each instead of unpacking them


def kernels_for(device: torch.device, which: Which = "auto") -> Kernels:
    """The kernels for tensors of `device`.

    auto: Triton's on cuda and xpu if it is installed; on the CPU torch's, but that numpy unpacks.
    bitsandbytes: over those of auto, its products of nf4: moelite.gpu.bnb_products chooses them.
    """
    if which == "bitsandbytes":
        return _with_bitsandbytes(device)
    has_triton = importlib.util.find_spec("triton") is not None
    if which == "auto" and device.type == "cpu":
        return HostKernels(device)
    if which == "auto":
        which = "triton" if has_triton and device.type in ("cuda", "xpu") else "torch"
    if which == "torch":
        return Kernels(device)
    if not has_triton:
        raise UnsupportedError(
            "triton is not installed", fix="pip install triton, or compute with torch alone"
        )
    from moelite.gpu.triton_products import TritonKernels

    return TritonKernels(device)


def _with_bitsandbytes(device: torch.device) -> Kernels:
    if importlib.util.find_spec("bitsandbytes") is None:
        raise UnsupportedError(
            "bitsandbytes is not installed", fix="pip install bitsandbytes, or compute without it"
        )
    from moelite.gpu.bnb_products import over

    return over(kernels_for(device))


class Kernels:
    """Every operation in torch. All tensors are on `device`; activations are float32.

    blind: one token's operations never look at a result on the host, so a graph can keep them.
    Kernels that are not blind take the places of experts from the host without waiting.
    """

    blind = False

    def __init__(self, device: torch.device) -> None:
        self.device = device

    def settle(self, fmt: str, packed: Tensor, base: int, rows: int, cols: int) -> None:
        """Lays the matrix at packed[base] as these kernels read it, in its own bytes: once, when it
        has arrived as it lies in a store, before anything else here is told of it."""

    def take(self, fmt: str, packed: Tensor, rows: int, cols: int, ids: Tensor) -> Tensor:
        """The rows `ids`, int64 [T] on the device, of the matrix that `packed` is -> [T, cols]:
        their tiles alone are unpacked."""
        one, tile = FORMATS[fmt].nbytes(1, cols), FORMATS[fmt].tile_bytes(cols)
        together = 1 if one < tile else TILE_ROWS  # f32 and bf16 are rows, without tiles
        tiles = packed.view(-1, one)[ids // together].reshape(-1)
        found = self.unpack(fmt, tiles, 0, together * ids.numel(), cols)
        each = torch.arange(ids.numel(), device=ids.device)
        return found.view(ids.numel(), together, cols)[each, ids % together]

    def unpack(self, fmt: str, packed: Tensor, base: int, rows: int, cols: int) -> Tensor:
        """packed uint8 [n] -> the [rows, cols] matrix at packed[base], float32: bit for bit what
        FORMATS[fmt].unpack gives."""
        return unpack(fmt, packed, base, rows, cols)

    def rounded(self, fmt: str, x: Tensor) -> Tensor:
        """x [T, cols] as the CPU kernels of `fmt` read it: int8 blocks of 32 columns, see
        moelite.dispatch.quantize_block, in one plane, in two, or as it is."""
        planes = FORMATS[fmt].planes
        return x if planes == 0 else _round(x, planes)

    def linear(
        self, fmt: str, x: Tensor, packed: Tensor, base: int, rows: int, cols: int
    ) -> Tensor:
        """x [T, cols], already `rounded`, times the matrix at packed[base] -> [T, rows].

        A large one is unpacked a strip of rows at a time, which for most formats are whole tiles.
        """
        strip = strip_rows(cols)
        if rows <= strip or not FORMATS[fmt].exact:
            return torch.matmul(x, self.unpack(fmt, packed, base, rows, cols).T)
        out, tile = x.new_empty((len(x), rows)), FORMATS[fmt].tile_bytes(cols)
        for at in range(0, rows, strip):
            n, first = min(strip, rows - at), base + at // TILE_ROWS * tile
            torch.matmul(x, self.unpack(fmt, packed, first, n, cols).T, out=out[:, at : at + n])
        return out

    def experts(  # noqa: PLR0913 - one launch: a matrix, its places, and where results go
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
        """out[target[k]] = the matrix at arena[bases[k]] times x[k], or times x[0] if x is one row.

        x [1 or K, cols], already `rounded`. bases int64 [K] on the device, or for kernels that are
        not blind on the host; of -1, "not here", the row of `out` stays as it is. target int32 or
        int64 [K], there too; by default row k. out [.., rows]; by default zeros [K, rows]. Returns
        out.
        """
        count = len(bases)
        if out is None:
            out = torch.zeros((count, rows), dtype=torch.float32, device=x.device)
        places = range(count) if target is None else target.tolist()
        for k, (base, to) in enumerate(zip(bases.tolist(), places, strict=True)):
            if base >= 0:
                row = x[:1] if len(x) == 1 else x[k : k + 1]
                out[to] = self.linear(fmt, row, arena, base, rows, cols)[0]
        return out

    def gated(self, both: Tensor, size: int, fmt_down: str) -> Tensor:
        """silu(gate) * up, `rounded` for fmt_down -> [K, size].

        both [K, pair_rows(size)]: products of an interleaved matrix: 8 of gate, 8 of up, in turn.
        """
        tiles = both.reshape(len(both), -1, 2, TILE_ROWS)
        gate, up = tiles[:, :, 0].reshape(len(both), -1), tiles[:, :, 1].reshape(len(both), -1)
        return self.rounded(fmt_down, (gate / (torch.exp(-gate) + 1) * up)[:, :size])

    def normed(
        self,
        x: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        eps: float,
        kind: Norm,
        fmt: str | None = None,
    ) -> Tensor:
        """The norm of each row of x [T, H], see moelite.ops.norm_run, then `rounded` for fmt.

        weight, bias: [H] or None.
        """
        shifted = x - x.mean(dim=1, keepdim=True) if kind == "layer" else x
        spread = (shifted * shifted).mean(dim=1, keepdim=True)
        y = shifted * (1 / torch.sqrt(spread + eps))
        y = y if weight is None else y * weight
        y = y if bias is None else y + bias
        return y if fmt is None else self.rounded(fmt, y)

    def add_experts(
        self, x: Tensor, parts: Tensor, weights: Tensor, gate: Tensor | None = None
    ) -> None:
        """x[t] += the sum over k, in order, of weights[t, k] * parts[t * K + k], in place.

        x [T, H], parts [T * K, H], weights [T, K]. gate: logits [T], whose sigmoid multiplies a
        token's sum, or None.
        """
        tokens, top_k = weights.shape
        each = parts.reshape(tokens, top_k, -1)
        total = torch.zeros_like(x)
        for k in range(top_k):
            total += weights[:, k, None] * each[:, k]
        if gate is not None:
            total *= torch.sigmoid(gate.reshape(tokens, 1))
        x += total

    def attend(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        length: Tensor | int,
        scale: float,
        window: int = 0,
    ) -> Tensor:
        """softmax(q k^T * scale) v of one token, in float32 -> [1, N, D].

        q [1, N, D]; k, v [NK, context, D], float16 or float32, N a multiple of NK. length: how many
        positions there are, the token's own included; an int32 tensor [1] on the device may be
        changed between replays of a graph. window: how many of the last ones it sees; 0: all.
        """
        last = length if isinstance(length, int) else int(length.item())
        first = max(0, last - window) if window > 0 else 0
        _, heads, size = q.shape
        grouped = q.reshape(len(k), heads // len(k), size) * scale
        scores = grouped @ k[:, first:last].to(torch.float32).transpose(1, 2)
        mixed = torch.softmax(scores, dim=-1) @ v[:, first:last].to(torch.float32)
        return mixed.reshape(1, heads, size)


class HostKernels(Kernels):
    """For torch's CPU: numpy, which defines the formats, unpacks 3 to 10 times as fast as torch."""

    def unpack(self, fmt: str, packed: Tensor, base: int, rows: int, cols: int) -> Tensor:
        end = base + FORMATS[fmt].nbytes(rows, cols) if FORMATS[fmt].exact else packed.numel()
        return torch.from_numpy(FORMATS[fmt].unpack(packed[base:end].numpy(), rows, cols))


def _round(x: Tensor, planes: int) -> Tensor:
    # quotients of two tensors: torch multiplies by a reciprocal where one is a number
    tokens, cols = x.shape
    whole = torch.nn.functional.pad(x, (0, pad(cols, BLOCK) - cols)).reshape(tokens, -1, BLOCK)
    largest = whole.abs().amax(dim=2, keepdim=True)
    finite = torch.isfinite(largest)
    steps = torch.full_like(largest, 127)
    inverse = torch.where(finite & (largest > 0), steps / largest, 0)
    tiny = inverse > 3e38
    inverse, largest = torch.where(tiny, 0, inverse), torch.where(tiny, 0, largest)
    unit = torch.where(finite, whole, 0) * inverse
    codes = torch.round(unit)
    if planes == 2:
        codes = codes + torch.round((unit - codes) * 254) * (1 / 254)
    scale = torch.where(finite, largest / steps, torch.nan)
    return (codes * scale).reshape(tokens, -1)[:, :cols].contiguous()
