"""What quantize can read, one input format a file: quantized checkpoints and GGUF files as Sources.

A quantized checkpoint's tensors appear under their ordinary names and shapes, decoded to float32
some rows at a time, and as codes (`coded`) where its encoding can be repacked without loss.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from moelite.arch import TensorRef
from moelite.checkpoint import Source, open_checkpoint, read_json_file, read_sidecars
from moelite.config import HFConfig, short
from moelite.errors import CheckpointError, UnsupportedError
from moelite.sources import awq, bitsandbytes, compressed, fp8, gguf_model, gptq, mxfp4
from moelite.sources.codes import Codes
from moelite.sources.tensor import Assembled, Parts, Tensor, assemble

_METHODS: dict[str, Callable[[Parts, HFConfig], dict[str, Tensor]]] = {
    "awq": awq.find,
    "bitsandbytes": bitsandbytes.find,
    "compressed-tensors": compressed.find,
    "fp8": fp8.find,
    "gptq": gptq.find,
    "mxfp4": mxfp4.find,
}
_KEYS = ("quantization_config", "compression_config")
_BESIDE = "quantize_config.json"  # where older GPTQ checkpoints say it


def open_folder(path: Path) -> Source:
    """The checkpoint in a folder, or a GGUF file (of a split, its first part).

    Reads headers and small files, no weights. Raises CheckpointError for what is missing or
    damaged, UnsupportedError for an encoding or a GGUF that cannot be read.
    """
    if (file := gguf_file_at(path)) is not None:
        return gguf_model.open_gguf(file)
    checkpoint = open_checkpoint(path)
    found = quantization(path, checkpoint.config)
    if found is None:
        return checkpoint
    method, settings = found
    parts = Parts(checkpoint)
    tensors = _METHODS[method](parts, HFConfig(settings, where="quantization_config"))
    if not tensors:
        raise CheckpointError(
            f"config.json says that {path} is quantized ({method}), but no tensor of it is",
            fix="remove quantization_config from config.json if the weights are plain",
        )
    return assemble(checkpoint, without_quantization(checkpoint.config), parts, tensors)


def coded(source: Source, ref: TensorRef, start: int = 0, stop: int | None = None) -> Codes | None:
    """Rows start:stop of the matrix `ref` names, as the codes it was read from; None where only
    numbers exist, as in a plain checkpoint.
    """
    return source.coded(ref, start, stop) if isinstance(source, Assembled) else None


def read_small(path: Path) -> tuple[dict[str, bytes], dict[str, Any]]:
    """(small files by name, config) of what `open_folder` opens; a folder may lack its weights."""
    if (file := gguf_file_at(path)) is not None:
        opened = gguf_model.open_gguf(file)
        return opened.files, opened.config
    files, config = read_sidecars(path)
    quantization(path, config)
    return files, without_quantization(config)


def gguf_file_at(path: Path) -> Path | None:
    """The GGUF file that `path` is, or that is all the weights a folder has; else None."""
    if path.is_file():
        return path
    if not path.is_dir() or (path / "config.json").exists():
        return None
    found = sorted(path.glob("*.gguf"))
    firsts = [file for file in found if "-of-" not in file.name or "-00001-of-" in file.name]
    if len(firsts) > 1:
        raise CheckpointError(
            f"{path} holds several GGUF models: {', '.join(f.name for f in firsts[:4])}",
            fix="name the file",
        )
    return firsts[0] if firsts else None


def quantization(path: Path, config: dict[str, Any]) -> tuple[str, dict[str, Any]] | None:
    """(method, its settings), or None for plain weights. Raises UnsupportedError for others."""
    settings = next((config[key] for key in _KEYS if config.get(key)), None)
    if settings is None and (path / _BESIDE).is_file():
        settings = {"quant_method": "gptq"} | read_json_file(path.resolve(), _BESIDE)
    if settings is None:
        return None
    if not isinstance(settings, dict):
        raise CheckpointError(f"{path}: quantization_config in config.json is no JSON object")
    method = settings.get("quant_method")
    if method is None and (settings.get("load_in_4bit") or settings.get("load_in_8bit")):
        method = "bitsandbytes"  # older files do not say it
    if not isinstance(method, str) or method not in _METHODS:
        raise UnsupportedError(
            f"{path} is quantized with quant_method {short(method)};"
            f" moelite reads {', '.join(_METHODS)} and GGUF files",
            fix="use the unquantized checkpoint of this model, or one of these",
        )
    return method, settings


def without_quantization(config: dict[str, Any]) -> dict[str, Any]:
    """The config of the model itself."""
    return {key: value for key, value in config.items() if key not in _KEYS}
