"""scripts/compare-llamacpp with a tiny store and a llama.cpp that only pretends."""

from __future__ import annotations

import json
import os
import runpy
import sys
from pathlib import Path
from typing import Any

import llamacpp
import pytest
import synthetic
from test_synthetic import small

import moelite
from moelite.errors import MoeliteError, UsageError
from moelite.sizing import footprint

# What llamacpp_worker uses of llama-cpp-python. It writes down what it is asked to compute, and
# prints as native libraries do.
FAKE = """
import json, time
__version__ = "9.9"

def llama_print_system_info():
    return b"CPU : AVX2 = 1 | FMA = 1 | OPENMP = 0 | "

def llama_synchronize(ctx):
    time.sleep(0.001)

class Llama:
    ctx = None

    def __init__(self, path, **settings):
        print("llama_model_loader: noise on stdout", flush=True)
        self.facts = json.load(open(path))
        if "fails" in self.facts:
            raise ValueError(self.facts["fails"])
        self.log = open(self.facts["log"], "a")
        self.metadata = {"general.architecture": "olmoe", "olmoe.block_count": "1"}
        self.note(settings)

    def note(self, what):
        print(json.dumps(what), file=self.log, flush=True)

    def n_vocab(self):
        return self.facts["vocab_size"]

    def reset(self):
        self.note("reset")

    def eval(self, ids):
        self.note(ids)
        if self.facts.get("dies"):
            raise SystemExit(3)
"""


