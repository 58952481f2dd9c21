"""The decoder on a torch device, torch's own CPU standing in for a GPU, beside the CPU path."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny_checkpoint
import tiny_models

import moelite
from moelite.cache import replay_tiers
from moelite.errors import BudgetError, UsageError
from moelite.recipe import Recipe, Rule

torch = pytest.importorskip("torch")

from gpu_checks import greedy  # noqa: E402

from moelite.gpu import devices  # noqa: E402
from moelite.gpu.device import Device  # noqa: E402

pytestmark = pytest.mark.parity
IDS = np.random.default_rng(3).integers(3, 100, 41).tolist()
HOW: dict[str, Any] = {"ram": "1GiB", "context": 64, "threads": 1}
ON: dict[str, Any] = {**HOW, "device": "torch:cpu", "miss": "copy"}
PIECES = (7, 1, 1, 9, 1, 16, 1, 1, 1, 3)


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)  # for matrices this small, waking a second thread costs more


def write(folder: Path, experts: str, dense: str = "int8", **config: Any) -> Path:
    config = {**tiny_checkpoint.QWEN3_MOE, "moe_intermediate_size": 64, **config}
    tiny_checkpoint.write_checkpoint(folder / "checkpoint", config)
    (folder / "checkpoint" / "tokenizer.json").unlink()
    moelite.quantize(folder / "checkpoint", folder / "store", experts=experts, dense=dense)
    return folder / "store"


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write(tmp_path_factory.mktemp("device"), "int4", num_experts=12)


def pieces(model: Any) -> np.ndarray:
    session, at, found = model.session(), 0, []
    for size in PIECES:
        found.append(session.append(IDS[at : at + size]))
        at += size
    return np.concatenate(found)


def error(got: np.ndarray, want: np.ndarray) -> float:
    assert got.shape == want.shape
    assert np.isfinite(got).all()
    return float(np.abs(got - want).max() / np.abs(want).max())


def budgets(store: Path) -> Iterator[int]:
    """Of the device: from the least to all experts."""
    with moelite.load(store, **ON, vram="2GiB") as model:
        found = model.footprint
        assert found.device is not None
        size = found.record_bytes
        # beside what is resident, a token's experts float
        for n in (0, 1, 3, 7, 12, found.experts_total):
            yield found.device.minimum_bytes + n * size


@pytest.mark.parametrize("case", tiny_models.variants(), ids="-".join)
def test_every_architecture_as_on_the_cpu(case: tuple[str, str], tmp_path: Path) -> None:
    """float32 throughout, so nothing but the order of sums differs."""
    tiny_models.write_checkpoint(*case, tmp_path / "c")
    moelite.quantize(tmp_path / "c", tmp_path / "s", experts="f32", dense="f32")
    ids = tiny_models.prompt(*case, 45)
    how: dict[str, Any] = {"ram": "1GiB", "context": 48, "chunk": 16, "kv": "f32", "threads": 1}
    with moelite.load(tmp_path / "s", **how) as model:
        want = model.forward(ids)
    with moelite.load(tmp_path / "s", **how, device="torch:cpu", vram="1GiB") as model:
        assert error(model.forward(ids), want) < 2e-5
        session = model.session()
        one_by_one = np.concatenate([session.append([i]) for i in ids])
        assert error(one_by_one, want) < 2e-5
        session.truncate(20)
        assert error(session.append(ids[20:]), want[20:]) < 2e-5


@pytest.mark.parametrize("experts", ["int8", "int4", "nf4", "vq-1", "qmoe"])
def test_every_kind_of_format_as_on_the_cpu(experts: str, tmp_path: Path) -> None:
    store = write(tmp_path, experts, "int4" if experts == "int4" else "int8")
    with moelite.load(store, **HOW) as model:
        want = pieces(model)
        text = [greedy(model, seed) for seed in range(10)]
    for miss in ("copy", "cpu"):
        with moelite.load(store, **{**ON, "miss": miss}, vram="1GiB") as model:
            assert error(pieces(model), want) < 1e-3
            assert [greedy(model, seed) for seed in range(10)] == text


def test_the_same_bits_at_every_budget_of_the_device(store: Path) -> None:
    want = None
    for budget in budgets(store):
        with moelite.load(store, **ON, vram=budget) as model:
            assert model.footprint.device.used_bytes <= budget
            assert model.device.held <= budget
            got = pieces(model)
        want = got if want is None else want
        np.testing.assert_array_equal(got, want)


def test_little_memory_below_changes_nothing(store: Path) -> None:
    with moelite.load(store, **ON, vram="1GiB") as model:
        want, least = pieces(model), model.footprint.minimum_bytes
    with moelite.load(store, **{**ON, "ram": least}, vram=next(budgets(store))) as model:
        np.testing.assert_array_equal(pieces(model), want)
        stats = model.stats()
        assert stats.misses > 0
        assert stats.upper is not None
        assert stats.upper.misses == stats.hits + stats.misses


@pytest.mark.parametrize("miss", ["copy", "cpu"])
@pytest.mark.parametrize("lookahead", ["off", "on"])
def test_counters_of_both_tiers_are_those_of_a_replay(
    store: Path, miss: str, lookahead: str
) -> None:
    from moelite.cache.split import ALL_COPIED, NONE_COPIED

    for budget in [*budgets(store)][1:]:
        told: list[tuple[int, list[int]]] = []
        options = {**ON, "miss": miss, "lookahead": lookahead}
        with moelite.load(store, **options, vram=budget) as model:
            model.on_route = lambda layer, ids: told.append((layer, ids[0].tolist()))  # noqa: B023
            session = model.session()
            for token in IDS:
                session.append([token])
            stats = model.stats()
            quotas = model.footprint.device.slots.quotas, model.footprint.slots.quotas
        assert len(told) == 2 * len(IDS)
        split = ALL_COPIED if miss == "copy" else NONE_COPIED
        assert (
            (stats.upper.hits, stats.upper.misses),
            (stats.hits, stats.misses),
        ) == replay_tiers(told, *quotas, split)


def test_a_token_whose_experts_are_there_takes_one_look(
    store: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The device finds its experts itself: the same bits, routes and counts as layer by layer."""

    def run() -> tuple[np.ndarray, Any, list[Any], int]:
        told: list[Any] = []
        with moelite.load(store, **ON, vram="1GiB") as model:
            model.on_route = lambda layer, ids: told.append((layer, ids.tolist()))
            decoder, blind = model._decoder, 0
            original = decoder._blind

            def counted() -> None:
                nonlocal blind
                blind += 1
                original()

            decoder._blind = counted
            session = model.session()
            first = session.append(IDS)
            rest = np.concatenate([session.append([i]) for i in IDS[:20]])
            return np.concatenate([first, rest]), model.stats().upper, told, blind

    seen = run()
    assert seen[3] > 10
    with monkeypatch.context() as patch:
        from moelite.gpu.decoder import DeviceDecoder

        patch.setattr(DeviceDecoder, "_unseen", lambda *args: False)
        unseen = run()
    assert unseen[3] == 0
    np.testing.assert_array_equal(seen[0], unseen[0])
    assert seen[1:3] == unseen[1:3]


