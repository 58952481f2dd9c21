"""Reading checkpoints: exact values, bounded reads, and no belief in what a file claims."""

from __future__ import annotations

import json
import tracemalloc
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save_file
from tiny_checkpoint import MIXTRAL, bf16, write_checkpoint, write_raw

from moelite.arch import TensorRef
from moelite.checkpoint import open_checkpoint, read, ref_shape
from moelite.errors import CheckpointError, UnsupportedError

EMBED = "model.embed_tokens.weight"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    write_checkpoint(tmp_path / "model", MIXTRAL)
    return tmp_path / "model"


@pytest.mark.parametrize("shards", [1, 3])
@pytest.mark.parametrize("dtype", ["F32", "F16", "BF16"])
def test_values_are_exact(tmp_path: Path, shards: int, dtype: str) -> None:
    tensors = write_checkpoint(tmp_path, MIXTRAL, shards=shards, dtype=dtype)
    checkpoint = open_checkpoint(tmp_path)
    assert checkpoint.names() == sorted(tensors)
    for name, tensor in tensors.items():
        want = tensor
        if dtype == "F16":
            want = tensor.astype(np.float16).astype(np.float32)
        if dtype == "BF16":  # truncated by the writer, so the low 16 bits are zero
            want = (tensor.view(np.uint32) & 0xFFFF0000).view(np.float32)
        got = checkpoint.raw(name)
        assert got.dtype == np.float32
        np.testing.assert_array_equal(got, want)
        assert checkpoint.shape(name) == tensor.shape
        assert checkpoint.dtype(name) == dtype


def test_special_values_survive(tmp_path: Path) -> None:
    values = np.array([0.0, -0.0, np.inf, -np.inf, np.nan, 1e-40, 3.0e38], np.float32)
    write_checkpoint(tmp_path, MIXTRAL, {"x": values})
    write_raw(tmp_path / "model.safetensors", {"x": bf16(values)})
    got = open_checkpoint(tmp_path).raw("x")
    assert (got.view(np.uint32) == (values.view(np.uint32) & 0xFFFF0000)).all()


def test_rows_only(folder: Path) -> None:
    checkpoint = open_checkpoint(folder)
    whole = checkpoint.raw(EMBED)
    np.testing.assert_array_equal(checkpoint.raw(EMBED, 5, 9), whole[5:9])
    np.testing.assert_array_equal(checkpoint.raw(EMBED, 98), whole[98:])
    assert checkpoint.raw(EMBED, 9, 5).shape == (0, 64)


def test_a_row_costs_a_row(tmp_path: Path) -> None:
    big = np.arange(20000 * 256, dtype=np.float32).reshape(20000, 256)
    write_checkpoint(tmp_path, MIXTRAL, {"big": big}, dtype="BF16")
    checkpoint = open_checkpoint(tmp_path)
    tracemalloc.start()
    checkpoint.raw("big", 100, 108)
    rows = tracemalloc.get_traced_memory()[1]
    tracemalloc.reset_peak()
    got = checkpoint.raw("big")
    whole = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert (got.view(np.uint32) == big.view(np.uint32) & 0xFFFF0000).all()
    assert rows < 100_000
    assert whole < big.nbytes + 3_000_000  # the result and one piece


def test_scalars_and_empty(tmp_path: Path) -> None:
    write_checkpoint(
        tmp_path, MIXTRAL, {"s": np.array(2.5, np.float32), "e": np.zeros((0, 3), np.float32)}
    )
    checkpoint = open_checkpoint(tmp_path)
    assert checkpoint.raw("s").shape == ()
    assert checkpoint.raw("s") == 2.5
    assert checkpoint.raw("e").shape == (0, 3)


STACK = np.arange(3 * 8 * 6, dtype=np.float32).reshape(3, 8, 6)


