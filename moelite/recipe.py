"""Recipes: which format each tensor gets, by kind, layer and expert.

A recipe is a TOML file (or the same as JSON in a store's manifest):

    experts = "int4"      # routed experts
    dense = "int8"        # all other matrices
    low = "vq-0.5"        # optional: a plane of every routed expert beside the main one

    [[rule]]              # any number; a later one wins over an earlier one
    part = "down"         # experts, gate_up, down; attention, embeddings, head, shared, dense;
                          # q, k, v, o: the four matrices of attention
    layers = "0-3,29"     # default: all
    experts = "0,5-7"     # default: all; of routed experts only
    format = "int8"
"""

from __future__ import annotations

import tomllib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from moelite.arch import Arch, MoE
from moelite.errors import UsageError
from moelite.quant import FORMATS

DENSE_FORMATS = ("int4", "int8", "bf16", "f32", "int4-f16", "mxfp4", "nf4")
# parts of a recipe: those of routed experts, and the kinds of dense matrices as reports name them
EXPERT_PARTS = ("experts", "gate_up", "down")
DENSE_PARTS = {
    "attention": "attention",
    "embeddings": "embeddings",
    "head": "head",
    "shared": "shared experts",
    "dense": "dense layers",
}
ATTENTION_PARTS = ("q", "k", "v", "o")
NAMED: dict[str, dict[str, Any]] = {
    "int4": {"experts": "int4", "dense": "int8"},
    "int4-qo": {
        "experts": "int4",
        "dense": "int8",
        "rule": [{"part": "q", "format": "int4"}, {"part": "o", "format": "int4"}],
    },
    "int8": {"experts": "int8", "dense": "int8"},
}
_SIZE_LIMIT = 1 << 20  # bytes of a recipe's file
_KEYS = {"experts", "dense", "low", "rule", "target"}
_RULE_KEYS = {"part", "layers", "experts", "format"}


@dataclass(frozen=True, slots=True, kw_only=True)
class Rule:
    """`part` gets `format` in these layers and experts; None: in all."""

    part: str
    format: str
    layers: frozenset[int] | None = None
    experts: frozenset[int] | None = None

    def holds(self, layer: int | None, expert: int | None = None) -> bool:
        """Whether it speaks of this layer (None: of no layer) and expert."""
        if self.experts is not None and expert not in self.experts:
            return False
        return self.layers is None or layer in self.layers


@dataclass(frozen=True, slots=True, kw_only=True)
class Recipe:
    """experts, dense: formats where no rule says otherwise. low: of the low plane, or None.
    target: what the rules were made for, if moelite made them, in words.
    """

    experts: str = "int4"
    dense: str = "int8"
    low: str | None = None
    rules: tuple[Rule, ...] = ()
    target: str | None = None

    def expert(self, layer: int, expert: int) -> tuple[str, str]:
        """Formats of gate and up, and of down, of a routed expert."""
        found = {"gate_up": self.experts, "down": self.experts}
        for rule in self.rules:
            if rule.part in EXPERT_PARTS and rule.holds(layer, expert):
                for part in found if rule.part == "experts" else (rule.part,):
                    found[part] = rule.format
        return found["gate_up"], found["down"]

    def matrix(self, kind: str, layer: int | None, part: str = "") -> str:
        """The format of a dense matrix of a kind, as reports name it; part: of ATTENTION_PARTS."""
        found = self.dense
        for rule in self.rules:
            if (DENSE_PARTS.get(rule.part) == kind or rule.part == part) and rule.holds(layer):
                found = rule.format
        return found

    def as_json(self) -> dict[str, Any]:
        """The recipe as a mapping, the same for the same recipe; see `parse`."""
        found: dict[str, Any] = {"experts": self.experts, "dense": self.dense}
        if self.low is not None:
            found["low"] = self.low
        if self.target is not None:
            found["target"] = self.target
        if self.rules:
            found["rule"] = [_rule_json(rule) for rule in self.rules]
        return found


_DEFAULT = Recipe()


def _rule_json(rule: Rule) -> dict[str, str]:
    found = {"part": rule.part, "format": rule.format}
    for key, numbers in (("layers", rule.layers), ("experts", rule.experts)):
        if numbers is not None:
            found[key] = show_numbers(numbers)
    return found


def choose(
    recipe: str | Recipe | None, experts: str | None, dense: str | None, low: str | None = None
) -> Recipe:
    """The recipe that options mean: by itself, or one format for experts, one for the rest.
    low: adds a low plane.

    Raises UsageError for both at once.
    """
    if recipe is None:
        raw = {"experts": experts, "dense": dense, "low": low}
        return parse({key: value for key, value in raw.items() if value is not None}, "recipe")
    if experts is not None or dense is not None:
        raise UsageError(
            "a recipe names all formats", fix="give either a recipe or formats of experts and dense"
        )
    found = recipe if isinstance(recipe, Recipe) else load_recipe(recipe)
    if low is None:
        return found
    return parse({**found.as_json(), "low": low}, "recipe")


