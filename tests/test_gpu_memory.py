"""What a model takes on a device: torch's tensors, counted one operation after another, stay below
the plan at every stage of a run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny_checkpoint

import moelite

torch = pytest.importorskip("torch")

from device_peak import Peak  # noqa: E402

from moelite.gpu import model as gpu_model  # noqa: E402
from moelite.gpu.products import kernels_for  # noqa: E402

pytestmark = pytest.mark.parity
CONFIG = {
    "hidden_size": 256,
    "moe_intermediate_size": 128,
    "num_experts": 16,
    "num_attention_heads": 16,
    "num_key_value_heads": 8,
    "vocab_size": 40_000,
    "max_position_embeddings": 4096,
}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("memory")
    config = {**tiny_checkpoint.QWEN3_MOE, **CONFIG}
    tiny_checkpoint.write_checkpoint(folder / "c", config)
    (folder / "c" / "tokenizer.json").unlink()
    return folder / "c"


@pytest.mark.parametrize("which", ["torch", "bitsandbytes"])
def test_the_plan_holds_what_a_run_takes(
    checkpoint: Path, which: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store, formats = tmp_path / "s", {"experts": "int4", "dense": "int8"}
    if which == "bitsandbytes":
        pytest.importorskip("bitsandbytes")
        formats = {"experts": "nf4", "dense": "nf4"}
    moelite.quantize(checkpoint, store, **formats)
    # torch's own unpacking takes the most: on a device without Triton
    monkeypatch.setattr(gpu_model, "kernels_for", lambda device: kernels_for(device, which))
    how: dict[str, Any] = {"ram": "1GiB", "context": 1024, "threads": 1, "device": "torch:cpu"}
    with moelite.load(store, **how, vram="1GiB") as model:
        least = model.footprint.device.minimum_bytes
    rng, peaks = np.random.default_rng(0), {}
    with Peak() as peak, moelite.load(store, **how, vram=least, miss="copy") as model:
        plan = model.footprint.device
        assert plan.used_bytes <= plan.budget_bytes
        # torch sees the cache below, which is not the device's, as a tensor of its own
        below = model._below.numel()
        peaks["load"] = peak.most - below
        session = model.session()

        def most(stage: str, work: Any) -> None:
            peak.most = peak.now
            work()
            peaks[stage] = peak.most - below

        most("prompt", lambda: session.advance(rng.integers(3, 40_000, 700)))
        most("all logits", lambda: session.append(rng.integers(3, 40_000, 40)))
        most("a token", lambda: [session.advance([5]) for _ in range(4)])
        held = model.device.held
    assert max(peaks.values()) <= plan.used_bytes, f"{peaks} of {plan.parts}"
    assert max(peaks.values()) > held + 40_000 * 256 * 4  # the count sees temporaries
    if which == "torch":
        assert plan.used_bytes < 2 * max(peaks.values())  # and the plan is not just large


def test_the_count_sees_what_is_there_and_what_is_gone() -> None:
    with Peak() as peak:
        a = torch.zeros(1000)
        b = a + 1
        assert peak.now == 8000
        del b
        view = a[10:]
        assert view.numel() == 990
        c = torch.ones(10)
        assert peak.now == 4040
        assert c.numel() == 10
    assert peak.most == 8000
