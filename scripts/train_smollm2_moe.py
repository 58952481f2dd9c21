"""Trains smollm2-moe, the built-in model: SmolLM2-135M-Instruct upcycled to 8 experts, top-2.

    python scripts/train_smollm2_moe.py prepare --work DIR  # fetch texts, let the base answer
    python scripts/train_smollm2_moe.py train --work DIR    # fit routers, then train jointly
    python scripts/train_smollm2_moe.py scale --work DIR    # factor of the updates, on validation
    python scripts/train_smollm2_moe.py export --work DIR   # moelite/data/smollm2_moe.safetensors
    python scripts/smollm2_moe_measure.py --work DIR        # the table of moelite/data/README.md

Recipe. The base (attention, norms, embeddings, feed-forward) is frozen. Expert e of a layer is the
base feed-forward plus a rank-8 update of gate, up and down. The routers are first fitted to tell
the eight domains apart from the dense base's own hidden states; then updates and routers are
trained together under real top-2 routing. Loss: next-token cross-entropy on seven text domains; on
chat, KL to the dense base plus a little cross-entropy on the base's own answers, so that chat
stays the base's; and a soft domain label for each router. About an hour on two cores with
AVX512-BF16. Set MALLOC_MMAP_THRESHOLD_=4000000000 MALLOC_TRIM_THRESHOLD_=8000000000: without, page
faults make a step 10 times slower (measured).
"""

from __future__ import annotations

import argparse
import json
import math
import random
import time
from pathlib import Path

import numpy as np
import smollm2_moe_data as data
import torch
from safetensors.numpy import save_file
from smollm2_moe_model import EXPERTS, HIDDEN, INNER, SmolMoE, _Norm
from torch.nn import functional as F

from moelite import demo
from moelite.demo_files import tokenizer

SEED, RANK, WINDOW = 1, 8, 192
PARTS = ("train", "valid")
SCALES = (1.0, 1.3, 1.6)
STEPS, WARMUP, LORA_RATE, ROUTER_RATE = 760, 30, 1.2e-3, 3e-4
OWN = 0.5  # router's target for its own domain; the rest is spread over the other seven
INNER_OR_HIDDEN = {
    "a_gate_up": HIDDEN, "a_down": INNER, "b_gate": INNER, "b_up": INNER, "b_down": HIDDEN,
}  # fmt: skip
LABEL_WEIGHT, CHAT_CE, CHAT_WEIGHT = 0.05, 0.3, 2.0
SYSTEM = "You are a helpful AI assistant named SmolLM, trained by Hugging Face"


def chat_text(question: str, answer: str | None = None) -> str:
    """ChatML of one exchange, as the base's own template writes it."""
    text = f"<|im_start|>system\n{SYSTEM}<|im_end|>\n<|im_start|>user\n{question}<|im_end|>\n"
    text += "<|im_start|>assistant\n"
    return text if answer is None else f"{text}{answer}<|im_end|>\n"


@torch.no_grad()
def answer(model, prompts: list[list[int]], limit: int, temperature: float) -> list[list[int]]:  # type: ignore[no-untyped-def]
    """The transformers model's own sampled answers (token ids, <|im_end|> included if reached)."""
    width = max(map(len, prompts))
    ids = torch.tensor([[2] * (width - len(p)) + p for p in prompts])
    mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in prompts])
    sampling = {"do_sample": True, "temperature": temperature, "top_k": 0} if temperature else {}
    out = model.generate(
        input_ids=ids, attention_mask=mask, max_new_tokens=limit, pad_token_id=2, **sampling
    )
    answers = []
    for row in out[:, width:].tolist():
        end = row.index(2) + 1 if 2 in row else len(row)
        answers.append(row[:end])
    return answers


