"""The vq formats: their layout, their codes against brute force, and what calibration is worth."""

from __future__ import annotations

import numpy as np
import pytest

from moelite.quant import FORMATS
from moelite.quant.base import F32, empty_packed
from moelite.quant.curvature import Curvature, curvature
from moelite.quant.vq_tables import LIMIT, PLANES, read_tables

each = pytest.mark.parametrize("name", PLANES)
TABLES = read_tables()


def correlated(tokens: int, cols: int, seed: int = 0) -> np.ndarray:
    """Inputs [tokens, cols], float64, of which a few directions make up the most."""
    rng = np.random.default_rng(seed)
    strong = rng.normal(size=(tokens, cols)) * np.exp(-np.arange(cols) / 10)
    return strong @ rng.normal(size=(cols, cols)) + 0.5 * rng.normal(size=(tokens, cols))


def weights(rows: int, cols: int, seed: int = 0) -> F32:
    return np.random.default_rng(seed).normal(size=(rows, cols), scale=0.05).astype(np.float32)


def calibration(cols: int) -> tuple[np.ndarray, Curvature]:
    """(float64 mean of x x^T, its Curvature)."""
    x = correlated(20 * cols, cols)
    h = x.T @ x / len(x)
    return h, curvature(h.astype(np.float32))


def loss(error: np.ndarray, h: np.ndarray) -> float:
    """tr(E H E^T)."""
    return float(np.einsum("oi,ij,oj->", error, h, error, optimize=True))


@each
def test_the_sums_of_entries_fit_seven_bits(name: str) -> None:
    """And the tables are those of normal weights: what is left of them is what the rate says."""
    most = sum(np.abs(table.astype(int)).max(axis=0).max() for table in TABLES[name])
    assert most <= LIMIT
    assert [t.shape for t in TABLES[name]] == [(256, d) for d in PLANES[name]]
    bits = sum(8 / d for d in PLANES[name])
    assert name == f"vq-{bits:g}"
    # 2048 columns: 16 bits of row scale are .008 of a bit each
    assert FORMATS[name].nbytes(8, 2048) * 8 / (8 * 2048) == pytest.approx(bits, abs=0.01)


def test_bytes_are_frozen() -> None:
    """Codes chosen by hand lie where the layout says, and stand for the sums of their entries."""
    long, short = TABLES["vq-2.5"]
    codes = np.arange(16 + 64) * 7 % 256
    tile = np.zeros(16 + 16 + 64, np.uint8)
    tile[:16] = np.array([0x3F80, 0x4000] * 4, np.uint16).view(np.uint8)  # bf16 1.0 and 2.0
    tile[16:] = codes
    found = FORMATS["vq-2.5"].unpack(tile, 8, 32)
    for row in range(8):
        for col in range(32):
            whole = long[codes[col // 16 * 8 + row], col % 16].astype(int)
            whole += short[codes[16 + col // 4 * 8 + row], col % 4]
            assert found[row, col] == whole * (1, 2)[row % 2]


def _nearest(groups: np.ndarray, table: np.ndarray, root: np.ndarray) -> np.ndarray:
    # the least |(g - entry) root|^2 of each group, by trying all entries
    misses = (groups[:, None] - table[None]) @ root
    return (misses**2).sum(2).min(1)


@pytest.mark.parametrize("name", ["vq-0.5", "vq-1"])
def test_every_group_gets_its_nearest_entry(name: str) -> None:
    weight, table = weights(16, 96), TABLES[name][0].astype(np.float64)
    fmt = FORMATS[name]
    packed = fmt.pack(weight)
    back, d = fmt.unpack(packed, 16, 96).astype(np.float64), table.shape[1]
    bits = fmt.layout.heads(packed, 96).copy().view(np.uint16).astype(np.uint32) << 16
    scale = bits.view(np.float32).reshape(16, 1).astype(np.float64)
    groups = (weight / scale).reshape(-1, d)
    found = ((weight - back) / scale).reshape(-1, d)
    best = _nearest(groups, table, np.eye(d))
    # the scale was fitted to the codes once they were chosen: a little is lost by that
    assert (found**2).sum() <= 1.002 * best.sum()
    assert ((found**2).sum(1) <= best * 1.0001).mean() > 0.9


@each
def test_calibration_pays(name: str) -> None:
    cols = 160
    h, curve = calibration(cols)
    weight, fmt = weights(24, cols), FORMATS[name]
    plain = fmt.unpack(fmt.pack(weight), 24, cols).astype(np.float64) - weight
    known = fmt.unpack(fmt.pack(weight, curve), 24, cols).astype(np.float64) - weight
    assert loss(known, h) < 0.5 * loss(plain, h)
    assert (known**2).sum() > (plain**2).sum()  # it is the outputs that are nearer


@each
def test_without_correlations_calibration_changes_little(name: str) -> None:
    weight, fmt = weights(24, 96), FORMATS[name]
    curve = curvature(np.eye(96, dtype=np.float32))
    plain = fmt.unpack(fmt.pack(weight), 24, 96) - weight
    known = fmt.unpack(fmt.pack(weight, curve), 24, 96) - weight
    assert (known**2).sum() == pytest.approx((plain**2).sum(), rel=0.05)


def test_feedback_beats_the_metric_of_groups_alone() -> None:
    """The blocks of the root without the rest of it: groups do not make up for each other."""
    h, curve = calibration(160)
    blocks = np.kron(np.eye(10), np.ones((16, 16))) > 0
    alone = curve._replace(root=np.where(blocks, curve.root, 0).astype(np.float32))
    weight, fmt = weights(24, 160), FORMATS["vq-0.5"]
    whole, apart = (
        loss(fmt.unpack(fmt.pack(weight, c), 24, 160).astype(np.float64) - weight, h)
        for c in (curve, alone)
    )
    assert whole < 0.8 * apart


@each
def test_calibrated_packing_in_pieces_gives_the_same_bytes(name: str) -> None:
    """300 columns: two rounds of lazy feedback, and a last block that is not whole."""
    rows, cols = 44, 300
    _, curve = calibration(cols)
    weight, fmt = weights(rows, cols), FORMATS[name]
    packed = empty_packed(fmt, rows, cols)
    for start in range(0, rows, 16):
        fmt.pack_rows(packed, rows, cols, start, weight[start : start + 16], curve)
    np.testing.assert_array_equal(packed, fmt.pack(weight, curve))


@each
def test_inputs_that_were_never_seen(name: str) -> None:
    x = correlated(50, 70)
    x[:, 8:40] = 0
    curve = curvature((x.T @ x / len(x)).astype(np.float32))
    weight, fmt = weights(9, 70), FORMATS[name]
    weight[4] = 0
    back = fmt.unpack(fmt.pack(weight, curve), 9, 70)
    assert np.isfinite(back).all()
    assert not back[4].any()
    unseen = ((back - weight)[:, 8:40] ** 2).sum() / (weight[:, 8:40] ** 2).sum()
    assert unseen < 0.75  # rounded with care, too: zeros would be 1
