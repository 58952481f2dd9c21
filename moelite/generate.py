"""From a prompt to an answer: reading it, picking tokens, stopping, and how it went."""

from __future__ import annotations

import time
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol

import numpy as np
import numpy.typing as npt

from moelite.cache.stats import CacheStats
from moelite.errors import UsageError
from moelite.sampling import Sampler
from moelite.sampling import SamplingOptions as SamplingOptions

F32 = npt.NDArray[np.float32]

FinishReason = Literal["stop", "length", "context"]
Progress = Callable[[int, int], None]


class SessionLike(Protocol):
    """What generation needs of a session: kept tokens and their keys and values."""

    ids: list[int]

    @property
    def context(self) -> int: ...
    def advance(self, ids: Sequence[int], *, progress: Progress | None = None) -> F32: ...
    def truncate(self, length: int) -> None: ...


class TextStreamLike(Protocol):
    """Text of ids that arrive one by one."""

    def push(self, token_id: int) -> str: ...
    def flush(self) -> str: ...


class TokenizerLike(Protocol):
    """What generation needs of a tokenizer."""

    @property
    def eos_ids(self) -> frozenset[int]: ...
    def stream(self) -> TextStreamLike: ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Step:
    """One token of an answer.

    text: what became readable with it; empty while a character or a stop text is incomplete.
    finish_reason: set on the last step: "stop" (the model, or a stop text), "length", "context".
    """

    token_id: int
    text: str
    finish_reason: FinishReason | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class GenerationStats:
    """Tokens and times of one answer, so far or whole.

    prompt_tokens counts all of the prompt, reused_tokens those whose keys and values were kept.
    prefill_tok_s is over the tokens computed; decode_tok_s over the tokens after the first.
    A speed is 0 where nothing was timed.
    """

    prompt_tokens: int
    reused_tokens: int
    generated_tokens: int
    ttft_s: float
    prefill_tok_s: float
    decode_tok_s: float
    experts: CacheStats
    seed: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Completion:
    """A whole answer. ids: its tokens, the one that ended it left out."""

    text: str
    ids: tuple[int, ...]
    finish_reason: FinishReason | None
    stats: GenerationStats


class StopScanner:
    """Holds text back while it could still become a stop text."""

    def __init__(self, stop: Sequence[str]) -> None:
        self._stop = stop
        self._held = ""

    def push(self, text: str) -> tuple[str, bool]:
        """(what may be shown, whether a stop text came). After a hit the rest is dropped."""
        self._held += text
        hits = [at for s in self._stop if (at := self._held.find(s)) >= 0]
        if hits:
            out, self._held = self._held[: min(hits)], ""
            return out, True
        keep = max((self._open(s) for s in self._stop), default=0)
        cut = len(self._held) - keep
        out, self._held = self._held[:cut], self._held[cut:]
        return out, False

    def flush(self) -> str:
        """What was held back, when nothing more comes."""
        out, self._held = self._held, ""
        return out

    def _open(self, stop: str) -> int:
        """Length of the longest end of the held text with which `stop` begins."""
        longest = min(len(stop) - 1, len(self._held))
        return next((n for n in range(longest, 0, -1) if self._held.endswith(stop[:n])), 0)


