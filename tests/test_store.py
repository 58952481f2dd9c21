"""The store on disk: its bytes as documented, valid safetensors, and damage that is named."""

from __future__ import annotations

import hashlib
import json
import os
import threading
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors import safe_open
from tiny_checkpoint import MIXTRAL, QWEN3_MOE, layout_of, weights, write_checkpoint

from moelite.convert import quantize
from moelite.errors import StoreError
from moelite.quant import FORMATS
from moelite.quant.record import record_layout
from moelite.store import ExpertKey, Store
from moelite.tensorfile import build_header, pread_into, read_header

LAYER = "experts-00002.safetensors"
HEAD = "lm_head.weight"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    write_checkpoint(tmp_path / "model", MIXTRAL)
    quantize(tmp_path / "model", tmp_path / "store")
    return tmp_path / "store"


def record(store: Store, layer: int, expert: int, *, verify: bool = False) -> np.ndarray:
    out = np.full(layout_of(store).record_bytes + 7, 9, np.uint8)
    store.read_record(ExpertKey(layer, expert), out, verify=verify)
    assert (out[layout_of(store).record_bytes :] == 9).all()
    return out[: layout_of(store).record_bytes]


def flip(path: Path, at: int) -> None:
    with path.open("r+b") as file:
        file.seek(at)
        byte = file.read(1)[0]
        file.seek(at)
        file.write(bytes([byte ^ 1]))


def edit(folder: Path, **changes: Any) -> None:
    raw = json.loads((folder / "moelite.json").read_text())
    (folder / "moelite.json").write_text(json.dumps(raw | changes))


# --- layout ---


