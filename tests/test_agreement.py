"""Which experts two models share: shares by hand, and heard at the scored positions alone."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import pytest
import synthetic
from test_evaluate import KnownModel, KnownSession, text
from test_synthetic import small

from moelite import evaluate as ev
from moelite.agreement import Agreement, Choices, shared
from moelite.engine import load
from moelite.errors import UsageError

Hook = Callable[[int, np.ndarray], None]


class RoutedSession(KnownSession):
    """Tells two layers' experts of every token, in chunks of three."""

    model: RoutedModel

    def _tell(self, ids: list[int]) -> None:
        at = len(self.seen)
        for start in range(0, len(ids), 3):
            rows = np.arange(at + start, at + min(start + 3, len(ids)))
            for layer in (1, 4):
                if self.model.on_route is not None:
                    self.model.on_route(layer, self.model.experts(layer, rows))

    def append(self, ids):
        self._tell(ids)
        return super().append(ids)

    def advance(self, ids):
        self._tell(ids)
        return super().advance(ids)


class RoutedModel(KnownModel):
    """A KnownModel whose tokens take the experts that `table` [position, 2] names."""

    def __init__(self, table: dict[int, np.ndarray]) -> None:
        super().__init__(1)
        self.routes, self.on_route = table, None

    def session(self) -> RoutedSession:
        session = RoutedSession(self.table)
        session.model = self
        return session

    def experts(self, layer: int, rows: np.ndarray) -> np.ndarray:
        return self.routes[layer][rows]


def routes(seed: int) -> dict[int, np.ndarray]:
    """Two distinct experts of five for 64 positions of two layers."""
    rng = np.random.default_rng(seed)
    return {
        layer: np.array([rng.permutation(5)[:2] for _ in range(64)], np.int32) for layer in (1, 4)
    }


def test_shares_by_hand() -> None:
    first = np.array([[0, 1], [2, 3], [4, 0], [1, 2]], np.int32)
    second = np.array([[1, 0], [3, 4], [1, 2], [1, 2]], np.int32)  # order does not count
    assert shared(first, second).tolist() == [1.0, 0.5, 0.0, 1.0]


@pytest.mark.parametrize("protocol", ["llama", "paper"])
def test_the_report_is_the_plain_count_over_scored_positions(protocol) -> None:
    a, b = RoutedModel(routes(1)), RoutedModel(routes(2))
    context = 16
    ids = text(2 * context)
    report = ev.compare(a, b, ids, context=context, protocol=protocol).routers
    first = context // 2 if protocol == "llama" else 0
    positions = list(range(first, context - 1)) * 2  # two windows
    per_token = [
        [len({*a.routes[n][p]} & {*b.routes[n][p]}) / 2 for n in (1, 4)] for p in positions
    ]
    assert report.layers == (1, 4)
    assert report.agreement == pytest.approx(np.mean(per_token, axis=0).tolist(), abs=1e-15)
    means = [sum(pair) / 2 for pair in per_token]
    assert report.mean == pytest.approx(sum(means) / len(means))
    assert report.mean_se == pytest.approx(np.std(means, ddof=1) / math.sqrt(len(means)))
    assert 0.1 < report.mean < 0.9


def test_worst_layers_come_first() -> None:
    a, b = RoutedModel(routes(1)), RoutedModel(routes(1))
    b.routes = {**b.routes, 4: (b.routes[4] + 1) % 5}
    report = ev.compare(a, b, text(32), context=16).routers
    [(layer, share)] = report.worst(1)
    assert layer == 4
    assert share < 1.0
    assert report.worst(5)[1] == (1, 1.0)


def test_who_listened_before_listens_again() -> None:
    a, b = RoutedModel(routes(1)), RoutedModel(routes(2))
    a.on_route = told = lambda layer, experts: None
    ev.compare(a, b, text(32), context=16)
    assert a.on_route is told
    assert b.on_route is None


def test_models_without_routers_have_no_agreement() -> None:
    assert ev.compare(KnownModel(1), KnownModel(2), text(32), context=16).routers is None


def test_other_experts_per_token_are_refused() -> None:
    two, three = ({0: np.zeros((4, k), np.int32)} for k in (2, 3))
    with pytest.raises(UsageError, match="same MoE layers and experts"):
        Agreement().add(two, three)
    with pytest.raises(UsageError, match="same MoE layers and experts"):
        Agreement().add(two, {1: two[0]})


def test_what_is_heard_is_copied() -> None:
    """The engine hands out its own array, which the next token overwrites."""
    choices = Choices()
    choices.listening = True
    row = np.array([[1, 2]], np.int32)
    choices.hear(0, row)
    row[:] = 7
    assert choices.take()[0].tolist() == [[1, 2]]
    assert choices.take() == {}


def test_a_real_engine_tells_its_choices(tmp_path) -> None:
    """Against each model run by itself over whole windows, its choices counted as sets."""
    stores, chosen = [], []
    ids = [int(i) for i in np.random.default_rng(1).integers(0, 128, 64)]
    for seed in (0, 1):
        stores.append(tmp_path / f"store{seed}")
        config = small(num_hidden_layers=2)
        synthetic.write_store(config, stores[-1], name="small", seed=seed)
        with load(stores[-1], context=32) as model:
            heard: dict[int, list[set[int]]] = {0: [], 1: []}
            model.on_route = lambda layer, rows, heard=heard: heard[layer].extend(map(set, rows))
            for start in (0, 32):
                model.forward(ids[start : start + 32])
            chosen.append(heard)
    with load(stores[0], context=32) as first, load(stores[1], context=32) as second:
        report = ev.compare(first, second, ids, context=32, protocol="llama").routers
    scored = [start + p for start in (0, 32) for p in range(16, 31)]
    for layer, share in zip(report.layers, report.agreement, strict=True):
        pairs = [(chosen[0][layer][p], chosen[1][layer][p]) for p in scored]
        want = np.mean([len(a & b) / len(a) for a, b in pairs])
        assert share == pytest.approx(want)
        assert 0 < share < 1
