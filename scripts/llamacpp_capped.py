"""moelite and llama.cpp under the same hard memory cap, one at a time, each in a new memory group.

A turn is: caches dropped, the drive's own speed probed from outside the group, the model loaded
inside, the prompt, tokens one by one, the end. Nothing is warm: what a turn reads, it reads from
the drive. llama.cpp runs with the settings that decoded fastest of those that live under the cap.
"""

from __future__ import annotations

import signal
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import drive
import llamacpp
from llamacpp import NAMES, Ended, NotLoaded, Spread, Turn, Worker
from memory_group import MemoryGroup

from moelite.errors import MoeliteError
from moelite.units import show_bytes

TRIAL_PROMPT, TRIAL_GEN = 8, 4
CANDIDATES: tuple[dict[str, Any], ...] = tuple(
    {"load_mode": mode, "repack": repack}
    for mode in ("mmap", "none", "direct_io")
    for repack in (True, False)
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """What is run. cap_bytes: of each side. python: llama.cpp's. settings: by side, for its worker.

    llama_gen: tokens llama.cpp decodes, the first of moelite's `gen`.
    """

    cap_bytes: int
    settings: dict[str, dict[str, Any]]
    python: str
    prompt: int
    gen: int
    llama_gen: int
    repeat: int
    seed: int
    trial_s: float
    progress: Callable[[str], None] = lambda note: None

    def gguf(self) -> Path:
        return Path(self.settings["llama.cpp"]["path"])

    def gen_of(self, name: str) -> int:
        return self.gen if name == "moelite" else self.llama_gen


@dataclass(frozen=True, slots=True, kw_only=True)
class CappedTurn:
    """One turn of one side. problem: why it gave no measurement; "" where it did.

    peak_bytes: of the group, file pages included. killed: processes the kernel ended at the cap.
    drive_bytes_s: just before, past the page cache. caches_dropped: False if only the models' were.
    """

    measured: Turn | None
    problem: str
    load_s: float | None
    peak_bytes: int | None
    killed: int
    drive_bytes_s: float | None
    caches_dropped: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class Trial:
    """A short turn of llama.cpp with `settings`.

    end: "survived", "killed", "too slow", or what else went wrong.
    """

    settings: dict[str, Any]
    end: str
    turn: CappedTurn

    @property
    def decode_tok_s(self) -> float | None:
        return self.turn.measured.decode_tok_s if self.turn.measured else None


@dataclass(frozen=True, slots=True, kw_only=True)
class Capped:
    """All of it. Speeds, by side, and ratios, over pairs with both sides, as llamacpp.Comparison;
    without the key where nothing was measured. failures: turns without a measurement, by side.
    """

    trials: tuple[Trial, ...]
    llama_settings: dict[str, Any]
    pairs: tuple[dict[str, CappedTurn], ...]
    failures: dict[str, int]
    killed: dict[str, int]
    speeds: dict[str, dict[str, Spread]]
    ratios: dict[str, Spread]
    facts: dict[str, dict[str, Any]] = field(repr=False)


def run(plan: Plan, prepare: Callable[[], None] = lambda: None) -> Capped:
    """Trials of llama.cpp's settings, then `repeat` pairs; prepare: run between the two.

    UsageError where no memory group can be made, MoeliteError if llama.cpp lives with no settings.
    """
    facts: dict[str, dict[str, Any]] = {}
    trials = tuple(_trial(plan, candidate, facts) for candidate in CANDIDATES)
    best = choose(trials)
    prepare()
    pairs = []
    for i in range(plan.repeat):
        pair: dict[str, CappedTurn] = {}
        for name in NAMES if i % 2 == 0 else NAMES[::-1]:
            given = dict(plan.settings[name], **(best if name == "llama.cpp" else {}))
            lengths = (plan.prompt, plan.gen_of(name))
            pair[name], _ = _turn(plan, name, given, lengths, facts)
            plan.progress(f"pair {i + 1} of {plan.repeat}: {name}: {line(pair[name])}")
        pairs.append({name: pair[name] for name in NAMES})
    return summarize(trials, best, pairs, facts)


def choose(trials: Sequence[Trial]) -> dict[str, Any]:
    """The settings that decoded fastest. MoeliteError if none survived."""
    alive = [(trial.decode_tok_s, trial) for trial in trials if trial.decode_tok_s is not None]
    if not alive:
        ends = "; ".join(f"{name_of(trial.settings)}: {trial.end}" for trial in trials)
        raise MoeliteError(
            f"llama.cpp runs with none of its settings under this cap ({ends})",
            fix="name a greater --cap, or a greater --trial-limit if all were too slow",
        )
    return max(alive, key=lambda pair: pair[0])[1].settings


def summarize(
    trials: Sequence[Trial],
    best: dict[str, Any],
    pairs: Sequence[dict[str, CappedTurn]],
    facts: dict[str, dict[str, Any]],
) -> Capped:
    """What the turns show."""
    turns = {name: [pair[name] for pair in pairs] for name in NAMES}
    speeds: dict[str, dict[str, Spread]] = {name: {} for name in NAMES}
    ratios: dict[str, Spread] = {}
    for part in ("prefill", "decode"):

        def speed(turn: CappedTurn, key: str = f"{part}_tok_s") -> float | None:
            return None if turn.measured is None else float(getattr(turn.measured, key))

        for name in NAMES:
            if found := [value for turn in turns[name] if (value := speed(turn)) is not None]:
                speeds[name][part] = llamacpp.spread(found)
        both = [(speed(pair["moelite"]), speed(pair["llama.cpp"])) for pair in pairs]
        if quotients := [ours / other for ours, other in both if ours and other]:
            ratios[part] = llamacpp.spread(quotients)
    return Capped(
        trials=tuple(trials),
        llama_settings=best,
        pairs=tuple(pairs),
        failures={name: sum(t.measured is None for t in turns[name]) for name in NAMES},
        killed={name: sum(t.killed for t in turns[name]) for name in NAMES},
        speeds=speeds,
        ratios=ratios,
        facts=facts,
    )


def name_of(settings: dict[str, Any]) -> str:
    """ "mmap, repacked"."""
    return f"{settings['load_mode']}, {'repacked' if settings['repack'] else 'not repacked'}"


def line(turn: CappedTurn) -> str:
    """A turn in one line, without units of memory."""
    if turn.measured is None:
        return turn.problem
    return (
        f"prefill {turn.measured.prefill_tok_s:.2f}, decode {turn.measured.decode_tok_s:.3f} tok/s"
    )


def end_on_sigterm() -> None:
    """SIGTERM ends this program as Ctrl-C does: groups are removed."""
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))


