"""The forecast for a device against numbers worked out by hand."""

from __future__ import annotations

from dataclasses import replace

import pytest
from test_forecast import SPEEDS, WORK, sizes

from moelite import tiers as module
from moelite.budget import Footprint
from moelite.forecast import HitRate, Hits, around
from moelite.gpu.devices import Free, Place
from moelite.gpu.plan import plan_both
from moelite.gpu.speeds import DeviceSpeeds, speeds_of
from moelite.hitrates import uniform
from moelite.tiers import Quotas, device_outlook, token, traffic
from moelite.units import MIB

# an expert takes 0.1 ms on the device, 1 ms over the link or on the CPU, 4 ms from the drive; a
# layer takes 0.3 ms of launches
HERE = DeviceSpeeds(
    cpu=replace(SPEEDS, weight_bytes_s=around(1e9, 0.2, "measured")),
    weight_bytes_s=around(10e9, 0.2, "measured"),
    link_bytes_s=around(1e9, 0.2, "measured"),
    prefill_macs_s=around(40e9, 0.2, "measured"),
    launch_s=10e-6,
    hand_over_s=0.0,
)
ONE_AND_TWO = Quotas((1, 1), (2, 2))  # of 4 experts


def hits(rate: HitRate) -> Hits:
    return Hits(low=rate, likely=rate, high=rate, about="by hand", basis="measured")


def test_what_is_copied_comes_from_the_drive_where_the_longer_list_misses() -> None:
    found = traffic(WORK, ONE_AND_TWO, uniform(), replace(HERE, miss="copy"))
    # 2 layers of 2 experts: three quarters miss on the device, half of all in both
    assert found.misses == pytest.approx(3)
    assert found.copied == pytest.approx(3)
    assert found.disk == pytest.approx(2)
    assert found.link_s == pytest.approx(3e-3)
    assert found.drive_s == pytest.approx(8e-3)


def test_memory_that_holds_less_than_the_device_answers_nothing() -> None:
    found = traffic(WORK, Quotas((2, 2), (1, 1)), uniform(), replace(HERE, miss="copy"))
    assert found.disk == pytest.approx(found.misses) == pytest.approx(2)


def test_what_the_cpu_computes_leaves_the_device_as_it_is() -> None:
    found = traffic(
        WORK, Quotas((1, 1), (1, 1)), hits(lambda x: 1.5 * x), replace(HERE, miss="cpu")
    )
    # h(1/4) = .375: (.375 + .25) / 2 are found on the device; h(2/4) = .75, so that of the rest
    # .25 / .625 are found in neither
    assert found.misses == pytest.approx(4 * 0.6875)
    assert found.copied == 0
    assert found.disk == pytest.approx(4 * 0.6875 * 0.4)
    assert found.link_s == pytest.approx(2 * 1.375e-3)


def test_two_misses_are_shared_between_link_and_cpu() -> None:
    found = traffic(WORK, ONE_AND_TWO, uniform(), HERE)
    # a layer misses one expert with .375 and two with .5625; one is copied then, in 1 ms
    assert found.copied == pytest.approx(2 * 0.9375)
    assert found.link_s == pytest.approx(2 * 0.9375e-3)
    # .625 of the misses are copied: of those .5 are nowhere, of the others .75 * .25 / .75
    assert found.disk == pytest.approx(4 * (0.625 * 0.5 + 0.375 * 0.25))


def test_a_list_in_memory_that_is_shorter_adds_nothing_to_what_is_copied() -> None:
    found = traffic(WORK, Quotas((2, 2), (1, 1)), uniform(), HERE)
    # a layer misses one with .5 and two with .25, one of them is copied: .75 of the misses; .5 of
    # all lookups miss on the device, and .25 in a list of 3 experts
    assert found.disk == pytest.approx(4 * (0.75 * 0.5 + 0.25 * 0.5 * 0.25 / 0.5))


def test_a_token_by_hand() -> None:
    found = token(WORK, ONE_AND_TWO, uniform(), replace(HERE, miss="copy"))
    assert found.compute_s == pytest.approx(0.1e-3 + 4 * 0.1e-3 + 2 * 30 * 10e-6)
    assert found.handling_s == pytest.approx(3 * 0.1e-3)
    # a miss takes 11/3 ms; 0.2 ms of a layer hide behind what else is done there
    one, two = 11 / 3 - 0.2, 22 / 3 - 0.2
    assert found.wait_s == pytest.approx(2 * (0.375 * one + 0.5625 * two) * 1e-3)


