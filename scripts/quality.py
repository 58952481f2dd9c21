"""llama.cpp's quantization types, and bitsandbytes' NF4, judged as `moelite eval` judges a store.

Same checkpoint, text, tokens and windows (llama protocol: the second half of each is scored). Each
file is judged against llama.cpp's own run of the unquantized weights in float32, so that only
quantization shows. NF4 experts are written back as float32 and run in llama.cpp, too: nothing of
their activations is rounded, which flatters them beside types whose activations are.
"""

from __future__ import annotations

import json
import math
import subprocess
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import checkpoint_gguf
import gguf
import numpy as np

from moelite.checkpoint import Source
from moelite.errors import MoeliteError, UsageError
from moelite.evaluate import windows
from moelite.quant.base import F32
from moelite.scores import distance, mean
from moelite.threads import default_threads
from moelite.tokenizer import Tokenizer

WORKER = Path(__file__).with_name("llama_quality_worker.py")
FIRST_TYPES = ("Q8_0", "Q6_K", "Q5_K_S", "Q4_K_S", "Q4_K_M", "Q4_0", "IQ4_NL", "IQ4_XS")
LOW_TYPES = ("Q3_K_S", "Q3_K_M", "IQ3_S", "IQ3_XXS", "Q2_K", "IQ2_S", "IQ2_XS", "IQ2_XXS")
LOW_TYPES += ("IQ1_M", "IQ1_S")
TYPES = (*FIRST_TYPES, *LOW_TYPES)
# What llama.cpp gives rows that are no multiple of 256 in place of any i-type below it
STAND_IN = "IQ4_NL"
CONTEXT = 512
FIRST = CONTEXT // 2 + 1  # of a window's tokens, the first that is scored
NF4, NF4_BLOCK = "NF4", 64