def _trial(plan: Plan, candidate: dict[str, Any], facts: dict[str, dict[str, Any]]) -> Trial:
    given = {**plan.settings["llama.cpp"], **candidate}
    given["context"] = max(given["context"], TRIAL_PROMPT + TRIAL_GEN)
    lengths = (TRIAL_PROMPT, TRIAL_GEN)
    turn, code = _turn(plan, "llama.cpp", given, lengths, facts, limit_s=plan.trial_s)
    if turn.measured:
        end = "survived"
    elif turn.killed or code == -signal.SIGKILL:
        end = "killed"
    else:
        end = "too slow" if code is None else turn.problem
    note = line(turn) if turn.measured else end
    plan.progress(f"llama.cpp, {name_of(candidate)}: {note}")
    return Trial(settings=candidate, end=end, turn=turn)


def _turn(
    plan: Plan,
    name: str,
    settings: dict[str, Any],
    lengths: tuple[int, int],
    facts: dict[str, dict[str, Any]],
    *,
    limit_s: float | None = None,
) -> tuple[CappedTurn, int | None]:
    # the turn, and the exit code of a process that died meanwhile (0: none did, None: too slow)
    dropped = drive.forget(Path(side["path"]) for side in plan.settings.values())
    speed = drive.read_speed(plan.gguf())
    python = sys.executable if name == "moelite" else plan.python
    measured, problem, load_s, code = None, "", None, 0
    with MemoryGroup(plan.cap_bytes) as group:
        start = time.perf_counter()
        try:
            with Worker(name, python, settings, group=group, limit_s=limit_s) as worker:
                load_s = time.perf_counter() - start
                facts[name] = worker.facts
                if len(facts) == len(NAMES):
                    llamacpp.check_alike(facts["moelite"], facts["llama.cpp"])
                ids = llamacpp.tokens(
                    int(worker.facts["vocab_size"]), plan.prompt, plan.gen, plan.seed
                )
                given = [part[:count] for part, count in zip(ids, lengths, strict=True)]
                measured = llamacpp.turn(worker.run(*given), *map(len, given))
        except Ended as ended:
            problem, code = ended.message, ended.code
        except NotLoaded as refused:
            if name == "moelite":  # it says how much it needs
                raise
            problem = refused.message
    turn = CappedTurn(
        measured=measured,
        problem=problem,
        load_s=load_s,
        peak_bytes=group.peak_bytes(),
        killed=group.killed(),
        drive_bytes_s=speed,
        caches_dropped=dropped,
    )
    return turn, code


