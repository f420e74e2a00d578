"""LLaVA-NeXT-Video in transformers: `LlavaNextVideoForConditionalGeneration`.

Images are those of LLaVA-NeXT. The model pools each frame of a video to a coarser grid before it
projects; frames are pruned after that, over the pooled patches, whose keys are the means of the
keys pooled.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from prumerge_fast.families.base import inner_model
from prumerge_fast.families.llava import IMAGES_AND_VIDEOS
from prumerge_fast.families.llava_next import LlavaNextAdapter


class LlavaNextVideoAdapter(LlavaNextAdapter):
    """As LLaVA-NeXT, with `vision_resampler` for videos."""

    pixels = IMAGES_AND_VIDEOS
    image_arguments = (*LlavaNextAdapter.image_arguments, "pixel_values_videos")

    def pooling(self, model: Any) -> Any:
        return inner_model(model).vision_resampler

    def read(
        self,
        model: Any,
        modality: str,
        pixel_values: Tensor,
        images: Mapping[str, Any],
        every_query: bool,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Of frames after pooling: keys and hidden [V * F, 1+n, C]."""
        if modality == "video" and every_query:
            raise ValueError(
                "scores: expected 'auto' or 'class' for videos of LLaVA-NeXT-Video, whose patches "
                "are pooled behind the tower, got 'received'"
            )
        query, keys, hidden = super().read(model, modality, pixel_values, images, every_query)
        if modality == "image":
            return query, keys, hidden
        pooled = self.pooling(model)(hidden[:, 1:]).to(hidden.dtype)  # [V * F, n, C]
        means = _means(keys[:, 1:], model.config.spatial_pool_stride)  # [V * F, n, C]
        return query, torch.cat((keys[:, :1], means), 1), torch.cat((hidden[:, :1], pooled), 1)


def _means(tokens: Tensor, stride: int) -> Tensor:
    """Mean of each window of stride x stride patches of a square grid, [B, N, C] to [B, n, C]."""
    side = int(tokens.shape[1] ** 0.5)
    grid = tokens.unflatten(1, (side, side)).permute(0, 3, 1, 2)  # [B, C, side, side]
    return torch.nn.functional.avg_pool2d(grid, stride).flatten(2).transpose(1, 2)


ADAPTER = LlavaNextVideoAdapter()
