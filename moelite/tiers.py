"""How fast a model will be on a device, whose memory is the first cache and the machine's the next.

Of the m experts that a layer misses on the device, some are copied there and the others computed on
the CPU, as moelite.cache.upper.Split has it, both at once; those that are not in memory either are
first read from the drive. What a miss takes in all, on average, stands for the drive's time in
moelite.forecast, which does the rest.

How often an expert is found follows from h, the hit rate by the share of experts that a list of
those used last keeps, d of them on the device and r in memory:

    all copied    h(d) on the device; a longer list holds all that a shorter one holds, so
                  max(h(d), h(r)) are found in one of the two
    none copied   the device keeps what came first: (h(d) + d) / 2, and memory what it does not, so
                  of the rest (h(d + r) - h(d)) / (1 - h(d)) are found

A recording of OLMoE, replayed through both caches: of what misses above, 39, 43 and 67 % are found
below where all is copied (formula: 46, 51 and 73; d and r 10 and 30, 25 and 50, 50 and 75 %), and
55, 81 and 92 % where nothing is (58, 87 and 100).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields, replace
from math import comb, inf
from typing import Literal, NamedTuple

from moelite.budget import Footprint, Sizes, floating_slots
from moelite.cache.split import Split
from moelite.forecast import (
    Basis,
    Decode,
    Forecast,
    Help,
    HitRate,
    Hits,
    Point,
    Rate,
    Setting,
    Side,
    Speeds,
    Work,
    decode,
    forecast,
    layer_hit_rate,
    prefill_seconds,
    weakest,
)
from moelite.gpu.plan import DevicePlan, floating_on_device, plan_beside, plan_device
from moelite.gpu.speeds import DeviceSpeeds
from moelite.outlook import PROMPT_TOKENS, work_of
from moelite.units import MIB

POINTS = 6
LAUNCHES = 30  # kernels of a layer while the host looks on
UNSEEN_S = 3e-6  # of one in a graph, which a token runs as where every expert is on the device
MISS_S = 0.1e-3  # to handle a miss: as of the CPU path, less the read
_SIDES: tuple[Side, ...] = ("low", "likely", "high")


@dataclass(frozen=True, slots=True, kw_only=True)
class DeviceForecast(Forecast):
    """A Forecast whose budget, hit rate and curve are of the device's memory, beside `ram_bytes`.

    The drive's speed in `speeds` is what a miss takes in all. memory_hit_rate: share of the lookups
    that missed on the device which memory answers; read_bytes: from the drive. copied_bytes: over
    the link for each token; on_cpu: experts of a token that the CPU computes. link_s, drive_s: of a
    token, likely, before anything hides it; link_s counts the CPU's part, too.
    """

    device: str
    card: str
    here: bool
    ram_bytes: int
    memory_hit_rate: Rate
    copied_bytes: Rate
    on_cpu: float
    link_s: float
    drive_s: float
    link_bytes_s: Rate
    disk_bytes_s: Rate
    about: str


class Traffic(NamedTuple):
    """Of one token: experts missed on the device, of them copied and not in memory; seconds."""

    misses: float
    copied: float
    disk: float
    link_s: float
    drive_s: float


class Quotas(NamedTuple):
    """Experts kept in each layer, on the device and in memory."""

    device: tuple[int, ...]
    memory: tuple[int, ...]


def split_of(work: Work, here: DeviceSpeeds, side: Side) -> Split:
    """Where misses are computed, by these speeds."""
    copy_s = work.record_bytes / here.link_bytes_s.at(side)
    host_s = work.expert_bytes / here.cpu.weight_bytes_s.at(side)
    return Split(
        inf if here.miss == "cpu" else copy_s,
        inf if here.miss == "copy" else host_s,
        here.hand_over_s,
    )


def share_copied(
    work: Work, kept: Sequence[int], hits: Hits, here: DeviceSpeeds, side: Side
) -> float:
    """Of the experts that miss on a device which keeps what was used last."""
    split, hit = split_of(work, here, side), hits.at(side)
    misses = copied = 0.0
    for (experts, k), quota in zip(work.moe, kept, strict=True):
        for m, chance in _missing(k, layer_hit_rate(hit, experts, quota)):
            misses += chance * m
            copied += chance * split.copied(m)
    return copied / misses if misses else 1.0


def _missing(k: int, hit: float) -> Iterator[tuple[int, float]]:
    """(misses of a layer, how likely), from one on; misses are independent."""
    for m in range(1, k + 1):
        yield m, comb(k, m) * (1 - hit) ** m * hit ** (k - m)


def met(work: Work, kept: Sequence[int], hits: Hits, here: DeviceSpeeds) -> Hits:
    """The hit rates on a device of which the CPU computes some misses."""

    def on(side: Side) -> HitRate:
        copied, hit = share_copied(work, kept, hits, here, side), hits.at(side)
        return lambda share: copied * hit(share) + (1 - copied) * (hit(share) + share) / 2

    return replace(hits, low=on("low"), likely=on("likely"), high=on("high"))


def traffic(
    work: Work, kept: Quotas, hits: Hits, here: DeviceSpeeds, side: Side = "likely"
) -> Traffic:
    """What one token misses, and how long that takes where nothing hides it."""
    split, hit = split_of(work, here, side), hits.at(side)
    above_of = met(work, kept.device, hits, here).at(side)
    share = share_copied(work, kept.device, hits, here, side)
    read_s = work.record_bytes / here.cpu.drive_bytes_s.at(side)
    misses = copied = disk = link_s = 0.0
    for (experts, k), device, memory in zip(work.moe, *kept, strict=True):
        above = layer_hit_rate(above_of, experts, device)
        alone = layer_hit_rate(hit, experts, device)
        both = max(alone, layer_hit_rate(hit, experts, memory))
        left = 1 - layer_hit_rate(hit, experts, device + memory)
        apart = (1 - above) * left / (1 - alone) if alone < 1 else 0.0
        misses += k * (1 - above)
        disk += k * min(1 - above, share * (1 - both) + (1 - share) * apart)
        for m, chance in _missing(k, above):
            n = split.copied(m)
            copied += chance * n
            link_s += chance * seconds(split, m, n)
    return Traffic(misses, copied, disk, link_s, disk * read_s)


def seconds(split: Split, misses: int, copied: int) -> float:
    """Of a layer's misses: both sides run at once."""
    rest = misses - copied
    host = split.fixed_s + rest * split.host_s if rest else 0.0
    return max(copied * split.copy_s if copied else 0.0, host)


