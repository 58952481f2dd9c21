"""What a model takes and how fast it will be, before anything is loaded."""

from __future__ import annotations

from pathlib import Path

from moelite.attention import KVFormat
from moelite.budget import Footprint
from moelite.forecast import Forecast, Hits
from moelite.gpu.speeds import speeds_of
from moelite.outlook import outlook, speeds_here, usual_hits, work_of
from moelite.recipe import Recipe, choose
from moelite.sizing import Settings, placed, planned, sizes_of
from moelite.storefile import MANIFEST
from moelite.tiers import device_outlook


def foresee(  # noqa: PLR0913 - what `footprint` takes, and two more
    path: str | Path,
    *,
    ram: str | int | None = None,
    context: int | None = None,
    kv: KVFormat = "f16",
    threads: int | None = None,
    experts: str | None = None,
    dense: str | None = None,
    recipe: str | Recipe | None = None,
    low: bool = False,
    hits: Hits | None = None,
    folder: Path | None = None,
    device: str = "cpu",
    vram: str | int | None = None,
) -> tuple[Footprint, Forecast]:
    """What the model at `path` takes, as `footprint` tells, and how fast it will be.

    hits: how often an expert is in memory (default: as in published runs of such models). folder:
    where the speeds of earlier runs are kept (default: the user's cache folder). Where the model
    does not fit, the forecast is for the least budget. device, vram: as of `footprint`; the
    forecast is then a DeviceForecast.
    """
    place = placed(device, vram, low=low)
    asked = Settings(context, kv, threads, choose(recipe, experts, dense), low)
    sizes = sizes_of(path, asked)
    found, usual = planned(sizes, ram, place, vram), hits or usual_hits(sizes.arch)
    store = Path(path).expanduser()
    written = store if (store / MANIFEST).exists() else None
    here = speeds_here(sizes, found, written, folder, copies=place is None)
    if place is not None:
        return found, device_outlook(
            sizes, found, usual, speeds_of(place, here, sizes.expert_format)
        )
    return found, outlook(sizes, found, usual, here)


def experts_of(path: str | Path) -> int:
    """How many experts an MoE layer of the model at `path` has."""
    sizes = sizes_of(path, Settings())
    return work_of(sizes).moe[0][0]
