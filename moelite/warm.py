"""Compiles every kernel once, in a process of its own, before a model is loaded.

Compiling takes memory that a budget would have to hold for good (docs/LOG.md has the figure), so a
child process does it and leaves the machine code in the kernel cache.
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from moelite import jit
from moelite.arch import Arch, Linear, Norm, TensorRef
from moelite.cache import ExpertCache, allocate_arena
from moelite.errors import BudgetError, MoeliteError
from moelite.kv import KVCache, KVFormat
from moelite.machine import memory
from moelite.model import Decoder
from moelite.models import build
from moelite.quant import FORMATS
from moelite.quant.base import U8, record_layout
from moelite.threads import Team
from moelite.units import MIB, show_bytes
from moelite.workspace import Workspace

COMPILE_BYTES = 512 * MIB  # this process waiting (98 MiB) and the child at its peak (384), measured

# One layer with every optional part: biases, qk norm, shared expert and its gate.
_CONFIG: Mapping[str, Any] = {
    "model_type": "qwen2_moe",
    "vocab_size": 32,
    "hidden_size": 32,
    "intermediate_size": 32,
    "moe_intermediate_size": 32,
    "shared_expert_intermediate_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "max_position_embeddings": 32,
    "num_experts": 2,
    "num_experts_per_tok": 1,
    "norm_topk_prob": False,
    "decoder_sparse_step": 1,
    "mlp_only_layers": [],
    "hidden_act": "silu",
    "rms_norm_eps": 1e-6,
    "rope_theta": 1e4,
    "tie_word_embeddings": True,
}


def ensure(kv: KVFormat, on_compile: Callable[[str], None] | None = None) -> None:
    """Returns once kernels for a kv format are in the cache; a child process makes them if need be.

    This happens once for a version of moelite on a CPU, before a model takes any memory, and is not
    bounded by the model's budget. Raises BudgetError if the machine has not enough free for it.
    """
    mark = jit.CACHE_FOLDER / f"complete-{kv}"
    if mark.exists() or not jit.ours():
        return
    free = memory().available_bytes
    if free < COMPILE_BYTES:
        raise BudgetError(
            f"compiling the kernels for this CPU, once, takes {show_bytes(COMPILE_BYTES)}; "
            f"{show_bytes(free)} are free",
            fix="make room for half a minute; afterwards the model needs only its budget",
        )
    if on_compile is not None:
        takes = show_bytes(COMPILE_BYTES)
        on_compile(f"compiling kernels for this CPU (once: half a minute, {takes})")
    command = [sys.executable, "-c", f"from moelite import warm; warm.compile_all({kv!r})"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise MoeliteError(
            f"the kernels could not be compiled: {done.stderr.strip().splitlines()[-1:]}",
            fix=f"see that {jit.CACHE_FOLDER} can be written and about 600 MiB of memory are free",
        )
    try:
        mark.parent.mkdir(parents=True, exist_ok=True)
        mark.touch()
    except OSError:
        pass  # an unwritable cache folder: kernels are then compiled in every process


class _Random:
    """Random dense weights in one format."""

    def __init__(self, arch: Arch, fmt: str) -> None:
        self._fmt = fmt
        self._weights: dict[str, tuple[str, U8]] = {}
        rng = np.random.default_rng(0)
        for name, shape, kind in _tensors(arch):
            weight = rng.normal(size=shape).astype(np.float32)
            if len(shape) == 1:
                self._weights[name] = ("f32", weight.view(np.uint8))
            else:
                kept = kind or fmt
                self._weights[name] = (kept, FORMATS[kept].pack(weight))

    def format_of(self, key: str) -> str:
        return self._weights[key][0]

    def read(self, key: str) -> U8:
        return self._weights[key][1]


def _tensors(arch: Arch) -> list[tuple[str, tuple[int, ...], str]]:
    # (key, shape, forced format) of every dense tensor, found by walking the architecture
    out: list[tuple[str, tuple[int, ...], str]] = [
        (arch.embed.key, (arch.vocab_size, arch.hidden_size), "")
    ]

    def walk(part: Any, forced: str = "") -> None:
        if isinstance(part, Linear):
            out.append((part.weight.key, (part.rows, part.cols), forced))
            if part.bias is not None:
                out.append((part.bias.key, (part.rows,), ""))
        elif isinstance(part, Norm):
            out.extend((r.key, (part.size,), "") for r in (part.weight, part.bias) if r is not None)
        elif hasattr(part, "__slots__") and not isinstance(part, TensorRef):
            for field in part.__slots__:
                if field != "experts":
                    walk(getattr(part, field), "f32" if field == "router" else forced)

    for layer in arch.layers:
        walk(layer)
    walk(arch.norm)
    return out


def compile_all(kv: KVFormat) -> None:
    """Runs a tiny model through every kernel."""
    arch = build(_CONFIG)
    layout = record_layout(FORMATS["int4"], arch.hidden_size, 32)
    arena = allocate_arena(3, layout.record_bytes)
    experts = ExpertCache(
        arena=arena,
        record_bytes=layout.record_bytes,
        quotas={0: 2},
        read=lambda key, out: None,
        readers=1,
    )
    team = Team(1)
    decoder = Decoder(
        arch,
        _Random(arch, "int8"),
        experts,
        layout,
        work=Workspace(arch, 4, 1, 32),
        context=32,
        team=team,
    )
    decoder.forward([1, 2, 3], 0, KVCache(arch, 32, kv))
    decoder.logits(2)
    experts.close()
    team.close()