def _speeds(work: Work, kept: Quotas, hits: Hits, here: DeviceSpeeds) -> Speeds:
    """As moelite.forecast takes them: what a miss takes in all stands for the drive's time."""

    def miss_bytes_s(side: Side) -> float:
        found = traffic(work, kept, hits, here, side)
        if not found.misses:
            return here.link_bytes_s.at(side)
        return work.record_bytes * found.misses / max(found.link_s + found.drive_s, 1e-12)

    whole = all(q >= e for q, (e, _) in zip(kept.device, work.moe, strict=True))
    bases: list[Basis] = [here.link_bytes_s.basis]
    if traffic(work, kept, hits, here).disk:
        bases.append(here.cpu.drive_bytes_s.basis)
    low, likely, high = sorted(miss_bytes_s(side) for side in _SIDES)
    return Speeds(
        weight_bytes_s=here.weight_bytes_s,
        prefill_macs_s=here.prefill_macs_s,
        drive_bytes_s=Rate(low, likely, high, weakest(bases)),
        miss_s=MISS_S,
        recall=here.cpu.recall,
        touch_bytes_s=here.cpu.touch_bytes_s,
        touched_bytes=here.cpu.touched_bytes,
        layer_s=LAUNCHES * (min(UNSEEN_S, here.launch_s) if whole else here.launch_s),
        beside=False,
    )


def _prompt(
    work: Work, device: Setting, memory: Setting, tokens: int, here: DeviceSpeeds, speeds: Speeds
) -> Rate:
    """Seconds of a prompt: from the drive to memory and from there to the device, side by side."""
    over_link = replace(speeds, drive_bytes_s=here.link_bytes_s, touch_bytes_s=inf)
    from_drive = replace(speeds, drive_bytes_s=here.cpu.drive_bytes_s)

    def at(side: Side) -> float:
        return max(
            prefill_seconds(work, device, tokens, over_link, side),
            prefill_seconds(work, memory, tokens, from_drive, side),
        )

    low, likely, high = sorted(at(side) for side in _SIDES)
    bases = (speeds.prefill_macs_s.basis, here.link_bytes_s.basis, here.cpu.drive_bytes_s.basis)
    return Rate(low, likely, high, weakest(bases))


def device_outlook(
    sizes: Sizes,
    found: Footprint,
    hits: Hits,
    here: DeviceSpeeds,
    *,
    prompt_tokens: int = PROMPT_TOKENS,
) -> DeviceForecast:
    """The forecast for a plan with a device, or for the least of each budget that is too small."""
    found = _fitting(sizes, found)
    plan, work = found.device, work_of(sizes)
    assert plan is not None
    kept = Quotas(_kept(sizes, plan), _kept(sizes, found))
    speeds = _speeds(work, kept, hits, here)
    device = Setting(budget_bytes=plan.budget_bytes, quotas=kept.device, chunk=plan.chunk)
    memory = Setting(budget_bytes=found.budget_bytes, quotas=kept.memory, chunk=plan.chunk)
    tokens = max(1, min(prompt_tokens, sizes.context - 1))
    above = met(work, kept.device, hits, here)
    base = forecast(work, device, above, speeds, prompt_tokens=tokens)
    sides = [traffic(work, kept, hits, here, side) for side in _SIDES]
    now = sides[1]
    basis = base.hit_rate.basis
    bound = base.bound
    if bound == "drive" and now.link_s > now.drive_s:
        bound = "link"
    whole = _whole_bytes(sizes, found, plan)
    points = _curve(sizes, (work, found, plan, whole), hits, here)
    changed = replace(
        base,
        # how many launches a layer takes is nowhere measured
        decode_tok_s=replace(base.decode_tok_s, basis="estimated"),
        ttft_s=_prompt(work, device, memory, tokens, here, speeds),
        bound=bound,
        hit_about=hits.about if now.misses else "every expert stays on the device",
        read_bytes=_rate([t.disk * work.record_bytes for t in sides], basis),
        curve=points,
        resident_bytes=whole[0],
        working_set_bytes=0,
        helps=_helps(sizes, (work, found, plan, whole), hits, (here, base.decode_tok_s.likely)),
    )
    answered = [1 - t.disk / t.misses if t.misses else 1.0 for t in sides]
    return DeviceForecast(
        **{field.name: getattr(changed, field.name) for field in fields(Forecast)},
        device=plan.device,
        card=plan.card,
        here=plan.here,
        ram_bytes=found.budget_bytes,
        memory_hit_rate=_rate(answered, basis),
        copied_bytes=_rate([t.copied * work.record_bytes for t in sides], basis),
        on_cpu=max(0.0, now.misses - now.copied),
        link_s=now.link_s,
        drive_s=now.drive_s,
        link_bytes_s=here.link_bytes_s,
        disk_bytes_s=here.cpu.drive_bytes_s,
        about=here.about,
    )


