"""llama.cpp as quantizer and as judge of its own files, through llama-cpp-python's plain C names.

    python llama_quality_worker.py ACTION '{"setting": ...}'

Runs under an interpreter that has llama-cpp-python and numpy and not moelite. Everything computes
on the CPU, with a float32 kv and without flash attention. Arrays come and go as .npy files:

    imatrix   gguf, windows, out            mean square of each matrix's inputs, as
                                            llama.cpp's imatrix tool has it
    quantize  gguf, out, ftype, imatrix     llama_model_quantize
    logits    gguf, windows, first, out     float32 [W, N, V], raw
    score     gguf, windows, first, reference, out
                                            {nll, nll_reference, kld, same, dp} of every token

windows int32 [W, T]; of each the logits at positions first - 1 .. T - 2 count, N = T - first.
The answer is one JSON object on the last line of stdout.
"""

from __future__ import annotations

import ctypes
import json
import sys
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
from llama_cpp import llama_cpp as low

F32, I32 = np.float32, np.int32
ROWS = 8  # of logits widened to float64 at a time


class Tensor(ctypes.Structure):
    """The head of ggml's struct ggml_tensor, as far as the callback reads it."""


Tensor._fields_ = [
    ("type", ctypes.c_int),
    ("buffer", ctypes.c_void_p),
    ("ne", ctypes.c_int64 * 4),
    ("nb", ctypes.c_size_t * 4),
    ("op", ctypes.c_int),
    ("op_params", ctypes.c_int32 * 16),
    ("flags", ctypes.c_int32),
    ("src", ctypes.POINTER(Tensor) * 10),
    ("view_src", ctypes.c_void_p),
    ("view_offs", ctypes.c_size_t),
    ("data", ctypes.c_void_p),
    ("name", ctypes.c_char * 64),
]


class Model:
    """A GGUF loaded for windows of `length` tokens."""

    def __init__(self, path: str, length: int, threads: int, watch: Any = None) -> None:
        low.llama_backend_init()
        params = low.llama_model_default_params()
        params.use_extra_bufts = watch is None  # repacked weights could not be watched
        self.model = low.llama_model_load_from_file(path.encode(), params)
        if not self.model:
            raise RuntimeError(f"llama.cpp cannot load {path}")
        settings = low.llama_context_default_params()
        settings.n_ctx = settings.n_batch = settings.n_ubatch = length
        settings.n_threads = settings.n_threads_batch = threads
        settings.type_k = settings.type_v = 0  # GGML_TYPE_F32
        settings.flash_attn_type = 0  # disabled
        if watch is not None:
            settings.cb_eval = self._watch = low.ggml_backend_sched_eval_callback(watch)
        self.context = low.llama_init_from_model(self.model, settings)
        self.vocab = low.llama_vocab_n_tokens(low.llama_model_get_vocab(self.model))
        self._batch = low.llama_batch_init(length, 0, 1)

    def run(self, ids: np.ndarray, first: int, *, last: bool = False) -> Iterator[np.ndarray]:
        """The logits [V] that predict ids[first:], one by one; the array is llama.cpp's.

        last: also those after the last token.
        """
        wanted = range(first - 1, len(ids) - (not last))
        low.llama_memory_clear(low.llama_get_memory(self.context), True)
        batch = self._batch
        batch.n_tokens = len(ids)
        for i, token in enumerate(ids):
            batch.token[i], batch.pos[i] = int(token), i
            batch.n_seq_id[i], batch.seq_id[i][0] = 1, 0
            batch.logits[i] = i in wanted
        if low.llama_decode(self.context, batch):
            raise RuntimeError("llama_decode failed")
        for i in wanted:
            row = low.llama_get_logits_ith(self.context, i)
            yield np.ctypeslib.as_array(row, (self.vocab,))


