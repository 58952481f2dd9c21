"""What a store weighs: bits per parameter of all its files, and of its routed experts alone.

Bits per weight of the quantized tensors say little by themselves: scales, headers and everything
that was left unquantized are stored, too. So both are told, from the manifest and from the files as
they lie on the disk.
"""

from __future__ import annotations

import dataclasses
import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from moelite.errors import StoreError, UsageError
from moelite.storefile import MANIFEST, read_json

EXPERTS = "routed experts"  # the manifest's class of them; more than one where formats are mixed


@dataclass(frozen=True, slots=True, kw_only=True)
class StoreSize:
    """bytes: of all files; params: weights in all. expert_*: of the routed experts, padding
    included. other_bytes: bytes - expert_bytes: embeddings, attention, routers, norms, tokenizer,
    headers. formats: of the experts, joined by "+"."""

    bytes: int
    params: int
    expert_bytes: int
    expert_params: int
    formats: str

    @property
    def bits_per_parameter(self) -> float:
        return 8 * self.bytes / self.params

    @property
    def expert_bpw(self) -> float:
        return 8 * self.expert_bytes / self.expert_params

    @property
    def other_bytes(self) -> int:
        return self.bytes - self.expert_bytes

    def as_dict(self) -> dict[str, Any]:
        """The fields, and the bits that follow from them."""
        bits = {"bits_per_parameter": self.bits_per_parameter, "expert_bpw": self.expert_bpw}
        return {**dataclasses.asdict(self), **bits}


def store_size(folder: Path) -> StoreSize:
    """The sizes of the store in `folder`. StoreError if its manifest or a file is not there."""
    manifest = read_json(folder / MANIFEST)
    try:
        classes = [c for c in manifest["classes"] if c["name"].startswith(EXPERTS)]
        found = StoreSize(
            bytes=sum((folder / name).stat().st_size for name in [MANIFEST, *manifest["files"]]),
            params=sum(c["params"] for c in manifest["classes"]),
            expert_bytes=sum(c["bytes_after"] for c in classes),
            expert_params=sum(c["params"] for c in classes),
            formats="+".join(dict.fromkeys(c["format"] for c in classes)),
        )
    except KeyError as problem:
        raise StoreError(f"{folder / MANIFEST} is damaged: it has no {problem}") from None
    except OSError as problem:
        raise StoreError(f"{problem.filename} is missing", fix="quantize it again") from None
    if not found.expert_params:
        raise StoreError(f"{folder / MANIFEST} is damaged: no routed experts")
    return found


def check_calibration(folder: Path, text: Path) -> None:
    """Raises UsageError if the store in `folder` was calibrated on the file `text` itself.

    A text that a store was fitted to tells nothing of other texts. Bytes are compared, by sha256.
    """
    calibration: Any = read_json(folder / MANIFEST).get("calibration")
    if not isinstance(calibration, dict):
        return
    with text.open("rb") as file:
        if hashlib.file_digest(file, "sha256").hexdigest() == calibration.get("sha256"):
            raise UsageError(
                f"{folder.name} was calibrated on {text}: it cannot be judged by it",
                fix="give a text that no calibration has seen",
            )
