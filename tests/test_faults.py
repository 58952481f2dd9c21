"""What disks and people do to a store while it is used: a clear error, or the very same tokens."""

from __future__ import annotations

import contextlib
import errno
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import tiny_checkpoint
from tiny_checkpoint import layout_of

import moelite
from moelite import engine, tensorfile
from moelite.errors import StoreError
from moelite.store import Store

IDS = np.random.default_rng(3).integers(0, 100, 24).tolist()
LAYER = "experts-00002.safetensors"


@pytest.fixture
def store(tmp_path: Path) -> Path:
    tiny_checkpoint.write_checkpoint(tmp_path / "checkpoint", tiny_checkpoint.QWEN3_MOE)
    (tmp_path / "checkpoint" / "tokenizer.json").unlink()
    moelite.quantize(tmp_path / "checkpoint", tmp_path / "store", experts="int4", dense="int8")
    return tmp_path / "store"


@pytest.fixture(params=["direct", "page-cache"])
def model(request: pytest.FixtureRequest, store: Path) -> Iterator[moelite.Model]:
    """Keeps two experts a layer: nearly every expert is read anew."""
    plan = moelite.footprint(store, ram="1GiB", context=64, threads=2)
    budget = plan.minimum_bytes + 4 * plan.record_bytes
    with moelite.load(store, ram=budget, context=64, threads=2, reads=request.param) as loaded:
        yield loaded


def decode(model: moelite.Model) -> np.ndarray:
    session = model.session()
    return np.stack([session.advance([i]).copy() for i in IDS])


def record_at(store: Path, expert: int) -> tuple[int, int]:
    """(offset, bytes) of a record of LAYER."""
    opened = Store.open(store)
    size = layout_of(opened).record_bytes
    start = (store / LAYER).stat().st_size - opened.layers[2].experts * size
    return start + expert * size, size


