"""How often two models send a token to the same experts.

Quantization first shows where a router's choice tips over: another expert then answers, which no
error of single weights tells. Only positions whose logits are scored are counted, so that these
shares and the divergence speak of the same tokens.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from moelite.errors import UsageError

I32 = npt.NDArray[np.int32]
F64 = npt.NDArray[np.float64]


@dataclass(frozen=True, slots=True, kw_only=True)
class RouterReport:
    """Share of a token's top-k experts that both models chose, per MoE layer and over all.

    Whatever their order. The mean's standard error takes a token's layers as one value.
    """

    layers: tuple[int, ...]
    agreement: tuple[float, ...]
    mean: float
    mean_se: float

    def worst(self, count: int) -> list[tuple[int, float]]:
        """(layer, agreement) of the layers that agree least."""
        pairs = zip(self.layers, self.agreement, strict=True)
        return sorted(pairs, key=lambda pair: pair[1])[:count]


class Choices:
    """The experts that a model chooses while it is listened to, in the tokens' order."""

    def __init__(self) -> None:
        self.listening = False
        self._heard: dict[int, list[I32]] = {}

    def hear(self, layer: int, selected: I32) -> None:
        """A model's `on_route`: experts [T, K] of the next T tokens in `layer`."""
        if self.listening:
            self._heard.setdefault(layer, []).append(selected.copy())

    def take(self) -> dict[int, I32]:
        """{layer: experts [T, K]} since the last take."""
        found = {layer: np.concatenate(parts) for layer, parts in sorted(self._heard.items())}
        self._heard = {}
        return found


class Agreement:
    """Shares of common experts, gathered piece by piece."""

    def __init__(self) -> None:
        self._shares: dict[int, list[F64]] = {}

    def add(self, first: dict[int, I32], second: dict[int, I32]) -> None:
        """What both models chose for the same tokens, as `Choices.take` gives it.

        UsageError where the layers or the numbers of experts differ.
        """
        shapes = [{layer: part.shape for layer, part in one.items()} for one in (first, second)]
        if shapes[0] != shapes[1]:
            raise UsageError(
                "the two models do not have the same MoE layers and experts per token",
                fix="compare two stores of the same model",
            )
        for layer, experts in first.items():
            self._shares.setdefault(layer, []).append(shared(experts, second[layer]))

    def report(self) -> RouterReport | None:
        """None where no choice was heard."""
        if not self._shares:
            return None
        table = np.stack([np.concatenate(parts) for parts in self._shares.values()])  # [L, T]
        tokens = table.mean(axis=0)
        n = tokens.size
        return RouterReport(
            layers=tuple(self._shares),
            agreement=tuple(float(x) for x in table.mean(axis=1)),
            mean=float(tokens.mean()),
            mean_se=float(tokens.std(ddof=1)) / math.sqrt(n) if n > 1 else math.nan,
        )


def shared(first: I32, second: I32) -> F64:
    """Share [T] of each row's K distinct experts that the other row has, too; both [T, K]."""
    found: F64 = (first[:, :, None] == second[:, None, :]).any(axis=2).mean(axis=1)
    return found


def listen(models: Sequence[Any], choices: Sequence[Choices]) -> list[Any]:
    """Has each model tell its choices; what it told before, for `restore`.

    A model without the hook stays silent.
    """
    before = [getattr(model, "on_route", None) for model in models]
    for model, choice in zip(models, choices, strict=True):
        model.on_route = choice.hear
    return before


def restore(models: Sequence[Any], before: Sequence[Any]) -> None:
    """Undoes `listen`."""
    for model, told in zip(models, before, strict=True):
        model.on_route = told
