"""The qmoe formats: their dictionary, their codes, their sizes, and how symbols are chosen."""

from __future__ import annotations

import heapq

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moelite.dispatch import matrix_of, multiply, new_act, quantize_row
from moelite.errors import QuantizationError
from moelite.quant import FORMATS
from moelite.quant.base import F32, U8, Job
from moelite.quant.curvature import Curvature, curvature
from moelite.quant.qmoe import symbols_of
from moelite.quant.qmoe_dictionary import dictionary

both = pytest.mark.parametrize("name", ["qmoe", "qmoe-ls"])
# Runs of 1 to 14 pairs among the entries, from the rule of the paper by other means.
HISTOGRAM = [9, 65, 233, 577, 1161, 2049, 3305, 4993, 7177, 9921, 13289, 17345, 3843, 1569]


def ternary(rows: int, cols: int, p0: float, seed: int = 0) -> F32:
    """Rows of 0, -1 and 2, which the published choice of levels gives back as they are."""
    rng = np.random.default_rng(seed)
    p1 = (1 - p0) / 2
    return rng.choice(np.array([0, -1, 2], np.float32), size=(rows, cols), p=[p0, p1, 1 - p0 - p1])


def runs() -> list[tuple[int, ...]]:
    """The symbols of every code, read off the masks one by one."""
    out = []
    for ones, twos in dictionary().masks.tolist():
        count = 2 * (ones >> 28)
        assert twos >> count == 0
        assert (ones & 0xFFFFFFF) >> count == 0
        assert ones & twos == 0
        out.append(tuple((ones >> i & 1) + 2 * (twos >> i & 1) for i in range(count)))
    return out


