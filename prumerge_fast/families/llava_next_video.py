"""LLaVA-NeXT-Video in transformers: `LlavaNextVideoForConditionalGeneration`.

Images are those of LLaVA-NeXT. The model pools each frame of a video to a coarser grid before it
projects; frames are pruned after that, over the pooled patches, whose attention and keys are the
means of those pooled.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from prumerge_fast.families.base import inner_model
from prumerge_fast.families.llava import IMAGES_AND_VIDEOS
from prumerge_fast.families.llava_next import LlavaNextAdapter
from prumerge_fast.reduction.config import PruMergeConfig
from prumerge_fast.reduction.reading import Patches, Reading, Scored


class LlavaNextVideoAdapter(LlavaNextAdapter):
    """As LLaVA-NeXT, with `vision_resampler` for videos."""

    pixels = IMAGES_AND_VIDEOS
    image_arguments = (*LlavaNextAdapter.image_arguments, "pixel_values_videos")

    def pooling(self, model: Any) -> Any:
        return inner_model(model).vision_resampler

    def pooled(
        self, model: Any, modality: str, reading: Reading, config: PruMergeConfig, backend: str
    ) -> Patches:
        """Of frames: the features as the model pools them, means of attention and keys."""
        if modality != "video":
            return reading
        attention, keys, features = reading.scored(config, backend)
        stride = model.config.spatial_pool_stride
        return Scored(
            _means(attention[..., None], stride)[..., 0],  # [V * F, n]
            _means(keys, stride),  # [V * F, n, C]
            self.pooling(model)(features).to(features.dtype),  # [V * F, n, C]
        )


def _means(values: Tensor, stride: int) -> Tensor:
    """Mean of each window of stride x stride patches of a square grid, [B, N, C] to [B, n, C]."""
    side = int(values.shape[1] ** 0.5)
    grid = values.unflatten(1, (side, side)).permute(0, 3, 1, 2)  # [B, C, side, side]
    return torch.nn.functional.avg_pool2d(grid, stride).flatten(2).transpose(1, 2)


ADAPTER = LlavaNextVideoAdapter()
