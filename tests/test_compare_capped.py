"""scripts/compare-llamacpp --cap: a llama.cpp that pretends, dies, hangs and takes memory."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import drive
import llamacpp_capped
import pytest
from llamacpp import Turn
from llamacpp_capped import CappedTurn, Trial, choose
from memory_group import MemoryGroup
from test_compare_llamacpp import FAKE, Setting

from moelite.errors import MoeliteError, UsageError

# What is done with settings is told in the stand-in for a GGUF, under "LOAD_MODE REPACKED".
CAPPED = (
    FAKE
    + """
import os, sys
llama_cpp = sys.modules[__name__]

class llama_model_params:
    _fields_ = [("load_mode", int), ("use_extra_bufts", bool)]

def llama_model_load_from_file(path, params):
    return params

class Llama(Llama):
    def __init__(self, path, **settings):
        super().__init__(path, **settings)
        params = llama_cpp.llama_model_load_from_file(path, llama_model_params())
        key = f"{params.load_mode} {params.use_extra_bufts}"
        self.note(key)
        self.does = self.facts["does"].get(key, "dies")
        if self.does == "dies later":
            times = open(self.facts["log"]).read().count(key)
            self.does = "dies" if times > 2 else 0.0
        if self.does == "dies":
            os.kill(os.getpid(), 9)
        elif self.does == "refuses":
            raise ValueError("no such buffer")
        elif self.does == "hangs":
            time.sleep(60)
        elif self.does == "takes":
            self.held = bytearray(b"x") * (1 << 30)

    def eval(self, ids):
        super().eval(ids)
        time.sleep(self.does)
