"""nf4 in bitsandbytes' order: its own quantization is the oracle."""

from __future__ import annotations

import numpy as np
import pytest

torch = pytest.importorskip("torch")
functional = pytest.importorskip("bitsandbytes").functional

from moelite.errors import QuantizationError  # noqa: E402
from moelite.gpu import bnb  # noqa: E402
from moelite.gpu.plan import SCRATCH_BYTES  # noqa: E402
from moelite.quant import FORMATS  # noqa: E402

NF4 = FORMATS["nf4"]
SHAPES = [(16, 256), (9, 64), (24, 704), (1, 320), (40, 1024)]


def drawn(shape: tuple[int, int]) -> np.ndarray:
    return np.random.default_rng(shape[1]).normal(size=shape).astype(np.float32)


@pytest.mark.parametrize("shape", SHAPES)
def test_tiles_become_what_bitsandbytes_makes_itself(shape: tuple[int, int]) -> None:
    weight = drawn(shape)
    want, state = functional.quantize_4bit(torch.from_numpy(weight), quant_type="nf4", blocksize=64)
    found = bnb.of_packed(torch.from_numpy(NF4.pack(weight)), *shape)
    assert torch.equal(found.codes, want.reshape(-1))
    assert torch.equal(found.absmax, state.absmax)


@pytest.mark.parametrize("shape", SHAPES)
def test_bitsandbytes_multiplies_the_same_numbers(shape: tuple[int, int]) -> None:
    packed = NF4.pack(drawn(shape))
    back = NF4.unpack(packed, *shape)
    x = np.random.default_rng(1).normal(size=(3, shape[1])).astype(np.float32)
    around = torch.full((packed.size + 128,), 0xFF, dtype=torch.uint8)
    around[64:-64] = torch.from_numpy(packed)
    for blocks in (
        bnb.of_packed(torch.from_numpy(packed), *shape),
        bnb.in_place(around[64:-64], *shape),
        bnb.views(around[64:-64], *shape),
    ):
        np.testing.assert_array_equal(bnb.dequantized(blocks).numpy(), back)
        for rows in (x, x[:1]):
            got = bnb.product(torch.from_numpy(rows), blocks).numpy()
            np.testing.assert_allclose(got, rows @ back.T, rtol=1e-5, atol=1e-4)
    assert (around[:64] == 0xFF).all()
    assert (around[-64:] == 0xFF).all()


@pytest.mark.parametrize("shape", SHAPES)
def test_strips_give_the_same(shape: tuple[int, int], monkeypatch: pytest.MonkeyPatch) -> None:
    packed, x = torch.from_numpy(NF4.pack(drawn(shape))), torch.ones((5, shape[1]))
    whole = bnb.of_packed(packed, *shape)
    product = bnb.product(x, whole)
    monkeypatch.setattr(bnb, "SCRATCH_BYTES", 0)  # a tile at a time
    monkeypatch.setattr(bnb, "strip_rows", lambda cols: 8)
    strips = bnb.of_packed(packed, *shape)
    assert torch.equal(strips.codes, whole.codes)
    assert torch.equal(strips.absmax, whole.absmax)
    torch.testing.assert_close(bnb.product(x, strips), product, rtol=1e-5, atol=1e-5)


def test_laying_anew_takes_no_more_than_it_may() -> None:
    from device_peak import Peak

    rows, cols = 24_576, 4096  # 56 MiB packed: more than one strip
    packed = torch.zeros(NF4.nbytes(rows, cols), dtype=torch.uint8)
    with Peak() as peak:
        bnb.in_place(packed, rows, cols)
    beside = peak.most - packed.numel()  # views of it count as itself
    assert SCRATCH_BYTES // 2 < beside <= SCRATCH_BYTES


def test_whole_groups_take_the_same_bytes() -> None:
    assert bnb.packed_bytes(16, 512) == NF4.nbytes(16, 512)
    for shape in SHAPES:
        assert bnb.packed_bytes(*shape) <= NF4.nbytes(*shape)


def test_other_sizes_are_refused() -> None:
    with pytest.raises(QuantizationError, match="takes 2304 bytes, not 2048"):
        bnb.of_packed(torch.zeros(2048, dtype=torch.uint8), 16, 256)
