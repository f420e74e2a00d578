"""ViP-LLaVA in transformers: `VipLlavaForConditionalGeneration`, with several feature layers.

The features of a patch are those of all layers side by side; what scores and joins patches comes
from the layer that reads the deepest of them (`EncoderTower.read`).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from prumerge_fast.families.llava import LlavaAdapter
from prumerge_fast.reduction.reading import Reading


class VipLlavaAdapter(LlavaAdapter):
    """As LLaVA, but for the name of the argument that chooses layers in transformers 4."""

    image_arguments = (*LlavaAdapter.image_arguments, "vision_feature_layers")

    def read(
        self,
        model: Any,
        modality: str,
        pixel_values: Tensor,
        images: Mapping[str, Any],
        every_query: bool,
    ) -> Reading:
        if images.get("vision_feature_layers") is not None:
            images = {**images, "vision_feature_layer": images["vision_feature_layers"]}
        return super().read(model, modality, pixel_values, images, every_query)


ADAPTER = VipLlavaAdapter()
