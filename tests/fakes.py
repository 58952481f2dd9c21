"""A model without weights: it answers from a table, through the real tokenizer and templates.

Logits follow from the token ids alone, as a real model's do, so that kept prefixes, retries and
interruptions behave as with one. `python fakes.py chat` talks with it in the terminal.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import tokenizers
from chat_templates import CHATML
from tokenizers import AddedToken, decoders, models, pre_tokenizers

from moelite.budget import Footprint, Part, Slots
from moelite.cache.stats import CacheStats
from moelite.forecast import Decode, Forecast, Help, Point, Rate, Speeds
from moelite.lookahead import Lookahead
from moelite.tokenizer import Tokenizer
from moelite.units import MIB

SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")


def byte_tokenizer_json(extra: Sequence[AddedToken] = ()) -> bytes:
    """tokenizer.json of a byte-level tokenizer: 3 control tokens, then 256 bytes, a few merges."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    merges = [("h", "e"), ("l", "l"), ("he", "ll"), ("hell", "o"), ("Ġ", "t"), ("Ċ", "Ċ")]
    words = [*SPECIAL, *alphabet, *("".join(pair) for pair in merges)]
    tok = tokenizers.Tokenizer(models.BPE({w: i for i, w in enumerate(words)}, merges))
    tok.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tok.decoder = decoders.ByteLevel()
    tok.add_special_tokens([AddedToken(t, special=True, normalized=False) for t in SPECIAL])
    tok.add_tokens(list(extra))
    return str(tok.to_str()).encode()


def sidecars(template: str = CHATML, **generation: Any) -> dict[str, bytes]:
    """The text files of a checkpoint with the byte tokenizer."""
    return {
        "tokenizer.json": byte_tokenizer_json(),
        "tokenizer_config.json": json.dumps(
            {"eos_token": "<|im_end|>", "bos_token": "<|im_start|>", "chat_template": template}
        ).encode(),
        "generation_config.json": json.dumps({"eos_token_id": 2, **generation}).encode(),
        "config.json": b"{}",
    }


def fake_footprint(context: int) -> Footprint:
    """A model of which half the experts fit."""
    return Footprint(
        parts=(
            Part(name="runtime", bytes=200 * MIB, basis="measured"),
            Part(name="tokenizer", bytes=20 * MIB, basis="estimated"),
            Part(name="dense weights", bytes=300 * MIB, basis="exact"),
            Part(name="experts", bytes=488 * MIB, basis="exact"),
        ),
        budget_bytes=1024 * MIB,
        minimum_bytes=600 * MIB,
        machine_bytes=8192 * MIB,
        machine_limit="physical memory",
        fits=True,
        experts_total=240,
        experts_resident=120,
        experts_bytes=960 * MIB,
        resident_bytes=480 * MIB,
        record_bytes=4 * MIB,
        slots=Slots(quotas={0: 120}, floating={4 * MIB: 2}),
        context=context,
        chunk=64,
        threads=2,
        store_bytes=1260 * MIB,
        expert_format="int4",
        dense_format="int8",
    )


def fake_forecast() -> Forecast:
    """9 to 13 tok/s for half of 240 experts."""
    rate = Rate(0.6, 0.7, 0.8, "estimated")
    speed = Rate(2e9, 4e9, 6e9, "measured")
    return Forecast(
        budget_bytes=1024 * MIB,
        decode_tok_s=Rate(9.1, 11.2, 13.4, "estimated"),
        ttft_s=Rate(2.0, 3.0, 4.0, "estimated"),
        prompt_tokens=512,
        hit_rate=rate,
        hit_about="published runs of OLMoE-1B-7B",
        read_bytes=Rate(16.0 * MIB, 24.0 * MIB, 32.0 * MIB, "estimated"),
        bound="drive",
        token=Decode(compute_s=0.03, handling_s=0.001, wait_s=0.058, misses=6.0),
        speeds=Speeds(
            weight_bytes_s=speed, prefill_macs_s=speed, drive_bytes_s=speed, miss_s=0.0001
        ),
        curve=tuple(
            Point(budget_bytes=n * MIB, decode_tok_s=v, hit_rate=0.1 * v / 4, experts_resident=n)
            for n, v in ((600, 4.0), (700, 5.5), (1024, 11.2), (1500, 22.4))
        ),
        resident_bytes=1500 * MIB,
        working_set_bytes=700 * MIB,
        helps=(
            Help(kind="resident", amount=1, budget_bytes=1500 * MIB, decode_tok_s=22.4, gain=2.0),
            Help(kind="drive", amount=2, budget_bytes=1024 * MIB, decode_tok_s=16.8, gain=1.5),
        ),
    )


