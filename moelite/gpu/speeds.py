"""How fast a device is: by what it is made for, by a short probe, or by assumption.

No torch here, but where a device that NVIDIA's library does not know is looked at.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from moelite.forecast import Rate, Speeds, around
from moelite.gpu.devices import Free, Place

LAUNCH_S = 10e-6  # of one, by torch from Python, where nobody has measured it
HAND_OVER_S = 50e-6  # a token's activations to the CPU and the result back

# A card that nobody has seen: from the memory of a laptop's to that of the fastest for a desk
UNKNOWN_MEMORY = Rate(0.2e12, 0.4e12, 1.0e12, "estimated")
UNKNOWN_LINK = Rate(10e9, 20e9, 25e9, "estimated")  # 16 lanes of PCIe 4, well and badly used
UNKNOWN_MACS = Rate(1e12, 5e12, 30e12, "estimated")
# Shares of what clocks and widths promise that small products and copies reach
MEMORY_SHARE, _LINK_SHARE = (0.35, 0.6, 0.85), (0.6, 0.8, 0.9)


@dataclass(frozen=True, slots=True, kw_only=True)
class DeviceSpeeds:
    """What a device does a second, and the machine beside it.

    cpu: of the machine: the CPU's products, the drive. miss: as of `load`. hand_over_s: to give a
    token to the CPU and have it back. about: what this rests on, in words.
    """

    cpu: Speeds
    weight_bytes_s: Rate
    link_bytes_s: Rate
    prefill_macs_s: Rate
    launch_s: float = LAUNCH_S
    hand_over_s: float = HAND_OVER_S
    miss: Literal["auto", "copy", "cpu"] = "auto"
    about: str = ""


def speeds_of(place: Place, cpu: Speeds, fmt: str) -> DeviceSpeeds:
    """Of a device before a model is loaded onto it: what it is made for, where a library tells,
    else a short probe, and assumptions for a device that is not here."""
    told = place.free or Free(0, 0, "")
    if place.here and not (told.memory_bytes_s and told.link_bytes_s):
        from moelite.gpu.probe import probe

        seen = probe(place.name, fmt.partition(" + ")[0])
        weights = share_of(around(seen.memory_bytes_s, 0.0, "estimated"), MEMORY_SHARE)
        if seen.weight_bytes_s is not None:
            weights = around(seen.weight_bytes_s, 0.4, "estimated")
        return DeviceSpeeds(
            cpu=cpu,
            weight_bytes_s=weights,
            link_bytes_s=around(seen.link_bytes_s, 0.25, "measured"),
            prefill_macs_s=share_of(around(seen.macs_s, 0.0, "estimated"), (0.1, 0.4, 0.8)),
            launch_s=seen.launch_s,
            about="a short look at the device",
        )
    memory, link, about = UNKNOWN_MEMORY, UNKNOWN_LINK, []
    if told.memory_bytes_s:
        memory = around(told.memory_bytes_s, 0.0, "estimated")
        about.append("its memory by clock and width")
    else:
        about.append("an unknown card's memory: 0.2 to 1 TB/s")
    if told.link_bytes_s:
        link = share_of(around(told.link_bytes_s, 0.0, "estimated"), _LINK_SHARE)
        about.append("its slot by lanes")
    else:
        about.append("a slot of 16 lanes of PCIe 4")
    return DeviceSpeeds(
        cpu=cpu,
        weight_bytes_s=share_of(memory, MEMORY_SHARE),
        link_bytes_s=link,
        prefill_macs_s=UNKNOWN_MACS,
        about=", ".join(about),
    )


def share_of(rate: Rate, shares: tuple[float, float, float]) -> Rate:
    """Of each end of a rate and its middle, the share that is usually reached."""
    low, likely, high = shares
    return Rate(low * rate.low, likely * rate.likely, high * rate.high, "estimated")
