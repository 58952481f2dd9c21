"""`moelite eval` and `moelite bench`: what they ask of the engine, what they print."""

from __future__ import annotations

import dataclasses
import json
import math
import re
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import typer
from fakes import FakeMeter, fake_forecast
from typer.testing import CliRunner

from moelite import engine, sizing, store, storesize
from moelite import evaluate as core
from moelite.agreement import RouterReport
from moelite.cache.stats import CacheStats
from moelite.cli import bench as bench_command
from moelite.cli import common
from moelite.cli import evaluate as eval_command
from moelite.errors import BudgetError, UsageError
from moelite.evaluate import scoring_bytes
from moelite.forecast import Forecast
from moelite.lookahead import Lookahead
from moelite.quant.record import record_layout
from moelite.storefile import LayerEntry
from moelite.storesize import StoreSize
from moelite.units import MIB

V = 64
BOS = 1
SHORT = ("--context", "16")
NEED = 100 * MIB


SIZES = {
    Path(name): StoreSize(
        bytes=size, params=1000, expert_bytes=size // 2, expert_params=900, formats="int4"
    )
    for name, size in (("good", 4000), ("worse", 1000))
}


class Tokens:
    """One token a character."""

    bos_id = BOS

    def __init__(self, *, adds_bos: bool = True, shift: int = 0) -> None:
        self.adds_bos, self.shift = adds_bos, shift

    def encode(self, text: str, *, special: bool) -> list[int]:
        head = [BOS] if special and self.adds_bos else []
        return head + [(ord(c) + self.shift) % V for c in text]


class FakeModel:
    """Logits are a fixed row of numbers, tilted by `tilt`."""

    def __init__(self, name: str, tilt: float, tokens: Tokens) -> None:
        self.tokenizer, self.context = tokens, 4096
        self.arch = SimpleNamespace(vocab_size=V)
        self.row = np.linspace(0, 1 + tilt, V, dtype=np.float32)
        self.footprint = SimpleNamespace(
            budget_bytes=NEED, experts_resident=3, experts_total=8, threads=2
        )
        entry = LayerEntry(tiers=(record_layout(("int8", "int8"), 256, 256),), tier_of=(0, 0))
        self.store = SimpleNamespace(
            layers={0: entry},
            expert_format="int8",
            dense_format="int8",
            path=Path(name),
            direct=True,
        )

    def session(self) -> FakeModel:
        return self

    def append(self, ids: list[int]) -> np.ndarray:
        return np.tile(self.row, (len(ids), 1))

    def advance(self, ids: list[int]) -> np.ndarray:
        return self.row

    def truncate(self, length: int) -> None:
        pass

    def part_seconds(self) -> dict[str, float]:
        return {"experts": 0.0}

    token_bytes = 4 << 20

    def memory_speed(self) -> float:
        return float(8 << 30)

    drive = None
    lookahead = Lookahead("off")

    def drive_speed(self) -> float | None:
        return float(1 << 20)

    def forecast(self, *_: object, **__: object) -> Forecast:
        return fake_forecast()

    def meter(self, folder: Path) -> FakeMeter:
        return FakeMeter()

    def stats(self) -> CacheStats:
        return CacheStats(hits=3, misses=1, bytes_read=8192)

    def __enter__(self) -> FakeModel:
        return self

    def __exit__(self, *_: object) -> None:
        pass


@pytest.fixture
def world(monkeypatch, tmp_path):
    """Stores "good" and "worse" that load as fakes; loads are recorded as {name: ram}."""
    seen = SimpleNamespace(loads={}, tokens={"good": Tokens(), "worse": Tokens()})

    def load(path, *, ram=None, **_: object) -> FakeModel:
        name = Path(path).name
        seen.loads[name] = ram
        return FakeModel(name, 0.0 if name == "good" else 2.0, seen.tokens[name])

    monkeypatch.setattr(engine, "load", load)
    monkeypatch.setattr(sizing, "footprint", lambda path, **_: SimpleNamespace(minimum_bytes=NEED))
    opened = SimpleNamespace(config={"vocab_size": V}, close=lambda: None)
    monkeypatch.setattr(store.Store, "open", lambda path: opened)
    monkeypatch.setattr(eval_command, "find_store", lambda name, **_: Path(name))
    monkeypatch.setattr(storesize, "check_calibration", lambda *_: None)
    monkeypatch.setattr(storesize, "store_size", SIZES.get)
    monkeypatch.setattr(common, "find_store", lambda name, **_: Path(name))
    text = tmp_path / "text.txt"
    text.write_text("the quick brown fox " * 10)
    seen.text = str(text)
    return seen


