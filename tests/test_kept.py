"""Experts that came in codes are stored in these very codes: not a number changes."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest
from encoders import ENCODERS
from test_recipe import stored_weights
from test_sources_store import write_encoded

import moelite
from moelite.arch import TensorRef
from moelite.models import build
from moelite.sources import coded, open_folder
from moelite.store import Store


@pytest.mark.parametrize("method", ENCODERS)
def test_numbers_stay_as_they_came(tmp_path: Path, method: str) -> None:
    tensors = write_encoded(tmp_path / "model", method)
    source = open_folder(tmp_path / "model")
    arch = build(source.config)
    moelite.quantize(tmp_path / "model", tmp_path / "store")
    found, kept = stored_weights(tmp_path / "store", arch), 0
    for name, want in tensors.items():
        codes = coded(source, TensorRef(name=name), 0, 8)
        if ".experts." not in name or codes is None or (codes.kind == "int8" and codes.block != 32):
            continue
        np.testing.assert_array_equal(found[name], want, err_msg=name)
        kept += 1
    store = Store.open(tmp_path / "store")
    formats = {name for entry in store.layers.values() for name in entry.formats}
    store.close()
    assert bool(kept) == bool(formats - {"int4"})
    if method == "bitsandbytes":  # down has rows of 96 values, which blocks of 64 run across
        assert formats == {"nf4", "int4"}
    if method in {"mxfp4", "mxfp4-pack-quantized"}:
        assert formats == {"mxfp4"}


def test_a_format_that_was_asked_for_wins(tmp_path: Path) -> None:
    method = next(m for m in ENCODERS if "mxfp4" in m)
    write_encoded(tmp_path / "model", method)
    moelite.quantize(tmp_path / "model", tmp_path / "a", experts="int8")
    assert Store.open(tmp_path / "a").expert_format == "int8"
    # and a second run, into another folder, is the same store
    moelite.quantize(tmp_path / "model", tmp_path / "b")
    moelite.quantize(tmp_path / "model", tmp_path / "c")
    for path in (tmp_path / "b").iterdir():
        assert path.read_bytes() == (tmp_path / "c" / path.name).read_bytes()
    shutil.rmtree(tmp_path / "c")
