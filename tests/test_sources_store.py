"""From a quantized checkpoint to a store: the same bytes and logits as from its decoded weights."""

from __future__ import annotations

import io
import json
import tracemalloc
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from encoders import ENCODERS, Parts, awq, gptq
from rich.console import Console
from tiny_checkpoint import MIXTRAL, weights, write_checkpoint, write_raw
from tokenizers import Tokenizer
from tokenizers.models import WordLevel

import moelite
from moelite.arch import TensorRef
from moelite.cli.quantize import as_dict, show
from moelite.inventory import source_bytes
from moelite.sources import coded, open_folder

PLAIN = ("embed_tokens", "norm", "lm_head", "block_sparse_moe.gate.")


def raw_of(tensors: Parts) -> dict[str, tuple[str, tuple[int, ...], bytes]]:
    return {name: (kind, array.shape, array.tobytes()) for name, (kind, array) in tensors.items()}


def write_encoded(folder: Path, method: str) -> dict[str, np.ndarray]:
    """A tiny mixtral whose matrices, but for some, are encoded; its weights as numbers."""
    encode, settings, _ = ENCODERS[method]
    rng = np.random.default_rng(3)
    stored: Parts = {}
    tensors: dict[str, np.ndarray] = {}
    for name, tensor in weights(MIXTRAL).items():
        if any(part in name for part in PLAIN):
            stored[name] = ("F32", tensor)
            tensors[name] = tensor
            continue
        parts, want = encode(rng, *tensor.shape)
        assert want.dtype == np.float32
        tensors[name] = np.ascontiguousarray(want)
        stem = name.removesuffix("weight")
        stored |= {stem + end: (kind, np.ascontiguousarray(a)) for end, (kind, a) in parts.items()}
    folder.mkdir()
    config = MIXTRAL | {"quantization_config": settings}
    (folder / "config.json").write_text(json.dumps(config))
    write_raw(folder / "model.safetensors", raw_of(stored))
    return tensors


def add_tokenizer(*folders: Path) -> None:
    words = {f"w{i} ": i for i in range(MIXTRAL["vocab_size"])}
    for folder in folders:
        Tokenizer(WordLevel(words, unk_token="w0 ")).save(str(folder / "tokenizer.json"))


@pytest.mark.parametrize("method", ENCODERS)
def test_a_store_of_the_decoded_weights(tmp_path: Path, method: str) -> None:
    a, b = tmp_path / "encoded", tmp_path / "plain"
    write_checkpoint(b, MIXTRAL, write_encoded(a, method))
    add_tokenizer(a, b)
    report = moelite.quantize(a, tmp_path / "a", experts="f32", dense="f32")
    moelite.quantize(b, tmp_path / "b", experts="f32", dense="f32")
    files = sorted(p.name for p in (tmp_path / "b").glob("*.safetensors"))
    assert len(files) == 4
    for name in files:
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes(), name
    assert set(report.encodings) == {ENCODERS[method][2], "F32"}
    assert report.bytes_before == sum(report.encodings.values())
    ids = np.random.default_rng(1).integers(0, 100, 12).tolist()
    with (
        moelite.load(tmp_path / "a", kv="f32") as one,
        moelite.load(tmp_path / "b", kv="f32") as two,
    ):
        logits = one.forward(ids)
        np.testing.assert_array_equal(logits, two.forward(ids))
    assert logits.std() > 0.01


def test_the_report_says_what_was_read(tmp_path: Path) -> None:
    write_encoded(tmp_path / "m", "gptq")
    report = moelite.quantize(tmp_path / "m", tmp_path / "s", dry_run=True)
    data = (tmp_path / "m" / "model.safetensors").stat().st_size
    assert 0 < data - report.bytes_before < 60_000  # the header
    text = io.StringIO()
    show(Console(file=text, width=200), report)
    share = 100 * report.encodings["gptq int4, groups of 32"] / report.bytes_before
    assert f"read from: gptq int4, groups of 32 ({share:.3g}%), F32 (" in text.getvalue()
    assert as_dict(report)["encodings"] == report.encodings


def test_bytes_of_a_part_of_a_tensor(tmp_path: Path) -> None:
    """Experts that lie in one tensor share its bytes."""
    write_checkpoint(tmp_path, MIXTRAL, {"stack": np.zeros((4, 8, 6), np.float32)}, dtype="BF16")
    source = open_folder(tmp_path)
    assert coded(source, TensorRef(name="stack")) is None  # plain: numbers only
    ref = TensorRef(name="stack", stacked=True).at(1)
    assert source_bytes(source, ref, (8, 6)) == 2 * 8 * 6
    assert source_bytes(source, TensorRef(name="stack"), (4, 8, 6)) == 2 * 4 * 8 * 6


def test_a_killed_run_goes_on(tmp_path: Path) -> None:
    """The fingerprint samples decoded rows: other weights of the same shapes are refused."""
    write_encoded(tmp_path / "m", "awq")
    moelite.quantize(tmp_path / "m", tmp_path / "s")
    assert moelite.quantize(tmp_path / "m", tmp_path / "s").reused
    path = tmp_path / "m" / "model.safetensors"
    data = bytearray(path.read_bytes())
    size = 8 + int.from_bytes(data[:8], "little")
    header = json.loads(bytes(data[8:size]))
    for name, entry in header.items():
        if name.endswith(".scales"):
            data[size + entry["data_offsets"][0]] ^= 1
    path.write_bytes(bytes(data))
    with pytest.raises(moelite.errors.StoreError, match="other weights"):
        moelite.quantize(tmp_path / "m", tmp_path / "s")


def test_codes_of_a_source(tmp_path: Path) -> None:
    tensors = write_encoded(tmp_path / "m", "pack-quantized")
    name = "model.layers.1.block_sparse_moe.experts.2.w2.weight"
    found = coded(open_folder(tmp_path / "m"), TensorRef(name=name), 8, 24)
    assert found is not None
    assert (found.kind, found.block, found.codes.shape) == ("int4", 32, (16, 96))
    got = found.table.astype(np.float32)[found.codes] * found.scales.repeat(32, axis=1)
    np.testing.assert_array_equal(got, tensors[name][8:24])


@pytest.mark.parametrize("method", ["gptq", "awq"])
def test_rows_cost_rows(tmp_path: Path, method: str) -> None:
    """Matrices packed down their columns are read column by column, never whole."""
    encode: Any = {"gptq": gptq, "awq": awq}[method]
    parts, want = encode(np.random.default_rng(2), 2048, 1024)
    stored = {f"m.{end}": part for end, part in parts.items()}
    stored = {n: (kind, np.ascontiguousarray(a)) for n, (kind, a) in stored.items()}
    (tmp_path / "config.json").write_text(
        json.dumps(MIXTRAL | {"quantization_config": ENCODERS[method][1]})
    )
    write_raw(tmp_path / "model.safetensors", raw_of(stored))
    source = open_folder(tmp_path)
    tracemalloc.start()
    got = source.raw("m.weight", 512, 576)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    np.testing.assert_array_equal(got, want[512:576])
    assert peak < 8 * got.nbytes  # 2 MB; the codes alone of the whole matrix take 2
