"""Bits of a store from its files and its manifest, and the text it must not be judged by."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import pytest
import synthetic
from test_synthetic import small

from moelite.errors import StoreError, UsageError
from moelite.storesize import check_calibration, store_size


@pytest.fixture
def store(tmp_path: Path) -> Path:
    synthetic.write_store(small(), tmp_path / "store", name="small")
    return tmp_path / "store"


def edit(store: Path, **changes: object) -> None:
    path = store / "moelite.json"
    manifest = json.loads(path.read_text())
    manifest.update(changes)
    path.write_text(json.dumps(manifest))


def test_every_byte_counts(store: Path) -> None:
    size = store_size(store)
    on_disk = sum(path.stat().st_size for path in store.iterdir())
    assert size.bytes == on_disk
    config = json.loads((store / "config.json").read_text())
    experts = config.get("num_experts") or config["num_local_experts"]
    inner = config.get("moe_intermediate_size") or config["intermediate_size"]
    weights = config["num_hidden_layers"] * experts * 3 * inner * config["hidden_size"]
    assert size.expert_params == weights
    assert size.bits_per_parameter == 8 * on_disk / size.params
    files = list(store.glob("experts-*.safetensors"))
    header = 4096  # one page each
    assert size.expert_bytes == sum(path.stat().st_size - header for path in files)
    assert size.expert_bpw > 4.5  # records are padded to pages
    assert size.other_bytes == on_disk - size.expert_bytes


def test_mixed_formats_are_all_experts(store: Path) -> None:
    old = store_size(store)
    rows = json.loads((store / "moelite.json").read_text())["classes"]
    more = {**rows[0], "name": "routed experts, down", "format": "int8", "params": 1000}
    more["bytes_after"] = 1000
    edit(store, classes=[*rows, more])
    size = store_size(store)
    assert size.expert_params == old.expert_params + 1000
    assert size.expert_bytes == old.expert_bytes + 1000
    assert size.formats == f"{old.formats}+int8"


def test_json_has_the_bits(store: Path) -> None:
    size = store_size(store)
    found = size.as_dict()
    assert found["bits_per_parameter"] == size.bits_per_parameter
    assert found["expert_bpw"] == size.expert_bpw
    assert found["bytes"] == size.bytes


def test_a_missing_file_is_told(store: Path) -> None:
    (store / "config.json").unlink()
    with pytest.raises(StoreError, match=r"config\.json is missing"):
        store_size(store)


def test_a_manifest_without_experts_is_damaged(store: Path) -> None:
    edit(store, classes=[])
    with pytest.raises(StoreError, match="no routed experts"):
        store_size(store)


def test_the_calibration_text_cannot_judge(store: Path, tmp_path: Path) -> None:
    text, other = tmp_path / "text", tmp_path / "other"
    text.write_bytes(b"seen before")
    other.write_bytes(b"seen before ")
    check_calibration(store, text)  # nothing is known of a calibration
    edit(store, calibration={"sha256": hashlib.sha256(b"seen before").hexdigest(), "tokens": 2})
    with pytest.raises(UsageError, match=r"store was calibrated on .*text"):
        check_calibration(store, text)
    check_calibration(store, other)
