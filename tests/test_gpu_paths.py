"""Turns of the device path that models on torch's CPU seldom take."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import tiny_checkpoint
from typer.testing import CliRunner

import moelite
from moelite.cli.device import advice, verdict
from moelite.cli.main import app
from moelite.errors import BudgetError, UnsupportedError
from moelite.units import GIB, MIB

torch = pytest.importorskip("torch")

import gpu_checks  # noqa: E402

from moelite.arch import GatedMLP, Norm  # noqa: E402
from moelite.gpu import probe as probe_file  # noqa: E402
from moelite.gpu import unpack as unpack_file  # noqa: E402
from moelite.gpu.device import Device  # noqa: E402
from moelite.gpu.layers import RopeTables, rotated  # noqa: E402
from moelite.gpu.plan import refuse_device  # noqa: E402
from moelite.gpu.products import HostKernels, Kernels, kernels_for  # noqa: E402
from moelite.gpu.weights import Weights  # noqa: E402

pytestmark = pytest.mark.parity
KERNELS = HostKernels(torch.device("cpu"))
ON: dict[str, Any] = {"ram": "1GiB", "context": 64, "threads": 1, "device": "torch:cpu"}


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("paths")
    config = {**tiny_checkpoint.QWEN3_MOE, "moe_intermediate_size": 64, "mlp_only_layers": []}
    tiny_checkpoint.write_checkpoint(folder / "c", config)
    (folder / "c" / "tokenizer.json").unlink()
    moelite.quantize(folder / "c", folder / "s", experts="int8", dense="int8")
    return folder / "s"


@pytest.fixture
def model(store: Path) -> Iterator[Any]:
    with moelite.load(store, **ON, vram="1GiB", miss="copy") as loaded:
        yield loaded


# --- products -----------------------------------------------------------------------------------


def test_kernels_are_those_that_a_device_can_run(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("triton")
    cpu, cuda, mps = (torch.device(name) for name in ("cpu", "cuda", "mps"))
    assert type(kernels_for(cpu)) is HostKernels
    assert type(kernels_for(cpu, "torch")) is Kernels
    assert type(kernels_for(mps)) is Kernels
    assert kernels_for(cuda).blind
    assert kernels_for(cpu, "triton").blind
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert type(kernels_for(cuda)) is Kernels
    with pytest.raises(UnsupportedError, match="triton is not installed"):
        kernels_for(cuda, "triton")


@pytest.mark.parametrize("name", ["int4", "f32", "nf4"])
def test_a_large_matrix_is_unpacked_in_strips(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    shape = gpu_checks.shape_for(name, (75, 192))
    packed = gpu_checks.random_bytes(name, shape, 1)
    x = np.random.default_rng(0).normal(size=(5, shape[1])).astype(np.float32)
    seen: list[int] = []

    class Counted(Kernels):
        def unpack(self, fmt: str, packed: Any, base: int, rows: int, cols: int) -> Any:
            seen.append(rows)
            return super().unpack(fmt, packed, base, rows, cols)

    monkeypatch.setattr(unpack_file, "SCRATCH_BYTES", 4 * shape[1] * 30)
    gpu_checks.check_product(Counted(torch.device("cpu")), name, packed, shape, x)
    assert seen == [24, 24, 24, 3]


def test_weights_of_unlike_formats_are_not_one_pair(model: Any) -> None:
    weights = Weights(model.store, model.arch, Device("torch:cpu", GIB), KERNELS)
    parts = model.arch.layers[0].attention.q, model.arch.head
    weights._store = SimpleNamespace(dense_entry=lambda key: SimpleNamespace(format=key))
    with pytest.raises(UnsupportedError, match="differ in format"):
        weights.gated(GatedMLP(gate=parts[0], up=parts[1], down=parts[0]))


def test_what_a_norm_adds_is_in_its_weight(model: Any) -> None:
    norm = model.arch.norm
    plain, moved = (
        Weights(model.store, model.arch, Device("torch:cpu", GIB), KERNELS).norm(n)
        for n in (norm, replace(norm, offset=1.0))
    )
    assert torch.equal(moved.weight, plain.weight + 1)
    bare = Norm(weight=None, size=64, eps=1e-5)
    found = Weights(model.store, model.arch, Device("torch:cpu", GIB), KERNELS).norm(bare)
    assert found is not None
    assert found.weight is None


def test_without_a_norm_the_residual_is_rounded_as_it_is(model: Any) -> None:
    decoder, x = model._decoder, torch.randn(2, 64)
    assert decoder._normed(x, None, None) is x
    assert torch.equal(decoder._normed(x, None, "int4"), decoder._kernels.rounded("int4", x))


def test_both_styles_of_rotation_turn_pairs() -> None:
    device = Device("torch:cpu", GIB)
    assert RopeTables(8, device).of(None) == (None, None)
    x, angle = torch.randn(3, 2, 10, dtype=torch.float64), torch.rand(3, 1, 4, dtype=torch.float64)
    turn = torch.polar(torch.ones_like(angle), angle)
    for style, pairs in (
        ("interleaved", [(2 * i, 2 * i + 1) for i in range(4)]),
        ("half", [(i, i + 4) for i in range(4)]),
    ):
        got = rotated(x, angle.cos(), angle.sin(), style)
        for i, (a, b) in enumerate(pairs):
            want = torch.complex(x[..., a], x[..., b]) * turn[..., i]
            torch.testing.assert_close(got[..., a], want.real)
            torch.testing.assert_close(got[..., b], want.imag)
        assert torch.equal(got[..., 8:], x[..., 8:])


# --- memory -------------------------------------------------------------------------------------


def test_a_device_with_nothing_left_to_give_up_says_so(
    store: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with moelite.load(store, **ON, vram="1GiB", miss="copy") as model:
        least = model.footprint.device.minimum_bytes
    with moelite.load(store, **ON, vram=least + 1, miss="copy") as model:

        def full(*args: Any) -> Any:
            raise torch.OutOfMemoryError("out of memory")

        monkeypatch.setattr(model._decoder, "_attention", full)
        with pytest.raises(BudgetError, match="needs at least"):
            model.session().advance([5])
        model._decoder.shrink = type(model._decoder).__init__.__globals__["_no_room"]
        with pytest.raises(torch.OutOfMemoryError, match="the device is full"):
            model.session().advance([5])


def test_more_than_a_card_has_is_refused(model: Any) -> None:
    plan = replace(model.footprint.device, card="a card", total_bytes=MIB, budget_bytes=2 * MIB)
    error = refuse_device(plan, "a model")
    assert "2.0 MiB is more than a card has: 1.0 MiB" in str(error)
    assert error.fix is not None
    assert "a model needs at least" in error.fix


def test_a_guess_is_made_for_a_layer_like_this_one(model: Any) -> None:
    decoder, x = model._decoder, torch.randn(1, 64)
    first, last = decoder.arch.moe_layers[0], len(decoder.arch.layers) - 1
    assert decoder._next_guess(last, x) is None
    guess = decoder._next_guess(first, x)
    top_k = decoder.arch.layers[first].mlp.router.top_k
    assert guess.shape == (1, top_k)
    mlp = decoder.arch.layers[first + 1].mlp
    for other in (
        replace(mlp, router=replace(mlp.router, top_k=top_k + 1)),
        GatedMLP(gate=mlp.experts.gate, up=mlp.experts.gate, down=mlp.experts.down),
    ):
        layers = list(decoder.arch.layers)
        layers[first + 1] = replace(layers[first + 1], mlp=other)
        decoder.arch = replace(model.arch, layers=tuple(layers))
        assert decoder._next_guess(first, x) is None


# --- what people are told -----------------------------------------------------------------------


def test_a_device_that_is_here_is_looked_at(store: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(probe_file, "_BYTES", MIB)
    monkeypatch.setattr(probe_file, "_PROBE_S", 0.01)
    seen = probe_file.probe("torch:cpu", "int8")
    assert all(value is not None and value > 0 for value in seen)
    line = ["footprint", str(store), "--context", "64", "--device", "torch:cpu"]
    done = CliRunner().invoke(app, [*line, "--vram", "400MiB", "--ram", "1GiB"])
    assert done.exit_code == 0
    text = " ".join(done.stdout.split())
    assert "device torch:cpu: it shares this machine's memory" in text
    assert "from a short look at the device" in text
    assert "experts that miss on the device" not in text
    with moelite.load(store, **ON, vram="1GiB") as model:
        least = model.footprint.device.minimum_bytes
    done = CliRunner().invoke(app, [*line, "--vram", str(least + 4096), "--ram", "1GiB"])
    text = " ".join(done.stdout.split())
    assert "experts that miss on the device" in text
    assert "every expert on the device: " in text


def test_verdict_and_advice_name_the_budget_that_helps(model: Any) -> None:
    found, plan = model.footprint, model.footprint.device
    kv = replace(plan.parts[1], name="kv", bytes=8 * MIB)
    some = replace(plan, experts_resident=2, parts=(kv,), free_bytes=MIB, total_bytes=GIB)
    crowded = replace(found, context=2048, experts_resident=3, expert_format="int8")
    text = str(verdict(crowded, some))
    assert f"2 of {found.experts_total} experts" in text
    assert (
        f"device, 3 ({300 // found.experts_total} %) in memory, others are read from disk" in text
    )
    whole = replace(crowded, experts_resident=found.experts_total)
    assert "on the device, all in memory; the least" in str(verdict(whole, some))
    lines = "\n".join(advice(replace(crowded, fits=True), replace(some, budget_bytes=2 * MIB)))
    assert f"--vram {-(-plan.minimum_bytes // MIB)}MiB: the least that works" in lines
    assert "1.0 MiB of it are free now" in lines
    assert "--context 1024: frees 4.0 MiB" in lines
    assert "--experts int4 when quantizing" in lines
    small = replace(some, budget_bytes=2 * MIB, total_bytes=3 * MIB)
    assert "the device has 3.0 MiB, too little: --device cpu" in "\n".join(advice(crowded, small))
    poor = replace(found, budget_bytes=2 * MIB, machine_bytes=MIB, fits=False)
    assert "this machine has 1.0 MiB, too little" in "\n".join(advice(poor, plan))
    assert "--ram 2MiB is more than this machine has, 1.0 MiB" in str(verdict(poor, plan))
    odd = replace(found, fits=False)
    assert "NO, it does not fit. The least" in str(verdict(odd, plan))
    assert advice(found, replace(plan, experts_resident=found.experts_total)) == []


@pytest.mark.parametrize("fmt", ["qmoe", "vq-1"])
def test_a_forecast_right_after_loading_needs_no_expert_there(store: Path, fmt: str) -> None:
    """Codes of qmoe tell where rows are, and slots that hold no expert yet hold no such codes."""
    made = store.parent / fmt
    moelite.quantize(store.parent / "c", made, experts=fmt, dense="int8")
    with moelite.load(made, **ON, vram="1GiB") as loaded:
        assert loaded.forecast().decode_tok_s.likely > 0
        before = loaded.forward([1, 2, 3]).copy()
        assert loaded.forecast().decode_tok_s.likely > 0
        np.testing.assert_array_equal(loaded.forward([1, 2, 3]), before)
    done = CliRunner().invoke(app, ["footprint", str(made), "--device", "torch:cpu"])
    assert done.exit_code == 0, done.output
