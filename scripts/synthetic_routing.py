"""Are a store's experts used evenly? Random tokens, one at a time, counted layer by layer."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from synthetic import generator

from moelite.arch import MoE
from moelite.errors import StoreError


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerUse:
    """How a layer's experts were used. entropy: of their shares, 1 if all are used alike; even:
    what an even choice would give on average over as few tokens."""

    layer: int
    entropy: float
    even: float
    used: float
    busiest: float


def expert_use(path: Path, *, tokens: int = 64, seed: int = 0) -> list[LayerUse]:
    """Runs random tokens one at a time and counts the experts that each layer chose."""
    from moelite.engine import load

    counts: dict[int, np.ndarray] = {}
    with load(path, context=max(tokens, 16)) as model:

        def count(layer: int, selected: np.ndarray) -> None:
            np.add.at(counts[layer], selected.reshape(-1), 1)

        counts.update({i: np.zeros(e.experts, np.int64) for i, e in model.store.layers.items()})
        model.on_route = count
        session = model.session()
        for token in generator(seed, 3).integers(0, model.arch.vocab_size, tokens):
            logits = session.advance([int(token)])
            if not np.isfinite(logits).all():
                raise StoreError(f"{path} computes NaN or infinite logits")
        mlp = next(x.mlp for x in model.arch.layers if isinstance(x.mlp, MoE))
    even = _even(mlp, tokens, seed)
    return [
        LayerUse(
            layer=layer,
            entropy=_entropy(found),
            even=even,
            used=float(np.mean(found > 0)),
            busiest=float(found.max() / tokens),
        )
        for layer, found in counts.items()
    ]


def _entropy(counts: np.ndarray) -> float:
    share = counts[counts > 0] / counts.sum()
    return float(-(share * np.log(share)).sum() / math.log(max(2, counts.size)))


def _even(mlp: MoE, tokens: int, seed: int) -> float:
    rng, found = generator(seed, 4), []
    for _ in range(20):
        counts = np.zeros(mlp.num_experts, np.int64)
        for _ in range(tokens):
            counts[rng.permutation(mlp.num_experts)[: mlp.router.top_k]] += 1
        found.append(_entropy(counts))
    return float(np.mean(found))
