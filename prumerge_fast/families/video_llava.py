"""Video-LLaVA in transformers: `VideoLlavaForConditionalGeneration`, a tower for each modality.

A video is pruned frame by frame. The model reads each frame's class token, first; it stays.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import torch

from prumerge_fast.families.base import inner_model
from prumerge_fast.families.llava import IMAGES_AND_VIDEOS, LlavaAdapter
from prumerge_fast.reduction.output import MergedTokens
from prumerge_fast.reduction.reading import Patches, Reading


class VideoLlavaAdapter(LlavaAdapter):
    """`image_tower` and `video_tower` in place of `vision_tower`."""

    pixels = IMAGES_AND_VIDEOS
    image_arguments = (
        *LlavaAdapter.image_arguments,
        "pixel_values_images",
        "pixel_values_videos",
    )

    def tower(self, model: Any, modality: str) -> Any:
        return getattr(inner_model(model), f"{modality}_tower")

    def renamed(self, images: dict[str, Any]) -> dict[str, Any]:
        """Transformers 4 calls the images `pixel_values_images`, as 5 still does in places."""
        named_as_in_4 = images.pop("pixel_values_images", None)
        if named_as_in_4 is None:
            return images
        if images.get("pixel_values") is not None:
            raise ValueError("pixel_values and pixel_values_images: expected one of them, got both")
        return {**images, "pixel_values": named_as_in_4}

    def merge(
        self, modality: str, reading: Reading, patches: Patches, *options: Any
    ) -> MergedTokens:
        merged = super().merge(modality, reading, patches, *options)
        if modality == "image":
            return merged
        return dataclasses.replace(
            merged,
            tokens=torch.cat((reading.hidden[:, :1], merged.tokens), 1),  # [V * F, 1+capacity, C]
            lengths=merged.lengths + 1,
            # As placeholders are counted: the class token's is 0, and patches follow.
            kept=torch.nn.functional.pad(merged.kept + (merged.kept >= 0), (1, 0)),
        )

    def placeholders(self, modality: str, patches: int) -> int:
        return patches if modality == "image" else 1 + patches


ADAPTER = VideoLlavaAdapter()
