"""Assembles a model from a store within a budget; owns its buffers, files and threads."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, get_args

import numpy as np

from moelite import warm
from moelite.arch import Arch, MoE
from moelite.attention import KVFormat
from moelite.bandwidth import read_speed
from moelite.budget import Footprint, Sizes, plan, refuse, slot_counts
from moelite.cache import CacheStats, ExpertCache, allocate_arena
from moelite.cache.trace import I32, check_routes
from moelite.cachedreads import CachedReads
from moelite.drive import DriveSpeed, drive_speed, speed_now
from moelite.errors import CheckpointError, StoreError, UsageError
from moelite.forecast import Forecast, Hits
from moelite.gpu.devices import check, choose
from moelite.kv import KVCache
from moelite.layers import ExpertTiers, tiers_of
from moelite.lookahead import Choice, Lookahead
from moelite.machine import Populate, allocate, memory
from moelite.meter import Meter
from moelite.model import Decoder, OnRoute
from moelite.models import build
from moelite.outlook import PROMPT_TOKENS, outlook, speeds_here, usual_hits
from moelite.quant.base import ALIGN, F32, U8, pad
from moelite.session import Decoding, Session
from moelite.sizing import budget_beside, budget_of, context_of, need_low_plane, stored, threads_of
from moelite.step import LAYER_PHASES
from moelite.store import Store
from moelite.threads import Team
from moelite.tokenizer import Tokenizer
from moelite.workspace import Workspace

READERS = 4  # threads that read experts where the drive was not asked
Reads = Literal["auto", "direct", "page-cache"]
OnMiss = Literal["wait", "low"]


class _StoreWeights:
    """Dense weights read from a store into one block of memory."""

    def __init__(self, store: Store) -> None:
        self._store, self._used = store, 0
        sizes = (store.dense_entry(key).nbytes for key in store.dense_keys())
        self._block = allocate(sum(pad(size, ALIGN) for size in sizes))

    def format_of(self, key: str) -> str:
        return self._store.dense_entry(key).format

    def room(self, nbytes: int) -> U8:
        start, end = self._used, self._used + pad(nbytes, ALIGN)
        if end > self._block.size:  # a few rows of zeros that make a pair of matrices even
            return np.zeros(nbytes, np.uint8)
        self._used = end
        return self._block[start : start + nbytes]

    def read(self, key: str) -> U8:
        room = self.room(self._store.dense_entry(key).nbytes)
        return self._store.read_dense(key, room, verify=True)

    def borrow(self, key: str) -> U8:
        return self._store.read_dense(key, verify=True)


class Model:
    """A model in memory, within its budget. Close it, or use it as a context manager.

    One thread at a time: generation, sessions and `forward` share one kv and one set of buffers.
    """

    on_miss: OnMiss
    _decoder: Decoding

    def __init__(
        self,
        store: Store,
        arch: Arch,
        footprint: Footprint,
        kv: KVFormat,
        drive: DriveSpeed | None = None,
        lookahead: Choice = "auto",
        on_miss: OnMiss = "wait",
    ) -> None:
        self._begin(store, arch, footprint, kv, drive)
        self.on_miss = on_miss
        self.team = Team(footprint.threads, (len(arch.layers) + 2) * LAYER_PHASES)
        self.lookahead = Lookahead("off" if on_miss == "low" else lookahead)
        work = Workspace(arch, footprint.chunk, footprint.threads)
        arena = self.experts.arena
        self._decoder = decoder = Decoder(
            arch,
            _StoreWeights(store),
            self.experts,
            self._tiers(arena),
            work=work,
            kv=KVCache(arch, self.context, kv),
            team=self.team,
        )
        decoder.lookahead = self.lookahead
        if CachedReads.available and not store.direct:
            self.experts.at_once = decoder.cached_reads(store.cached_place)

    def _begin(
        self,
        store: Store,
        arch: Arch,
        footprint: Footprint,
        kv: KVFormat,
        drive: DriveSpeed | None,
    ) -> None:
        """What every way to compute has: a tokenizer, and the cache of experts in memory."""
        self.store, self.arch, self.footprint = store, arch, footprint
        self.drive = drive  # None: every expert fits in memory, so nobody asked
        self.context, self.kv_format = footprint.context, kv
        self.on_miss, self.forced = "wait", False  # forced: routes are given, see force_routes
        self._session: Session | None = None
        self._tokenizer: Tokenizer | None = None
        if "tokenizer.json" in store.manifest.files:
            self._tokenizer = Tokenizer.from_files(store.sidecars())
        slots = slot_counts(store.layers, footprint.slots)
        arena = allocate_arena(slots)
        self._populate = Populate(arena)
        self.experts = ExpertCache(
            arena=arena,
            slots=slots,
            sizes={layer: entry.slot_bytes for layer, entry in store.layers.items()},
            quotas=footprint.slots.quotas,
            read=store.load_record,
            readers=drive.depth if drive else READERS,
        )

    def _tiers(self, arena: U8) -> dict[int, ExpertTiers]:
        found = {}
        for layer, entry in self.store.layers.items():
            low = None
            if self.on_miss == "low":
                low = allocate(entry.low_bytes)
                self.store.read_low(layer, low)
            found[layer] = tiers_of(entry, arena, low)
        return found

    @property
    def tokenizer(self) -> Tokenizer:
        """The model's tokenizer. CheckpointError if its checkpoint came without one."""
        if self._tokenizer is None:
            raise CheckpointError(
                f"{self.store.path} has no tokenizer.json",
                fix="give token ids instead of text, or quantize a checkpoint that has one",
            )
        return self._tokenizer

    def session(self) -> Session:
        """A new, empty session. It takes over the model's kv from the one before."""
        self._session = Session(self._decoder, lambda: self._session)
        return self._session

    def forward(self, ids: Sequence[int]) -> F32:
        """logits [T, V] float32 of the tokens `ids`, in a session of their own."""
        return self.session().append(ids)

    @property
    def on_route(self) -> OnRoute | None:
        """Told (layer, selected experts [T, K] int32) of every token or chunk, as it is routed."""
        return self._decoder.on_route

    @on_route.setter
    def on_route(self, told: OnRoute | None) -> None:
        self._decoder.on_route = told

    def force_routes(self, routes: I32 | None) -> None:
        """From now on, the token at position p takes the experts routes[p % len(routes)].

        routes: int32 [positions, MoE layers, K], distinct ids, as a trace has them; None: the
        router's own choice again. Their weights are what the router gives to them, so the text
        makes no sense; the expert traffic is that of the model that the routes come from. Raises
        UsageError if they do not fit this model.
        """
        if routes is not None:
            moes = [x.mlp for x in self.arch.layers if isinstance(x.mlp, MoE)]
            experts, top_k = min(m.num_experts for m in moes), moes[0].router.top_k
            check_routes(routes, layers=len(moes), experts=experts, top_k=top_k)
        self._decoder.routes, self.forced = routes, routes is not None

    def stats(self) -> CacheStats:
        """Expert cache counters since the model was loaded."""
        return self.experts.stats

    @property
    def token_bytes(self) -> int:
        """Bytes of weights that a token multiplies by: all but embeddings and other experts."""
        store, arch = self.store, self.arch
        keys = set(store.dense_keys()) - (set() if arch.tied else {arch.embed.key})
        total = sum(store.dense_entry(key).nbytes for key in keys)
        for number, layer in enumerate(arch.layers):
            if isinstance(layer.mlp, MoE):
                entry = store.layers[number]
                total += layer.mlp.router.top_k * entry.payload_bytes // entry.experts
        return total

    def memory_speed(self) -> float:
        """Bytes per second at which the model's threads read memory at this moment."""
        used = self.footprint.resident_bytes
        return read_speed(self.experts.arena[:used], self.footprint.threads)

    def drive_speed(self) -> float | None:
        """Bytes per second that the drive gives at this moment; None where nothing is read from it,
        because all experts fit in memory or the page cache."""
        if self.drive is None or not self.store.direct:
            return None
        drive = replace(self.drive, direct=True)  # also where --reads overruled the probe
        return speed_now(self.store.path, self.footprint.record_bytes, drive)

    def part_seconds(self) -> dict[str, float]:
        """Seconds of computing since the model was loaded, by part of a layer; see moelite.step."""
        return self._decoder.part_seconds()

    @property
    def sizes(self) -> Sizes:
        """What its budget was planned for."""
        return Sizes(
            arch=self.arch,
            context=self.context,
            kv=self.kv_format,
            threads=self.footprint.threads,
            low=self.on_miss == "low",
            **stored(self.store.manifest)._asdict(),
        )

    def forecast(
        self,
        hits: Hits | None = None,
        folder: Path | None = None,
        *,
        prompt_tokens: int = PROMPT_TOKENS,
        lookahead: bool = True,
    ) -> Forecast:
        """How fast it will be at its budget, as `foresee` tells beforehand.

        lookahead: False where guesses will be wrong, because routes are forced.
        """
        sizes, found, store = self.sizes, self.footprint, self.store.path
        here = speeds_here(
            *(sizes, found, store, folder),
            memory_speed=self.memory_speed,
            direct=self.store.direct,
            lookahead=lookahead and self.lookahead.choice != "off",
        )
        usual = hits or usual_hits(self.arch)
        return outlook(sizes, found, usual, here, prompt_tokens=prompt_tokens)

    def meter(self, folder: Path) -> Meter:
        """Measures a generation, for the forecasts of later runs; see moelite.meter."""
        return Meter(self, self.store.manifest.fingerprint, folder)

    def generate(self, prompt: str | Sequence[int], **options: Any) -> Any:
        """The Completion of a text or of token ids. Options: see moelite.SamplingOptions."""
        from moelite import generate

        return generate.complete(self, prompt, **options)

    def stream(self, prompt: str | Sequence[int], **options: Any) -> Iterator[Any]:
        """As `generate`, step by step."""
        from moelite import generate

        return generate.stream(self, prompt, **options)

    def chat(self, messages: Sequence[Mapping[str, Any]], **options: Any) -> Any:
        """The answer to a conversation of {"role", "content"} messages, by the model's template."""
        from moelite import generate

        return generate.chat(self, messages, **options)

    def close(self) -> None:
        """Ends threads and files, and gives the memory back."""
        self._populate.close()
        self.experts.close()
        self.team.close()
        self.store.close()

    def __enter__(self) -> Model:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()


