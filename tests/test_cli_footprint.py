"""The footprint as people see it: bars on one scale, the verdict, what would help, exit codes."""

from __future__ import annotations

import io
import json
from dataclasses import replace

import pytest
import typer
from fakes import fake_forecast
from rich.console import Console
from typer.testing import CliRunner

from moelite import foresee
from moelite.budget import Footprint, Part, Slots
from moelite.cli import footprint as command
from moelite.cli.bars import Segment, bar, cells
from moelite.forecast import Forecast
from moelite.units import GIB, MIB

PARTS = (
    Part(name="runtime", bytes=256 * MIB, basis="measured"),
    Part(name="tokenizer", bytes=64 * MIB, basis="estimated"),
    Part(name="dense weights", bytes=512 * MIB, basis="exact"),
    Part(name="kv", bytes=128 * MIB, basis="exact"),
    Part(name="workspace", bytes=64 * MIB, basis="exact"),
    Part(name="experts", bytes=2560 * MIB, basis="exact"),
)
FITS = Footprint(
    parts=PARTS,
    budget_bytes=4 * GIB,
    minimum_bytes=1056 * MIB,
    machine_bytes=16 * GIB,
    machine_limit="cgroup v2",
    fits=True,
    experts_total=400,
    experts_resident=152,
    experts_bytes=400 * 16 * MIB,
    resident_bytes=152 * 16 * MIB,
    record_bytes=16 * MIB,
    slots=Slots(quotas={0: 152}, floating={16 * MIB: 8}),
    context=4096,
    chunk=64,
    threads=2,
    store_bytes=400 * 16 * MIB + 512 * MIB,
    expert_format="int4",
    dense_format="int8",
)
SMALL = replace(
    FITS,
    parts=(*PARTS[:-1], replace(PARTS[-1], bytes=0)),
    budget_bytes=800 * MIB,
    fits=False,
    experts_resident=0,
    resident_bytes=0,
    slots=Slots(quotas={0: 0}, floating={16 * MIB: 0}),
)


def shown(found: Footprint, *, width: int = 80, encoding: str = "utf-8") -> str:
    out = io.TextIOWrapper(io.BytesIO(), encoding=encoding)
    command.show(Console(file=out, width=width, highlight=False), "granite", found)
    out.seek(0)
    return "\n".join(line.rstrip() for line in out.read().splitlines())


def test_the_whole_picture() -> None:
    assert shown(FITS) == PICTURE.strip("\n")


def test_the_whole_picture_of_what_does_not_fit() -> None:
    assert shown(SMALL) == PICTURE_SMALL.strip("\n")


def test_signs_fall_back_to_ascii() -> None:
    text = shown(FITS, encoding="ascii")
    text.encode("ascii")
    assert "dddd" in text
    assert "EEEE" in text


@pytest.mark.parametrize("width", [40, 60, 120, 200])
def test_no_bar_is_wider_than_the_terminal(width) -> None:
    for line in shown(FITS, width=width).splitlines():
        assert len(line) <= width


def test_memory_and_disk_share_one_scale() -> None:
    lines = {
        x.split()[0]: x for x in shown(FITS).splitlines() if x.startswith(("  memory", "  disk"))
    }
    memory, disk = (sum(c in "▒▚█▓▞■·□" for c in lines[name]) for name in ("memory", "disk"))
    assert disk == 58
    assert memory == round(58 * FITS.budget_bytes / FITS.store_bytes)


def test_a_bar_has_the_right_lengths_and_shows_the_smallest_part() -> None:
    assert cells([3, 1], 4, 40) == [30, 10]
    assert cells([1, 1, 1], 3, 10) == [4, 3, 3]
    assert cells([10_000, 1], 10_001, 10) == [9, 1]
    assert cells([0, 5], 10, 10) == [0, 5]
    segments = [
        Segment(name=s, bytes=n, sign=s, plain=s, style="") for s, n in (("a", 1), ("b", 3))
    ]
    assert bar(segments, 8, 16, ascii_only=False).plain == "aabbbbbb"


def test_a_budget_above_the_machine_says_so() -> None:
    found = replace(FITS, budget_bytes=64 * GIB, fits=False)
    text = " ".join(command.verdict(found).plain.split())
    assert text.startswith(
        "NO, a budget of 64.0 GiB is more than this machine has, 16.0 GiB (cgroup"
    )


def test_a_machine_too_small_for_the_minimum_is_not_advised_to_take_it() -> None:
    lines = command.advice(replace(SMALL, machine_bytes=GIB))
    assert not any("--ram" in line for line in lines)
    assert any("this machine has 1.0 GiB" in line for line in lines)


