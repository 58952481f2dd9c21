"""A store whose dense matrices are calibrated: killed anywhere, it ends in the same bytes."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from test_calibrated_store import IDS, Interrupt, contents
from tiny_checkpoint import MIXTRAL, QWEN3_MOE, weights, write_checkpoint

from moelite import calibration, convert
from moelite.convert import quantize
from moelite.densefile import BEGUN, DenseFile
from moelite.errors import BudgetError, QuantizationError, StoreError
from moelite.quant import FORMATS
from moelite.recipe import parse
from moelite.storefile import DENSE, MANIFEST, read_manifest
from moelite.tensorfile import read_header


@pytest.fixture
def model(tmp_path: Path) -> Path:
    write_checkpoint(tmp_path / "model", QWEN3_MOE)  # layer 1 is dense
    return tmp_path / "model"


def fed(model: Path, out: Path, **options: Any) -> Any:
    return quantize(model, out, dense="int4", ram=None, calibrate=IDS, **options)


def test_what_has_no_use_for_it_is_packed_as_ever(model: Path, tmp_path: Path) -> None:
    """Embeddings, norms and routers have the bytes of a store without calibration; what has use
    for it has others, in every layer."""
    fed(model, tmp_path / "fed")
    quantize(model, tmp_path / "plain", dense="int4", ram=None)
    data = {name: contents(tmp_path / name)[DENSE] for name in ("fed", "plain")}
    names = read_manifest(tmp_path / "fed" / MANIFEST).tensors
    folders = tmp_path / "fed", tmp_path / "plain"
    changed = {n for n in names if dense_bytes(folders[0], n) != dense_bytes(folders[1], n)}
    assert changed == {n for n in names if "_proj" in n}
    assert len(data["fed"]) == len(data["plain"])
    assert read_manifest(tmp_path / "fed" / MANIFEST).calibration["dense"] is True


def dense_bytes(store: Path, name: str) -> bytes:
    info = read_header(store / DENSE, StoreError).tensors[name]
    return (store / DENSE).read_bytes()[info.offset : info.offset + info.nbytes]


def test_it_answers_nearer(model: Path, tmp_path: Path) -> None:
    """q of layer 0, by the inputs that the model really has."""
    fed(model, tmp_path / "fed")
    quantize(model, tmp_path / "plain", dense="int4", ram=None)
    tensors = weights(QWEN3_MOE)
    embed = FORMATS["int4"]
    spec = read_manifest(tmp_path / "fed" / MANIFEST).tensors["model.embed_tokens.weight"]
    raw = dense_bytes(tmp_path / "fed", "model.embed_tokens.weight")
    x = embed.unpack(np.frombuffer(raw, np.uint8), *spec.shape)[IDS].astype(np.float64)
    x /= np.sqrt(np.mean(x * x, -1, keepdims=True))
    x *= tensors["model.layers.0.input_layernorm.weight"]
    name, loss = "model.layers.0.self_attn.q_proj.weight", {}
    for folder in ("plain", "fed"):
        packed = np.frombuffer(dense_bytes(tmp_path / folder, name), np.uint8)
        error = embed.unpack(packed, *tensors[name].shape) - tensors[name]
        loss[folder] = np.square(x @ error.T).sum()
    assert loss["fed"] < 0.9 * loss["plain"]


class Killed(BaseException):
    """As if the process had ended there: nothing catches it."""


def killing(method: Callable[..., Any], calls: int, *, before: bool = False) -> Callable[..., Any]:
    """`method`, but its n-th call is the process's last."""
    left = [calls]

    def wrapped(*args: Any) -> Any:
        left[0] -= 1
        if before and left[0] == 0:
            raise Killed
        result = method(*args)
        if left[0] == 0:
            raise Killed
        return result

    return wrapped


PLACES = [  # (object, method, the call after which it ends)
    (DenseFile, "write", 1),  # the file is there, the journal does not know
    (DenseFile, "put", 1),
    (DenseFile, "put", 3),  # v of layer 0: o is still missing
    (DenseFile, "put", 10),  # inside layer 1, a dense one
    (DenseFile, "close_layer", 1),  # packed, not taken down
    (DenseFile, "close_layer", 3),
    (DenseFile, "finish", 1),  # it has its name, the journal knows the old one
    (convert, "describe", 3),  # of the first layer of experts
    (convert, "manifest_bytes", 1),  # all but the manifest
]


