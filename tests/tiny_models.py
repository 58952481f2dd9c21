"""Tiny random checkpoints of every architecture, made with transformers, one per variant.

tests/tiny/<model_type>.json holds the smallest config of the type and named variants of it, each
exercising some flags. Weights are wide enough that attention is uneven and routing decisive, and
norms and biases are random, or a model that ignored them would pass.
"""

from __future__ import annotations

import json
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

TINY = Path(__file__).parent / "tiny"


def model_types() -> list[str]:
    return sorted(path.stem for path in TINY.glob("*.json"))


def variants() -> list[tuple[str, str]]:
    """(model_type, variant name) of every tiny model."""
    return [(t, name) for t in model_types() for name in _spec(t)["variants"]]


def config(model_type: str, variant: str) -> dict[str, Any]:
    """The arguments of the variant's config class."""
    spec = _spec(model_type)
    return {**spec["config"], **spec["variants"][variant], "model_type": model_type}


def prompt(model_type: str, variant: str, length: int) -> list[int]:
    """Random token ids, the same in every run."""
    rng = np.random.default_rng(zlib.crc32(f"{model_type}/{variant}/ids".encode()))
    ids: list[int] = rng.integers(3, config(model_type, variant)["vocab_size"], length).tolist()
    return ids


def write_checkpoint(model_type: str, variant: str, folder: Path) -> None:
    """A Hugging Face folder with float32 weights, as save_pretrained writes it."""
    import torch
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.set_num_threads(1)  # for matrices this small, waking a second thread costs more
    special = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    made = AutoConfig.for_model(**config(model_type, variant), **special)
    model = AutoModelForCausalLM.from_config(made)
    generator = torch.Generator().manual_seed(zlib.crc32(f"{model_type}/{variant}".encode()))
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "embed_tokens" in name:
                p.normal_(0, 1, generator=generator)
            elif p.dim() >= 2:
                p.normal_(0, 1.5 * p.shape[-1] ** -0.5, generator=generator)
            else:
                p.add_(torch.randn(p.shape, generator=generator) * 0.2)
    model.save_pretrained(folder)
    words = {f"w{i} ": i for i in range(made.vocab_size)}
    Tokenizer(WordLevel(words, unk_token="w0 ")).save(str(folder / "tokenizer.json"))


def weights(folder: Path) -> dict[str, npt.NDArray[np.float32]]:
    """Every tensor of a checkpoint by name."""
    from safetensors.numpy import load_file

    found: dict[str, npt.NDArray[np.float32]] = load_file(folder / "model.safetensors")
    return found


def load(folder: Path, *, double: bool = False) -> Any:
    """The checkpoint as transformers runs it, in float32 or (inside `in_double`) in float64."""
    import torch
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(
        folder,
        dtype=torch.float64 if double else torch.float32,
        attn_implementation="eager",
        experts_implementation="eager",
    ).eval()


def logits(model: Any, ids: list[int]) -> npt.NDArray[np.floating[Any]]:
    """ids [T] -> logits [T, V], one full forward."""
    import torch

    with torch.no_grad():
        found: npt.NDArray[np.floating[Any]] = model(torch.tensor([ids])).logits[0].numpy()
    return found


@contextmanager
def in_double() -> Iterator[None]:
    """Where transformers asks for float32 (norms, softmax, rotary angles), it gets float64.

    Without this its own rounding, 1e-7, would hide any smaller difference.
    """
    import torch
    from torch.overrides import TorchFunctionMode

    class Double(TorchFunctionMode):
        def __torch_function__(
            self, func: Any, types: Any, args: Any = (), kwargs: Any = None
        ) -> Any:
            if func is torch.Tensor.float:
                return args[0].double()
            args = tuple(_double(a) for a in args)
            return func(*args, **{k: _double(v) for k, v in (kwargs or {}).items()})

    def _double(value: Any) -> Any:
        return torch.float64 if value is torch.float32 else value

    with Double():
        yield


def _spec(model_type: str) -> dict[str, Any]:
    spec: dict[str, Any] = json.loads((TINY / f"{model_type}.json").read_text())
    return spec