def as_json(found: Capped) -> dict[str, Any]:
    """Of plain types; the sides' facts are left to the caller."""
    return {key: value for key, value in asdict(found).items() if key != "facts"}


def show_turns(found: dict[str, Any]) -> None:
    """The trials and each turn of the report `found`, in lines."""
    print(f"cap {show_bytes(found['cap_bytes'])} a side; moelite --ram {_size(found['ram'])}")
    if not all(turn["caches_dropped"] for pair in found["pairs"] for turn in pair.values()):
        print("without the right to drop all caches: only the models' files were dropped")
    lengths = f"{TRIAL_PROMPT} tokens and {TRIAL_GEN} one by one"
    print(f"\nllama.cpp's settings under the cap, {lengths}:")
    for trial in found["trials"]:
        best = "  <- used" if trial["settings"] == found["llama_settings"] else ""
        print(f"  {name_of(trial['settings']):24} {_short(trial['turn'], trial['end'])}{best}")
    print("\npair  side       drive       peak        prefill tok/s  decode tok/s")
    for i, pair in enumerate(found["pairs"]):
        for name, turn in pair.items():
            print(f"{i + 1:4}  {name:9}  {_drive(turn):10}  {_peak(turn):10}  {_numbers(turn)}")
    for i, pair in enumerate(found["pairs"]):
        if all(turn["measured"] for turn in pair.values()):
            ours, other = (pair[name]["measured"] for name in NAMES)
            quotients = [ours[key] / other[key] for key in ("prefill_tok_s", "decode_tok_s")]
            print(f"{i + 1:4}  ratio {quotients[0]:43.2f} {quotients[1]:13.2f}")
    for name in NAMES:
        print(f"{name}: {found['failures'][name]} failures, {found['killed'][name]} killed")
    print()


def _size(ram: str) -> str:
    return show_bytes(int(ram)) if ram.isdigit() else ram


def _short(turn: dict[str, Any], end: str) -> str:
    if not turn["measured"]:
        return end
    return (
        f"{end}, decode {turn['measured']['decode_tok_s']:.2f} tok/s, load {turn['load_s']:.0f} s"
    )


def _numbers(turn: dict[str, Any]) -> str:
    if not (measured := turn["measured"]):
        return str(turn["problem"])
    killed = f"  ({turn['killed']} killed)" if turn["killed"] else ""
    return f"{measured['prefill_tok_s']:13.2f} {measured['decode_tok_s']:13.2f}{killed}"


def _peak(turn: dict[str, Any]) -> str:
    return "unknown" if turn["peak_bytes"] is None else show_bytes(turn["peak_bytes"])


def _drive(turn: dict[str, Any]) -> str:
    speed = turn["drive_bytes_s"]
    return "unknown" if speed is None else f"{show_bytes(int(speed))}/s"