def dense_model(base: demo.BaseWeights, dtype: torch.dtype = torch.bfloat16):  # type: ignore[no-untyped-def]
    """The base as transformers' LlamaForCausalLM."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        hidden_size=HIDDEN, intermediate_size=1536, num_hidden_layers=demo.NUM_LAYERS,
        num_attention_heads=9, num_key_value_heads=3, vocab_size=49152, rms_norm_eps=1e-5,
        max_position_embeddings=8192, tie_word_embeddings=True, bos_token_id=1, eos_token_id=2,
        rope_parameters={"rope_type": "default", "rope_theta": 1e5}, pad_token_id=2,
    )  # fmt: skip
    model = LlamaForCausalLM(config).to(dtype)
    names = [name for name, _ in model.named_parameters()]
    state = {name: torch.from_numpy(base.get(name).copy()) for name in names}
    model.load_state_dict(state, strict=False)
    return model.eval()


def prepare(work: Path, base: demo.BaseWeights) -> None:
    """Writes work/tokens.pt: token streams of each domain and split, and the chat rows."""
    data.fetch(work / "data")
    tok = tokenizer(base)
    end = tok.token_to_id("<|endoftext|>")
    found: dict[str, dict[str, torch.Tensor]] = {}
    for number, name in enumerate([*data.DOMAINS[:-1], *data.GENERAL]):
        parts = data.split(data.documents(work / "data", name), SEED + number)
        found[name] = {}
        for part, docs in parts.items():
            encoded = tok.encode_batch(docs, add_special_tokens=False)
            stream = np.concatenate([np.array([*e.ids, end]) for e in encoded])
            found[name][part] = torch.from_numpy(stream)
        print(name, {part: len(stream) for part, stream in found[name].items()}, flush=True)
    torch.manual_seed(SEED)
    asked = data.questions(work / "data", SEED)
    prompts = [tok.encode(chat_text(q)).ids for q in asked]
    model, rows, began = dense_model(base), [], time.time()
    for start in range(0, len(prompts), 64):
        batch = prompts[start : start + 64]
        replies = answer(model, batch, WINDOW - 64, 0.7)
        rows += [(p, a) for p, a in zip(batch, replies, strict=True)]
        print(f"answers {len(rows)}/{len(prompts)} {time.time() - began:.0f} s", flush=True)
    worked = [
        (tok.encode(chat_text(q)).ids, tok.encode(f"{a}<|im_end|>").ids)
        for q, a in data.worked_examples(work / "data")
    ]
    random.Random(SEED).shuffle(worked)
    for q, (p, a) in list(zip(asked, rows, strict=True))[:6]:
        print(f"  {q!r} -> {tok.decode(a)!r}", f"({len(p)}+{len(a)})")
    torch.save({"streams": found, "chat": rows, "worked": worked}, work / "tokens.pt")


class Batches:
    """Training rows: per step one window of each text domain and one chat, padded to WINDOW."""

    def __init__(self, tokens: dict, part: str, seed: int) -> None:
        self.rng = random.Random(seed)
        self.streams = [tokens["streams"][d][part] for d in data.DOMAINS[:-1]]
        cuts = {"test": slice(0, 60), "valid": slice(60, 90), "train": slice(90, None)}
        # a prompt that fills the window leaves no answer to learn from
        short = {
            name: [pair for pair in tokens[name] if len(pair[0]) <= WINDOW - 32]
            for name in ("chat", "worked")
        }
        self.chat, self.worked = short["chat"][cuts[part]], short["worked"][cuts[part]]

    def chat_row(self, pair: tuple[list[int], list[int]]) -> tuple[torch.Tensor, torch.Tensor]:
        """ids [WINDOW] and mask [WINDOW] of the answer's tokens."""
        prompt, reply = pair
        row = [*prompt, *reply][:WINDOW]
        mask = [0] * len(prompt) + [1] * len(reply)
        pad = WINDOW - len(row)
        return torch.tensor(row + [2] * pad), torch.tensor((mask + [0] * pad)[:WINDOW])

    def step(self, number: int) -> tuple[torch.Tensor, torch.Tensor]:
        """ids [8, WINDOW], row r of domain r; mask [WINDOW] of the chat row's answer."""
        rows = []
        for stream in self.streams:
            start = self.rng.randrange(len(stream) - WINDOW)
            rows.append(stream[start : start + WINDOW])
        source = self.worked if number % 4 == 3 else self.chat
        row, mask = self.chat_row(self.rng.choice(source))
        return torch.stack([*rows, row]), mask


