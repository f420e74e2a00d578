"""The `Trainer` of transformers on the demo model: losses and metrics that it computes itself."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tiny_models import CACHE, EVERYTHING, lengths_seen
from torch.nn.functional import log_softmax
from transformers import Trainer, TrainingArguments

from prumerge_fast.demo import PROMPT, load_demo
from prumerge_fast.demo.scenes import make_scene
from prumerge_fast.patching.patch import patch

PATCHES = 196
QUESTION, ANSWERS = "is there a red circle?", ("yes", "no", "no", "yes")  # rows of one length
SMOOTHING = 0.25


def inputs() -> dict[str, torch.Tensor]:
    """Of four scenes and the same question; the labels are the answers."""
    model, processor = load_demo()
    texts = [PROMPT.format(question=QUESTION) + f" {answer}" for answer in ANSWERS]
    scenes = [make_scene("test", number).render() for number in range(len(texts))]
    given = dict(processor(images=scenes, text=texts, return_tensors="pt"))
    labels = given["input_ids"].clone()
    labels[:, :-1] = -100
    labels[labels == model.config.image_token_id] = -100
    return {**given, "labels": labels}


INPUTS = inputs()
LABELS, WIDTH = INPUTS["labels"], INPUTS["input_ids"].shape[1]
DATA = [{name: rows[i] for name, rows in INPUTS.items()} for i in range(len(ANSWERS))]
PLAIN = {name: rows for name, rows in INPUTS.items() if name != "labels"}


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
    logits = model(**PLAIN).logits  # [B, L, V]
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
    model = patch(load_demo()[0], keep=5)
    expected = float(smoothed(model))
    logits = model(**PLAIN).logits
    seen = lengths_seen(model)
    run = trainer(model, tmp_path, compute_metrics=accuracy)
    found = run.evaluate(ignore_keys=[CACHE])  # which 5.17 cannot gather, nor of a plain model
    assert seen == [WIDTH - PATCHES + 6] * 2
    assert found["eval_columns"] == WIDTH
    assert found["eval_loss"] == pytest.approx(expected, rel=1e-5)
    right = (logits[:, :-1].argmax(-1) == LABELS[:, 1:])[LABELS[:, 1:] != -100]
    assert found["eval_accuracy"] == pytest.approx(float(right.float().mean()))


def test_training_with_label_smoothing(tmp_path: Path) -> None:
    losses = []
    for options in (None, EVERYTHING, {"keep": 5}):
        model = load_demo()[0]
        if options is not None:
            patch(model, **options)
        seen = lengths_seen(model)
        run = trainer(model, tmp_path)
        run.train()
        losses.append([entry["loss"] for entry in run.state.log_history if "loss" in entry])
    assert losses[1] == pytest.approx(losses[0], rel=1e-5)
    assert losses[2] != pytest.approx(losses[0], rel=1e-5)
    assert seen == [WIDTH - PATCHES + 6]
