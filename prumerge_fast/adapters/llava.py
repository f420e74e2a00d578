"""LLaVA 1.5 and its kin in transformers: `LlavaForConditionalGeneration` with a CLIP tower."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from prumerge_fast.adapters.base import Adapter, ImageTokens
from prumerge_fast.config import PruMergeConfig
from prumerge_fast.dispatch import prune_merge
from prumerge_fast.errors import UnsupportedModelError
from prumerge_fast.vision import check_tower, num_patches, query_keys_hidden, reading_layer


class LlavaAdapter(Adapter):
    """`vision_tower`, `multi_modal_projector` and `language_model` under `model.model`."""

    image_arguments = (
        "pixel_values",
        "vision_feature_layer",
        "vision_feature_select_strategy",
        "image_sizes",
        "mm_encoder_outputs",
    )

    def check(self, model: Any) -> None:
        check_tower(model.model.vision_tower)
        reading_layer(model.model.vision_tower, model.config.vision_feature_layer)
        _check_strategy(model.config.vision_feature_select_strategy)

    def num_patches(self, model: Any) -> int:
        return num_patches(model.model.vision_tower)

    def image_token_id(self, model: Any) -> int:
        return model.config.image_token_id

    def has_images(self, images: Mapping[str, Any]) -> bool:
        pixel_values = images.get("pixel_values")
        has_pixels = pixel_values is not None and len(pixel_values) > 0
        return has_pixels or _precomputed(images) is not None

    def query_keys_hidden(
        self, model: Any, images: Mapping[str, Any]
    ) -> tuple[Tensor, Tensor, Tensor]:
        if images.get("image_sizes") is not None:
            raise ValueError("image_sizes: expected None, CLIP towers take images of one size")
        strategy = images.get("vision_feature_select_strategy")
        if strategy is not None:
            _check_strategy(strategy)
        layer = images.get("vision_feature_layer")
        if layer is None:
            layer = model.config.vision_feature_layer
        pixel_values = _stacked(images["pixel_values"])
        return query_keys_hidden(model.model.vision_tower, pixel_values, layer)

    def encode(
        self, model: Any, images: Mapping[str, Any], config: PruMergeConfig, backend: str
    ) -> ImageTokens:
        patches = self.num_patches(model)
        precomputed = _precomputed(images)
        if precomputed is not None:
            if images.get("pixel_values") is not None:
                raise ValueError(
                    "pixel_values: expected None together with mm_encoder_outputs, which hold "
                    "the encoded images"
                )
            lengths = [len(feature) for feature in precomputed]
            return ImageTokens(torch.cat(precomputed), lengths, [patches] * len(lengths))
        query, keys, hidden = self.query_keys_hidden(model, images)
        merged = prune_merge(query, keys, hidden, config, backend=backend)
        tokens, _ = merged.packed()  # [sum of lengths, C]
        features = model.model.multi_modal_projector(tokens)  # [sum of lengths, D]
        return ImageTokens(features, merged.lengths.tolist(), [patches] * len(merged))


def _precomputed(images: Mapping[str, Any]) -> list[Tensor] | None:
    """The projected features [m, D] of each image, if `get_image_features` was called before."""
    output = (images.get("mm_encoder_outputs") or {}).get("image")
    return None if output is None else list(output.pooler_output)


def _stacked(pixel_values: Any) -> Tensor:
    """One batch [B, 3, H, W] of the images, which may come as a list of [3, H, W] or batches."""
    images = [pixel_values] if isinstance(pixel_values, Tensor) else list(pixel_values)
    batches = [image[None] if image.ndim == 3 else image for image in images]
    shapes = [list(image.shape) for image in images]
    if any(batch.ndim != 4 or batch.shape[1:] != batches[0].shape[1:] for batch in batches):
        raise ValueError(
            "pixel_values: expected a batch [B, 3, height, width] or a list of images "
            f"[3, height, width] of one size, got {shapes[0] if len(shapes) == 1 else shapes}"
        )
    return torch.cat(batches)


def _check_strategy(strategy: object) -> None:
    if strategy != "default":
        raise UnsupportedModelError(
            "vision_feature_select_strategy: expected 'default' (patch tokens without the class "
            f"token), got {strategy!r}"
        )


ADAPTER = LlavaAdapter()