def test_a_token_that_misses_is_done_again(store: Path) -> None:
    """Where some experts are away, tries fail now and then, and leave no trace."""
    budget = [*budgets(store)][4]
    with moelite.load(store, **ON, vram=budget) as model:
        decoder, tried = model._decoder, []
        original = decoder._unseen
        decoder._unseen = lambda *args: tried.append(original(*args)) or tried[-1]
        session = model.session()
        got = np.concatenate([session.append([i]) for i in IDS])
        decoder._settled = True  # now a try fails
        more = session.append([IDS[5]])
        stats = model.stats().upper
    with moelite.load(store, **ON, vram="1GiB") as model:
        session = model.session()
        want = np.concatenate([session.append([i]) for i in [*IDS, IDS[5]]])
    np.testing.assert_array_equal(np.concatenate([got, more]), want)
    assert stats.hits + stats.misses == 42 * 2 * 2
    assert tried.count(False) > 0


def test_a_layer_whose_experts_are_of_two_formats(tmp_path: Path) -> None:
    config = {**tiny_checkpoint.QWEN3_MOE, "moe_intermediate_size": 64}
    tiny_checkpoint.write_checkpoint(tmp_path / "c", config)
    (tmp_path / "c" / "tokenizer.json").unlink()
    rule = Rule(part="down", format="int8", experts=frozenset({0, 2}))
    moelite.quantize(tmp_path / "c", tmp_path / "s", recipe=Recipe(rules=(rule,)))
    with moelite.load(tmp_path / "s", **HOW) as model:
        assert all(len(entry.tiers) == 2 for entry in model.store.layers.values())
        want = pieces(model)
    for vram in ("1GiB", None):
        with moelite.load(
            tmp_path / "s", **ON, vram=vram or next(budgets(tmp_path / "s"))
        ) as model:
            assert error(pieces(model), want) < 1e-3