"""
)
MMAP, DIRECT, CAP = "1 False", "4 True", 600 << 20


class NoGroup:
    """Stands for a MemoryGroup where a test needs no right to make one."""

    made = 0

    def __init__(self, limit_bytes: int | None = None) -> None:
        assert limit_bytes == CAP
        NoGroup.made += 1

    def enter(self) -> None:
        pass

    def peak_bytes(self) -> int:
        return 123 << 20

    def killed(self) -> int:
        return 0

    def __enter__(self) -> NoGroup:
        return self

    def __exit__(self, *error: object) -> None:
        pass


class Capped(Setting):
    """As Setting; nothing outside the test is touched."""

    def __init__(self, tmp: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        super().__init__(tmp, monkeypatch)
        (tmp / "fake" / "llama_cpp.py").write_text(CAPPED)
        monkeypatch.setattr(drive, "_DROP", tmp / "no" / "drop_caches")
        monkeypatch.setattr(drive, "read_speed", lambda file: 2e9)
        monkeypatch.setattr(llamacpp_capped, "MemoryGroup", NoGroup)
        monkeypatch.setattr(llamacpp_capped, "end_on_sigterm", lambda: None)

    def run(self, *arguments: str) -> int:
        return super().run("--cap", str(CAP + 1), "--repeat", "2", *arguments)


@pytest.fixture
def capped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Capped:
    return Capped(tmp_path, monkeypatch)


def trial(mode: str, decode: float | None, end: str = "survived") -> Trial:
    measured = None
    if decode is not None:
        measured = Turn(prefill_tok_s=1.0, decode_tok_s=decode, bytes_read=None)
    turn = CappedTurn(
        measured=measured,
        problem="",
        load_s=None,
        peak_bytes=None,
        killed=0,
        drive_bytes_s=None,
        caches_dropped=True,
    )
    return Trial(settings={"load_mode": mode, "repack": False}, end=end, turn=turn)


def test_the_fastest_survivor_is_chosen() -> None:
    trials = [trial("mmap", 0.2), trial("none", None, "killed"), trial("direct_io", 0.3)]
    assert choose(trials) == {"load_mode": "direct_io", "repack": False}
    assert choose(trials[:2]) == {"load_mode": "mmap", "repack": False}


def test_no_survivor_tells_how_each_ended() -> None:
    with pytest.raises(MoeliteError) as refused:
        choose([trial("mmap", None, "too slow"), trial("none", None, "killed")])
    assert "mmap, not repacked: too slow; none, not repacked: killed" in refused.value.message
    assert "--cap" in refused.value.fix


def test_both_sides_are_measured_one_at_a_time(
    capped: Capped, capsys: pytest.CaptureFixture[str]
) -> None:
    capped.model(does={"1 True": "refuses", MMAP: 0.05, "0 True": "hangs", DIRECT: 0.0})
    before = NoGroup.made
    assert capped.run("--json", "--gen", "3", "--llama-gen", "2", "--trial-limit", "4") == 0
    captured = capsys.readouterr()
    found: dict[str, Any] = json.loads(captured.out)
    ends = [one["end"] for one in found["trials"]]
    assert "no such buffer" in ends.pop(0)
    assert ends == ["survived", "too slow", "killed", "survived", "killed"]
    assert found["llama_settings"] == {"load_mode": "direct_io", "repack": True}
    assert (found["cap_bytes"], found["ram"], found["llama_gen"]) == (CAP, str(CAP), 2)
    assert NoGroup.made - before == 6 + 4  # a new group for each load

    notes = [text.split(": ")[1] for text in captured.err.splitlines() if "  pair " in text]
    assert notes == ["moelite", "llama.cpp", "llama.cpp", "moelite"]
    keys = [line for line in capped.asked() if isinstance(line, str) and line != "reset"]
    assert keys[6:] == [DIRECT] * 2
    lengths = [len(line) for line in capped.asked() if isinstance(line, list)]
    assert lengths[-6:] == [8, 1, 1] * 2  # the same prompt, fewer tokens after it

    for part in ("prefill", "decode"):
        pairs = [[one["measured"][f"{part}_tok_s"] for one in p.values()] for p in found["pairs"]]
        ratios = [ours / other for ours, other in pairs]
        assert found["ratios"][part] == {
            "median": pytest.approx(sum(ratios) / 2),
            "min": min(ratios),
            "max": max(ratios),
        }
        experts = found["pairs"][0]["moelite"]["measured"][f"{part}_experts"]
        tokens = 8 if part == "prefill" else 3
        assert 0 < experts["hits"] + experts["misses"] <= 2 * 2 * tokens
    assert found["failures"] == found["killed"] == {"moelite": 0, "llama.cpp": 0}
    turn = found["pairs"][0]["llama.cpp"]
    assert (turn["peak_bytes"], turn["drive_bytes_s"], turn["caches_dropped"]) == (
        123 << 20,
        2e9,
        False,
    )


def test_a_side_that_dies_is_a_failure_and_the_rest_counts(
    capped: Capped, capsys: pytest.CaptureFixture[str]
) -> None:
    capped.model(does={MMAP: "dies later"})
    assert capped.run() == 0
    out = capsys.readouterr().out
    for words in (
        "llama.cpp: 1 failures, 0 killed",
        "moelite: 0 failures, 0 killed",
        "ended with code -9",
        "mmap, not repacked       survived",
        "mmap, repacked           killed\n",
        "<- used",
        "123 MiB",
        "1.9 GiB/s",
        "cap 600 MiB a side; moelite --ram 600 MiB",
        "(llama.cpp 2)",
        "only the models' files were dropped",
        "moelite found experts in memory: prefill ",
    ):
        assert words in out
    assert out.count("   1  ratio") == 1
    assert "   2  ratio" not in out


def test_no_settings_that_survive(capped: Capped, capsys: pytest.CaptureFixture[str]) -> None:
    capped.model(does={})
    assert capped.run() == MoeliteError.exit_code
    assert "mmap, repacked: killed" in capsys.readouterr().err


def test_other_shapes_are_refused(capped: Capped, capsys: pytest.CaptureFixture[str]) -> None:
    capped.model(vocab_size=32000, does={MMAP: 0.0})
    assert capped.run() == UsageError.exit_code
    assert "vocab_size 128 and 32000" in capsys.readouterr().err


def test_moelite_says_what_it_needs(capped: Capped, capsys: pytest.CaptureFixture[str]) -> None:
    capped.model(does={MMAP: 0.0})
    assert capped.run("--ram", "1MiB") == MoeliteError.exit_code
    assert "moelite cannot load its model: BudgetError" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--cap", "much"], "'much' is not a size"),
        (["--llama-gen", "0"], "--llama-gen 0 measures nothing"),
        (["--trial-limit", "0"], "--trial-limit 0.0 measures nothing"),
    ],
)
def test_refusals(
    capped: Capped, capsys: pytest.CaptureFixture[str], arguments: list[str], words: str
) -> None:
    assert capped.run(*arguments) == UsageError.exit_code
    assert words in capsys.readouterr().err


def test_fewer_tokens_are_for_a_cap(capped: Capped, capsys: pytest.CaptureFixture[str]) -> None:
    assert Setting.run(capped, "--llama-gen", "2") == UsageError.exit_code
    assert "--llama-gen is for --cap" in capsys.readouterr().err


def test_no_right_to_make_a_group(
    capped: Capped, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def refuse(limit_bytes: int) -> NoGroup:
        raise UsageError("no memory control group can be made: Permission denied", fix="be root")

    monkeypatch.setattr(llamacpp_capped, "MemoryGroup", refuse)
    assert capped.run() == UsageError.exit_code
    assert "no memory control group can be made" in capsys.readouterr().err


def test_the_kernel_holds_both_to_the_cap(
    capped: Capped, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    try:
        MemoryGroup().close()
    except UsageError as refused:
        pytest.skip(refused.message)
    monkeypatch.setattr(llamacpp_capped, "MemoryGroup", MemoryGroup)
    capped.model(does={MMAP: 0.0, "1 True": "takes"})
    assert capped.run("--json") == 0
    found = json.loads(capsys.readouterr().out)
    assert [one["turn"]["killed"] for one in found["trials"][:2]] == [1, 0]
    assert found["trials"][0]["end"] == "killed"
    assert found["llama_settings"] == {"load_mode": "mmap", "repack": False}
    for pair in found["pairs"]:
        assert 40 << 20 < pair["moelite"]["peak_bytes"] <= CAP
