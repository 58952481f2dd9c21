"""Measures smollm2-moe against its dense base: the table of moelite/data/README.md.

    python scripts/smollm2_moe_measure.py --work DIR

Both models run in transformers in float32, smollm2-moe from the checkpoint folder that
`DemoCheckpoint.write` writes: the exact bf16 weights that moelite runs. The test texts
are those of `train_smollm2_moe.py prepare`; none of them was trained on.
"""

from __future__ import annotations

import argparse
import json
import math
from pathlib import Path
from typing import Any

import smollm2_moe_data as data
import torch
from torch.nn import functional as F
from train_smollm2_moe import dense_model

from moelite import demo

CONTEXT = 512
ASKED = (
    "What is the capital of France?",
    "What is 2+2?",
    "What colour is the sky on a clear day?",
    "Who wrote Romeo and Juliet?",
    "What is the largest planet in the solar system?",
    "How many days are in a week?",
    "Name three fruits.",
    "What is the chemical symbol for water?",
    "Write a Python function that adds two numbers.",
    "Translate 'good morning' to French.",
)


def windows(tokens: dict[str, Any], count: int) -> dict[str, list[tuple[list[int], int]]]:
    """Per text: (ids, first scored position). Chat is scored on its answers, text on all of it."""
    found = {}
    for name in [*data.DOMAINS[:-1], *data.GENERAL]:
        stream = tokens["streams"][name]["test"]
        rows = stream[: count * CONTEXT].view(-1, CONTEXT).tolist()
        found[name] = [(row, 1) for row in rows]
    short = [(p, a) for p, a in tokens["worked"] if len(p) <= 160][:30]
    for name, pairs in (("chat", tokens["chat"][:30]), ("mmlu worked", short)):
        found[name] = [((p + a)[:CONTEXT], len(p)) for p, a in pairs]
    return found


class Routing:
    """Which experts each layer's router chooses, and how clearly."""

    def __init__(self, model: torch.nn.Module) -> None:
        self.counts = torch.zeros(demo.NUM_LAYERS, demo.NUM_EXPERTS)
        self.first = torch.zeros(demo.NUM_LAYERS, demo.NUM_EXPERTS)
        self.margins: list[torch.Tensor] = []
        self.weights: list[torch.Tensor] = []
        gates = [m for n, m in model.named_modules() if n.endswith("mlp.gate")]
        for layer, gate in enumerate(gates):
            gate.register_forward_hook(lambda m, i, o, at=layer: self._saw(m, i[0], at))

    def _saw(self, gate: torch.nn.Module, x: torch.Tensor, layer: int) -> None:
        logits = F.linear(x.reshape(-1, demo.HIDDEN), gate.weight)
        top, order = logits.topk(demo.TOP_K + 1)
        self.counts[layer] += torch.bincount(order[:, :2].flatten(), minlength=8)
        self.first[layer] += torch.bincount(order[:, 0], minlength=8)
        self.margins.append(top[:, 1] - top[:, 2])
        self.weights.append(top[:, :2].softmax(-1)[:, 0])

    def take(self) -> dict[str, Any]:
        """Counts since the last call, and the margin's quantiles; starts afresh."""
        margin, weight = torch.cat(self.margins), torch.cat(self.weights)
        found = {
            "share": (self.counts.sum(0) / self.counts.sum()).tolist(),
            "first": (self.first.sum(0) / self.first.sum()).tolist(),
            "least_used": float((self.counts / self.counts.sum(1, keepdim=True)).min()),
            "margin_1_10_50": margin.quantile(torch.tensor([0.01, 0.1, 0.5])).tolist(),
            "first_weight": float(weight.mean()),
            "counts": self.counts.clone(),
        }  # fmt: skip
        self.counts.zero_()
        self.first.zero_()
        self.margins, self.weights = [], []
        return found


@torch.no_grad()
def loss_of(model: Any, rows: list[tuple[list[int], int]]) -> tuple[float, int]:
    """Mean negative log-likelihood over the scored tokens, and their number."""
    total, count = 0.0, 0
    for ids, first in rows:
        row = torch.tensor([ids])
        logits = model(row).logits[0, first - 1 : -1].float()
        total += float(F.cross_entropy(logits, row[0, first:], reduction="sum"))
        count += len(ids) - first
    return total / count, count


