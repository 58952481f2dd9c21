"""Picking a token from logits.

The order of the steps is repetition penalty, temperature, top_k, top_p, min_p, as in transformers.
All of it is float64 and seeded, so equal logits give equal tokens.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import numpy as np
import numpy.typing as npt

from moelite.errors import MoeliteError, UsageError

F32 = npt.NDArray[np.float32]
F64 = npt.NDArray[np.float64]

_HEAD = 1024  # top_p sorts this many candidates first; the rest only if they do not hold its mass
_OTHER_NAMES = {
    "max_new_tokens": "max_tokens",
    "max_length": "max_tokens",
    "num_predict": "max_tokens",
    "n_predict": "max_tokens",
    "temp": "temperature",
    "random_seed": "seed",
    "stop_strings": "stop",
    "do_sample": "temperature (0 is greedy)",
    "repeat_penalty": "repetition_penalty",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class SamplingOptions:
    """How to pick tokens and when to stop.

    max_tokens: at most so many tokens; None: until the model stops or the context is full.
    temperature: 0 takes the likeliest token. top_k 0, top_p 1 and min_p 0 switch each off.
    seed: None draws one. stop: texts that end the answer and are not part of it.
    repetition_penalty: above 1 makes tokens of the prompt and the answer less likely.
    ignore_eos: go on after the model says it is done (for measurements).
    """

    max_tokens: int | None = None
    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    seed: int | None = None
    stop: tuple[str, ...] = ()
    ignore_eos: bool = False

    def __post_init__(self) -> None:
        if isinstance(self.stop, str):
            object.__setattr__(self, "stop", (self.stop,))
        else:
            object.__setattr__(self, "stop", tuple(self.stop))
        for name, (holds, allowed) in self._rules().items():
            if not holds:
                raise UsageError(
                    f"{name} is {getattr(self, name)!r}", fix=f"{name} must be {allowed}"
                )

    def _rules(self) -> dict[str, tuple[bool, str]]:
        count, seed = self.max_tokens, self.seed
        return {
            "max_tokens": (
                count is None or (_whole(count) and count > 0),
                "a whole number above 0",
            ),
            "temperature": (_number(self.temperature) and self.temperature >= 0, "0 or more"),
            "top_k": (_whole(self.top_k) and self.top_k >= 0, "0 (off) or a whole number above"),
            "top_p": (_number(self.top_p) and 0 < self.top_p <= 1, "above 0 and at most 1 (off)"),
            "min_p": (_number(self.min_p) and 0 <= self.min_p <= 1, "from 0 (off) to 1"),
            "repetition_penalty": (
                _number(self.repetition_penalty) and self.repetition_penalty > 0,
                "above 0 (1 is off)",
            ),
            "seed": (seed is None or (_whole(seed) and 0 <= seed < 2**64), "from 0 to 2^64 - 1"),
            "stop": (all(isinstance(s, str) and s for s in self.stop), "texts that are not empty"),
        }

    @classmethod
    def from_generation_config(cls, config: Mapping[str, Any]) -> SamplingOptions:
        """What the model's authors advise: their sampling if do_sample is set, else greedy."""
        names = ["repetition_penalty"]
        if config.get("do_sample"):
            names += ["temperature", "top_k", "top_p", "min_p"]
        found = {name: config[name] for name in names if config.get(name) is not None}
        if config.get("do_sample"):
            found.setdefault("temperature", 1.0)
        return cls(**found)

    def updated(self, **changes: Any) -> SamplingOptions:
        """A copy with `changes`. An unknown name is a TypeError that names the right one."""
        known = {field.name for field in fields(self)}
        for name in changes.keys() - known:
            right = _OTHER_NAMES.get(name)
            hint = f"; use {right}" if right else f"; there are {', '.join(sorted(known))}"
            raise TypeError(f"unknown option {name!r}{hint}")
        return replace(self, **changes)


class Sampler:
    """Picks token ids. One per answer: it holds the random numbers."""

    def __init__(self, options: SamplingOptions) -> None:
        self.options = options
        self.seed = fresh_seed() if options.seed is None else options.seed
        self._random = np.random.Generator(np.random.PCG64(self.seed))

    def pick(self, logits: F32, seen: Sequence[int] = ()) -> int:
        """A token id from logits [V]; seen: the tokens that repetition_penalty acts on.

        Raises MoeliteError if a score is NaN.
        """
        scores = logits.astype(np.float64)
        if not np.isfinite(scores.max()):  # one NaN makes the maximum NaN
            raise MoeliteError(
                "the model computed something that is not a number",
                fix="quantize it again, with --experts bf16 --dense bf16 to find out what broke it",
            )
        o = self.options
        if o.repetition_penalty != 1 and len(seen):
            at = np.unique(np.asarray(seen, np.int64))
            s = scores[at]
            scores[at] = np.where(s < 0, s * o.repetition_penalty, s / o.repetition_penalty)
        if o.temperature == 0:
            return int(np.argmax(scores))
        ids, weights = candidates(scores, o)
        sums = np.cumsum(weights)
        place = np.searchsorted(sums, self._random.random() * sums[-1], side="right")
        return int(ids[min(place, len(ids) - 1)])


def candidates(scores: F64, options: SamplingOptions) -> tuple[npt.NDArray[np.int64], F64]:
    """The ids (ascending) that may be drawn from scores [V], and their weights (not summing to 1).

    Among equal scores the lower id is the likelier one.
    """
    ids = np.arange(len(scores))
    if 0 < options.top_k < len(scores):
        edge = np.partition(scores, -options.top_k)[-options.top_k]
        ids = ids[scores >= edge]
        ids = np.sort(ids[np.argsort(-scores[ids], kind="stable")[: options.top_k]])
    kept = scores[ids] / options.temperature
    weights = np.exp(kept - kept.max())
    if options.top_p < 1:
        inside = _nucleus(weights, options.top_p)
        ids, weights = ids[inside], weights[inside]
    if options.min_p > 0:
        likely = weights >= options.min_p * weights.max()
        ids, weights = ids[likely], weights[likely]
    return ids, weights


def _nucleus(weights: F64, top_p: float) -> npt.NDArray[np.int64]:
    """Indices (ascending) of the fewest weights that hold top_p of their sum."""
    mass = top_p * weights.sum()
    head = np.arange(len(weights))
    if len(weights) > _HEAD:
        likely = np.flatnonzero(weights >= np.partition(weights, -_HEAD)[-_HEAD])
        head = likely if weights[likely].sum() > mass else head
    order = head[np.argsort(-weights[head], kind="stable")]
    sums = np.cumsum(weights[order])
    return np.sort(order[: 1 + np.count_nonzero(sums[:-1] < mass)])


def fresh_seed() -> int:
    """A seed nobody chose, short enough to type."""
    return int(np.random.SeedSequence().generate_state(1)[0])


def _whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and np.isfinite(value)
