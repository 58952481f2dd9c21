"""The architecture files mean what transformers computes: reference.py over their Arch, in float64,
against transformers in float64, for every tiny variant."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import tiny_models
from arch_tensors import arch_tensors
from reference import Reference

from moelite.models import build

pytest.importorskip("torch", reason="parity needs torch")
pytest.importorskip("transformers", reason="parity needs transformers")

pytestmark = pytest.mark.parity

# Both sides in float64: measured at most 4.6e-15 over all variants; a slip in the maths is > 1e-6.
TOLERANCE = 1e-12
LENGTH = 40  # longer than every window, so that the window's edge is inside


@pytest.mark.parametrize(("model_type", "variant"), tiny_models.variants())
def test_reference_equals_transformers(model_type: str, variant: str, tmp_path: Path) -> None:
    tiny_models.write_checkpoint(model_type, variant, tmp_path)
    arch = build(json.loads((tmp_path / "config.json").read_text()))
    ids = tiny_models.prompt(model_type, variant, LENGTH)
    reference = Reference(arch, tiny_models.weights(tmp_path))
    got = reference.forward(ids)
    with tiny_models.in_double():
        want = tiny_models.logits(tiny_models.load(tmp_path, double=True), ids)
    assert want.dtype == np.float64
    # Routing that hangs on the last bit could differ without anyone being wrong.
    assert min(margin.min() for margin in reference.margins) > 1e-9
    assert np.abs(got - want).max() / np.abs(want).max() <= TOLERANCE


@pytest.mark.parametrize(("model_type", "variant"), tiny_models.variants())
def test_every_tensor_has_its_place(model_type: str, variant: str, tmp_path: Path) -> None:
    """The Arch names all tensors of the checkpoint, each once and with its shape, and no others."""
    tiny_models.write_checkpoint(model_type, variant, tmp_path)
    arch = build(json.loads((tmp_path / "config.json").read_text()))
    named = arch_tensors(arch)
    shapes = {name: tensor.shape for name, tensor in tiny_models.weights(tmp_path).items()}
    assert named == shapes
