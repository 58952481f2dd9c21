"""Calibration as a part of quantize: its text, its memory, and the files it reads."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np

from moelite.arch import Arch, Linear, MoE, TensorRef
from moelite.calibrate import (
    CONTEXT,
    TOKENS,
    Calibrator,
    Matrices,
    Rare,
    Text,
    calibration_bytes,
    cut,
    stream_bytes,
    tokenize,
)
from moelite.checkpoint import Source, read
from moelite.densefile import DenseFile
from moelite.errors import BudgetError, QuantizationError, StoreError, UsageError
from moelite.forward import DenseWeights
from moelite.inventory import Inventory
from moelite.process import rss_bytes
from moelite.quant import FORMATS
from moelite.quant.base import F32, TILE_ROWS, U8, check_weight
from moelite.quant.curvature import Curvature, curvature
from moelite.quant.record import unpack_record
from moelite.storefile import LayerEntry, layer_file
from moelite.tensorfile import pread_into, read_header
from moelite.tokenizer import Tokenizer
from moelite.units import MIB, show_bytes

_SLACK_BYTES = 48 * MIB  # threads of BLAS, the allocator, headers


class Calibration:
    """What packs the experts of a store in `out`, and those matrices of its dense file that its
    formats have curves for, once the rest of the file is there."""

    def __init__(
        self, source: Source, inventory: Inventory, out: Path, text: Text, dense: DenseFile
    ) -> None:
        # for the manifest: the same text, by its ids or by its file
        self.facts = {"ids": text.digest, "tokens": text.tokens, "sha256": text.sha256}
        if dense.layers:
            self.facts["dense"] = True
        self._source, self._inventory, self._out, self._text = source, inventory, out, text
        self._dense = dense
        self._spill = False
        self._entries: Mapping[int, LayerEntry] = {}
        self._calibrator: Calibrator | None = None

    @property
    def rare(self) -> tuple[Rare, ...]:
        """Experts that the text reached little, of the layers packed or passed so far."""
        return tuple(self._calibrator.rare) if self._calibrator is not None else ()

    def fit(self, budget: int, entries: Mapping[int, LayerEntry]) -> None:
        """Decides what lies in memory. Raises BudgetError when `budget` is too small for any way.

        entries: of layers that are finished, then or later.
        """
        self._entries = entries
        inventory = self._inventory
        curved = [part for parts in self._dense.layers.values() for part in parts]
        self._spill = must_spill(inventory.arch, self._text, inventory.formats, budget, curved)

    def pack(
        self, layer: int, expert: int, formats: Sequence[tuple[str, str]]
    ) -> list[tuple[U8, U8]]:
        """gate_up and down in each pair of formats; experts one after the other.

        QuantizationError names a bad tensor.
        """
        pairs = [(FORMATS[wide], FORMATS[down]) for wide, down in formats]
        matrices = _matrices(self._source, self._inventory.layers[layer], expert)
        return self._walk().pack(layer, expert, pairs, matrices)

    def pack_dense(self, layer: int) -> None:
        """Packs the matrices of a layer's dense part into the dense file; layers in order.

        QuantizationError names a bad tensor.
        """
        self._walk().enter(layer)
        self._dense.close_layer(layer)

    def _walk(self) -> Calibrator:
        inventory = self._inventory
        if self._calibrator is None:
            specs = {key: item.spec for key, item in inventory.items.items()}
            self._calibrator = Calibrator(
                inventory.arch,
                DenseWeights(self._dense.path, specs),
                self._text,
                _stored(self._out, self._entries),
                self._out if self._spill else None,
                _Packer(self._source, inventory, self._dense) if self._dense.layers else None,
            )
        return self._calibrator

    def close(self) -> None:
        """Gives memory and files back; `rare` stays."""
        if self._calibrator is not None:
            self._calibrator.close()


class _Packer:
    """The DensePacker of a store's dense file."""

    def __init__(self, source: Source, inventory: Inventory, file: DenseFile) -> None:
        self._source, self._inventory, self._file = source, inventory, file

    def wanted(self, part: Linear) -> bool:
        return self._file.wanted(part)

    def original(self, part: Linear) -> F32:
        return _checked(self._source, part.weight)

    def pack(self, part: Linear, curve: Curvature) -> None:
        name = self._inventory.items[part.weight.key].spec.format
        self._file.put(part, FORMATS[name].pack(self.original(part), curve))


def read_text(source: Source, given: str | Path | Sequence[int] | None, tokens: int) -> Text | None:
    """What quantize was given: a UTF-8 file, or token ids. UsageError if that is too short."""
    if given is None:
        return None
    if not isinstance(given, str | Path):
        text = cut(list(given)[:tokens])
    else:
        try:
            data = Path(given).read_bytes()
            content = data.decode("utf-8")
        except (OSError, UnicodeDecodeError) as problem:
            raise UsageError(
                f"{given} cannot be read: {problem}", fix="--calibrate names a file of UTF-8 text"
            ) from problem
        text = tokenize(Tokenizer.from_files(source.files), content, tokens)
        text = replace(text, sha256=hashlib.sha256(data).hexdigest())
    if text.tokens < CONTEXT:
        raise UsageError(
            f"{text.tokens} tokens are too few to calibrate with",
            fix=f"give a text of at least {CONTEXT}, better {TOKENS}",
        )
    return text


def must_spill(
    arch: Arch,
    text: Text,
    formats: Iterable[str],
    budget: int,
    curved: Sequence[Linear] = (),
) -> bool:
    """Whether the streams have to lie in a file, so that memory stays below `budget`.

    curved: dense matrices that are packed on the way. Raises BudgetError, naming the least, when
    even that is not enough.
    """
    for name in formats:  # compiles, so that it counts below
        FORMATS[name].pack(np.ones((TILE_ROWS, 64), np.float32), curvature(np.eye(64, dtype="f4")))
    context = max(map(len, text.sequences))
    need = rss_bytes() + _SLACK_BYTES + calibration_bytes(arch, text.tokens, context, curved)
    if need > budget:
        least = math.ceil(need / MIB)
        raise BudgetError(
            f"calibration takes at least {least}MiB of memory; --ram is {show_bytes(budget)}",
            fix=f"--ram {least}MiB, or quantize without --calibrate",
        )
    return need + stream_bytes(arch, text.tokens) > budget


def _matrices(source: Source, mlp: MoE, expert: int) -> Matrices:
    """gate, up and down of an expert, from its checkpoint. QuantizationError names a bad tensor."""
    gate, up, down = (_checked(source, part.weight.at(expert)) for part in mlp.experts.matrices)
    return gate, up, down


def _checked(source: Source, ref: TensorRef) -> F32:
    try:
        return check_weight("calibration", read(source, ref))
    except QuantizationError as problem:
        raise QuantizationError(f"tensor {ref.key!r}: {problem.message}", fix=problem.fix) from None


def _stored(folder: Path, entries: Mapping[int, LayerEntry]) -> Callable[[int, int], Matrices]:
    """finished(layer, expert) for the layer files of a store that is being written."""

    def finished(layer: int, expert: int) -> Matrices:
        path, layout = folder / layer_file(layer), entries[layer].layout_of(expert)
        tensor, row = entries[layer].place(expert)
        begin = read_header(path, StoreError).tensors[tensor].offset
        record = np.empty(layout.record_bytes, np.uint8)
        with path.open("rb") as file:
            pread_into(file.fileno(), record.data, begin + row * layout.record_bytes)
        return unpack_record(layout, record)

    return finished
