"""Recording a model's routing: which experts each token of a text uses, layer by layer."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Protocol

import numpy as np

from moelite.cache.trace import I32, MAX_IDS, Trace
from moelite.errors import UsageError

PIECE_TOKENS = 64  # between two reports of progress


class RoutedModel(Protocol):
    """What recording asks of a model; of `arch` its MoE layers, of a session only advance."""

    on_route: Any

    @property
    def arch(self) -> Any: ...
    @property
    def context(self) -> int: ...
    def session(self) -> Any: ...


def record(
    model: RoutedModel,
    ids: Sequence[int],
    *,
    name: str = "",
    progress: Callable[[int, int], None] | None = None,
) -> Trace:
    """Runs the tokens `ids` in a session of their own; the experts that each of them used.

    name: of the trace. progress(tokens done, tokens in all). Raises UsageError where there is no
    token, or more than the model's context or a trace can hold.
    """
    if len(ids) == 0:
        raise UsageError("the text has no token", fix="give a longer text")
    if len(ids) > model.context:
        raise UsageError(
            f"{len(ids)} tokens exceed the context of {model.context}",
            fix=f"--tokens {model.context}, or --context {len(ids)}",
        )
    layers = model.arch.moe_layers
    mlps = [model.arch.layers[layer].mlp for layer in layers]
    shape = len(ids), len(layers), mlps[0].router.top_k
    if shape[0] * shape[1] * shape[2] > MAX_IDS:
        raise UsageError(
            f"{len(ids)} tokens are more than a trace holds",
            fix=f"--tokens {MAX_IDS // (shape[1] * shape[2])}",
        )
    routes = np.empty(shape, np.int32)
    place = {layer: i for i, layer in enumerate(layers)}
    done = dict.fromkeys(layers, 0)

    def keep(layer: int, selected: I32) -> None:
        start = done[layer]
        done[layer] = start + len(selected)
        routes[start : done[layer], place[layer]] = selected

    told, session = model.on_route, model.session()
    model.on_route = keep
    try:
        for at in range(0, len(ids), PIECE_TOKENS):
            piece = ids[at : at + PIECE_TOKENS]
            session.advance(piece)
            if progress is not None:
                progress(at + len(piece), len(ids))
    finally:
        model.on_route = told
    return Trace(routes=routes, experts=max(mlp.num_experts for mlp in mlps), name=name)
