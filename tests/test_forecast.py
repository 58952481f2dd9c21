"""The forecast against numbers worked out by hand, and what must hold for every model."""

from __future__ import annotations

import random
from dataclasses import replace
from itertools import pairwise

import pytest
import tiny_checkpoint

from moelite import forecast as forecast_module
from moelite import outlook as outlook_module
from moelite.budget import Sizes, plan
from moelite.cache import LayerLRU
from moelite.forecast import (
    LAYER_S,
    Hits,
    Setting,
    Speeds,
    Work,
    around,
    decode,
    distinct,
    forecast,
    prefill_seconds,
)
from moelite.hitrates import CURVES, interpolate, prior, recorded, uniform
from moelite.inventory import dense_items, plan_layers
from moelite.models import build
from moelite.outlook import outlook, work_of
from moelite.recipe import Recipe
from moelite.units import MIB

# 1 MB of dense weights, 2 layers of 4 experts of which 2 are used, each 1 MB, on disk 1 MB
WORK = Work(
    dense_bytes=1_000_000,
    expert_bytes=1_000_000,
    record_bytes=1_000_000,
    layers=2,
    moe=((4, 2), (4, 2)),
    dense_macs=1_000_000,
    expert_macs=2_000_000,
)
# an expert takes 1 ms to multiply by, 4 ms to read, 0.5 ms to handle
SPEEDS = Speeds(
    weight_bytes_s=around(1e9, 0.2, "measured"),
    prefill_macs_s=around(4e9, 0.2, "measured"),
    drive_bytes_s=around(0.25e9, 0.5, "measured"),
    miss_s=0.0005,
)