def test_the_dictionary_is_what_its_rule_gives() -> None:
    """The rule as it is written: a heap of runs, the most probable one first."""
    p = [0.885, 0.0575, 0.0575]
    pairs = [((r % 3, r // 3), p[r % 3] * p[r // 3]) for r in range(9)]
    heap, want = [(-1.0, ())], []
    while len(want) < 65536:
        size, run = heapq.heappop(heap)
        if run:
            want.append((run, -size))
        if len(run) < 28:
            for pair, chance in pairs:
                heapq.heappush(heap, (size * chance, run + pair))
    found = runs()
    assert len(set(found)) == 65536
    assert np.bincount([len(run) // 2 for run in found]).tolist() == [0, *HISTOGRAM]
    assert np.bincount([len(run) // 2 for run, _ in want]).tolist() == [0, *HISTOGRAM]
    chance = [np.prod([p[s] for s in run]) for run in found]
    np.testing.assert_allclose(chance, [c for _, c in want], rtol=1e-9)
    # the last class has more runs than there is room for, and all are equally probable
    least = min(chance) * (1 + 1e-9)
    certain = {run for run, c in want if c > least}
    assert certain == {run for run, c in zip(found, chance, strict=True) if c > least}
    assert len(certain) == 65536 - 2490


def test_a_run_without_an_end_of_it_is_an_entry() -> None:
    """So a greedy parse always ends exactly, and no other parse has fewer codes."""
    entries = set(runs())
    assert all(run[2:] in entries and run[:-2] in entries for run in entries if len(run) > 2)


def test_steps_lead_to_longer_runs() -> None:
    entries = runs()
    number, following = {run: i for i, run in enumerate(entries)}, dictionary().next
    for code in [0, 1, 8, 100, 5000, 65535]:
        for r in range(9):
            longer = (*entries[code], r % 3, r // 3)
            assert following[code + 1, r] == number.get(longer, -1) + 1
    assert following[0].tolist() == [number[r % 3, r // 3] + 1 for r in range(9)]


@settings(max_examples=150, deadline=None)
@given(
    rows=st.integers(1, 20),
    cols=st.one_of(st.integers(1, 130), st.sampled_from([575, 2048])),
    p0=st.sampled_from([0.0, 0.3, 0.7, 0.885, 0.95, 0.999, 1.0]),
    seed=st.integers(0, 2**32 - 1),
)
def test_ternary_rows_come_back_exactly(rows: int, cols: int, p0: float, seed: int) -> None:
    fmt, weight = FORMATS["qmoe"], ternary(rows, cols, p0, seed)
    packed = fmt.pack(weight)
    np.testing.assert_array_equal(fmt.unpack(packed, rows, cols), weight)
    fmt.check(packed, rows, cols)


def test_extreme_rows() -> None:
    fmt, weight = FORMATS["qmoe"], np.zeros((6, 301), np.float32)
    weight[1] = 2
    weight[2] = -1
    weight[3, 300] = 5  # the one weight shares its pair with the padding
    weight[4, ::2], weight[4, 1::2] = 2, -1
    packed = fmt.pack(weight)
    np.testing.assert_array_equal(fmt.unpack(packed, 6, 301), weight)
    offsets = packed[:28].view(np.uint32)
    # 302 symbols: 10 runs of 28 zeros, then 11 pairs of zeros. No run of four 2s is an entry, but
    # one of three and the padding is.
    assert offsets[:3].tolist() == [0, 11, 11 + 150]


@pytest.mark.parametrize("cols", [2048, 3000, 4096])
def test_bits_at_the_dictionarys_own_sparsity(cols: int) -> None:
    fmt, size = FORMATS["qmoe"], 1000 * cols
    counts = [size - 2 * round(0.0575 * size), round(0.0575 * size), round(0.0575 * size)]
    symbols = np.repeat(np.array([0, -1, 2], np.float32), counts)
    weight = np.random.default_rng(0).permutation(symbols).reshape(1000, cols)
    packed = fmt.pack(weight)
    found = fmt.statistics(packed, 1000, cols)
    assert found.bits == 8 * packed.size / size
    assert found.bits <= 0.77
    assert packed.size * 20 <= 2 * size
    assert found.zeros == pytest.approx(0.885, abs=1e-6)
    # - .885 log2 .885 - .115 log2 .0575
    assert found.entropy == pytest.approx(0.6298, abs=1e-4)
    assert fmt.nbytes(1000, cols) == pytest.approx(packed.size, rel=0.01)


def test_fitted_levels_keep_to_a_size() -> None:
    """Whatever calibration does to the weights, and with rows of very different sizes."""
    fmt, rng = FORMATS["qmoe-ls"], np.random.default_rng(5)
    weight = (rng.normal(size=(256, 640)) * rng.lognormal(0, 0.5, (256, 1))).astype(np.float32)
    for curve in (None, curve_of(inputs(2000, 640))):
        packed = fmt.pack(weight, curve)
        assert fmt.statistics(packed, 256, 640).bits == pytest.approx(0.745 + 64 / 640, abs=0.02)
        assert packed.size == pytest.approx(fmt.nbytes(256, 640), rel=0.03)


def test_statistics_of_counted_symbols() -> None:
    weight = np.array([[0, 0, 0, 0, -1, -1, 2, 0]], np.float32)
    fmt = FORMATS["qmoe"]
    found = fmt.statistics(fmt.pack(weight), 1, 8)
    assert found.zeros == 5 / 8
    assert found.entropy == pytest.approx(5 / 8 * np.log2(8 / 5) + 2 / 8 * 2 + 1 / 8 * 3)
    assert found.bits == 8 * 64 / 8
    nothing = fmt.statistics(fmt.pack(0 * weight), 1, 8)
    assert (nothing.zeros, nothing.entropy) == (1, 0)


def test_bytes_are_frozen() -> None:
    """Two rows of one code each, typed by hand but for the codes, and the first codes' meaning."""
    packed = FORMATS["qmoe"].pack(np.array([[0, 0, -1.5, 0], [0, 0, 0, 3]], np.float32))
    assert packed[:12].view(np.uint32).tolist() == [0, 1, 2]
    assert packed[12:20].view(np.uint16).tolist() == [0xBFC0, 0, 0, 0x4040]
    entries = runs()
    codes = packed[20:24].view(np.uint16)
    assert [entries[code] for code in codes] == [(0, 0, 1, 0), (0, 0, 0, 2)]
    assert not packed[24:].any()
    assert packed.size == 64
    # the most probable runs are those of zeros, up to 12 pairs: .885^24 = .053, .885 * .0575 = .051
    assert entries[:13] == [*((0, 0) * n for n in range(1, 13)), (0, 2)]


def damaged(packed: U8, at: int, value: int, kind: type = np.uint8) -> U8:
    out = packed.copy()
    out.view(kind)[at] = value
    return out


def test_damaged_bytes_are_refused() -> None:
    fmt, weight = FORMATS["qmoe"], ternary(9, 200, 0.8)
    packed = fmt.pack(weight)
    count, first = int(packed[:40].view(np.uint32)[9]), (40 + 36) // 2
    cases = {
        "not in order": [
            damaged(packed, 0, 1, np.uint32),
            damaged(packed, 4, 0, np.uint32),
            damaged(packed, 4, 2**31, np.uint32),
        ],
        "names .* codes and has": [damaged(packed, 9, 2**32 - 1, np.uint32), packed[:-64].copy()],
        "row 3 are not 200": [
            damaged(packed, 4, int(packed[:40].view(np.uint32)[4]) - 1, np.uint32)
        ],
        # 14 pairs of zeros, or one, in the place of a code that was something else
        "row 0 are not 200": [damaged(packed, first, runs().index((0, 0) * 14), np.uint16)],
        "row 8 are not 200": [damaged(packed, first + count - 2, 0, np.uint16)],
        "at least": [packed[:75].copy(), packed.view(np.int8), packed.reshape(2, -1)],
    }
    assert runs()[packed.view(np.uint16)[first]] != (0, 0) * 14
    for message, versions in cases.items():
        for version in versions:
            with pytest.raises(QuantizationError, match=message):
                fmt.check(version, 9, 200)
            with pytest.raises(QuantizationError, match=message):
                fmt.unpack(version, 9, 200)
    for shape in ((9, 198), (9, 202), (8, 200), (10, 200)):
        with pytest.raises(QuantizationError):
            fmt.check(packed, *shape)
    # more bytes behind a matrix do not matter: it may lie in a record
    fmt.check(np.concatenate([packed, packed]), 9, 200)


def inputs(tokens: int, cols: int, seed: int = 0) -> np.ndarray:
    """Correlated, some columns much larger than others, as a model's."""
    rng = np.random.default_rng(seed)
    mix = rng.normal(size=(cols // 4, cols)) * rng.lognormal(size=cols)
    return rng.normal(size=(tokens, cols // 4)) @ mix + 0.3 * rng.normal(size=(tokens, cols))


def output_error(weight: F32, back: F32, x: np.ndarray) -> float:
    return float((((weight - back) @ x.T) ** 2).sum() / ((weight @ x.T) ** 2).sum())


def curve_of(x: np.ndarray) -> Curvature:
    return curvature((x.T @ x / len(x)).astype(np.float32), 0.1)


@both
def test_calibration_makes_outputs_better(name: str) -> None:
    """On inputs that calibration has not seen."""
    x, fmt = inputs(6000, 320), FORMATS[name]
    weight = np.random.default_rng(1).normal(size=(64, 320)).astype(np.float32)
    plain = fmt.unpack(fmt.pack(weight), 64, 320)
    fed = fmt.unpack(fmt.pack(weight, curve_of(x[:4000])), 64, 320)
    assert output_error(weight, fed, x[4000:]) < 0.6 * output_error(weight, plain, x[4000:])


def test_fitted_levels_beat_the_published_ones() -> None:
    x = inputs(6000, 320)
    weight = np.random.default_rng(2).normal(size=(64, 320)).astype(np.float32)
    errors, bits = {}, {}
    for name in ("qmoe", "qmoe-ls"):
        packed = FORMATS[name].pack(weight, curve_of(x[:4000]))
        back = FORMATS[name].unpack(packed, 64, 320)
        errors[name] = output_error(weight, back, x[4000:])
        bits[name] = FORMATS[name].statistics(packed, 64, 320).bits
    assert errors["qmoe-ls"] < 0.9 * errors["qmoe"]
    assert bits["qmoe-ls"] < bits["qmoe"]


@pytest.mark.parametrize("calibrated", [False, True])
def test_fitted_levels_are_the_least_squares_ones(calibrated: bool) -> None:
    """No level of any row can be moved for the better, by more than bf16's rounding."""
    x = inputs(2000, 96)
    curve = curve_of(x) if calibrated else None
    h = np.eye(96) if curve is None else curve.root.astype(float) @ curve.root.T
    weight = np.random.default_rng(3).normal(size=(24, 96)).astype(np.float32)
    fmt = FORMATS["qmoe-ls"]
    packed = fmt.pack(weight, curve)
    symbols, back = symbols_of(packed, 24, 96), fmt.unpack(packed, 24, 96).astype(float)
    error = weight - back
    for r in range(24):
        places = np.stack([symbols[r] == 1, symbols[r] == 2]).astype(float)
        # a row may lack one of the symbols
        want = np.linalg.lstsq(places @ h @ places.T, places @ h @ weight[r])[0]
        best = weight[r] - want @ places
        assert error[r] @ h @ error[r] <= 1.001 * (best @ h @ best)


def test_published_levels_are_the_rows_ends() -> None:
    weight = np.array([[-3, 1.4, 1.6, -1.4, -1.6, 3]], np.float32)
    back = FORMATS["qmoe"].unpack(FORMATS["qmoe"].pack(weight), 1, 6)
    assert back.tolist() == [[-3, 0, 3, 0, -3, 3]]
    one_sided = np.array([[0.2, 1, 0.4, 0.6]], np.float32)
    back = FORMATS["qmoe"].unpack(FORMATS["qmoe"].pack(one_sided), 1, 4)
    assert back.tolist() == [[0, 1, 0, 1]]


@both
@pytest.mark.parametrize("size", [-110, -60, 60, 127])
def test_weights_of_any_size(name: str, size: float) -> None:
    weight = (np.random.default_rng(4).normal(size=(16, 256)).clip(-3, 3) / 3).astype(np.float32)
    fmt = FORMATS[name]
    want = fmt.unpack(fmt.pack(weight), 16, 256)
    found = fmt.unpack(fmt.pack(np.ldexp(weight, size)), 16, 256)
    np.testing.assert_array_equal(np.ldexp(found, -size), want)
    with pytest.raises(QuantizationError, match="beyond bf16"):
        FORMATS["qmoe"].pack(np.full((1, 2), 3.4e38, np.float32))


def test_rows_that_are_not_there_come_out_as_zeros() -> None:
    """A result has whole tiles of 8 rows: what is left over of a tile must not hold leftovers."""
    fmt, weight = FORMATS["qmoe"], ternary(19, 64, 0.5)
    packed, tokens = fmt.pack(weight), 9
    act = new_act(tokens, 64, quantized=True)
    act.x[:] = 1
    for row in range(tokens):
        quantize_row(act, row)
    out = np.full((tokens, 24), np.nan, np.float32)
    order = np.arange(tokens, dtype=np.int32)
    for last in (1, tokens):
        job = Job(order, order, 0, last, out.reshape(-1), 24)
        multiply(matrix_of("qmoe", packed, 0, 19, 64), act, job, 0, 19, 0)
        np.testing.assert_allclose(out[:last, :19], weight.sum(1)[None].repeat(last, 0), rtol=1e-6)
        assert not out[:last, 19:].any()
