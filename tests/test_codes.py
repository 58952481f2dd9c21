"""4-bit numbers of others come through bit for bit: against the programs that wrote them."""

from __future__ import annotations

import gguf
import numpy as np
import pytest
from gguf import quants

from moelite.dispatch import matrix_of, unpack_row
from moelite.errors import QuantizationError
from moelite.quant import FORMATS
from moelite.quant.base import empty_packed
from moelite.quant.codes import E2M1, IQ4_NL, Q4_0, Coded

ROWS, BLOCKS = 19, 11
CARRIED = {"Q4_0": ("int4-f16", Q4_0), "IQ4_NL": ("int4-f16", IQ4_NL), "MXFP4": ("mxfp4", E2M1)}
BF16 = 1 << 16  # what a float32's bits are cut to a multiple of


def ggml_blocks(name: str, rng: np.random.Generator) -> tuple[np.ndarray, Coded]:
    """(random bytes of a ggml type [ROWS, BLOCKS * block bytes], the same as Coded)."""
    halves = rng.integers(0, 256, (ROWS, BLOCKS, 16)).astype(np.uint8)
    # of a block's 32 codes the first 16 are low halves
    codes = np.concatenate([halves & 15, halves >> 4], axis=2).reshape(ROWS, -1)
    if name == "MXFP4":
        raw = rng.integers(0, 253, (ROWS, BLOCKS, 1)).astype(np.uint8)
        scales = np.ldexp(np.float32(1), raw[..., 0].astype(int) - 128)
    else:
        d = (rng.normal(size=(ROWS, BLOCKS, 1)) * 10.0 ** rng.integers(-7, 4, (ROWS, 1, 1))).astype(
            np.float16
        )
        d[3, :4, 0] = [0, 65504, -65504, 2.0**-24]
        raw, scales = d.view(np.uint8), d[..., 0].astype(np.float32)
    blocks = np.concatenate([raw, halves], axis=2).reshape(ROWS, -1)
    return blocks, Coded(CARRIED[name][1], codes, scales)


@pytest.mark.parametrize("name", CARRIED)
@pytest.mark.parametrize("seed", range(5))
def test_blocks_of_ggml_are_held_exactly(name: str, seed: int) -> None:
    blocks, coded = ggml_blocks(name, np.random.default_rng(seed))
    want = quants.dequantize(blocks, gguf.GGMLQuantizationType[name])
    fmt = FORMATS[CARRIED[name][0]]
    packed = fmt.from_codes(coded)
    assert packed.size == fmt.nbytes(ROWS, BLOCKS * 32)
    np.testing.assert_array_equal(fmt.unpack(packed, ROWS, BLOCKS * 32), want)
    out = np.empty_like(want)
    for r in range(ROWS):
        unpack_row(matrix_of(fmt.name, packed, 0, *want.shape), r, out[r])
    np.testing.assert_array_equal(out, want)
    pieces = empty_packed(fmt, *want.shape)
    for start in (0, 8, 16):
        part = Coded(coded.table, *(a[start : start + 8] for a in coded[1:]))
        fmt.code_rows(pieces, *want.shape, start, part)
    np.testing.assert_array_equal(pieces, packed)


def test_mxfp4_is_what_transformers_dequantizes() -> None:
    """gpt-oss: blocks uint8 [experts, rows, groups, 16], low half first; scales uint8."""
    torch = pytest.importorskip("torch")
    mxfp4 = pytest.importorskip("transformers.integrations.mxfp4")
    rng = np.random.default_rng(0)
    blocks = rng.integers(0, 256, (1, ROWS, BLOCKS, 16)).astype(np.uint8)
    scales = rng.integers(90, 160, (1, ROWS, BLOCKS)).astype(np.uint8)
    arguments = torch.from_numpy(blocks), torch.from_numpy(scales)
    want = mxfp4.convert_moe_packed_tensors(*arguments, dtype=torch.float32)[0].numpy().T
    codes = np.stack([blocks & 15, blocks >> 4], axis=-1).reshape(ROWS, -1)
    coded = Coded(E2M1, codes, np.ldexp(np.float32(1), scales[0].astype(int) - 128))
    fmt = FORMATS["mxfp4"]
    np.testing.assert_array_equal(fmt.unpack(fmt.from_codes(coded), ROWS, BLOCKS * 32), want)


