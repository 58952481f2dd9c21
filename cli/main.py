"""The `moelite` command, and the one place where errors become messages and exit codes."""

from __future__ import annotations

import os
import sys
from typing import Annotated, Any

import typer

from moelite.cli.bench import bench
from moelite.cli.chat import chat
from moelite.cli.demo import demo_checkpoint
from moelite.cli.evaluate import evaluate
from moelite.cli.footprint import footprint
from moelite.cli.frontier import frontier
from moelite.cli.quantize import quantize
from moelite.cli.replay import replay
from moelite.cli.run import run as run_prompt
from moelite.cli.trace import trace
from moelite.cli.verify import verify
from moelite.errors import MoeliteError

INTERRUPTED, PIPE_CLOSED = 130, 1  # the latter is what typer says, too

# typer keeps the base of its usage errors to itself; each shows itself and knows its exit code
_UsageFailure: Any = next(c for c in typer.BadParameter.__mro__ if c.__name__ == "ClickException")

app = typer.Typer(
    name="moelite",
    help="Run a mixture-of-experts language model that is bigger than your computer's memory.",
    no_args_is_help=True,
    add_completion=True,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
)
app.command("chat", short_help="Talk with a model.")(chat)
app.command("run", short_help="Answer one prompt, from -p or a pipe.")(run_prompt)
app.command("quantize", short_help="Write the store of a checkpoint.")(quantize)
app.command("footprint", short_help="Show what a model takes, before loading it.")(footprint)
app.command("bench", short_help="Measure speed, memory and expert traffic.")(bench)
app.command("eval", short_help="Measure perplexity, and the distance of two stores.")(evaluate)
app.command("frontier", short_help="Size and distance of several stores, and a picture.")(frontier)
app.command("trace", short_help="Record which experts the tokens of a text use.")(trace)
app.command("replay", short_help="Hit rates of a trace at other cache sizes.")(replay)
app.command("verify", short_help="Check a store, and that a budget changes no token.")(verify)
app.command("demo-checkpoint", short_help="Write the built-in model as a checkpoint.")(
    demo_checkpoint
)


def _version(asked: bool) -> None:
    if asked:
        from importlib.metadata import version

        print(f"moelite {version('moelite')}")
        raise typer.Exit


@app.callback()
def options(
    version: Annotated[
        bool,
        typer.Option("--version", callback=_version, is_eager=True, help="Show the version."),
    ] = False,
    debug: Annotated[bool, typer.Option("--debug", help="Show where an error comes from.")] = False,
) -> None:
    """Options before the command."""


def run(arguments: list[str] | None = None) -> None:
    """The entry point: run a command and leave with its exit code."""
    given = sys.argv[1:] if arguments is None else arguments
    sys.exit(exit_code(given))


def exit_code(arguments: list[str]) -> int:
    """Run a command; its exit code. What a user can cause is told in words, not by traceback."""
    try:
        result = app(arguments, standalone_mode=False, prog_name="moelite")
        sys.stdout.flush()
    except MoeliteError as error:
        if "--debug" in arguments:
            raise
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    except _UsageFailure as error:
        error.show()
        code: int = error.exit_code
        return code
    except (KeyboardInterrupt, typer.Abort):
        return INTERRUPTED
    except BrokenPipeError:
        # whoever read our output has enough; keep the interpreter from flushing into nothing
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return PIPE_CLOSED
    except Exception as error:  # a fault of ours, told like the others
        if "--debug" in arguments:
            raise
        print(f"error: {type(error).__name__}: {error}", file=sys.stderr)
        print(
            "  fix: this is a fault in moelite; --debug before the command shows where",
            file=sys.stderr,
        )
        return MoeliteError.exit_code
    return result if isinstance(result, int) else 0
