"""Checkpoint to store: expert by expert, within a memory budget, resumable.

A file is written under a temporary name, synced and renamed; the journal (moelite.partial.json)
then takes it down as finished. A killed run goes on at the first file that the journal lacks, and
the result is byte-identical to an uninterrupted one.
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from moelite.arch import TensorRef
from moelite.calibrate import TOKENS, Rare
from moelite.calibration import Calibration, read_text
from moelite.checkpoint import Source
from moelite.densefile import DenseFile
from moelite.errors import MoeliteError, StoreError
from moelite.hub import Progress
from moelite.inputs import open_source
from moelite.inventory import DenseItem, Inventory, classes_of, source_bytes, take_inventory
from moelite.kept import keeping
from moelite.layerfile import write_layer
from moelite.models import build
from moelite.packing import (
    TEMPORARY,
    locked,
    pack_expert,
    replace_file,
    sync_folder,
    workers,
)
from moelite.process import peak_rss_bytes
from moelite.quant.base import U8
from moelite.quant.qmoe import Statistics
from moelite.recipe import Recipe, choose
from moelite.resume import State, look
from moelite.sizing import packing_budget
from moelite.sparsity import ternary_statistics
from moelite.store import Store
from moelite.storefile import (
    DENSE,
    MANIFEST,
    PARTIAL,
    VERSION,
    FileEntry,
    LayerEntry,
    Manifest,
    TensorClass,
    describe,
    dump,
    file_json,
    layer_file,
    manifest_bytes,
    spans,
)
from moelite.target import Target, Way, fit
from moelite.tensorfile import read_header
from moelite.units import show_bytes


@dataclass(frozen=True, slots=True, kw_only=True)
class QuantizeReport:
    """What quantize did, or with dry_run would do.

    reused: the store was finished already. resumed: files kept from an interrupted run. ignored:
    tensors of the checkpoint that the model does not use. rare: experts that the calibration text
    reached little. ternary: of experts in qmoe's formats. encodings: bytes read by how the
    checkpoint keeps them ("BF16", "Q4_K", "gptq int4, groups of 128"), largest first.
    """

    source: str
    out: str
    recipe: dict[str, Any]
    classes: tuple[TensorClass, ...]
    ignored: tuple[str, ...]
    encodings: dict[str, int]
    layers: int
    seconds: float
    peak_rss_bytes: int
    resumed: int = 0
    reused: bool = False
    dry_run: bool = False
    rare: tuple[Rare, ...] = ()
    ternary: Statistics | None = None

    @property
    def bytes_before(self) -> int:
        return sum(c.bytes_before for c in self.classes)

    @property
    def bytes_after(self) -> int:
        return sum(c.bytes_after for c in self.classes)


def quantize(  # noqa: PLR0913 - the options of `moelite quantize`, one by one
    src: Source | str | Path,
    out: str | Path,
    *,
    experts: str | None = None,
    dense: str | None = None,
    recipe: str | Recipe | None = None,
    low: str | None = None,
    target: Target | None = None,
    ram: str | int | None = None,
    dry_run: bool = False,
    progress: Progress | None = None,
    offline: bool = False,
    calibrate: str | Path | Sequence[int] | None = None,
    calibrate_tokens: int = TOKENS,
) -> QuantizeReport:
    """Write the store of a checkpoint; peak memory of this process stays below `ram`, by default
    2 GiB more than it holds now.

    src: a checkpoint's folder, a GGUF file, a hub id, "smollm2-moe" or a Source. experts, dense:
    formats (default: experts whose codes a format carries as they are keep them, others get int4;
    int8); or a recipe, by its name or file. low: the format of a plane of all experts beside the
    main one, for `load(on_miss="low")`. target: a size; formats of experts are then chosen for it,
    by what each costs each expert as the text of `calibrate` meets it. dry_run: only report sizes.
    progress: called with (done, in all, what). calibrate: a text file or token ids, of which the
    first calibrate_tokens show the formats what experts read.

    Raises BudgetError with the minimum, StoreError when `out` holds something else, and what
    `open_source` and `take_inventory` raise.
    """
    start, out, budget = time.perf_counter(), Path(out), packing_budget(ram)
    source = open_source(src, offline=offline, progress=progress)
    asked = choose(recipe, experts, dense, low)
    text = read_text(source, calibrate, calibrate_tokens)
    if target is not None:
        asked = fit(source, asked, target, text, Way(out, not dry_run, budget, progress or _silent))
    elif experts is None and recipe is None and calibrate is None:
        asked = keeping(source, build(source.config), asked)
    inventory = take_inventory(source, asked)
    file = DenseFile(source, inventory, out, text is not None)
    calibration = None if text is None else Calibration(source, inventory, out, text, file)
    state = State()
    if not dry_run:
        job = _Job(source, inventory, out, progress or _silent, file, calibration)
        try:
            state = job.run(budget)
        except OSError as problem:
            raise StoreError(
                f"{out} cannot be written: {problem}", fix="check the disk"
            ) from problem
        finally:
            if calibration is not None:
                calibration.close()
    return QuantizeReport(
        source=source.source,
        out=str(out),
        recipe=inventory.recipe.as_json(),
        classes=state.classes or inventory.classes,
        ignored=inventory.ignored,
        encodings=inventory.encodings,
        layers=len(inventory.layers),
        seconds=time.perf_counter() - start,
        peak_rss_bytes=peak_rss_bytes(),
        resumed=0 if state.finished else len(state.kept),
        reused=state.finished,
        dry_run=dry_run,
        rare=() if calibration is None else calibration.rare,
        ternary=None if dry_run else ternary_statistics(out),
    )


def _silent(done: int, total: int, note: str) -> None:
    pass


class _Job:
    """One run of quantize."""

    def __init__(
        self,
        source: Source,
        inventory: Inventory,
        out: Path,
        progress: Progress,
        dense: DenseFile,
        calibration: Calibration | None,
    ) -> None:
        self.source = source
        self.dense = dense
        self.calibration = calibration
        self.inventory = inventory
        self.out = out
        self.progress = progress
        self.files: dict[str, FileEntry] = {}
        self.entries: dict[int, LayerEntry] = {}  # of finished layers
        self.done_bytes = 0
        self.workers = 1

    def run(self, budget: int) -> State:
        state = look(self.out, self._identity())
        if state.finished:
            return state
        self.files, self.entries = dict(state.kept), dict(state.entries)
        self.workers = workers(self.inventory, self.source, budget)
        if self.calibration is not None:
            self.calibration.fit(budget, self.entries)
        self._check_disk(state)
        self.out.mkdir(parents=True, exist_ok=True)
        with locked(self.out):
            for left in self.out.glob(f"*{TEMPORARY}"):
                left.unlink()
            self.dense.resume(state.dense, DENSE in self.files)
            self._journal()
            for name, data in self.source.files.items():
                replace_file(self.out / name, data)
                self.files[name] = describe(self.out / name, [])
            self._begin_dense()
            for layer in range(len(self.inventory.arch.layers)):
                self._calibrated(layer)
                if layer in self.inventory.layers:
                    size = _source_bytes(self.source, self._expert_refs(layer))
                    self._step(layer_file(layer), size, self._layer, layer)
            if self.dense.layers:
                self._step(DENSE, 0, self.dense.finish)
            manifest = self._manifest()
            state.classes = manifest.classes
            replace_file(self.out / MANIFEST, manifest_bytes(manifest))
            (self.out / PARTIAL).unlink(missing_ok=True)
            sync_folder(self.out)
        Store.open(self.out).close()
        return state

    def _step(self, name: str, size: int, write: Callable[..., None], *args: Any) -> None:
        """Write one file unless it is there, and take it down in the journal."""
        begin = self.done_bytes
        if name not in self.files:
            write(*args)
            header = read_header(self.out / name, StoreError)
            self.files[name] = describe(self.out / name, list(spans(header)))
            self._journal()
        self.done_bytes = begin + size
        self.progress(self.done_bytes, self.inventory.source_bytes, name)

    def _begin_dense(self) -> None:
        """The dense file, but for what is packed layer by layer."""
        size = sum(map(self._size, self.dense.plain()))
        if not self.dense.layers:
            self._step(DENSE, size, self.dense.write, self._each_item)
            return
        begin = self.done_bytes
        if not self.dense.finished and self.dense.done is None:
            self.dense.write(self._each_item)
            self._journal()
        self.done_bytes = begin + size

    def _calibrated(self, layer: int) -> None:
        """What is packed by calibration of a layer's dense part."""
        if (parts := self.dense.parts(layer)) and self.calibration is not None:
            if not self.dense.finished and layer not in (self.dense.done or ()):
                self.calibration.pack_dense(layer)
                self._journal()
            self.done_bytes += _source_bytes(self.source, parts)
            self.progress(
                self.done_bytes, self.inventory.source_bytes, f"dense weights, layer {layer}"
            )

    def _identity(self) -> dict[str, Any]:
        return {
            "source": self.source.source,
            "fingerprint": self.inventory.fingerprint,
            "recipe": self.inventory.recipe.as_json(),
            "calibration": None if self.calibration is None else self.calibration.facts,
        }

    def _check_disk(self, state: State) -> None:
        place = next(p for p in (self.out, *self.out.absolute().parents) if p.exists())
        need = self.inventory.store_bytes - sum(e.bytes for e in state.kept.values())
        need -= self.dense.left_bytes
        free = shutil.disk_usage(place).free
        if need > free:
            raise MoeliteError(
                f"{self.out} takes {show_bytes(need)} of disk; {show_bytes(free)} are free",
                fix="make room, or choose a folder on another disk",
            )

    # --- writing ---

    def _journal(self) -> None:
        files = {name: file_json(e) for name, e in self.files.items() if e.crc32}
        layers = {str(layer): asdict(entry) for layer, entry in self.entries.items()}
        facts = {"store_version": VERSION, **self._identity(), "files": files, "layers": layers}
        if self.dense.layers and self.dense.done is not None:
            facts["dense"] = self.dense.done
        replace_file(self.out / PARTIAL, dump(facts))

    def _manifest(self) -> Manifest:
        inv = self.inventory
        return Manifest(
            source=self.source.source,
            fingerprint=inv.fingerprint,
            recipe=inv.recipe.as_json(),
            calibration=self._identity()["calibration"],
            layers=self.entries,
            classes=classes_of(inv, self.entries),
            tensors={key: item.spec for key, item in inv.items.items()},
            files=dict(sorted(self.files.items())),
        )

    def _expert_refs(self, layer: int) -> Iterator[tuple[TensorRef, tuple[int, ...]]]:
        mlp = self.inventory.layers[layer]
        for expert in range(mlp.num_experts):
            yield from self._one_expert(layer, expert)

    def _one_expert(self, layer: int, expert: int) -> Iterator[tuple[TensorRef, tuple[int, ...]]]:
        for part in self.inventory.layers[layer].experts.matrices:
            yield part.weight.at(expert), (part.rows, part.cols)

    def _size(self, item: DenseItem) -> int:
        return _source_bytes(self.source, [(item.ref, item.spec.shape)])

    def _each_item(self, items: Iterable[DenseItem], write: Callable[[DenseItem], None]) -> None:
        def done(item: DenseItem) -> int:
            write(item)
            return self._size(item)

        self._each(items, done, "attention, embeddings and the rest")

    def _layer(self, layer: int) -> None:
        mlp = self.inventory.layers[layer]

        def pack(expert: int, formats: tuple[tuple[str, str], ...]) -> list[tuple[U8, U8]]:
            if self.calibration is not None:
                return self.calibration.pack(layer, expert, formats)
            return [pack_expert(self.source, mlp, expert, pair) for pair in formats]

        def each(experts: Iterable[int], one: Callable[[int], None]) -> None:
            def done(expert: int) -> int:
                one(expert)
                return _source_bytes(self.source, self._one_expert(layer, expert))

            self._each(experts, done, f"layer {layer}")

        path, entry = self.out / layer_file(layer), self.inventory.entries[layer]
        self.entries[layer] = write_layer(path, entry, pack, each)

    def _each(self, keys: Iterable[Any], one: Callable[[Any], int], note: str) -> None:
        """Run `one` on every key, on as many threads as memory permits; it returns bytes done."""
        done = self.done_bytes
        threads = self.workers if self.calibration is None else 1  # it takes experts in order
        pool = ThreadPoolExecutor(threads, thread_name_prefix="moelite-pack")
        try:
            for future in as_completed([pool.submit(one, key) for key in keys]):
                done += future.result()
                self.progress(done, self.inventory.source_bytes, note)
        finally:
            pool.shutdown(wait=True, cancel_futures=True)


def _source_bytes(source: Source, parts: Iterable[tuple[TensorRef, tuple[int, ...]]]) -> int:
    return sum(source_bytes(source, ref, shape) for ref, shape in parts)