@pytest.mark.parametrize(("owner", "name", "calls"), PLACES)
@pytest.mark.parametrize("checkpoint", [MIXTRAL, QWEN3_MOE], ids=["mixtral", "dense-between"])
def test_killed_it_ends_in_the_same_bytes(
    owner: Any,
    name: str,
    calls: int,
    checkpoint: dict[str, Any],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    write_checkpoint(tmp_path / "model", checkpoint)
    fed(tmp_path / "model", tmp_path / "whole")
    with monkeypatch.context() as patch:
        patch.setattr(owner, name, killing(getattr(owner, name), calls))
        with pytest.raises(Killed):
            fed(tmp_path / "model", tmp_path / "store")
    assert not (tmp_path / "store" / "moelite.json").exists()
    fed(tmp_path / "model", tmp_path / "store")
    assert contents(tmp_path / "store") == contents(tmp_path / "whole")
    assert fed(tmp_path / "model", tmp_path / "store").reused


def test_layers_that_are_done_are_not_packed_again(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fed(model, tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt):
        fed(model, tmp_path / "store", progress=Interrupt(0))
    assert (tmp_path / "store" / BEGUN).exists()
    packed: list[str] = []
    put = DenseFile.put

    def watched(file: DenseFile, part: Any, data: Any) -> None:
        packed.append(part.weight.key)
        put(file, part, data)

    monkeypatch.setattr(DenseFile, "put", watched)
    fed(model, tmp_path / "store")
    assert len(packed) == 4 + 3 + 4
    assert not [key for key in packed if "layers.0." in key]
    assert contents(tmp_path / "store") == contents(tmp_path / "whole")


def test_killed_after_the_file_got_its_name_nothing_is_packed_again(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fed(model, tmp_path / "whole")
    with monkeypatch.context() as patch:
        patch.setattr(DenseFile, "finish", killing(DenseFile.finish, 1))
        with pytest.raises(Killed):
            fed(model, tmp_path / "store")
    assert not (tmp_path / "store" / BEGUN).exists()
    monkeypatch.setattr(DenseFile, "put", killing(DenseFile.put, 1, before=True))
    monkeypatch.setattr(DenseFile, "write", killing(DenseFile.write, 1, before=True))
    fed(model, tmp_path / "store")
    assert contents(tmp_path / "store") == contents(tmp_path / "whole")


def test_a_begun_file_that_is_lost_is_made_anew(model: Path, tmp_path: Path) -> None:
    fed(model, tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt):
        fed(model, tmp_path / "store", progress=Interrupt(0))
    (tmp_path / "store" / BEGUN).unlink()
    fed(model, tmp_path / "store")
    assert contents(tmp_path / "store") == contents(tmp_path / "whole")


def test_a_deleted_file_of_a_finished_store_is_made_anew(model: Path, tmp_path: Path) -> None:
    fed(model, tmp_path / "store")
    before = contents(tmp_path / "store")
    for name in (DENSE, "experts-00002.safetensors"):
        (tmp_path / "store" / name).unlink()
        fed(model, tmp_path / "store")
        assert contents(tmp_path / "store") == before


def test_a_file_instead_of_memory_gives_the_same_bytes(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fed(model, tmp_path / "held")
    monkeypatch.setattr(calibration, "must_spill", lambda *_: True)
    fed(model, tmp_path / "spilled")
    assert contents(tmp_path / "spilled") == contents(tmp_path / "held")


def test_one_matrix_alone(model: Path, tmp_path: Path) -> None:
    """k in int4, the rest in int8: the rest has the bytes of a store without calibration."""
    recipe = parse({"experts": "bf16", "rule": [{"part": "k", "format": "int4"}]}, "k")
    for name, text in (("fed", IDS), ("plain", None)):
        quantize(model, tmp_path / name, recipe=recipe, ram=None, calibrate=text)
    names = read_manifest(tmp_path / "fed" / MANIFEST).tensors
    folders = tmp_path / "fed", tmp_path / "plain"
    changed = [n for n in names if dense_bytes(folders[0], n) != dense_bytes(folders[1], n)]
    assert changed == [f"model.layers.{i}.self_attn.k_proj.weight" for i in range(3)]


def test_nan_is_named(tmp_path: Path) -> None:
    tensors = weights(MIXTRAL)
    name = "model.layers.1.self_attn.o_proj.weight"
    tensors[name][5, 5] = np.nan
    write_checkpoint(tmp_path / "model", MIXTRAL, tensors)
    with pytest.raises(QuantizationError, match=name.replace(".", r"\.")):
        fed(tmp_path / "model", tmp_path / "store")


def test_a_store_begun_without_it_is_refused(model: Path, tmp_path: Path) -> None:
    """An earlier version did not calibrate dense matrices; its journal says nothing of them."""
    with pytest.raises(KeyboardInterrupt):
        fed(model, tmp_path / "store", progress=Interrupt(0))
    path = tmp_path / "store" / "moelite.partial.json"
    journal = json.loads(path.read_text())
    del journal["calibration"]["dense"]
    path.write_text(json.dumps(journal))
    with pytest.raises(StoreError, match="is the store of"):
        fed(model, tmp_path / "store")


def test_too_little_memory_names_the_least(model: Path, tmp_path: Path) -> None:
    with pytest.raises(BudgetError, match=r"at least \d+MiB"):
        quantize(model, tmp_path / "store", dense="int4", ram="60MiB", calibrate=IDS)
    assert not (tmp_path / "store").exists()