@pytest.fixture(autouse=True)
def as_fast_beside_reads(monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> None:
    """Sums by hand leave out that reads slow computing down."""
    if "slowed" not in request.node.name:
        monkeypatch.setattr(forecast_module, "BESIDE_READS", 0.0)


def test_computing_is_slowed_by_the_share_that_is_missed() -> None:
    alone = decode(WORK, (4, 4), lambda share: 0.5, SPEEDS, "likely").compute_s - 2 * LAYER_S
    beside = decode(WORK, (2, 2), lambda share: 0.5, SPEEDS, "likely").compute_s - 2 * LAYER_S
    assert beside == pytest.approx(alone * (1 + 0.5 * forecast_module.BESIDE_READS))


def test_memory_used_for_the_first_time_delays_a_prompt() -> None:
    """4 tokens in one chunk miss 3.75 experts a layer, 15 ms of reading; 2 stay: 2 MB at 0.1 GB/s
    are 20 ms."""
    before = prefill_seconds(WORK, at(2, 2), 4, SPEEDS, "likely")
    slow = replace(SPEEDS, touch_bytes_s=1e8)
    assert prefill_seconds(WORK, at(2, 2), 4, slow, "likely") - before == pytest.approx(0.010)
    ready = replace(slow, touched_bytes=2_000_000)  # the first layer's
    assert prefill_seconds(WORK, at(2, 2), 4, ready, "likely") - before == pytest.approx(0.005)


def at(*quotas: int, chunk: int = 8) -> Setting:
    return Setting(budget_bytes=sum(quotas) * 1_000_000, quotas=quotas, chunk=chunk)


def fixed(rate: float) -> Hits:
    def same(share: float) -> float:
        return rate

    return Hits(low=same, likely=same, high=same, about="fixed", basis="exact")


def test_a_token_by_hand() -> None:
    """Half the experts are hit: a layer has 0, 1, 2 misses with chances 1/4, 1/2, 1/4.

    1 miss: 4 ms of reading behind 1 ms of computing and 0.5 of handling: 2.5 ms are left.
    2 misses: 8 ms behind 2 x 0.5: 7 ms. So 3 ms a layer; 5 ms compute; 2 misses of 0.5 ms.
    """
    token = decode(WORK, (2, 2), lambda share: 0.5, SPEEDS, "likely")
    assert token.compute_s == pytest.approx(0.005 + 2 * LAYER_S)
    assert token.misses == pytest.approx(2.0)
    assert token.handling_s == pytest.approx(0.001)
    assert token.wait_s == pytest.approx(2 * (0.5 * 0.0025 + 0.25 * 0.007))
    assert token.seconds == pytest.approx(0.012 + 2 * LAYER_S)


def test_reads_hide_behind_the_experts_of_their_own_layer_only() -> None:
    fast = replace(SPEEDS, drive_bytes_s=around(1e9, 0, "measured"), miss_s=0.0)
    # one miss of 1 ms behind one hit of 1 ms: nothing is left; two misses: nothing hides 2 ms
    token = decode(WORK, (2, 2), lambda share: 0.5, fast, "likely")
    assert token.wait_s == pytest.approx(2 * 0.25 * 0.002)
    # a dense part a thousand times as large hides no more
    large = replace(WORK, dense_bytes=1_000_000_000)
    assert decode(large, (2, 2), lambda share: 0.5, fast, "likely").wait_s == token.wait_s


def test_with_lookahead_reads_hide_behind_the_layer_before() -> None:
    """A layer takes 3 ms to compute and handle, and has 0, 1, 2 misses of 4 ms with chances 1/4,
    1/2, 1/4. All guesses right: 1 and 5 ms are left. 3/4 right: a miss takes 5 ms, 2 and 7 remain.
    None right: reading twice as much is slower than without."""
    here = replace(SPEEDS, layer_s=0.0)

    def wait(recall: float) -> float:
        seen = replace(here, recall=around(recall, 0, "exact"))
        return decode(WORK, (2, 2), lambda share: 0.5, seen, "likely").wait_s

    assert wait(1) == pytest.approx(2 * (0.5 * 0.001 + 0.25 * 0.005))
    assert wait(0.75) == pytest.approx(2 * (0.5 * 0.002 + 0.25 * 0.007))
    assert wait(0) == decode(WORK, (2, 2), lambda share: 0.5, here, "likely").wait_s
    quick = replace(SPEEDS, drive_bytes_s=around(1e12, 0, "exact"), recall=around(0.9, 0, "exact"))
    assert decode(WORK, (2, 2), lambda share: 0.5, quick, "likely").wait_s == 0


def test_all_resident_is_computing_only() -> None:
    token = decode(WORK, (4, 4), lambda share: 0.0, SPEEDS, "likely")
    assert (token.misses, token.handling_s, token.wait_s) == (0, 0, 0)
    assert token.seconds == pytest.approx(0.005 + 2 * LAYER_S)
    found = forecast(WORK, at(4, 4), fixed(0.3), SPEEDS)
    assert found.hit_rate.likely == 1
    assert found.hit_rate.basis == "exact"
    assert found.read_bytes.high == 0
    assert found.bound == "memory"


def test_a_prompt_by_hand() -> None:
    """8 tokens, chunks of 4, nothing in memory, quotas of 2.

    4 tokens use 4 x (1 - (1/2)^4) = 3.75 of 4 experts. First chunk: 3.75 misses of 4 ms = 15 ms a
    layer, over 4 x 2 x 0.5 = 4 ms of multiplying. Then 2 are in memory: 3.75 x 1/2 misses = 7.5 ms,
    still over 4 ms and 1.875 x 0.5 ms of handling. Dense: 1 ms of multiplying a chunk.
    """
    assert distinct(4, 2, 4) == pytest.approx(3.75)
    seconds = prefill_seconds(WORK, at(2, 2, chunk=4), 8, SPEEDS, "likely")
    assert seconds == pytest.approx(2 * (0.001 + 2 * LAYER_S) + 2 * 0.015 + 2 * 0.0075)


def test_a_prompt_is_bound_by_computing_where_the_drive_is_fast() -> None:
    fast = replace(SPEEDS, drive_bytes_s=around(1e12, 0, "measured"), miss_s=0.0)
    seconds = prefill_seconds(WORK, at(2, 2, chunk=4), 8, fast, "likely")
    assert seconds == pytest.approx(2 * (0.001 + 2 * LAYER_S) + 4 * 0.004)
    # one token alone streams 2 MB of experts and 1 of the rest: not faster than decoding
    one = prefill_seconds(WORK, at(2, 2, chunk=4), 1, fast, "likely")
    assert one == pytest.approx(0.005 + 2 * LAYER_S)


def test_bands_and_bases() -> None:
    found = forecast(WORK, at(2, 2), fixed(0.5), SPEEDS)
    for rate in (found.decode_tok_s, found.ttft_s, found.hit_rate, found.read_bytes):
        assert rate.low <= rate.likely <= rate.high
    assert found.decode_tok_s.likely == pytest.approx(1 / (0.012 + 2 * LAYER_S))
    assert found.decode_tok_s.basis == "measured"
    assert found.read_bytes.likely == pytest.approx(2_000_000)
    assert found.bound == "drive"
    unsure = replace(SPEEDS, drive_bytes_s=around(1e9, 0.5, "estimated"))
    assert forecast(WORK, at(2, 2), fixed(0.5), unsure).decode_tok_s.basis == "estimated"
    assert forecast(WORK, at(4, 4), fixed(0.5), unsure).decode_tok_s.basis == "measured"


@pytest.mark.parametrize("seed", range(20))
def test_more_experts_in_memory_are_never_slower(seed: int) -> None:
    draw = random.Random(seed)
    experts = draw.choice([4, 8, 60, 128])
    k = draw.randint(1, min(8, experts))
    work = replace(WORK, moe=((experts, k),) * 3, record_bytes=draw.randint(1, 10_000_000))
    speeds = replace(
        SPEEDS,
        drive_bytes_s=around(10 ** draw.uniform(7, 11), 0.2, "measured"),
        miss_s=10 ** draw.uniform(-6, -2),
    )
    for hits in (uniform(), prior("olmoe", experts, k), prior("unheard_of", experts, k)):
        for side in ("low", "likely", "high"):
            times = [
                decode(work, (q,) * 3, hits.at(side), speeds, side).seconds
                for q in range(experts + 1)
            ]
            assert all(b <= a * (1 + 1e-12) for a, b in pairwise(times))


@pytest.mark.parametrize(
    ("experts", "k", "kept"), [(64, 8, 16), (8, 2, 3), (128, 8, 100), (16, 4, 2)]
)
def test_even_picks_hit_as_often_as_experts_are_kept(experts: int, k: int, kept: int) -> None:
    """k distinct of E drawn evenly, a list of C: the hit rate is C / E, below one token's too."""
    draw, lru, hits, tokens = random.Random(5), LayerLRU(kept), 0, 6000
    for _ in range(tokens):
        hits += len(lru.lookup(draw.sample(range(experts), k)).hits)
    assert hits / (tokens * k) == pytest.approx(kept / experts, abs=0.012)
    assert uniform().likely(kept / experts) == kept / experts


def test_published_curves() -> None:
    olmoe = CURVES["OLMoE-1B-7B"][1]
    assert interpolate(olmoe, 0.25) == 0.602
    assert interpolate(olmoe, 0.3125) == pytest.approx((0.602 + 0.703) / 2)
    assert interpolate(olmoe, 0.025) == pytest.approx(0.149 / 2)
    assert (interpolate(olmoe, 0.0), interpolate(olmoe, 1.0)) == (0.0, 1.0)
    for _, curve in CURVES.values():
        assert list(curve) == sorted(curve)
        assert [y for _, y in curve] == sorted(y for _, y in curve)


def test_a_family_without_a_curve_gets_the_band_between_the_others() -> None:
    known, other = prior("olmoe", 64, 8), prior("unheard_of", 64, 8)
    assert known.likely(0.25) == pytest.approx(0.602)
    assert "OLMoE-1B-7B" in known.about
    # the lowest and the highest of all fine-grained models at a quarter, 20 % more or fewer misses
    assert other.low(0.25) == pytest.approx(1 - 1.2 * (1 - 0.602))
    assert other.high(0.25) == pytest.approx(1 - 0.8 * (1 - 0.8))
    assert other.high(0.25) - other.low(0.25) > known.high(0.25) - known.low(0.25)
    assert "Mixtral" in prior("unheard_of", 8, 2).about


def test_a_trace_counts_as_measured() -> None:
    hits = recorded(lambda share: 0.8, "replay")
    assert (hits.low(0.5), hits.high(0.5)) == (pytest.approx(0.78), pytest.approx(0.82))
    assert hits.basis == "measured"


# --- a whole model --------------------------------------------------------------------------------


def sizes(experts: str = "int4", *, coarse: bool = False, **changes: object) -> Sizes:
    """The tiny model; coarse: with records of 8 MiB, so that a MiB of budget does not hold all."""
    arch, recipe = build(tiny_checkpoint.QWEN3_MOE), Recipe(experts=experts, dense="int4")
    layers = plan_layers(arch, recipe)
    if coarse:
        layers = {
            number: replace(
                entry, tiers=tuple(replace(tier, record_bytes=8 * MIB) for tier in entry.tiers)
            )
            for number, entry in layers.items()
        }
    found = Sizes(
        arch=arch,
        layers=layers,
        dense={item.ref.key: item.spec.format for item in dense_items(arch, recipe)},
        tokenizer_bytes=0,
        context=64,
        kv="f16",
        threads=1,
    )
    return replace(found, **changes)  # type: ignore[arg-type]


def test_cliffs_and_curve() -> None:
    model = sizes(coarse=True)
    at_least = plan(model, 1).minimum_bytes
    found = outlook(model, plan(model, at_least + 20 * MIB), uniform(), SPEEDS)
    moes = work_of(model).moe
    for budget, enough in (
        (found.resident_bytes, [experts for experts, _ in moes]),
        (found.working_set_bytes, [k for _, k in moes]),
    ):
        for less, holds in ((0, True), (MIB, False)):
            setting = outlook_module.setting_of(model.arch, plan(model, budget - less))
            kept = [q >= n for q, n in zip(setting.quotas, enough, strict=True)]
            assert all(kept) is holds
    budgets = [point.budget_bytes for point in found.curve]
    assert budgets == sorted(set(budgets))
    assert {found.budget_bytes, found.resident_bytes, found.working_set_bytes} <= set(budgets)
    assert 8 <= len(budgets) <= 12
    speeds = [point.decode_tok_s for point in found.curve]
    assert speeds == sorted(speeds)
    assert found.curve[-1].hit_rate == 1


def test_what_helps_is_sorted_and_quantified() -> None:
    model = sizes(coarse=True)
    at_least = plan(model, 1).minimum_bytes
    found = outlook(model, plan(model, at_least), uniform(), SPEEDS)
    gains = [h.gain for h in found.helps]
    assert gains == sorted(gains, reverse=True)
    helps = {h.kind: h for h in found.helps}
    assert helps["resident"].budget_bytes == found.resident_bytes
    assert helps["resident"].decode_tok_s == pytest.approx(found.curve[-1].decode_tok_s)
    assert helps["drive"].gain > 1.2
    whole = outlook(model, plan(model, found.resident_bytes), uniform(), SPEEDS)
    assert whole.helps == ()


def test_what_does_not_fit_is_told_for_the_least_budget() -> None:
    refused = plan(sizes(), MIB)
    assert not refused.fits
    found = outlook(sizes(), refused, uniform(), SPEEDS)
    assert found.budget_bytes >= refused.minimum_bytes
    assert found.budget_bytes - refused.minimum_bytes < MIB
    assert found.decode_tok_s.likely > 0


def test_a_smaller_format_takes_fewer_bytes() -> None:
    small, large = work_of(sizes()), work_of(sizes("int8"))
    assert small.expert_bytes < large.expert_bytes
    assert small.dense_bytes == large.dense_bytes
    assert work_of(sizes(), position=8).dense_bytes < small.dense_bytes
