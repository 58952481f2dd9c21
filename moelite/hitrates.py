"""How often an expert is found in memory, by the share of a layer's experts that stays there.

All curves are of a least-recently-used list for each layer, as moelite keeps them.
"""

from __future__ import annotations

from bisect import bisect_right
from statistics import median

from moelite.forecast import HitRate, Hits

Curve = tuple[tuple[float, float], ...]

# Published or replayed on real text; where each comes from: docs/DESIGN.md, "Forecast".
CURVES: dict[str, tuple[str, Curve]] = {
    "OLMoE-1B-7B": (
        "olmoe",
        (
            (0.05, 0.149),
            (0.125, 0.437),
            (0.1875, 0.522),
            (0.25, 0.602),
            (0.375, 0.703),
            (0.5, 0.802),
            (0.625, 0.887),
            (0.75, 0.948),
        ),
    ),
    "Qwen3-30B-A3B": (
        "qwen3_moe",
        ((0.063, 0.366), (0.19, 0.741), (0.38, 0.894), (0.635, 0.962)),
    ),
    "Qwen3-235B-A22B": (
        "qwen3_moe",
        (
            (0.05, 0.339),
            (0.08, 0.466),
            (0.12, 0.58),
            (0.16, 0.666),
            (0.2, 0.743),
            (0.25, 0.8),
            (0.3, 0.843),
            (0.36, 0.886),
            (0.45, 0.933),
            (0.55, 0.961),
            (0.64, 0.973),
        ),
    ),
    "Qwen3.5-397B": (
        "qwen3_5_moe",
        ((0.05, 0.415), (0.12, 0.582), (0.25, 0.755), (0.36, 0.828), (0.45, 0.861), (0.64, 0.892)),
    ),
    "GLM-5.2": (
        "glm",
        ((0.05, 0.303), (0.12, 0.501), (0.25, 0.667), (0.36, 0.761), (0.45, 0.822), (0.64, 0.902)),
    ),
    "gemma-4-26B": ("gemma4", ((0.125, 0.532), (0.25, 0.761), (0.5, 0.882))),
    "Kimi-Linear-48B": (
        "kimi_linear",
        ((0.05, 0.399), (0.125, 0.583), (0.25, 0.737), (0.375, 0.826), (0.5, 0.882), (0.75, 0.935)),
    ),
    # 8 large experts, 2 of them a token: hardly more than even picks give
    "Mixtral-8x7B": ("mixtral", ((0.25, 0.4), (0.5, 0.6))),
}
_FINE = [name for name in CURVES if name != "Mixtral-8x7B"]


def interpolate(curve: Curve, share: float) -> float:
    """The curve at `share`, straight between its points, from nothing at 0 to 1 at 1."""
    points = ((0.0, 0.0), *curve, (1.0, 1.0))
    i = min(bisect_right([x for x, _ in points], share), len(points) - 1)
    (x0, y0), (x1, y1) = points[i - 1], points[i]
    return y0 + (y1 - y0) * (min(max(share, 0.0), 1.0) - x0) / (x1 - x0)


def uniform() -> Hits:
    """Every expert is as likely as any other: what stays is what is hit."""

    def same(share: float) -> float:
        return share

    return Hits(low=same, likely=same, high=same, about="experts picked evenly", basis="estimated")


def prior(model_type: str, experts: int, top_k: int) -> Hits:
    """What real text gave in published runs: of this family, else between all families."""
    names = [name for name, (family, _) in CURVES.items() if family == model_type]
    about = f"published runs of {' and '.join(names)}"
    if not names:
        coarse = top_k / experts > 0.2
        names = ["Mixtral-8x7B"] if coarse else _FINE
        about = f"between published runs of {len(names)} other models"
        if coarse:
            about = "published runs of Mixtral-8x7B, whose experts are as few"
    curves = [CURVES[name][1] for name in names]

    def rates(share: float) -> list[float]:
        # real routing repeats itself: it is never below even picks
        return [max(share, interpolate(curve, share)) for curve in curves]

    return Hits(
        low=lambda share: _misses(min(rates(share)), 1.2),
        likely=lambda share: median(rates(share)),
        high=lambda share: _misses(max(rates(share)), 0.8),
        about=about,
        basis="estimated",
    )


def recorded(rate: HitRate, about: str) -> Hits:
    """A replay of this very model's routing; another text may miss a tenth more or less."""
    return Hits(
        low=lambda share: _misses(rate(share), 1.1),
        likely=rate,
        high=lambda share: _misses(rate(share), 0.9),
        about=about,
        basis="measured",
    )


def _misses(rate: float, factor: float) -> float:
    return max(0.0, 1 - (1 - rate) * factor)
