"""Tokens and times of InternVL, which knows tiles and no images."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tiny_families import FAMILIES
from tiny_models import batch

from prumerge_fast.errors import PictureError
from prumerge_fast.harness.prompts import check_pixels
from prumerge_fast.harness.stages import measure
from prumerge_fast.reduction.config import PruMergeConfig


def test_tiles_count_for_their_prompt() -> None:
    """Of three, one and no tiles; each stage takes its time."""
    family: Any = FAMILIES["InternVL"]
    model = family.model()
    rows = [[1, 5, *[90] * 27, 6], [1, *[90] * 9, 7, 8], [1, 4]]
    pixels = torch.stack([family.pixels("image", number) for number in range(4)])
    inputs = {**batch(rows), "pixel_values": pixels}
    for config, tokens in ((None, [27, 9, 0]), (PruMergeConfig(keep=2), [9, 3, 0])):
        found = measure(model, inputs, config, backend="auto", max_new_tokens=2)
        assert found.visual_tokens == tokens
        assert found.times.vision > 0
        assert found.times.projector > 0
        assert found.times.prefill > 0
        assert (found.times.prune_merge is None) == (config is None)


def test_pixels_of_tiles_that_are_not_finite() -> None:
    """Of two images in five tiles nobody knows whose is which."""
    pixels = torch.zeros(5, 3, 36, 36)
    check_pixels(pixels, ["a.png", "b.png"])
    pixels[4, 0, 0, 0] = torch.nan
    with pytest.raises(PictureError, match=r"got NaN or infinity for a\.png or b\.png$"):
        check_pixels(pixels, ["a.png", "b.png"])
