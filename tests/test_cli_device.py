"""--device as people see it: planned without torch, and what a model on one tells."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import tiny_checkpoint
from fakes import byte_tokenizer_json
from typer.testing import CliRunner

import moelite
from moelite.cache.stats import CacheStats
from moelite.cli.main import app
from moelite.cli.render import answer_line, stats_table
from moelite.errors import UsageError
from moelite.generate import GenerationStats
from moelite.gpu import devices
from moelite.units import GIB, MIB


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from moelite.convert import quantize

    folder = tmp_path_factory.mktemp("device")
    config = {**tiny_checkpoint.QWEN3_MOE, "vocab_size": 320}
    tiny_checkpoint.write_checkpoint(folder / "checkpoint", config)
    (folder / "checkpoint" / "tokenizer.json").write_bytes(byte_tokenizer_json())
    quantize(folder / "checkpoint", folder / "store")
    return folder / "store"


@pytest.fixture
def no_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    """Importing torch fails, and there is no driver."""
    monkeypatch.setitem(sys.modules, "torch", None)
    monkeypatch.setattr(devices, "_driver", lambda: False)
    monkeypatch.setitem(sys.modules, "pynvml", None)


@pytest.fixture
def card(no_torch: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """NVIDIA's library tells of an RTX 3090, 20 GiB of it free."""
    fake = SimpleNamespace(
        NVMLError=RuntimeError,
        NVML_CLOCK_MEM=2,
        nvmlInit=lambda: None,
        nvmlShutdown=lambda: None,
        nvmlDeviceGetHandleByIndex=lambda number: number,
        nvmlDeviceGetMemoryInfo=lambda card: SimpleNamespace(total=24 * GIB, free=20 * GIB),
        nvmlDeviceGetName=lambda card: "NVIDIA GeForce RTX 3090",
        nvmlDeviceGetMemoryBusWidth=lambda card: 384,
        nvmlDeviceGetMaxClockInfo=lambda card, clock: {2: 9751}[clock],
        nvmlDeviceGetMaxPcieLinkGeneration=lambda card: 4,
        nvmlDeviceGetMaxPcieLinkWidth=lambda card: 16,
    )
    monkeypatch.setitem(sys.modules, "pynvml", fake)


def footprint(store: Path, *more: str) -> Any:
    return CliRunner().invoke(app, ["footprint", str(store), "--context", "64", *more])


