"""nf4 on a device through bitsandbytes: laid anew once where it lies, the same numbers as ever.

torch's CPU stands in for a GPU, where bitsandbytes dequantizes for one token, too.
"""

from __future__ import annotations

import importlib.util
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import tiny_checkpoint

import moelite
from moelite.recipe import Recipe, Rule

torch = pytest.importorskip("torch")
pytest.importorskip("bitsandbytes")

import gpu_checks  # noqa: E402
from gpu_checks import greedy  # noqa: E402

from moelite.gpu import bnb_products  # noqa: E402
from moelite.gpu import model as gpu_model  # noqa: E402
from moelite.gpu.bnb_products import BitsandbytesKernels, choose  # noqa: E402
from moelite.gpu.device import Link  # noqa: E402
from moelite.gpu.products import Kernels, kernels_for  # noqa: E402

pytestmark = pytest.mark.parity
IDS = np.random.default_rng(3).integers(3, 100, 41).tolist()
PIECES = (7, 1, 1, 9, 1, 16, 1, 1, 1, 3)
HOW: dict[str, Any] = {"ram": "1GiB", "context": 64, "threads": 1}
ON: dict[str, Any] = {**HOW, "device": "torch:cpu", "miss": "copy"}
SIZES = {"hidden_size": 64, "moe_intermediate_size": 64, "num_experts": 12, "head_dim": 16}