def test_with_every_expert_on_the_device_it_computes_only_and_is_launched_as_one() -> None:
    found = token(WORK, Quotas((4, 4), (0, 0)), uniform(), HERE)
    assert found.wait_s == found.handling_s == 0
    assert found.compute_s == pytest.approx(0.5e-3 + 2 * 30 * 3e-6)


def planned(vram: int, ram: int) -> Footprint:
    return plan_both(sizes(coarse=True), Place("torch:cpu"), ram * MIB, vram * MIB)


def test_more_of_either_memory_is_never_slower() -> None:
    model = sizes(coarse=True)
    least = planned(1, 1)
    assert least.device is not None
    vram, ram = (-(-n // MIB) for n in (least.device.minimum_bytes, least.minimum_bytes))

    def speed(more_vram: int, more_ram: int) -> float:
        found = planned(vram + more_vram, ram + more_ram)
        assert found.fits
        return device_outlook(model, found, uniform(), HERE).decode_tok_s.likely

    for by in (0, 16, 32, 64):
        assert speed(by + 16, 0) >= speed(by, 0)
        assert speed(0, by + 16) >= speed(0, by)
    assert speed(64, 0) > speed(0, 0)
    assert speed(0, 64) > speed(0, 0)


def test_the_curve_ends_where_every_expert_is_on_the_device() -> None:
    model = sizes(coarse=True)
    least = planned(1, 1)
    found = device_outlook(model, least, uniform(), HERE)
    assert least.device is not None
    assert found.budget_bytes - least.device.minimum_bytes < MIB
    assert found.ram_bytes - least.minimum_bytes < MIB
    speeds = [point.decode_tok_s for point in found.curve]
    assert speeds == sorted(speeds)
    assert found.curve[-1].budget_bytes == found.resident_bytes
    assert found.curve[-1].hit_rate == 1
    assert found.curve[-2].hit_rate < 1
    helps = {help_.kind: help_ for help_ in found.helps}
    assert helps["resident"].decode_tok_s == pytest.approx(speeds[-1])
    assert found.decode_tok_s.basis == "estimated"


def test_most_of_a_token_goes_to_the_slower_of_link_and_drive() -> None:
    model, found = sizes(coarse=True), planned(1, 1)
    slow = replace(HERE, link_bytes_s=around(1e6, 0.1, "measured"), miss="copy")
    assert device_outlook(model, found, uniform(), slow).bound == "link"
    cpu = replace(HERE.cpu, drive_bytes_s=around(1e6, 0.1, "measured"))
    assert device_outlook(model, found, uniform(), replace(HERE, cpu=cpu)).bound == "drive"


def test_a_prompt_takes_as_long_as_the_slower_way() -> None:
    work, tokens = replace(WORK, moe=((4, 4), (4, 4))), 4
    device = module.Setting(budget_bytes=0, quotas=(4, 4), chunk=8)
    here = replace(HERE, link_bytes_s=around(1e9, 0.0, "measured"))
    speeds = module._speeds(work, Quotas((4, 4), (4, 4)), uniform(), here)
    found = module._prompt(work, device, device, tokens, here, speeds)
    # 8 experts from the drive, 4 ms each; computing and the link hide behind that, but for dense
    # parts and launches: 1 MB at 10 GB/s, 2 layers of 30 launches of 3 us
    assert found.likely == pytest.approx(8 * 4e-3 + 0.1e-3 + 2 * 30 * 3e-6)


def test_speeds_of_a_card_that_a_library_tells_of() -> None:
    free = Free(24 << 30, 20 << 30, "card", 936e9, 31.5e9)
    found = speeds_of(Place("cuda", free), SPEEDS, "int4")
    assert found.weight_bytes_s.likely == pytest.approx(0.6 * 936e9)
    assert found.link_bytes_s.likely == pytest.approx(0.8 * 31.5e9)
    assert found.weight_bytes_s.basis == found.link_bytes_s.basis == "estimated"
    assert "clock" in found.about


def test_a_card_that_is_not_here_has_a_wide_band() -> None:
    found = speeds_of(Place("cuda", None, here=False), SPEEDS, "int4")
    assert found.weight_bytes_s.high > 5 * found.weight_bytes_s.low
    assert found.link_bytes_s.likely == 20e9
    assert "unknown" in found.about
