"""nf4 and nf4-dq hold bitsandbytes' numbers: against it if installed, else by definition."""

from __future__ import annotations

import numpy as np
import pytest

from moelite.errors import QuantizationError, UnsupportedError
from moelite.quant import FORMATS, nf4_pack, nf4_tiles
from moelite.quant.base import F32
from moelite.quant.codes import Bitsandbytes, Nested

PLAIN, DOUBLE = FORMATS["nf4"], FORMATS["nf4-dq"]


def draw(kind: int, rng: np.random.Generator) -> F32:
    """A random matrix of one of 8 kinds, rows a multiple of 64 long."""
    shape = (int(rng.integers(1, 40)), 64 * int(rng.integers(1, 13)))
    w = rng.normal(size=shape)
    if kind == 1:
        w = rng.standard_t(2, size=shape)
    elif kind == 2:
        w = rng.uniform(-1, 1, shape)
    elif kind == 3:  # from zero's neighbours to float32's end
        w *= 10.0 ** rng.integers(-44, 38, (shape[0], 1))
    elif kind == 4:
        w[rng.random(shape[0]) < 0.5] = 0
    elif kind == 5:
        w[:] = rng.normal()
    elif kind == 6:  # many equal, on the bounds between codes too
        w = np.round(w * 4) / 16
        w[:, ::64] = 1
        w[:, 1::64] = (nf4_pack.TABLE[:-1] + nf4_pack.TABLE[1:])[rng.integers(0, 15)] / 2
    elif kind == 7:
        w *= 10.0 ** rng.integers(-40, -30)
    return np.clip(w, -3e38, 3e38).astype(np.float32)


def taken(weight, state) -> Bitsandbytes:
    """What bitsandbytes made, as a checkpoint holds it."""
    nested = None
    if state.nested:
        inner = state.state2
        nested = Nested(inner.absmax.numpy(), inner.code.numpy(), state.offset.item())
    return Bitsandbytes(weight.numpy(), state.absmax.numpy(), tuple(state.shape), nested)


@pytest.fixture
def torch():
    """torch on one thread: several cost more than they bring here, and may change a mean."""
    module = pytest.importorskip("torch")
    threads = module.get_num_threads()
    module.set_num_threads(1)
    yield module
    module.set_num_threads(threads)


def test_a_thousand_matrices_are_bitsandbytes_own(torch) -> None:
    functional = pytest.importorskip("bitsandbytes").functional
    rng, refused = np.random.default_rng(0), 0
    for i in range(1000):
        w = draw(i % 8, rng)
        given = torch.from_numpy(w)
        for fmt, compress in ((PLAIN, False), (DOUBLE, True)):
            theirs, state = functional.quantize_4bit(
                given, blocksize=64, quant_type="nf4", compress_statistics=compress
            )
            if compress and not torch.isfinite(state.offset):
                refused += 1
                with pytest.raises(QuantizationError, match="mean of absmax"):
                    fmt.pack(w)
                continue
            packed = fmt.pack(w)
            # codes, absmax and offset: all bytes
            np.testing.assert_array_equal(packed, fmt.from_bitsandbytes(taken(theirs, state)))
            want = functional.dequantize_4bit(theirs, state).numpy()
            np.testing.assert_array_equal(fmt.unpack(packed, *w.shape), want)
            # nf4 takes double quantized ones, too
            wide = PLAIN.from_bitsandbytes(taken(theirs, state))
            np.testing.assert_array_equal(PLAIN.unpack(wide, *w.shape), want)
    assert refused < 20


def test_the_map_of_absmax_is_bitsandbytes_own() -> None:
    functional = pytest.importorskip("bitsandbytes").functional
    np.testing.assert_array_equal(nf4_pack.MAP, functional.create_dynamic_map().numpy())
    table = functional.get_4bit_type("nf4", device="cpu").numpy()
    np.testing.assert_array_equal(nf4_pack.TABLE, table)


@pytest.mark.parametrize("size", [1, 5, 7, 8, 31, 33, 1000, 32767, 200_001])
def test_the_mean_is_one_thread_of_torch(torch, size: int) -> None:
    values = np.random.default_rng(size).random(size).astype(np.float32)
    assert nf4_pack.mean(values) == torch.from_numpy(values).mean().item()


