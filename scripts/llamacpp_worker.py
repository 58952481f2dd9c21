"""One side of scripts/compare-llamacpp: loads a model, then measures whenever it is told to.

    python llamacpp_worker.py {moelite,llama.cpp} '{"path": ..., "threads": ..., "context": ...}'

Reads one JSON object a line, {"prompt": [ids], "feed": [ids]}, and answers with one: the seconds
for the prompt and for the tokens after it, each fed by itself, and what moelite's expert cache
counted in either. Between two lines it does nothing.
Runs under an interpreter that may have llama-cpp-python and not moelite, so it imports either only
when told to.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable
from typing import Any

# (facts about the loaded model, forget all tokens, compute some tokens and the last one's logits,
# counters of the expert cache so far, if there is one)
Side = tuple[
    dict[str, Any], Callable[[], None], Callable[[list[int]], None], Callable[[], dict[str, int]]
]
LOAD_MODES = {"none": 0, "mmap": 1, "direct_io": 4}  # llama.cpp's enum llama_load_mode


def moelite_side(*, path: str, threads: int, context: int, ram: str | None) -> Side:
    """A store in moelite."""
    from importlib.metadata import version

    from moelite.engine import load

    model = load(path, threads=threads, context=context, ram=ram)
    state = [model.session()]
    plan = model.footprint
    facts = {
        "version": version("moelite"),
        "vocab_size": model.arch.vocab_size,
        "layers": len(model.arch.layers),
        "formats": f"experts {plan.expert_format}, dense {plan.dense_format}",
        "resident": plan.experts_resident,
        "experts": plan.experts_total,
        "kv": "f16",
    }

    def forget() -> None:
        state[0] = model.session()

    def counts() -> dict[str, int]:
        now = model.stats()
        return {"hits": now.hits, "misses": now.misses, "bytes_read": now.bytes_read}

    return facts, forget, lambda ids: state[0].advance(ids), counts


def set_model_params(fields: dict[str, Any]) -> None:
    """Sets fields of llama_model_params that the class Llama has no argument for."""
    from llama_cpp import llama_cpp as low

    known = {name for name, _ in low.llama_model_params._fields_}
    if missing := sorted(fields.keys() - known):
        raise ValueError(f"this llama.cpp has no {', '.join(missing)}")
    load = low.llama_model_load_from_file

    def load_so(path: bytes, params: Any) -> Any:
        for name, value in fields.items():
            setattr(params, name, value)
        return load(path, params)

    low.llama_model_load_from_file = load_so


def llama_side(
    *,
    path: str,
    threads: int,
    context: int,
    flash_attn: bool,
    load_mode: str | None = None,
    repack: bool = True,
) -> Side:
    """A GGUF in llama.cpp. load_mode: of LOAD_MODES, or as llama-cpp-python has it by default."""
    import llama_cpp

    if load_mode is not None:
        set_model_params({"load_mode": LOAD_MODES[load_mode], "use_extra_bufts": repack})
    model = llama_cpp.Llama(
        path,
        n_ctx=context,
        n_threads=threads,
        n_threads_batch=threads,
        n_batch=512,
        n_ubatch=512,
        flash_attn=flash_attn,
        logits_all=False,
        verbose=False,
    )
    features = llama_cpp.llama_print_system_info().decode().split("|")
    kind = model.metadata.get("general.architecture", "")
    facts = {
        "version": f"llama-cpp-python {llama_cpp.__version__}",
        "vocab_size": model.n_vocab(),
        "layers": int(model.metadata.get(f"{kind}.block_count", 0)),
        "formats": " ".join(part.split()[-3] for part in features if part.strip().endswith("= 1")),
        "kv": "f16",
    }

    def compute(ids: list[int]) -> None:
        model.eval(ids)
        # eval returns before the last of a batch is done where a backend is asynchronous
        llama_cpp.llama_synchronize(model.ctx)

    return facts, model.reset, compute, dict


SIDES: dict[str, Callable[..., Side]] = {
    "moelite": moelite_side,
    "llama.cpp": llama_side,
}


def measure(side: Side, prompt: list[int], feed: list[int]) -> dict[str, Any]:
    """Seconds for the prompt, and for `feed` token by token; the expert cache's counts of each."""
    _, forget, compute, counts = side
    forget()
    before = counts()
    start = time.perf_counter()
    compute(prompt)
    middle = time.perf_counter()
    between = counts()
    resumed = time.perf_counter()
    for token in feed:
        compute([token])
    end = time.perf_counter()
    after = counts()
    return {
        "prefill_s": middle - start,
        "decode_s": end - resumed,
        "prefill_experts": {key: between[key] - before[key] for key in before} or None,
        "decode_experts": {key: after[key] - between[key] for key in between} or None,
    }


def main() -> int:
    # whatever a library prints must not get between our lines
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)

    def answer(value: dict[str, Any]) -> None:
        answers.write(json.dumps(value) + "\n")
        answers.flush()

    name, settings = sys.argv[1], json.loads(sys.argv[2])
    try:
        side = SIDES[name](**settings)
    except ModuleNotFoundError as problem:
        answer({"missing": problem.name})
        return 1
    except Exception as problem:  # noqa: BLE001 - whatever it was, the other process tells it
        answer({"error": f"{type(problem).__name__}: {problem}"})
        return 1
    answer(side[0])
    for line in sys.stdin:
        answer(measure(side, **json.loads(line)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
