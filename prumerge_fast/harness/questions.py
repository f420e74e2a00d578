"""Puts questions to a model, batch by batch."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, TypeVar

from prumerge_fast.harness.answers import Answer, summarise
from prumerge_fast.harness.inputs import Item
from prumerge_fast.harness.models import Loaded
from prumerge_fast.harness.prompts import prepare
from prumerge_fast.harness.stages import Measurement, StageTimes, measure
from prumerge_fast.reduction.config import PruMergeConfig

T = TypeVar("T")


def batches(items: list[T], size: int) -> Iterator[list[T]]:
    for start in range(0, len(items), size):
        yield items[start : start + size]


def decoded(loaded: Loaded, batch: list[Item], measured: Measurement) -> Iterator[Answer]:
    texts = loaded.processor.tokenizer.batch_decode(measured.answers, skip_special_tokens=True)
    share = measured.cache_bytes / len(batch)
    for item, text, tokens in zip(batch, texts, measured.visual_tokens, strict=True):
        yield Answer(item, text.strip(), tokens, share)


def accuracy(
    loaded: Loaded,
    config: PruMergeConfig | None,
    items: list[Item],
    *,
    batch_size: int,
    max_new_tokens: int = 32,
) -> dict[str, Any]:
    """What `summarise` says of one policy's answers, `config=None` for the plain model."""
    answers: list[Answer] = []
    times: list[StageTimes] = []
    for batch in batches(items, batch_size):
        measured = measure(
            loaded.model,
            prepare(loaded, batch),
            config,
            backend="auto",
            max_new_tokens=max_new_tokens,
        )
        times.append(measured.times.per_question(len(batch)))
        answers += decoded(loaded, batch, measured)
    return summarise(answers, times, answers)
