"""Assembles a model on a device from a store: its memory, the cache below it, links and threads."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch

from moelite import warm
from moelite.arch import Arch
from moelite.attention import KVFormat
from moelite.budget import Footprint, Sizes, floating_slots, refuse, slot_counts
from moelite.cache import CacheStats, UpperCache
from moelite.cache.split import ALL_COPIED, NONE_COPIED, Split
from moelite.cache.upper import Arrival
from moelite.drive import DriveSpeed
from moelite.engine import Model
from moelite.forecast import Forecast, Hits, Rate, Speeds, around
from moelite.gpu.bnb_products import choose
from moelite.gpu.decoder import DeviceDecoder
from moelite.gpu.device import Device, Link, timed
from moelite.gpu.devices import Place, video_memory
from moelite.gpu.experts import DeviceExperts
from moelite.gpu.host import HostExperts
from moelite.gpu.kv import DeviceKV
from moelite.gpu.plan import DevicePlan, plan_both, plan_device, refuse_device
from moelite.gpu.probe import launch_seconds, macs_speed, read_speed
from moelite.gpu.products import kernels_for
from moelite.gpu.speeds import MEMORY_SHARE, DeviceSpeeds, share_of
from moelite.gpu.weights import Weights
from moelite.lookahead import Choice, Lookahead
from moelite.outlook import PROMPT_TOKENS, speeds_here, usual_hits
from moelite.quant import FORMATS
from moelite.quant.base import PAGE
from moelite.store import Store
from moelite.storefile import LayerEntry
from moelite.tiers import device_outlook
from moelite.units import show_bytes

Miss = Literal["auto", "copy", "cpu"]
_SHRINK = 0.9  # of the arena, when the device turns out to be fuller than it said
_PROBES = 5


class DeviceModel(Model):
    """A Model whose dense weights, kv and arena of experts are on a torch device.

    miss: where a token's expert that is not on the device is computed: copied there, on the CPU, or
    wherever it is ready sooner. link: simulated, for torch:cpu. on_note: told what a user should
    know, as that the device has less room than planned.
    """

    _decoder: DeviceDecoder

    def __init__(  # noqa: PLR0913 - what `load` decided
        self,
        store: Store,
        arch: Arch,
        footprint: Footprint,
        kv: KVFormat,
        drive: DriveSpeed | None = None,
        lookahead: Choice = "auto",
        miss: Miss = "auto",
        link: Link | None = None,
        on_note: Callable[[str], None] | None = None,
    ) -> None:
        plan = footprint.device
        assert plan is not None
        self._note = on_note or (lambda note: None)
        self._plan = plan
        self._begin(store, arch, footprint, kv, drive)
        self.lookahead = Lookahead(lookahead)
        self.host: HostExperts | None = None
        self.device = Device(plan.device, plan.budget_bytes, link)
        try:
            self._fill(lookahead, miss)
        except BaseException:
            self._stop()
            raise

    def _fill(self, lookahead: Choice, miss: Miss) -> None:
        plan, device, store = self._plan, self.device, self.store
        # nf4_by: whose products of nf4 these are, and why; empty where the store has none
        kernels, self.nf4_by = choose(
            kernels_for(device.torch), device, self.arch, store.layers, self.sizes.dense, plan
        )
        device.drop_cached()
        weights = Weights(store, self.arch, device, kernels)
        top_k = self.experts_used
        parts = device.zeros((plan.chunk * top_k, self.arch.hidden_size), torch.float32)
        keys = DeviceKV(self.arch, self.context, self.kv_format, device)
        self.pinned = device.pin(self.experts.arena)
        self._below = torch.from_numpy(self.experts.arena)
        self._reserve(plan)
        upper = UpperCache(
            self.experts,
            slots=slot_counts(store.layers, self._plan.slots),
            quotas=self._plan.slots.quotas,
            experts={layer: entry.experts for layer, entry in store.layers.items()},
            send=self._send,
        )
        if miss != "copy":
            self.host = HostExperts(
                self.arch, store.layers, self.experts.arena, self.footprint.threads
            )
        device_experts = DeviceExperts(
            device, kernels, upper, self._arena, store.layers, parts, self.host
        )
        self._on_device, self.upper = device_experts, upper
        self.miss: Miss = miss
        upper.split = self._split(miss)
        first = self.arch.moe_layers[0]
        slots = self._arena.numel() // store.layers[first].slot_bytes
        device_experts.set_piece(first, min(slots, top_k))
        decoder = DeviceDecoder(
            self.arch, weights, device, kernels, device_experts, keys, plan.chunk
        )
        decoder.lookahead = self.lookahead
        decoder.shrink = self._shrink
        self._decoder = decoder

    @property
    def experts_used(self) -> int:
        """The most experts that a token uses in a layer."""
        return floating_slots(self.arch)

    # --- memory ---------------------------------------------------------------------------------

    def _reserve(self, plan: DevicePlan) -> None:
        """The arena, smaller if the device has not what was planned."""
        while True:
            size = plan.parts[-1].bytes
            try:
                self._arena = self.device.zeros((size,), torch.uint8)
                self._plan = plan
                self.footprint = replace(self.footprint, device=plan)
                return
            except torch.OutOfMemoryError:
                self.device.drop_cached()
                plan = self._smaller(plan)

    def _smaller(self, plan: DevicePlan) -> DevicePlan:
        arena = plan.parts[-1].bytes
        record = max(entry.slot_bytes for entry in self.store.layers.values())
        budget = plan.used_bytes - max(arena - int(_SHRINK * arena), record)
        less = plan_device(
            self.sizes,
            plan.device,
            budget,
            plan.chunk,
            (plan.card, plan.total_bytes, plan.free_bytes),
        )
        if not less.fits:
            raise refuse_device(less, self.store.path.name)
        self._note(
            f"{plan.card or plan.device} is out of memory: experts take "
            f"{show_bytes(less.parts[-1].bytes)} of it now, not {show_bytes(arena)}"
        )
        return less

    def _shrink(self) -> None:
        """Begins anew with a smaller arena; every expert in it is given up."""
        plan = self._smaller(self._plan)
        self._decoder.forget()
        self.upper.close()
        self.device.give_back(self._arena)
        self._on_device.arena = self._arena = torch.empty(0, dtype=torch.uint8)
        self.device.drop_cached()
        self._reserve(plan)
        self._on_device.arena = self._arena
        slots = slot_counts(self.store.layers, self._plan.slots)
        self.upper.divide(slots, self._plan.slots.quotas)

    def _send(self, layer: int, page: int, slot: int) -> Arrival:
        size = self.store.layers[layer].slot_bytes
        source = self._below[page * PAGE : page * PAGE + size]
        self._on_device.sent(layer, slot)
        return self.device.copies.start(self._arena[slot * PAGE : slot * PAGE + size], source)

    # --- where misses are computed --------------------------------------------------------------

    def _split(self, miss: Miss) -> Split:
        self.measured = self.measure()
        return {"copy": ALL_COPIED, "cpu": NONE_COPIED, "auto": self.measured}[miss]

    def measure(self) -> Split:
        """Seconds to copy an expert and to compute it on the CPU, from a few of each.

        Overwrites the arena: only before an expert is in it.
        """
        layer = self.arch.moe_layers[0]
        size = self.store.layers[layer].slot_bytes
        slots = min(4, self._arena.numel() // size, self._below.numel() // size)

        def copy() -> None:
            for i in range(slots):
                at = slice(i * size, (i + 1) * size)
                self.device.copies.start(self._arena[at], self._below[at]).gate()

        # what lies there now are zeros: numbers without meaning, and the same bytes to read
        ranked = [(i, i, i * size // PAGE) for i in range(min(slots, self.experts_used))]
        x = np.ones(self.arch.hidden_size, np.float32)
        copies = sorted(timed(self.device, copy) / slots for _ in range(_PROBES))
        copy_s = copies[_PROBES // 2]
        if self.host is None:
            return Split(copy_s, float("inf"), 0.0)
        host = self.host
        all_s = sorted(timed(self.device, lambda: host.compute(layer, x, ranked)) for _ in range(5))
        one_s = sorted(
            timed(self.device, lambda: host.compute(layer, x, ranked[:1])) for _ in range(5)
        )
        more = max(1, len(ranked) - 1)
        each = max(1e-9, (all_s[2] - one_s[2]) / more if len(ranked) > 1 else one_s[2])

        def there_and_back() -> None:
            torch.from_numpy(x).to(self.device.torch).cpu()

        fixed = sorted(timed(self.device, there_and_back) for _ in range(_PROBES))[_PROBES // 2]
        return Split(copy_s, each, max(0.0, one_s[2] - each) + fixed)

    # --- what a Model tells ---------------------------------------------------------------------

    def stats(self) -> CacheStats:
        """Of the cache in memory, and, as `upper`, of that on the device."""
        return replace(self.experts.stats, upper=self.upper.stats)

    @property
    def split(self) -> dict[str, float]:
        """Seconds to copy an expert, to compute one on the CPU, and to hand a token over to it."""
        return self.measured._asdict()

    def memory_speed(self) -> float:
        """Bytes per second at which the device reads its memory at this moment."""
        return read_speed(self.device, self._arena)

    def weight_speed(self) -> float:
        """Bytes of experts per second that the device multiplies by at this moment."""
        entry = self.store.layers[self.arch.moe_layers[0]]
        slots = min(self.experts_used, self._arena.numel() // entry.slot_bytes)
        return self._on_device.speed(entry, slots)

    def _weight_rate(self, entry: LayerEntry) -> Rate:
        if all(FORMATS[fmt].exact for fmt in entry.formats):
            return around(self.weight_speed(), 0.3, "measured")
        # codes that tell where rows are cannot be multiplied by before an expert is there
        return share_of(around(self.memory_speed(), 0.0, "estimated"), MEMORY_SHARE)

    def forecast(
        self,
        hits: Hits | None = None,
        folder: Path | None = None,
        *,
        prompt_tokens: int = PROMPT_TOKENS,
        lookahead: bool = True,
    ) -> Forecast:
        """How fast it will be at its budgets: a DeviceForecast."""
        sizes, found, store = self.sizes, self.footprint, self.store.path
        cpu = speeds_here(
            *(sizes, found, store, folder),
            direct=self.store.direct,
            lookahead=lookahead and self.lookahead.choice != "off",
            copies=False,
        )
        here = self.speeds(cpu)
        usual = hits or usual_hits(self.arch)
        return device_outlook(sizes, found, usual, here, prompt_tokens=prompt_tokens)

    def speeds(self, cpu: Speeds) -> DeviceSpeeds:
        """What the device gives, as measured when it was loaded and now. cpu: what is beside it."""
        entry, split = self.store.layers[self.arch.moe_layers[0]], self.measured
        payload = entry.payload_bytes / entry.experts
        if split.host_s < float("inf"):
            beside = around(payload / split.host_s, 0.25, "measured")
            cpu = replace(cpu, weight_bytes_s=beside)
        macs = macs_speed(self.device)
        return DeviceSpeeds(
            cpu=cpu,
            weight_bytes_s=self._weight_rate(entry),
            link_bytes_s=around(entry.slot_bytes / split.copy_s, 0.25, "measured"),
            prefill_macs_s=Rate(0.1 * macs, 0.4 * macs, 0.8 * macs, "estimated"),
            launch_s=launch_seconds(self.device),
            hand_over_s=split.fixed_s,
            miss=self.miss,
            about="the device's products and copies, timed a moment ago",
        )

    def meter(self, folder: Path) -> Any:
        """Watches, and keeps nothing: what a device did would mislead forecasts for the CPU."""
        return _NoMeter()

    def close(self) -> None:
        """Ends threads, copies and files, and gives the memory back."""
        self._stop()
        self.store.close()

    def _stop(self) -> None:
        self._populate.close()
        if hasattr(self, "upper"):
            self.upper.close()
        self.experts.close()
        if self.host is not None:
            self.host.close()
        self.device.close()


class _NoMeter:
    """In the place of moelite.meter.Meter."""

    def first_token(self) -> None:
        """Nothing."""

    def done(self, prompt: int, computed: int, decoded: int) -> None:
        """Nothing."""


def load_on(  # noqa: PLR0913 - the rest of `load`'s choices
    device: str,
    store: Store,
    sizes: Sizes,
    *,
    ram: int,
    vram: str | int | None,
    chunk: int | None,
    drive_of: Callable[[Store, Footprint], DriveSpeed | None],
    lookahead: Choice,
    miss: Miss,
    link: Link | None,
    on_compile: Callable[[str], None] | None,
    on_note: Callable[[str], None] | None,
) -> DeviceModel:
    """Loads a store onto a device. Raises BudgetError if it does not fit there, or beside it."""
    footprint = plan_both(sizes, Place(device, video_memory(device)), ram, vram, chunk)
    assert footprint.device is not None
    if not footprint.device.fits:
        raise refuse_device(footprint.device, store.path.name)
    if not footprint.fits:
        raise refuse(footprint, store.path.name)
    if miss != "copy":
        warm.ensure(store.formats, on_compile)
    drive = drive_of(store, footprint)
    store.hold_open()
    return DeviceModel(
        store, sizes.arch, footprint, sizes.kv, drive, lookahead, miss, link, on_note
    )
