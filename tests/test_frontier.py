"""A recorded reference stands for the model itself; which points nothing beats; rows of others."""

from __future__ import annotations

import dataclasses
import tempfile

import pytest
from test_agreement import RoutedModel, routes
from test_evaluate import KnownModel, text

from moelite import evaluate as ev
from moelite.errors import UsageError
from moelite.frontier import check_points, record, recorded_bytes, undominated


@pytest.fixture
def file():
    with tempfile.TemporaryFile() as file:
        yield file


@pytest.mark.parametrize("protocol", ["llama", "paper"])
def test_a_recording_gives_the_numbers_of_the_model(protocol, file) -> None:
    how = {"context": 32, "protocol": protocol, "bos_id": 3}
    ids = text(150)
    want = ev.compare(RoutedModel(routes(1)), RoutedModel(routes(2)), ids, **how)
    recording = record(RoutedModel(routes(1)), ids, file, **how)
    for _ in range(2):  # as often as there are stores
        found = ev.compare(recording, RoutedModel(routes(2)), ids, **how)
        assert without_time(found) == without_time(want)
    assert found.routers.mean < 1
    another = RoutedModel(routes(2))
    another.table = KnownModel(7).table
    other = ev.compare(recording, another, ids, **how)
    assert other.kld_mean > found.kld_mean == 0.0  # the two share their logits, not their experts


def without_time(report):
    def still(one):
        return dataclasses.replace(one, seconds=0.0)

    return dataclasses.replace(report, reference=still(report.reference), model=still(report.model))


@pytest.mark.parametrize("protocol", ["llama", "paper"])
@pytest.mark.parametrize("context", [16, 17, 300])
def test_the_size_of_a_recording_is_known_beforehand(protocol, context, file) -> None:
    ids = text(2 * context + 5)
    record(KnownModel(1), ids, file, context=context, protocol=protocol)
    assert recorded_bytes(len(ids), context, protocol, 11) == file.tell() > 0


def test_other_tokens_than_the_recorded_are_refused(file) -> None:
    ids = text(64)
    recording = record(KnownModel(1), ids, file, context=16, protocol="paper")
    with pytest.raises(ValueError, match="not recorded next"):
        ev.compare(recording, KnownModel(1), ids[1:], context=16, protocol="paper")
    with pytest.raises(ValueError, match="not recorded next"):
        ev.compare(recording, KnownModel(1), text(80), context=16, protocol="paper")


def test_what_nothing_beats() -> None:
    points = [(8.0, 0.1), (4.0, 0.5), (5.0, 0.6), (4.0, 0.4), (9.0, 0.1), (3.0, 2.0)]
    assert undominated(points) == [True, False, False, True, False, True]
    assert undominated([(4.0, 0.5), (4.0, 0.5)]) == [True, True]


def test_rows_of_other_tools_are_checked() -> None:
    good = {"name": "Q4_0", "bits_per_parameter": 4.6, "kld_mean": 0.1}
    assert check_points([good], "rows.json") == [good]
    for key in good:
        bad = {k: v for k, v in good.items() if k != key}
        with pytest.raises(UsageError, match=rf"rows\.json: row 1 has no proper '{key}'"):
            check_points([good, bad], "rows.json")
    with pytest.raises(UsageError, match="no proper 'kld_mean'"):
        check_points([{**good, "kld_mean": "0.1"}], "rows.json")
    with pytest.raises(UsageError, match="no list of rows"):
        check_points(good, "rows.json")
