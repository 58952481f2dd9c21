"""`moelite frontier`: a real store against itself and another, the table, JSON and the picture."""

from __future__ import annotations

import importlib
import json
import re
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import typer
from test_cli_measure import NEED, SIZES, FakeModel, Tokens, V
from typer.testing import CliRunner

from moelite import engine, sizing, store, storesize
from moelite.cli import frontier as command
from moelite.cli import plot
from moelite.errors import UsageError
from moelite.evaluate import scoring_bytes
from moelite.storesize import StoreSize
from moelite.units import MIB

ROW = {"name": "Q4_0", "tool": "llama.cpp", "bits_per_parameter": 6.0, "kld_mean": 1e-5}
ROWS = [{**ROW, "kld_se": 1e-6, "ppl": 12.5}, {**ROW, "name": "elsewhere", "text": "other.txt"}]


@pytest.fixture
def world(monkeypatch, tmp_path):
    """Stores "good", "worse" and "bad" that load as fakes, one at a time."""
    tilts = {"good": 0.0, "worse": 1.0, "bad": 2.0}
    seen = SimpleNamespace(loads=[], open=0, tokens={})

    class Loaded(FakeModel):
        def __enter__(self):
            seen.open += 1
            assert seen.open == 1, "one model at a time"
            return self

        def __exit__(self, *_: object) -> None:
            seen.open -= 1

    def load(path, *, ram, **_: object) -> FakeModel:
        name = Path(path).name
        seen.loads.append((name, ram))
        return Loaded(name, tilts[name], seen.tokens.get(name, Tokens()))

    sizes = {
        **SIZES,
        Path("bad"): StoreSize(
            bytes=1000, params=1000, expert_bytes=450, expert_params=900, formats="int4"
        ),
    }
    monkeypatch.setattr(engine, "load", load)
    monkeypatch.setattr(sizing, "footprint", lambda path, **_: SimpleNamespace(minimum_bytes=NEED))
    opened = SimpleNamespace(config={"vocab_size": V}, close=lambda: None)
    monkeypatch.setattr(store.Store, "open", lambda path: opened)
    monkeypatch.setattr(command, "find_store", lambda name, **_: Path(name))
    monkeypatch.setattr(command, "cache_folder", lambda: tmp_path / "cache")
    monkeypatch.setattr(storesize, "check_calibration", lambda *_: None)
    monkeypatch.setattr(storesize, "store_size", sizes.get)
    text = tmp_path / "text.txt"
    text.write_text("the quick brown fox " * 10)
    seen.text, seen.also = str(text), tmp_path / "rows.json"
    seen.also.write_text(json.dumps(ROWS))
    return seen


def frontier(world, *arguments: object):
    app = typer.Typer()
    app.command()(command.frontier)
    words = ["--text", world.text, "--context", "16", *arguments]
    return CliRunner().invoke(app, [str(word) for word in words])


def test_the_table_has_everything_by_size(world) -> None:
    result = frontier(world, "good", "worse", "bad", "--also", world.also)
    assert result.exit_code == 0, result.exception
    assert "judged by good: 32.00 bits per parameter" in result.stdout
    assert "llama protocol, context 16, 84 tokens scored" in result.stdout
    rows = [line.split() for line in result.stdout.splitlines()[4:]]
    assert [row[0] for row in rows] == ["worse", "bad", "*"]
    assert rows[2][1:6] == ["Q4_0", "(llama.cpp)", "6.00", "0.00001", "±"]
    assert "elsewhere" not in result.stdout
    alone = frontier(world, "good", "worse", "bad").stdout.splitlines()[4:]
    assert [line.split()[0] for line in alone] == ["*", "bad"]  # as large, and further off


def test_json_has_the_distances_and_what_nothing_beats(world) -> None:
    found = json.loads(frontier(world, "good", "worse", "bad", "--json").stdout)
    assert found["reference"]["store"] == "good"
    assert [one["store"] for one in found["stores"]] == ["worse", "bad"]
    assert [one["unbeaten"] for one in found["stores"]] == [True, False]
    worse, bad = found["stores"]
    assert 0 < worse["kld_mean"] < bad["kld_mean"]
    assert worse["bits_per_parameter"] == 8.0
    assert found["others"] == []
    p, q = (np.exp(row) / np.exp(row).sum() for row in (np.linspace(0, 1, V), np.linspace(0, 2, V)))
    assert worse["kld_mean"] == pytest.approx((p * np.log(p / q)).sum(), rel=1e-5)


def test_each_model_has_the_whole_budget(world) -> None:
    frontier(world, "good", "worse", "bad", "--ram", "1GiB")
    share = 1024 * MIB - 2 * scoring_bytes(V)
    assert world.loads == [("good", share), ("worse", share), ("bad", share)]


def test_stores_with_different_tokens_are_refused(world) -> None:
    world.tokens["bad"] = Tokens(shift=1)
    result = frontier(world, "good", "worse", "bad")
    assert isinstance(result.exception, UsageError)
    assert "bad and good cut the text into different tokens" in str(result.exception)


def test_too_little_room_for_the_reference_is_told(world, monkeypatch) -> None:
    monkeypatch.setattr(command.shutil, "disk_usage", lambda _: SimpleNamespace(free=10_000))
    result = frontier(world, "good", "worse")
    assert isinstance(result.exception, UsageError)
    assert "--limit-tokens" in result.exception.fix
    assert [name for name, _ in world.loads] == ["good"]


