"""Every format that the dense part of a store may have, from the command line to the logits."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from tiny_checkpoint import MIXTRAL, write_checkpoint
from typer.testing import CliRunner

from moelite.budget import dense_bytes
from moelite.cli.main import app
from moelite.engine import load
from moelite.quant import FORMATS
from moelite.store import Store


@pytest.mark.parametrize("dense", ["int4", "int8", "bf16", "f32"])
def test_a_dense_format_from_quantize_to_logits(tmp_path: Path, dense: str) -> None:
    tensors = write_checkpoint(tmp_path / "model", MIXTRAL)
    (tmp_path / "model" / "tokenizer.json").unlink()  # a stand-in that no library would read
    run = CliRunner().invoke
    recipe = ["--dense", dense, "--experts", "f32", "--json"]
    before = run(app, ["footprint", str(tmp_path / "model"), *recipe])
    assert before.exit_code == 0, before.output
    result = run(app, ["quantize", str(tmp_path / "model"), str(tmp_path / "store"), *recipe])
    assert result.exit_code == 0, result.output
    assert json.loads(result.output)["recipe"]["dense"] == dense
    store = Store.open(tmp_path / "store")
    formats = {key: store.dense_entry(key).format for key in store.dense_keys()}
    kept = {key for key in formats if "norm" in key or ".gate." in key}
    assert kept
    assert {formats[key] for key in kept} == {"f32"}
    assert {formats[key] for key in formats.keys() - kept} == {dense}
    name, fmt = "model.layers.0.self_attn.q_proj.weight", FORMATS[dense]
    found = fmt.unpack(store.read_dense(name), *tensors[name].shape)
    np.testing.assert_array_equal(found, fmt.unpack(fmt.pack(tensors[name]), *found.shape))
    held = sum(store.dense_entry(key).nbytes for key in store.dense_keys())
    store.close()
    with load(tmp_path / "store", ram="1GiB", context=32, threads=1) as model:
        assert dense_bytes(model.arch, model.sizes.dense) == held
        promised = json.loads(before.output)["parts"][2]
        assert promised == {"name": "dense weights", "bytes": held, "basis": "exact"}
        assert np.isfinite(model.forward([1, 2, 3])).all()
