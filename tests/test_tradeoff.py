"""A recipe for a size: costs as float64 has them, sizes that are kept, the better mix."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from reference import Reference
from tiny_checkpoint import MIXTRAL, write_checkpoint
from typer.testing import CliRunner

import moelite
from moelite import target as target_module
from moelite.allocation import Unit
from moelite.calibrate import cut
from moelite.checkpoint import open_checkpoint
from moelite.cli.main import app
from moelite.errors import BudgetError, StoreError, UsageError
from moelite.models import build
from moelite.quant import FORMATS
from moelite.recipe import Recipe
from moelite.target import Target
from moelite.tradeoff import SAMPLE, measure, solve

IDS = np.random.default_rng(0).integers(0, 100, 700).tolist()
SMALL = ("vq-1", "int4", "int8")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("target")
    write_checkpoint(folder, MIXTRAL)
    (folder / "tokenizer.json").unlink()
    return folder


class Inputs(Reference):
    """Remembers what every MoE layer read: its MoE, and the normed input."""

    def forward(self, ids):
        self.seen: list = []
        return super().forward(ids)

    def _moe(self, moe, x):
        self.seen.append((moe, x))
        return super()._moe(moe, x)


def by_definition(model: Path, ids: list[int]) -> dict[tuple[int, int], float]:
    """Of down in int8: the sum over tokens of (routing weight)^2 / mean(residual^2) |E h|^2."""
    source = open_checkpoint(model)
    arch = build(source.config)
    weights = {name: source.raw(name) for name in source.names()}
    reference, found = Inputs(arch, weights), {}
    reference.forward(ids)
    for number, (moe, x) in enumerate(reference.seen):
        layer, state = arch.layers[number], reference.states[number]
        normed = reference._norm(layer.input_norm, state)
        state = state + reference._attention(layer.attention, normed)
        logits = x @ reference._read(moe.router.linear.weight).T
        scores = np.exp(logits - logits.max(-1, keepdims=True))
        scores /= scores.sum(-1, keepdims=True)
        for t, row in enumerate(np.argsort(-scores, -1)[:, : moe.router.top_k]):
            share = scores[t, row] / (scores[t, row].sum() if moe.router.renormalize else 1)
            for expert, weight in zip(row.tolist(), share, strict=True):
                parts = [weights[p.weight.at(expert).name] for p in moe.experts.matrices]
                gate, up = (x[t] @ part.T.astype(np.float64) for part in parts[:2])
                hidden, down = gate / (1 + np.exp(-gate)) * up, parts[2]
                error = FORMATS["int8"].unpack(FORMATS["int8"].pack(down), *down.shape) - down
                cost = weight**2 / np.mean(state[t] ** 2) * np.square(error @ hidden).sum()
                found[number, expert] = found.get((number, expert), 0.0) + cost
    return found


def test_costs_are_shares_of_the_residual(model: Path) -> None:
    """By their definition in float64, but for what calibration does not believe of few tokens."""
    source = open_checkpoint(model)
    ids = IDS[:120]
    units = measure(source, build(source.config), cut(ids, 120), ("int4", "int8"))
    assert len(units) == 3 * 4 * 2
    want = by_definition(model, ids)
    for unit in units:
        assert unit.costs["int8"] < unit.costs["int4"]
        if unit.part == "down":
            assert unit.costs["int8"] == pytest.approx(want[unit.layer, unit.expert], rel=0.25)


def test_without_a_text_costs_are_errors_of_weights(model: Path) -> None:
    source = open_checkpoint(model)
    arch = build(source.config)
    found = measure(source, arch, None, ("int4",))
    unit = next(u for u in found if (u.layer, u.expert, u.part) == (1, 2, "down"))
    weight = source.raw("model.layers.1.block_sparse_moe.experts.0.w2.weight")
    assert len(weight) == SAMPLE
    error = FORMATS["int4"].unpack(FORMATS["int4"].pack(weight), *weight.shape) - weight
    share = np.square(error, dtype=np.float64).sum() / np.square(weight, dtype=np.float64).sum()
    assert unit.costs["int4"] == pytest.approx(share, rel=1e-5)


def units(use: list[float]) -> list[Unit]:
    """Two layers of as many experts, used so much; the first layer is twice as sensitive."""
    found = []
    for layer in range(2):
        for expert, weight in enumerate(use):
            for part in ("gate_up", "down"):
                costs = {"vq-1": 0.3, "int4": 0.005}
                costs = {k: v * weight * (2 - layer) for k, v in costs.items()}
                sizes = {"vq-1": 100_000, "int4": 400_000}
                found.append(Unit(part=part, layer=layer, expert=expert, sizes=sizes, costs=costs))
    return found


def test_experts_used_alike_get_one_format_a_layer() -> None:
    found = solve(units([1, 1, 1, 1]), Recipe(), 8 * 2 * 250_000 + 8 * 4096)
    assert not any(rule.experts for rule in found.rules)
    assert found.expert(0, 0) == ("int4", "int4")
    assert found.expert(1, 3) == ("vq-1", "vq-1")


def test_experts_hardly_used_get_less() -> None:
    found = solve(units([1, 1, 0.01, 0.01]), Recipe(), 8 * 2 * 250_000 + 8 * 4096)
    for layer in range(2):
        assert found.expert(layer, 0) == ("int4", "int4")
        assert found.expert(layer, 3) == ("vq-1", "vq-1")


@pytest.mark.parametrize("target", [Target(bpw=6.0, formats=SMALL), Target(200_000, formats=SMALL)])
def test_a_store_fits_its_target(model: Path, tmp_path: Path, target: Target) -> None:
    report = moelite.quantize(model, tmp_path / "s", dense="int4", target=target, calibrate=IDS)
    size = sum(p.stat().st_size for p in (tmp_path / "s").iterdir())
    params = sum(row.params for row in report.classes)
    most = target.size or target.bpw * params / 8
    assert size <= most
    assert report.recipe["target"]
    # an unfinished one goes on with the recipe that it began with, measured once
    (tmp_path / "s" / "moelite.json").rename(tmp_path / "s" / "moelite.partial.json")
    again = moelite.quantize(model, tmp_path / "s", dense="int4", target=target, calibrate=IDS)
    assert again.recipe == report.recipe
    with moelite.load(tmp_path / "s", ram="1GiB", context=64) as loaded:
        assert np.isfinite(loaded.forward(IDS[:20])).all()


def test_targets_that_cannot_be(model: Path, tmp_path: Path) -> None:
    for target, words in (
        (Target(1000), "all but the routed experts"),
        (Target(bpw=99.0), "not in 0..32"),
        (Target(), "one of them"),
        (Target(bpw=2.0, formats=("qmoe",)), "no format to choose from"),
    ):
        with pytest.raises(UsageError, match=words):
            moelite.quantize(model, tmp_path / "x", target=target)
    assert not (tmp_path / "x").exists()


def test_a_folder_in_use_is_refused_before_anything_is_measured(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def measured(*_: object) -> None:
        raise AssertionError("minutes of work for nothing")

    monkeypatch.setattr(target_module, "measure", measured)
    (tmp_path / "s").mkdir()
    (tmp_path / "s" / "mine.txt").write_text("x")
    with pytest.raises(StoreError, match="not empty"):
        moelite.quantize(model, tmp_path / "s", target=Target(bpw=12.0))
    options = {"target": Target(bpw=12.0), "calibrate": IDS}
    with pytest.raises(BudgetError, match="calibration takes at least"):
        moelite.quantize(model, tmp_path / "t", ram="100MiB", **options)


def test_the_command_shows_what_was_chosen(model: Path, tmp_path: Path) -> None:
    call = ["quantize", str(model), str(tmp_path / "s"), "--dense", "int4", "--dry-run"]
    call += ["--target-bpw", "7", "--formats", "vq-1,int4,int8"]
    result = CliRunner().invoke(app, call)
    assert result.exit_code == 0, result.output
    assert "chosen for" in result.output
    found = json.loads(CliRunner().invoke(app, [*call, "--json"]).output)
    assert found["bytes_after"] * 8 < 7 * sum(c["params"] for c in found["classes"])
    assert not (tmp_path / "s").exists()
    wrong = CliRunner().invoke(app, [*call[:3], "--formats", "int4"])
    assert isinstance(wrong.exception, UsageError)


def test_a_recipe_keeps_its_target() -> None:
    recipe = replace(Recipe(), target="5 bytes of int4")
    assert recipe.as_json()["target"] == "5 bytes of int4"