def test_forced_routes(store: Path) -> None:
    routes = np.array([[[3, 1], [0, 11]], [[2, 5], [4, 6]]], np.int32)
    with moelite.load(store, **HOW) as model:
        model.force_routes(routes)
        want = pieces(model)
    with moelite.load(store, **ON, vram="1GiB") as model:
        model.force_routes(routes)
        assert error(pieces(model), want) < 1e-3
        assert set(model.upper.resident(model.arch.moe_layers[1])) == {0, 11, 4, 6}


# --- memory that is not there -------------------------------------------------------------------


def test_a_device_that_runs_full_goes_on_with_fewer_experts(
    store: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with moelite.load(store, **ON, vram="1GiB") as model:
        session = model.session()
        want = [session.append(IDS[:7]), *(session.append([i]) for i in IDS[7:])]
    notes: list[str] = []
    with moelite.load(store, **ON, vram="1GiB", on_note=notes.append) as model:
        session = model.session()
        got = [session.append(IDS[:7])]
        before = model.footprint.device.experts_resident
        kernels = model._decoder._kernels

        def sometimes(name: str, times: list[bool]) -> None:
            work, full = getattr(kernels, name), iter(times)

            def wrapped(*args: Any) -> Any:
                if next(full, False):
                    raise torch.OutOfMemoryError("out of memory")
                return work(*args)

            monkeypatch.setattr(kernels, name, wrapped)

        # at the first product of a token, and between the experts of another
        sometimes("linear", [True])
        sometimes("gated", [False, False, True])
        got += [session.append([i]) for i in IDS[7:]]
        assert model.footprint.device.experts_resident < before
        assert model.device.held <= model.footprint.device.used_bytes
    np.testing.assert_array_equal(np.concatenate(got), np.concatenate(want))
    assert len(notes) == 2
    assert "out of memory" in notes[0]


def test_an_arena_that_does_not_fit_is_made_smaller(
    store: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with moelite.load(store, **ON, vram="1GiB") as model:
        want, planned = pieces(model), model.footprint.device
    zeros, room = Device.zeros, int(0.7 * planned.parts[-1].bytes)

    def crowded(self: Device, shape: Any, dtype: Any) -> Any:
        if dtype is torch.uint8 and shape[0] > room:
            raise torch.OutOfMemoryError("out of memory")
        return zeros(self, shape, dtype)

    monkeypatch.setattr(Device, "zeros", crowded)
    notes: list[str] = []
    with moelite.load(store, **ON, vram="1GiB", on_note=notes.append) as model:
        assert 0 < model.footprint.device.parts[-1].bytes <= room
        np.testing.assert_array_equal(pieces(model), want)
    assert notes


def test_too_little_is_refused_with_what_would_do(store: Path) -> None:
    least = next(budgets(store))
    with pytest.raises(BudgetError, match="torch:cpu") as refused:
        moelite.load(store, **ON, vram=least - 4096)
    assert refused.value.fix is not None
    assert f"--vram {-(-least // 2**20)}MiB" in refused.value.fix
    with pytest.raises(BudgetError, match="needs at least"):
        moelite.load(store, **{**ON, "ram": "100MiB"}, vram="1GiB")


def test_devices_are_refused_that_are_not_there() -> None:
    assert devices.choose("cpu") is None
    assert devices.choose("torch:cpu") == "torch:cpu"
    with pytest.raises(UsageError, match="not known"):
        devices.choose("gpu")
    for name in ("cuda", "cuda:1", "xpu"):
        with pytest.raises(UsageError, match="finds no"):
            devices.choose(name)


def test_what_belongs_to_one_path_is_refused_on_the_other(store: Path) -> None:
    with pytest.raises(UsageError, match="--vram"):
        moelite.load(store, **HOW, vram="1GiB")
    with pytest.raises(UsageError, match="int8"):
        moelite.load(store, **ON, vram="1GiB", kv="int8")


@pytest.mark.parametrize("model_type", tiny_models.model_types())
def test_a_checkpoint_in_bitsandbytes_4_bits_runs_as_it_is(model_type: str, tmp_path: Path) -> None:
    """Packed by bitsandbytes itself; what its rows allow keeps its numbers in the store."""
    functional = pytest.importorskip("bitsandbytes.functional")
    from safetensors.torch import load_file, save_file

    tiny_models.write_checkpoint(model_type, "plain", tmp_path / "c")
    file = tmp_path / "c" / "model.safetensors"
    tensors, config = load_file(file), json.loads((tmp_path / "c" / "config.json").read_text())
    packed = {}
    for name, weight in tensors.items():
        linear = name.endswith("_proj.weight") or ".experts." in name
        if not linear or weight.ndim != 2 or weight.numel() % 64:
            packed[name] = weight
            continue
        codes, state = functional.quantize_4bit(weight, blocksize=64, quant_type="nf4")
        packed[name] = codes
        packed |= {f"{name}.{key}": part for key, part in state.as_dict(packed=True).items()}
    save_file(packed, file)
    config["quantization_config"] = {"quant_method": "bitsandbytes", "load_in_4bit": True}
    (tmp_path / "c" / "config.json").write_text(json.dumps(config))
    report = moelite.quantize(tmp_path / "c", tmp_path / "s")
    assert any("bitsandbytes nf4" in kind for kind in report.encodings)
    ids = tiny_models.prompt(model_type, "plain", 40)
    told: dict[str, list[np.ndarray]] = {"cpu": [], "device": []}
    with moelite.load(tmp_path / "s", **HOW) as model:
        assert "nf4" in model.store.expert_format
        model.on_route = lambda _, ids: told["cpu"].append(np.sort(ids))
        want = model.forward(ids)
    with moelite.load(tmp_path / "s", **ON, vram="1GiB") as model:
        model.on_route = lambda _, ids: told["device"].append(np.sort(ids))
        got = model.forward(ids)
        model.on_route, session = None, model.session()
        one_by_one = np.concatenate([session.append([i]) for i in ids])
    # These models are made decisive by large weights. Where the last bit of a sum turns the code of
    # an activation, later layers make up to 1 % of it, and may choose another expert: moving the
    # embeddings by 1e-7 does the same to either path.
    pairs = zip(told["cpu"], told["device"], strict=True)
    same = np.all([(a == b).all(1) for a, b in pairs], axis=0)
    assert same.mean() > 0.9
    for found in (got, one_by_one):
        assert error(found[same], want[same]) < 0.02
        assert error(found[:1], want[:1]) < 1e-4
