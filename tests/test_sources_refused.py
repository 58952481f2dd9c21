"""Quantized checkpoints come from strangers: what their files claim is checked first."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from encoded_files import CASES, NAME, Parts, make_folder, stored

from moelite.errors import CheckpointError, UnsupportedError
from moelite.sources import open_folder


def refuse(folder: Path, parts: Parts, config: Any, match: str) -> None:
    make_folder(folder, parts, config)
    with pytest.raises((CheckpointError, UnsupportedError), match=match) as caught:
        open_folder(folder).raw(NAME)
    assert caught.value.fix


@pytest.mark.parametrize("case", CASES)
def test_a_missing_part_is_named(tmp_path: Path, case: str) -> None:
    parts, config = stored(case)
    optional = {"m.weight_format", "m.weight_zero_point", "m.g_idx", "m.weight_global_scale"}
    optional |= {"m.weight.nested_absmax"} if "nested" in case else set()
    for name in parts.keys() - optional:
        rest = {n: part for n, part in parts.items() if n != name}
        with pytest.raises((CheckpointError, UnsupportedError)):
            open_folder(make_folder(tmp_path / "m", rest, config)).raw(NAME)


@pytest.mark.parametrize("case", CASES)
def test_a_part_of_another_shape_is_named(tmp_path: Path, case: str) -> None:
    parts, config = stored(case)
    for name, (dtype, shape, content) in parts.items():
        if not shape or name.endswith((".weight_shape", ".quant_map", "bitsandbytes__nf4")):
            continue
        if name == NAME and case in {"ct-fp8-tensor", "ct-fp8-block"}:
            continue  # one row more is covered too
        wrong = (shape[0] + 1, *shape[1:])
        size = len(content) // max(1, shape[0]) * wrong[0]
        changed = parts | {name: (dtype, wrong, content.ljust(size, b"\0")[:size])}
        with pytest.raises((CheckpointError, UnsupportedError), match=r"tensor '.*m\.|covers"):
            open_folder(make_folder(tmp_path / "m", changed, config)).raw(NAME)


@pytest.mark.parametrize("case", CASES)
def test_a_part_of_another_dtype_is_named(tmp_path: Path, case: str) -> None:
    parts, config = stored(case)
    for name, (_, shape, content) in parts.items():
        width = len(content) // max(1, int(np.prod(shape)))
        other = {1: "BOOL", 2: "U16", 4: "U32", 8: "U64"}[width]
        changed = parts | {name: (other, shape, content)}
        with pytest.raises((CheckpointError, UnsupportedError)):
            open_folder(make_folder(tmp_path / "m", changed, config)).raw(NAME)


def test_groups_out_of_range(tmp_path: Path) -> None:
    parts, config = stored("gptq-4-v2-act")
    for value in (2, -1, 1 << 30):
        index = np.zeros(64, "<i4")
        index[17] = value
        changed = parts | {"m.g_idx": ("I32", (64,), index.tobytes())}
        refuse(tmp_path / "m", changed, config, r"'m\.g_idx' names groups")


@pytest.mark.parametrize(
    "state",
    [
        b"[1]",
        b"{",
        b"[" * 2000,
        b'{"shape": [24], "blocksize": 64}',
        b'{"shape": [24, 65], "blocksize": 64}',
        b'{"shape": [-24, -64], "blocksize": 64}',
        b'{"shape": [24, 64.0], "blocksize": 64}',
        b'{"shape": [4194305, 4194305], "blocksize": 64}',
        b'{"shape": [24, 64], "blocksize": 0}',
        b'{"shape": [24, 64], "blocksize": 63}',
        b'{"shape": [24, 64]}',
        b"{}" + b" " * 5000,
    ],
)
def test_a_state_that_lies(tmp_path: Path, state: bytes) -> None:
    parts, config = stored("bnb-nf4")
    name = "m.weight.quant_state.bitsandbytes__nf4"
    changed = parts | {name: ("U8", (len(state),), state)}
    refuse(tmp_path / "m", changed, config, r"tensor 'm\.weight")


@pytest.mark.parametrize(
    ("case", "changes", "match"),
    [
        ("gptq-4-auto", {"quant_method": "vptq"}, "'vptq'.*gptq"),
        ("gptq-4-auto", {"quant_method": None}, "None"),
        ("gptq-4-auto", {"quant_method": ["gptq"]}, "gptq"),
        ("gptq-4-auto", {"checkpoint_format": "marlin"}, "marlin"),
        ("gptq-4-auto", {"bits": 9}, "bits"),
        ("awq-4", {"version": "gemv"}, "gemv"),
        ("awq-4", {"bits": 3}, "bits"),
        ("ct-int4-g32", {"format": "marlin-24"}, "marlin-24"),
        ("ct-int4-g32", {"quantization_status": "frozen"}, "frozen"),
        ("ct-int4-g32", {"transform_config": {"config_groups": {"u": 1}}}, "transform_config"),
        ("ct-int4-g32", {"sparsity_config": {"format": "sparse-bitmask"}}, "sparse-bitmask"),
        ("ct-int4-g32", {"config_groups": {}}, "config_groups"),
        ("ct-int4-g32", {"config_groups": {"g": {"weights": {"num_bits": 8}}}}, "bits"),
        ("ct-int8-channel", {"config_groups": {"g": {"weights": {"num_bits": 4}}}}, "I8"),
        ("ct-fp8-block", {"config_groups": {"g": {"weights": {"num_bits": 8, "type": "float",
                          "block_structure": [0, 4]}}}}, "block_structure"),
    ],
)  # fmt: skip
def test_settings_that_are_not_implemented(
    tmp_path: Path, case: str, changes: dict[str, Any], match: str
) -> None:
    parts, config = stored(case)
    refuse(tmp_path / "m", parts, config | changes, match)


def test_nothing_quantized_in_a_quantized_checkpoint(tmp_path: Path) -> None:
    parts = {NAME: ("F32", (2, 2), bytes(16))}
    refuse(tmp_path / "m", parts, {"quant_method": "gptq", "bits": 4}, "no tensor of it is")


def test_a_weight_of_an_unexplained_dtype(tmp_path: Path) -> None:
    parts, config = stored("gptq-4-auto")
    changed = parts | {"n.weight": ("F8_E4M3", (2, 2), bytes(4))}
    refuse(tmp_path / "m", changed, config, r"'n\.weight' is F8_E4M3")


def test_a_matrix_twice(tmp_path: Path) -> None:
    parts, config = stored("awq-4")
    both = parts | {NAME: ("F32", (32, 64), bytes(32 * 64 * 4))}
    refuse(tmp_path / "m", both, config, "twice")