def random_state(rows: int, cols: int, seed: int) -> Bitsandbytes:
    """Bytes, absmax codes and nested absmax drawn at random: no mean, no maximum need fit."""
    rng, n = np.random.default_rng(seed), rows * cols // 64
    nested = rng.random(-(-n // 256)).astype(np.float32)
    return Bitsandbytes(
        rng.integers(0, 256, (rows * cols // 2, 1)).astype(np.uint8),
        rng.integers(0, 256, n).astype(np.uint8),
        (rows, cols),
        Nested(nested, nf4_pack.MAP, 1.25),
    )


@pytest.mark.parametrize(
    "shape",
    [(1, 64), (9, 576), (40, 2048), (33, 64 * 31), (70, 64 * 9), (11, 64 * 300), (3, 64 * 513)],
)
def test_nested_blocks_run_across_rows(shape: tuple[int, int]) -> None:
    state = random_state(*shape, seed=shape[0])
    flat = state.weight.reshape(-1)
    codes = np.stack([flat >> 4, flat & 15], axis=1).reshape(-1, 64)
    nested = np.repeat(state.nested.absmax, 256)[: len(codes)]
    absmax = (nf4_pack.MAP[state.absmax] * nested).astype(np.float32) + np.float32(1.25)
    want = (nf4_pack.TABLE[codes] * absmax[:, None]).reshape(shape)
    for fmt in (DOUBLE, PLAIN):
        packed = fmt.from_bitsandbytes(state)
        assert packed.size == fmt.nbytes(*shape)
        np.testing.assert_array_equal(fmt.unpack(packed, *shape), want)


def test_bits_per_weight() -> None:
    assert PLAIN.nbytes(1024, 2048) * 8 / 2**21 == 4.5
    assert DOUBLE.nbytes(1024, 2048) * 8 / 2**21 == 4.140625


def test_bytes_are_frozen() -> None:
    """8 rows of 16 codes in turn, row r times r + 1, at the nibbles that the layout names."""
    codes = np.tile(np.arange(16), 4)[None] + np.zeros((8, 1), int)
    weight = nf4_pack.TABLE[codes] * np.arange(1, 9, dtype=np.float32)[:, None]
    packed = PLAIN.pack(weight)
    assert packed[:32].view(np.float32).tolist() == [1, 2, 3, 4, 5, 6, 7, 8]
    assert not packed[32:128].any()  # of columns that are not there
    # columns 0-3 (low) and 4-7 (high) of row 0, then of row 1; then columns 8-11 and 12-15
    assert packed[128:136].tolist() == [0x40, 0x51, 0x62, 0x73] * 2
    assert packed[160:164].tolist() == [0xC8, 0xD9, 0xEA, 0xFB]
    assert packed.size == 128 + 2 * 128
    double = DOUBLE.pack(weight)
    assert double[:12].view(np.float32).tolist() == [4.5, 0, 3.5]  # the mean, none before, nested
    assert double[32] == 0  # -3.5 of 3.5: the least entry, -.993
    assert double[39] == 255
    np.testing.assert_array_equal(double[64:], packed[128:])


def test_three_bytes_hold_the_table() -> None:
    planes = nf4_tiles.PLANES.reshape(3, 16).astype(np.float64)
    held = (planes[0] + (planes[1] + planes[2] / 254) / 254) * float(nf4_tiles.STEP)
    assert (np.abs(held - nf4_pack.TABLE) <= 1.2e-7 * np.abs(nf4_pack.TABLE)).all()
    assert np.abs(planes).max() <= 127


def test_what_cannot_be_taken_over_is_refused() -> None:
    state = random_state(8, 128, 0)
    for kind in ({"quant_type": "fp4"}, {"blocksize": 128}):
        with pytest.raises(UnsupportedError, match="only 'nf4' in blocks of 64"):
            PLAIN.from_bitsandbytes(state._replace(**kind))
    with pytest.raises(QuantizationError, match="rows of 96 values"):
        PLAIN.from_bitsandbytes(state._replace(shape=(8, 96)))
    with pytest.raises(QuantizationError, match="that takes 1024 and 32"):
        PLAIN.from_bitsandbytes(state._replace(shape=(16, 128)))
    with pytest.raises(QuantizationError, match="expected uint8 and float32"):
        PLAIN.from_bitsandbytes(state._replace(nested=None))
    short = state.nested._replace(absmax=np.zeros(2, np.float32))
    with pytest.raises(QuantizationError, match="nested absmax"):
        PLAIN.from_bitsandbytes(state._replace(nested=short))
    other = nf4_pack.MAP.copy()
    other[0] = -1  # as early versions had it
    older = state._replace(nested=state.nested._replace(table=other))
    with pytest.raises(QuantizationError, match="by another map"):
        DOUBLE.from_bitsandbytes(older)
    assert PLAIN.from_bitsandbytes(older).size == PLAIN.nbytes(8, 128)
