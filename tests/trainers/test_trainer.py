"""The `Trainer` of transformers: losses and metrics that it computes from logits by itself."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tiny_models import BOS, EVERYTHING, IMAGE, PAD, PIXELS, lengths_seen, prompt, tiny_llava
from torch.nn.functional import log_softmax
from transformers import Trainer, TrainingArguments

from prumerge_fast.patching.patch import patch

# Of one length, since processors pad; one image each.
ROWS = [prompt([7 + i], "image", [30 + i, 40, 50 + i]) for i in range(4)]
IDS = torch.tensor(ROWS)
LABELS = IDS.masked_fill((IDS == IMAGE) | (IDS == PAD) | (IDS == BOS), -100)
DATA = [
    {"input_ids": ids, "pixel_values": pixels, "labels": labels}
    for ids, pixels, labels in zip(IDS, PIXELS, LABELS, strict=True)
]
SMOOTHING = 0.25


def trainer(model: Any, folder: Path, **more: Any) -> Trainer:
    arguments = TrainingArguments(
        str(folder),
        use_cpu=True,
        report_to=[],
        save_strategy="no",
        per_device_train_batch_size=2,
        per_device_eval_batch_size=2,
        max_steps=1,
        logging_steps=1,
        label_smoothing_factor=SMOOTHING,
    )
    return Trainer(model, arguments, train_dataset=DATA, eval_dataset=DATA, **more)


def smoothed(model: Any) -> torch.Tensor:
    """Its label smoothing, by hand: of LLaVA's labels it shifts none."""
    logits = model(input_ids=IDS, pixel_values=PIXELS).logits  # [B, L, V]
    scores = -log_softmax(logits, -1)
    counted = LABELS != -100
    right = scores.gather(-1, LABELS.clamp(min=0)[..., None])[..., 0][counted].mean()
    return (1 - SMOOTHING) * right + SMOOTHING * scores.mean(-1)[counted].mean()


def accuracy(predictions: Any) -> dict[str, float]:
    """Each column predicts the label of the next."""
    logits = predictions.predictions
    logits = logits[0] if isinstance(logits, tuple) else logits
    said, labels = logits[:, :-1].argmax(-1), predictions.label_ids[:, 1:]
    return {
        "accuracy": float(np.mean(said[labels != -100] == labels[labels != -100])),
        "columns": logits.shape[1],
    }


@torch.no_grad()
def test_label_smoothing_and_metrics(tmp_path: Path) -> None:
    model = patch(tiny_llava(), keep=5)
    expected = float(smoothed(model))
    logits = model(input_ids=IDS, pixel_values=PIXELS).logits
    seen = lengths_seen(model)
    found = trainer(model, tmp_path, compute_metrics=accuracy).evaluate()
    assert seen == [IDS.shape[1] - 25 + 6] * 2
    assert found["eval_columns"] == IDS.shape[1]
    assert found["eval_loss"] == pytest.approx(expected, rel=1e-5)
    right = (logits[:, :-1].argmax(-1) == LABELS[:, 1:])[LABELS[:, 1:] != -100]
    assert found["eval_accuracy"] == pytest.approx(float(right.float().mean()))


def test_training_with_label_smoothing(tmp_path: Path) -> None:
    losses = []
    for options in (None, EVERYTHING, {"keep": 5}):
        model = tiny_llava() if options is None else patch(tiny_llava(), **options)
        seen = lengths_seen(model)
        run = trainer(model, tmp_path)
        run.train()
        losses.append([entry["loss"] for entry in run.state.log_history if "loss" in entry])
    assert losses[1] == pytest.approx(losses[0], rel=1e-5)
    assert losses[2] != pytest.approx(losses[0], rel=1e-5)
    assert seen == [IDS.shape[1] - 25 + 6]
