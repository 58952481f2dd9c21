"""Formats under a size limit, against trying every mix."""

from __future__ import annotations

import itertools
import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moelite.allocation import Unit, allocate, hull
from moelite.errors import UsageError


def unit(*points: tuple[int, float]) -> Unit:
    names = [f"f{i}" for i in range(len(points))]
    return Unit(
        part="down",
        layer=0,
        expert=0,
        sizes={n: p[0] for n, p in zip(names, points, strict=True)},
        costs={n: p[1] for n, p in zip(names, points, strict=True)},
    )


def test_the_hull_leaves_out_what_is_never_worth_it() -> None:
    # f1 costs more than the line from f0 to f2; f3 is larger and worse than f2
    assert hull(unit((1, 10.0), (2, 9.0), (3, 1.0), (4, 2.0))) == ["f0", "f2"]
    assert hull(unit((2, 1.0), (2, 3.0), (5, 0.5))) == ["f0", "f2"]


def test_bytes_go_where_they_save_most() -> None:
    weak, strong = unit((1, 2.0), (2, 1.0)), unit((1, 20.0), (2, 10.0))
    assert allocate([weak, strong], 3) == ["f0", "f1"]
    assert allocate([weak, strong], 4) == ["f1", "f1"]
    assert allocate([weak, strong], 2) == ["f0", "f0"]
    with pytest.raises(UsageError, match="smallest formats take"):
        allocate([weak, strong], 1)


@settings(max_examples=150, deadline=None)
@given(seed=st.integers(0, 1 << 30))
def test_no_mix_is_better_by_more_than_a_step(seed: int) -> None:
    draw = random.Random(seed)
    units = [
        unit(*((draw.randint(1, 9), draw.random()) for _ in range(draw.randint(1, 4))))
        for _ in range(draw.randint(1, 5))
    ]
    least = sum(min(u.sizes.values()) for u in units)
    budget = least + draw.randint(0, 20)
    found = allocate(units, budget)

    def total(names: tuple[str, ...]) -> tuple[int, float]:
        pairs = list(zip(units, names, strict=True))
        return sum(u.sizes[n] for u, n in pairs), sum(u.costs[n] for u, n in pairs)

    size, cost = total(tuple(found))
    assert size <= budget
    mixes = map(total, itertools.product(*(u.sizes for u in units)))
    best = min(c for s, c in mixes if s <= budget)
    worst_step = max(max(u.costs.values()) - min(u.costs.values()) for u in units)
    assert best <= cost <= best + worst_step + 1e-12
