"""From router logits to experts and weights, on a device: as moelite.routing, in torch."""

from __future__ import annotations

import torch

from moelite.arch import Router


def route(
    router: Router, logits: torch.Tensor, given: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """logits [T, E] float32 -> experts [T, K] int64, weights [T, K] float32, by descending score.

    Ties go to the lower expert id. given [T, K]: experts to take instead, in their order.
    """
    scores = torch.softmax(logits, -1)
    if given is None:
        # a stable sort: topk leaves ties to chance
        found = torch.sort(scores, dim=-1, descending=True, stable=True)
        weights, experts = found.values[:, : router.top_k], found.indices[:, : router.top_k]
    else:
        experts, weights = given, scores.gather(1, given)
    if router.renormalize:
        total = weights.sum(-1, keepdim=True)
        weights = weights / torch.where(total == 0, torch.ones_like(total), total)
    return experts.contiguous(), (weights * router.scale).contiguous()