@pytest.mark.parametrize(
    ("ref", "want"),
    [
        (TensorRef(name="plain"), STACK[0]),
        (TensorRef(name="plain", rows=(2, 6, 1)), STACK[0][2:6]),
        (TensorRef(name="plain", rows=(1, 8, 2)), STACK[0][1::2]),
        (TensorRef(name="plain", transpose=True), STACK[0].T),
        (TensorRef(name="plain", transpose=True, rows=(0, 6, 2)), STACK[0].T[::2]),
        (TensorRef(name="stack", stacked=True).at(1), STACK[1]),
        (TensorRef(name="stack", stacked=True, rows=(4, 8, 1)).at(2), STACK[2][4:]),
        (TensorRef(name="stack", stacked=True, transpose=True).at(2), STACK[2].T),
        (
            TensorRef(name="stack", stacked=True, transpose=True, rows=(1, 6, 2)).at(0),
            STACK[0].T[1::2],
        ),
        (TensorRef(name="vector"), STACK[0][0]),
        (TensorRef(name="vector", rows=(2, 5, 1)), STACK[0][0][2:5]),
    ],
)
def test_refs(tmp_path: Path, ref: TensorRef, want: np.ndarray) -> None:
    tensors = {"plain": STACK[0].copy(), "stack": STACK, "vector": STACK[0][0].copy()}
    write_checkpoint(tmp_path, MIXTRAL, tensors)
    checkpoint = open_checkpoint(tmp_path)
    assert ref_shape(checkpoint, ref) == want.shape
    got = read(checkpoint, ref)
    assert got.flags.c_contiguous
    np.testing.assert_array_equal(got, want)
    np.testing.assert_array_equal(read(checkpoint, ref, 1, 3), want[1:3])
    assert read(checkpoint, ref, 3, 3).shape == want[3:3].shape


def test_an_expert_that_is_not_there(tmp_path: Path) -> None:
    write_checkpoint(tmp_path, MIXTRAL, {"stack": STACK})
    with pytest.raises(CheckpointError, match=r"'stack' .* has no expert 3"):
        ref_shape(open_checkpoint(tmp_path), TensorRef(name="stack", stacked=True).at(3))


def test_sidecars_are_the_bytes_of_the_files(folder: Path) -> None:
    (folder / "chat_template.jinja").write_text("{{ messages }}")
    (folder / "notes.txt").write_text("not ours")
    files = open_checkpoint(folder).files
    assert set(files) == {"config.json", "tokenizer.json", "chat_template.jinja"}
    assert files["config.json"] == (folder / "config.json").read_bytes()


# --- what is refused ---


def test_pickles_are_refused_by_name(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "pytorch_model.bin").write_bytes(b"\x80\x04N.")
    with pytest.raises(CheckpointError, match=r"pytorch_model\.bin.*safetensors only"):
        open_checkpoint(tmp_path)


def test_missing_things_are_named(tmp_path: Path, folder: Path) -> None:
    with pytest.raises(CheckpointError, match="not a folder"):
        open_checkpoint(tmp_path / "nowhere")
    with pytest.raises(CheckpointError, match=r"no config\.json"):
        open_checkpoint(tmp_path)
    with pytest.raises(CheckpointError, match="no tensor 'nope'"):
        open_checkpoint(folder).raw("nope")
    (folder / "model.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"neither model\.safetensors nor"):
        open_checkpoint(folder)


@pytest.mark.parametrize("dtype", ["F8_E4M3", "I8", "F99_NEW"])
def test_other_dtypes_are_refused_when_read(folder: Path, dtype: str) -> None:
    write_raw(folder / "model.safetensors", {"x": (dtype, (4,), b"1234")})
    with pytest.raises(UnsupportedError, match=dtype):
        open_checkpoint(folder).raw("x")


def test_incomplete_shards(tmp_path: Path) -> None:
    write_checkpoint(tmp_path, MIXTRAL, shards=3)
    shard = tmp_path / "model-00002-of-00003.safetensors"
    data = shard.read_bytes()
    shard.unlink()
    with pytest.raises(CheckpointError, match=r"00002-of-00003.* is missing"):
        open_checkpoint(tmp_path)
    shard.write_bytes(data[:-1])
    with pytest.raises(CheckpointError, match=r"00002-of-00003.*damaged"):
        open_checkpoint(tmp_path)
    save_file({"other": np.zeros(1, np.float32)}, shard)
    with pytest.raises(CheckpointError, match=r"00002-of-00003.*has no tensor"):
        open_checkpoint(tmp_path)


def test_a_file_cut_after_it_was_opened(folder: Path) -> None:
    checkpoint = open_checkpoint(folder)
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-4000])
    with pytest.raises(CheckpointError, match=r"ends inside tensor 'model\.norm\.weight'"):
        checkpoint.raw("model.norm.weight")


def header(**changes: Any) -> bytes:
    entry = {"dtype": "F32", "shape": [2, 2], "data_offsets": [0, 16]} | changes
    return json.dumps({"x": entry}).encode()


