"""Format-free kernels against plain float64 numpy."""

from __future__ import annotations

import os
import threading

import numpy as np
import pytest

from moelite import ops, sync
from moelite.jit import inner, kernel
from moelite.kernels import SUM_RUN, _add_parts
from moelite.program import Sum
from moelite.threads import default_threads

RNG = np.random.default_rng(0)


def normal(*shape: int) -> np.ndarray:
    return RNG.normal(size=shape).astype(np.float32)


@kernel
def _norm(x, norm, out):
    for t in range(x.shape[0]):
        ops.norm_run(x.reshape(-1), t * x.shape[1], norm, out.reshape(-1), t * out.shape[1])


@pytest.mark.parametrize("size", [64, 20, 7, 8])
@pytest.mark.parametrize("centred", [True, False])
@pytest.mark.parametrize("weighted", [True, False])
@pytest.mark.parametrize("biased", [True, False])
def test_norms(size: int, centred: bool, weighted: bool, biased: bool) -> None:
    """RMSNorm and LayerNorm, with and without weight and bias; the padding is not touched."""
    x = normal(5, size + 4)
    weight = normal(size) if weighted else ops.EMPTY
    bias = normal(size) if biased else ops.EMPTY
    out = np.full_like(x, 7)
    _norm(x, ops.NormWeights(weight, bias, size, np.float32(1e-5), centred), out)
    runs = x[:, :size].astype(np.float64)
    if centred:
        runs = runs - runs.mean(-1, keepdims=True)
    want = runs / np.sqrt((runs**2).mean(-1, keepdims=True) + 1e-5)
    want = want * (weight if weighted else 1) + (bias if biased else 0)
    np.testing.assert_allclose(out[:, :size], want, rtol=1e-5, atol=1e-6)
    assert (out[:, size:] == 7).all()


@kernel
def _rope(x, heads, head_dim, tables, interleaved):
    for t in range(x.shape[0]):
        for h in range(heads):
            at = t * x.shape[1] + h * head_dim
            ops.rotate_run(x.reshape(-1), at, tables[0][t], tables[1][t], interleaved)


