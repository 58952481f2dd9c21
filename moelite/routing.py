"""From router logits to the experts of each token and their weights.

A row's result depends on that row alone, so it is the same in any chunk; ties go to the lower
expert id, as a stable sort of the scores would have it.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from moelite.arch import Router
from moelite.jit import inner, kernel

F32 = npt.NDArray[np.float32]
I32 = npt.NDArray[np.int32]


def route(router: Router, logits: F32, given: I32 | None = None) -> tuple[I32, F32]:
    """logits [T, E] f32 -> selected_experts [T, K] i32 and routing_weights [T, K] f32.

    Both by descending score; or the experts `given` [T, K] i32, in their order, and the weights
    that the router has for them. A row whose scores are undefined (a NaN or +inf among its logits)
    selects experts 0..K-1 with NaN weights, so that the damage stays visible in the output.
    ValueError if logits is not [T, E] for this router.
    """
    if logits.ndim != 2 or logits.shape[1] != router.linear.rows:
        raise ValueError(f"route: logits {logits.shape} do not fit {router.linear.rows} experts")
    tokens = logits.shape[0]
    if given is None:
        given = np.full((tokens, router.top_k), -1, np.int32)
    experts = np.empty((tokens, router.top_k), np.int32)
    weights = np.empty((tokens, router.top_k), np.float32)
    scores = np.empty(logits.shape[1], np.float32)
    logits = np.ascontiguousarray(logits, np.float32)
    rule = Rule(logits.shape[1], router.top_k, router.renormalize, np.float32(router.scale))
    chosen = experts.reshape(-1), weights.reshape(-1)
    _route(logits.reshape(-1), rule, given.reshape(-1), scores, *chosen)
    return experts, weights


class Rule(NamedTuple):
    """What a router does with its logits: softmax over `experts`, the top_k greatest, scaled."""

    experts: int
    top_k: int
    renormalize: bool
    scale: np.float32


@inner
def route_row(logits, at, rule, given, scores, out):
    """Selects the experts of logits[at : at + E]; scores [E]: scratch.

    given int32: experts to take instead, or -1, laid out as the results. out: (selected int32,
    weights float32, where in both the K results go).
    """
    experts, weights, to = out
    highest = logits[at]
    for e in range(1, rule.experts):
        highest = max(highest, logits[at + e])
    total = np.float32(0)
    for e in range(rule.experts):
        scores[e] = np.exp(logits[at + e] - highest)
        total += scores[e]
    for e in range(rule.experts):
        scores[e] /= total
    chosen = np.float32(0)
    for k in range(rule.top_k):
        best = int(given[to + k])
        for e in range(rule.experts if best < 0 else 0):
            # -1 marks the experts already chosen. Where all scores are NaN, `best < 0` takes the
            # first that is left.
            if scores[e] != np.float32(-1) and (best < 0 or scores[e] > scores[best]):
                best = e
        experts[to + k] = best
        weights[to + k] = scores[best]
        chosen += scores[best]
        scores[best] = np.float32(-1)
    # given experts may all score 0; chosen ones cannot
    divisor = chosen if rule.renormalize and chosen != 0 else np.float32(1)
    for k in range(to, to + rule.top_k):
        weights[k] = weights[k] / divisor * rule.scale


@kernel
def _route(logits: F32, rule: Rule, given: I32, scores: F32, experts: I32, weights: F32) -> None:
    # logits [T * E] f32, given [T * K] i32, scores [E] f32 scratch -> experts [T * K] i32, weights
    # [T * K] f32
    for t in range(logits.size // rule.experts):
        out = experts, weights, t * rule.top_k
        route_row(logits, t * rule.experts, rule, given, scores, out)
