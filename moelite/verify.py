"""Checks a store, and that a model within a budget gives the bits that it gives without one.

Both on the user's own machine: every file against its checksums, then the same tokens through two
models, one after the other, one of them at a budget that keeps few experts.
"""

from __future__ import annotations

import gc
import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from moelite.attention import KVFormat
from moelite.engine import Model, load
from moelite.errors import StoreError, UsageError
from moelite.machine import memory
from moelite.quant.base import F32
from moelite.sizing import footprint
from moelite.store import Store
from moelite.units import parse_bytes, show_bytes

TOKENS = 32  # to generate
PROMPT_IDS = 24  # random ones, where there is no tokenizer
PROMPT = (
    "The library stood at the end of a narrow street. Every morning at eight a man unlocked its "
    "door, lit the lamps, and wrote the date on a slip of paper: "
)

Progress = Callable[[int, int, str], None]  # (done, total, what)


@dataclass(frozen=True, slots=True, kw_only=True)
class VerifyRun:
    """One model's way through the tokens. digests: sha256 of the logits at each position."""

    budget_bytes: int
    experts_resident: int
    experts_total: int
    hits: int
    misses: int
    tokens: tuple[int, ...]
    digests: tuple[str, ...]
    finite: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class VerifyReport:
    """model: the run at the budget in question; reference: with all experts in memory, or as many
    as this machine holds. first_difference: the first position whose logits or token differ, or
    None.
    """

    prompt_tokens: int
    model: VerifyRun
    reference: VerifyRun

    @property
    def first_difference(self) -> int | None:
        """The first position whose logits are not equal bit for bit, or None."""
        pairs = zip(self.model.digests, self.reference.digests, strict=True)
        return next((i for i, (got, want) in enumerate(pairs) if got != want), None)

    @property
    def equal(self) -> bool:
        """Whether all logits are finite and equal, and the tokens too."""
        return (
            self.first_difference is None
            and self.model.tokens == self.reference.tokens
            and self.model.finite
            and self.reference.finite
        )


def verify_files(path: Path, progress: Progress | None = None) -> tuple[int, int]:
    """(files, bytes) of the store at `path`, all as they were written.

    Raises StoreError naming what is damaged: the part if it is one file, else the files.
    """
    store = Store.open(path)
    sizes = {name: entry.bytes for name, entry in sorted(store.manifest.files.items())}
    total, done, damaged = sum(sizes.values()), 0, {}
    for name, size in sizes.items():
        if progress is not None:
            progress(done, total, name)
        try:
            store.verify_file(name)
        except StoreError as error:
            damaged[name] = error
        except OSError as error:
            damaged[name] = StoreError(f"{path / name}: {error.strerror}", fix="check the disk")
        done += size
    store.close()
    if progress is not None:
        progress(done, total, "files")
    if len(damaged) == 1:
        raise damaged.popitem()[1]
    if damaged:
        raise StoreError(
            f"{len(damaged)} of {len(sizes)} files of {path} are damaged: {', '.join(damaged)}",
            fix="delete them, then run the same `moelite quantize` again",
        )
    return len(sizes), total


def verify_tokens(
    path: Path,
    *,
    ram: str | int | None = None,
    context: int | None = None,
    threads: int | None = None,
    kv: KVFormat = "f16",
    tokens: int = TOKENS,
    progress: Progress | None = None,
) -> VerifyReport:
    """Runs a prompt and `tokens` greedy ones at the budget `ram` (default: the least that works),
    then with every expert in memory, or as many as this machine holds now, and compares.

    The prompt is text where the store has a tokenizer, else random ids, the same every time. Raises
    BudgetError if the budget does not fit, UsageError if the context is too short.
    """
    if tokens < 1:
        raise UsageError(f"--tokens {tokens} verifies nothing", fix=f"--tokens {TOKENS}")
    settings: dict[str, Any] = {"context": context, "threads": threads, "kv": kv}
    machine = memory()
    least = footprint(path, ram=machine.limit_bytes, **settings)
    budget = least.minimum_bytes
    if ram is not None:
        budget = parse_bytes(ram, total=machine.limit_bytes)
    run = _Run(path, tokens, settings, progress)
    model = run.at(budget, "at the budget")
    # What is free after the first model has gone, less what other programs may come to take. With
    # every expert resident, more memory would only buy longer chunks.
    free = memory().available_bytes * 9 // 10
    whole = least.used_bytes if least.experts_resident == least.experts_total else free
    reference = run.at(max(budget, min(whole, free)), "in memory")
    return VerifyReport(prompt_tokens=run.prompt_tokens, model=model, reference=reference)


class _Run:
    """The same tokens through one model after another."""

    def __init__(
        self, path: Path, tokens: int, settings: dict[str, Any], progress: Progress | None
    ) -> None:
        self._path, self._tokens, self._settings = path, tokens, settings
        self._progress = progress
        self.prompt_tokens = 0

    def at(self, budget: int, what: str) -> VerifyRun:
        """The run within `budget` bytes; its memory is free again when this returns."""
        with load(self._path, ram=budget, **self._settings) as model:
            ids = _prompt(model)
            self.prompt_tokens = len(ids)
            found = self._run(model, ids, what)
        # a model and its session refer to each other
        del model
        gc.collect()
        return found

    def _run(self, model: Model, ids: Sequence[int], what: str) -> VerifyRun:
        total = len(ids) + self._tokens
        if total > model.context:
            raise UsageError(
                f"{len(ids)} + {self._tokens} tokens exceed the context of {model.context}",
                fix=f"--context {total}",
            )
        digests: list[str] = []
        finite = True
        token = 0

        def keep(_: int, logits: F32) -> None:
            nonlocal finite, token
            digests.append(hashlib.sha256(logits.tobytes()).hexdigest())
            finite &= bool(np.isfinite(logits).all())
            token = int(np.argmax(logits))
            if self._progress is not None:
                self._progress(len(digests), total - 1, what)

        session = model.session()
        session.each(ids, keep)
        tokens = [token]
        while len(tokens) < self._tokens:
            session.each([token], keep)
            tokens.append(token)
        stats = model.stats()
        return VerifyRun(
            budget_bytes=model.footprint.budget_bytes,
            experts_resident=model.footprint.experts_resident,
            experts_total=model.footprint.experts_total,
            hits=stats.hits,
            misses=stats.misses,
            tokens=tuple(tokens),
            digests=tuple(digests),
            finite=finite,
        )


def _prompt(model: Model) -> list[int]:
    if "tokenizer.json" in model.store.manifest.files:
        return list(model.tokenizer.encode(PROMPT, special=True))
    drawn = np.random.default_rng(0).integers(0, model.arch.vocab_size, PROMPT_IDS)
    return [int(i) for i in drawn]


def verdict(report: VerifyReport) -> str:
    """What was found, in one or two sentences."""
    model, reference = report.model, report.reference
    whole = reference.experts_resident == reference.experts_total
    beside = "every expert" if whole else f"{reference.experts_resident:,} experts"
    where = f"within {show_bytes(model.budget_bytes)} and with {beside} in memory"
    first = report.first_difference
    if first is not None:
        part = "prompt" if first < report.prompt_tokens else "answer"
        return f"the logits {where} differ, first at position {first} (in the {part})"
    if not (model.finite and reference.finite):
        return f"the logits {where} are equal, but some are NaN or infinite"
    return f"{len(model.digests)} rows of logits and {len(model.tokens)} tokens are equal {where}"
