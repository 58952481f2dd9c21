"""quantize with a calibration text: the same bytes however it was run, within its memory."""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tiny_checkpoint import MIXTRAL, QWEN3_MOE, weights, write_checkpoint
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit

from moelite import calibration
from moelite.cli import main
from moelite.convert import quantize
from moelite.errors import BudgetError, QuantizationError, StoreError, UsageError
from moelite.quant.record import unpack_record
from moelite.store import ExpertKey, Store
from moelite.units import MIB

IDS = np.random.default_rng(8).integers(0, 100, 1500).tolist()


def contents(folder: Path) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in folder.iterdir()}


@pytest.fixture
def model(tmp_path: Path) -> Path:
    write_checkpoint(tmp_path / "model", QWEN3_MOE)
    return tmp_path / "model"


def test_calibrated_experts_answer_nearer(tmp_path: Path) -> None:
    """Of layer 0, whose inputs both stores share: by the inputs that the model really has."""
    tensors = write_checkpoint(tmp_path / "model", MIXTRAL)
    quantize(tmp_path / "model", tmp_path / "plain", dense="f32")
    quantize(tmp_path / "model", tmp_path / "fed", dense="f32", calibrate=IDS)
    rng = np.random.default_rng(0)
    x = tensors["model.embed_tokens.weight"][rng.integers(0, 100, 500)].astype(np.float64)
    x /= np.sqrt(np.mean(x * x, -1, keepdims=True))
    x *= tensors["model.layers.0.post_attention_layernorm.weight"]
    name = "model.layers.0.block_sparse_moe.experts.1.{}.weight"
    loss = {}
    for store in ("plain", "fed"):
        opened = Store.open(tmp_path / store)
        record = np.empty(opened.layers[0].slot_bytes, np.uint8)
        opened.read_record(ExpertKey(0, 1), record)
        gate, _, _ = unpack_record(opened.layers[0].tiers[0], record)
        error = gate - tensors[name.format("w1")]
        loss[store] = np.square(x @ error.T).sum()
        opened.close()
    assert loss["fed"] < 0.9 * loss["plain"]


class Interrupt:
    """Stops quantize once a layer is finished."""

    def __init__(self, layer: int) -> None:
        self.name = f"experts-{layer:05d}.safetensors"

    def __call__(self, done: int, total: int, note: str) -> None:
        if note == self.name:
            raise KeyboardInterrupt


@pytest.mark.parametrize("checkpoint", [MIXTRAL, QWEN3_MOE], ids=["mixtral", "dense-between"])
def test_interrupted_after_a_layer_it_ends_in_the_same_bytes(
    tmp_path: Path, checkpoint: dict[str, Any]
) -> None:
    write_checkpoint(tmp_path / "model", checkpoint)
    whole = quantize(tmp_path / "model", tmp_path / "whole", calibrate=IDS)
    out = tmp_path / "store"
    with pytest.raises(KeyboardInterrupt):
        quantize(tmp_path / "model", out, calibrate=IDS, progress=Interrupt(0))
    first = (out / "experts-00000.safetensors").stat().st_mtime_ns
    report = quantize(tmp_path / "model", out, calibrate=IDS)
    assert (out / "experts-00000.safetensors").stat().st_mtime_ns == first
    assert contents(out) == contents(tmp_path / "whole")
    assert report.rare == whole.rare


