"""Keys and values on a device, and attention over them: softmax(q k^T * scale) v."""

from __future__ import annotations

import torch

from moelite.arch import Arch
from moelite.attention import KVFormat
from moelite.errors import UsageError
from moelite.gpu.device import Device
from moelite.gpu.plan import SCORES_BYTES

DTYPES = {"f32": torch.float32, "f16": torch.float16}


class DeviceKV:
    """k[l], v[l]: [NK, context, D] of each layer, for the whole context."""

    def __init__(self, arch: Arch, context: int, kv: KVFormat, device: Device) -> None:
        if kv not in DTYPES:
            raise UsageError(
                f"keys and values in {kv} are for the CPU alone", fix="--kv f16, or --device cpu"
            )
        self.context = context
        shapes = [(x.attention.num_kv_heads, context, x.attention.head_dim) for x in arch.layers]
        self.k = [device.zeros(shape, DTYPES[kv]) for shape in shapes]
        self.v = [device.zeros(shape, DTYPES[kv]) for shape in shapes]

    def put_one(self, layer: int, at: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> None:
        """Keeps k, v [1, NK, D] of the position `at`, int64 [1] on the device."""
        for kept, new in ((self.k[layer], k), (self.v[layer], v)):
            kept.index_copy_(1, at, new.transpose(0, 1).to(kept.dtype))

    def put(self, layer: int, start: int, k: torch.Tensor, v: torch.Tensor) -> None:
        """Keeps k, v [T, NK, D] of the positions start.. of a layer."""
        end = start + k.shape[0]
        self.k[layer][:, start:end] = k.transpose(0, 1)
        self.v[layer][:, start:end] = v.transpose(0, 1)


def attend_many(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, start: int, scale: float, window: int
) -> torch.Tensor:
    """q [T, N, D] of the positions start.., k, v [NK, context, D] -> [T, N, D] float32.

    Each position sees those up to itself, the last `window` of them if that is not 0.
    """
    tokens, heads, size = q.shape
    groups, end = heads // k.shape[0], start + tokens
    first = 0 if not window else max(0, start - window + 1)
    keys, values = k[:, first:end].float(), v[:, first:end].float()
    out = torch.empty_like(q)
    step = max(1, SCORES_BYTES // (4 * heads * (end - first)))
    seen = torch.arange(first, end, device=q.device)
    for at in range(0, tokens, step):
        piece = q[at : at + step]
        n = piece.shape[0]
        # [NK, n * groups, D]: all queries of a kv head are one matrix
        rows = piece.view(n, -1, groups, size).transpose(0, 1).reshape(-1, n * groups, size)
        scores = torch.bmm(rows, keys.transpose(1, 2)).view(-1, n, groups, end - first)
        own = torch.arange(start + at, start + at + n, device=q.device)[:, None]
        hidden = seen[None] > own
        if window:
            hidden |= seen[None] <= own - window
        scores = (scores * scale).masked_fill_(hidden[None, :, None], float("-inf"))
        weights = torch.softmax(scores, -1).view(-1, n * groups, end - first)
        found = torch.bmm(weights, values).view(-1, n, groups, size)
        out[at : at + step] = found.transpose(0, 1).reshape(n, heads, size)
    return out
