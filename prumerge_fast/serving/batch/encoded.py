"""Adaptive counts with vLLM: actors that encode pictures in front of the engines."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pyarrow as pa
import torch

from prumerge_fast.errors import PictureError
from prumerge_fast.harness.models import conversation, describe
from prumerge_fast.harness.pictures import read_image
from prumerge_fast.harness.prompts import framed
from prumerge_fast.reduction.config import PruMergeConfig
from prumerge_fast.serving.batch.rows import readable
from prumerge_fast.serving.batch.singly import batch_or_singly
from prumerge_fast.serving.encoder import PruMergeEncoder

EMBEDS = "embeds"  # bytes of [n, D]; null where the picture has an error
ERROR = "picture_error"


class EncodedPictures:
    """An actor of Ray Data: questions to questions with `EMBEDS` and `ERROR`.

    Args:
        model: Folder or hub name.
        config: How visual tokens are reduced.
        image_aspect_ratio: As in `harness.models.load`.
        options: Of `PruMergeEncoder`.
    """

    def __init__(
        self,
        model: str,
        config: PruMergeConfig,
        image_aspect_ratio: str | None,
        options: Mapping[str, Any],
    ) -> None:
        described = describe(model)
        self._asked_with = conversation(described, image_aspect_ratio=image_aspect_ratio)
        self._encoder = PruMergeEncoder(model, config, **options)

    def __call__(self, questions: pa.Table) -> pa.Table:
        pictures = []
        errors: list[PictureError | None] = []
        for path in questions["path"].to_pylist():
            try:
                pictures.append(framed(self._asked_with, read_image(Path(os.fsdecode(path)))))
                errors.append(None)
            except PictureError as error:
                errors.append(error)
        encoded = iter(batch_or_singly(self._encoder.encode, pictures))
        results = [next(encoded) if error is None else error for error in errors]
        embeds = [None if isinstance(one, PictureError) else to_bytes(one) for one in results]
        says = [readable(one.says) if isinstance(one, PictureError) else None for one in results]
        table = questions.append_column(EMBEDS, pa.array(embeds, pa.large_binary()))
        return table.append_column(ERROR, pa.array(says, pa.string()))


def to_bytes(embeds: torch.Tensor) -> bytes:
    """[n, D] of any dtype; NumPy, in between, has no bfloat16."""
    return embeds.cpu().contiguous().view(torch.uint8).numpy().tobytes()


def from_bytes(content: bytes, width: int, dtype: torch.dtype) -> torch.Tensor:
    """[n, D]"""
    return torch.frombuffer(bytearray(content), dtype=dtype).view(-1, width)
