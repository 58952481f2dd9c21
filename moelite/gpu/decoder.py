"""The decoder on a torch device: a layer is a few kernels, its experts come from the UpperCache.

A token waits for the device once a layer, to learn which experts it wants; where all of them are
there, or on their way, nothing waits for them but the device itself. Rounding of activations is
that of the CPU kernels (moelite.gpu.products), so both paths agree but for the order of sums.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence

import numpy as np
import torch

from moelite.arch import Arch, Attention, Linear, MoE
from moelite.budget import floating_slots
from moelite.gpu.device import Device, captured
from moelite.gpu.experts import DeviceExperts
from moelite.gpu.kv import DeviceKV, attend_many
from moelite.gpu.layers import RopeTables, load_layer, rotated
from moelite.gpu.products import Kernels
from moelite.gpu.routing import route
from moelite.gpu.weights import GatedOf, Matrix, NormOf, Weights
from moelite.lookahead import Lookahead
from moelite.quant import FORMATS
from moelite.quant.base import F32
from moelite.words import I32

OnRoute = Callable[[int, I32], None]
LOGITS_ROWS = 32  # rows whose logits are computed at once
# Share of a layer's experts that a chunk uses, above which the next layer's are fetched unseen
_NEARLY = 0.9


class DeviceDecoder:
    """An Arch with its weights on a device. Not thread-safe: one forward pass at a time.

    on_route, routes: as of moelite.model.Decoder.
    """

    def __init__(
        self,
        arch: Arch,
        weights: Weights,
        device: Device,
        kernels: Kernels,
        experts: DeviceExperts,
        kv: DeviceKV,
        chunk: int,
    ) -> None:
        self.arch, self.device, self.kv = arch, device, kv
        self.chunk, self.context = chunk, kv.context
        self.lookahead = Lookahead("off")
        self.on_route: OnRoute | None = None
        self.routes: I32 | None = None
        self.shrink: Callable[[], None] = _no_room  # makes room when the device is out of memory
        self._kernels, self._experts = kernels, experts
        ropes = RopeTables(kv.context, device)
        self._layers = [load_layer(layer, weights, ropes) for layer in arch.layers]
        self._norm, self._head = weights.norm(arch.norm), weights.matrix(arch.head)
        self._embed = (
            self._head
            if arch.tied
            else weights.matrix(
                Linear(weight=arch.embed, rows=arch.vocab_size, cols=arch.hidden_size)
            )
        )
        self._x = device.zeros((chunk, arch.hidden_size), torch.float32)
        self._tokens, self._logits_of = 0, -1
        self._logits = np.zeros(arch.vocab_size, np.float32)
        self._guess: list[int] = []
        self._wide = 0  # tokens of the last chunk, if it used nearly all of the first MoE layer
        self._seconds = 0.0
        moes, top_k = arch.moe_layers, floating_slots(arch)
        self._ones = device.zeros((chunk, 1), torch.float32).fill_(1)
        # of one token: its id, its position and the one after; the length of its context
        self._token = device.zeros((3,), torch.int64)
        self._length = device.zeros((1,), torch.int32)
        self._seen = device.zeros((len(moes) + 1, top_k), torch.int64)
        self._found = device.zeros((1, arch.vocab_size), torch.float32)
        self._settled = False
        self._graph: Callable[[], object] | None = None

    # --- one pass -------------------------------------------------------------------------------

    def forward(
        self, ids: Sequence[int], start: int, each: Callable[[int, F32], None] | None = None
    ) -> None:
        """Runs the tokens `ids` at positions start.. through all layers, filling the kv.

        ids must be at most `chunk` long. For every token, or for none if `each` is None,
        each(i, logits [V]) is called; the array is reused for the next token.
        """
        began, missed = time.perf_counter(), self._experts.cache.stats.misses
        self._logits_of, self._tokens = -1, len(ids)
        guessing = len(ids) == 1 and self.lookahead.wanted()
        while not self._tried(ids, start, guessing=guessing):
            self.shrink()  # raises where nothing is left to give up
        if len(ids) == 1:
            self.logits(0)  # the device is then through
            missed = self._experts.cache.stats.misses - missed
            self._settled = missed == 0
            self.lookahead.told(time.perf_counter() - began, missed)
        self._seconds += time.perf_counter() - began
        if each is not None:
            self._each(each)

    def _tried(self, ids: Sequence[int], start: int, *, guessing: bool) -> bool:
        # False: the device is full. Room is made by the caller: here the error still holds tensors
        try:
            if not self._unseen(ids, start):
                self._pass(ids, start, guessing=guessing)
        except torch.OutOfMemoryError:
            return False
        return True

    def _pass(self, ids: Sequence[int], start: int, *, guessing: bool) -> None:
        # all of it again gives the same: it reads what earlier passes left, and writes beyond
        x = self._x[: len(ids)]
        x.copy_(self._rows(self._place(ids, start)))
        self._guess = []
        if 0 < self._wide <= len(ids):
            first = self.arch.moe_layers[0]  # fetched unseen, while what comes before is computed
            self._ahead(first - 1, self._nearly_all(first, None))
        for i in range(len(self._layers)):
            self._attention(i, x, start)
            self._feed_forward(i, x, start, guessing=guessing)

    def _place(self, ids: Sequence[int], start: int) -> torch.Tensor:
        if len(ids) > 1:
            return torch.tensor(ids, dtype=torch.int64).to(self.device.torch)
        # one copy for all that the device wants to know of a token
        self._token.copy_(torch.tensor([ids[0], start, start + 1]), non_blocking=True)
        self._length.copy_(self._token[2:])
        return self._token[:1]

    # --- one token without a look at the host ---------------------------------------------------

    def _unseen(self, ids: Sequence[int], start: int) -> bool:
        """One token whose experts all are on the device, if so: the device finds them itself.

        Tried after a token that missed nothing. False: one was missing, and nothing is lost but the
        time: a fraction of what a token takes that waits for the host in every layer.
        """
        if len(ids) > 1 or not self._settled or self.routes is not None:
            return False
        if self.device.streamed and not self._kernels.blind:
            return False  # kernels that look at places would wait for the device at every product
        self._experts.table()
        self._place(ids, start)
        if self._graph is None:
            kept = self._kernels.blind
            self._graph = captured(self.device, self._blind) if kept else self._blind
        self._graph()
        seen = self._seen.cpu().numpy()  # here the host waits, once
        if seen[-1, 0]:
            self._settled = False
            return False
        for at, layer in enumerate(self.arch.moe_layers):
            mlp = self.arch.layers[layer].mlp
            assert isinstance(mlp, MoE)
            chosen = seen[at : at + 1, : mlp.router.top_k].astype(np.int32)
            self._experts.cache.touch(layer, chosen[0].tolist())
            if self.on_route is not None:
                self.on_route(layer, chosen)
        self._logits_of = 0
        torch.from_numpy(self._logits).copy_(self._found[0])
        return True

    def _blind(self) -> None:
        # reads _token and _length, writes _x, _found and _seen: experts chosen, then what missed
        x = self._x[:1]
        x.copy_(self._rows(self._token[:1]))
        missing, at = torch.zeros((), dtype=torch.bool, device=x.device), 0
        for i, layer in enumerate(self.arch.layers):
            self._attention(i, x, 0)
            if isinstance(layer.mlp, MoE):
                inputs = _Inputs(self, x, self._layers[i].post_norm)
                selected, weights = self._chosen(i, inputs, None)
                missing = missing | self._experts.found(i, selected, inputs)
                self._seen[at, : selected.shape[1]].copy_(selected[0])
                parts = self._experts.parts[: selected.shape[1]]
                self._add(i, x, inputs, (parts, weights))
                at += 1
            else:
                self._add(i, x, _Inputs(self, x, self._layers[i].post_norm), None)
        self._seen[-1, 0].copy_(missing)
        self._found.copy_(self._head_of(x))

    def forget(self) -> None:
        """The arena is another: what was captured names the old one."""
        self._graph, self._settled = None, False

    def part_seconds(self) -> dict[str, float]:
        """Seconds since the decoder was made; a device does not tell its parts apart."""
        return {"device": self._seconds}

    def logits(self, row: int) -> F32:
        """logits [V] float32 of row `row` of the last chunk; overwritten by the next call."""
        if self._logits_of != row:
            found = self._head_of(self._x[row : row + 1])[0]
            torch.from_numpy(self._logits).copy_(found)
            self._logits_of = row
        return self._logits

    def _each(self, each: Callable[[int, F32], None]) -> None:
        for at in range(0, self._tokens, LOGITS_ROWS):
            rows = self._x[at : min(at + LOGITS_ROWS, self._tokens)]
            found = self._head_of(rows).cpu().numpy()
            for i, row in enumerate(found):
                self._logits[:] = row
                self._logits_of = at + i
                each(at + i, self._logits)

    def _head_of(self, x: torch.Tensor) -> torch.Tensor:
        return self._linear(self._head, self._normed(x, self._norm, self._head.format))

    # --- parts ----------------------------------------------------------------------------------

    def _attention(self, i: int, x: torch.Tensor, start: int) -> None:
        layer, spec = self._layers[i], self.arch.layers[i].attention
        tokens, size = x.shape[0], spec.head_dim
        inputs = _Inputs(self, x, layer.input_norm)
        q, k, v = (self._linear(m, inputs.of(m.format)) for m in (layer.q, layer.k, layer.v))
        q = self._head_norm(q, layer.q_norm, spec).view(tokens, spec.num_heads, size)
        k = self._head_norm(k, layer.k_norm, spec).view(tokens, spec.num_kv_heads, size)
        v = v.view(tokens, spec.num_kv_heads, size)
        if spec.clip is not None:
            q, k, v = (part.clamp(-spec.clip, spec.clip) for part in (q, k, v))
        if layer.cos is not None and layer.sin is not None and spec.rope is not None:
            cos, sin = (
                t.index_select(0, self._token[1:2]) if tokens == 1 else t[start : start + tokens]
                for t in (layer.cos, layer.sin)
            )
            style = spec.rope.style
            q = rotated(q, cos[:, None], sin[:, None], style)
            k = rotated(k, cos[:, None], sin[:, None], style)
        keys, values, window = self.kv.k[i], self.kv.v[i], spec.window or 0
        if tokens == 1:
            self.kv.put_one(i, self._token[1:2], k, v)
            out = self._kernels.attend(q, keys, values, self._length, spec.scale, window)
        else:
            self.kv.put(i, start, k, v)
            out = attend_many(q, keys, values, start, spec.scale, window)
        out = out.reshape(tokens, spec.num_heads * size)
        x += self._linear(layer.o, self._kernels.rounded(layer.o.format, out))

    def _head_norm(self, x: torch.Tensor, norm: NormOf | None, spec: Attention) -> torch.Tensor:
        if norm is None:
            return x
        if spec.qk_norm_over == "full":
            return self._normed(x, norm, None)
        return self._normed(x.view(-1, spec.head_dim), norm, None)

    def _feed_forward(self, i: int, x: torch.Tensor, start: int, *, guessing: bool) -> None:
        inputs, added = _Inputs(self, x, self._layers[i].post_norm), None
        if isinstance(self.arch.layers[i].mlp, MoE):
            chosen = self._chosen(i, inputs, self._given(i, start, x.shape[0]))
            self._route(i, x, inputs, chosen[0], guessing=guessing)
            added = self._experts.parts[: chosen[0].numel()], chosen[1]
        self._add(i, x, inputs, added)

    def _chosen(
        self, i: int, inputs: _Inputs, given: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        matrix, mlp = self._layers[i].router, self.arch.layers[i].mlp
        assert matrix is not None
        assert isinstance(mlp, MoE)
        return route(mlp.router, self._linear(matrix, inputs.of(matrix.format)), given)

    def _add(
        self,
        i: int,
        x: torch.Tensor,
        inputs: _Inputs,
        routed: tuple[torch.Tensor, torch.Tensor] | None,
    ) -> None:
        """x += the routed experts' (outputs, weights), then the dense or shared part's output."""
        layer, k = self._layers[i], self._kernels
        out = gate = None
        if layer.dense is not None:  # before x changes, on which `inputs` may still have to look
            out = self._gated(layer.dense, inputs)
            if layer.shared_gate is not None:
                gate = self._linear(layer.shared_gate, inputs.of(layer.shared_gate.format))
        if routed is not None:
            k.add_experts(x, *routed, None)
        if out is not None:
            k.add_experts(x, out, self._ones[: len(out)], gate)

    def _gated(self, part: GatedOf, inputs: _Inputs) -> torch.Tensor:
        both = self._linear(part.gate_up, inputs.of(part.gate_up.format))
        return self._linear(part.down, self._kernels.gated(both, part.size, part.down.format))

    # --- routed experts -------------------------------------------------------------------------

    def _route(
        self,
        layer: int,
        x: torch.Tensor,
        inputs: _Inputs,
        selected: torch.Tensor,
        *,
        guessing: bool,
    ) -> None:
        tokens = selected.shape[0]
        following = self._next_guess(layer, x) if guessing else None
        wanted = selected if following is None else torch.cat([selected, following])
        ids = wanted.cpu().numpy().astype(np.int32)  # here the host waits for the device
        ids, ahead = ids[:tokens], ids[tokens:].reshape(-1).tolist()
        self._tell(layer, ids)
        if tokens == 1:
            self._experts.one(layer, ids[0].tolist(), inputs, lambda: self._ahead(layer, ahead))
        else:
            used = np.unique(ids).size
            ahead = self._nearly_all(layer + 1, used)
            if layer == self.arch.moe_layers[0]:
                self._wide = tokens if self._nearly_all(layer, used) else 0
            self._experts.many(layer, ids, inputs, lambda: self._ahead(layer, ahead))
        self._guess = ahead

    def _ahead(self, layer: int, experts: Sequence[int]) -> None:
        if experts and layer + 1 < len(self._layers):
            self._experts.cache.prefetch(layer + 1, experts)

    def _next_guess(self, layer: int, x: torch.Tensor) -> torch.Tensor | None:
        # layer l's residual, normed as the next layer does, through its router
        if layer + 1 >= len(self._layers):
            return None
        found, mlp = self._layers[layer + 1], self.arch.layers[layer + 1].mlp
        here = self.arch.layers[layer].mlp
        if not isinstance(mlp, MoE) or not isinstance(here, MoE) or found.router is None:
            return None
        if mlp.router.top_k != here.router.top_k:
            return None
        normed = self._normed(x, found.post_norm, found.router.format)
        return route(mlp.router, self._linear(found.router, normed))[0]

    def _nearly_all(self, layer: int, used: int | None) -> list[int]:
        # a layer's experts, if a chunk that used `used` of a layer will use nearly all of them
        mlp = self.arch.layers[layer].mlp if layer < len(self.arch.layers) else None
        if isinstance(mlp, MoE) and (used is None or used >= _NEARLY * mlp.num_experts):
            return list(range(mlp.num_experts))
        return []

    def _tell(self, layer: int, ids: I32) -> None:
        if self._guess and ids.shape[0] == 1:
            found = set(ids[0].tolist())
            self.lookahead.guessed += len(found)
            self.lookahead.right += len(found.intersection(self._guess))
        if self.on_route is not None:
            self.on_route(layer, ids)

    def _given(self, layer: int, start: int, tokens: int) -> torch.Tensor | None:
        if self.routes is None:
            return None
        rows = self.routes[np.arange(start, start + tokens) % len(self.routes)]
        at = self.arch.moe_layers.index(layer)
        return torch.from_numpy(rows[:, at].astype(np.int64)).to(self.device.torch)

    # --- products -------------------------------------------------------------------------------

    def _normed(self, x: torch.Tensor, norm: NormOf | None, fmt: str | None) -> torch.Tensor:
        if norm is None:
            return x if fmt is None else self._kernels.rounded(fmt, x)
        return self._kernels.normed(x, norm.weight, norm.bias, norm.eps, norm.kind, fmt)

    def _linear(self, matrix: Matrix, x: torch.Tensor) -> torch.Tensor:
        """x [T, cols], rounded as its format wants, -> [T, rows], bias included."""
        fmt, packed, rows, cols, _ = matrix
        out = self._kernels.linear(fmt, x, packed, 0, rows, cols)
        return out if matrix.bias is None else out.add_(matrix.bias)

    def _rows(self, ids: torch.Tensor) -> torch.Tensor:
        """The embeddings [T, H] of tokens, int64 on the device."""
        fmt, packed, rows, cols, _ = self._embed
        return self._kernels.take(fmt, packed, rows, cols, ids)


def _no_room() -> None:
    raise torch.OutOfMemoryError("the device is full")


class _Inputs:
    """A normed residual, rounded as formats want it; each kind of rounding is made once."""

    def __init__(self, decoder: DeviceDecoder, x: torch.Tensor, norm: NormOf | None) -> None:
        self._decoder, self._x, self._norm = decoder, x, norm
        self._made: dict[int, torch.Tensor] = {}

    def of(self, fmt: str) -> torch.Tensor:
        """[T, cols] float32 as products of a format read it."""
        planes = FORMATS[fmt].planes
        if planes not in self._made:
            self._made[planes] = self._decoder._normed(self._x, self._norm, fmt)
        return self._made[planes]
