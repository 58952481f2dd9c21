"""The decoder: embedding, layers, final norm, head, over packed weights and an expert source."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence

import numpy as np

from moelite.arch import Arch, MoE
from moelite.cachedreads import CachedReads
from moelite.dispatch import matrix_of
from moelite.expertjobs import ExpertJobs
from moelite.kv import KVCache
from moelite.layers import (
    Builder,
    ExpertSource,
    ExpertTiers,
    RopeTables,
    WeightSource,
    load_matrix,
    load_norm,
)
from moelite.lookahead import Lookahead
from moelite.program import Program
from moelite.quant.base import F32, pad
from moelite.routing import route
from moelite.step import (
    HEAD,
    LAYER_PHASES,
    LAYER_WORDS,
    LAYERS,
    NEXT_NORM,
    NO_GUESS,
    PARTS,
    clock,
    part_address,
)
from moelite.store import ExpertKey, Place
from moelite.threads import Team
from moelite.words import I32, words_of
from moelite.workspace import Workspace

# Multiply-adds of a layer below which a second thread costs more than it saves: 16 phases of 0.3 us
_ALONE = 200_000

# Share of a layer's experts that a chunk uses, above which the next layer's are read ahead unseen
_NEARLY = 0.9

OnRoute = Callable[[int, I32], None]  # (layer, selected experts [T, K])


class Decoder:
    """An Arch with its weights. Not thread-safe: one forward pass at a time.

    on_route: told which experts each token selected, layer by layer. routes int32 [positions, MoE
    layers, K]: which experts each token takes, whatever the router says, beginning again after the
    last position; None: those the router selects. low: a token's experts that are not in memory
    are taken from the low plane.
    """

    def __init__(
        self,
        arch: Arch,
        source: WeightSource,
        experts: ExpertSource,
        tiers: Mapping[int, ExpertTiers],
        *,
        work: Workspace,
        kv: KVCache,
        team: Team,
    ) -> None:
        self.lookahead = Lookahead("off")
        # with the next layer's norm: 78.6 % of the built-in model's experts, 73.7 with its own
        self.guess = NEXT_NORM
        self.arch, self.work, self.kv = arch, work, kv
        self.on_route: OnRoute | None = None
        self._routes: I32 | None = None
        self._given: dict[int, I32] = {}  # {layer: experts [T, K]} of the tokens in work
        self._team, self._experts = team, experts
        norm, head = load_norm(source, arch.norm), load_matrix(source, arch.head)
        embed = arch.embed.key
        packed = head.packed if arch.tied else source.read(embed)
        shape = arch.vocab_size, arch.hidden_size
        matrix = matrix_of(source.format_of(embed), packed, 0, *shape)
        self._logits = np.zeros(pad(arch.vocab_size, 8), np.float32)
        self._guessing = False
        self._logits_of = -1  # the row of the last chunk that they belong to
        ropes, build = RopeTables(arch, kv.context), Builder(arch, source, experts, tiers)
        layers = [build.layer(i, ropes, work, kv) for i in range(len(arch.layers))]
        table = np.array([words_of(layer) for layer in layers], np.int64).reshape(-1)
        assert table.size == len(layers) * LAYER_WORDS
        self._state, self._times = np.zeros(8, np.int64), np.zeros(8, np.int64)
        program = Program(
            table=table,
            layers=len(layers),
            attention=part_address("attention"),
            feed=part_address("feed"),
            embed=matrix,
            norm=norm,
            head=head,
            buffers=layers[0].buffers,
            ahead=work.ahead,
            logits=self._logits,
            state=self._state,
            times=self._times,
        )
        # words name arrays by their addresses: these own them
        self._program = np.array(words_of(program), np.int64)
        self._kept = layers, program, tiers
        self.low = any(found.low_tier >= 0 for found in tiers.values())
        self._at = int(self._program.ctypes.data)
        self._jobs = ExpertJobs(self._at, work, tiers)
        per_layer = _active_weights(arch) // len(layers)
        self._made = time.perf_counter(), clock()
        self._alone_tokens = _ALONE // max(per_layer, 1)

    def cached_reads(self, place: Callable[[ExpertKey], Place | None]) -> CachedReads:
        """Reads what the page cache holds on the decoder's threads."""
        return CachedReads(self._at, self._team, place)

    @property
    def context(self) -> int:
        return self.kv.context

    @property
    def chunk(self) -> int:
        return self.work.chunk

    @property
    def routes(self) -> I32 | None:
        return self._routes

    @routes.setter
    def routes(self, routes: I32 | None) -> None:
        self._routes, self._given = routes, {}
        self.work.given[:] = -1

    def forward(
        self, ids: Sequence[int], start: int, each: Callable[[int, F32], None] | None = None
    ) -> None:
        """Runs the tokens `ids` at positions start.. through all layers, filling the kv.

        ids must be at most work.chunk long. For every token, or for none if `each` is None,
        each(i, logits [V]) is called; the array is reused for the next token.
        """
        rows = np.asarray(ids, np.int64)
        self.work.span[1] = tokens = rows.size
        self._logits_of, first, layers = -1, 0, len(self.arch.layers)
        if tokens == 1 and self.low:
            self._experts.admit()
        self._guessing = tokens == 1 and self.lookahead.wanted()
        guess = self.guess if self._guessing else NO_GUESS
        began, asked = time.perf_counter(), self._experts.asked
        self._give(start, tokens)
        while True:
            words = [LAYERS, self._at, rows.ctypes.data, tokens, start, first, guess]
            self._run(words, tokens, rows, (layers - first + 2) * LAYER_PHASES)
            stop = int(self._state[0])
            if tokens == 1:
                self._settle(first, layers if stop < 0 else stop)
            if stop < 0:
                break
            self._route_to(stop, tokens)
            first = stop + 1
        if tokens == 1:
            self._logits_of = 0
            self.lookahead.told(time.perf_counter() - began, self._experts.asked - asked)
        if each is not None:
            for i in range(rows.size):
                each(i, self.logits(i))

    def part_seconds(self) -> dict[str, float]:
        """Seconds that the calling thread spent in each of PARTS since the decoder was made."""
        seconds, passed = time.perf_counter() - self._made[0], clock() - self._made[1]
        return {
            name: int(ticks) * seconds / max(passed, 1)
            for name, ticks in zip(PARTS, self._times, strict=False)
        }

    def logits(self, row: int) -> F32:
        """logits [V] float32 of row `row` of the last chunk; overwritten by the next call."""
        if self._logits_of != row:
            self._run([HEAD, self._at, row], 1)
            self._logits_of = row
        return self._logits[: self.arch.vocab_size]

    def _run(
        self, words: list[int], tokens: int, keep: object = None, phases: int = LAYER_PHASES
    ) -> None:
        self._team.run(words, phases, keep, alone=tokens <= self._alone_tokens)

    def _give(self, start: int, tokens: int) -> None:
        """Names the experts of the tokens at start.., if `routes` does."""
        if self._routes is None:
            return
        rows = self._routes[np.arange(start, start + tokens) % len(self._routes)]
        layers = self.arch.moe_layers
        if tokens == 1:
            self.work.given[list(layers), : rows.shape[2]] = rows[0]
        else:
            self._given = {layer: rows[:, i] for i, layer in enumerate(layers)}

    def _settle(self, first: int, last: int) -> None:
        """Tells the cache which experts one token used in layers first..last without waiting."""
        for i in range(first, last):
            mlp = self.arch.layers[i].mlp
            if isinstance(mlp, MoE):
                selected = self.work.selected[i, : mlp.router.top_k]
                if self.low:
                    self._experts.used(i, selected.tolist())
                else:
                    self._experts.touch(i, selected.tolist())
                self._tell(i, selected[None])

    def _tell(self, layer: int, selected: I32) -> None:
        if self._guessing and layer and isinstance(self.arch.layers[layer - 1].mlp, MoE):
            found = set(selected[0].tolist())
            self.lookahead.guessed += len(found)
            self.lookahead.right += len(found.intersection(self.work.guessed[layer].tolist()))
        if self.on_route is not None:
            self.on_route(layer, selected)

    def _expect(self, layer: int, tokens: int, used: int) -> Sequence[int]:
        # which experts `layer` will need, as far as it can be told: those that were guessed for one
        # token; all, where a chunk used nearly all of the layer before
        mlp = self.arch.layers[layer].mlp if layer < len(self.arch.layers) else None
        if not isinstance(mlp, MoE):
            return ()
        if tokens == 1:
            return self.work.guessed[layer, : mlp.router.top_k].tolist() if self._guessing else ()
        return range(mlp.num_experts) if used >= _NEARLY * mlp.num_experts else ()

    def _route_to(self, layer: int, tokens: int) -> None:
        """x += the routed experts' weighted outputs, in the router's order."""
        mlp = self.arch.layers[layer].mlp
        assert isinstance(mlp, MoE)
        (self._route_one if tokens == 1 else self._route_many)(layer, mlp, tokens)

    def _route_one(self, layer: int, mlp: MoE, tokens: int) -> None:
        selected = self.work.selected[layer, : mlp.router.top_k]
        self._tell(layer, selected[None])
        wanted = selected.tolist()
        left, ahead = len(wanted), self._expect(layer + 1, tokens, len(wanted))
        for batch in self._experts.batches(layer, wanted):
            self._experts.prefetch(layer + 1, ahead)
            left -= len(batch)
            ranked = [(wanted.index(expert), expert, slot) for expert, slot in batch]
            self._run(self._jobs.one(layer, mlp, ranked, last=not left), tokens)

    def _route_many(self, layer: int, mlp: MoE, tokens: int) -> None:
        logits = self.work.router_logits[:tokens, : mlp.num_experts]
        selected, weights = route(mlp.router, logits, self._given.get(layer))
        self._tell(layer, selected)
        flat = selected.reshape(-1)
        order = np.argsort(flat, kind="stable").astype(np.int32)
        ends = np.cumsum(np.bincount(flat, minlength=mlp.num_experts))
        wanted = np.unique(flat).tolist()
        runs = {e: order[ends[e - 1] if e else 0 : ends[e]] for e in wanted}
        left, ahead = len(wanted), self._expect(layer + 1, tokens, len(wanted))
        for batch in self._experts.batches(layer, wanted):
            self._experts.prefetch(layer + 1, ahead)
            left -= len(batch)
            target = np.concatenate([runs[e] for e, _ in batch])
            first = np.cumsum([0, *(runs[e].size for e, _ in batch)])
            experts, slots, rows = *zip(*batch, strict=True), 0 if left else tokens
            words, keep = self._jobs.many(
                layer, mlp, (experts, slots), (target, first), weights.reshape(-1), rows
            )
            self._run(words, target.size, keep)


def _active_weights(arch: Arch) -> int:
    """Weights that one token multiplies by in all layers."""
    total = 0
    for layer in arch.layers:
        a, mlp = layer.attention, layer.mlp
        parts = [a.q, a.k, a.v, a.o]
        if isinstance(mlp, MoE):
            e = mlp.experts
            total += mlp.router.top_k * sum(p.rows * p.cols for p in e.matrices)
            parts.append(mlp.router.linear)
            dense = mlp.shared
        else:
            dense = mlp
        if dense is not None:
            parts += dense.matrices
        total += sum(part.rows * part.cols for part in parts)
    return total