class Setting:
    """A store, a stand-in for a GGUF, and the script run as a user would."""

    def __init__(self, tmp: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.store, self.gguf, self.log = tmp / "store", tmp / "model.gguf", tmp / "log"
        (tmp / "fake").mkdir()
        (tmp / "fake" / "llama_cpp.py").write_text(FAKE)
        ours = Path(moelite.__file__).parents[
            1
        ]  # the one under test, wherever another is installed
        monkeypatch.setenv("PYTHONPATH", f"{tmp / 'fake'}{os.pathsep}{ours}")
        monkeypatch.setattr(llamacpp, "_PAUSE_S", 0)
        synthetic.write_store(small(), self.store, name="small")
        self.model()
        self._monkeypatch = monkeypatch

    def model(self, **facts: Any) -> None:
        self.gguf.write_text(json.dumps({"log": str(self.log), "vocab_size": 128, **facts}))

    def run(self, *arguments: str) -> int:
        script = Path(llamacpp.__file__).with_name("compare-llamacpp")
        options = ["--prompt", "8", "--gen", "2", "--repeat", "3", "--threads", "1"]
        files = [str(self.store), str(self.gguf)]
        self._monkeypatch.setattr(sys, "argv", [str(script), *files, *options, *arguments])
        with pytest.raises(SystemExit) as ended:
            runpy.run_path(str(script), run_name="__main__")
        assert isinstance(ended.value.code, int)
        return ended.value.code

    def asked(self) -> list[Any]:
        return [json.loads(line) for line in self.log.read_text().splitlines()]


@pytest.fixture
def setting(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Setting:
    return Setting(tmp_path, monkeypatch)


def test_both_sides_are_measured_in_turns(
    setting: Setting, capsys: pytest.CaptureFixture[str]
) -> None:
    assert setting.run("--json", "--ram", "1GiB", "--flash-attn") == 0
    found = json.loads(capsys.readouterr().out)
    assert len(found["pairs"]) == 3
    for part in ("prefill", "decode"):
        assert found["speeds"]["moelite"][part]["median"] > 0
        ratios = [ours[f"{part}_tok_s"] / other[f"{part}_tok_s"] for ours, other in found["pairs"]]
        assert found["ratios"][part]["median"] == sorted(ratios)[1]
        assert (found["ratios"][part]["min"], found["ratios"][part]["max"]) == (
            min(ratios),
            max(ratios),
        )
    assert all(pair[0]["bytes_read"] == 0 for pair in found["pairs"])
    for part in (
        "prefill_experts",
        "decode_experts",
    ):  # the same tokens: as many look-ups each time
        counts = [ours[part]["hits"] for ours, _ in found["pairs"]]
        assert counts == [counts[0]] * 3
        assert counts[0] > 0
        assert found["pairs"][0][1][part] is None
    assert found["machine"]["threads"] == 1
    other = found["models"]["llama.cpp"]
    assert (other["version"], other["formats"]) == ("llama-cpp-python 9.9", "AVX2 FMA")
    assert other["bytes"] == setting.gguf.stat().st_size
    ours = found["models"]["moelite"]
    assert ours["formats"] == "experts int4, dense int8"
    assert ours["bytes"] == sum(f.stat().st_size for f in setting.store.iterdir())


def test_the_other_side_computes_the_same_tokens(setting: Setting) -> None:
    assert setting.run("--json", "--seed", "5") == 0
    settings, *asked = setting.asked()
    assert (settings["n_ctx"], settings["n_threads"], settings["n_threads_batch"]) == (10, 1, 1)
    assert settings["flash_attn"] is False
    prompt, feed = llamacpp.tokens(128, 8, 2, 5)
    turn = ["reset", prompt, *([token] for token in feed)]
    assert asked[:4] == turn  # the first warm-up already
    assert asked[-12:] == turn * 3
    assert len(asked) >= 4 * (2 + 3)  # the first warm-up reads experts, so there is another
    assert len(asked) % 4 == 0


def test_a_table_for_people(setting: Setting, capsys: pytest.CaptureFixture[str]) -> None:
    assert setting.run() == 0
    captured = capsys.readouterr()
    assert "noise on stdout" not in captured.out
    for word in ("model.gguf", "llama-cpp-python 9.9", "1 threads a side", "3 pairs", "ratio"):
        assert word in captured.out
    assert "compares disks" not in captured.out
    assert "pair 3 of 3" in captured.err


def test_experts_read_meanwhile_are_told(
    setting: Setting, capsys: pytest.CaptureFixture[str]
) -> None:
    synthetic.write_store(small(num_experts=64), setting.store / "many", name="many")
    setting.store /= "many"
    plan = footprint(setting.store, context=10, threads=1)
    least = plan.minimum_bytes + 20 * plan.record_bytes
    assert setting.run("--ram", str(least)) == 0
    assert "of 64 experts in memory" in (out := capsys.readouterr().out)
    assert "this compares disks, too" in out
    assert setting.run("--ram", str(least), "--json") == 0
    found = json.loads(capsys.readouterr().out)
    assert all(ours["bytes_read"] > 0 for ours, _ in found["pairs"])


def test_other_shapes_are_not_compared(
    setting: Setting, capsys: pytest.CaptureFixture[str]
) -> None:
    setting.model(vocab_size=32000)
    assert setting.run() == UsageError.exit_code
    assert "vocab_size 128 and 32000" in capsys.readouterr().err


def test_a_missing_llama_cpp_names_the_package(
    setting: Setting, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delenv("PYTHONPATH")
    bare = setting.store.parent / "python"
    bare.write_text(f'#!/bin/sh\nexec "{sys.executable}" -S -E "$@"\n')
    bare.chmod(0o755)
    assert setting.run("--llama-python", str(bare)) == UsageError.exit_code
    assert f"{bare} -m pip install llama-cpp-python" in capsys.readouterr().err


def test_an_interpreter_that_is_none(setting: Setting, capsys: pytest.CaptureFixture[str]) -> None:
    assert setting.run("--llama-python", "no-such-python") == UsageError.exit_code
    assert "no-such-python cannot be run" in capsys.readouterr().err


def test_a_model_that_does_not_load(setting: Setting, capsys: pytest.CaptureFixture[str]) -> None:
    setting.model(fails="unknown architecture")
    assert setting.run() == MoeliteError.exit_code
    assert "llama.cpp cannot load its model: ValueError: unknown" in capsys.readouterr().err


def test_a_side_that_dies_is_told(setting: Setting, capsys: pytest.CaptureFixture[str]) -> None:
    setting.model(dies=True)
    assert setting.run() == MoeliteError.exit_code
    assert "the llama.cpp process ended with code 3" in capsys.readouterr().err


@pytest.mark.parametrize("option", ["--prompt", "--gen", "--repeat", "--threads"])
def test_nothing_to_measure(
    setting: Setting, capsys: pytest.CaptureFixture[str], option: str
) -> None:
    assert setting.run(option, "0") == UsageError.exit_code
    assert f"{option} 0 measures nothing" in capsys.readouterr().err


def test_the_spread_is_over_pairs() -> None:
    turns = [(10.0, 5.0), (20.0, 4.0), (9.0, 9.0)]
    pairs = [
        tuple(llamacpp.Turn(prefill_tok_s=v, decode_tok_s=2 * v, bytes_read=None) for v in pair)
        for pair in turns
    ]
    found = llamacpp.summarize(pairs)
    assert found.ratios["prefill"] == llamacpp.Spread(median=2.0, min=1.0, max=5.0)
    assert found.speeds["llama.cpp"]["decode"] == llamacpp.Spread(median=10.0, min=8.0, max=18.0)
