"""quantize: what it writes, how it goes on after a kill, what it refuses, what memory it takes."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tiny_checkpoint import MIXTRAL, QWEN3_MOE, layout_of, weights, write_checkpoint

from moelite import convert, inputs, packing
from moelite.arch import TensorRef
from moelite.checkpoint import open_checkpoint
from moelite.convert import quantize
from moelite.errors import (
    BudgetError,
    CheckpointError,
    MoeliteError,
    QuantizationError,
    StoreError,
    UnsupportedError,
    UsageError,
)
from moelite.inputs import read_config
from moelite.quant import FORMATS
from moelite.store import Store
from moelite.units import MIB

BIG = MIXTRAL | {
    "hidden_size": 512,
    "intermediate_size": 1024,
    "num_hidden_layers": 4,
    "num_local_experts": 8,
    "vocab_size": 8192,
}
RUN = (
    "import sys; from moelite import quantize; quantize(sys.argv[1], sys.argv[2], ram=sys.argv[3])"
)


@pytest.fixture
def model(tmp_path: Path) -> Path:
    write_checkpoint(tmp_path / "model", MIXTRAL)
    return tmp_path / "model"


def contents(folder: Path) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in folder.iterdir()}


# --- what it writes ---


def test_the_report_adds_up(tmp_path: Path) -> None:
    tensors = write_checkpoint(tmp_path / "model", QWEN3_MOE, dtype="BF16")
    report = quantize(tmp_path / "model", tmp_path / "store")
    rows = {row.name: row for row in report.classes}
    assert set(rows) == {
        "routed experts",
        "attention",
        "dense layers",
        "embeddings",
        "router",
        "norms and biases",
    }
    assert sum(row.params for row in report.classes) == sum(t.size for t in tensors.values())
    assert sum(row.tensors for row in report.classes) == len(tensors)
    assert report.bytes_before == 2 * sum(t.size for t in tensors.values())
    routed = rows["routed experts"]
    assert (routed.format, routed.tensors, routed.params) == ("int4", 36, 2 * 6 * 3 * 64 * 40)
    record = layout_of(Store.open(tmp_path / "store")).record_bytes
    assert routed.bytes_after == 12 * record
    assert routed.bpw == 8 * 12 * record / routed.params
    assert (rows["router"].format, rows["router"].bpw) == ("f32", 32)
    files = contents(tmp_path / "store")
    data = sum(len(d) for name, d in files.items() if name.endswith("safetensors"))
    assert 0 <= data - report.bytes_after <= 3 * 8192  # headers
    assert report.layers == 2
    assert not report.ignored
    assert report.peak_rss_bytes > 10 * MIB


def test_the_same_bytes_from_shards_threads_and_chunks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tensors = write_checkpoint(tmp_path / "a" / "model", MIXTRAL)
    write_checkpoint(tmp_path / "b" / "model", MIXTRAL, tensors, shards=3)
    quantize(tmp_path / "a" / "model", tmp_path / "a" / "store")
    monkeypatch.setattr(packing, "_CHUNK_BYTES", 1)  # one tile at a time
    monkeypatch.setattr(convert, "workers", lambda *_: 1)
    quantize(tmp_path / "b" / "model", tmp_path / "b" / "store")
    assert contents(tmp_path / "a" / "store") == contents(tmp_path / "b" / "store")


def test_unused_tensors_are_listed_and_needed_ones_are_not_skipped(tmp_path: Path) -> None:
    tensors = weights(MIXTRAL)
    extra = {
        "mtp.norm.weight": np.ones(4, np.float32),
        "model.rotary.inv_freq": np.ones(8, np.float32),
    }
    write_checkpoint(tmp_path / "model", MIXTRAL, tensors | extra)
    report = quantize(tmp_path / "model", tmp_path / "store")
    assert report.ignored == tuple(sorted(extra))
    name = "model.layers.1.block_sparse_moe.experts.3.w2.weight"
    del tensors[name]
    write_checkpoint(tmp_path / "other", MIXTRAL, tensors)
    with pytest.raises(CheckpointError, match=name.replace(".", r"\.")):
        quantize(tmp_path / "other", tmp_path / "none")
    assert not (tmp_path / "none").exists()


def test_a_wrong_shape_is_named(tmp_path: Path) -> None:
    tensors = weights(MIXTRAL)
    name = "model.layers.0.self_attn.k_proj.weight"
    tensors[name] = tensors[name][:-1]
    write_checkpoint(tmp_path / "model", MIXTRAL, tensors)
    with pytest.raises(CheckpointError, match=r"k_proj.*\[31, 64\].*\[32, 64\]"):
        quantize(tmp_path / "model", tmp_path / "store", dry_run=True)


def test_nan_is_named(tmp_path: Path) -> None:
    tensors = weights(MIXTRAL)
    name = "model.layers.1.block_sparse_moe.experts.2.w3.weight"
    tensors[name][5, 5] = np.nan
    write_checkpoint(tmp_path / "model", MIXTRAL, tensors)
    with pytest.raises(QuantizationError, match=name.replace(".", r"\.")):
        quantize(tmp_path / "model", tmp_path / "store")
    assert not list((tmp_path / "store").glob("*.part"))


def test_dry_run_writes_nothing(model: Path, tmp_path: Path) -> None:
    report = quantize(model, tmp_path / "store", dry_run=True)
    assert report.dry_run
    assert not (tmp_path / "store").exists()
    assert quantize(model, tmp_path / "store").classes == report.classes


def test_progress_ends_at_the_total(model: Path, tmp_path: Path) -> None:
    seen: list[tuple[int, int, str]] = []
    report = quantize(model, tmp_path / "store", progress=lambda *now: seen.append(now))
    done = [now[0] for now in seen]
    assert done == sorted(done)
    assert seen[-1][:2] == (report.bytes_before, report.bytes_before)
    assert {"layer 0", "layer 1", "layer 2"} < {now[2] for now in seen}


def test_stacked_and_transposed_experts_give_the_same_record(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    want = weights(MIXTRAL)["model.layers.0.block_sparse_moe.experts.1.w1.weight"]
    write_checkpoint(tmp_path, MIXTRAL, {"s": np.stack([want.T * 0, want.T])})
    monkeypatch.setattr(packing, "_CHUNK_BYTES", 1)
    out = np.zeros(FORMATS["int4"].nbytes(96, 64), np.uint8)
    ref = TensorRef(name="s", stacked=True, transpose=True).at(1)
    packing.pack(FORMATS["int4"], open_checkpoint(tmp_path), (ref, 96, 64), out)
    np.testing.assert_array_equal(out, FORMATS["int4"].pack(want))


# --- going on after an end that was not one ---


def killed(model: Path, out: Path, when: str) -> None:
    """Run quantize in a process of its own and kill -9 it once `when` exists."""
    child = subprocess.Popen([sys.executable, "-c", RUN, str(model), str(out), "4GiB"])
    while not any(out.glob(when)) and child.poll() is None:
        time.sleep(0.0005)
    child.send_signal(signal.SIGKILL)
    child.wait()


def test_kill_and_go_on(tmp_path: Path) -> None:
    write_checkpoint(tmp_path / "model", BIG, dtype="BF16")
    quantize(tmp_path / "model", tmp_path / "whole")
    out = tmp_path / "store"
    done = set()
    for when in ("dense.safetensors.part", "experts-00001.safetensors.part", "experts-00003*.part"):
        killed(tmp_path / "model", out, when)
        assert not (out / "moelite.json").exists(), "finished before the kill"
        found = {p.name for p in out.glob("experts-*.safetensors")}
        assert found >= done
        done = found
    assert done, "no layer was finished before a kill"
    before = {name: (out / name).stat().st_mtime_ns for name in done}
    report = quantize(tmp_path / "model", out)
    assert contents(out) == contents(tmp_path / "whole")
    journalled = [n for n in done if (out / n).stat().st_mtime_ns == before[n]]
    assert len(journalled) == report.resumed - 1 > 0  # and dense.safetensors


class Interrupt:
    """Stops quantize after some progress, as Ctrl-C would."""

    def __init__(self, after: int) -> None:
        self.left = after

    def __call__(self, done: int, total: int, note: str) -> None:
        self.left -= 1
        if self.left == 0:
            raise KeyboardInterrupt


@pytest.mark.parametrize("after", [1, 24, 25, 27, 30, 33, 38, 39])
def test_interrupts_leave_it_ready_to_go_on(model: Path, tmp_path: Path, after: int) -> None:
    quantize(model, tmp_path / "whole")
    out = tmp_path / "store"
    with pytest.raises(KeyboardInterrupt):
        quantize(model, out, progress=Interrupt(after))
    assert not list(out.glob("*.part"))
    with pytest.raises(StoreError, match="unfinished"):
        Store.open(out)
    quantize(model, out)
    assert contents(out) == contents(tmp_path / "whole")


def test_a_finished_store_is_left_alone(model: Path, tmp_path: Path) -> None:
    out = tmp_path / "store"
    assert not quantize(model, out).reused
    before = {p.name: p.stat().st_mtime_ns for p in out.iterdir()}
    assert quantize(model, out).reused
    assert {p.name: p.stat().st_mtime_ns for p in out.iterdir()} == before


def test_a_deleted_file_is_made_again(model: Path, tmp_path: Path) -> None:
    out = tmp_path / "store"
    quantize(model, out)
    before = contents(out)
    (out / "experts-00001.safetensors").unlink()
    os.truncate(out / "tokenizer.json", 3)
    report = quantize(model, out)
    assert not report.reused
    assert contents(out) == before


def test_a_file_the_journal_does_not_know_is_made_again(model: Path, tmp_path: Path) -> None:
    out = tmp_path / "store"
    quantize(model, tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt):
        quantize(model, out, progress=Interrupt(30))
    (out / "experts-00002.safetensors").write_bytes(b"left by something else")
    quantize(model, out)
    assert contents(out) == contents(tmp_path / "whole")


# --- what it refuses ---


def test_a_foreign_folder(model: Path, tmp_path: Path) -> None:
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "cat.jpg").write_text("meow")
    with pytest.raises(StoreError, match=r"not a store: it holds cat\.jpg"):
        quantize(model, tmp_path / "photos")
    assert contents(tmp_path / "photos") == {"cat.jpg": b"meow"}
    with pytest.raises(StoreError, match="is a file"):
        quantize(model, tmp_path / "photos" / "cat.jpg")
    with pytest.raises(StoreError, match="not a store"):
        quantize(model, model)


@pytest.mark.parametrize("finished", [True, False])
def test_another_recipe_or_source(model: Path, tmp_path: Path, finished: bool) -> None:
    out = tmp_path / "store"
    if finished:
        quantize(model, out)
    else:
        with pytest.raises(KeyboardInterrupt):
            quantize(model, out, progress=Interrupt(30))
    before = contents(out)
    with pytest.raises(StoreError, match=r"experts int4, dense int8; asked for .*experts int8"):
        quantize(model, out, experts="int8")
    with pytest.raises(StoreError, match=r"dense int8; asked for .*dense bf16"):
        quantize(model, out, dense="bf16")
    write_checkpoint(tmp_path / "b" / "model", MIXTRAL, seed=1)
    with pytest.raises(StoreError, match="the same name, other weights"):
        quantize(tmp_path / "b" / "model", out)
    assert contents(out) == before


def test_a_store_of_another_version(model: Path, tmp_path: Path) -> None:
    out = tmp_path / "store"
    out.mkdir()
    for name in ("moelite.partial.json", "moelite.json"):
        (out / name).write_text(json.dumps({"store_version": 4}))
        with pytest.raises(StoreError, match="version 4; this moelite reads version 3"):
            quantize(model, out)


def test_two_writers(model: Path, tmp_path: Path) -> None:
    out = tmp_path / "store"
    out.mkdir()
    with packing.locked(out), pytest.raises(StoreError, match="another quantize"):
        quantize(model, out)
    quantize(model, out)


def test_a_full_disk_is_told_beforehand(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = type("Usage", (), {"free": 1000})
    monkeypatch.setattr(convert.shutil, "disk_usage", lambda _: usage)
    with pytest.raises(MoeliteError, match="1000 B are free"):
        quantize(model, tmp_path / "a" / "b")
    assert not (tmp_path / "a").exists()


@pytest.mark.parametrize("recipe", [{"experts": "int3"}, {"dense": "int3"}])
def test_unknown_formats(model: Path, tmp_path: Path, recipe: dict[str, Any]) -> None:
    with pytest.raises(UsageError, match=next(iter(recipe.values()))):
        quantize(model, tmp_path / "store", **recipe)


def test_unreadable_dtypes_are_refused_before_any_work(tmp_path: Path) -> None:
    from tiny_checkpoint import write_raw

    tensors = weights(MIXTRAL)
    (tmp_path / "model").mkdir()
    write_checkpoint(tmp_path / "model", MIXTRAL)
    raw = {n: ("F8_E4M3", t.shape, bytes(t.size)) for n, t in tensors.items()}
    write_raw(tmp_path / "model" / "model.safetensors", raw)
    with pytest.raises(UnsupportedError, match="F8_E4M3"):
        quantize(tmp_path / "model", tmp_path / "store")


# --- memory ---


def test_too_little_memory_names_the_least(model: Path, tmp_path: Path) -> None:
    with pytest.raises(BudgetError, match=r"at least \d+MiB.*50\.0 MiB") as caught:
        quantize(model, tmp_path / "store", ram="50MiB")
    assert caught.value.exit_code == 3
    assert not (tmp_path / "store").exists()


def test_peak_memory_stays_below_the_budget(tmp_path: Path) -> None:
    # an embedding of 128 MiB as float32, packed within a few MiB beyond the runtime's own
    config = MIXTRAL | {
        "hidden_size": 1024,
        "intermediate_size": 2048,
        "num_hidden_layers": 1,
        "num_local_experts": 4,
        "vocab_size": 32768,
    }
    write_checkpoint(tmp_path / "model", config, dtype="BF16")
    code = (
        "import sys, moelite, json\n"
        "from moelite.errors import BudgetError\n"
        "def run(ram): return moelite.quantize(*sys.argv[1:3], dense='f32', ram=ram)\n"
        "try: run('60MiB')\n"
        "except BudgetError as e: ram = e.fix.removeprefix('--ram ')\n"
        "report = run(ram)\n"
        "print(ram, report.peak_rss_bytes)"
    )
    child = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path / "model"), str(tmp_path / "store")],
        capture_output=True,
        text=True,
        check=True,
    )
    ram, peak = child.stdout.split()
    assert int(peak) <= int(ram.removesuffix("MiB")) * MIB
    assert int(ram.removesuffix("MiB")) < 350


# --- configs without weights ---


def test_read_config(model: Path, tmp_path: Path) -> None:
    assert read_config(model) == (MIXTRAL, 18, None)
    quantize(model, tmp_path / "store")
    found = read_config(tmp_path / "store")
    assert found[:2] == (MIXTRAL, 18)
    assert (found.manifest.experts, found.manifest.dense) == ("int4", "int8")


def test_the_built_in_model_by_name(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from moelite import demo

    def fetch(cache: Path, *, offline: bool, progress: Any) -> Any:
        progress(1, 2)
        return open_checkpoint(model)

    monkeypatch.setattr(demo, "open_builtin", fetch)
    seen: list[tuple[int, int, str]] = []
    inputs.open_source("smollm2-moe", progress=lambda *now: seen.append(now))
    assert seen == [(1, 2, "fetching the base model")]
    report = quantize("smollm2-moe", tmp_path / "store", dry_run=True)
    assert report.layers == 3