def test_a_file_instead_of_memory_gives_the_same_bytes(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    quantize(model, tmp_path / "held", calibrate=IDS)
    monkeypatch.setattr(calibration, "must_spill", lambda *_: True)
    quantize(model, tmp_path / "spilled", calibrate=IDS)
    assert contents(tmp_path / "spilled") == contents(tmp_path / "held")


def test_without_a_text_it_is_as_ever(model: Path, tmp_path: Path) -> None:
    quantize(model, tmp_path / "plain")
    assert b"calibration" not in (tmp_path / "plain" / "moelite.json").read_bytes()
    quantize(model, tmp_path / "fed", calibrate=IDS)
    name = "experts-00000.safetensors"
    assert contents(tmp_path / "plain")[name] != contents(tmp_path / "fed")[name]
    for file in ("dense.safetensors", "config.json"):
        assert contents(tmp_path / "plain")[file] == contents(tmp_path / "fed")[file]


@pytest.mark.parametrize("finished", [True, False])
def test_another_text_is_another_store(model: Path, tmp_path: Path, finished: bool) -> None:
    out = tmp_path / "store"
    if finished:
        quantize(model, out, calibrate=IDS)
    else:
        with pytest.raises(KeyboardInterrupt):
            quantize(model, out, calibrate=IDS, progress=Interrupt(0))
    before = contents(out)
    for other in (None, IDS[1:]):
        with pytest.raises(StoreError, match=r"is the store of .* calibrated by"):
            quantize(model, out, calibrate=other)
    assert contents(out) == before
    assert quantize(model, out, calibrate=IDS).reused == finished


def test_texts_that_are_none(model: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="cannot be read"):
        quantize(model, tmp_path / "store", calibrate=tmp_path / "none.txt")
    (tmp_path / "latin.txt").write_bytes(b"\xe9" * 100)
    with pytest.raises(UsageError, match="cannot be read"):
        quantize(model, tmp_path / "store", calibrate=tmp_path / "latin.txt")
    with pytest.raises(UsageError, match="10 tokens are too few"):
        quantize(model, tmp_path / "store", calibrate=IDS[:10])
    assert not (tmp_path / "store").exists()


def test_the_command_reads_the_text_with_the_models_tokenizer(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    inner = Tokenizer(WordLevel({str(i): i for i in range(100)}, unk_token="0"))
    inner.pre_tokenizer = WhitespaceSplit()
    inner.save(str(model / "tokenizer.json"))
    (tmp_path / "text.txt").write_text(" ".join(map(str, IDS)))
    arguments = ["--calibrate", str(tmp_path / "text.txt"), "--calibrate-tokens", "600"]
    assert main.exit_code(["quantize", str(model), str(tmp_path / "text"), *arguments]) == 0
    assert "experts that few tokens of the text reached: layer" in capsys.readouterr().out
    quantize(model, tmp_path / "ids", calibrate=IDS, calibrate_tokens=600)
    text, ids = contents(tmp_path / "text"), contents(tmp_path / "ids")
    told = [json.loads(files.pop("moelite.json"))["calibration"] for files in (text, ids)]
    assert text == ids
    assert told[0]["ids"] == told[1]["ids"]
    data = (tmp_path / "text.txt").read_bytes()
    assert [facts["sha256"] for facts in told] == [hashlib.sha256(data).hexdigest(), ""]


def test_nan_is_named(tmp_path: Path) -> None:
    tensors = weights(MIXTRAL)
    name = "model.layers.1.block_sparse_moe.experts.2.w3.weight"
    tensors[name][5, 5] = np.nan
    write_checkpoint(tmp_path / "model", MIXTRAL, tensors)
    with pytest.raises(QuantizationError, match=name.replace(".", r"\.")):
        quantize(tmp_path / "model", tmp_path / "store", calibrate=IDS)
    assert not list((tmp_path / "store").glob("*.part"))


def test_too_little_memory_names_the_least(model: Path, tmp_path: Path) -> None:
    with pytest.raises(BudgetError, match=r"calibration takes at least \d+MiB"):
        quantize(model, tmp_path / "store", ram=_enough_without(model, tmp_path), calibrate=IDS)
    assert not (tmp_path / "store").exists()


def _enough_without(model: Path, tmp_path: Path) -> str:
    # the least that packing takes when nothing is calibrated
    with pytest.raises(BudgetError) as refused:
        quantize(model, tmp_path / "store", ram="40MiB")
    return refused.value.fix.removeprefix("--ram ")


@pytest.mark.parametrize("dense", ["int8", "int4"])
def test_peak_memory_stays_below_the_budget(dense: str, tmp_path: Path) -> None:
    """At the least that it names: the streams, 31 MiB, lie in a file then."""
    config = MIXTRAL | {
        "hidden_size": 512,
        "intermediate_size": 1024,
        "num_hidden_layers": 2,
        "vocab_size": 4096,
        "num_attention_heads": 8,
        "num_key_value_heads": 2,
    }
    write_checkpoint(tmp_path / "model", config, dtype="BF16")
    code = (
        "import sys, moelite\n"
        "from moelite.errors import BudgetError\n"
        "ids = [i * 7919 % 4096 for i in range(8000)]\n"
        "def run(ram):\n"
        "    return moelite.quantize(*sys.argv[1:3], ram=ram, calibrate=ids, dense=sys.argv[3])\n"
        "ram = '100MiB'\n"
        "for _ in range(4):\n"  # each refusal has compiled more, which the next one counts
        "    try: run(ram)\n"
        "    except BudgetError as e: ram = e.fix.removeprefix('--ram ').partition(',')[0]\n"
        "report = run(ram)\n"
        "print(ram, report.peak_rss_bytes)"
    )
    child = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path / "model"), str(tmp_path / "store"), dense],
        capture_output=True,
        text=True,
        check=True,
    )
    ram, peak = child.stdout.split()
    assert int(peak) <= int(ram.removesuffix("MiB")) * MIB
