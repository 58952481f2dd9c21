"""Size against distance as a picture: .html by plotly, .png or .svg by matplotlib.

Both are optional (the extra `report`) and imported where they draw. An .html file holds plotly's
own code, so it works without a network.
"""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from moelite.errors import UsageError

LIBRARIES = {".html": "plotly", ".png": "matplotlib", ".svg": "matplotlib"}
X, Y = "bits per parameter, all files of the model", "mean KL(reference || model), nats per token"
# told apart by the colour-blind, too (Okabe and Ito); the first is the first tool's
COLOURS = "#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00"
SIGNS = (("circle", "o"), ("square", "s"), ("diamond", "D"), ("cross", "P"), ("x", "X"))
_LEAST = 0.05  # of a value: as far down as an error bar may reach on a logarithmic axis
# where a label may go, in points from its mark: right, left, above, below, and further off
_BESIDE = (8, 0), (-8, 0), (0, 10), (0, -10)
_PLACES = _BESIDE + tuple(
    (x * far, y * far) for far in (2, 3, 4, 5) for x, y in ((8, 6), (-8, 6), (8, -6), (-8, -6))
)
_LEADER = {"arrowstyle": "-", "linewidth": 0.5, "color": "#888888", "shrinkA": 0, "shrinkB": 2}


@dataclass(frozen=True, slots=True, kw_only=True)
class Mark:
    """One point. se: standard error of kld, 0 if it is not known; best: nothing beats it."""

    name: str
    tool: str
    bits: float
    kld: float
    se: float
    best: bool = False


def check(path: Path) -> None:
    """Raises UsageError for an ending that cannot be drawn, a missing folder or library."""
    library = LIBRARIES.get(path.suffix.lower())
    if library is None:
        raise UsageError(f"{path} cannot be drawn", fix=f"end it in {', '.join(LIBRARIES)}")
    if not path.parent.is_dir():
        raise UsageError(f"there is no folder {path.parent}", fix=f"mkdir -p {path.parent}")
    try:
        importlib.import_module(library)
    except ImportError:
        raise UsageError(
            f"{path.suffix} files are drawn by {library}, which is not installed",
            fix=f"python -m pip install {library}",
        ) from None


def draw(path: Path, marks: Sequence[Mark], *, title: str, about: str) -> None:
    """Writes the picture. Marks without any distance do not fit a logarithmic axis: left out.

    Raises as `check`, and UsageError where nothing is left or the file cannot be written.
    """
    check(path)
    shown = [mark for mark in marks if mark.kld > 0]
    if not shown:
        raise UsageError("no store differs from the reference: there is nothing to draw")
    by_tool: dict[str, list[Mark]] = {}
    for mark in shown:
        by_tool.setdefault(mark.tool, []).append(mark)
    for found in by_tool.values():
        found.sort(key=lambda mark: mark.bits)
    try:
        writer = _html if path.suffix.lower() == ".html" else _image
        writer(path, by_tool, title, about)
    except OSError as problem:
        raise UsageError(f"cannot write {path}: {problem.strerror}") from None


def edge(by_tool: dict[str, list[Mark]]) -> list[Mark]:
    """The marks that nothing beats, by size: the line that bounds the others."""
    best = (mark for marks in by_tool.values() for mark in marks if mark.best)
    return sorted(best, key=lambda mark: mark.bits)


def _down(mark: Mark) -> float:
    return min(mark.se, mark.kld * (1 - _LEAST))


def _html(path: Path, by_tool: dict[str, list[Mark]], title: str, about: str) -> None:
    from plotly import graph_objects

    figure: Any = graph_objects.Figure()
    line = edge(by_tool)
    figure.add_scatter(
        x=[mark.bits for mark in line],
        y=[mark.kld for mark in line],
        mode="lines",
        name="not beaten",
        line={"color": "#BBBBBB", "dash": "dot"},
        hoverinfo="skip",
    )
    sides = ("middle right", "middle left")
    for i, (tool, marks) in enumerate(by_tool.items()):
        figure.add_scatter(
            x=[mark.bits for mark in marks],
            y=[mark.kld for mark in marks],
            error_y={
                "type": "data",
                "array": [mark.se for mark in marks],
                "arrayminus": [_down(mark) for mark in marks],
                "thickness": 1,
                "width": 3,
            },
            mode="markers+text",
            name=tool,
            text=[mark.name for mark in marks],
            textposition=[sides[n % 2] for n in range(len(marks))],
            textfont={"size": 11},
            marker={
                "color": COLOURS[i % len(COLOURS)],
                "symbol": SIGNS[i % len(SIGNS)][0],
                "size": 9,
            },
            hovertemplate="%{text}<br>%{x:.3f} bits<br>KL %{y:.6f}<extra>" + tool + "</extra>",
        )
    figure.update_layout(
        title={"text": title, "subtitle": {"text": about}},
        template="plotly_white",
        xaxis={"title": X},
        yaxis={"title": Y, "type": "log", "exponentformat": "power"},
    )
    figure.write_html(path, include_plotlyjs=True, full_html=True)


