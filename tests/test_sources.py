"""Quantized checkpoints: every matrix as the library that made it decodes it, bit for bit."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from encoded_files import CASES, NAME, make_folder, stored, wanted
from tiny_checkpoint import MIXTRAL

from moelite.arch import TensorRef
from moelite.checkpoint import Source
from moelite.errors import CheckpointError
from moelite.quant.base import F32
from moelite.sources import open_folder, read_small
from moelite.sources.codes import Codes, finer_scales
from moelite.sources.tensor import E2M1_TWICE, unpack_bits

# what can be repacked without loss: (kind, columns that share a scale)
CODED = {
    "awq-4-even": ("int4", 32),
    "bnb-int8": ("int8", 40),
    "bnb-nf4": ("nf4", 64),
    "bnb-nf4-bf16": ("nf4", 64),
    "bnb-nf4-nested": ("nf4", 32),
    "ct-int4-g32": ("int4", 32),
    "ct-int8-channel": ("int8", 48),
    "ct-int8-g64": ("int8", 64),
    "ct-mxfp4": ("mxfp4", 32),
    "gptq-4-auto": ("int4", 32),
    "gptq-4-v1-sym": ("int4", 32),
    "gptq-8-v1-sym": ("int8", 64),
}
# bitsandbytes' own table, as its backends/utils.py has it
NF4 = np.float32(
    [
        *(-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453),
        *(-0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0),
        *(0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224),
        *(0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0),
    ]
)


@pytest.fixture
def opened(tmp_path: Path, request: pytest.FixtureRequest) -> Source:
    return open_folder(make_folder(tmp_path / "model", *stored(request.param)))


def numbers(coded: Codes) -> F32:
    """What the codes say, in float32."""
    if coded.kind == "nf4":
        entries = NF4[coded.codes]
    elif coded.kind == "int8":
        entries = coded.codes.astype(np.float32)
    else:
        entries = coded.table.astype(np.float32)[coded.codes]
    scales = np.repeat(coded.scales, coded.block, axis=1)[:, : entries.shape[1]]
    product: F32 = entries * scales
    return product


def same_bits(got: F32, want: F32) -> None:
    assert got.dtype == np.float32
    assert got.flags.c_contiguous
    np.testing.assert_array_equal(got + np.float32(0), want + np.float32(0))  # -0 is 0


def test_every_library_is_there() -> None:
    assert {case.split("-")[0] for case in CASES} == {"awq", "bnb", "ct", "gptq"}
    assert len(CASES) >= 29
    assert CODED.keys() <= set(CASES)


@pytest.mark.parametrize(("opened", "case"), [(c, c) for c in CASES], indirect=["opened"])
def test_values_are_the_librarys(opened: Source, case: str) -> None:
    want = wanted(case)
    assert opened.names() == [NAME]
    assert opened.shape(NAME) == want.shape
    same_bits(opened.raw(NAME), want)
    rows = len(want)
    for start, stop in ((0, 1), (1, rows), (7, 19), (8, 16), (rows - 1, rows), (5, 5)):
        same_bits(opened.raw(NAME, start, stop), want[start:stop])
    same_bits(opened.raw(NAME, -3), want[-3:])


@pytest.mark.parametrize(("opened", "case"), [(c, c) for c in CASES], indirect=["opened"])
def test_codes_say_the_same(opened: Any, case: str) -> None:
    want, ref = wanted(case), TensorRef(name=NAME)
    found = opened.coded(ref)
    assert (None if found is None else (found.kind, found.block)) == CODED.get(case)
    if found is None:
        return
    assert found.codes.shape == want.shape
    assert found.codes.dtype == (np.int8 if found.kind == "int8" else np.uint8)
    assert found.table.dtype == np.int8
    rtol = 1.2e-7 if case == "bnb-int8" else 0  # absmax / 127 is rounded before the code meets it
    np.testing.assert_allclose(numbers(found), want, rtol=rtol, atol=0)
    part = opened.coded(ref, 5, 13)
    np.testing.assert_array_equal(part.codes, found.codes[5:13])
    np.testing.assert_array_equal(part.scales, found.scales[5:13])


@pytest.mark.parametrize("opened", ["bnb-nf4-nested"], indirect=True)
def test_nested_scales_come_with_their_codes(opened: Any) -> None:
    found = opened.coded(TensorRef(name=NAME), 250, 264)  # crosses the 256th block
    extra = found.extra
    outer = (extra["first"] + np.arange(14)) // extra["block"]
    scale = extra["map"][extra["codes"][:, 0]] * extra["absmax"][outer]
    np.testing.assert_array_equal(scale + np.float32(extra["offset"]), found.scales[:, 0])
    assert set(outer) == {0, 1}


def test_finer_scales() -> None:
    scales = np.float32([[1, 2, 3]])
    coded = Codes("int8", np.empty(0, np.int8), np.zeros((1, 160), np.int8), scales, 64)
    np.testing.assert_array_equal(finer_scales(coded, 32), [[1, 1, 2, 2, 3]])


@pytest.mark.parametrize("opened", ["gptq-4-v1-sym"], indirect=True)
def test_only_a_whole_plain_matrix_has_codes(opened: Any) -> None:
    assert opened.coded(TensorRef(name=NAME, transpose=True)) is None
    assert opened.coded(TensorRef(name=NAME, rows=(0, 8, 2))) is None
    with pytest.raises(CheckpointError, match="nope"):
        opened.coded(TensorRef(name="nope"))


@pytest.mark.parametrize("bits", range(1, 9))
def test_unpack_bits(bits: int) -> None:
    codes = np.random.default_rng(bits).integers(0, 1 << bits, (3, 77)).astype(np.uint8)
    words = []
    for row in codes:  # one long number, the first code lowest
        number = sum(int(code) << (bits * i) for i, code in enumerate(row))
        words.append(list(number.to_bytes(-(-77 * bits // 32) * 4, "little")))
    packed = np.array(words, np.uint8).view("<i4")
    np.testing.assert_array_equal(unpack_bits(packed, bits, 77), codes)


# --- the encodings whose library is at hand ---


@pytest.mark.parity
@pytest.mark.parametrize("scales", ["F32", "BF16", "F8_E8M0"])
@pytest.mark.parametrize("block", [(128, 128), (16, 24), None])
def test_fp8_is_what_transformers_reads(
    tmp_path: Path, block: tuple[int, int] | None, scales: str
) -> None:
    import torch
    from transformers.integrations.finegrained_fp8 import _dequantize_fp8_weight

    generator = torch.Generator().manual_seed(3)
    rows, cols = 200, 136  # neither is whole blocks
    weight = torch.randn(rows, cols, generator=generator).to(torch.float8_e4m3fn)
    grid = (-(-rows // block[0]), -(-cols // block[1])) if block else (1, 1)
    kind = {"F32": torch.float32, "BF16": torch.bfloat16, "F8_E8M0": torch.float8_e8m0fnu}[scales]
    scale = torch.rand(grid, generator=generator).add(0.01).to(kind)
    want = _dequantize_fp8_weight(weight, scale, list(block) if block else None, torch.float32)
    parts = {
        NAME: ("F8_E4M3", (rows, cols), weight.view(torch.uint8).numpy().tobytes()),
        f"{NAME}_scale_inv": (
            scales,
            grid if block else (1,),
            scale.view(torch.uint8).numpy().tobytes(),
        ),
        "m.input_scale": ("F32", (1,), bytes(4)),
    }
    config = {"quant_method": "fp8", "weight_block_size": block and list(block), "fmt": "e4m3"}
    source = open_folder(make_folder(tmp_path / "m", parts, config))
    assert source.names() == [NAME]
    same_bits(source.raw(NAME), want.numpy())
    same_bits(source.raw(NAME, 120, 140), want.numpy()[120:140])
    assert source.nbytes(NAME) == rows * cols + scale.numel() * scale.element_size()


@pytest.mark.parity
def test_mxfp4_is_what_transformers_reads(tmp_path: Path) -> None:
    import torch
    from transformers.integrations.mxfp4 import convert_moe_packed_tensors

    rng = np.random.default_rng(5)
    stem = "model.layers.0.block_sparse_moe.experts"
    shapes = {"gate_up_proj": (4, 96, 2), "down_proj": (4, 64, 3)}  # experts, rows, blocks
    parts, want = {}, {}
    for name, (experts, rows, count) in shapes.items():
        blocks = rng.integers(0, 256, (experts, rows, count, 16)).astype(np.uint8)
        exponents = rng.integers(0, 255, blocks.shape[:3]).astype(np.uint8)
        exponents[:, :, 0] = rng.integers(110, 130, exponents.shape[:2])
        exponents[exponents > 250] = 120  # beyond these, products are infinite
        parts[f"{stem}.{name}_blocks"] = ("U8", blocks.shape, blocks.tobytes())
        parts[f"{stem}.{name}_scales"] = ("U8", exponents.shape, exponents.tobytes())
        decoded = convert_moe_packed_tensors(
            torch.from_numpy(blocks), torch.from_numpy(exponents), dtype=torch.float32
        )
        want[name] = decoded.numpy().swapaxes(1, 2)  # [experts, rows, cols]
    source: Any = open_folder(make_folder(tmp_path / "m", parts, {"quant_method": "mxfp4"}))
    assert len(source.names()) == 12
    for e in range(4):
        for name, whole in (
            ("w1", want["gate_up_proj"][e, :48]),
            ("w3", want["gate_up_proj"][e, 48:]),
            ("w2", want["down_proj"][e]),
        ):
            ref = TensorRef(name=f"{stem}.{e}.{name}.weight")
            same_bits(source.raw(ref.name), whole)
            same_bits(source.raw(ref.name, 9, 20), whole[9:20])
            coded = source.coded(ref, 9, 20)
            np.testing.assert_array_equal(coded.table, E2M1_TWICE)
            same_bits(numbers(coded), whole[9:20])
    assert sum(source.nbytes(name) for name in source.names()) == sum(
        len(content) for _, _, content in parts.values()
    )


# --- beside and around ---


def test_plain_tensors_stay_beside_quantized_ones(tmp_path: Path) -> None:
    parts, config = stored("awq-4")
    norm = np.float32([1, 2, 3])
    changed = parts | {"norm.weight": ("F32", (3,), norm.tobytes())}
    source = open_folder(make_folder(tmp_path / "m", changed, config))
    assert source.names() == [NAME, "norm.weight"]
    assert [source.dtype(n) for n in source.names()] == ["awq int4, groups of 32", "F32"]
    np.testing.assert_array_equal(source.raw("norm.weight", 1), norm[1:])
    assert source.nbytes("norm.weight") == 12


def test_the_config_loses_what_was_undone(tmp_path: Path) -> None:
    folder = make_folder(tmp_path / "m", *stored("awq-4"))
    assert open_folder(folder).config == MIXTRAL
    files, config = read_small(folder)
    assert config == MIXTRAL
    assert "config.json" in files


def test_older_ways_to_say_it(tmp_path: Path) -> None:
    parts, config = stored("gptq-4-auto")
    folder = make_folder(tmp_path / "m", parts, None)
    del config["quant_method"]
    (folder / "quantize_config.json").write_text(json.dumps(config))
    same_bits(open_folder(folder).raw(NAME), wanted("gptq-4-auto"))
    parts, _ = stored("bnb-int8")
    folder = make_folder(tmp_path / "n", parts, {"load_in_8bit": True})
    same_bits(open_folder(folder).raw(NAME), wanted("bnb-int8"))


def test_reordered_columns_have_no_codes(tmp_path: Path) -> None:
    """Though all have one zero point: a block of 32 columns has no scale of its own."""
    parts, config = stored("gptq-4-v1-sym")
    plain: Any = open_folder(make_folder(tmp_path / "a", parts, config))
    coded = plain.coded(TensorRef(name=NAME))
    index = np.random.default_rng(1).permutation(np.arange(64) // 32).astype("<i4")
    changed = parts | {"m.g_idx": ("I32", (64,), index.tobytes())}
    source: Any = open_folder(make_folder(tmp_path / "b", changed, config))
    assert source.coded(TensorRef(name=NAME)) is None
    by_hand = coded.table.astype(np.float32)[coded.codes] * coded.scales[:, index]
    same_bits(source.raw(NAME), by_hand)


def test_groups_of_reordered_columns_of_compressed_tensors(tmp_path: Path) -> None:
    """weight_g_idx, which its newer versions no longer write: the group of each column."""
    parts, config = stored("ct-int4-g32")
    want = wanted("ct-int4-g32")
    plain: Any = open_folder(make_folder(tmp_path / "a", parts, config))
    coded = plain.coded(TensorRef(name=NAME))
    index = np.random.default_rng(1).permutation(np.arange(64) // 32).astype("<i4")
    changed = parts | {"m.weight_g_idx": ("I32", (64,), index.tobytes())}
    source: Any = open_folder(make_folder(tmp_path / "b", changed, config))
    by_hand = coded.table.astype(np.float32)[coded.codes] * coded.scales[:, index]
    same_bits(source.raw(NAME), by_hand)
    assert (by_hand != want).any()
    assert source.coded(TensorRef(name=NAME)) is None
