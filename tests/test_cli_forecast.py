"""The forecast as people see it: under the footprint, beside a benchmark, behind an answer."""

from __future__ import annotations

import io
import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import tiny_checkpoint
from fakes import fake_forecast
from rich.console import Console
from typer.testing import CliRunner

from moelite.cache.stats import CacheStats
from moelite.cache.trace import Trace
from moelite.cli.forecast import show_beside, show_forecast
from moelite.cli.main import app
from moelite.cli.recorded import recorded_hits, replay_rate
from moelite.cli.render import answer_line, band, stats_table
from moelite.errors import UsageError
from moelite.forecast import Rate
from moelite.generate import GenerationStats
from moelite.speeds import Machine
from moelite.units import GIB, MIB


def shown(found=None, *, width: int = 80, encoding: str = "utf-8", most: int = 8 * GIB) -> str:
    out = io.TextIOWrapper(io.BytesIO(), encoding=encoding)
    console = Console(file=out, width=width, highlight=False)
    show_forecast(console, found or fake_forecast(), asked_bytes=1024 * MIB, most_bytes=most)
    out.seek(0)
    return "\n".join(line.rstrip() for line in out.read().splitlines())


def test_the_whole_block() -> None:
    assert shown() == BLOCK.strip("\n")


@pytest.mark.parametrize("width", [40, 60, 80, 120, 200])
@pytest.mark.parametrize("encoding", ["utf-8", "ascii"])
def test_no_line_is_wider_than_the_terminal(width: int, encoding: str) -> None:
    text = shown(width=width, encoding=encoding)
    assert max(map(len, text.splitlines())) <= width
    assert ("#" in text) is (encoding == "ascii")


def test_the_longest_bar_is_the_fastest_and_bars_are_to_scale() -> None:
    bars = [line.count("█") for line in shown().splitlines() if "MiB  █" in line]
    assert bars == [6, 8, 16, 33]  # 4, 5.5, 11.2 and 22.4 of 22.4, in 33 characters


def test_what_this_machine_cannot_hold_is_said() -> None:
    text = shown(most=1200 * MIB)
    assert "  (this machine has 1.2 GiB)" in text.splitlines()
    assert "every expert in memory (this machine has 1.2 GiB)" in " ".join(text.split())


def test_a_model_that_does_not_fit_is_told_for_the_least_budget() -> None:
    assert "--ram 600MiB, if it had what it needs" in shown(
        replace(fake_forecast(), budget_bytes=600 * MIB)
    )


def test_short_forms() -> None:
    assert band(Rate(9.1, 11.2, 13.4, "estimated")) == "9.1 to 13"
    assert band(Rate(0.421, 0.5, 0.61, "estimated")) == "0.42 to 0.61"
    assert band(Rate(12.2, 12.3, 12.4, "measured")) == "12"
    stats = GenerationStats(
        prompt_tokens=10,
        reused_tokens=0,
        generated_tokens=20,
        ttft_s=0.5,
        prefill_tok_s=20.0,
        decode_tok_s=11.2,
        experts=CacheStats(hits=9, misses=1),
        seed=1,
    )
    assert "11.2 tok/s (forecast 9.1 to 13)" in answer_line(stats, 30, 4096, fake_forecast())
    assert "forecast" not in answer_line(stats, 30, 4096)
    rows = dict(stats_table(stats, CacheStats(), fake_forecast()))
    assert rows["forecast"] == "9.1 to 13 tok/s (estimated)"
    assert rows["forecast, experts"] == "60 % to 80 % hit, published runs of OLMoE-1B-7B"


def test_forecast_beside_actual() -> None:
    report = SimpleNamespace(
        forecast=fake_forecast(),
        decode_tok_s=14.0,
        runs=[SimpleNamespace(ttft_s=1.5), SimpleNamespace(ttft_s=0.1)],
        decode_experts=SimpleNamespace(hit_rate=0.65, upper=None),
    )
    out = io.StringIO()
    show_beside(Console(file=out, width=80), report)  # type: ignore[arg-type]
    lines = [" ".join(line.split()) for line in out.getvalue().splitlines()]
    assert lines[1:4] == [
        "decode tok/s 9.1 to 13 14 +25 %",
        "first token s, first run 2.00 to 4.00 1.50 -50 %",
        "hits while decoding 70.0 % 65.0 % -5.0 points",
    ]


# --- the command on a real store ------------------------------------------------------------------


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from moelite.convert import quantize

    folder = tmp_path_factory.mktemp("forecast")
    tiny_checkpoint.write_checkpoint(folder / "checkpoint", tiny_checkpoint.QWEN3_MOE)
    quantize(folder / "checkpoint", folder / "store")
    return folder / "store"