def _image(path: Path, by_tool: dict[str, list[Mark]], title: str, about: str) -> None:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9.5, 6.5), dpi=150, layout="constrained")
    canvas: Any = FigureCanvasAgg(figure)  # of its own: no window, no state of pyplot
    axes = figure.add_subplot()
    line = edge(by_tool)
    axes.plot(
        [mark.bits for mark in line],
        [mark.kld for mark in line],
        ":",
        color="#AAAAAA",
        label="not beaten",
        zorder=1,
    )
    for i, (tool, marks) in enumerate(by_tool.items()):
        axes.errorbar(
            [mark.bits for mark in marks],
            [mark.kld for mark in marks],
            yerr=[[_down(mark) for mark in marks], [mark.se for mark in marks]],
            fmt=SIGNS[i % len(SIGNS)][1],
            color=COLOURS[i % len(COLOURS)],
            markersize=5,
            elinewidth=1,
            capsize=2,
            label=tool,
        )
    axes.set_yscale("log")
    axes.yaxis.set_major_formatter("{x:g}")
    axes.margins(x=0.08, y=0.08)
    axes.grid(visible=True, which="major", color="#DDDDDD", linewidth=0.6)
    axes.grid(visible=True, which="minor", color="#F0F0F0", linewidth=0.4)
    axes.set_axisbelow(True)
    axes.set_xlabel(X)
    axes.set_ylabel(Y)
    figure.suptitle(title)
    axes.set_title(about, fontsize=9, color="#555555")
    axes.legend(frameon=False)
    canvas.draw()  # places are known now
    _label(axes, canvas, by_tool)
    figure.savefig(path)


def _label(axes: Any, canvas: Any, by_tool: dict[str, list[Mark]]) -> None:
    """Names beside the marks, each where it covers neither a mark nor another name."""
    from matplotlib.text import Text
    from matplotlib.transforms import Bbox

    renderer = canvas.get_renderer()
    marks = [(mark, i) for i, found in enumerate(by_tool.values()) for mark in found]
    taken = [axes.get_legend().get_window_extent(renderer)]
    for mark, _ in marks:
        x, y = axes.transData.transform((mark.bits, mark.kld))
        taken.append(Bbox.from_extents(x - 6, y - 6, x + 6, y + 6))
    frame = axes.get_window_extent(renderer)
    for mark, i in marks:
        best: tuple[float, Any, Any] | None = None
        for dx, dy in _PLACES:
            label = axes.annotate(
                mark.name,
                (mark.bits, mark.kld),
                xytext=(dx, dy),
                textcoords="offset points",
                ha="left" if dx > 0 else "right" if dx < 0 else "center",
                va="center",
                fontsize=7.5,
                color=COLOURS[i % len(COLOURS)],
                arrowprops=None if (dx, dy) in _BESIDE else _LEADER,
            )
            label.set_in_layout(False)  # places stay as they were measured
            label.update_positions(renderer)
            box = Text.get_window_extent(label, renderer)  # without its leader
            overlap = sum(_shared(box, other) for other in taken) + _outside(box, frame)
            if best is None or overlap < best[0]:
                if best is not None:
                    best[1].remove()
                best = overlap, label, box
            else:
                label.remove()
            if overlap == 0:
                break
        assert best is not None
        taken.append(best[2])


def _shared(box: Any, other: Any) -> float:
    """The area that two boxes have in common."""
    width = min(box.x1, other.x1) - max(box.x0, other.x0)
    height = min(box.y1, other.y1) - max(box.y0, other.y0)
    return float(width * height) if width > 0 and height > 0 else 0.0


def _outside(box: Any, frame: Any) -> float:
    return float(box.width * box.height) - _shared(box, frame)