def flip(store: Path, expert: int) -> None:
    at, size = record_at(store, expert)
    with (store / LAYER).open("r+b") as file:
        file.seek(at + size // 3)
        byte = file.read(1)
        file.seek(at + size // 3)
        file.write(bytes([byte[0] ^ 16]))


def every_expert(store: Path, harm: Callable[[Path, int], None]) -> None:
    for expert in range(Store.open(store).layers[2].experts):
        harm(store, expert)


def collect(model: moelite.Model, got: list[np.ndarray]) -> None:
    session = model.session()
    got.extend(session.advance([i]).copy() for i in IDS)


def test_a_flipped_bit_is_named_before_it_makes_a_token(store: Path) -> None:
    plan = moelite.footprint(store, ram="1GiB", context=64, threads=2)
    common = {"ram": plan.minimum_bytes, "context": 64, "threads": 2}
    with moelite.load(store, **common) as whole:
        want = decode(whole)
    flip(store, 3)
    for reads in ("direct", "page-cache"):
        got: list[np.ndarray] = []
        with moelite.load(store, **common, reads=reads) as loaded:
            with pytest.raises(StoreError, match="layer 2 expert 3 is damaged") as caught:
                collect(loaded, got)
            assert LAYER in str(caught.value)
            assert caught.value.exit_code == 6
            if got:
                np.testing.assert_array_equal(got, want[: len(got)])


def test_a_read_error_is_told_and_the_model_goes_on_afterwards(
    model: moelite.Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    want = decode(model)
    model.experts.at_once = None  # as where the page cache has let go of the records
    real, count = tensorfile._read_at, [0]

    def fail(fd: int, out: memoryview, offset: int) -> int:
        count[0] += 1
        if count[0] > 5:
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return real(fd, out, offset)

    with monkeypatch.context() as patch:
        patch.setattr(tensorfile, "_read_at", fail)
        with pytest.raises(StoreError, match=r"layer . expert .*Input/output error"):
            decode(model)
    np.testing.assert_array_equal(decode(model), want)


def test_a_drive_that_fails_the_probe_is_told(store: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(path: Path, record_bytes: int) -> None:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(engine, "drive_speed", fail)
    plan = moelite.footprint(store, ram="1GiB", context=64)
    with pytest.raises(StoreError, match="cannot be read: Input/output error"):
        moelite.load(store, ram=plan.minimum_bytes, context=64)


def test_short_reads_are_made_whole(model: moelite.Model, monkeypatch: pytest.MonkeyPatch) -> None:
    want = decode(model)
    model.experts.at_once = None
    real = tensorfile._read_at
    monkeypatch.setattr(
        tensorfile, "_read_at", lambda fd, out, offset: real(fd, out[:4096], offset)
    )
    np.testing.assert_array_equal(decode(model), want)


def test_a_file_cut_short_while_running_is_told(model: moelite.Model, store: Path) -> None:
    decode(model)
    os.truncate(store / LAYER, record_at(store, 1)[0] + 4096)
    with pytest.raises(StoreError, match=f"{LAYER} ends inside layer 2 expert"):
        decode(model)


def test_a_store_deleted_while_running_changes_nothing(model: moelite.Model, store: Path) -> None:
    want = decode(model)
    for file in store.iterdir():
        file.unlink()
    np.testing.assert_array_equal(decode(model), want)


def bench(store: Path) -> subprocess.CompletedProcess[str]:
    command = ["bench", str(store), "--prompt", "8", "--gen", "4", "--repeat", "1"]
    return subprocess.run(
        [sys.executable, "-m", "moelite.cli", *command, "--context", "64", "--ram", "300MiB"],
        capture_output=True,
        text=True,
        timeout=240,
    )


@pytest.mark.parametrize("harm", ["flip", "cut", "gone"])
def test_the_command_says_what_is_wrong_and_leaves_with_six(store: Path, harm: str) -> None:
    if harm == "flip":
        every_expert(store, flip)
    elif harm == "cut":
        os.truncate(store / LAYER, record_at(store, 1)[0])
    else:
        (store / LAYER).unlink()
    done = bench(store)
    assert done.returncode == 6, done.stderr
    assert LAYER in done.stderr
    assert "fix:" in done.stderr
    assert "Traceback" not in done.stderr


def test_a_damaged_dense_tensor_is_told_at_the_start(store: Path) -> None:
    with (store / "dense.safetensors").open("r+b") as file:
        file.seek(-1000, os.SEEK_END)
        byte = file.read(1)
        file.seek(-1000, os.SEEK_END)
        file.write(bytes([byte[0] ^ 1]))
    with pytest.raises(StoreError, match=r"dense.safetensors: tensor .* is damaged"):
        moelite.load(store, ram="1GiB", context=64)


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A folder on a file system of 400 KiB."""
    folder = tmp_path / "small"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=400k", "none", str(folder)]
    if (
        not sys.platform.startswith("linux")
        or subprocess.run(mount, capture_output=True).returncode
    ):
        pytest.skip("no right to mount")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


def test_a_disk_that_fills_up_while_quantizing_loses_nothing(
    tmp_path: Path, small_disk: Path
) -> None:
    tiny_checkpoint.write_checkpoint(tmp_path / "checkpoint", tiny_checkpoint.QWEN3_MOE)

    def fill(done: int, total: int, note: str) -> None:
        with (small_disk / "filler").open("ab", 0) as file, contextlib.suppress(OSError):
            while file.write(b"x" * 4096):
                pass

    with pytest.raises(StoreError, match=r"cannot be written: .*No space left") as caught:
        moelite.quantize(tmp_path / "checkpoint", small_disk / "store", progress=fill)
    assert caught.value.exit_code == 6
    assert not (small_disk / "store" / "moelite.json").exists()
    (small_disk / "filler").unlink()
    moelite.quantize(tmp_path / "checkpoint", small_disk / "store")  # goes on where it stopped
    moelite.quantize(tmp_path / "checkpoint", tmp_path / "other")
    for file in (tmp_path / "other").iterdir():
        assert (small_disk / "store" / file.name).read_bytes() == file.read_bytes(), file.name
