"""How fast a model will be, from numbers alone: bytes a token takes, speeds, hit rates.

A token's weights are read from memory once, at the speed at which this machine's threads stream
them through the kernels. Of the k experts a layer needs, each is missed with the probability that
the hit rate leaves; m misses of a layer cost

    max(m * record_bytes / drive speed, (k - m) * c + m * s) + m * c

where c is the time to multiply by one expert and s the time to handle one miss. So reads hide
behind the experts of the same layer that are in memory, and behind nothing else: not behind the
next layer's attention, and not behind the missed experts themselves, which may all land last.

With lookahead a layer's reads begin a layer earlier, so they hide behind one layer's computing and
handling, whatever these are of; what was guessed wrong, a share 1 - recall, is read in vain. A run
keeps the faster way, and so does the forecast.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from math import comb, inf
from typing import Literal, NamedTuple

Basis = Literal["exact", "measured", "estimated"]
Side = Literal["low", "likely", "high"]
HitRate = Callable[[float], float]  # share of a layer's experts in memory -> share of hits

_ORDER: tuple[Basis, ...] = ("exact", "measured", "estimated")
# Beside reads, computing is slower: threads meet at more and smaller jobs, reads take bandwidth.
# 22 ms of an OLMoE token grew to 26, 32 and 34 where 29, 60 and 82 % of its experts missed.
BESIDE_READS = 0.65
LAYER_S = 25e-6  # Python and phases of a layer, whatever its size: docs/LOG.md, 0.42 ms for 16


@dataclass(frozen=True, slots=True)
class Rate:
    """A number that is known within bounds."""

    low: float
    likely: float
    high: float
    basis: Basis

    def at(self, side: Side) -> float:
        """Its value at one end, or the likely one."""
        return {"low": self.low, "likely": self.likely, "high": self.high}[side]


def around(value: float, spread: float, basis: Basis) -> Rate:
    """`value` known to a share of itself: .25 is 25 % less to 25 % more."""
    return Rate(value * (1 - spread), value, value * (1 + spread), basis)


def weakest(bases: Iterable[Basis]) -> Basis:
    """What a number is called that follows from several."""
    return max(bases, key=_ORDER.index, default="exact")


@dataclass(frozen=True, slots=True, kw_only=True)
class Speeds:
    """What this machine does a second, and seconds to handle one miss besides reading it.

    recall: share of the experts that lookahead guesses; None where there is none. touch_bytes_s:
    memory that is used for the first time, but for touched_bytes that loading a model sees to.
    layer_s: of a layer, whatever its size. beside: whether reads slow computing down.
    """

    weight_bytes_s: Rate
    prefill_macs_s: Rate
    drive_bytes_s: Rate
    miss_s: float
    recall: Rate | None = None
    touch_bytes_s: float = inf
    touched_bytes: int = 0
    layer_s: float = LAYER_S
    beside: bool = True


@dataclass(frozen=True, slots=True, kw_only=True)
class Hits:
    """Hit rates at the lower end, likely, and at the upper end; what they rest on, in words."""

    low: HitRate
    likely: HitRate
    high: HitRate
    about: str
    basis: Basis

    def at(self, side: Side) -> HitRate:
        """One of the three."""
        return {"low": self.low, "likely": self.likely, "high": self.high}[side]


@dataclass(frozen=True, slots=True, kw_only=True)
class Work:
    """What one token takes.

    dense_bytes: all weights but routed experts, and the keys and values it looks at. expert_bytes:
    weights of one expert; record_bytes: what reading one takes. moe: (experts, top_k) of each MoE
    layer. dense_macs: multiply-adds of all layers without routed experts; expert_macs: of one.
    """

    dense_bytes: int
    expert_bytes: int
    record_bytes: int
    layers: int
    moe: tuple[tuple[int, int], ...]
    dense_macs: int
    expert_macs: int

    @property
    def used_experts(self) -> int:
        """Experts that a token multiplies by in all layers."""
        return sum(k for _, k in self.moe)


@dataclass(frozen=True, slots=True, kw_only=True)
class Setting:
    """One way to run: quotas, how many experts each MoE layer keeps; chunk, prompt tokens at once.

    resident: experts kept in all.
    """

    budget_bytes: int
    quotas: tuple[int, ...]
    chunk: int

    @property
    def resident(self) -> int:
        return sum(self.quotas)


@dataclass(frozen=True, slots=True, kw_only=True)
class Decode:
    """A token: seconds of computing, of handling misses, of waiting for reads; expected misses."""

    compute_s: float
    handling_s: float
    wait_s: float
    misses: float

    @property
    def seconds(self) -> float:
        """The whole token."""
        return self.compute_s + self.handling_s + self.wait_s


@dataclass(frozen=True, slots=True, kw_only=True)
class Point:
    """The forecast at one budget."""

    budget_bytes: int
    decode_tok_s: float
    hit_rate: float
    experts_resident: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Change:
    """Something to have instead of the present setting.

    kind and amount: so many bytes more of ram; a drive so many times as fast; every expert
    resident; experts in so many bits.
    """

    kind: Literal["ram", "drive", "resident", "experts"]
    amount: int
    work: Work
    setting: Setting
    speeds: Speeds


@dataclass(frozen=True, slots=True, kw_only=True)
class Help:
    """What a Change would give: the likely decode speed, and how many times the present one."""

    kind: Literal["ram", "drive", "resident", "experts"]
    amount: int
    budget_bytes: int
    decode_tok_s: float
    gain: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Forecast:
    """What to expect at `budget_bytes`, before anything is loaded.

    ttft_s: of a prompt of prompt_tokens, with no expert in memory yet. read_bytes: from the drive
    for each token. bound: what most of a token's time goes to: memory, drive, handling misses, or
    the link to a device.
    resident_bytes: the least budget that ends disk reads; working_set_bytes: the least at which a
    layer keeps all experts of one token.
    """

    budget_bytes: int
    decode_tok_s: Rate
    ttft_s: Rate
    prompt_tokens: int
    hit_rate: Rate
    hit_about: str
    read_bytes: Rate
    bound: Literal["memory", "drive", "misses", "link"]
    token: Decode
    speeds: Speeds
    curve: tuple[Point, ...]
    resident_bytes: int
    working_set_bytes: int
    helps: tuple[Help, ...]


def layer_hit_rate(hit: HitRate, experts: int, quota: int) -> float:
    """The hit rate of one layer: 1 when all its experts stay, else by the share that does."""
    return 1.0 if quota >= experts else min(1.0, max(0.0, hit(quota / experts)))


class _Costs(NamedTuple):
    expert_s: float  # to multiply by one expert
    read_s: float  # to read one
    miss_s: float


def _layer_wait(k: int, hit: float, costs: _Costs, ahead_s: float | None) -> float:
    """Expected seconds that reads of one layer outlast what hides them; misses are independent.

    ahead_s: what hides them where they were begun in the layer before; None: they were not.
    """
    total = 0.0
    for m in range(1, k + 1):
        hidden = (k - m) * costs.expert_s + m * costs.miss_s if ahead_s is None else ahead_s
        chance = comb(k, m) * (1 - hit) ** m * hit ** (k - m)
        total += chance * max(0.0, m * costs.read_s - hidden)
    return total


def slowed(misses: float, used: int) -> float:
    """How many times as long computing takes when so many of the experts used are read."""
    return 1 + BESIDE_READS * misses / max(used, 1)


def decode(work: Work, quotas: Sequence[int], hit: HitRate, speeds: Speeds, side: Side) -> Decode:
    """One token, with every speed at one end of what is known."""
    weights, drive = speeds.weight_bytes_s.at(side), speeds.drive_bytes_s.at(side)
    rates = [
        layer_hit_rate(hit, experts, quota)
        for (experts, _), quota in zip(work.moe, quotas, strict=True)
    ]
    used = work.used_experts
    misses = sum(k * (1 - rate) for (_, k), rate in zip(work.moe, rates, strict=True))
    weights /= slowed(misses, used) if speeds.beside else 1.0
    costs = _Costs(work.expert_bytes / weights, work.record_bytes / drive, speeds.miss_s)
    alike = Counter(zip((k for _, k in work.moe), rates, strict=True))
    wait = sum(n * _layer_wait(k, rate, costs, None) for (k, rate), n in alike.items())
    compute = work.dense_bytes / weights + used * costs.expert_s + work.layers * speeds.layer_s
    handling = misses * speeds.miss_s
    if speeds.recall is not None:
        costs = costs._replace(read_s=costs.read_s * (2 - speeds.recall.at(side)))
        layer_s = (compute + handling) / max(1, len(work.moe))
        ahead = sum(n * _layer_wait(k, rate, costs, layer_s) for (k, rate), n in alike.items())
        wait = min(wait, ahead)
    return Decode(compute_s=compute, handling_s=handling, wait_s=wait, misses=misses)


def distinct(experts: int, k: int, tokens: int) -> float:
    """Experts that `tokens` tokens use together, when each picks k of them evenly."""
    return experts * (1 - (1 - k / experts) ** tokens)


def prefill_seconds(work: Work, setting: Setting, tokens: int, speeds: Speeds, side: Side) -> float:
    """Seconds to read a prompt, from a cache without experts, in memory not used before.

    In each chunk a layer reads an expert at most once, the next while the present one is
    multiplied. What a chunk multiplies by is streamed from memory once, however few its tokens.
    """
    weights, macs = speeds.weight_bytes_s.at(side), speeds.prefill_macs_s.at(side)
    read_s = work.record_bytes / speeds.drive_bytes_s.at(side)
    kept, total, ready = [0.0] * len(work.moe), 0.0, float(speeds.touched_bytes)
    for start in range(0, tokens, setting.chunk):
        size = min(setting.chunk, tokens - start)
        total += max(size * work.dense_macs / macs, work.dense_bytes / weights)
        total += work.layers * speeds.layer_s
        for i, ((experts, k), quota) in enumerate(zip(work.moe, setting.quotas, strict=True)):
            used = distinct(experts, k, size)
            missed = used * (1 - kept[i] / experts)
            computing = max(size * k * work.expert_macs / macs, used * work.expert_bytes / weights)
            now = min(quota, kept[i] + missed)
            fresh = (now - kept[i]) * work.record_bytes
            touching = max(0.0, fresh - ready) / speeds.touch_bytes_s
            ready = max(0.0, ready - fresh)
            total += max(computing + missed * speeds.miss_s, missed * read_s, touching)
            kept[i] = now
    return total


def _band(value: Callable[[Side], float], basis: Basis) -> Rate:
    low, likely, high = sorted(value(side) for side in ("low", "likely", "high"))
    return Rate(low, likely, high, basis)


def _mean_hit(work: Work, quotas: Sequence[int], hit: HitRate) -> float:
    return sum(
        k * layer_hit_rate(hit, experts, quota)
        for (experts, k), quota in zip(work.moe, quotas, strict=True)
    ) / max(work.used_experts, 1)


def _bound(token: Decode) -> Literal["memory", "drive", "misses"]:
    if token.wait_s >= max(token.compute_s, token.handling_s):
        return "drive"
    return "misses" if token.handling_s > token.compute_s else "memory"


class Nearby(NamedTuple):
    """What else could be: other budgets, where the cliffs are, and what might help."""

    curve: tuple[Setting, ...] = ()
    resident_bytes: int = 0
    working_set_bytes: int = 0
    changes: tuple[Change, ...] = ()


def forecast(
    work: Work,
    setting: Setting,
    hits: Hits,
    speeds: Speeds,
    *,
    prompt_tokens: int = 512,
    nearby: Nearby = Nearby(),  # noqa: B008 - a tuple
) -> Forecast:
    """The forecast for one setting."""
    likely = decode(work, setting.quotas, hits.likely, speeds, "likely")
    reads = likely.misses > 0
    bases: list[Basis] = [speeds.weight_bytes_s.basis]
    if reads:
        bases += [speeds.drive_bytes_s.basis, hits.basis]

    def tok_s(side: Side) -> float:
        return 1 / decode(work, setting.quotas, hits.at(side), speeds, side).seconds

    def hit(side: Side) -> float:
        return _mean_hit(work, setting.quotas, hits.at(side))

    used = work.used_experts * work.record_bytes
    hit_basis: Basis = hits.basis if reads else "exact"
    prefill: list[Basis] = [speeds.prefill_macs_s.basis, speeds.drive_bytes_s.basis]
    return Forecast(
        budget_bytes=setting.budget_bytes,
        decode_tok_s=_band(tok_s, weakest(bases)),
        ttft_s=_band(
            lambda side: prefill_seconds(work, setting, prompt_tokens, speeds, side),
            weakest(prefill),
        ),
        prompt_tokens=prompt_tokens,
        hit_rate=_band(hit, hit_basis),
        hit_about=hits.about if reads else "every expert stays in memory",
        read_bytes=_band(lambda side: used * (1 - hit(side)), hit_basis),
        bound=_bound(likely),
        token=likely,
        speeds=speeds,
        curve=tuple(_point(work, at, hits, speeds) for at in nearby.curve),
        resident_bytes=nearby.resident_bytes,
        working_set_bytes=nearby.working_set_bytes,
        helps=_helps(nearby.changes, hits, 1 / likely.seconds),
    )


def _point(work: Work, at: Setting, hits: Hits, speeds: Speeds) -> Point:
    return Point(
        budget_bytes=at.budget_bytes,
        decode_tok_s=1 / decode(work, at.quotas, hits.likely, speeds, "likely").seconds,
        hit_rate=_mean_hit(work, at.quotas, hits.likely),
        experts_resident=at.resident,
    )


def _helps(changes: Sequence[Change], hits: Hits, now: float) -> tuple[Help, ...]:
    """What each change would give, the most first; what gives less than 3 % is left out."""
    found = []
    for change in changes:
        token = decode(change.work, change.setting.quotas, hits.likely, change.speeds, "likely")
        found.append(
            Help(
                kind=change.kind,
                amount=change.amount,
                budget_bytes=change.setting.budget_bytes,
                decode_tok_s=1 / token.seconds,
                gain=1 / token.seconds / now,
            )
        )
    return tuple(sorted((h for h in found if h.gain >= 1.03), key=lambda h: h.gain, reverse=True))