def test_a_card_elsewhere_is_planned_for_without_torch(
    store: Path, no_torch: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    chosen: list[str] = []  # which asks torch for all but the CPU
    choose = devices.choose
    monkeypatch.setattr(devices, "choose", lambda name: (chosen.append(name), choose(name))[1])
    done = footprint(store, "--device", "cuda", "--vram", "6GiB", "--ram", "1400MiB")
    text = " ".join(done.stdout.split())
    assert done.exit_code == 0
    assert set(chosen) <= {"cpu"}
    assert "device cuda: not found on this machine; planned by --vram alone" in text
    assert "YES, it fits in 6.0 GiB of the device's memory and 1.4 GiB of this" in text
    assert "CPU alone: " in text
    for bar in ("  vram    ", "  memory  ", "  disk    "):
        assert sum(line.startswith(bar) for line in done.stdout.splitlines()) == 1


@pytest.mark.parametrize("more", [[], ["--vram", "50%"]])
def test_a_card_elsewhere_needs_its_memory_named(
    store: Path, no_torch: None, more: list[str]
) -> None:
    with pytest.raises(UsageError, match="no cuda device here"):
        moelite.footprint(store, device="cuda", vram=more[1] if more else None)


def test_what_a_card_has_comes_from_its_library(store: Path, card: None) -> None:
    done = footprint(store, "--device", "cuda", "--ram", "1400MiB", "--json")
    found = json.loads(done.stdout)
    plan = found["device"]
    assert plan["card"] == "NVIDIA GeForce RTX 3090"
    assert plan["here"]
    assert (plan["total_bytes"], plan["free_bytes"]) == (24 * GIB, 20 * GIB)
    assert plan["budget_bytes"] == 18 * GIB
    assert found["forecast"]["link_bytes_s"]["likely"] == pytest.approx(0.8 * 16 * 1.969e9)
    # 384 bits twice a clock of 9751 MHz are 936 GB/s
    speed = found["forecast"]["speeds"]["weight_bytes_s"]["likely"]
    assert speed == pytest.approx(0.6 * 936.1e9, rel=1e-3)
    assert found["forecast_cpu"]["decode_tok_s"]["likely"] > 0
    assert "Infinity" not in done.stdout
    text = footprint(store, "--device", "cuda", "--ram", "1400MiB").stdout
    assert "device cuda: NVIDIA GeForce RTX 3090, 24.0 GiB, 20.0 GiB of it free" in text


def test_the_budget_that_is_short_is_named(store: Path, card: None) -> None:
    done = footprint(store, "--device", "cuda", "--vram", "300MiB", "--ram", "1400MiB")
    text = " ".join(done.stdout.split())
    assert done.exit_code == 3
    assert "NO, 300 MiB of the device's memory are too little" in text
    assert "of memory are too little" not in text
    done = footprint(store, "--device", "cuda", "--vram", "2GiB", "--ram", "300MiB")
    text = " ".join(done.stdout.split())
    assert done.exit_code == 3
    assert "NO, 300 MiB of memory are too little" in text
    assert "device's memory are" not in text
    done = footprint(store, "--device", "cuda", "--vram", "30GiB", "--ram", "1400MiB")
    assert "more than the device has" in " ".join(done.stdout.split())
    assert "--vram 24576MiB at most" in done.stdout


def test_what_goes_with_no_device_is_refused(store: Path, no_torch: None) -> None:
    with pytest.raises(UsageError, match="--vram is for a device"):
        moelite.footprint(store, vram="1GiB")
    with pytest.raises(UsageError, match="not on cuda"):
        moelite.footprint(store, device="cuda", vram="6GiB", low=True)
    with pytest.raises(UsageError, match="not known"):
        moelite.footprint(store, device="tpu")
    assert moelite.footprint(store, device="auto").device is None


def test_both_tiers_are_told() -> None:
    upper = CacheStats(hits=60, misses=40, bytes_read=3 * MIB, low=7)
    experts = CacheStats(hits=30, misses=10, bytes_read=MIB, upper=upper)
    stats = GenerationStats(
        prompt_tokens=10,
        reused_tokens=0,
        generated_tokens=20,
        ttft_s=0.5,
        prefill_tok_s=20.0,
        decode_tok_s=11.2,
        experts=experts,
        seed=1,
    )
    line = answer_line(stats, 30, 4096)
    assert "device hit 60 %, memory 75 % · copied 3.0 MiB · 7 on the CPU" in line
    rows = dict(stats_table(stats, experts))
    assert "60 hits, 40 misses (60 % hit), 3.0 MiB copied, 7" in rows["experts, last answer"]
    assert "30 hits, 10 misses (75 % hit), 1.0 MiB read" in rows["  in memory below it"]


# --- a model on torch's own CPU -------------------------------------------------------------------

ON = ("--device", "torch:cpu", "--ram", "1GiB", "--vram", "340MiB", "--context", "64")


def test_run_and_bench_tell_of_both_tiers_in_json(store: Path) -> None:
    pytest.importorskip("torch")
    line = ["run", str(store), "--raw", "-p", "hello", "--max-tokens", "4", "--json", *ON]
    found = json.loads(CliRunner().invoke(app, line).stdout)["experts"]
    # 2 MoE layers of 2 experts a token, those of a prompt's tokens once each
    device = found["device"]
    assert device["hits"] + device["misses"] >= 2 * 2 * 4
    assert found["hits"] + found["misses"] == device["misses"]
    line = ["bench", str(store), "--prompt", "8", "--gen", "4", "--repeat", "2", "--json", *ON]
    line += ["--miss", "copy"]
    done = CliRunner().invoke(app, line)
    found = json.loads(done.stdout)
    assert (found["device"], found["vram_bytes"]) == ("torch:cpu", 340 * MIB)
    assert found["device_peak_bytes"] is None
    upper = found["decode_experts"]["upper"]
    assert upper["hits"] + upper["misses"] == 2 * 3 * 2 * 2  # runs, tokens, layers, experts
    assert found["copied_bytes_per_token"] == upper["bytes_read"] / 6
    assert found["split"]["copy_s"] > 0
    assert found["split"]["host_s"] is None  # nothing is computed there
    assert found["memory_bytes_s"] > 1e8
    assert "Infinity" not in done.stdout


def test_a_device_leaves_no_samples_for_the_cpu(store: Path, tmp_path: Path) -> None:
    pytest.importorskip("torch")
    with moelite.load(store, ram="1GiB", device="torch:cpu", vram="340MiB", context=64) as model:
        meter = model.meter(tmp_path)
        session = model.session()
        session.append(list(range(40)))
        meter.first_token()
        for token in range(20):
            session.append([token])
        meter.done(40, 40, 20)
        assert not list(tmp_path.iterdir())
        found = model.forecast(folder=tmp_path)
        assert found.device == "torch:cpu"  # type: ignore[attr-defined]
        assert found.decode_tok_s.likely > 0
        assert found.budget_bytes == 340 * MIB


@pytest.mark.parametrize("miss", ["copy", "cpu"])
def test_a_forecast_leaves_the_cache_as_it_is(store: Path, tmp_path: Path, miss: Any) -> None:
    pytest.importorskip("torch")
    options: Any = {"ram": "1GiB", "device": "torch:cpu", "vram": "340MiB", "context": 64}
    with moelite.load(store, **options, miss=miss) as model:
        ids = list(range(12))
        want, before = model.forward(ids).copy(), model.stats()
        model.forecast(folder=tmp_path)
        model.memory_speed()
        assert model.stats() == before
        assert (model.forward(ids) == want).all()


def test_trace_and_eval_run_on_a_device(store: Path, tmp_path: Path) -> None:
    pytest.importorskip("torch")
    text = tmp_path / "text.txt"
    text.write_text("It was a bright cold day in April, and the clocks were striking. " * 4)
    out = [tmp_path / "cpu.jsonl", tmp_path / "device.jsonl"]
    for path, more in zip(out, (ON[4:4], ON), strict=True):
        line = ["trace", str(store), str(text), "-o", str(path), "--tokens", "40", *more]
        assert CliRunner().invoke(app, line).exit_code == 0
    assert out[0].read_text() == out[1].read_text()
    ppl = []
    for more in ((), ON[:6]):
        line = ["eval", str(store), str(text), "--context", "32", "--json", *more]
        ppl.append(json.loads(CliRunner().invoke(app, line).stdout)["ppl"])
    assert ppl[0] == pytest.approx(ppl[1], rel=1e-3)
