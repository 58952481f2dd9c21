"""Every format against its own definition: one suite that names no format."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moelite.dispatch import matrix_of, multiply, new_act, quantize_row, unpack_row
from moelite.errors import QuantizationError
from moelite.jit import kernel
from moelite.quant import FORMATS
from moelite.quant.base import (
    F32,
    Job,
    QuantFormat,
    empty_packed,
    fill_record,
    open_record,
    pad,
    pair_rows,
    record_layout,
)

# Largest squared error over squared weight on normal weights: what each format promises.
ERROR = {"f32": 0.0, "bf16": 3e-6, "int8": 3.5e-5, "int4": 5.7e-3, "qmoe": 0.76, "qmoe-ls": 0.56}

each_format = pytest.mark.parametrize("fmt", FORMATS.values(), ids=FORMATS.keys())
_EXACT = [name for name, fmt in FORMATS.items() if fmt.exact]
each_exact_format = pytest.mark.parametrize("fmt", [FORMATS[name] for name in _EXACT], ids=_EXACT)
SHAPES = [(64, 64), (75, 72), (40, 20), (8, 32), (1, 7), (128, 2048), (17, 96)]


def weights(rows: int, cols: int, seed: int = 0) -> F32:
    return np.random.default_rng(seed).normal(size=(rows, cols), scale=0.05).astype(np.float32)


@kernel
def quantize_activations(act, tokens):
    for row in range(tokens):
        quantize_row(act, row)


def product(fmt: QuantFormat, weight: F32, x: F32, pieces: list[int] | None = None):
    """(kernel's x @ W.T, float64's product of what the kernel is given to multiply)."""
    rows, cols = weight.shape
    tokens = len(x)
    packed = fmt.pack(weight)
    act = new_act(tokens, cols, quantized=True)
    act.x.reshape(tokens, -1)[:, :cols] = x
    quantize_activations(act, tokens)
    width = pad(rows, 8)
    out = np.full((tokens, width), np.nan, np.float32)
    order = np.arange(tokens, dtype=np.int32)
    cuts = [0, *(pieces or []), tokens]
    for first, last in itertools.pairwise(cuts):
        job = Job(order, order, first, last, out.reshape(-1), width)
        multiply(matrix_of(fmt.name, packed, 0, rows, cols), act, job, 0, rows, 0)
    seen = x.astype(np.float64)
    if fmt.planes:
        q = act.q.reshape(tokens, -1, 32).astype(np.float64)
        if fmt.planes == 2:
            q += act.rest.reshape(tokens, -1, 32) / 254
        seen = (q * act.scale.reshape(tokens, -1, 1)).reshape(tokens, -1)[:, :cols]
    return out[:, :rows], seen @ fmt.unpack(packed, rows, cols).astype(np.float64).T


@each_format
@pytest.mark.parametrize("shape", SHAPES)
def test_packed_size_and_error(fmt: QuantFormat, shape: tuple[int, int]) -> None:
    weight = weights(*shape)
    packed = fmt.pack(weight)
    assert packed.dtype == np.uint8
    assert packed.shape == (fmt.nbytes(*shape),) or not fmt.exact
    assert packed.size % 64 == 0 or fmt.exact
    back = fmt.unpack(packed, *shape)
    assert back.shape == shape
    few = 4 if weight.size < 500 else 1  # the promise is a mean: allow for small samples
    assert ((back - weight) ** 2).sum() <= few * ERROR[fmt.name] * (weight**2).sum()


@each_format
@settings(max_examples=40, deadline=None)
@given(
    rows=st.integers(1, 70),
    cols=st.integers(1, 200),
    tokens=st.integers(1, 11),
    seed=st.integers(0, 9999),
)
def test_kernel_multiplies_what_unpack_says(fmt, rows, cols, tokens, seed) -> None:
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(tokens, cols)).astype(np.float32)
    got, want = product(fmt, weights(rows, cols, seed), x)
    size = np.sqrt(cols) * 0.05  # a typical result; float32 sums of `cols` terms
    np.testing.assert_allclose(got, want, rtol=1e-5, atol=2e-6 * size)


@each_format
def test_worst_case_sums_do_not_saturate(fmt: QuantFormat) -> None:
    """All weights and activations at their extremes, signs equal and opposite."""
    for sign in (1, -1):
        weight = np.full((16, 4096), 0.5 * sign, np.float32)
        x = np.full((5, 4096), 3.0, np.float32)
        x[1] *= -1
        x[2, ::2] *= -1
        got, want = product(fmt, weight, x)
        np.testing.assert_allclose(got, want, rtol=2e-6, atol=1e-3)


@each_format
def test_a_token_does_not_see_its_neighbours(fmt: QuantFormat) -> None:
    x = np.random.default_rng(1).normal(size=(11, 96)).astype(np.float32)
    whole, _ = product(fmt, weights(40, 96), x)
    for pieces in ([1, 2, 3], [5], [4, 9], list(range(1, 11))):
        pieced, _ = product(fmt, weights(40, 96), x, pieces)
        np.testing.assert_array_equal(whole, pieced)


@each_exact_format
@pytest.mark.parametrize("shape", SHAPES)
def test_packing_in_pieces_gives_the_same_bytes(fmt, shape) -> None:
    weight = weights(*shape)
    packed = empty_packed(fmt, *shape)
    for start in range(0, shape[0], 16):
        fmt.pack_rows(packed, *shape, start, weight[start : start + 16])
    np.testing.assert_array_equal(packed, fmt.pack(weight))


@each_format
@pytest.mark.parametrize("shape", SHAPES)
def test_single_rows_equal_unpack(fmt, shape) -> None:
    packed = fmt.pack(weights(*shape))
    out = np.zeros(shape, np.float32)
    for r in range(shape[0]):
        unpack_row(matrix_of(fmt.name, packed, 0, *shape), r, out[r])
    np.testing.assert_array_equal(out, fmt.unpack(packed, *shape))


@each_format
def test_zero_and_tiny_weights(fmt: QuantFormat) -> None:
    weight = np.zeros((9, 40), np.float32)
    np.testing.assert_array_equal(fmt.unpack(fmt.pack(weight), 9, 40), weight)
    weight[3, 5] = 1e-30
    back = fmt.unpack(fmt.pack(weight), 9, 40)
    assert np.isfinite(back).all()
    assert np.abs(back).max() <= 1e-29


@each_format
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_bad_weights_are_refused(fmt: QuantFormat, bad: float) -> None:
    weight = weights(8, 32)
    weight[2, 3] = bad
    with pytest.raises(QuantizationError, match="1 of 256 weights are NaN or infinite"):
        fmt.pack(weight)


@each_format
def test_a_wrong_size_is_refused(fmt: QuantFormat) -> None:
    with pytest.raises(QuantizationError, match="takes"):
        fmt.unpack(np.zeros(3, np.uint8), 8, 32)


def test_two_planes_hold_16_bits_of_the_activations() -> None:
    act = new_act(1, 4096, quantized=True)
    act.x[:] = np.random.default_rng(0).normal(size=4096)
    quantize_activations(act, 1)
    step = act.scale[:, None].astype(np.float64)
    whole = act.q.reshape(-1, 32) * step
    both = whole + act.rest.reshape(-1, 32) / 254 * step
    x = act.x.reshape(-1, 32)
    assert (np.abs(x - whole) <= step * 0.5001).all()
    assert (np.abs(x - both) <= step * 0.5001 / 254 + 1e-7 * np.abs(x)).all()
    assert (act.bias == -64 * act.q.reshape(-1, 32).astype(int).sum(1)).all()
    assert (act.rest_bias == -64 * act.rest.reshape(-1, 32).astype(int).sum(1)).all()


def test_nan_activations_stay_visible() -> None:
    x = np.ones((1, 64), np.float32)
    x[0, 40] = np.nan
    act = new_act(1, 64, quantized=True)
    act.x[:] = x.reshape(-1)
    quantize_activations(act, 1)
    assert not np.isnan(act.scale[0])
    assert np.isnan(act.scale[1])


def test_bf16_rounds_as_torch() -> None:
    torch = pytest.importorskip("torch")
    weight = weights(16, 64)
    want = torch.tensor(weight).to(torch.bfloat16).float().numpy()
    fmt = FORMATS["bf16"]
    np.testing.assert_array_equal(fmt.unpack(fmt.pack(weight), 16, 64), want)


def test_int8_bytes_are_frozen() -> None:
    """A tile typed by hand: row r, column c holds 4 r - c (scaled so that code = value)."""
    values = (4 * np.arange(8)[:, None] - np.arange(32)[None]).astype(np.float32)
    values[:, 31] = 127  # the block's largest: scale 1
    packed = FORMATS["int8"].pack(values)
    assert packed[:128].view(np.float16).tolist() == [1.0] * 8 + [0.0] * 56  # of 8 blocks
    codes = packed[128:].view(np.int8)
    assert codes[:8].tolist() == [0, -1, -2, -3, 4, 3, 2, 1]  # columns 0-3 of rows 0 and 1
    assert codes[32:36].tolist() == [-4, -5, -6, -7]  # columns 4-7 of row 0
    assert codes[252:256].tolist() == [0, -1, -2, 127]  # columns 28-31 of row 7
    assert packed.size == 128 + 256


def test_int4_bytes_are_frozen() -> None:
    """Rows made of table entries times 2 come back exactly, at the nibbles the layout names."""
    table = [-63, -51, -41, -32, -24, -17, -11, -5, 0, 6, 12, 18, 25, 33, 42, 54]
    index = (np.arange(8)[:, None] + np.arange(32)[None]) % 16
    weight = 2 * np.array(table, np.float32)[index]
    packed = FORMATS["int4"].pack(weight)
    np.testing.assert_allclose(FORMATS["int4"].unpack(packed, 8, 32), weight, rtol=1e-6)
    # byte 0: row 0, column 0 (code 0) low, column 4 (code 4) high
    codes = packed[64 + 64 :]
    assert codes[0] == 0 | 4 << 4
    assert codes[4] == 1 | 5 << 4  # row 1
    assert codes[32] == 8 | 12 << 4  # next pair: columns 8 and 12 of row 0
    assert codes.size == 128
    assert packed[64:128].view(np.int8).tolist() == [127] * 8 + [0] * 56  # scales of 8 blocks
    np.testing.assert_allclose(packed[:32].view(np.float32), 2 / 127, rtol=1e-6)
    assert packed[32:48].view(np.int8).tolist() == table
    assert not packed[48:64].any()


def test_a_tile_is_one_run_of_bytes() -> None:
    """11 blocks: a full group of 8, then one of 3, whose scales have the room of 8 all the same."""
    for name, head, scale, code in (("int4", 64, 8, 128), ("int8", 0, 16, 256)):
        fmt, cols = FORMATS[name], 11 * 32
        assert fmt.tile_bytes(cols) == head + 2 * 8 * scale + 11 * code
        assert fmt.nbytes(17, cols) == 3 * fmt.tile_bytes(cols)
        weight = weights(24, cols)
        packed = fmt.pack(weight)
        # a tile by itself is a matrix
        tile = packed[fmt.tile_bytes(cols) :][: fmt.tile_bytes(cols)].copy()
        np.testing.assert_array_equal(fmt.unpack(tile, 8, cols), fmt.unpack(packed, 24, cols)[8:16])
        # block 8 is the first of the second group
        at = head + 8 * (scale + code)
        changed = packed.copy()
        changed[at : at + scale] = 0
        gone = np.nonzero((fmt.unpack(changed, 24, cols) != fmt.unpack(packed, 24, cols)).any(0))[0]
        assert set(gone) <= set(range(8 * 32, 9 * 32))
        assert gone.size > 25


def test_record_layout_is_whole_pages_and_cache_lines() -> None:
    layout = record_layout(FORMATS["int4"], 72, 40)
    assert layout.record_bytes % 4096 == 0
    assert layout.down % 64 == 0
    assert layout.down >= 2 * FORMATS["int4"].nbytes(40, 72)
    assert layout.payload_bytes == layout.down + FORMATS["int4"].nbytes(72, 40)


@each_exact_format
@pytest.mark.parametrize("size", [40, 33, 7])
def test_a_record_gives_its_matrices_back(fmt: QuantFormat, size: int) -> None:
    """And its first part is a matrix of its own: 8 rows of gate, 8 of up, 8 of gate, ..."""
    gate, up, down = weights(size, 72, 1), weights(size, 72, 2), weights(72, size, 3)
    layout, parts = record_layout(fmt, 72, size), [fmt.pack(w) for w in (gate, up, down)]
    record = fill_record(fmt, layout, *parts)
    for part, found in zip(parts, open_record(fmt, layout, record), strict=True):
        np.testing.assert_array_equal(part, found)
    rows = pair_rows(size)
    both = fmt.unpack(record[: fmt.nbytes(rows, 72)], rows, 72)
    full = np.zeros((2, pad(size, 8), 72), np.float32)
    full[0, :size], full[1, :size] = (fmt.unpack(p, size, 72) for p in parts[:2])
    want = full.reshape(2, -1, 8, 72).transpose(1, 0, 2, 3).reshape(rows, 72)
    np.testing.assert_array_equal(both, want)