def test_a_layer_file_byte_by_byte(folder: Path) -> None:
    data = (folder / LAYER).read_bytes()
    layout = record_layout(("int4", "int4"), 64, 96)
    start = 8 + int.from_bytes(data[:8], "little")
    assert start == 4096
    assert data[8:9] == b"{"
    header = json.loads(data[8:start])
    assert header == {
        "__metadata__": {"format": "moelite"},
        "experts": {
            "dtype": "U8",
            "shape": [4, layout.record_bytes],
            "data_offsets": [0, 4 * layout.record_bytes],
        },
    }
    assert layout.record_bytes % 4096 == 0
    assert len(data) == start + 4 * layout.record_bytes
    tensors = weights(MIXTRAL)
    for expert in range(4):
        want = np.zeros(layout.record_bytes, np.uint8)
        gate, up, down = (
            FORMATS["int4"].pack(
                tensors[f"model.layers.2.block_sparse_moe.experts.{expert}.{name}.weight"]
            )
            for name in ("w1", "w3", "w2")
        )
        # a tile of gate, the tile of up beside it, the next of gate, ...
        tile = FORMATS["int4"].tile_bytes(layout.hidden_size)
        for i in range(gate.size // tile):
            want[2 * i * tile :][:tile] = gate[i * tile :][:tile]
            want[(2 * i + 1) * tile :][:tile] = up[i * tile :][:tile]
        want[layout.down : layout.down + down.size] = down
        begin = start + expert * layout.record_bytes
        assert data[begin : begin + layout.record_bytes] == want.tobytes()


def test_the_safetensors_library_opens_every_file(folder: Path) -> None:
    store = Store.open(folder)
    with safe_open(folder / LAYER, "np") as file:
        experts = file.get_tensor("experts")
    for expert in range(4):
        assert (experts[expert] == record(store, 2, expert)).all()
    with safe_open(folder / "dense.safetensors", "np") as file:
        assert sorted(file.keys()) == sorted(store.dense_keys())
        for key in store.dense_keys():
            assert file.get_tensor(key).tobytes() == store.read_dense(key, verify=True).tobytes()
    store.close()


@pytest.mark.parametrize("dense", ["f32", "bf16", "int8"])
@pytest.mark.parametrize("config", [MIXTRAL, QWEN3_MOE], ids=lambda c: c["model_type"])
def test_dense_tensors(tmp_path: Path, config: dict[str, Any], dense: str) -> None:
    tensors = write_checkpoint(tmp_path / "model", config)
    quantize(tmp_path / "model", tmp_path / "store", dense=dense, experts="f32")
    store = Store.open(tmp_path / "store")
    assert (store.expert_format, store.dense_format) == ("f32", dense)
    assert store.config == config
    routed = {name for name in tensors if ".experts." in name}
    assert set(store.dense_keys()) == set(tensors) - routed
    for key in store.dense_keys():
        entry, packed = store.dense_entry(key), store.read_dense(key)
        plain = tensors[key].ndim == 1 or key.endswith(".gate.weight")
        assert entry.format == ("f32" if plain else dense)
        assert entry.shape == tensors[key].shape
        assert packed.size == entry.nbytes
        assert packed.ctypes.data % 64 == 0
        want = tensors[key] if entry.shape[1:] == () else None
        if want is None:
            want = FORMATS[entry.format].pack(tensors[key])
        assert packed.tobytes() == want.tobytes()
    store.close()


def test_the_manifest_tells_the_facts(folder: Path) -> None:
    raw = json.loads((folder / "moelite.json").read_text())
    assert raw["store_version"] == 3
    assert (raw["source"], raw["recipe"]) == ("model", {"experts": "int4", "dense": "int8"})
    tensors = weights(MIXTRAL)
    assert raw["params"] == sum(t.size for t in tensors.values())
    on_disk = {p.name for p in folder.iterdir()} - {"moelite.json"}
    assert set(raw["files"]) == on_disk
    for name, entry in raw["files"].items():
        data = (folder / name).read_bytes()
        assert entry["bytes"] == len(data)
        assert entry["sha256"] == hashlib.sha256(data).hexdigest()
    size = raw["layers"]["0"]["tiers"][0]["record_bytes"]
    data = (folder / LAYER).read_bytes()[4096:]
    crcs = [zlib.crc32(data[i * size : (i + 1) * size]) for i in range(4)]
    assert raw["files"][LAYER]["crc32"] == "".join(f"{c:08x}" for c in crcs)


def test_sidecars(folder: Path) -> None:
    store = Store.open(folder)
    assert set(store.sidecars()) == {"config.json", "tokenizer.json"}
    assert store.sidecars()["tokenizer.json"] == b'{"version": "1.0"}'


@pytest.mark.parametrize("align", [64, 4096])
def test_header_alignment(tmp_path: Path, align: int) -> None:
    for length in range(150):  # every remainder
        header, offsets = build_header({"n" * (length + 1): ("U8", (3,))}, {"a": "b"}, align)
        assert len(header) % align == 0
        assert list(offsets.values()) == [len(header)]
        path = tmp_path / "x.safetensors"
        path.write_bytes(header + b"abc")
        with safe_open(path, "np") as file:
            assert file.get_tensor("n" * (length + 1)).tobytes() == b"abc"
        found = read_header(path, StoreError)
        assert found.data_start == len(header)
        assert found.metadata == {"a": "b"}


# --- reads ---


def test_reads_from_many_threads(folder: Path) -> None:
    store = Store.open(folder)
    want = {(i, e): record(store, i, e) for i in range(3) for e in range(4)}
    failures = []

    def work(seed: int) -> None:
        rng = np.random.default_rng(seed)
        for _ in range(100):
            key = int(rng.integers(3)), int(rng.integers(4))
            if not (record(store, *key, verify=True) == want[key]).all():
                failures.append(key)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures
    store.close()


def test_short_reads_are_continued(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = Store.open(folder)
    want = record(store, 2, 3)
    real = os.preadv
    monkeypatch.setattr(os, "preadv", lambda fd, bufs, at: real(fd, [bufs[0][:1000]], at))
    assert (record(store, 2, 3, verify=True) == want).all()
    store.close()


def test_pread_into_stops_at_the_end(tmp_path: Path) -> None:
    (tmp_path / "x").write_bytes(b"12345")
    fd = os.open(tmp_path / "x", os.O_RDONLY)
    out = bytearray(4)
    assert pread_into(fd, memoryview(out), 2) == 3
    os.close(fd)
    assert bytes(out) == b"345\0"


def test_close_lets_go_of_the_files(folder: Path) -> None:
    def open_files() -> int:
        return sum(
            os.path.realpath(f"/proc/self/fd/{fd}").startswith(str(folder))
            for fd in os.listdir("/proc/self/fd")
        )

    if not Path("/proc/self/fd").exists():
        pytest.skip("needs /proc")
    store = Store.open(folder)
    assert open_files() == 0
    record(store, 1, 0)
    record(store, 1, 1)
    record(store, 2, 0)
    assert open_files() == 2
    store.close()
    assert open_files() == 0


def test_an_expert_that_is_not_there(folder: Path) -> None:
    store = Store.open(folder)
    for key in ((2, 4), (3, 0), (2, -1)):
        with pytest.raises(StoreError, match=f"layer {key[0]} expert {key[1]}"):
            record(store, *key)
    with pytest.raises(StoreError, match="no tensor 'nope'"):
        store.read_dense("nope")
    with pytest.raises(ValueError, match="a record takes"):
        store.read_record(ExpertKey(0, 0), np.empty(10, np.uint8))


# --- damage ---


def test_a_damaged_record_is_named(folder: Path) -> None:
    store = Store.open(folder)
    flip(folder / LAYER, 4096 + layout_of(store).record_bytes * 3 + 17)
    record(store, 2, 2, verify=True)
    with pytest.raises(StoreError, match=rf"{LAYER}: layer 2 expert 3 is damaged"):
        record(store, 2, 3, verify=True)
    with pytest.raises(StoreError, match=rf"{LAYER}: expert 3 is damaged"):
        store.verify_file(LAYER)
    for name in store.manifest.files:
        if name != LAYER:
            store.verify_file(name)
    store.close()


def test_damage_elsewhere_is_named(folder: Path) -> None:
    store = Store.open(folder)
    header = read_header(folder / "dense.safetensors", StoreError)
    flip(folder / "dense.safetensors", header.tensors[HEAD].offset + 5)
    with pytest.raises(StoreError, match=r"dense\.safetensors: tensor 'lm_head\.weight'"):
        store.read_dense(HEAD, verify=True)
    with pytest.raises(StoreError, match=r"dense\.safetensors: tensor 'lm_head\.weight'"):
        store.verify_file("dense.safetensors")
    flip(folder / LAYER, 4000)  # in the header's padding
    with pytest.raises(StoreError, match=LAYER):
        store.verify_file(LAYER)
    flip(folder / "tokenizer.json", 3)
    with pytest.raises(StoreError, match=r"tokenizer\.json: the file"):
        store.verify_file("tokenizer.json")


def test_a_file_cut_short_or_missing(folder: Path) -> None:
    store = Store.open(folder)
    data = (folder / LAYER).read_bytes()
    store._open(LAYER)
    os.truncate(folder / LAYER, len(data) - 100)
    with pytest.raises(StoreError, match=rf"{LAYER} ends inside layer 2 expert 3"):
        record(store, 2, 3)
    with pytest.raises(StoreError, match=rf"{LAYER} has {len(data) - 100} bytes, not {len(data)}"):
        Store.open(folder)
    (folder / LAYER).unlink()
    with pytest.raises(StoreError, match=rf"{LAYER} is missing"):
        Store.open(folder)


def test_a_layer_file_of_another_shape(folder: Path) -> None:
    store = Store.open(folder)
    size = layout_of(store).record_bytes
    header, _ = build_header({"experts": ("U8", (4 * size,))}, {"format": "moelite"}, 4096)
    header2, _ = build_header({"other": ("U8", (4, size))}, {"format": "moelite"}, 4096)
    data = (folder / LAYER).read_bytes()
    (folder / LAYER).write_bytes(header2 + data[4096:])
    with pytest.raises(StoreError, match="holds other records"):
        record(store, 2, 0)
    (folder / LAYER).write_bytes(header + data[4096:])
    record(Store.open(folder), 2, 0)


def test_another_version_names_both(folder: Path) -> None:
    edit(folder, store_version=7)
    with pytest.raises(StoreError, match=r"version 7; this moelite reads version 3"):
        Store.open(folder)


@pytest.mark.parametrize(
    "changes",
    [
        {"layers": {"0": "many"}},
        {"layers": {}},
        {"layers": {"0": {"tiers": [], "tier_of": []}}},
        {"layers": {"0": {"tiers": [], "tier_of": [0, 0]}}},
        {"layers": {"9": 4}},
        {"recipe": "int3"},
        {"tensors": {"x": {"format": "int8", "shape": []}}},
        {"tensors": {"x": {"format": "zip", "shape": [3, 4]}}},
        {"tensors": {"x": {"format": "int8", "shape": [3, -4]}}},
        {"files": {}},
        {"files": {"../x": {"bytes": 1, "sha256": "", "crc32": ""}}},
        {"files": {"dense.safetensors": {"bytes": 1, "sha256": "", "crc32": "zz"}}},
        {"classes": [{"name": "x"}]},
    ],
)
def test_a_damaged_manifest(folder: Path, changes: dict[str, Any]) -> None:
    edit(folder, **changes)
    with pytest.raises(StoreError, match=r"moelite\.json is damaged"):
        Store.open(folder)


def test_the_layout_must_be_the_formats(folder: Path) -> None:
    raw = json.loads((folder / "moelite.json").read_text())
    raw["layers"]["1"]["tiers"][0]["down"] += 64
    edit(folder, layers=raw["layers"])
    with pytest.raises(StoreError, match="the record layout is"):
        Store.open(folder)


@pytest.mark.parametrize("text", ["", "{", "[]", "\x00"])
def test_a_manifest_that_is_no_json(folder: Path, text: str) -> None:
    (folder / "moelite.json").write_text(text)
    with pytest.raises(StoreError, match=r"moelite\.json"):
        Store.open(folder)


def test_what_is_not_a_store(tmp_path: Path) -> None:
    with pytest.raises(StoreError, match="not a store"):
        Store.open(tmp_path)
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(StoreError, match="a checkpoint, not a store") as caught:
        Store.open(tmp_path)
    assert "moelite quantize" in caught.value.fix
    (tmp_path / "moelite.partial.json").write_text("{}")
    with pytest.raises(StoreError, match="unfinished"):
        Store.open(tmp_path)