def call(command, *arguments: str):
    app = typer.Typer()
    app.command()(command)
    return CliRunner().invoke(app, [str(a) for a in arguments])


def evaluate(*arguments: str):
    return call(eval_command.evaluate, *arguments)


def test_perplexity_is_printed_with_its_protocol(world) -> None:
    result = evaluate("good", world.text, "--context", "16", "--protocol", "paper")
    assert result.exit_code == 0, result.exception
    found = re.search(r"good: perplexity (\d+\.\d+) ± ", result.stdout)
    assert found
    row = np.linspace(0, 1, V)
    ids = Tokens().encode("the quick brown fox " * 10, special=False)
    scored = [i for n, i in enumerate(ids[: len(ids) // 16 * 16]) if n % 16]
    nll = np.log(np.exp(row).sum()) - row[scored].mean()
    assert float(found[1]) == pytest.approx(math.exp(nll), rel=1e-4)
    assert "paper protocol, context 16, 12 windows, 180 tokens scored" in result.stdout


def test_the_reference_is_named(world) -> None:
    result = evaluate("worse", world.text, "--context", "16", "--against", "good")
    assert result.exit_code == 0, result.exception
    lines = result.stdout.splitlines()
    assert lines[0] == "reference  good"
    assert "32.00 bits per parameter, experts int4 at 17.78" in lines[1]
    assert lines[2] == "judged     worse"
    assert "8.00 bits per parameter, experts int4 at 4.44" in lines[3]
    assert "KL(reference || judged), mean" in result.stdout
    assert "same experts chosen" not in result.stdout  # these models have no routers


def test_against_is_the_reference_in_json(world) -> None:
    result = evaluate("worse", world.text, "--context", "16", "--against", "good", "--json")
    found = json.loads(result.stdout)
    assert (found["store"], found["reference_store"]) == ("worse", "good")
    p, q = (np.exp(r) / np.exp(r).sum() for r in (np.linspace(0, 1, V), np.linspace(0, 3, V)))
    assert found["kld_mean"] == pytest.approx((p * np.log(p / q)).sum(), rel=1e-5)
    alone = json.loads(evaluate("good", world.text, "--context", "16", "--json").stdout)
    assert found["reference"]["nll"] == pytest.approx(alone["nll"], rel=1e-12)


def test_the_sizes_of_both_stores_are_in_json(world) -> None:
    found = json.loads(evaluate("worse", world.text, "--against", "good", "--json", *SHORT).stdout)
    sizes = found["sizes"]
    assert (sizes["store"]["bytes"], sizes["reference_store"]["bytes"]) == (1000, 4000)
    assert sizes["store"]["bits_per_parameter"] == 8.0
    assert sizes["store"]["expert_bpw"] == pytest.approx(500 * 8 / 900)


def test_both_protocols_in_one_run(world) -> None:
    options = "--against", "good", "--protocol", "both", *SHORT
    result = evaluate("worse", world.text, *options)
    for protocol, tokens in (("llama", 84), ("paper", 180)):
        assert result.stdout.count(f"({protocol} protocol, context 16, 12 windows, {tokens} ") == 2
    found = json.loads(evaluate("worse", world.text, *options, "--json").stdout)
    for protocol in ("llama", "paper"):
        alone = evaluate(
            *("worse", world.text, "--against", "good", "--protocol", protocol, *SHORT, "--json")
        )
        assert found[protocol]["kld_mean"] == json.loads(alone.stdout)["kld_mean"]


def test_each_protocol_has_its_own_context(world) -> None:
    Path(world.text).write_text("a" * 2048)
    result = evaluate("good", world.text, "--protocol", "both")
    assert "llama protocol, context 512, 4 windows, 1,020 tokens" in result.stdout
    assert "paper protocol, context 2048, 1 windows, 2,047 tokens" in result.stdout


def test_routers_are_told_from_the_worst_layer_on(world, monkeypatch) -> None:
    shares = (0.75, 1.0, 0.5, 0.875)
    routers = RouterReport(layers=(0, 1, 2, 7), agreement=shares, mean=0.78125, mean_se=0.03125)
    compare = core.compare

    def with_routers(*arguments, **options):
        return dataclasses.replace(compare(*arguments, **options), routers=routers)

    monkeypatch.setattr(core, "compare", with_routers)
    result = evaluate("worse", world.text, "--against", "good", *SHORT)
    assert "same experts chosen             78.12 ± 3.12 %" in result.stdout
    assert "  least, in layers              2: 50.00 %, 0: 75.00 %, 7: 87.50 %" in result.stdout
    found = json.loads(evaluate("worse", world.text, "--against", "good", *SHORT, "--json").stdout)
    assert found["routers"]["layers"] == [0, 1, 2, 7]
    assert tuple(found["routers"]["agreement"]) == shares


def test_an_unknown_error_is_null_in_json(world) -> None:
    result = evaluate("good", world.text, "--context", "4", "--limit-tokens", "4", "--json")
    assert json.loads(result.stdout)["nll_se"] is None


def test_two_models_share_the_budget(world) -> None:
    evaluate("worse", world.text, "--context", "16", "--against", "good", "--ram", "1GiB")
    share = (1024 * MIB - 2 * scoring_bytes(V)) // 2
    assert world.loads == {"worse": share, "good": share}


def test_too_small_a_budget_names_what_both_need(world) -> None:
    result = evaluate("worse", world.text, "--against", "good", "--ram", "150MiB")
    assert isinstance(result.exception, BudgetError)
    need = 2 * NEED + 2 * scoring_bytes(V)
    assert f"--ram {-(-need // MIB)}MiB" in result.exception.fix
    assert world.loads == {}


def test_stores_with_different_tokens_are_refused(world) -> None:
    world.tokens["good"] = Tokens(shift=1)
    result = evaluate("worse", world.text, "--context", "16", "--against", "good")
    assert isinstance(result.exception, UsageError)
    assert "different tokens" in str(result.exception)


def test_bos_only_where_the_tokenizer_adds_one_and_the_protocol_wants_it() -> None:
    ids = Tokens().encode("ab", special=False)
    assert eval_command.tokens(Tokens(), "ab", "llama") == ([BOS, *ids], BOS)
    assert eval_command.tokens(Tokens(), "ab", "paper") == (ids, None)
    assert eval_command.tokens(Tokens(adds_bos=False), "ab", "llama") == (ids, None)


@pytest.mark.parametrize("content", [b"\xff\xfe\x00", None])
def test_a_file_that_is_no_text_is_refused(world, tmp_path, content) -> None:
    file = tmp_path / "other"
    if content is not None:
        file.write_bytes(content)
    result = evaluate("good", str(file))
    assert isinstance(result.exception, UsageError)
    assert str(file) in str(result.exception)
    assert world.loads == {}


def test_bench_json_holds_what_scripts_rely_on(world) -> None:
    result = call(bench_command.bench, "good", "--prompt", 8, "--gen", 3, "--repeat", 2, "--json")
    assert result.exit_code == 0, result.exception
    found = json.loads(result.stdout)
    assert (found["prompt_tokens"], found["generated_tokens"], len(found["runs"])) == (8, 3, 2)
    for key in ("prefill_tok_s", "decode_tok_s", "ttft_s", "peak_rss_bytes"):
        assert found[key] > 0
    assert set(found["experts"]) >= {"hits", "misses", "bytes_read", "wait_s"}
    assert found["expert_bpw"] == 8.5
    assert found["threads"] == 2
    assert set(found["decode_ms"]) == {"experts", "read wait", "interpreter"}


def test_bench_prints_every_run_and_the_median(world) -> None:
    result = call(bench_command.bench, "good", "--prompt", 8, "--gen", 3, "--repeat", 2)
    rows = [line.split()[0] for line in result.stdout.splitlines()[1:4]]
    assert rows == ["1", "2", "median"]
    assert "experts int8 (8.5 bpw)" in result.stdout
    assert "a token reads 4.0 MiB of weights: " in result.stdout
    assert "memory gave to 2 threads right after (8.0 GiB/s)" in result.stdout
