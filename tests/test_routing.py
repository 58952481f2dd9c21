"""Routing against float64 numpy and torch.topk, and its promises: ties, NaN, batch invariance."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from moelite.arch import Linear, Router, TensorRef
from moelite.routing import route

# float32: logit - maximum, at most 60 here, rounds by 60 * 2^-24 = 3.6e-6 before exp; the sum, exp
# and divisions add under 1e-6.
RTOL = 6e-6


def router(experts: int, top_k: int, *, renormalize: bool = False, scale: float = 1.0) -> Router:
    linear = Linear(weight=TensorRef(name="gate"), rows=experts, cols=1)
    return Router(linear=linear, top_k=top_k, renormalize=renormalize, scale=scale)


@st.composite
def cases(draw: st.DrawFn) -> tuple[npt.NDArray[np.float32], int, bool]:
    experts = draw(st.integers(1, 64))
    shape = (draw(st.integers(0, 5)), experts)
    values = st.floats(-30, 30, width=32) | st.integers(-3, 3).map(float)  # the latter: ties
    logits = draw(hnp.arrays(np.float32, shape, elements=values))
    return logits, draw(st.integers(1, experts)), draw(st.booleans())


@given(cases(), st.sampled_from([1.0, 2.5]))
@settings(deadline=None, max_examples=200)
def test_equals_float64(case: tuple[npt.NDArray[np.float32], int, bool], scale: float) -> None:
    logits, top_k, renormalize = case
    chosen, weights = route(
        router(logits.shape[1], top_k, renormalize=renormalize, scale=scale), logits
    )
    assert chosen.dtype == np.int32
    assert weights.dtype == np.float32
    assert chosen.shape == weights.shape == (len(logits), top_k)

    exact = np.exp(logits.astype(np.float64) - logits.max(-1, keepdims=True, initial=-np.inf))
    exact /= exact.sum(-1, keepdims=True)
    best = -np.sort(-exact, axis=-1)[:, :top_k]
    own = np.take_along_axis(exact, chosen.astype(np.int64), -1)
    np.testing.assert_allclose(own, best, rtol=RTOL, err_msg="a better expert was left out")
    assert all(len(set(row)) == top_k for row in chosen.tolist())
    want = own / own.sum(-1, keepdims=True) if renormalize else own
    np.testing.assert_allclose(weights, want * scale, rtol=RTOL)


@given(st.integers(1, 40).flatmap(lambda e: st.permutations(range(e))), st.data())
@settings(deadline=None)
def test_order_is_by_descending_score(order: list[int], data: st.DataObject) -> None:
    logits = np.array([order], np.float32) / 4
    top_k = data.draw(st.integers(1, len(order)))
    chosen, _ = route(router(len(order), top_k), logits)
    assert chosen[0].tolist() == sorted(range(len(order)), key=lambda e: -order[e])[:top_k]


@given(cases(), st.sampled_from([1.0, 2.5]), st.data())
@settings(deadline=None, max_examples=100)
def test_given_experts_get_their_own_weights(
    case: tuple[npt.NDArray[np.float32], int, bool], scale: float, data: st.DataObject
) -> None:
    logits, top_k, renormalize = case
    rule = router(logits.shape[1], top_k, renormalize=renormalize, scale=scale)
    orders = [data.draw(st.permutations(range(logits.shape[1])))[:top_k] for _ in logits]
    want = np.array(orders, np.int32).reshape(len(logits), top_k)
    chosen, weights = route(rule, logits, want)
    np.testing.assert_array_equal(chosen, want)
    exact = np.exp(logits.astype(np.float64) - logits.max(-1, keepdims=True, initial=-np.inf))
    exact /= exact.sum(-1, keepdims=True)
    own = np.take_along_axis(exact, want.astype(np.int64), -1)
    own = own / own.sum(-1, keepdims=True) if renormalize else own
    np.testing.assert_allclose(weights, own * scale, rtol=RTOL)
    free = route(rule, logits)
    for got, same in zip(route(rule, logits, free[0]), free, strict=True):
        np.testing.assert_array_equal(got, same)


def test_given_experts_without_any_score_weigh_nothing() -> None:
    logits = np.array([[0, -300, -300, 0]], np.float32)
    weights = route(router(4, 2, renormalize=True), logits, np.array([[2, 1]], np.int32))[1]
    assert weights.tolist() == [[0, 0]]


def test_ties_go_to_the_lower_id() -> None:
    logits = np.array([[0, 2, 1, 2, 1, 2, 0, 1]], np.float32)
    chosen, weights = route(router(8, 6), logits)
    assert chosen.tolist() == [[1, 3, 5, 2, 4, 7]]
    assert len(set(weights[0, :3].tolist())) == 1


def test_equals_torch_topk() -> None:
    torch = pytest.importorskip("torch", reason="compares with torch.topk")
    rng = np.random.default_rng(0)
    logits = rng.standard_normal((200, 60)).astype(np.float32)
    scores, ids = torch.topk(torch.softmax(torch.from_numpy(logits), -1), 6, -1)
    chosen, weights = route(router(60, 6), logits)
    np.testing.assert_array_equal(chosen, ids.numpy())
    np.testing.assert_allclose(weights, scores.numpy(), rtol=RTOL)
    chosen, weights = route(router(60, 6, renormalize=True), logits)
    np.testing.assert_array_equal(chosen, ids.numpy())
    scores /= scores.sum(-1, keepdim=True)
    np.testing.assert_allclose(weights, scores.numpy(), rtol=RTOL)


def test_a_row_does_not_depend_on_its_batch() -> None:
    rng = np.random.default_rng(1)
    for experts in (7, 64, 128):
        logits = rng.standard_normal((33, experts)).astype(np.float32)
        rule = router(experts, 4, renormalize=True)
        chosen, weights = route(rule, logits)
        for t in range(33):
            one_chosen, one_weights = route(rule, logits[t : t + 1])
            np.testing.assert_array_equal(one_chosen[0], chosen[t])
            np.testing.assert_array_equal(one_weights[0], weights[t])


@pytest.mark.parametrize("bad", [np.nan, np.inf])
@pytest.mark.parametrize("renormalize", [False, True])
def test_damage_stays_visible_and_in_range(bad: float, renormalize: bool) -> None:
    logits = np.zeros((3, 8), np.float32)
    logits[1, 5] = bad
    chosen, weights = route(router(8, 3, renormalize=renormalize), logits)
    assert chosen.tolist() == [[0, 1, 2]] * 3
    assert np.isnan(weights[1]).all()
    assert np.isfinite(weights[[0, 2]]).all()
    chosen, weights = route(router(8, 3), np.full((1, 8), -np.inf, np.float32))
    assert chosen.tolist() == [[0, 1, 2]]


def test_extreme_logits_do_not_overflow() -> None:
    logits = np.array([[3e38, -3e38, 3e38, -np.inf]], np.float32)
    chosen, weights = route(router(4, 4), logits)
    assert chosen.tolist() == [[0, 2, 1, 3]]
    assert weights.tolist() == [[0.5, 0.5, 0.0, 0.0]]


def test_read_only_and_strided_logits() -> None:
    logits = np.arange(24, dtype=np.float32).reshape(3, 8)
    want = route(router(8, 2), logits)
    turned = np.asfortranarray(logits)
    turned.flags.writeable = False
    for got, expected in zip(route(router(8, 2), turned), want, strict=True):
        np.testing.assert_array_equal(got, expected)


def test_wrong_shape_is_our_bug() -> None:
    with pytest.raises(ValueError, match="do not fit 8 experts"):
        route(router(8, 2), np.zeros((3, 7), np.float32))