def _rate(values: Sequence[float], basis: Basis) -> Rate:
    low, likely, high = sorted(values)
    return Rate(low, likely, high, basis)


def _kept(sizes: Sizes, plan: Footprint | DevicePlan) -> tuple[int, ...]:
    return tuple(plan.slots.quotas[layer] for layer in sizes.arch.moe_layers)


def _on(sizes: Sizes, plan: DevicePlan, budget: int) -> DevicePlan:
    card = plan.card, plan.total_bytes, plan.free_bytes
    return replace(plan_device(sizes, plan.device, budget, plan.chunk, card), here=plan.here)


def _fitting(sizes: Sizes, found: Footprint) -> Footprint:
    plan = found.device
    assert plan is not None
    if plan.slots.count < 2:
        plan = _on(sizes, plan, _up(plan.minimum_bytes))
    ram = found.budget_bytes if found.slots.count > 1 else _up(found.minimum_bytes)
    return plan_beside(sizes, ram, plan)


def _whole_bytes(sizes: Sizes, found: Footprint, plan: DevicePlan) -> tuple[int, int]:
    """The least of the device's and of the machine's memory that keep every expert."""
    classes = {entry.slot_bytes for entry in sizes.layers.values()}
    above = found.experts_bytes + floating_on_device(sizes.arch) * sum(classes)
    below = found.experts_bytes + floating_slots(sizes.arch) * sum(classes)
    device = plan.used_bytes - plan.parts[-1].bytes + above
    return _up(device), _up(found.used_bytes - found.parts[-1].bytes + below)


def token(work: Work, kept: Quotas, hits: Hits, here: DeviceSpeeds) -> Decode:
    """A token, likely."""
    speeds, above = _speeds(work, kept, hits, here), met(work, kept.device, hits, here)
    return decode(work, kept.device, above.likely, speeds, "likely")


_Now = tuple[Work, Footprint, DevicePlan, tuple[int, int]]


def _curve(sizes: Sizes, now: _Now, hits: Hits, here: DeviceSpeeds) -> tuple[Point, ...]:
    """Over the device's memory, at the same memory of the machine."""
    work, found, plan, (whole, _) = now
    least = _up(plan.minimum_bytes)
    budgets = {least + (whole - least) * i // (POINTS - 1) // MIB * MIB for i in range(POINTS)}
    if least <= plan.budget_bytes <= whole:
        budgets.add(plan.budget_bytes)
    points = []
    for budget in sorted(budgets | {whole}):
        other = _on(sizes, plan, budget)
        kept = Quotas(_kept(sizes, other), _kept(sizes, found))
        missed = traffic(work, kept, hits, here).misses / work.used_experts
        points.append(
            Point(
                budget_bytes=budget,
                decode_tok_s=1 / token(work, kept, hits, here).seconds,
                hit_rate=1 - missed,
                experts_resident=other.experts_resident,
            )
        )
    return tuple(points)


def _helps(sizes: Sizes, now: _Now, hits: Hits, at: tuple[DeviceSpeeds, float]) -> tuple[Help, ...]:
    """Every expert on the device, or in memory below it."""
    (work, found, plan, (device, memory)), (here, tok_s) = now, at
    options: list[tuple[Literal["resident", "ram"], int, Quotas]] = [
        ("resident", device, Quotas(_kept(sizes, _on(sizes, plan, device)), _kept(sizes, found))),
        (
            "ram",
            memory,
            Quotas(_kept(sizes, plan), _kept(sizes, plan_beside(sizes, memory, plan))),
        ),
    ]
    out = []
    for kind, budget, kept in options:
        then = 1 / token(work, kept, hits, here).seconds
        out.append(
            Help(kind=kind, amount=1, budget_bytes=budget, decode_tok_s=then, gain=then / tok_s)
        )
    return tuple(sorted((h for h in out if h.gain >= 1.03), key=lambda h: h.gain, reverse=True))


def _up(count: int) -> int:
    return -(-count // MIB) * MIB