@pytest.mark.parametrize("interleaved", [True, False])
def test_rope_rotates_pairs(interleaved: bool) -> None:
    """Partial rotary: the first 6 of 10 dimensions; a rotation keeps each pair's length."""
    freq = np.array([1.0, 0.1, 0.01], np.float32)
    cos, sin = np.zeros((4, 3), np.float32), np.zeros((4, 3), np.float32)
    ops.rope_table(freq, 1.0, 5, cos, sin)
    angle = np.arange(5, 9)[:, None] * freq.astype(np.float64)
    np.testing.assert_allclose(cos, np.cos(angle), rtol=1e-6)
    np.testing.assert_allclose(sin, np.sin(angle), rtol=1e-6, atol=1e-7)
    x = normal(4, 20)
    got = x.copy()
    _rope(got, 2, 10, (cos, sin), interleaved)
    heads, turned = x.reshape(4, 2, 10), got.reshape(4, 2, 10)
    first, second = (slice(0, 6, 2), slice(1, 6, 2)) if interleaved else (slice(3), slice(3, 6))
    z = (heads[..., first] + 1j * heads[..., second]) * np.exp(1j * angle)[:, None]
    np.testing.assert_allclose(turned[..., first], z.real, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(turned[..., second], z.imag, rtol=1e-5, atol=1e-6)
    np.testing.assert_array_equal(turned[..., 6:], heads[..., 6:])


@kernel
def _silu(both, out):
    for i in range(0, out.size, 8):
        ops.silu_gate_8(both, 2 * i, out, i)


def test_silu_gate() -> None:
    gate, up = normal(64) * 8, normal(64)
    g = gate.astype(np.float64)
    want = g / (1 + np.exp(-g)) * up
    both, out = np.stack([gate.reshape(8, 8), up.reshape(8, 8)], axis=1), np.empty_like(gate)
    _silu(both.reshape(-1), out)
    np.testing.assert_allclose(out, want, rtol=2e-6, atol=1e-7)


@kernel
def _sum(total, tokens):
    for t in range(tokens):
        for start in range(0, total.size, SUM_RUN):
            _add_parts(total, t, start)


def test_parts_are_summed_in_the_routers_order() -> None:
    """Large terms of both signs: float32 addition in any other order gives other bits."""
    parts = np.array([1e8, 1.0, -1e8, 3.0], np.float32)

    def total(parts: np.ndarray) -> float:
        x, wide = np.zeros(8, np.float32), np.zeros((4, 8), np.float32)
        wide[:, 0] = parts
        _sum(Sum(x, 8, 1, wide.reshape(-1), np.ones(4, np.float32), 4, ops.EMPTY), 1)
        return float(x[0])

    assert total(parts) == ((np.float32(1e8) + np.float32(1)) - np.float32(1e8)) + np.float32(3)
    assert total(parts[[0, 2, 1, 3]]) == 4


def test_a_gate_scales_the_sum_by_its_sigmoid() -> None:
    x, parts = np.zeros((2, 8), np.float32), normal(2, 8)
    gates = normal(2, 8)
    ones = np.ones(2, np.float32)
    _sum(Sum(x.reshape(-1), 8, 5, parts.reshape(-1), ones, 1, gates.reshape(-1)), 2)
    want = parts / (1 + np.exp(-gates[:, :1].astype(np.float64)))
    np.testing.assert_allclose(x[:, :5], want[:, :5], rtol=1e-6)


@inner
def _two_phases(crew, seen, pieces, slow):
    # the second phase may only start when all of the first is there
    mine = 0
    piece = sync.take(crew, 0, pieces)
    while piece < pieces:
        for _ in range(slow * 1000):
            seen[1, piece] += 1
        seen[0, piece] += 1
        mine += 1
        piece = sync.take(crew, 0, pieces)
    sync.finish(crew, 0, mine, pieces)
    mine = 0
    piece = sync.take(crew, 1, pieces)
    while piece < pieces:
        for i in range(pieces):
            seen[2, piece] += seen[0, i]
        mine += 1
        piece = sync.take(crew, 1, pieces)
    sync.finish(crew, 1, mine, pieces)


@kernel
def _lead(team, state, seen, number, pieces):
    # pieces[i] pieces in job number + i
    for i in range(pieces.size):
        slot = sync.slot_of(state, number + i)
        while sync.read(state, slot):
            sync.yield_core()
        slot = sync.open_job(state, team, number + i, 2)
        crew = sync.Crew(state, slot, team, np.int64(0))
        _two_phases(crew, seen[i], pieces[i], i % 3)
        sync.close_job(state)


@kernel
def _follow(tid, team, state, seen, number, pieces, late):
    # until the last job is seen; late: idles that long inside a job before it takes anything
    last = np.int64(0)
    while last < number + pieces.size - 1 and not sync.read(state, 1):
        found = sync.await_job(state, last, 1000)
        if not found:
            sync.yield_core()
            continue
        last = found
        if sync.enter(state, found):
            slot, i = sync.slot_of(state, found), found - number
            for _ in range(late):
                sync.yield_core()
            _two_phases(sync.Crew(state, slot, team, tid), seen[i], pieces[i], i % 3)
            sync.leave(state, slot)


def _rounds(size: int, jobs: int, late: int) -> np.ndarray:
    """[jobs, 3, 17] of jobs of 1 to 17 pieces, on `size` threads."""
    seen, state = np.zeros((jobs, 3, 17), np.int64), np.zeros(sync.sync_size(size, 2), np.int64)
    pieces = 1 + np.arange(jobs) % 17
    threads = [
        threading.Thread(target=_follow, args=(tid, size, state, seen, 1, pieces, late))
        for tid in range(1, size)
    ]
    for thread in threads:
        thread.start()
    _lead(size, state, seen, 1, pieces)
    state[1] = 1  # a word that no job uses: who missed the last job ends too
    for thread in threads:
        thread.join()
    return seen


@pytest.mark.parametrize("size", [1, 2, 3, 5])
@pytest.mark.parametrize("late", [0, 50])
def test_a_team_does_every_piece_once_and_phases_in_order(size: int, late: int) -> None:
    """More threads than cores, pieces of uneven length, helpers that enter and then sleep."""
    seen = _rounds(size, 400, late)
    for i, counts in enumerate(seen):
        pieces = 1 + i % 17
        assert (counts[0, :pieces] == 1).all()
        assert (counts[2, :pieces] == pieces).all(), "a phase began before the one before was over"


@kernel
def _only_enter(state, number):
    return sync.enter(state, number)


def test_a_job_does_not_wait_for_a_thread_that_sleeps_inside() -> None:
    """RING - 1 jobs pass; the one that needs the sleeper's slot again has to wait."""
    state, seen = np.zeros(sync.sync_size(2, 2), np.int64), np.zeros((sync.RING, 3, 17), np.int64)
    state[0] = 1  # job 1 is open
    assert _only_enter(state, 1)
    assert not _only_enter(state, 2), "only the open job can be entered"
    pieces = np.full(sync.RING - 1, 9)
    _lead(2, state, seen, 2, pieces)
    assert (seen[:-1, 0, :9] == 1).all()
    slot = sync.slot_of(state, 1 + sync.RING)
    assert state[slot] == 1, "the sleeper still holds the slot of the job after these"


def test_threads_by_default_are_physical_cores() -> None:
    assert 1 <= default_threads() <= (os.cpu_count() or 1)