@pytest.mark.parametrize(
    "text",
    [
        header(shape=[2, 3]),
        header(shape=[2, -2]),
        header(shape=[2, 2.0]),
        header(shape=[True, 4]),
        header(shape="44"),
        header(shape=None),
        header(dtype=5),
        header(dtype="F64"),
        header(data_offsets=[0, 15]),
        header(data_offsets=[4, 20]),
        header(data_offsets=[0, 1 << 40], shape=[1 << 38]),
        header(data_offsets=[16, 0]),
        header(data_offsets=[-16, 0]),
        header(data_offsets=[0]),
        header(data_offsets=[0, 8], shape=[2]),  # leaves bytes that belong to nothing
        b'{"x": {"dtype": "F32", "shape": [4], "data_offsets": [0, 16]},'
        b'"y": {"dtype": "F32", "shape": [4], "data_offsets": [0, 16]}}',
        b'{"x": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]},'
        b'"x": {"dtype": "F32", "shape": [4], "data_offsets": [0, 16]}}',
        b'{"x": 5}',
        b"[]",
        b"{",
        b"\xff\xfe",
        b"[" * 100_000,
        b'{"x": ' + b"9" * 5000 + b"}",
    ],
)
def test_headers_that_lie(folder: Path, text: bytes) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(len(text).to_bytes(8, "little") + text + bytes(16))
    with pytest.raises(CheckpointError, match=r"model\.safetensors"):
        open_checkpoint(folder)


@pytest.mark.parametrize(
    "content", [b"", b"1234567", b"\xff" * 8 + b"{}", (500).to_bytes(8, "little")]
)
def test_files_that_are_no_safetensors(folder: Path, content: bytes) -> None:
    (folder / "model.safetensors").write_bytes(content)
    with pytest.raises(CheckpointError, match="does not fit this file"):
        open_checkpoint(folder)


def test_a_huge_header_is_not_read(folder: Path) -> None:
    path = folder / "model.safetensors"
    with path.open("wb") as file:
        file.write((200_000_000).to_bytes(8, "little"))
        file.truncate(300_000_000)  # sparse
    with pytest.raises(CheckpointError, match="200000000"):
        open_checkpoint(folder)


@pytest.mark.parametrize(
    "name", ["../x.safetensors", "/etc/passwd", "a/../../x", "a\\..\\x", "a\0b"]
)
def test_shards_stay_in_the_folder(folder: Path, name: str) -> None:
    (folder / "model.safetensors").rename(folder.parent / "x.safetensors")
    index = {"weight_map": {"model.norm.weight": name}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(CheckpointError, match="leads out"):
        open_checkpoint(folder)


@pytest.mark.parametrize("name", ["model.safetensors", "tokenizer.json"])
def test_links_out_of_the_folder_are_refused(folder: Path, name: str) -> None:
    (folder / name).rename(folder.parent / "elsewhere")
    (folder / name).symlink_to(folder.parent / "elsewhere")
    with pytest.raises(CheckpointError, match=r"is a link to .*elsewhere"):
        open_checkpoint(folder)


def test_a_hub_snapshot_links_into_its_blobs(tmp_path: Path) -> None:
    repo = tmp_path / "models--acme--tiny-moe"
    snapshot = repo / "snapshots" / "0123abc"
    write_checkpoint(snapshot, MIXTRAL)
    (repo / "blobs").mkdir()
    for file in list(snapshot.iterdir()):
        file.rename(repo / "blobs" / file.name)
        file.symlink_to(repo / "blobs" / file.name)
    checkpoint = open_checkpoint(snapshot)
    assert checkpoint.source == "acme/tiny-moe@0123abc"
    assert checkpoint.raw(EMBED).shape == (100, 64)
    (snapshot / "tokenizer.json").unlink()
    (tmp_path / "secret").write_text("{}")
    (snapshot / "tokenizer.json").symlink_to(tmp_path / "secret")
    with pytest.raises(CheckpointError, match="secret"):
        open_checkpoint(snapshot)


@pytest.mark.parametrize(
    "text", ["[1]", "{", '{"weight_map": {}}', '{"weight_map": {"x": 3}}', "{}"]
)
def test_a_broken_index(folder: Path, text: str) -> None:
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors.index.json").write_text(text)
    with pytest.raises(CheckpointError, match=r"index\.json"):
        open_checkpoint(folder)
