"""Liger-Kernel's `forward` for LLaVA, which replaces the instance's: still pruned.

Run in an environment with `liger-kernel`, whose LLaVA needs transformers below 5.24. Its kernels
need a GPU and are left out; what it replaces `forward` with is not.
"""

from __future__ import annotations

from typing import Any

import pytest

pytest.importorskip("liger_kernel")
import torch
from liger_kernel.transformers import apply_liger_kernel_to_llava
from tiny_models import (
    EVERYTHING,
    PIXELS,
    PROMPTS,
    batch,
    labels_of,
    lengths_seen,
    tiny_llava,
)

from prumerge_fast.patching.patch import patch, unpatch

INPUTS = {**batch(PROMPTS, "right"), "pixel_values": PIXELS}
IDS = INPUTS["input_ids"]
LABELS = labels_of(IDS)


def with_liger(model: Any) -> Any:
    kernels = dict.fromkeys(("rope", "swiglu", "rms_norm", "layer_norm"), False)
    apply_liger_kernel_to_llava(model=model, **kernels)
    return model.eval()


@torch.no_grad()
def loss(model: Any) -> float:
    return float(model(**INPUTS, labels=LABELS).loss)


def test_the_loss_is_that_of_the_pruned_prompt() -> None:
    expected = loss(patch(tiny_llava(), keep=5))
    model = patch(tiny_llava(), keep=5)
    seen = lengths_seen(model)
    with_liger(model)
    assert loss(model) == pytest.approx(expected, rel=1e-5)
    assert seen[0] < IDS.shape[1]
    liger = model.forward
    unpatch(model)
    assert model.forward == liger
    assert loss(model) == pytest.approx(loss(tiny_llava()), rel=1e-5)
    assert seen[-1] == IDS.shape[1]


def test_before_the_patch() -> None:
    model = patch(with_liger(tiny_llava()), keep=5)
    assert loss(model) == pytest.approx(loss(patch(tiny_llava(), keep=5)), rel=1e-5)
    assert loss(patch(model, **EVERYTHING)) == pytest.approx(loss(tiny_llava()), rel=1e-5)