def load_recipe(name: str) -> Recipe:
    """A recipe by name, or from a TOML file. Raises UsageError."""
    if name in NAMED:
        return parse(NAMED[name], name)
    path = Path(name)
    if not path.is_file():
        raise UsageError(
            f"there is no recipe {name!r}", fix=f"name a file, or one of {', '.join(NAMED)}"
        )
    if path.stat().st_size > _SIZE_LIMIT:
        raise UsageError(f"{name} is larger than {_SIZE_LIMIT} bytes: no recipe")
    try:
        return parse(tomllib.loads(path.read_text("utf-8")), name)
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as problem:
        raise UsageError(f"{name} is no TOML file: {problem}") from problem


def parse(raw: Mapping[str, Any], name: str) -> Recipe:
    """A recipe from a mapping; `name` is for errors. Raises UsageError for what it cannot mean."""
    _known(raw, _KEYS, name)
    rules = raw.get("rule", [])
    if not isinstance(rules, list):
        raise UsageError(f"{name}: rule is no list", fix="begin each rule with [[rule]]")
    recipe = Recipe(
        experts=str(raw.get("experts", _DEFAULT.experts)),
        dense=str(raw.get("dense", _DEFAULT.dense)),
        low=None if raw.get("low") is None else str(raw["low"]),
        rules=tuple(_rule(rule, f"{name}: rule {i + 1}") for i, rule in enumerate(rules)),
        target=None if raw.get("target") is None else str(raw["target"]),
    )
    _allowed(recipe.experts, "experts", tuple(FORMATS))
    _allowed(recipe.dense, "dense", DENSE_FORMATS)
    if recipe.low is not None:
        _allowed(recipe.low, "low", tuple(FORMATS))
    return recipe


def _known(raw: Mapping[str, Any], keys: set[str], name: str) -> None:
    if not isinstance(raw, Mapping):
        raise UsageError(f"{name} is no table")
    if unknown := sorted(set(raw) - keys):
        raise UsageError(f"{name} has no {unknown[0]!r}", fix=f"it may have {sorted(keys)}")


def _rule(raw: Mapping[str, Any], name: str) -> Rule:
    _known(raw, _RULE_KEYS, name)
    if missing := sorted({"part", "format"} - set(raw)):
        raise UsageError(f"{name} names no {missing[0]}")
    rule = Rule(
        part=str(raw["part"]),
        format=str(raw["format"]),
        layers=None if "layers" not in raw else numbers(str(raw["layers"]), f"{name}: layers"),
        experts=None if "experts" not in raw else numbers(str(raw["experts"]), f"{name}: experts"),
    )
    if rule.part in EXPERT_PARTS:
        _allowed(rule.format, rule.part, tuple(FORMATS))
    elif rule.part in (*DENSE_PARTS, *ATTENTION_PARTS):
        _allowed(rule.format, rule.part, DENSE_FORMATS)
    else:
        raise UsageError(
            f"{name}: there is no part {rule.part!r}",
            fix=f"one of {', '.join((*EXPERT_PARTS, *DENSE_PARTS, *ATTENTION_PARTS))}",
        )
    if rule.experts is not None and rule.part not in EXPERT_PARTS:
        raise UsageError(f"{name}: {rule.part} has no experts")
    return rule


def _allowed(value: str, part: str, allowed: tuple[str, ...]) -> None:
    if value not in allowed:
        raise UsageError(
            f"{value!r} is no format for {part}", fix=f"choose one of {', '.join(allowed)}"
        )


def numbers(text: str, name: str) -> frozenset[int]:
    """The numbers of "0-3,7". Raises UsageError."""
    found: set[int] = set()
    for part in text.split(","):
        first, _, last = part.strip().partition("-")
        if not first.isdecimal() or not (last or first).isdecimal():
            raise UsageError(f"{name} {text!r} is no list of numbers", fix='as in "0-3,7"')
        begin, end = int(first), int(last or first)
        if end < begin or end > 1 << 20:
            raise UsageError(f"{name}: {part.strip()!r} is no range")
        found.update(range(begin, end + 1))
    return frozenset(found)


def show_numbers(found: frozenset[int]) -> str:
    """The reverse of `numbers`: {0, 1, 2, 7} -> "0-2,7"."""
    runs: list[list[int]] = []
    for n in sorted(found):
        if runs and runs[-1][1] == n - 1:
            runs[-1][1] = n
        else:
            runs.append([n, n])
    return ",".join(str(a) if a == b else f"{a}-{b}" for a, b in runs)


def check_layers(recipe: Recipe, arch: Arch) -> None:
    """Raises UsageError for a rule that names a layer or an expert which the model has not."""
    experts = {
        i: layer.mlp.num_experts
        for i, layer in enumerate(arch.layers)
        if isinstance(layer.mlp, MoE)
    }
    for rule in recipe.rules:
        last = max(rule.layers or {0})
        if last >= len(arch.layers):
            raise UsageError(f"a rule names layer {last}; the model has {len(arch.layers)}")
        most = max(rule.experts or {0})
        if most >= max(experts.values()):
            raise UsageError(f"a rule names expert {most}; a layer has {max(experts.values())}")