@dataclass(frozen=True, slots=True, kw_only=True)
class Setting:
    """Where everything is. python: has llama-cpp-python. work: big files, gone when all is done."""

    source: Source
    python: str
    work: Path
    threads: int

    def ask(self, action: str, **settings: Any) -> dict[str, Any]:
        """One action of the worker; MoeliteError with the end of its log if it fails."""
        settings.setdefault("threads", self.threads)
        command = [self.python, str(WORKER), action, json.dumps(settings, default=str)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            last = (done.stderr or done.stdout).strip().splitlines()[-3:]
            raise MoeliteError(
                f"{action} failed: " + "\n".join(last),
                fix=f"{self.python} must have llama-cpp-python (and numpy): name one by --llama",
            )
        found: dict[str, Any] = json.loads(done.stdout.strip().splitlines()[-1])
        return found


def cut(source: Source, text: Path, count: int) -> np.ndarray:
    """The first `count` windows of a text, int32 [count, CONTEXT], as `moelite eval` cuts it."""
    tokenizer = Tokenizer.from_files(source.files)
    ids = tokenizer.encode(text.read_text(encoding="utf-8"), special=False)
    head = tokenizer.encode("", special=True)[:1]
    bos = tokenizer.bos_id if head == [tokenizer.bos_id] else None
    ids = [*([] if bos is None else head), *ids][: count * CONTEXT]
    found = windows(ids, context=CONTEXT, protocol="llama", bos_id=bos)
    if len(found) < count:
        raise UsageError(f"{text} has {len(found)} windows of {CONTEXT} tokens, not {count}")
    return np.array([window.ids for window in found], np.int32)


def prepare(setting: Setting, tests: np.ndarray, calibration: np.ndarray) -> None:
    """The unquantized GGUF, its logits on `tests`, and the importance matrix of `calibration`.

    What an earlier run left in the work folder for the same windows is kept.
    """
    work = setting.work
    work.mkdir(parents=True, exist_ok=True)
    base, whole = work / "base.gguf", work / "f32.gguf"
    if not base.exists():
        checkpoint_gguf.write(setting.source, base, dtype=_dtype(setting.source))
    kept = all(
        _same(work / f"{name}.npy", ids)
        for name, ids in (("tests", tests), ("calibration", calibration))
    )
    if kept and (work / "reference.npy").exists() and (work / "imatrix.npz").exists():
        return
    np.save(work / "tests.npy", tests)
    np.save(work / "calibration.npy", calibration)
    setting.ask("quantize", gguf=base, out=whole, ftype="ALL_F32", imatrix=None)
    asked = {"gguf": whole, "windows": work / "tests.npy", "first": FIRST}
    setting.ask("logits", **asked, out=work / "reference.npy")
    asked = {"gguf": whole, "windows": work / "calibration.npy"}
    setting.ask("imatrix", **asked, out=work / "imatrix.npz")
    whole.unlink()


def _dtype(source: Source) -> Literal["bf16", "f32"]:
    """Half the size where that loses nothing."""
    return "bf16" if {source.dtype(name) for name in source.names()} == {"BF16"} else "f32"


def _same(path: Path, ids: np.ndarray) -> bool:
    return path.exists() and np.array_equal(np.load(path), ids)


def quantized(setting: Setting, name: str) -> dict[str, Any]:
    """The sizes and the per-token scores of one of llama.cpp's types; its file is removed."""
    path, imatrix = setting.work / f"{name}.gguf", setting.work / "imatrix.npz"
    base, low = setting.work / "base.gguf", setting.work / "base-low.gguf"
    if low.exists() and name.startswith("IQ"):
        base = low
    asked = {"gguf": base, "out": path, "imatrix": imatrix, "threads": default_threads()}
    setting.ask("quantize", **asked, ftype=f"MOSTLY_{name}")
    found = {**sizes(path), "scores": scored(setting, path)}
    if name == STAND_IN and not low.exists():
        _keep_stand_ins(setting, path, low)
    path.unlink()
    return found


def _keep_stand_ins(setting: Setting, path: Path, low: Path) -> None:
    """Writes the base of the i-types: what they all store as IQ4_NL is quantized already.

    llama.cpp copies a tensor that has the type it is to get; quantizing it anew gives the same
    bytes and takes most of the time.
    """
    tensors = [t for t in gguf.GGUFReader(path).tensors if "_exps." in t.name and t.shape[0] % 256]
    if tensors:
        ready = {tensor.name: tensor for tensor in tensors}
        checkpoint_gguf.write(setting.source, low, dtype=_dtype(setting.source), ready=ready)


def nf4(setting: Setting) -> dict[str, Any]:
    """As `quantized`, with NF4 experts and everything else in bf16."""
    path = setting.work / "nf4.gguf"
    checkpoint_gguf.write(setting.source, path, dtype="f32", change=through_nf4)
    experts, others = 0, 0
    for tensor in gguf.GGUFReader(path).tensors:
        if "_exps." in tensor.name:
            experts += int(tensor.n_elements)
        else:
            others += int(tensor.n_elements)
    bits = 4 + 32 / NF4_BLOCK
    nbytes = int(experts * bits / 8) + 2 * others  # no container counted
    found = {
        "bytes": nbytes,
        "bits_per_parameter": 8 * nbytes / (experts + others),
        "expert_bpw": bits,
        "types": {"ffn_*_exps": {NF4: 1}, "others": {"BF16": 1}},
        "scores": scored(setting, path),
    }
    path.unlink()
    return found


def through_nf4(weight: F32) -> F32:
    """What NF4 makes of a matrix [O, I]: absmax of every 64 weights in float32."""
    import torch
    from bitsandbytes import functional

    packed, state = functional.quantize_4bit(
        torch.from_numpy(weight), blocksize=NF4_BLOCK, quant_type="nf4", compress_statistics=False
    )
    found: F32 = functional.dequantize_4bit(packed, state).numpy()
    return found


def sizes(path: Path) -> dict[str, Any]:
    """bytes, bits_per_parameter of the whole file, expert_bpw, and {role: {type: tensors}}.

    A type that does not fit a row of 256 n columns gets another one in its place: types tell.
    """
    params = experts = expert_bytes = 0
    types: dict[str, Counter[str]] = {}
    for tensor in gguf.GGUFReader(path).tensors:
        params += int(tensor.n_elements)
        role = tensor.name.removesuffix(".weight").split(".")[-1]
        types.setdefault(role, Counter())[tensor.tensor_type.name] += 1
        if role.endswith("_exps"):
            experts += int(tensor.n_elements)
            expert_bytes += int(tensor.n_bytes)
    size = path.stat().st_size
    return {
        "bytes": size,
        "bits_per_parameter": 8 * size / params,
        "expert_bpw": 8 * expert_bytes / experts,
        "types": {role: dict(found) for role, found in types.items()},
    }


def scored(setting: Setting, path: Path) -> dict[str, np.ndarray]:
    """Per token of all test windows: see llama_quality_worker.compared."""
    work = setting.work
    setting.ask(
        "score",
        gguf=path,
        windows=work / "tests.npy",
        first=FIRST,
        reference=work / "reference.npy",
        out=work / "scores.npz",
    )
    return dict(np.load(work / "scores.npz"))


def rows(name: str, found: dict[str, Any], texts: Sequence[Path]) -> list[dict[str, Any]]:
    """One row a text: what `moelite frontier --also` draws, with all numbers of a Distance.

    found: of `quantized` or `nf4`; its tokens belong to the texts in turn, in equal parts.
    """
    scores = {key: values.reshape(len(texts), -1) for key, values in found["scores"].items()}
    sizes_found = {key: value for key, value in found.items() if key != "scores"}
    table = []
    for i, text in enumerate(texts):
        part = {key: values[i] for key, values in scores.items()}
        before, after = part["nll_reference"], part["nll"]
        nll, error = mean(after)
        apart = distance(part["kld"], part["same"], part["dp"], after - before)
        table.append(
            {
                "name": name,
                "tool": "bitsandbytes" if name == NF4 else "llama.cpp",
                "text": text.name,
                "tokens": len(after),
                **sizes_found,
                **asdict(apart),
                "ppl": math.exp(nll),
                "ppl_se": math.exp(nll) * error,
                "ppl_reference": math.exp(before.mean()),
            }
        )
    return table


def run(
    setting: Setting,
    names: Iterable[str],
    texts: Sequence[Path],
    out: Path,
    progress: Callable[[str], None],
) -> list[dict[str, Any]]:
    """Rows of every type; `out` (JSON) is written after each, and the types in it are kept."""
    table: list[dict[str, Any]] = json.loads(out.read_text()) if out.exists() else []
    for name in names:
        if any(row["name"] == name for row in table):
            continue
        progress(name)
        found = nf4(setting) if name == NF4 else quantized(setting, name)
        table += rows(name, found, texts)
        out.write_text(json.dumps(table, indent=1) + "\n")
    return table


def summary(types: dict[str, dict[str, int]]) -> str:
    """The types of an expert's matrices: "gate IQ4_NL, up IQ4_NL, down 15 IQ3_S + 15 Q4_K"."""
    told = []
    for role, found in types.items():
        if role.endswith("_exps"):
            label = role.removeprefix("ffn_").removesuffix("_exps")
            alone = len(found) == 1
            kinds = [kind if alone else f"{n} {kind}" for kind, n in found.items()]
            told.append(f"{label} {' + '.join(kinds)}")
    return ", ".join(told)
