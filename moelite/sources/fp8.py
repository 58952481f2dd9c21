"""quant_method "fp8": e4m3 weights with a scale for each block, as DeepSeek-V3 and Qwen3 publish.

    X.weight            F8_E4M3 [rows, cols]
    X.weight_scale_inv  [ceil(rows / h), ceil(cols / w)] where weight_block_size = [h, w]; one
                        number where it is null. A multiplier, whatever its name says; F32, F16,
                        BF16, or F8_E8M0 (powers of two) in newer files.

Checked against transformers.integrations.finegrained_fp8.
"""

from __future__ import annotations

from moelite.config import HFConfig
from moelite.errors import CheckpointError
from moelite.sources.grid import Scaled, grid
from moelite.sources.tensor import FLOATS, Parts, Tensor

_SUFFIX = ".weight_scale_inv"


def find(parts: Parts, config: HFConfig) -> dict[str, Tensor]:
    """The logical tensors of an fp8 checkpoint. config: its quantization_config."""
    config.must_be("fmt", "e4m3")
    block = _block(config)
    found: dict[str, Tensor] = {}
    for name in parts.names:
        if name.endswith((".input_scale", ".activation_scale", ".k_scale", ".v_scale")):
            parts.drop(name)
        if not name.endswith(_SUFFIX):
            continue
        weight = name.removesuffix("_scale_inv")
        values = parts.take(weight, ("F8_E4M3",), (None, None))
        shape = parts.look(name).shape
        scale = parts.take(name, (*FLOATS, "F8_E8M0"), shape)
        label = "fp8" if block is None else f"fp8, blocks of {block[0]}x{block[1]}"
        found[weight] = Scaled(values, grid(scale, values.shape, block), None, label)
    return found


def _block(config: HFConfig) -> tuple[int, int] | None:
    size = config.items("weight_block_size", int)
    if size is None:
        return None
    if len(size) != 2 or min(size) < 1:
        raise CheckpointError(
            f"weight_block_size = {list(size)} in quantization_config; it must be two sizes",
            fix="download config.json again, or correct it",
        )
    return size[0], size[1]
