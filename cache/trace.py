"""Recorded routing: which experts each token used. The file, and the checks it has to pass.

A trace is JSON lines, one a token, in order:

    {"tok": 0, "layers": [[experts of the first MoE layer], [of the second], ...]}

`tok` counts up by one from any start. Experts stand in the router's order (from a run of moelite),
as many for every token and layer; dense layers are left out.
"""

from __future__ import annotations

import json
from array import array
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from moelite.errors import UsageError

I32 = npt.NDArray[np.int32]

# What a file may hold, so that no line and no file takes more memory than a trace is worth.
MAX_EXPERTS = 1 << 16
MAX_LINE_BYTES = 1 << 20
MAX_IDS = 1 << 25  # 262,144 tokens of 16 layers and 8 experts: 128 MiB


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Trace:
    """routes [tokens, MoE layers, K] int32; experts: how many a layer has; name: of the file."""

    routes: I32
    experts: int
    name: str = ""

    @property
    def tokens(self) -> int:
        return len(self.routes)

    @property
    def layers(self) -> int:
        return int(self.routes.shape[1])

    @property
    def top_k(self) -> int:
        return int(self.routes.shape[2])

    def of_layer(self, layer: int) -> list[list[int]]:
        """The experts of every token in the layer-th MoE layer."""
        return list(self.routes[:, layer].tolist())


def read_trace(path: Path, *, experts: int | None = None) -> Trace:
    """The trace in a file. experts: how many a layer has (default: the highest id + 1).

    Raises UsageError naming the line and what is wrong with it.
    """
    if experts is not None and not 1 <= experts <= MAX_EXPERTS:
        raise UsageError(f"{experts} experts a layer are not in 1..{MAX_EXPERTS}")
    ids = array("i")  # a list of rows would take ten times the memory
    first = count = 0
    shape = (0, 0)
    for number, line in _lines(path):
        try:
            token, layers = _parse(line, MAX_EXPERTS if experts is None else experts)
            found = len(layers), len(layers[0])
            if not count:
                first, shape = token, found
            if token != first + count:
                raise ValueError(f"tok is {token}, not {first + count}: tokens are missing")
            if found != shape:
                raise ValueError(
                    f"{_shape(found)}, but {_shape(shape)} in the first line: "
                    "every token must have as many"
                )
        except (ValueError, RecursionError) as error:
            raise _wrong(path, f"line {number}: {error}") from None
        for one in layers:
            ids.extend(one)
        count += 1
        if len(ids) > MAX_IDS:
            raise _wrong(path, f"line {number}: more than {MAX_IDS:,} expert ids", "cut the file")
    if not count:
        raise _wrong(path, "the file is empty")
    routes = np.frombuffer(ids, np.int32).reshape(count, *shape)
    return Trace(
        routes=routes,
        experts=int(routes.max()) + 1 if experts is None else experts,
        name=str(path),
    )


def write_trace(path: Path, routes: I32) -> None:
    """Writes routes [tokens, MoE layers, K] as a trace: whole or not at all.

    Raises UsageError where the file cannot be written.
    """
    part = path.with_name(f"{path.name}.part")
    try:
        try:
            with part.open("w", encoding="utf-8") as file:
                for token, row in enumerate(routes):
                    file.write(json.dumps({"tok": token, "layers": row.tolist()}) + "\n")
            part.replace(path)
        except BaseException:
            part.unlink(missing_ok=True)
            raise
    except OSError as error:
        raise UsageError(
            f"cannot write {path}: {error.strerror}", fix="name a file in a folder of yours"
        ) from error


def check_routes(routes: I32, *, layers: int, experts: int, top_k: int) -> None:
    """Raises UsageError unless routes are [tokens, layers, top_k] of distinct ids < experts."""
    if routes.dtype != np.int32 or routes.ndim != 3 or not len(routes):
        raise UsageError(
            f"routes are {routes.dtype} {list(routes.shape)}, not int32 [tokens, layers, experts]"
        )
    if routes.shape[1:] != (layers, top_k):
        raise UsageError(
            f"the routes have {_shape(routes.shape[1:])}; this model has {layers} MoE layers with "
            f"{top_k} experts each",
            fix="use a trace of a model of this shape",
        )
    least, most = int(routes.min()), int(routes.max())
    if least < 0 or most >= experts:
        raise UsageError(
            f"the routes name experts {least}..{most}; this model's layers have 0..{experts - 1}",
            fix="use a trace of a model of this shape",
        )
    ordered = np.sort(routes, axis=2)
    twice = np.argwhere(ordered[:, :, 1:] == ordered[:, :, :-1])
    if len(twice):
        token, layer, _ = twice[0].tolist()
        raise UsageError(
            f"the routes of position {token} name an expert of MoE layer {layer} twice"
        )


def _lines(path: Path) -> Iterator[tuple[int, bytes]]:
    try:
        with path.open("rb") as file:
            for number in range(1, MAX_IDS + 2):
                line = file.readline(MAX_LINE_BYTES + 1)
                if not line:
                    return
                if len(line) > MAX_LINE_BYTES:
                    raise _wrong(path, f"line {number}: longer than {MAX_LINE_BYTES:,} bytes")
                yield number, line
    except OSError as error:
        raise UsageError(
            f"cannot read {path}: {error.strerror}", fix="name a file that `moelite trace` wrote"
        ) from error


def _parse(line: bytes, experts: int) -> tuple[int, list[list[int]]]:
    """(tok, experts of each layer) of a line; ValueError says what is wrong."""
    try:
        found: Any = json.loads(line.decode("utf-8"))
    except ValueError:
        raise ValueError('it is not JSON like {"tok": 0, "layers": [[1, 2], [0, 3]]}') from None
    if not isinstance(found, dict) or set(found) != {"tok", "layers"}:
        raise ValueError('it is not an object with "tok" and "layers" and nothing else')
    token, layers = found["tok"], found["layers"]
    if type(token) is not int or not 0 <= token < 1 << 62:  # a bool is no number here
        raise ValueError(f"tok is {_short(token)}, not a whole number from 0 on")
    if not isinstance(layers, list) or not layers:
        raise ValueError(f"layers is {_short(layers)}, not a list of layers")
    for i, ids in enumerate(layers):
        _check_layer(i, ids, experts)
        if len(ids) != len(layers[0]):
            raise ValueError(
                f"MoE layer {i} has {len(ids)} experts, the first has {len(layers[0])}: "
                "every layer must have as many"
            )
    return token, layers


def _check_layer(i: int, ids: Any, experts: int) -> None:
    if not isinstance(ids, list) or not ids:
        raise ValueError(f"MoE layer {i} is {_short(ids)}, not a list of experts")
    for value in ids:
        if type(value) is not int:
            raise ValueError(f"MoE layer {i}: expert {_short(value)} is not a whole number")
        if not 0 <= value < experts:
            raise ValueError(f"MoE layer {i}: expert {_short(value)} is not in 0..{experts - 1}")
    if len(set(ids)) < len(ids):
        raise ValueError(f"MoE layer {i} names an expert twice: {_short(ids)}")


def _shape(shape: Sequence[int]) -> str:
    return f"{shape[0]} MoE layers with {shape[1]} experts each"


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 40 else f"{text[:37]}..."


def _wrong(path: Path, what: str, fix: str = "") -> UsageError:
    return UsageError(f"{path}: {what}", fix=fix or "give a trace as `moelite trace` writes it")
