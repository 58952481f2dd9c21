"""What calibration knows: the factor that error feedback walks along, against float64 algebra."""

from __future__ import annotations

import numpy as np
import pytest

from moelite.quant.curvature import DAMPING, curvature


def inputs(rows: int, cols: int) -> np.ndarray:
    rng = np.random.default_rng(3)
    return rng.normal(size=(rows, cols)) @ rng.normal(size=(cols, cols))


def test_the_factor_is_that_of_the_damped_inverse() -> None:
    x = inputs(400, 24)
    h = x.T @ x / len(x)
    damped = h + DAMPING * np.diagonal(h).mean() * np.eye(24)
    found = curvature(h.astype(np.float32))
    u, r = found.factor.astype(np.float64), found.root.astype(np.float64)
    np.testing.assert_array_equal(u, np.triu(u))
    np.testing.assert_array_equal(r, np.triu(r))
    np.testing.assert_allclose(u.T @ u @ damped, np.eye(24), atol=1e-4)
    np.testing.assert_allclose(r @ r.T, damped, rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(found.importance, np.diagonal(h), rtol=1e-5)


def test_feedback_along_the_factor_is_the_best_there_is() -> None:
    # after columns 0..4 got an error, the change of the others that keeps the outputs closest
    x = inputs(400, 12)
    h = x.T @ x / len(x)
    h += DAMPING * np.diagonal(h).mean() * np.eye(12)
    found = curvature(h.astype(np.float32), damping=0.0)
    error = np.random.default_rng(4).normal(size=(3, 4))
    white = error @ found.root[:4, :4]
    change = -white @ found.factor[:4, 4:]
    best = np.linalg.solve(h[4:, 4:], h[4:, :4] @ error.T).T
    np.testing.assert_allclose(change, best, rtol=1e-3, atol=1e-4)
    whole = np.concatenate([error, -change], 1)
    loss = np.einsum("oi,ij,oj->", whole, h, whole)
    assert loss == pytest.approx((white**2).sum(), rel=1e-4)


def test_few_or_no_inputs_still_give_a_factor() -> None:
    x = inputs(3, 16)
    x[:, 5] = 0
    found = curvature((x.T @ x).astype(np.float32))
    assert np.isfinite(found.factor).all()
    assert found.importance[5] == 0
    # an input that was never seen takes no part in the feedback
    assert abs(found.factor[5, 6:]).max() == 0
    nothing = curvature(np.zeros((8, 8), np.float32))
    np.testing.assert_array_equal(nothing.factor, np.eye(8, dtype=np.float32))
