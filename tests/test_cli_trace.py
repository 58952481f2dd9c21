"""`moelite trace`: what it runs, what it writes, what it refuses."""

from __future__ import annotations

from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import tiny_checkpoint
from fakes import byte_tokenizer_json

import moelite
from moelite.cache.policy import count, overlap
from moelite.cache.trace import read_trace
from moelite.cli import main
from moelite.cli import trace as command
from moelite.errors import UsageError
from moelite.trace import record


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("trace")
    config = {**tiny_checkpoint.QWEN3_MOE, "vocab_size": 272}
    tiny_checkpoint.write_checkpoint(folder / "checkpoint", config)
    (folder / "checkpoint" / "tokenizer.json").write_bytes(byte_tokenizer_json())
    moelite.quantize(folder / "checkpoint", folder / "store", experts="int4")
    return folder / "store"


def test_a_text_is_recorded_as_it_is_routed(store: Path, tmp_path: Path, capsys) -> None:
    text, out = tmp_path / "text.txt", tmp_path / "t.jsonl"
    text.write_text("A text of some tokens, more than one chunk holds. " * 3)
    where = [str(store), str(text), "-o", str(out), "--tokens", "90", "--ram", "1GiB"]
    assert main.exit_code(["trace", *where]) == 0
    found = read_trace(out, experts=6)
    assert found.routes.shape == (90, 2, 2)  # the dense layer is left out
    told: list[tuple[int, list[int]]] = []
    with moelite.load(store, ram="1GiB") as model:
        session = model.session()
        model.on_route = lambda layer, selected: told.append((layer, selected[0].tolist()))
        for i in model.tokenizer.encode(text.read_text(), special=False)[:90]:
            session.append([i])
    assert told == [
        (layer, row[n]) for row in found.routes.tolist() for n, layer in ((0, 0), (1, 2))
    ]
    shown = capsys.readouterr().out
    rates = [f"{100 * count(found, [3, 3], policy=p).hit_rate:.1f} %" for p in ("lru", "belady")]
    rows = [" ".join(line.split()) for line in shown.splitlines()]
    assert f"50 % 3 of 6 {rates[0]} {rates[1]}" in rows
    assert "90 tokens, 2 MoE layers, 2 experts each" in shown
    assert f"shares {100 * overlap(found):.1f} % of them with the one before" in shown
    assert sorted(p.name for p in tmp_path.iterdir()) == ["t.jsonl", "text.txt"]


def test_random_tokens_need_no_text(store: Path, tmp_path: Path) -> None:
    outs = [tmp_path / f"{n}.jsonl" for n in range(3)]
    for out, seed in zip(outs, ("7", "7", "8"), strict=True):
        more = ["--random", "--seed", seed, "--tokens", "20", "--ram", "1GiB"]
        assert main.exit_code(["trace", str(store), "-o", str(out), *more]) == 0
    first, same, other = (out.read_bytes() for out in outs)
    assert first == same != other
    assert read_trace(outs[0]).tokens == 20


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ([], "neither a FILE nor --random"),
        (["text.txt", "--random"], "not both"),
        (["--random", "--tokens", "0"], "--tokens 0 records nothing"),
        (["--random", "-o", "none/t.jsonl"], "cannot write none/t.jsonl"),
        (["--random", "-o", "."], "cannot write ."),
        (["missing.txt"], "cannot read missing.txt"),
    ],
)
def test_it_refuses_before_a_model_is_loaded(arguments, says, monkeypatch, capsys) -> None:
    monkeypatch.setattr(command, "open_model", lambda *_, **__: pytest.fail("loaded"))
    assert main.exit_code(["trace", "store", "-o", "t.jsonl", *arguments]) == 2
    assert says in capsys.readouterr().err


def test_an_interrupted_run_writes_nothing(tmp_path: Path, monkeypatch) -> None:
    @contextmanager
    def open_model(*_, **__):
        yield SimpleNamespace(arch=SimpleNamespace(vocab_size=9))

    def stop(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(command, "open_model", open_model)
    monkeypatch.setattr("moelite.trace.record", stop)
    out = tmp_path / "t.jsonl"
    assert main.exit_code(["trace", "store", "--random", "-o", str(out)]) == 130
    assert list(tmp_path.iterdir()) == []


def test_recording_leaves_the_model_as_it_was(store: Path) -> None:
    with moelite.load(store, ram="1GiB", context=16) as model:
        model.on_route = print
        seen: list[tuple[int, int]] = []
        found = record(model, range(16), progress=lambda *now: seen.append(now))
        assert model.on_route is print
        assert seen == [(16, 16)]
        assert found.experts == 6
        for ids, says in ((range(17), "17 tokens exceed the context of 16"), ([], "no token")):
            with pytest.raises(UsageError, match=says):
                record(model, ids)
        assert np.isfinite(model.forward([1])).all()