def test_everything_resident_needs_no_advice() -> None:
    found = replace(FITS, experts_resident=400)
    assert command.advice(found) == []
    assert "all experts stay in memory" in command.verdict(found).plain


def test_the_advice_names_smaller_formats_only_where_there_are() -> None:
    lines = "\n".join(command.advice(replace(SMALL, expert_format="bf16", dense_format="f32")))
    assert "--dense int8" in lines
    assert "--experts int4" in lines
    assert "int4" not in "\n".join(command.advice(SMALL))
    assert "--dense" not in "\n".join(command.advice(replace(SMALL, dense_format="int4")))


@pytest.fixture
def run(monkeypatch):
    """Runs the command on a footprint; what foresee was asked stays in `asked`."""
    asked: list[tuple[object, dict[str, object]]] = []

    def go(found: Footprint, *arguments: str):
        def fake(model: object, **options: object) -> tuple[Footprint, Forecast]:
            asked.append((model, options))
            return found, fake_forecast()

        monkeypatch.setattr(foresee, "foresee", fake)
        app = typer.Typer()
        app.command()(command.footprint)
        return CliRunner().invoke(app, list(arguments)), asked[-1]

    return go


@pytest.mark.parametrize(("found", "code"), [(FITS, 0), (SMALL, 3)])
@pytest.mark.parametrize("extra", [[], ["--json"]])
def test_the_exit_code_is_the_verdict(run, found, code, extra) -> None:
    result, _ = run(found, "granite", *extra)
    assert result.exit_code == code


def test_the_options_reach_the_estimate(run) -> None:
    _, (model, options) = run(FITS, "m", "--ram", "4GiB", "--context", "99", "--experts", "f32")
    assert model == "m"
    assert options["ram"] == "4GiB"
    assert (options["context"], options["experts"], options["dense"]) == (99, "f32", None)


def test_json_is_the_footprint(run) -> None:
    result, _ = run(SMALL, "granite", "--json")
    found = json.loads(result.stdout)
    assert found["parts"][2] == {"name": "dense weights", "bytes": 512 * MIB, "basis": "exact"}
    assert found["model"] == "granite"
    assert found["fits"] is False
    assert found["minimum_bytes"] == SMALL.minimum_bytes
    assert found["used_bytes"] == sum(part["bytes"] for part in found["parts"])


PICTURE = """
granite   experts int4, dense int8, context 4,096 tokens, 2 threads

YES, it fits in 4.0 GiB: 152 of 400 experts (38 %) stay in memory, the others
are read from disk when used; the least at this context is --ram 1056MiB.

  memory  ▒▒▚████▓▞■■■■■■■■■■■■■■■■■■■■■····  4.0 GiB
  disk    ████■■■■■■■■■■■■■■■■■■■■■□□□□□□□□□□□□□□□□□□□□□□□□□□□□□□□□□  6.8 GiB

       memory                 size    share    basis
  ▒    runtime             256 MiB      6 %    measured
  ▚    tokenizer          64.0 MiB      2 %    estimated
  █    dense weights       512 MiB     12 %    exact
  ▓    kv                  128 MiB      3 %    exact
  ▞    workspace          64.0 MiB      2 %    exact
  ■    experts             2.5 GiB     62 %    exact
  ·    free                512 MiB     12 %    budget - parts

  □    experts on disk     6.2 GiB             400 of 16.0 MiB each

  what would help:
    --ram 7552MiB: about what keeps every expert in memory
    --context 2048: frees 64.0 MiB
"""

PICTURE_SMALL = """
granite   experts int4, dense int8, context 4,096 tokens, 2 threads

NO, it does not fit in 800 MiB: the least at this context is --ram 1056MiB.

  memory  ▒▒▚████▓▞  1.0 GiB
                ^ budget 800 MiB
  disk    ████□□□□□□□□□□□□□□□□□□□□□□□□□□□□□□□□□□□□□□□□□□□□□□□□□□□□□□  6.8 GiB

       memory                 size    share    basis
  ▒    runtime             256 MiB     32 %    measured
  ▚    tokenizer          64.0 MiB      8 %    estimated
  █    dense weights       512 MiB     64 %    exact
  ▓    kv                  128 MiB     16 %    exact
  ▞    workspace          64.0 MiB      8 %    exact
  ■    experts                 0 B      0 %    exact

  □    experts on disk     6.2 GiB             400 of 16.0 MiB each

  what would help:
    --ram 1056MiB: the least that works
    --context 2048: frees 64.0 MiB
"""
