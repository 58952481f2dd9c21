"""`moelite chat`: a conversation in the terminal."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

import typer

from moelite.cli.common import (
    BUILTIN,
    ContextOption,
    DeviceOption,
    KVOption,
    LookaheadOption,
    MissOption,
    ModelArgument,
    OfflineOption,
    OnMissOption,
    RamOption,
    ReadsOption,
    ThreadsOption,
    VramOption,
    both_terminals,
    open_model,
    state_folder,
)

if TYPE_CHECKING:
    from moelite.cli.repl import ChatModel


def chat(  # noqa: PLR0913 - one parameter for each option
    model: ModelArgument = None,
    ram: RamOption = None,
    context: ContextOption = None,
    threads: ThreadsOption = None,
    kv: KVOption = "f16",
    reads: ReadsOption = "auto",
    lookahead: LookaheadOption = "auto",
    on_miss: OnMissOption = "wait",
    device: DeviceOption = "auto",
    vram: VramOption = None,
    miss: MissOption = "auto",
    system: Annotated[
        str, typer.Option("--system", metavar="TEXT", help="A system prompt.", show_default=False)
    ] = "",
    offline: OfflineOption = False,
    no_history: Annotated[
        bool, typer.Option("--no-history", help="Do not keep what you type.")
    ] = False,
) -> None:
    """Talk with a model. Without a name: the built-in one.

    Answers stream; Ctrl-C stops one and keeps it; /help lists the commands.
    """
    settings: Any = {"ram": ram, "context": context, "threads": threads, "kv": kv}
    settings.update(reads=reads, lookahead=lookahead, on_miss=on_miss)
    settings.update(device=device, vram=vram, miss=miss)
    with open_model(model, offline=offline, **settings) as loaded:
        converse(loaded, model or BUILTIN, system=system, keep_history=not no_history)


def converse(model: ChatModel, name: str, *, system: str = "", keep_history: bool = True) -> None:
    """Hold a conversation with an open model until the user leaves."""
    from moelite.cli.repl import Conversing, banner, command_menu
    from moelite.cli.sessions import private_file
    from moelite.cli.terminal import Editor, LineReader, PlainLines
    from moelite.sampling import SamplingOptions

    reader: LineReader = PlainLines()
    if both_terminals():
        history = private_file(state_folder() / "history") if keep_history else None
        reader = Editor(command_menu(), history)
    options = SamplingOptions.from_generation_config(model.tokenizer.generation_config)
    conversing = Conversing(model, name, reader, system=system, options=options)
    banner(conversing)
    conversing.loop()