@pytest.mark.parametrize("spread", [1, 7])
def test_int4_under_bf16_scales_is_held_exactly(spread: int) -> None:
    """Groups of 32 as in compressed-tensors; a row's scales 10 decades apart, all far from 1."""
    rng = np.random.default_rng(spread)
    codes = rng.integers(0, 16, (ROWS, BLOCKS * 32)).astype(np.uint8)
    size = 10.0 ** (rng.uniform(-spread, 0, (ROWS, BLOCKS)) - rng.integers(0, 20, (ROWS, 1)))
    scales = (size.astype(np.float32).view(np.uint32) // BF16 * BF16).view(np.float32)
    packed = FORMATS["int4-f16"].from_codes(Coded(Q4_0, codes, scales))
    want = (codes.astype(np.float64) - 8) * np.repeat(scales.astype(np.float64), 32, axis=1)
    got = FORMATS["int4-f16"].unpack(packed, ROWS, BLOCKS * 32)
    np.testing.assert_array_equal(got.astype(np.float64), want)


def coded(scale: float, table: np.ndarray = Q4_0) -> Coded:
    scales = np.ones((9, 2), np.float32)
    scales[3, 1] = scale
    return Coded(table, np.full((9, 40), 3, np.uint8), scales)


@pytest.mark.parametrize(
    ("name", "given", "said"),
    [
        ("int4-f16", coded(1 + 2.0**-11), "1 of 32 scales are not fp16"),  # 12 bits
        ("int4-f16", coded(2.0**-41), "1 of 32 scales are not fp16"),  # beside a 1
        ("int4-f16", coded(np.nan), "1 of 18 scales are NaN"),
        ("int4-f16", coded(1, np.full(16, -128, np.int8)), "-128"),
        ("int4-f16", coded(1)._replace(codes=np.full((9, 40), 16, np.uint8)), "over 15"),
        ("int4-f16", coded(1)._replace(scales=np.ones((9, 1), np.float32)), "do not go with"),
        ("mxfp4", coded(1), "E2M1's table only"),
        ("mxfp4", coded(3, E2M1), "1 of 32 scales are not powers of two"),
        ("mxfp4", coded(-1, E2M1), "1 of 32 scales are not powers of two"),
        ("mxfp4", coded(2.0**125, E2M1), "1 of 32 scales are not powers of two"),
        ("mxfp4", coded(2.0**-129, E2M1), "1 of 32 scales are not powers of two"),
    ],
)
def test_what_does_not_fit_exactly_is_refused(name: str, given: Coded, said: str) -> None:
    with pytest.raises(QuantizationError, match=said):
        FORMATS[name].from_codes(given)


def test_a_scale_of_zero_fits() -> None:
    for name, table in (("int4-f16", IQ4_NL), ("mxfp4", E2M1)):
        packed = FORMATS[name].from_codes(coded(0, table))
        back = FORMATS[name].unpack(packed, 9, 40)
        assert not back[3, 32:].any()
        assert (back[3, :32] == table[3]).all()


def test_mxfp4_chooses_no_worse_than_the_standard_and_sometimes_better() -> None:
    weight = np.random.default_rng(0).normal(size=(64, 512)).astype(np.float32)
    kind, fmt = gguf.GGMLQuantizationType.MXFP4, FORMATS["mxfp4"]
    theirs = quants.dequantize(quants.quantize(weight, kind), kind) - weight
    ours = fmt.unpack(fmt.pack(weight), *weight.shape) - weight
    by_block = [(e.reshape(-1, 32).astype(np.float64) ** 2).sum(1) for e in (ours, theirs)]
    assert (by_block[0] <= by_block[1] * (1 + 1e-6)).all()
    assert by_block[0].sum() < 0.99 * by_block[1].sum()


def test_mxfp4_rounds_ties_to_even() -> None:
    weight = np.array([[0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5, 6, -0.25, -0.75, -5, 4]], np.float32)
    back = FORMATS["mxfp4"].unpack(FORMATS["mxfp4"].pack(weight), 1, 12)
    assert back.tolist() == [[0, 1, 1, 2, 2, 4, 4, 6, 0, -1, -4, 4]]


def test_int4_f16_searches_as_well_as_int4() -> None:
    weight = np.random.default_rng(0).normal(size=(64, 512)).astype(np.float32)
    errors = [
        ((fmt.unpack(fmt.pack(weight), *weight.shape) - weight) ** 2).sum()
        for fmt in (FORMATS["int4-f16"], FORMATS["int4"])
    ]
    assert errors[0] < 1.005 * errors[1]


def test_scales_at_the_edge_of_fp16_stay_finite() -> None:
    rng = np.random.default_rng(4)
    weight = rng.normal(size=(24, 608)) * 10.0 ** rng.integers(-3, 2, (24, 1))
    fmt = FORMATS["int4-f16"]
    weight = weight.astype(np.float32)
    kept = fmt.unpack(fmt.pack(weight), *weight.shape)
    assert np.isfinite(kept).all()
    error = np.square(kept - weight).sum(1) / np.square(weight).sum(1)
    assert error.max() < 0.01
