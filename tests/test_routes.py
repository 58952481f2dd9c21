"""Recorded routing in a running model: forced onto it, recorded from it, counted like a replay."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import tiny_checkpoint
from test_trace import random_routes

import moelite
from moelite.cache import replay
from moelite.cache.policy import count
from moelite.cache.trace import Trace, write_trace
from moelite.cli import main
from moelite.errors import UsageError

IDS = np.random.default_rng(3).integers(0, 100, 41).tolist()
EXPERTS = {"qwen3_moe": 6, "mixtral": 4, "plain": 6}


def config(name: str) -> dict:
    """qwen3_moe (a dense layer between two MoE ones), mixtral, or weights not renormalized."""
    if name == "mixtral":
        return tiny_checkpoint.MIXTRAL
    return {**tiny_checkpoint.QWEN3_MOE, "norm_topk_prob": name != "plain"}


@pytest.fixture(scope="module", params=EXPERTS)
def store(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("routes") / request.param
    tiny_checkpoint.write_checkpoint(folder / "checkpoint", config(request.param))
    (folder / "checkpoint" / "tokenizer.json").unlink()
    moelite.quantize(folder / "checkpoint", folder / request.param, experts="int4")
    return folder / request.param


def budgets(store: Path) -> list[int]:
    """The minimum, a few that keep some experts, and all."""
    plan = moelite.footprint(store, ram="1GiB", context=64, threads=2)
    return [plan.minimum_bytes + n * plan.record_bytes for n in (0, 3, 5, plan.experts_total)]


def routes_for(model: moelite.Model, tokens: int = 41, seed: int = 2) -> np.ndarray:
    layers = len(model.arch.moe_layers)
    return random_routes(seed, tokens, layers, EXPERTS[model.store.path.name], 2)


def trace_of(routes: np.ndarray, model: moelite.Model) -> Trace:
    return Trace(routes=routes, experts=EXPERTS[model.store.path.name])


def one_by_one(model: moelite.Model, ids: list[int]) -> np.ndarray:
    session = model.session()
    return np.concatenate([session.append([i]) for i in ids])


def record(model: moelite.Model, ids: list[int], *, chunk: int) -> np.ndarray:
    """routes [T, L, K] as on_route tells them."""
    told: dict[int, list[np.ndarray]] = {layer: [] for layer in model.arch.moe_layers}
    model.on_route = lambda layer, selected: told[layer].append(selected.copy())
    session = model.session()
    for at in range(0, len(ids), chunk):
        session.append(ids[at : at + chunk])
    model.on_route = None
    return np.stack([np.concatenate(rows) for rows in told.values()], axis=1)


def test_the_counter_of_a_forced_run_equals_the_replay(store: Path) -> None:
    for budget in budgets(store):
        with moelite.load(store, ram=budget, context=64) as model:
            routes = routes_for(model)
            model.force_routes(routes)
            one_by_one(model, IDS)
            share = model.footprint.slots.quotas
            want, got = count(trace_of(routes, model), list(share.values())), model.stats()
            assert (got.hits, got.misses) == (want.hits, want.misses)
            assert got.hits + got.misses == routes.size


def test_the_counter_of_a_free_run_equals_the_replay_of_its_trace(store: Path) -> None:
    for budget in budgets(store):
        with moelite.load(store, ram=budget, context=64) as model:
            routes = record(model, IDS, chunk=1)
            share = model.footprint.slots.quotas
            want, got = count(trace_of(routes, model), list(share.values())), model.stats()
            assert (got.hits, got.misses) == (want.hits, want.misses)


def test_the_routes_told_are_those_forced(store: Path) -> None:
    with moelite.load(store, ram=budgets(store)[1], context=64) as model:
        routes = routes_for(model)
        model.force_routes(routes)
        np.testing.assert_array_equal(record(model, IDS, chunk=1), routes)
        np.testing.assert_array_equal(record(model, IDS, chunk=9), routes)
        routes = routes[:7]  # shorter than the run: it begins again
        model.force_routes(routes)
        np.testing.assert_array_equal(
            record(model, IDS[:17], chunk=5), np.concatenate([routes, routes, routes[:3]])
        )


def test_forcing_a_routers_own_choice_changes_no_bit(store: Path) -> None:
    with moelite.load(store, ram=budgets(store)[2], context=64) as model:
        want = model.forward(IDS)
        model.force_routes(record(model, IDS, chunk=41))
        np.testing.assert_array_equal(model.forward(IDS), want)
        np.testing.assert_array_equal(one_by_one(model, IDS), want)


def test_forced_logits_are_the_same_for_a_token_a_chunk_and_a_budget(store: Path) -> None:
    wants = []
    for budget in budgets(store):
        with moelite.load(store, ram=budget, context=64) as model:
            free = model.forward(IDS)
            model.force_routes(routes_for(model))
            want = model.forward(IDS)
            np.testing.assert_array_equal(one_by_one(model, IDS), want)
            wants.append(want)
            assert np.isfinite(want).all()
            assert (np.abs(want - free).max(axis=1) > 0).sum() > 35  # few routes agree by chance
            model.force_routes(None)
            np.testing.assert_array_equal(model.forward(IDS), free)
            np.testing.assert_array_equal(one_by_one(model, IDS), free)
    for want in wants[1:]:
        np.testing.assert_array_equal(want, wants[0])


def test_routes_of_another_shape_are_refused(store: Path) -> None:
    with moelite.load(store, ram="1GiB", context=64) as model:
        routes = routes_for(model)
        for wrong, says in (
            (routes[:, :1], "1 MoE layers with 2 experts each"),
            (routes[:, :, :1], "with 1 experts each"),
            (routes + np.int32(5), r"this model's layers have 0\.\.[35]"),
            (routes * 0, "an expert of MoE layer 0 twice"),
        ):
            with pytest.raises(UsageError, match=says):
                model.force_routes(wrong)
        want = model.forward(IDS)
        model.force_routes(None)
        np.testing.assert_array_equal(model.forward(IDS), want)


def test_bench_with_a_route_hits_like_the_replay(store: Path, tmp_path: Path, capsys) -> None:
    """Of its only run: everything but the prefill, from what the warm-up and the prompt left."""
    file = tmp_path / "t.jsonl"
    with moelite.load(store, ram=budgets(store)[1], context=64) as model:
        routes, share = routes_for(model), model.footprint.slots.quotas
        experts = EXPERTS[store.name]
    write_trace(file, routes)
    sizes = ["--prompt", "9", "--gen", "12", "--repeat", "1", "--context", "64"]
    where = [str(store), "--ram", str(budgets(store)[1]), "--route", str(file)]
    assert main.exit_code(["bench", *where, *sizes, "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["route"] == str(file)
    # lookups as in the run: 4 warm-up tokens at once, one more, then the prompt, then each token
    lookups = []
    for at, tokens in ((0, 4), (4, 1), (0, 9), *((p, 1) for p in range(9, 20))):
        for i, layer in enumerate(share):
            used = routes[at : at + tokens, i]
            lookups.append((layer, used[0].tolist() if tokens == 1 else np.unique(used).tolist()))
    decode = 11 * len(share)
    all_hits, _ = replay(lookups, share)
    before, _ = replay(lookups[:-decode], share)
    assert report["decode_experts"]["hits"] == all_hits - before
    assert report["decode_experts"]["hits"] + report["decode_experts"]["misses"] == decode * 2
    assert main.exit_code(["bench", *where, *sizes]) == 0
    assert f"routing of {file}; experts in memory while decoding: " in capsys.readouterr().out
    write_trace(file, routes + np.int32(experts))
    assert main.exit_code(["bench", *where, *sizes]) == 2
    assert "this model's layers have" in capsys.readouterr().err
