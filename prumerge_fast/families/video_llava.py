"""Video-LLaVA in transformers: `VideoLlavaForConditionalGeneration`, a tower for each modality.

A video is pruned frame by frame. The model reads each frame's class token, first; it stays.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, ClassVar

import torch

from prumerge_fast.families.base import ImageTokens, inner_model
from prumerge_fast.families.llava import LlavaAdapter, project_videos, video_frames
from prumerge_fast.reduction.config import PruMergeConfig


class VideoLlavaAdapter(LlavaAdapter):
    """`image_tower` and `video_tower` in place of `vision_tower`."""

    image_arguments = (
        "pixel_values",
        "pixel_values_images",
        "pixel_values_videos",
        "vision_feature_layer",
        "vision_feature_select_strategy",
        "mm_encoder_outputs",
    )
    pixels: ClassVar[dict[str, str]] = {"image": "pixel_values", "video": "pixel_values_videos"}

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

    def encode_pixels(
        self,
        model: Any,
        modality: str,
        images: Mapping[str, Any],
        config: PruMergeConfig,
        backend: str,
    ) -> ImageTokens:
        if modality == "image":
            return super().encode_pixels(model, modality, images, config, backend)
        videos = images["pixel_values_videos"]
        query, keys, hidden = self.read(model, "video", video_frames(videos), images)
        merged = self.reduce(query, keys, hidden, config, backend=backend)
        with_class = dataclasses.replace(
            merged,
            tokens=torch.cat((hidden[:, :1], merged.tokens), 1),  # [V * F, 1 + capacity, C]
            lengths=merged.lengths + 1,
        )
        return project_videos(model, with_class, videos, hidden.shape[1])


ADAPTER = VideoLlavaAdapter()