@torch.no_grad()
def swap_effect(model: Any, rows: list[list[int]]) -> dict[str, float]:
    """Experts 0 and 1, 2 and 3, ... exchanged in one layer at a time, then in all layers.

    Mean KL of next-token distributions and mean largest logit change, over all positions.
    """
    ids = torch.tensor(rows)
    before = model(ids).logits
    other = torch.tensor([1, 0, 3, 2, 5, 4, 7, 6])
    experts = [layer.mlp.experts for layer in model.model.layers]

    def exchange(which: list[int]) -> None:
        for layer in which:
            for weight in (experts[layer].gate_up_proj, experts[layer].down_proj):
                weight.copy_(weight[other])

    def compare() -> tuple[float, float]:
        after = model(ids).logits
        kl = F.kl_div(
            after.log_softmax(-1), before.log_softmax(-1), reduction="none", log_target=True
        )
        return float(kl.sum(-1).mean()), float((after - before).abs().amax(-1).mean())

    found = {}
    for name, which in (
        ("layer 0", [0]), ("layer 15", [15]), ("layer 29", [29]), ("all", list(range(30))),
    ):  # fmt: skip
        exchange(which)
        found[f"{name}: KL"], found[f"{name}: max logit change"] = compare()
        exchange(which)
    return found


@torch.no_grad()
def replies(model: Any, tokenizer: Any, limit: int = 24) -> list[str]:
    """Greedy answers to ASKED."""
    found = []
    for question in ASKED:
        ids = tokenizer.apply_chat_template(
            [{"role": "user", "content": question}], add_generation_prompt=True,
            return_tensors="pt", return_dict=True,
        )  # fmt: skip
        out = model.generate(**ids, max_new_tokens=limit, do_sample=False)
        found.append(tokenizer.decode(out[0, ids["input_ids"].shape[1] :].tolist()))
    return found


def show(name: str, line: dict[str, Any]) -> None:
    """Prints one text's line of the table."""
    change = 100 * (line["moe"] / line["base"] - 1)
    share = " ".join(f"{100 * v:3.0f}" for v in line["share"])
    margin = " ".join(f"{v:.3f}" for v in line["margin_1_10_50"])
    print(
        f"{name:12} {line['tokens']:6} base {line['base']:8.3f} moe {line['moe']:8.3f} "
        f"{change:+6.2f} %  experts % {share}  margin 1/10/50 % {margin} "
        f"first weight {line['first_weight']:.2f}",
        flush=True,
    )


def main() -> None:
    from transformers import AutoTokenizer, MixtralForCausalLM

    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--windows", type=int, default=16)
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    rows = windows(torch.load(args.work / "tokens.pt"), args.windows)
    gguf = demo.fetch_base(args.work)
    folder = args.work / "checkpoint"
    demo.DemoCheckpoint(gguf).write(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    dense = dense_model(demo.BaseWeights(gguf), torch.float32)
    moe = MixtralForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    routing = Routing(moe)
    result: dict[str, Any] = {"chat": {}, "text": {}}
    for question, ours, base in zip(
        ASKED, replies(moe, tokenizer), replies(dense, tokenizer), strict=True
    ):
        print(f"{question}\n    base {base!r}\n    moe  {ours!r}", flush=True)
        result["chat"][question] = {"base": base, "moe": ours}
    routing.take()
    counts = torch.zeros(demo.NUM_LAYERS, demo.NUM_EXPERTS)
    for name, scored in rows.items():
        before, _ = loss_of(dense, scored)
        after, count = loss_of(moe, scored)
        found = routing.take()
        counts += found.pop("counts")
        result["text"][name] = {
            "tokens": count, "base": math.exp(before), "moe": math.exp(after), **found,
        }  # fmt: skip
        show(name, result["text"][name])
    shares = counts / counts.sum(1, keepdim=True)
    result["least_share"] = float(shares.min())
    result["greatest_share"] = float(shares.max())
    sample = [row[:192] for name in data.DOMAINS[:-1] for row, _ in rows[name][:1]]
    result["swap"] = swap_effect(moe, sample)
    print({name: round(value, 4) for name, value in result["swap"].items()})
    print(f"smallest and largest share of an expert in a layer: "
          f"{result['least_share']:.3f} {result['greatest_share']:.3f}")  # fmt: skip
    (args.work / "measured.json").write_text(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
