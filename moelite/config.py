"""Reading a Hugging Face config.json: every key is used, declared inert, or refused by name.

The file comes from strangers, so types and ranges are checked here, once, before any size computed
from it is believed. null means absent, as in transformers.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, Final, TypeVar

from moelite.errors import CheckpointError, UnsupportedError

T = TypeVar("T")


class _Required:
    """The default of a key that must be there."""


REQUIRED: Final = _Required()

# Far above every published model, far below what would make a product of two of them overflow.
MAX_SIZE = 1 << 22
MAX_LAYERS = 1024
MAX_POSITIONS = 1 << 31

# Keys that change nothing about inference: training, bookkeeping, and what save_pretrained adds.
# So is every key that ends in _token_id: the tokenizer part reads those it needs.
INERT = frozenset(
    {
        "architectures",
        "attention_dropout",
        "_attn_implementation",
        "_attn_implementation_autoset",
        "attn_pdrop",
        "chunk_size_feed_forward",
        "dtype",
        "embd_pdrop",
        "hidden_dropout",
        "id2label",
        "initializer_range",
        "label2id",
        "model_type",
        "_name_or_path",
        "name_or_path",
        "output_attentions",
        "output_hidden_states",
        "output_router_logits",
        "pretraining_tp",
        "problem_type",
        "resid_pdrop",
        "return_dict",
        "router_aux_loss_coef",
        "router_jitter_noise",
        "task_specific_params",
        "tokenizer_class",
        "torch_dtype",
        "transformers_version",
        "unsloth_fixed",
        "unsloth_version",
        "use_cache",
    }
)

_ADVICE = {
    "quantization_config": "point moelite at the checkpoint with bf16, f16 or f32 weights; "
    "it quantizes them itself",
    "auto_map": "moelite never runs code from a checkpoint; remove auto_map from config.json if "
    "the model is the standard one",
}


class HFConfig:
    """A config.json that remembers which keys were asked for, so that `finish` can refuse the rest.

    where: how errors name this dict ("config.json", or "rope_parameters in config.json").
    Readers raise CheckpointError for a value that is missing without a default, of the wrong type
    or out of range; `must_be` and `finish` raise UnsupportedError.
    """

    def __init__(self, raw: Mapping[str, Any], *, where: str = "config.json") -> None:
        if not isinstance(raw, Mapping):
            raise CheckpointError(f"{where} holds {type(raw).__name__}, not a JSON object")
        self._raw = raw
        self._where = where
        self._seen: set[str] = set()

    def integer(
        self,
        *keys: str,
        low: int = 1,
        high: int = MAX_SIZE,
        default: T | _Required = REQUIRED,
    ) -> int | T:
        """The integer under the first of `keys` that is set; low <= value <= high."""
        key, value = self._find(keys)
        if value is None:
            return self._default(key, default)
        if type(value) is not int or not low <= value <= high:
            raise self._bad(key, value, f"an integer from {low} to {high}")
        return value

    def number(
        self,
        *keys: str,
        low: float,
        high: float,
        default: T | _Required = REQUIRED,
    ) -> float | T:
        """The finite number under the first of `keys` that is set; low <= value <= high."""
        key, value = self._find(keys)
        if value is None:
            return self._default(key, default)
        good = type(value) in (int, float) and low <= value <= high and math.isfinite(value)
        if not good:
            raise self._bad(key, value, f"a number from {low:g} to {high:g}")
        return float(value)

    def flag(self, *keys: str, default: bool | _Required = REQUIRED) -> bool:
        """true or false."""
        key, value = self._find(keys)
        if value is None:
            return self._default(key, default)
        if type(value) is not bool:
            raise self._bad(key, value, "true or false")
        return value

    def text(self, *keys: str, default: str | _Required = REQUIRED) -> str:
        """A string."""
        key, value = self._find(keys)
        if value is None:
            return self._default(key, default)
        if type(value) is not str:
            raise self._bad(key, value, "a string")
        return value

    def items(self, key: str, kind: type[T], *, most: int = MAX_LAYERS) -> tuple[T, ...] | None:
        """A list of at most `most` values of `kind`, or None when absent."""
        _, value = self._find((key,))
        if value is None:
            return None
        good = type(value) is list and len(value) <= most and all(type(v) is kind for v in value)
        if not good:
            raise self._bad(key, value, f"a list of at most {most} values of type {kind.__name__}")
        return tuple(value)

    def nested(self, key: str) -> HFConfig | None:
        """The JSON object under `key` with its own accounting, or None. Call its `finish` too."""
        _, value = self._find((key,))
        if value is None:
            return None
        return HFConfig(value, where=f"{key} in {self._where}")

    def keys(self) -> tuple[str, ...]:
        """Every key, in the file's order."""
        return tuple(str(key) for key in self._raw)

    def must_be(self, key: str, *allowed: Any) -> None:
        """Refuse any value but those implemented; absent passes."""
        _, value = self._find((key,))
        if value is not None and not any(_same(value, a) for a in allowed):
            listed = " or ".join(repr(a) for a in allowed)
            raise UnsupportedError(
                f"{key} = {short(value)} in {self._where} is not implemented; only {listed} is",
                fix="use a checkpoint without this setting",
            )

    def has(self, key: str) -> bool:
        """Is the key there and not null? (Does not count as reading it.)"""
        return self._raw.get(key) is not None

    def inert(self, *keys: str) -> None:
        """These keys, beyond the common ones, change nothing for this model."""
        self._seen.update(keys)

    def finish(self) -> None:
        """Refuse by name every key that is set and that nobody read."""
        known = self._seen | INERT
        rest = sorted(
            str(k)
            for k in self._raw
            if self.has(k) and k not in known and not str(k).endswith("_token_id")
        )
        if not rest:
            return
        advice = next((_ADVICE[k] for k in rest if k in _ADVICE), "")
        raise UnsupportedError(
            f"{self._where} sets {', '.join(short(k) for k in rest[:8])}, which moelite does not "
            "know; it could change what the model computes",
            fix=advice or f"if you know that it changes nothing, remove it from {self._where}",
        )

    def _find(self, keys: tuple[str, ...]) -> tuple[str, Any]:
        """(key, value) of the first of `keys` that is set; two spellings must agree."""
        self._seen.update(keys)
        found = [(k, self._raw[k]) for k in keys if self.has(k)]
        if any(value != found[0][1] for _, value in found[1:]):
            listed = ", ".join(f"{k} = {short(v)}" for k, v in found)
            raise CheckpointError(
                f"{self._where} contradicts itself: {listed}", fix="remove the wrong one"
            )
        return found[0] if found else (" or ".join(keys), None)

    def _default(self, key: str, default: T | _Required) -> T:
        if isinstance(default, _Required):
            raise CheckpointError(
                f"{self._where} does not say {key}, and a guess could change what is computed",
                fix=f"add {key} to config.json, as in the model's original repository",
            )
        return default

    def _bad(self, key: str, value: object, allowed: str) -> CheckpointError:
        return CheckpointError(
            f"{key} = {short(value)} in {self._where}; it must be {allowed}",
            fix="download config.json again, or correct it",
        )


def _same(value: object, allowed: object) -> bool:
    """Equal, and true is not 1."""
    return value == allowed and isinstance(value, bool) == isinstance(allowed, bool)


def short(value: object) -> str:
    """A value from a stranger's file, escaped and cut to a length that fits a message."""
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."