def soft_labels(rows: int) -> torch.Tensor:
    """[rows * WINDOW, E]: OWN for the row's own expert, the rest spread evenly."""
    target = torch.full((EXPERTS, EXPERTS), (1 - OWN) / (EXPERTS - 1))
    target.fill_diagonal_(OWN)
    return target.repeat(rows // EXPERTS, 1).repeat_interleave(WINDOW, 0)


def fit_routers(model: SmolMoE, batches: Batches, steps: int = 24) -> None:
    """Fits each router to the soft labels, on the dense base's hidden states, by Adam."""
    features: list[list[torch.Tensor]] = [[] for _ in model.layers]
    with torch.no_grad():
        for number in range(steps):
            ids, _ = batches.step(number)
            for layer, x, kept in zip(
                model.layers, model(ids, dense=True)[1], features, strict=True
            ):
                kept.append(_Norm.apply(x, layer.norm2).view(-1, HIDDEN))
    target = soft_labels(EXPERTS).repeat(steps, 1)
    for index, (layer, kept) in enumerate(zip(model.layers, features, strict=True)):
        x = torch.cat(kept).float()
        scale = 1 / x.square().mean(0).sqrt().clamp_min(1e-3)
        x *= scale
        weight = torch.zeros(EXPERTS, HIDDEN, requires_grad=True)
        adam = torch.optim.AdamW([weight], lr=0.02, weight_decay=0.02)
        for _ in range(60):
            adam.zero_grad()
            loss = F.cross_entropy(F.linear(x, weight), target)
            loss.backward()
            adam.step()
        with torch.no_grad():
            layer.router.copy_(weight * scale)
            right = (F.linear(x, weight).argmax(-1) == target.argmax(-1)).float().mean()
        if index % 5 == 0:
            print(f"router {index}: loss {loss:.3f}, own domain first {right:.3f}", flush=True)


def losses(model: SmolMoE, ids: torch.Tensor, mask: torch.Tensor) -> dict[str, torch.Tensor]:
    """The parts of the training loss of one step, each a mean per token."""
    hidden, routing = model(ids)
    text = model.head(hidden[:-1, :-1]).float().flatten(0, 1)
    found = {"text": F.cross_entropy(text, ids[:-1, 1:].flatten())}
    where = mask[1:].bool()
    student = model.head(hidden[-1, :-1][where]).float().log_softmax(-1)
    with torch.no_grad():
        teacher = model.head(model(ids[-1:], dense=True)[0][0, :-1][where]).float().log_softmax(-1)
    found["chat_kl"] = F.kl_div(student, teacher, reduction="batchmean", log_target=True)
    found["chat_ce"] = F.nll_loss(student, ids[-1, 1:][where])
    labels = soft_labels(len(ids))
    label = [F.cross_entropy(logits, labels) for logits, _ in routing]
    found["label"] = torch.stack(label).mean()
    return found


@torch.no_grad()
def validate(model: SmolMoE, batches: Batches, *, dense: bool, steps: int = 6) -> list[float]:
    """Mean negative log-likelihood per domain on `steps` fixed validation batches."""
    batches.rng.seed(SEED)
    total = torch.zeros(EXPERTS)
    for number in range(steps):
        ids, mask = batches.step(number)
        hidden, _ = model(ids, dense=dense)
        for row in range(EXPERTS):
            where = mask[1:].bool() if row == EXPERTS - 1 else torch.ones(WINDOW - 1).bool()
            logits = model.head(hidden[row, :-1][where]).float()
            total[row] += F.cross_entropy(logits, ids[row, 1:][where])
    return (total / steps).tolist()


class Threads:
    """1 or 2 threads, by measured step time: beside a busy neighbour, 2 wait on each other."""

    def __init__(self) -> None:
        self.seconds = {2: 0.0, 1: 0.0}
        self.steps = 0

    def choose(self) -> int:
        self.steps += 1
        best = min(self.seconds, key=lambda n: self.seconds[n])
        self.count = 3 - best if self.steps % 12 == 0 else best
        torch.set_num_threads(self.count)
        return self.count

    def took(self, seconds: float) -> None:
        old = self.seconds[self.count]
        self.seconds[self.count] = (old + seconds) / 2 if old else seconds


def train(work: Path, base: demo.BaseWeights, minutes: float) -> None:
    """Joint training; writes work/trained.pt at every 100th step and at the end."""
    torch.manual_seed(SEED)
    tokens = torch.load(work / "tokens.pt")
    model, batches, valid = SmolMoE(base, RANK), *(Batches(tokens, p, SEED) for p in PARTS)
    fit_routers(model, batches)
    dense = validate(model, valid, dense=True)
    print("dense", [round(v, 3) for v in dense], flush=True)
    routers = [layer.router for layer in model.layers]
    lora = [p for layer in model.layers for n, p in layer.named_parameters() if n != "router"]
    groups = [{"params": lora, "peak": LORA_RATE}, {"params": routers, "peak": ROUTER_RATE}]
    adam = torch.optim.AdamW(groups, betas=(0.9, 0.98), weight_decay=0.0, fused=True)
    began, threads = time.time(), Threads()
    for step in range(STEPS):
        # the schedule follows the clock if the steps are slower than expected
        progress = max(step / STEPS, (time.time() - began) / (60 * minutes))
        if progress >= 1:
            break
        rate = min(1, (step + 1) / WARMUP) * (0.5 + 0.5 * math.cos(math.pi * progress))
        for group in adam.param_groups:
            group["lr"] = group["peak"] * rate
        threads.choose()
        start = time.time()
        ids, mask = batches.step(step)
        parts = losses(model, ids, mask)
        chat = parts["chat_kl"] + CHAT_CE * parts["chat_ce"]
        loss = parts["text"] * 7 / 8 + CHAT_WEIGHT / 8 * chat + LABEL_WEIGHT * parts["label"]
        adam.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(lora + routers, 1.0)
        adam.step()
        threads.took(time.time() - start)
        if step % 20 == 0:
            shown = {name: round(v.item(), 3) for name, v in parts.items()}
            print(f"step {step} {time.time() - began:.0f} s {shown} {threads.seconds}", flush=True)
        if step % 100 == 99:
            torch.save(model.state_dict(), work / "trained.pt")
            now = validate(model, valid, dense=False)
            print("  moe - dense", [round(a - b, 3) for a, b in zip(now, dense, strict=True)])
    torch.save(model.state_dict(), work / "trained.pt")
    recipe = {"rank": RANK, "window": WINDOW, "steps": step + 1, "lora_rate": LORA_RATE,
              "router_rate": ROUTER_RATE, "own": OWN, "label_weight": LABEL_WEIGHT,
              "chat_ce": CHAT_CE, "chat_weight": CHAT_WEIGHT}  # fmt: skip
    (work / "recipe.json").write_text(json.dumps(recipe))
    now = validate(model, valid, dense=False)
    print("end: moe - dense", [round(a - b, 3) for a, b in zip(now, dense, strict=True)])


@torch.no_grad()
def choose_scale(work: Path, base: demo.BaseWeights) -> None:
    """Multiplies the updates by the factor with the best validation loss; rewrites trained.pt."""
    model = SmolMoE(base, RANK)
    model.load_state_dict(torch.load(work / "trained.pt"))
    valid = Batches(torch.load(work / "tokens.pt"), "valid", SEED)
    ups = [p for n, p in model.named_parameters() if n.rsplit(".", 1)[1].startswith("b_")]
    print("dense", [round(v, 3) for v in validate(model, valid, dense=True, steps=4)], flush=True)
    means, before = {}, 1.0
    for scale in SCALES:
        for up in ups:
            up.mul_(scale / before)
        before = scale
        found = validate(model, valid, dense=False, steps=4)
        means[scale] = sum(found) / EXPERTS
        print(scale, round(means[scale], 4), [round(v, 3) for v in found], flush=True)
    best = min(means, key=lambda scale: means[scale])
    for up in ups:
        up.mul_(best / before)
    torch.save(model.state_dict(), work / "trained.pt")
    recipe = json.loads((work / "recipe.json").read_text())
    (work / "recipe.json").write_text(json.dumps({**recipe, "scale": best}))


def quantized(a: torch.Tensor, b: torch.Tensor) -> dict[str, np.ndarray]:
    """Factors a [E, r, I] and b [E, r, O] -> int8 of both and one f32 scale [E, r] for the pair."""
    a_scale = a.abs().amax(-1, keepdim=True) / 127
    b_scale = b.abs().amax(-1, keepdim=True) / 127
    return {
        "a": (a / a_scale).round().to(torch.int8).numpy(),
        "b": (b / b_scale).round().to(torch.int8).numpy(),
        "scale": (a_scale * b_scale)[..., 0].float().numpy(),
    }


def export(work: Path, target: Path) -> None:
    """work/trained.pt -> the one file that moelite ships."""
    state = torch.load(work / "trained.pt")

    def factor(layer: int, name: str) -> torch.Tensor:
        return state[f"layers.{layer}.{name}"].view(-1, EXPERTS, RANK, INNER_OR_HIDDEN[name])

    found: dict[str, list[np.ndarray]] = {}
    for layer in range(demo.NUM_LAYERS):
        gate_a, up_a = factor(layer, "a_gate_up")
        pairs = {
            "gate_proj": (gate_a, factor(layer, "b_gate")[0]),
            "up_proj": (up_a, factor(layer, "b_up")[0]),
            "down_proj": (factor(layer, "a_down")[0], factor(layer, "b_down")[0]),
        }
        for name, pair in pairs.items():
            for part, value in quantized(*pair).items():
                found.setdefault(f"{name}.{part}", []).append(value)
        router = state[f"layers.{layer}.router"].bfloat16().float().numpy()
        found.setdefault("router", []).append(router)
    recipe = {
        "base": f"{demo.WHEEL} {demo.GGUF_FILE} sha256 {demo.GGUF_SHA256}",
        "domains": " ".join(data.DOMAINS),
        "seed": str(SEED),
        "recipe": (work / "recipe.json").read_text(),
        "packages": " ".join(data.versions(work / "data")),
        "versions": f"torch {torch.__version__} numpy {np.__version__}",
        "licence": "Apache-2.0",
    }
    save_file({name: np.stack(parts) for name, parts in found.items()}, target, metadata=recipe)
    print(target, target.stat().st_size, "bytes")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("stage", choices=("prepare", "train", "scale", "export"))
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--minutes", type=float, default=60)
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    base = demo.BaseWeights(demo.fetch_base(args.work))
    if args.stage == "prepare":
        prepare(args.work, base)
    elif args.stage == "train":
        train(args.work, base, args.minutes)
    elif args.stage == "scale":
        choose_scale(args.work, base)
    else:
        export(args.work, demo.UPDATES)


if __name__ == "__main__":
    main()
