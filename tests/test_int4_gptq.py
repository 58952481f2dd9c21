"""int4 with calibration: the output error that error feedback promises, against float64 algebra."""

from __future__ import annotations

import numpy as np
import pytest

from moelite.quant import FORMATS
from moelite.quant.curvature import Curvature, curvature

INT4 = FORMATS["int4"]


def correlated(tokens: int, cols: int, seed: int = 0) -> np.ndarray:
    """Inputs as hidden states are: a few directions hold most, some columns are larger."""
    rng = np.random.default_rng(seed)
    mix = rng.normal(size=(cols, cols)) * (1 + np.arange(cols))[:, None] ** -0.6
    return rng.normal(size=(tokens, cols)) @ mix * rng.lognormal(0, 0.5, cols)


def hessian(x: np.ndarray) -> np.ndarray:
    return x.T @ x / len(x)


def loss(weight: np.ndarray, packed: np.ndarray, h: np.ndarray) -> float:
    """tr(E H E^T) / tr(W H W^T) in float64."""
    exact = weight.astype(np.float64)
    error = INT4.unpack(packed, *weight.shape) - exact
    return float(np.sum((error @ h) * error) / np.sum((exact @ h) * exact))


def weights(rows: int, cols: int, seed: int = 1) -> np.ndarray:
    return np.random.default_rng(seed).normal(0, 0.05, (rows, cols)).astype(np.float32)


def only_importance(h: np.ndarray) -> Curvature:
    return curvature(np.diag(np.diagonal(h)).astype(np.float32))


def test_each_part_of_calibration_takes_error_away() -> None:
    """By the means seen on these inputs: importance -8 %, feedback to a ninth of that."""
    h, weight = hessian(correlated(4000, 320)), weights(64, 320)
    plain = loss(weight, INT4.pack(weight), h)
    weighed = loss(weight, INT4.pack(weight, only_importance(h)), h)
    fed = loss(weight, INT4.pack(weight, curvature(h.astype(np.float32))), h)
    assert weighed < 0.95 * plain
    assert fed < 0.25 * weighed


def test_it_is_as_good_as_gptq_written_down_plainly() -> None:
    """Column by column in float64, with unbounded scales: no better than 1.05 of this loss."""
    h, weight = hessian(correlated(4000, 96)), weights(8, 96)
    curve = curvature(h.astype(np.float32))
    packed = INT4.pack(weight, curve)
    factor, work = curve.factor.astype(np.float64), weight.astype(np.float64)
    table = packed[32:48].view(np.int8).astype(np.float64)
    found = np.empty_like(work)
    for c in range(96):
        if c % 32 == 0:
            block = work[:, c : c + 32]
            tried = np.abs(block).max(1, keepdims=True) / np.array([-73, -63, -54, 54, 63, 73])
            near = table[
                np.abs(block[:, None, :, None] / tried[..., None, None] - table).argmin(-1)
            ]
            miss = (
                np.square(block[:, None] - near * tried[..., None])
                / np.diagonal(factor)[c : c + 32] ** 2
            )
            scale = np.take_along_axis(tried, miss.sum(-1).argmin(1)[:, None], 1)[:, 0]
        code = np.abs(work[:, c, None] / scale[:, None] - table).argmin(-1)
        found[:, c] = table[code] * scale
        error = (work[:, c] - found[:, c]) / factor[c, c]
        work[:, c:] -= error[:, None] * factor[c, c:]
    error = found - weight
    plain = np.sum((error @ h) * error) / np.sum((weight @ h) * weight)
    assert loss(weight, packed, h) < 1.05 * plain


@pytest.mark.parametrize("shape", [(64, 64), (75, 72), (8, 32), (1, 7), (17, 300)])
def test_pieces_give_the_bytes_of_the_whole(shape: tuple[int, int]) -> None:
    rows, cols = shape
    weight = weights(rows, cols)
    curve = curvature(hessian(correlated(500, cols)).astype(np.float32))
    whole = INT4.pack(weight, curve)
    pieces = np.zeros_like(whole)
    for start in range(0, rows, 8):
        INT4.pack_rows(pieces, rows, cols, start, weight[start : start + 8], curve)
    np.testing.assert_array_equal(pieces, whole)


@pytest.mark.parametrize("cols", [72, 300])
def test_padding_takes_no_part(cols: int) -> None:
    h, weight = hessian(correlated(2000, cols)), weights(16, cols)
    packed = INT4.pack(weight, curvature(h.astype(np.float32)))
    assert loss(weight, packed, h) < 0.25 * loss(weight, INT4.pack(weight), h)


def test_unseen_inputs_and_empty_rows_are_rounded_as_ever() -> None:
    x, weight = correlated(500, 96), weights(16, 96)
    x[:, 32:64] = 0
    weight[3], weight[4, :32] = 0, 0
    found = INT4.unpack(INT4.pack(weight, curvature(hessian(x).astype(np.float32))), 16, 96)
    assert np.isfinite(found).all()
    assert not found[3].any()
    unseen = np.square(found[:, 32:64] - weight[:, 32:64]).sum() / np.square(weight[:, 32:64]).sum()
    assert unseen < 8e-3
    nothing = curvature(np.zeros((96, 96), np.float32))
    got = INT4.unpack(INT4.pack(weight, nothing), 16, 96)
    assert np.square(got - weight).sum() / np.square(weight).sum() < 8e-3


def test_a_tile_of_few_values_gets_a_table_that_has_them() -> None:
    """The other tile's weights are normal: its table stays within the noise of 2,048 of them."""
    levels = np.array([-1, -0.57, -0.2, 0.09, 0.43, 0.9], np.float32)
    weight = np.random.default_rng(4).choice(levels, (16, 256))
    weight[:8] = weights(8, 256)
    fitted, plain = INT4.pack(weight, only_importance(np.eye(256))), INT4.pack(weight)
    tables = fitted.reshape(2, -1)[:, 32:48].view(np.int8).astype(int)
    assert np.abs(tables[0] - plain[32:48].view(np.int8)).max() <= 4
    assert np.abs(tables).max() <= 63
    found = (INT4.unpack(packed, 16, 256) for packed in (fitted, plain))
    error = [np.square(part[8:] - weight[8:]).sum() for part in found]
    assert error[0] < 0.3 * error[1]