def logits(gguf: str, windows: str, first: int, out: str, threads: int) -> dict[str, Any]:
    pieces = np.load(windows)
    model = Model(gguf, pieces.shape[1], threads)
    shape = len(pieces), pieces.shape[1] - first, model.vocab
    kept = np.lib.format.open_memmap(out, "w+", F32, shape)
    for w, ids in enumerate(pieces):
        for i, row in enumerate(model.run(ids, first)):
            kept[w, i] = row
    kept.flush()
    return {"windows": len(pieces)}


def log_softmax(rows: np.ndarray) -> np.ndarray:
    """ln p [T, V] float64 of logits [T, V]."""
    wide = rows.astype(np.float64)
    wide -= wide.max(axis=1, keepdims=True)
    wide -= np.log(np.exp(wide).sum(axis=1, keepdims=True))
    return wide


def compared(reference: np.ndarray, rows: np.ndarray, wanted: np.ndarray) -> dict[str, np.ndarray]:
    """Per token, of two sets of logits [T, V] and the tokens [T] that came next.

    nll and nll_reference in nats, kld = KL(reference || rows), same: both rank one token first,
    dp: change of the right token's probability.
    """
    p, q = log_softmax(reference), log_softmax(rows)
    at = np.arange(len(wanted)), wanted
    return {
        "nll": -q[at],
        "nll_reference": -p[at],
        "kld": np.maximum((np.exp(p) * (p - q)).sum(axis=1), 0.0),
        "same": (p.argmax(axis=1) == q.argmax(axis=1)).astype(np.float64),
        "dp": np.exp(q[at]) - np.exp(p[at]),
    }


def score(
    gguf: str, windows: str, first: int, reference: str, out: str, threads: int
) -> dict[str, Any]:
    pieces, kept = np.load(windows), np.load(reference, mmap_mode="r")
    model = Model(gguf, pieces.shape[1], threads)
    found: dict[str, list[np.ndarray]] = {}
    for ids, base in zip(pieces, kept, strict=True):
        rows = np.stack([row.copy() for row in model.run(ids, first)])
        for at in range(0, len(rows), ROWS):
            part = slice(at, at + ROWS)
            for name, values in compared(base[part], rows[part], ids[first:][part]).items():
                found.setdefault(name, []).append(values)
    np.savez(out, **{name: np.concatenate(values) for name, values in found.items()})
    return {"windows": len(pieces)}


class Importance:
    """Sums of squared inputs of every matrix of a layer, per expert where experts are stacked.

    As llama.cpp's imatrix tool gathers them (tools/imatrix/imatrix.cpp, collect_imatrix): each row
    that reaches an expert adds its squares to that expert's sums and one to its count.
    """

    def __init__(self, name_of_op: Callable[[int], str]) -> None:
        self.sums: dict[str, np.ndarray] = {}
        self.counts: dict[str, np.ndarray] = {}
        self._name_of_op = name_of_op

    def watch(self, address: int, ask: bool, _: Any) -> bool:
        tensor = ctypes.cast(address, ctypes.POINTER(Tensor)).contents
        op = self._name_of_op(tensor.op)
        if op not in {"MUL_MAT", "MUL_MAT_ID"} or not tensor.src[0].contents.name.startswith(
            b"blk."
        ):
            return False
        if not ask:
            weight, x = tensor.src[0].contents, array_of(tensor.src[1].contents, F32)
            ids = array_of(tensor.src[2].contents, I32) if op == "MUL_MAT_ID" else None
            self.add(weight.name.decode(), x, ids, weight.ne[2])
        return True

    def add(self, name: str, x: np.ndarray, ids: np.ndarray | None, experts: int) -> None:
        """x [.., tokens, ranks or 1, I], or [.., tokens, I] without ids; ids [tokens, ranks]."""
        if name not in self.sums:
            shape = x.shape[-1] if ids is None else (experts, x.shape[-1])
            self.sums[name] = np.zeros(shape, np.float64)
            self.counts[name] = np.zeros(1 if ids is None else experts, np.float64)
        squares = np.square(x, dtype=np.float64).reshape(-1, *x.shape[-2:])
        if ids is None:
            self.sums[name] += squares.sum(axis=(0, 1))
            self.counts[name] += squares.shape[0] * squares.shape[1]
            return
        ids = ids.reshape(-1, ids.shape[-1])
        spread = np.broadcast_to(squares, (*ids.shape, x.shape[-1]))
        for expert in np.unique(ids):
            chosen = spread[ids == expert]
            self.sums[name][expert] += chosen.sum(axis=0)
            self.counts[name][expert] += len(chosen)

    def means(self) -> dict[str, np.ndarray]:
        """float32 [I], or [E * I]: what the quantizer wants. An expert never met has ones."""
        found = {}
        for name, sums in self.sums.items():
            count = self.counts[name].reshape(-1, 1) if sums.ndim == 2 else self.counts[name]
            mean = np.where(count > 0, sums / np.maximum(count, 1), 1.0)
            found[name] = mean.reshape(-1).astype(F32)
        return found


