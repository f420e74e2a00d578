"""Engine "transformers": actors with a patched model, which answer as `compare` does."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa

from prumerge_fast.errors import PictureError
from prumerge_fast.harness.inputs import Item, items_from_images
from prumerge_fast.harness.models import load
from prumerge_fast.harness.prompts import prepare_readable
from prumerge_fast.harness.questions import decoded
from prumerge_fast.harness.stages import measure
from prumerge_fast.reduction.config import PruMergeConfig
from prumerge_fast.serving.batch.rows import answers_table
from prumerge_fast.serving.batch.singly import batch_or_singly
from prumerge_fast.towers.wrappers import unwrapped


class PatchedModel:
    """An actor of Ray Data: batches of questions to answers.

    Args:
        loading: Arguments of `harness.models.load`.
        config: How visual tokens are reduced.
        backend: What runs that.
        max_new_tokens: Of the longest answer.
    """

    def __init__(
        self, loading: Mapping[str, Any], config: PruMergeConfig, backend: str, max_new_tokens: int
    ) -> None:
        self._loaded = load(**loading)
        self._config = config
        self._backend = backend
        self._max_new_tokens = max_new_tokens

    def __call__(self, questions: pa.Table) -> pa.Table:
        """Answers as `rows.ANSWERS` to questions as `rows.QUESTIONS`."""
        items = [
            items_from_images([Path(os.fsdecode(path))], [prompt])[0]
            for path, prompt in zip(
                questions["path"].to_pylist(), questions["prompt"].to_pylist(), strict=True
            )
        ]
        answers = [
            {"error": answer.says} if isinstance(answer, PictureError) else answer
            for answer in batch_or_singly(self._answers, items)
        ]
        return answers_table(questions, answers)

    def _answers(self, items: Sequence[Item]) -> list[dict[str, Any]]:
        """Of each question the columns of its answer, or the error of its picture."""
        inputs, failed = prepare_readable(self._loaded, items, strict=False)
        answers: list[dict[str, Any]] = [
            {"error": failed.get(place)} for place in range(len(items))
        ]
        good = [place for place in range(len(items)) if place not in failed]
        if good:
            measured = measure(
                self._loaded.model,
                inputs,
                self._config,
                backend=self._backend,
                max_new_tokens=self._max_new_tokens,
            )
            texts = _text_tokens(self._loaded, inputs)
            said = decoded(self._loaded, [items[place] for place in good], measured)
            for place, answer, text in zip(good, said, texts, strict=True):
                answers[place] = {
                    "answer": answer.text,
                    "visual_tokens": answer.visual_tokens,
                    "prompt_tokens": answer.visual_tokens + text,
                }
        return answers


def _text_tokens(loaded: Any, inputs: Any) -> list[int]:
    """How many tokens of each prompt are no image's."""
    placeholder = loaded.adapter.placeholder_id(unwrapped(loaded.model), "image")
    is_text = inputs["attention_mask"].bool() & (inputs["input_ids"] != placeholder)  # [B, L]
    return is_text.sum(1).tolist()