def test_json_has_all_of_it(store: Path) -> None:
    result = CliRunner().invoke(app, ["footprint", str(store), "--ram", "1GiB", "--json"])
    assert result.exit_code == 0, result.output
    found = json.loads(result.stdout)["forecast"]
    assert found["decode_tok_s"]["basis"] == "estimated"
    assert found["decode_tok_s"]["low"] < found["decode_tok_s"]["likely"]
    assert found["curve"][-1]["hit_rate"] == 1
    assert found["hit_rate"]["likely"] == 1  # a gibibyte holds all of it
    assert found["speeds"]["weight_bytes_s"]["likely"] > 0
    assert found["helps"] == []


def test_earlier_runs_make_it_measured(store: Path, isolated: Path, monkeypatch) -> None:
    from moelite import outlook
    from moelite.speeds import Sample, record

    here = Machine(threads=1, expert_format="int4", dense_format="int8", cpu="x")
    monkeypatch.setattr(outlook, "this_machine", lambda *_: here)
    record(isolated / "cache", here, Sample(model="another", weight_bytes_s=5e9))
    arguments = ["footprint", str(store), "--ram", "1GiB", "--threads", "1", "--json"]
    found = json.loads(CliRunner().invoke(app, arguments).stdout)["forecast"]
    assert found["decode_tok_s"]["basis"] == "measured"
    assert found["speeds"]["weight_bytes_s"]["likely"] == 5e9


def test_what_does_not_fit_keeps_its_exit_code(store: Path) -> None:
    result = CliRunner().invoke(app, ["footprint", str(store), "--ram", "100MiB"])
    assert result.exit_code == 3
    assert "NO, it does not fit in 100 MiB" in " ".join(result.output.split())
    assert "if it had what it needs" in " ".join(result.output.split())


# --- recorded routing -----------------------------------------------------------------------------


def write_trace(file: Path, routes: list[list[list[int]]]) -> Path:
    lines = [json.dumps({"tok": i, "layers": layers}) for i, layers in enumerate(routes)]
    file.write_text("\n".join(lines) + "\n")
    return file


def test_a_replay_by_hand() -> None:
    """Two layers of 4: one always picks expert 0, one goes round all four."""
    routes = np.array([[[0], [i % 4]] for i in range(80)], np.int32)
    rate = replay_rate(Trace(routes=routes, experts=4))
    assert rate(1.0) == 1
    assert rate(0.75) == 0.5  # the round never finds what it needs among the last three
    assert rate(0.0) == 0
    assert rate(0.125) == 0.25  # half-way from none to one expert kept


def test_a_trace_replaces_the_published_runs(store: Path, tmp_path: Path) -> None:
    trace = write_trace(tmp_path / "my.trace", [[[0, 1], [0, 1]] for _ in range(40)])
    arguments = ["footprint", str(store), "--ram", "1GiB", "--trace", str(trace)]
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 0, result.output
    hits = recorded_hits(trace, 6)
    assert hits.about == "replay of 40 tokens in my.trace"
    assert hits.likely(2 / 6) == 1


def test_a_trace_that_says_too_little_is_refused(tmp_path: Path) -> None:
    trace = write_trace(tmp_path / "short", [[[0, 1]]] * 5)
    with pytest.raises(UsageError, match="has 5 tokens, too few"):
        recorded_hits(trace, 6)


def test_a_trace_of_another_model_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="line 1"):
        recorded_hits(write_trace(tmp_path / "other", [[[0, 6]]] * 40), 6)


def test_a_missing_trace_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="cannot read"):
        recorded_hits(tmp_path / "none", 6)


BLOCK = """
  forecast for --ram 1024MiB:
                         likely        least        most    basis
  answer               11 tok/s    9.1 tok/s    13 tok/s    estimated
  first token             3.0 s        2.0 s       4.0 s    estimated
  experts in memory        70 %         60 %        80 %    estimated
  read for a token     24.0 MiB     16.0 MiB    32.0 MiB    estimated
  a token: 30 ms computing, 1 handling misses, 58 waiting for reads; most of it
    is waiting for the drive
  first token: of 512 prompt tokens, no expert in memory yet
  experts in memory: published runs of OLMoE-1B-7B
  weights at 3.7 GiB/s (measured), reads at 3.7 GiB/s (measured)

  tok/s over --ram
      600MiB  ██████  4.0
      700MiB  ████████  5.5  < holds one token's experts
     1024MiB  ████████████████  11  < here
     1500MiB  █████████████████████████████████  22  < no more disk reads

  what would make it faster:
    --ram 1500MiB, every expert in memory: 11 to 22 tok/s
    a drive twice as fast: 11 to 17 tok/s
"""
