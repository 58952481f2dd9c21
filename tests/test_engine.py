"""A loaded model within its budget: same bits at every budget, promised sizes, clear refusals."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import tiny_checkpoint

import moelite
from moelite.budget import RUNTIME_BYTES, Footprint, dense_bytes
from moelite.cache import replay
from moelite.engine import Model
from moelite.errors import BudgetError, CheckpointError, UsageError
from moelite.jit import kernel
from moelite.kv import KVCache, kv_bytes
from moelite.step import JOB_WORDS, LAYER_PHASES, _run
from moelite.sync import RING, Crew, close_job, open_job, slot_of, sync_size
from moelite.units import parse_bytes
from moelite.workspace import Workspace, workspace_bytes

IDS = np.random.default_rng(3).integers(0, 100, 41).tolist()


@pytest.fixture(scope="module", params=["int4", "int8", "bf16", "f32"])
def store(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("engine")
    tiny_checkpoint.write_checkpoint(folder / "checkpoint", tiny_checkpoint.QWEN3_MOE)
    (folder / "checkpoint" / "tokenizer.json").unlink()
    dense = request.param if request.param in ("bf16", "f32") else "int8"
    moelite.quantize(folder / "checkpoint", folder / "store", experts=request.param, dense=dense)
    return folder / "store"


def least(store: Path) -> Footprint:
    return moelite.footprint(store, ram="1GiB", context=64, threads=2)


def budgets(store: Path) -> list[int]:
    """From the minimum to every expert resident, a record at a time where it matters."""
    plan = least(store)
    most = plan.experts_total + 3
    return [plan.minimum_bytes + n * plan.record_bytes for n in (0, 1, 2, 3, 5, 8, most)]


def test_logits_are_bit_equal_at_every_budget_chunk_and_thread_count(store: Path) -> None:
    with moelite.load(store, ram="1GiB", context=64, threads=1, chunk=64) as model:
        want = model.forward(IDS)
        assert model.footprint.experts_resident == model.footprint.experts_total
    assert np.isfinite(want).all()
    assert np.abs(want).max() > 0.1
    for n, budget in enumerate(budgets(store)):
        with moelite.load(store, ram=budget, context=64, threads=1 + n % 2) as model:
            np.testing.assert_array_equal(model.forward(IDS), want)
            session = model.session()
            got = [session.append(IDS[:7]), *(session.append([i]) for i in IDS[7:])]
            np.testing.assert_array_equal(np.concatenate(got), want)


def test_the_sweep_really_misses(store: Path) -> None:
    """The lowest budget keeps hardly anything, the highest reads each record once."""
    seen = []
    for budget in budgets(store):
        with moelite.load(store, ram=budget, context=64) as model:
            session = model.session()
            for i in IDS:
                session.append([i])
            seen.append(model.stats())
    assert 0 < seen[0].hits < seen[0].misses // 5  # one slot is kept, for the first layer
    assert seen[-1].misses <= least(store).experts_total
    assert [s.misses for s in seen] == sorted((s.misses for s in seen), reverse=True)
    assert all(s.bytes_read == s.misses * least(store).record_bytes for s in seen)


def test_counters_equal_an_offline_replay(store: Path) -> None:
    for budget in budgets(store)[2:5]:
        with moelite.load(store, ram=budget, context=64) as model:
            trace: list[tuple[int, list[int]]] = []

            def record(layer, selected, trace=trace):
                order = selected[0] if len(selected) == 1 else np.unique(selected)
                trace.append((layer, order.tolist()))

            model.on_route = record
            session = model.session()
            session.append(IDS[:9])
            for i in IDS[9:]:
                session.append([i])
            stats, share = model.stats(), model.footprint.slots.quotas
        assert replay(trace, share) == (stats.hits, stats.misses)
        assert stats.hits > 0
        assert stats.misses > 0


@kernel
def _come_late(state, jobs, number):
    # what a helper does that entered job `number` and was put aside until now
    row = number % RING * JOB_WORDS
    _run(Crew(state, slot_of(state, number), 2, 1), jobs[row : row + JOB_WORDS])


def test_a_helper_that_wakes_after_its_job_changes_no_bit(store: Path, monkeypatch) -> None:
    """After every job a helper wakes in each of the jobs before it, as long as slots are kept."""
    with moelite.load(store, ram="1GiB", context=64, threads=1) as model:
        want = model.forward(IDS)
    with moelite.load(store, ram=least(store).minimum_bytes, context=64, threads=1) as model:
        model._decoder._alone_tokens = 0  # a tiny model would not use its helpers
        team, inner = model.team, model.team.run
        team.size, team._sync = 2, np.zeros(sync_size(2, 5 * LAYER_PHASES), np.int64)

        def run(*args, **options):
            inner(*args, **options)
            for number in range(max(1, team._number - RING + 2), team._number + 1):
                _come_late(team._sync, team._jobs, number)

        monkeypatch.setattr(team, "run", run)
        team._helpers = []
        session = model.session()
        got = [session.append(IDS[:7]), *(session.append([i]) for i in IDS[7:])]
        np.testing.assert_array_equal(np.concatenate(got), want)


@kernel
def _helper_first(state, jobs, number, phases):
    # a helper does the whole job while the caller is put aside before its first piece
    slot, row = open_job(state, 2, number, phases), number % RING * JOB_WORDS
    words = jobs[row : row + JOB_WORDS]
    _run(Crew(state, slot, 2, 1), words)
    _run(Crew(state, slot, 2, 0), words)
    close_job(state)


def test_a_helper_that_is_layers_ahead_changes_no_bit(store: Path, monkeypatch) -> None:
    """The caller finds every phase over, and must stop at the layer where the helper stopped."""
    with moelite.load(store, ram="1GiB", context=64, threads=1) as model:
        want = model.forward(IDS)
    most = moelite.footprint(store, ram="1GiB", context=64)
    some = most.minimum_bytes + most.experts_total // 2 * most.record_bytes  # layers hit and miss
    with moelite.load(store, ram=some, context=64, threads=2) as model:
        model._decoder._alone_tokens = 0  # a tiny model would not use its helpers
        team = model.team
        state = np.zeros(sync_size(2, 5 * LAYER_PHASES), np.int64)

        def run(words, phases, keep=None, *, alone=False):
            team._number += 1
            row = team._number % RING * JOB_WORDS
            team._jobs[row : row + len(words)] = words
            _helper_first(state, team._jobs, team._number, phases)

        monkeypatch.setattr(team, "run", run)
        session = model.session()
        got = [session.append(IDS[:7]), *(session.append([i]) for i in IDS[7:])]
        np.testing.assert_array_equal(np.concatenate(got), want)
        assert model.stats().hits > 0
        assert model.stats().misses > 0


def test_buffers_have_the_promised_size(store: Path) -> None:
    def size(buffer: object) -> int:
        if isinstance(buffer, np.ndarray):
            return buffer.nbytes
        if isinstance(buffer, dict):
            return sum(map(size, buffer.values()))
        return sum(map(size, buffer)) if isinstance(buffer, tuple | list) else 0

    with moelite.load(store, ram="1GiB", context=64, threads=2) as model:
        parts = {p.name: p.bytes for p in model.footprint.parts}
        work = Workspace(model.arch, 32, 2)
        held = sum(size(v) for k, v in vars(work).items() if k != "rows")
        assert held == workspace_bytes(model.arch, 32, 2)
        kv = KVCache(model.arch, 64, "f16")
        assert size(kv.k) + size(kv.v) == kv_bytes(model.arch, 64, "f16") == parts["kv"]
        dense = sum(model.store.dense_entry(k).nbytes for k in model.store.dense_keys())
        assert dense == dense_bytes(model.arch, model.sizes.dense) == parts["dense weights"]
        assert model.experts.arena.size == parts["experts"]
        assert model.footprint.used_bytes <= model.footprint.budget_bytes


def test_footprint_of_checkpoint_and_store_agree(store: Path) -> None:
    model = moelite.footprint(store, ram="1GiB", context=64)
    same = moelite.footprint(
        store.parent / "checkpoint",
        ram="1GiB",
        context=64,
        experts=model.expert_format,
        dense=model.dense_format,
    )
    assert same == model


def test_below_the_minimum_it_refuses_with_the_minimum(store: Path) -> None:
    minimum = least(store).minimum_bytes
    with moelite.load(store, ram=minimum, context=64, threads=2) as model:
        assert model.footprint.slots.count == 2
    with pytest.raises(BudgetError, match="needs at least") as refused:
        moelite.load(store, ram=minimum - 1, context=64, threads=2)
    assert refused.value.exit_code == 3
    named = refused.value.fix.split("--ram ")[1].split(",")[0]
    moelite.load(store, ram=parse_bytes(named), context=64, threads=2).close()
    with pytest.raises(BudgetError, match="more than this machine has"):
        moelite.load(store, ram="4096TiB", context=64)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"context": 0}, "context 0 is not in 1..128"),
        ({"context": 129}, "context 129 is not in 1..128"),
        ({"threads": 0}, "threads 0"),
        ({"ram": "much"}, "'much' is not a size"),
        ({"ram": "0GiB"}, "above zero"),
    ],
)
def test_bad_options_are_refused(store: Path, options: dict, says: str) -> None:
    with pytest.raises(UsageError, match=says):
        moelite.load(store, **options)


def test_sessions(store: Path) -> None:
    with moelite.load(store, ram="1GiB", context=32) as model:
        first = model.session()
        kept = first.append(IDS[:20])
        assert first.ids == IDS[:20]
        first.truncate(12)
        np.testing.assert_array_equal(first.append(IDS[12:20]), kept[12:])
        with pytest.raises(UsageError, match=r"20 \+ 13 tokens do not fit the context of 32"):
            first.append(IDS[:13])
        assert first.ids == IDS[:20]  # a refused append loses nothing
        with pytest.raises(UsageError, match=r"must be 0\.\.100"):
            first.append([5, 101])
        with pytest.raises(UsageError, match="no tokens"):
            first.advance([])
        second = model.session()
        np.testing.assert_array_equal(second.advance(IDS[:20]), kept[-1])
        with pytest.raises(UsageError, match="taken over by a newer one"):
            first.append([1])


def test_each_streams_the_same_logits(store: Path) -> None:
    with moelite.load(store, ram="1GiB", context=64, chunk=16) as model:
        rows: list[np.ndarray] = []
        model.session().each(IDS, lambda i, row: rows.append(row.copy()))
        np.testing.assert_array_equal(np.array(rows), model.forward(IDS))


def test_half_precision_kv_is_close_to_full(store: Path) -> None:
    with moelite.load(store, ram="1GiB", context=64, kv="f32") as model:
        full = model.forward(IDS)
    with moelite.load(store, ram="1GiB", context=64) as model:
        half = model.forward(IDS)
    assert 0 < np.abs(half - full).max() < 0.02 * np.abs(full).max()


def test_a_store_without_tokenizer_takes_ids_only(store: Path) -> None:
    with moelite.load(store, ram="1GiB") as model:
        assert model.forward([1, 2]).shape == (2, 101)
        with pytest.raises(CheckpointError, match=r"no tokenizer\.json"):
            model.tokenizer.encode("text", special=True)


def test_closing_gives_threads_back(store: Path) -> None:
    import threading

    before = threading.active_count()
    model: Model = moelite.load(store, ram="1GiB", context=64, threads=2)
    model.forward(IDS)
    model.close()
    for thread in threading.enumerate():
        if thread.daemon:
            thread.join(1)
    assert threading.active_count() <= before


def test_the_runtime_estimate_holds(store: Path) -> None:
    """A fresh process that runs a tiny model peaks below what the plan calls runtime."""
    code = (
        "import sys, json, moelite\n"
        "from moelite.process import peak_rss_bytes\n"
        "import rich.live, rich.markdown, prompt_toolkit, jinja2, typer, tokenizers\n"
        f"with moelite.load({str(store)!r}, ram='1GiB', context=64) as m:\n"
        f"    s = m.session(); s.append({IDS!r}); s.truncate(0); s.append([1])\n"
        "print(json.dumps(peak_rss_bytes()))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    peak = json.loads(done.stdout)
    assert 0.7 * RUNTIME_BYTES < peak < RUNTIME_BYTES  # it holds, and is not idle padding