class FakeMeter:
    """Measures nothing; keeps what it was told."""

    def __init__(self) -> None:
        self.told: list[tuple[int, ...]] = []

    def first_token(self) -> None:
        if not self.told:
            self.told.append(())

    def done(self, prompt: int, computed: int, decoded: int) -> None:
        self.told.append((prompt, computed, decoded))


@dataclass
class FakeSession:
    """Says the reply of the last question, token by token; counts what it computes."""

    model: FakeModel
    context: int
    ids: list[int] = field(default_factory=list)
    computed: int = 0

    def advance(
        self, ids: Sequence[int], *, progress: Callable[[int, int], None] | None = None
    ) -> np.ndarray:
        assert len(ids) > 0
        assert len(self.ids) + len(ids) <= self.context
        for at in range(0, len(ids), 64):
            piece = list(ids[at : at + 64])
            time.sleep(self.model.prefill_delay_s if len(ids) > 1 else self.model.delay_s)
            self.ids += piece
            self.computed += len(piece)
            if progress is not None:
                progress(at + len(piece), len(ids))
        return self.model.logits(self.ids)

    def truncate(self, length: int) -> None:
        del self.ids[length:]


class FakeModel:
    """Answers from `replies` (question -> answer), else "You said: ..."."""

    def __init__(
        self,
        replies: Mapping[str, str] | None = None,
        *,
        context: int = 4096,
        delay_s: float = 0.0,
        prefill_delay_s: float = 0.0,
        files: Mapping[str, bytes] | None = None,
    ) -> None:
        self.tokenizer = Tokenizer.from_files(files or sidecars())
        self.footprint = fake_footprint(context)
        self.replies = dict(replies or {})
        self.context, self.delay_s, self.prefill_delay_s = context, delay_s, prefill_delay_s
        self._lookups = 0
        self.lookahead = Lookahead("off")
        self.meters: list[FakeMeter] = []

    def session(self) -> FakeSession:
        return FakeSession(self, self.context)

    def forecast(self, hits: Any = None, folder: Path | None = None) -> Forecast:
        return fake_forecast()

    def meter(self, folder: Path) -> FakeMeter:
        self.meters.append(FakeMeter())
        return self.meters[-1]

    def stats(self) -> CacheStats:
        return CacheStats(hits=9 * self._lookups, misses=self._lookups, bytes_read=0, wait_s=0.0)

    def logits(self, ids: Sequence[int]) -> np.ndarray:
        """One-hot at the next token of the reply, a little noise elsewhere."""
        self._lookups += 1
        out = np.random.default_rng(len(ids)).random(self.tokenizer.vocab_size).astype(np.float32)
        start, end = 1, 2
        turns = [i for i, t in enumerate(ids) if t == start]
        if not turns:
            out[3 + len(ids) % 26] = 50.0
            return out
        said = self.tokenizer.decode(ids[turns[-1] :]).removeprefix("assistant\n")
        asked = ids[turns[-2] : turns[-1]] if len(turns) > 1 else ids
        question = self.tokenizer.decode(asked).removeprefix("user\n").strip()
        reply = self.replies.get(question, f"You said: {question}")
        rest = self.tokenizer.encode(reply, special=False)
        done = len(ids) - turns[-1] - 1 - len(self.tokenizer.encode("assistant\n", special=False))
        assert said or done == 0
        out[rest[done] if done < len(rest) else end] = 50.0
        return out


def main(arguments: list[str]) -> None:
    """`fakes.py chat|run [ARGUMENT ...]`: the real commands, with this model."""
    from contextlib import contextmanager
    from unittest import mock

    from moelite.cli import main as cli

    settings = json.loads(arguments[0])
    model = FakeModel(
        settings.get("replies"),
        context=settings.get("context", 4096),
        delay_s=settings.get("delay_s", 0.0),
        prefill_delay_s=settings.get("prefill_delay_s", 0.0),
    )

    @contextmanager
    def open_model(*_: Any, **__: Any) -> Any:
        yield model

    with (
        mock.patch("moelite.cli.chat.open_model", open_model),
        mock.patch("moelite.cli.run.open_model", open_model),
    ):
        cli.run(arguments[1:])


if __name__ == "__main__":
    main(sys.argv[1:])