@pytest.fixture(autouse=True)
def _forced(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.set_num_threads(1)
    monkeypatch.setattr(gpu_model, "kernels_for", lambda at: kernels_for(at, "bitsandbytes"))


RECIPES = {
    "nf4": Recipe(experts="nf4", dense="nf4"),
    # nf4 beside int8 in one record, in one layer, and among the dense matrices
    "mixed": Recipe(
        experts="nf4",
        dense="int8",
        rules=(
            Rule(part="down", format="int8", experts=frozenset({0, 2, 5, 7})),
            Rule(part="attention", format="nf4"),
            Rule(part="embeddings", format="nf4"),
        ),
    ),
}


@pytest.fixture(scope="module")
def stores(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("nf4")
    tiny_checkpoint.write_checkpoint(folder / "c", {**tiny_checkpoint.QWEN3_MOE, **SIZES})
    (folder / "c" / "tokenizer.json").unlink()
    for name, recipe in RECIPES.items():
        moelite.quantize(folder / "c", folder / name, recipe=recipe)
    return {name: folder / name for name in RECIPES}


def pieces(model: Any) -> np.ndarray:
    session, at, found = model.session(), 0, []
    for size in PIECES:
        found.append(session.append(IDS[at : at + size]))
        at += size
    return np.concatenate(found)


def budgets(store: Path) -> Iterator[int]:
    """Of the device: from the least to all experts."""
    with moelite.load(store, **ON, vram="2GiB") as model:
        found = model.footprint
    for n in (0, 1, 3, 7, 12, found.experts_total):
        yield found.device.minimum_bytes + n * found.record_bytes


@pytest.mark.parametrize("name", RECIPES)
def test_a_model_through_bitsandbytes_as_on_the_cpu(
    stores: dict[str, Path], name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    with moelite.load(stores[name], **HOW) as model:
        want = pieces(model)
        text = [greedy(model, seed) for seed in range(10)]
    for miss in ("copy", "cpu"):
        with moelite.load(stores[name], **{**ON, "miss": miss}, vram="1GiB") as model:
            assert isinstance(model._decoder._kernels, BitsandbytesKernels)
            assert model.nf4_by == "bitsandbytes"
            got = pieces(model)
            assert [greedy(model, seed) for seed in range(10)] == text
        off = np.abs(got - want).max(1) / np.abs(want).max()
        # where all is nf4, activations are read as 8-bit codes, and the last bit of a sum may turn
        # one: at one position of 41 it does, without bitsandbytes as well (below)
        assert np.sort(off)[-1 if name == "mixed" else -2] < 1e-3
        assert off.max() < 5e-3
    with monkeypatch.context() as patch:
        patch.setattr(gpu_model, "kernels_for", kernels_for)
        with moelite.load(stores[name], **{**ON, "miss": "cpu"}, vram="1GiB") as model:
            assert not isinstance(model._decoder._kernels, BitsandbytesKernels)
            np.testing.assert_array_equal(pieces(model), got)  # the very same weights


@pytest.mark.parametrize("lookahead", ["off", "on"])
@pytest.mark.parametrize("name", RECIPES)
def test_the_same_bits_at_every_budget(
    stores: dict[str, Path], name: str, lookahead: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With evictions, and other experts copied into slots that were laid anew before."""
    want, slots = None, Counter[int]()
    send = gpu_model.DeviceModel._send

    def counted(self: Any, layer: int, page: int, slot: int) -> Any:
        slots[slot] += 1
        return send(self, layer, page, slot)

    monkeypatch.setattr(gpu_model.DeviceModel, "_send", counted)
    for budget in budgets(stores[name]):
        slots.clear()
        with moelite.load(stores[name], **ON, vram=budget, lookahead=lookahead) as model:
            got = pieces(model)
            again = pieces(model)
            least = model.footprint.device.experts_resident < 8
        want = got if want is None else want
        np.testing.assert_array_equal(got, want)
        np.testing.assert_array_equal(again, want)
        if least:
            assert min(slots.values()) > 1  # every slot had more than one expert


def test_nothing_is_laid_anew_before_it_has_come(stores: dict[str, Path]) -> None:
    with moelite.load(stores["nf4"], **ON, vram="1GiB") as model:
        want, plan = pieces(model), model.footprint
    link = Link(2e8, 1e-3)  # a record takes .1 ms, and shows a millisecond later
    budget = plan.device.minimum_bytes + 12 * plan.record_bytes
    for lookahead in ("off", "on"):
        options = {**ON, "lookahead": lookahead, "link": link}
        with moelite.load(stores["nf4"], **options, vram=budget) as model:
            np.testing.assert_array_equal(pieces(model), want)


def test_a_copy_is_laid_anew_once_and_what_stays_never(
    stores: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    settled: list[int] = []
    settle = BitsandbytesKernels.settle

    def counted(self: Any, fmt: str, packed: Any, base: int, rows: int, cols: int) -> None:
        settled.append(base)
        settle(self, fmt, packed, base, rows, cols)

    monkeypatch.setattr(BitsandbytesKernels, "settle", counted)
    for budget in budgets(stores["nf4"]):
        with moelite.load(stores["nf4"], **ON, vram=budget, lookahead="off") as model:
            settled.clear()  # dense matrices have been by now
            pieces(model)
            upper = model.stats().upper
            assert upper.bytes_read == upper.misses * model.footprint.record_bytes
            assert len(settled) == 2 * upper.misses


def cut_short(model: Any) -> None:
    """Experts that came, and that nobody computed with."""
    for layer in model.arch.moe_layers:
        for expert in (0, 1):
            batches = model.upper.batches(layer, [expert], one=True)
            next(batches)
            batches.close()


def test_what_was_cut_short_is_laid_anew_before_it_is_used(stores: dict[str, Path]) -> None:
    with moelite.load(stores["nf4"], **ON, vram="1GiB") as model:
        routes = np.array([[[0, 1], [1, 0]]], np.int32)
        model.force_routes(routes)
        want = model.forward([5, 6])
    with moelite.load(stores["nf4"], **ON, vram="1GiB") as model:
        cut_short(model)
        assert set(model.upper.resident(model.arch.moe_layers[0])) == {0, 1}
        model.force_routes(routes)
        np.testing.assert_array_equal(model.forward([5, 6]), want)
        assert model.stats().upper.misses == 4  # those of the cut
    with moelite.load(stores["nf4"], **ON, vram="1GiB") as model:
        cut_short(model)
        model._on_device.table()  # as before the device looks for experts itself
        assert not model._on_device._fresh
        model.force_routes(routes)
        np.testing.assert_array_equal(model.forward([5, 6]), want)


def test_an_expert_that_is_half_laid_anew_is_fetched_again(
    stores: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    with moelite.load(stores["nf4"], **ON, vram="1GiB") as model:
        want = model.forward(IDS)
    with moelite.load(stores["nf4"], **ON, vram="1GiB") as model:
        settle, calls = BitsandbytesKernels.settle, [0]

        def fails(self: Any, *args: Any) -> None:
            calls[0] += 1
            if calls[0] == 4:  # down of the second expert
                raise KeyboardInterrupt
            settle(self, *args)

        monkeypatch.setattr(BitsandbytesKernels, "settle", fails)
        with pytest.raises(KeyboardInterrupt):
            model.forward(IDS)
        np.testing.assert_array_equal(model.forward(IDS), want)


@pytest.mark.parametrize("name", ["int8", "int4", "bf16", "nf4-dq"])
def test_other_formats_are_those_of_the_kernels_below(name: str) -> None:
    class Below(Kernels):
        blind = True

    found = bnb_products.over(Below(gpu_checks.CPU))
    assert not found.blind
    for check in gpu_checks.BY_FORMAT:
        check(found, name)


def test_a_device_without_bitsandbytes_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(moelite.UnsupportedError, match="bitsandbytes is not installed"):
        kernels_for(gpu_checks.CPU, "bitsandbytes")


# --- which is used ------------------------------------------------------------------------------


class Blind(Kernels):
    """In the place of Triton's."""

    blind = True


class Card:
    """A device that says it is CUDA's, in the CPU's memory; keeps what lies there."""

    torch = SimpleNamespace(type="cuda")

    def __init__(self) -> None:
        self.held = self.most = 0

    def zeros(self, shape: Any, dtype: Any) -> Any:
        found = torch.zeros(shape, dtype=dtype)
        self.held += found.numel()
        self.most = max(self.most, self.held)
        return found

    def give_back(self, tensor: Any) -> None:
        self.held -= tensor.numel()


def chosen(
    store: Path, monkeypatch: pytest.MonkeyPatch, times: list[float], below: Any, resident: int = 24
) -> Any:
    """What is chosen where products take `times`, in the order in which they are asked for."""
    device, left = Card(), iter(times)
    monkeypatch.setattr(bnb_products, "best", lambda device, work: work() or next(left))
    monkeypatch.setattr(bnb_products, "captured", lambda device, work: work)
    monkeypatch.setattr(bnb_products, "launch_seconds", lambda device: 1e-5)
    with moelite.load(store, ram="1GiB", context=64) as model:
        arch, layers, dense = model.arch, model.store.layers, model.sizes.dense
    plan: Any = SimpleNamespace(parts=[SimpleNamespace(bytes=1 << 20)], experts_resident=resident)
    found = choose(below(gpu_checks.CPU), device, arch, layers, dense, plan)  # type: ignore[arg-type]
    assert device.held == 0
    assert next(left, None) is None
    return found


def test_the_faster_one_is_chosen(stores: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    ours = chosen(stores["nf4"], monkeypatch, [1e-3, 2e-3], Blind)
    assert isinstance(ours.kernels, BitsandbytesKernels)
    assert isinstance(ours.kernels, Blind)
    assert ours.by == "bitsandbytes: 1.2 ms for a token's experts of a layer, Triton 2"
    other = chosen(stores["nf4"], monkeypatch, [2e-3, 2e-3], Blind)
    assert type(other.kernels) is Blind
    assert (
        other.by == "Triton: bitsandbytes takes 2.2 ms for a token's experts of a layer, Triton 2"
    )


def test_laying_anew_counts_where_experts_come_and_go(
    stores: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    # a quarter of the experts is away: 1 + 6 / 4 ms
    slow = chosen(stores["mixed"], monkeypatch, [1e-3, 6e-3, 2e-3], Blind, resident=18)
    assert type(slow.kernels) is Blind
    fast = chosen(stores["mixed"], monkeypatch, [1e-3, 2e-3, 2e-3], Blind, resident=18)
    assert isinstance(fast.kernels, BitsandbytesKernels)


def test_without_triton_it_is_bitsandbytes_unmeasured(
    stores: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    found = chosen(stores["nf4"], monkeypatch, [], Kernels)
    assert isinstance(found.kernels, BitsandbytesKernels)
    assert found.by == "bitsandbytes: triton is not installed"


def test_what_does_not_work_is_not_chosen(
    stores: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*args: Any) -> None:
        raise RuntimeError("CUDA 99 is not there\nmore")

    for patched, why in (
        (broken, "bitsandbytes does not work here: CUDA 99 is not there"),
        (lambda x, blocks: torch.ones(len(x), blocks.rows), "bitsandbytes gives other numbers"),
    ):
        with monkeypatch.context() as patch:
            patch.setattr("moelite.gpu.bnb.product", patched)
            found = chosen(stores["nf4"], patch, [], Blind)
        assert type(found.kernels) is Blind
        assert found.by.startswith(f"Triton: {why}")
    find = importlib.util.find_spec
    with monkeypatch.context() as patch:
        patch.setattr(
            importlib.util, "find_spec", lambda name: find(name) if name == "torch" else None
        )
        patch.setattr(gpu_model, "kernels_for", kernels_for)
        found = chosen(stores["nf4"], patch, [], Blind)
    assert found.by == "Triton: bitsandbytes is not installed"


def test_dense_matrices_alone_are_timed_and_a_store_without_nf4_asks_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tiny_checkpoint.write_checkpoint(tmp_path / "c", {**tiny_checkpoint.QWEN3_MOE, **SIZES})
    (tmp_path / "c" / "tokenizer.json").unlink()
    for dense, times in (("nf4", [1e-3, 9e-3]), ("int8", [])):
        store = tmp_path / dense
        moelite.quantize(tmp_path / "c", store, experts="int8", dense=dense)
        found = chosen(store, monkeypatch, times, Blind)
        assert isinstance(found.kernels, BitsandbytesKernels) == (dense == "nf4")
        assert ("a token's dense matrices of a layer" in found.by) == (dense == "nf4")
