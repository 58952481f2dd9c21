"""moelite computes the logits of transformers: every tiny variant, its weights kept in f32, through
quantize, store, cache and kernels, in one pass over several prefill chunks and token by token."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import tiny_models
from reference import Reference

import moelite
from moelite.quant.base import F32

pytest.importorskip("torch", reason="parity needs torch")
pytest.importorskip("transformers", reason="parity needs transformers")

pytestmark = pytest.mark.parity

# Relative to the largest logit. Measured at most 3.8e-6, of which transformers' own distance from
# float64 is 3.6e-6 and moelite's 2.4e-6; both depend a little on the CPU.
TOLERANCE = 2e-5
# Two float32 programs may choose different experts where scores are this close (relative).
MARGIN = 1e-5
CHUNK = 16
LENGTH = 3 * CHUNK + 5  # three whole chunks and a part; longer than every window
PIECES = (1, 4, CHUNK, 1, CHUNK + 3, 2)  # appended one after the other, then token by token


@dataclass
class Case:
    """One variant, loaded, with what transformers says."""

    model: Any
    ids: list[int]
    want: npt.NDArray[np.float64]
    safe: npt.NDArray[np.bool_]  # [T]: no routing before this token hangs on the last bits

    def check(self, got: F32) -> None:
        assert got.dtype == np.float32
        assert got.shape == self.want.shape
        error = np.abs(got - self.want).max(-1) / np.abs(self.want).max()
        assert error[self.safe].max() <= TOLERANCE, f"relative errors by position: {error}"


@pytest.fixture(scope="module", params=tiny_models.variants(), ids="-".join)
def case(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Case]:
    folder: Path = tmp_path_factory.mktemp("parity")
    checkpoint, store = folder / "checkpoint", folder / "store"
    tiny_models.write_checkpoint(*request.param, checkpoint)
    moelite.quantize(checkpoint, store, experts="f32", dense="f32")
    ids = tiny_models.prompt(*request.param, LENGTH)
    want = tiny_models.logits(tiny_models.load(checkpoint), ids).astype(np.float64)
    with moelite.load(store, kv="f32", chunk=CHUNK, context=LENGTH) as model:
        reference = Reference(model.arch, tiny_models.weights(checkpoint))
        reference.forward(ids)
        close = np.min(reference.margins, axis=0) < MARGIN
        safe = ~np.logical_or.accumulate(close)  # later tokens attend to a token that may differ
        yield Case(model, ids, want, safe)


def test_few_positions_are_skipped(case: Case) -> None:
    assert case.safe.mean() > 0.9


def test_full_forward_over_several_chunks(case: Case) -> None:
    case.check(case.model.forward(case.ids))


def test_token_by_token(case: Case) -> None:
    session = case.model.session()
    got = np.concatenate([session.append([i]) for i in case.ids])
    case.check(got)
    np.testing.assert_array_equal(got, case.model.forward(case.ids))  # whatever the chunk


def test_uneven_pieces_and_a_truncation(case: Case) -> None:
    session = case.model.session()
    session.append([3] * 11)
    session.truncate(0)
    parts, at = [], 0
    for size in PIECES:
        parts.append(session.append(case.ids[at : at + size]))
        at += size
    session.append([4] * (LENGTH - at))
    session.truncate(at)
    parts += [session.append([i]) for i in case.ids[at:]]
    assert session.ids == case.ids
    case.check(np.concatenate(parts))


def test_advance_gives_the_last_row(case: Case) -> None:
    last = case.model.session().advance(case.ids)
    np.testing.assert_array_equal(last, case.model.forward(case.ids)[-1])