def _choose_reads(store: Store, footprint: Footprint, reads: Reads) -> DriveSpeed | None:
    """Sets store.direct; what the drive gives, where it will be read from all the time."""
    if reads not in get_args(Reads):
        raise UsageError(
            f"reads {reads!r} is not known", fix=f"one of {', '.join(get_args(Reads))}"
        )
    whole = footprint.experts_resident >= footprint.experts_total
    try:
        drive = None if whole else drive_speed(store.path, footprint.record_bytes)
    except OSError as problem:
        raise StoreError(
            f"{store.path} cannot be read: {problem.strerror or problem}", fix="check the disk"
        ) from problem
    spare = memory().available_bytes - footprint.used_bytes
    kept = spare >= footprint.experts_bytes  # by the page cache, once read
    store.direct = reads == "direct" or (
        reads == "auto" and not kept and (drive is None or drive.direct)
    )
    return drive


def load(  # noqa: PLR0913 - one for each choice a user has
    path: str | Path,
    *,
    ram: str | int | None = None,
    context: int | None = None,
    threads: int | None = None,
    kv: KVFormat = "f16",
    chunk: int | None = None,
    reads: Reads = "auto",
    lookahead: Choice = "auto",
    on_miss: OnMiss = "wait",
    device: str = "cpu",
    vram: str | int | None = None,
    miss: Literal["auto", "copy", "cpu"] = "auto",
    link: Any = None,
    on_compile: Callable[[str], None] | None = None,
    on_note: Callable[[str], None] | None = None,
) -> Model:
    """Loads the store at `path` within `ram` (default: four fifths of free memory).

    context: tokens to keep (default 4096, or all positions the model knows if fewer). kv: format of
    keys and values. chunk: prompt tokens computed at once (default: by the budget). reads: experts
    past the page cache or through it (default: through it where it has room for all of them, or
    where that is faster). lookahead: whether the next layer's experts are guessed and read ahead
    (default: where it is faster). on_miss: "low" answers with an expert that is not in memory from
    the store's low plane, which is kept in memory, while it is being read: faster, and the tokens
    depend on what is in memory at the moment; prompts are always read with whole experts.
    device: "auto", "cpu", or a torch device, "cuda", "mps", "xpu", "torch:cpu": dense weights, kv
    and a cache of experts are then within `vram` of its memory (default: nine tenths of what is
    free there). miss: where a token's expert that is not on the device is computed: "copy" it
    there, on the "cpu", or "auto", where it is ready sooner. link: a moelite.gpu.device.Link to
    simulate on torch:cpu. on_compile: told about the one-time compilation of kernels. on_note: told
    what else a user should know.
    Raises BudgetError if it does not fit, naming the minimum, and StoreError if `path` is not a
    sound store.
    """
    chosen = choose(device)
    store = Store.open(Path(path))
    try:
        if on_miss not in get_args(OnMiss):
            raise UsageError(f"on_miss {on_miss!r} is not known", fix="wait or low")
        if on_miss == "low":
            need_low_plane(store.layers, store.path)
        check(chosen, vram, low=on_miss == "low")
        arch = build(store.config)
        sizes = Sizes(
            arch=arch,
            context=context_of(arch, context),
            kv=kv,
            threads=threads_of(threads),
            low=on_miss == "low",
            **stored(store.manifest)._asdict(),
        )
        if chosen is not None:
            from moelite.gpu.model import load_on

            return load_on(
                chosen,
                store,
                sizes,
                ram=budget_beside(chosen, ram),
                vram=vram,
                chunk=chunk,
                drive_of=lambda store, found: _choose_reads(store, found, reads),
                lookahead=lookahead,
                miss=miss,
                link=link,
                on_compile=on_compile,
                on_note=on_note,
            )
        footprint = plan(sizes, budget_of(ram), chunk)
        if not footprint.fits:
            raise refuse(footprint, store.path.name)
        warm.ensure(store.formats, on_compile)
        drive = _choose_reads(store, footprint, reads)
        store.hold_open()
        return Model(store, arch, footprint, kv, drive, lookahead, on_miss)
    except BaseException:
        store.close()
        raise