def array_of(tensor: Tensor, dtype: type) -> np.ndarray:
    """A tensor's values, slowest axis first; only where they lie in this process's memory."""
    shape, strides = tuple(tensor.ne)[::-1], tuple(tensor.nb)[::-1]
    nbytes = 1 + sum((n - 1) * s for n, s in zip(shape, strides, strict=True))
    nbytes += np.dtype(dtype).itemsize - 1
    raw = (ctypes.c_uint8 * nbytes).from_address(tensor.data)
    flat = np.frombuffer(raw, np.uint8)
    return np.ndarray(shape, dtype, flat, 0, strides)


def imatrix(gguf: str, windows: str, out: str, threads: int) -> dict[str, Any]:
    from llama_cpp._ggml import libggml

    base = ctypes.CDLL(libggml._name.replace("libggml.", "libggml-base."))
    base.ggml_op_name.restype = ctypes.c_char_p
    names: dict[int, str] = {}

    def name_of_op(op: int) -> str:
        if op not in names:
            names[op] = base.ggml_op_name(op).decode()
        return names[op]

    pieces, found = np.load(windows), Importance(name_of_op)
    model = Model(gguf, pieces.shape[1], threads, found.watch)
    for ids in pieces:
        # logits of all: the last layer's experts meet only tokens whose logits are wanted
        for _ in model.run(ids, 1, last=True):
            pass
    np.savez(out, **found.means())
    counts = [c.min() for name, c in found.counts.items() if "exps" in name]
    return {"matrices": len(found.sums), "least_rows_of_an_expert": int(min(counts, default=0))}


def quantize(gguf: str, out: str, ftype: str, imatrix: str | None, threads: int) -> dict[str, Any]:
    params = low.llama_model_quantize_default_params()
    params.nthread, params.ftype = threads, getattr(low, f"LLAMA_FTYPE_{ftype}")
    if imatrix is not None:
        values = dict(np.load(imatrix))
        rows = (low.llama_model_imatrix_data * (len(values) + 1))()  # the last: no name, the end
        for row, (name, value) in zip(rows, values.items(), strict=False):
            row.name, row.size = name.encode(), value.size
            row.data = value.ctypes.data_as(ctypes.POINTER(ctypes.c_float))
        params.imatrix = rows
    if low.llama_model_quantize(gguf.encode(), out.encode(), params):
        raise RuntimeError(f"llama.cpp cannot quantize to {ftype}")
    return {"ftype": ftype}


ACTIONS: dict[str, Callable[..., dict[str, Any]]] = {
    "imatrix": imatrix,
    "quantize": quantize,
    "logits": logits,
    "score": score,
}


def main() -> int:
    found = ACTIONS[sys.argv[1]](**json.loads(sys.argv[2]))
    print("\n" + json.dumps(found))
    return 0


if __name__ == "__main__":
    sys.exit(main())
