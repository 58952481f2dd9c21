"""`moelite verify`: finds damage, finds a difference, and says what was compared."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import shutil
import weakref
from pathlib import Path

import numpy as np
import pytest
import tiny_checkpoint
from fakes import byte_tokenizer_json
from test_trace import random_routes

import moelite
from moelite import verify as core
from moelite.cli import main
from moelite.errors import BudgetError, UsageError, VerificationError
from moelite.machine import Memory
from moelite.verify import VerifyReport, VerifyRun, verdict, verify_files, verify_tokens


@pytest.fixture(scope="module", params=[True, False], ids=["text", "ids"])
def store(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("verify")
    config = {**tiny_checkpoint.QWEN3_MOE, "vocab_size": 272, "max_position_embeddings": 256}
    tiny_checkpoint.write_checkpoint(folder / "checkpoint", config)
    tokenizer = folder / "checkpoint" / "tokenizer.json"
    tokenizer.unlink()
    if request.param:
        tokenizer.write_bytes(byte_tokenizer_json())
    moelite.quantize(folder / "checkpoint", folder / "store", experts="int4")
    return folder / "store"


@pytest.fixture
def copy(store: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(store, tmp_path / "copy"))


def flip(file: Path, at: int) -> None:
    content = bytearray(file.read_bytes())
    content[at] ^= 1
    file.write_bytes(content)


def test_a_sound_store_is_verified(store: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main.exit_code(["verify", str(store), "--tokens", "8"]) == 0
    checksums, budget, reference, last = capsys.readouterr().out.splitlines()
    assert checksums.startswith("checksums: all ")
    assert "1 of 12 experts resident" in budget
    assert "12 of 12 experts resident, 12 of " in reference
    assert last.startswith("verified: ")
    assert " and 8 tokens are equal within " in last
    assert last.endswith(" and with every expert in memory")


def test_json_tells_both_runs(store: Path, capsys: pytest.CaptureFixture[str]) -> None:
    plan = moelite.footprint(store, ram="1GiB")
    budget = plan.minimum_bytes + 3 * plan.record_bytes
    where = ["verify", str(store), "--ram", str(budget), "--tokens", "5", "--json"]
    assert main.exit_code(where) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["equal"] is True
    assert found["first_difference"] is None
    assert found["model"]["budget_bytes"] == budget
    assert found["model"]["misses"] > found["reference"]["misses"] == 12
    assert found["model"]["digests"] == found["reference"]["digests"]
    assert len(found["model"]["digests"]) == found["prompt_tokens"] + 4
    tokens = found["model"]["tokens"]
    with moelite.load(store, ram="1GiB") as model:  # they are what the model really says
        logits = model.forward([*core._prompt(model), *tokens[:-1]])
    assert logits[-5:].argmax(axis=1).tolist() == tokens
    assert [hashlib.sha256(row.tobytes()).hexdigest() for row in logits] == found["model"][
        "digests"
    ]


def test_quick_runs_no_model(store: Path, monkeypatch, capsys) -> None:
    monkeypatch.setattr(core, "load", lambda *_, **__: pytest.fail("loaded"))
    assert main.exit_code(["verify", str(store), "--quick"]) == 0
    assert "checksums: all " in capsys.readouterr().out
    assert main.exit_code(["verify", str(store), "--quick", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    files = [f for f in store.iterdir() if f.name != "moelite.json"]
    assert found["files"] == len(files)
    assert found["bytes"] == sum(f.stat().st_size for f in files)


def test_damage_is_named(copy: Path, monkeypatch, capsys) -> None:
    monkeypatch.setattr(core, "load", lambda *_, **__: pytest.fail("loaded"))
    flip(copy / "experts-00002.safetensors", 4096 + 50)
    assert main.exit_code(["verify", str(copy)]) == 6
    assert "experts-00002.safetensors: expert 0 is damaged" in capsys.readouterr().err
    flip(copy / "dense.safetensors", -100)
    assert main.exit_code(["verify", str(copy), "--quick"]) == 6
    error = capsys.readouterr().err
    assert "2 of " in error
    assert "dense.safetensors, experts-00002.safetensors" in error


def test_progress_counts_bytes(store: Path) -> None:
    seen: list[tuple[int, int, str]] = []
    files, size = verify_files(store, lambda *now: seen.append(now))
    assert [name for _, _, name in seen[:-1]] == sorted(name for _, _, name in seen[:-1])
    assert len(seen) == files + 1
    assert seen[-1] == (size, size, "files")


def test_a_difference_is_exit_7(store: Path, monkeypatch, capsys) -> None:
    """The second model is made to take other experts from position 5 on."""
    loads = []

    def load(path, **settings):
        model = moelite.load(path, **settings)
        loads.append(settings["ram"])
        if len(loads) == 2:
            routes = np.zeros((200, 2, 2), np.int32)
            model.on_route = lambda layer, got: np.copyto(routes[:24, layer // 2], got[:24])
            model.session().advance(core._prompt(model)[:24])
            model.on_route = None
            routes[5:] = random_routes(1, 195, 2, 6, 2)
            model.force_routes(routes)
        return model

    monkeypatch.setattr(core, "load", load)
    assert main.exit_code(["verify", str(store), "--tokens", "4"]) == VerificationError.exit_code
    out, error = capsys.readouterr()
    assert "verified" not in out
    assert "experts resident" in out
    assert "differ, first at position 5 (in the prompt)" in error
    assert len(loads) == 2


def test_one_model_is_gone_before_the_next_is_loaded(store: Path, monkeypatch) -> None:
    alive: list[weakref.ref] = []

    def load(path, **settings):
        assert all(ref() is None for ref in alive)
        model = moelite.load(path, **settings)
        alive.append(weakref.ref(model))
        return model

    monkeypatch.setattr(core, "load", load)
    assert verify_tokens(store, tokens=2).equal
    assert len(alive) == 2


def test_where_not_all_experts_fit_the_most_is_compared(store: Path, monkeypatch, capsys) -> None:
    plan = moelite.footprint(store, ram="1GiB")
    room = plan.minimum_bytes + 6 * plan.record_bytes
    small = Memory(room * 10 // 9, "physical", room * 10 // 9 + 1)
    monkeypatch.setattr(core, "memory", lambda: small)
    assert main.exit_code(["verify", str(store), "--tokens", "3"]) == 0
    out = capsys.readouterr().out
    assert "this machine has no room for every expert now" in out
    assert " experts in memory" in out.splitlines()[-1]
    assert "every expert in memory" not in out
    assert main.exit_code(["verify", str(store), "--tokens", "3", "--ram", str(room)]) == 0
    assert "a smaller --ram would prove more" in capsys.readouterr().out


def test_what_cannot_be_verified_is_refused(store: Path) -> None:
    with pytest.raises(UsageError, match="--tokens 0 verifies nothing"):
        verify_tokens(store, tokens=0)
    with pytest.raises(UsageError, match="tokens exceed the context of 16"):
        verify_tokens(store, context=16)
    with pytest.raises(BudgetError, match="needs at least"):
        verify_tokens(store, ram="1MiB")


def test_the_verdict_tells_what_differs() -> None:
    run = VerifyRun(
        budget_bytes=1 << 30,
        experts_resident=3,
        experts_total=8,
        hits=1,
        misses=2,
        tokens=(5, 6),
        digests=("a", "b", "c"),
        finite=True,
    )
    whole = dataclasses.replace(run, experts_resident=8)
    report = VerifyReport(prompt_tokens=2, model=run, reference=whole)
    assert report.equal
    assert verdict(report) == (
        "3 rows of logits and 2 tokens are equal within 1.0 GiB and with every expert in memory"
    )
    other = dataclasses.replace(whole, digests=("a", "b", "d"))
    report = VerifyReport(prompt_tokens=2, model=run, reference=other)
    assert not report.equal
    assert "differ, first at position 2 (in the answer)" in verdict(report)
    broken = dataclasses.replace(run, finite=False)
    report = VerifyReport(prompt_tokens=2, model=broken, reference=broken)
    assert not report.equal
    assert "with 3 experts in memory are equal, but some are NaN or infinite" in verdict(report)
