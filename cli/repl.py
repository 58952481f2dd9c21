"""A conversation at the prompt: turns, what is kept of them, and how an answer ends."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any, Protocol

from rich.console import Console
from rich.text import Text

from moelite.cache.stats import CacheStats
from moelite.cli.answer import OPEN, Paper, Thoughts
from moelite.cli.commands import COMMANDS, run_command
from moelite.cli.common import cache_folder
from moelite.cli.interrupt import Interrupt, Stopped, silent_keys
from moelite.cli.render import answer_line, band
from moelite.cli.sessions import Message
from moelite.cli.terminal import LineReader, read_message
from moelite.errors import MoeliteError
from moelite.forecast import Forecast
from moelite.generate import Generation, GenerationStats, SessionLike, generate
from moelite.sampling import SamplingOptions


class ChatModel(Protocol):
    """What a conversation needs of a model."""

    @property
    def tokenizer(self) -> Any: ...
    @property
    def footprint(self) -> Any: ...
    @property
    def lookahead(self) -> Any: ...
    def session(self) -> Any: ...
    def stats(self) -> CacheStats: ...
    def forecast(self, hits: Any = None, folder: Path | None = None) -> Any: ...
    def meter(self, folder: Path) -> Any: ...


class Conversing:
    """One conversation with one model.

    messages: user and assistant turns, in turns, the assistant's last. Its session keeps the keys
    and values of all that was said, so that a turn costs only what is new. forecast: made before
    the first answer, for a person to see.
    """

    def __init__(
        self,
        model: ChatModel,
        name: str,
        reader: LineReader,
        *,
        system: str,
        options: SamplingOptions,
    ) -> None:
        self.model = model
        self.name = name
        self.reader = reader
        self.system = system
        self.options = options
        self.advised = options  # what /set goes back to
        self.messages: list[Message] = []
        self.asked: str | None = None  # the last question, for /retry
        self.last: GenerationStats | None = None
        self.session: SessionLike = model.session()
        self.saved_to: Path | None = None
        self.paper = Paper()
        self.console = Console(highlight=False)
        self.forecast: Forecast | None = None
        if self.paper.terminal:
            self.forecast = model.forecast(folder=cache_folder())

    def loop(self) -> None:
        """Read and answer until the user leaves. A file or pipe ends where it ends."""
        while True:
            try:
                text = read_message(self.reader)
            except KeyboardInterrupt:
                if not sys.stdin.isatty():
                    raise
                self.console.print()
                continue
            except EOFError:
                return
            try:
                if not self.handle(text):
                    return
            except MoeliteError as error:
                self.complain(error)

    def handle(self, text: str) -> bool:
        """Do what one input asks; False if it asks to leave."""
        if not text.strip():
            return True
        if text.startswith("//"):
            self.ask(text[1:])
        elif text.startswith("/"):
            return run_command(self, text)
        else:
            self.ask(text)
        return True

    def ask(self, text: str) -> None:
        """Put a question and show the answer, which becomes part of the conversation."""
        self.asked = text
        prompt = [*self.prompt_messages(), {"role": "user", "content": text}]
        ids = self.model.tokenizer.encode_chat(prompt)
        context = self.session.context
        if len(ids) >= context:
            self.say(
                f"The conversation would be {len(ids):,} tokens; the context holds {context:,}."
                " /drop forgets the oldest turn, /clear starts over, --context makes it larger."
            )
            return
        thoughts = Thoughts(inside=self._opens_thought(prompt))
        generation, stopped = self._generate(ids, thoughts)
        if not generation.ids:
            what = "stopped before the first word" if stopped else "the model said nothing"
            self.say(f"[{what}; /retry asks again]")
            return
        answer: Message = {"role": "assistant", "content": thoughts.answer.strip()}
        if thoughts.thought.strip():
            answer["reasoning_content"] = thoughts.thought.strip()
        if stopped:
            answer["stopped"] = True
        self.messages += [{"role": "user", "content": text}, answer]

    def _generate(self, ids: list[int], thoughts: Thoughts) -> tuple[Generation, bool]:
        """Run and show one answer; whether Ctrl-C ended it."""
        paper = self.paper
        with silent_keys(), Interrupt() as interrupt:

            def reading(done: int, total: int) -> None:
                interrupt.check()
                paper.reading(done, total)

            generation = generate(
                self.session,
                self.model.tokenizer,
                ids,
                self.options,
                on_prefill=reading,
                experts=self.model.stats,
            )
            meter = self.model.meter(cache_folder())
            paper.begin()
            try:
                for step in generation:
                    meter.first_token()
                    for kind, part in thoughts.push(step.text):
                        paper.text(kind, part)
                    if interrupt.asked:
                        break
            except Stopped:
                pass  # what was read of the prompt stays read
            for kind, part in thoughts.flush():
                paper.text(kind, part)
        stats = generation.stats
        fresh = stats.prompt_tokens - stats.reused_tokens
        meter.done(stats.prompt_tokens, fresh, stats.generated_tokens - 1)
        stopped = interrupt.asked and generation.finish_reason is None
        self._close(generation, stopped)
        return generation, stopped

    def _close(self, generation: Generation, stopped: bool) -> None:
        """The lines under an answer."""
        self.paper.end()
        if not generation.ids:
            return
        self.last = generation.stats
        used, context = generation.prompt_tokens + len(generation.ids), self.session.context
        if stopped:
            self.paper.note("  [stopped]")
        if generation.finish_reason == "length":
            self.paper.note(f"  [cut at {self.options.max_tokens:,} tokens: /set max_tokens]")
        if generation.finish_reason == "context":
            self.say(
                f"[the context of {context:,} tokens is full, so the answer ends here."
                " /drop forgets the oldest turn, /clear starts over]"
            )
        self.paper.note("  " + answer_line(self.last, used, context, self.forecast))

    def prompt_messages(self) -> list[Message]:
        """The conversation as the template gets it."""
        system = [{"role": "system", "content": self.system}] if self.system else []
        return [*system, *({k: v for k, v in m.items() if k != "stopped"} for m in self.messages)]

    def _opens_thought(self, prompt: list[Message]) -> bool:
        return bool(self.model.tokenizer.render(prompt).rstrip().endswith(OPEN))

    def say(self, text: str) -> None:
        """A line from moelite, not from the model: to stderr where stdout carries answers only."""
        if self.paper.terminal:
            self.console.print(Text(text), soft_wrap=True)
        else:
            print(text, file=sys.stderr)

    def complain(self, error: MoeliteError) -> None:
        """Show an error that does not end the conversation."""
        print(f"error: {error}", file=sys.stderr)


def banner(conversing: Conversing) -> None:
    """What a person sees first: the model, its precision, its room."""
    plan = conversing.model.footprint
    parts = [conversing.name]
    formats = getattr(plan, "expert_format", ""), getattr(plan, "dense_format", "")
    if all(formats):
        parts.append(f"experts {formats[0]}, rest {formats[1]}")
    device = getattr(plan, "device", None)
    if device is not None:
        parts.append(f"{device.experts_resident:,} experts on {device.card or device.device}")
    parts.append(f"{plan.experts_resident:,} of {plan.experts_total:,} experts in memory")
    parts.append(f"context {conversing.session.context:,}")
    if conversing.forecast is not None:
        parts.append(f"forecast {band(conversing.forecast.decode_tok_s)} tok/s")
    conversing.paper.note(" · ".join(parts))
    conversing.paper.note(
        '/help lists commands · Alt+Enter or """ for several lines · Ctrl-D leaves'
    )


def command_menu() -> dict[str, str]:
    """The commands with one line each, for the completion menu."""
    return {name: command.about for name, command in COMMANDS.items()}