@pytest.mark.parametrize("content", ["{", "{}", '[{"name": "x"}]'])
def test_rows_that_are_none_are_refused_before_anything_runs(world, content) -> None:
    world.also.write_text(content)
    result = frontier(world, "good", "worse", "--also", world.also)
    assert isinstance(result.exception, UsageError)
    assert "rows.json" in str(result.exception)
    assert world.loads == []


def test_a_missing_library_is_named_before_anything_runs(world, monkeypatch, tmp_path) -> None:
    def missing(name: str):
        raise ImportError(name)

    monkeypatch.setattr(importlib, "import_module", missing)
    for ending, library in ((".html", "plotly"), (".png", "matplotlib"), (".svg", "matplotlib")):
        result = frontier(world, "good", "worse", "--plot", tmp_path / f"out{ending}")
        assert isinstance(result.exception, UsageError)
        assert result.exception.fix == f"python -m pip install {library}"
    assert world.loads == []


def test_an_unknown_ending_is_refused(tmp_path) -> None:
    with pytest.raises(UsageError, match=r"out\.pdf cannot be drawn"):
        plot.check(tmp_path / "out.pdf")


def test_a_missing_folder_is_refused_before_anything_runs(world, tmp_path) -> None:
    result = frontier(world, "good", "worse", "--plot", tmp_path / "none" / "out.html")
    assert isinstance(result.exception, UsageError)
    assert f"no folder {tmp_path / 'none'}" in str(result.exception)
    assert world.loads == []


def marks() -> list[plot.Mark]:
    common = {"se": 0.01, "best": True}
    return [
        plot.Mark(name="store-a", tool="moelite", bits=4.5, kld=0.05, **common),
        plot.Mark(name="store-b", tool="moelite", bits=8.5, kld=0.003, **common),
        plot.Mark(name="Q4_0", tool="llama.cpp", bits=4.6, kld=0.08, se=0.2),
        plot.Mark(name="itself", tool="moelite", bits=16.0, kld=0.0, se=0.0),
    ]


def test_html_holds_every_point_and_needs_no_network(tmp_path) -> None:
    pytest.importorskip("plotly", reason="plotly draws it: pip install plotly")
    out = tmp_path / "out.html"
    plot.draw(out, marks(), title="the title", about="512 tokens")
    page = out.read_text()
    for word in ("store-a", "store-b", "Q4_0", "the title", "512 tokens", "0.05", "0.003", "0.08"):
        assert word in page
    assert "itself" not in page  # no place on a logarithmic axis
    assert len(page) > 1_000_000  # plotly's own code
    assert not re.search(r'<script[^>]+src="', page)


def test_a_picture_names_every_point(tmp_path) -> None:
    pytest.importorskip("matplotlib", reason="matplotlib draws it: pip install matplotlib")
    import matplotlib as mpl

    out = tmp_path / "out.svg"
    with mpl.rc_context({"svg.fonttype": "none"}):  # text as text
        plot.draw(out, marks(), title="the title", about="512 tokens")
    picture = out.read_text()
    for word in ("store-a", "store-b", "Q4_0", "the title", "512 tokens", "llama.cpp", "moelite"):
        assert f">{word}</text>" in picture
    assert "itself" not in picture
    plot.draw(tmp_path / "out.png", marks(), title="x", about="y")
    assert (tmp_path / "out.png").read_bytes().startswith(b"\x89PNG")


def test_names_do_not_cover_each_other() -> None:
    pytest.importorskip("matplotlib", reason="matplotlib draws it: pip install matplotlib")
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.text import Annotation, Text

    figure = Figure(figsize=(8, 6), dpi=100)
    canvas, axes = FigureCanvasAgg(figure), figure.add_subplot()
    crowd = [
        plot.Mark(name=f"crowded-{i}", tool="t", bits=4 + 0.05 * i, kld=0.1, se=0) for i in range(8)
    ]
    axes.plot([3, 9], [0.01, 1], label="t")
    axes.legend()
    canvas.draw()
    plot._label(axes, canvas, {"t": crowd})
    boxes = [
        Text.get_window_extent(one) for one in axes.get_children() if isinstance(one, Annotation)
    ]
    assert len(boxes) == 8
    for i, box in enumerate(boxes):
        assert not any(box.overlaps(other) for other in boxes[:i])


def test_nothing_to_draw_is_told(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(plot, "check", lambda _: None)
    with pytest.raises(UsageError, match="nothing to draw"):
        plot.draw(tmp_path / "out.png", marks()[3:], title="", about="")


def test_error_bars_stay_on_a_logarithmic_axis() -> None:
    wide = plot.Mark(name="x", tool="t", bits=4, kld=0.08, se=0.2)
    assert 0 < wide.kld - plot._down(wide) < wide.kld
    narrow = plot.Mark(name="x", tool="t", bits=4, kld=0.08, se=0.02)
    assert plot._down(narrow) == 0.02


def test_the_line_goes_through_what_nothing_beats() -> None:
    by_tool = {"a": marks()[:2], "b": marks()[2:3]}
    assert [mark.name for mark in plot.edge(by_tool)] == ["store-a", "store-b"]