class Generation(Iterator[Step]):
    """One answer in the making: iterate for its steps; `stats` and `completion` at any time.

    Closing it, or simply not going on, leaves the session with every token computed so far.
    """

    def __init__(
        self,
        session: SessionLike,
        tokenizer: TokenizerLike,
        ids: Sequence[int],
        options: SamplingOptions,
        *,
        on_prefill: Progress | None = None,
        experts: Callable[[], CacheStats] | None = None,
    ) -> None:
        if not ids:
            raise UsageError("the prompt is empty", fix="give at least one word")
        if len(ids) >= session.context:
            raise UsageError(
                f"the prompt has {len(ids):,} tokens; the context holds {session.context:,}, and"
                " the answer needs room too",
                fix=f"--context {len(ids) + 512}, or a shorter prompt",
            )
        self.session = session
        self.prompt_tokens = len(ids)
        self.reused_tokens = 0
        self.ids: list[int] = []
        self.text = ""
        self.finish_reason: FinishReason | None = None
        self._prompt = list(ids)
        self._options = options
        self._sampler = Sampler(options)
        self._eos = frozenset[int]() if options.ignore_eos else tokenizer.eos_ids
        self._words = tokenizer.stream()
        self._scanner = StopScanner(options.stop)
        self._on_prefill = on_prefill
        self._experts = experts or (lambda: CacheStats(hits=0, misses=0, bytes_read=0, wait_s=0.0))
        self._before = self._experts()
        self._prefill_s = self._first_s = self._last_s = 0.0
        self._steps = 0
        self._iterator = self._run()

    def __iter__(self) -> Generation:
        return self

    def __next__(self) -> Step:
        return next(self._iterator)

    def close(self) -> None:
        """Ask for no more steps."""
        self._iterator.close()

    @property
    def stats(self) -> GenerationStats:
        """The record up to the last step taken."""
        computed = self.prompt_tokens - self.reused_tokens
        decode_s = self._last_s - self._first_s
        return GenerationStats(
            prompt_tokens=self.prompt_tokens,
            reused_tokens=self.reused_tokens,
            generated_tokens=len(self.ids),
            ttft_s=self._first_s,
            prefill_tok_s=computed / self._prefill_s if self._prefill_s else 0.0,
            decode_tok_s=(self._steps - 1) / decode_s if decode_s > 0 else 0.0,
            experts=self._experts() - self._before,
            seed=self._sampler.seed,
        )

    @property
    def completion(self) -> Completion:
        """The answer up to the last step taken."""
        return Completion(
            text=self.text,
            ids=tuple(self.ids),
            finish_reason=self.finish_reason,
            stats=self.stats,
        )

    def _run(self) -> Generator[Step, None, None]:
        start = time.perf_counter()
        self.reused_tokens = reuse(self.session, self._prompt)
        fresh = self._prompt[self.reused_tokens :]
        logits = self.session.advance(fresh, progress=self._on_prefill)
        self._prefill_s = time.perf_counter() - start
        while self.finish_reason is None:
            token_id = self._sampler.pick(logits, self._seen())
            step = self._take(token_id)
            self._steps += 1
            self._last_s = time.perf_counter() - start
            self._first_s = self._first_s or self._last_s
            yield step
            if self.finish_reason is None:
                logits = self.session.advance([token_id])

    def _seen(self) -> Sequence[int]:
        return [*self._prompt, *self.ids] if self._options.repetition_penalty != 1 else ()

    def _take(self, token_id: int) -> Step:
        """Add one token to the answer and see whether it was the last."""
        ended = token_id in self._eos
        if not ended:
            self.ids.append(token_id)
        text, stopped = self._scanner.push("" if ended else self._words.push(token_id))
        if ended or stopped:
            self.finish_reason = "stop"
        elif len(self.ids) == self._options.max_tokens:
            self.finish_reason = "length"
        elif self.prompt_tokens + len(self.ids) >= self.session.context:
            self.finish_reason = "context"
        if self.finish_reason is not None and not stopped:
            rest, stopped = self._scanner.push(self._words.flush())
            text += rest + self._scanner.flush()
            self.finish_reason = "stop" if stopped else self.finish_reason
        self.text += text
        return Step(token_id=token_id, text=text, finish_reason=self.finish_reason)


def generate(
    session: SessionLike,
    tokenizer: TokenizerLike,
    ids: Sequence[int],
    options: SamplingOptions,
    *,
    on_prefill: Progress | None = None,
    experts: Callable[[], CacheStats] | None = None,
) -> Generation:
    """The steps of an answer to the prompt `ids`, computed as they are asked for.

    session: what it shares with the prompt's beginning is used again; the rest is forgotten.
    on_prefill(done, total): called as the prompt is read. experts: reads the expert cache's counts.
    Raises UsageError for a prompt that is empty or leaves the context no room.
    """
    return Generation(session, tokenizer, ids, options, on_prefill=on_prefill, experts=experts)


def reuse(session: SessionLike, ids: Sequence[int]) -> int:
    """Truncate the session to what it shares with the beginning of `ids`; how many tokens that is.

    At least one token of `ids` is left to compute, for its logits.
    """
    kept = session.ids
    limit = min(len(kept), len(ids) - 1)
    common = next((i for i in range(limit) if kept[i] != ids[i]), limit)
    if common < len(kept):
        session.truncate(common)
    return common


class ModelLike(Protocol):
    """What the functions below need of a model."""

    @property
    def tokenizer(self) -> Any: ...
    def session(self) -> Any: ...
    def stats(self) -> CacheStats: ...


def stream(
    model: ModelLike,
    prompt: str | Sequence[int],
    options: SamplingOptions | None = None,
    *,
    session: SessionLike | None = None,
    on_prefill: Progress | None = None,
    **changes: Any,
) -> Generation:
    """The steps of a continuation of `prompt`: text (a BOS is added as the model wants) or ids.

    options: None takes the model's own. changes: single fields of SamplingOptions.
    """
    tokenizer = model.tokenizer
    if options is None:
        options = SamplingOptions.from_generation_config(tokenizer.generation_config)
    ids = tokenizer.encode(prompt, special=True) if isinstance(prompt, str) else list(prompt)
    return generate(
        model.session() if session is None else session,
        tokenizer,
        ids,
        options.updated(**changes),
        on_prefill=on_prefill,
        experts=model.stats,
    )


def complete(
    model: ModelLike,
    prompt: str | Sequence[int],
    options: SamplingOptions | None = None,
    **changes: Any,
) -> Completion:
    """The whole continuation of `prompt`. Takes what `stream` takes."""
    return _whole_answer(stream(model, prompt, options, **changes))


def chat_stream(
    model: ModelLike,
    messages: Sequence[Mapping[str, Any]],
    options: SamplingOptions | None = None,
    **changes: Any,
) -> Generation:
    """The steps of an answer to `messages` ({"role", "content"}). Takes what `stream` takes."""
    return stream(model, model.tokenizer.encode_chat(messages), options, **changes)


def chat(
    model: ModelLike,
    messages: Sequence[Mapping[str, Any]],
    options: SamplingOptions | None = None,
    **changes: Any,
) -> Completion:
    """The whole answer to `messages`. Takes what `stream` takes."""
    return _whole_answer(chat_stream(model, messages, options, **changes))


def _whole_answer(generation: Generation) -> Completion:
    for _ in generation:
        pass
    return generation.completion
