"""The files in encoded/: matrices that libraries encoded, and folders made of them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from safetensors import safe_open
from tiny_checkpoint import MIXTRAL, write_raw

from moelite.quant.base import F32

ENCODED = Path(__file__).parent / "encoded"
CASES = sorted(path.stem for path in ENCODED.glob("*.safetensors"))
NAME = "m.weight"
Parts = dict[str, tuple[str, tuple[int, ...], bytes]]


def stored(case: str) -> tuple[Parts, dict[str, Any]]:
    """(parts as `write_raw` takes them, the config of the quantization) of one file."""
    data = (ENCODED / f"{case}.safetensors").read_bytes()
    size = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + size])
    meta = header.pop("__metadata__")
    parts: Parts = {}
    for name, entry in header.items():
        begin, end = entry["data_offsets"]
        content = data[8 + size + begin : 8 + size + end]
        parts[name] = (entry["dtype"], tuple(entry["shape"]), content)
    del parts["want"]
    return parts, json.loads(meta["config"])


def wanted(case: str) -> F32:
    with safe_open(ENCODED / f"{case}.safetensors", "numpy") as file:
        found: F32 = file.get_tensor("want")
    return found


def make_folder(folder: Path, parts: Any, quantization: Any) -> Path:
    folder.mkdir(exist_ok=True)
    config = MIXTRAL | {"quantization_config": quantization}
    (folder / "config.json").write_text(json.dumps(config))
    write_raw(folder / "model.safetensors", parts)
    return folder
