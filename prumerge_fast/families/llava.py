"""LLaVA 1.5 and its kin in transformers: `LlavaForConditionalGeneration` with a CLIP tower.

What the other families of transformers share with it is here as well; they override the rest.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor

from prumerge_fast.errors import UnsupportedModelError
from prumerge_fast.families.base import Adapter, ImageTokens, Views, inner_model
from prumerge_fast.reduction.config import PruMergeConfig
from prumerge_fast.reduction.output import MergedTokens
from prumerge_fast.reduction.padding import within_budget
from prumerge_fast.towers.clip import (
    check_tower,
    num_heads,
    num_patches,
    query_keys_hidden,
    reading_layer,
)
from prumerge_fast.towers.wrappers import PARALLEL_WRAPPERS, class_names
from prumerge_fast.versions import configured_feature_layer

IMAGES_AND_VIDEOS = {"image": "pixel_values", "video": "pixel_values_videos"}
"""`Adapter.pixels` of the families that take videos."""


class LlavaAdapter(Adapter):
    """`vision_tower`, `multi_modal_projector` and `language_model` under `model.model`."""

    image_arguments: ClassVar[tuple[str, ...]] = (
        "pixel_values",
        "vision_feature_layer",
        "vision_feature_select_strategy",
        "image_sizes",
        "interpolate_pos_encoding",
        "mm_encoder_outputs",
    )

    def tower(self, model: Any, modality: str) -> Any:
        return inner_model(model).vision_tower

    def check(self, model: Any) -> None:
        parallel = PARALLEL_WRAPPERS & class_names(inner_model(model))
        if parallel:
            raise UnsupportedModelError(
                f"model: expected its inner model by itself, got a {min(parallel)} around it; "
                "patch before it is wrapped"
            )
        for modality in self.pixels:
            tower = self.tower(model, modality)
            check_tower(tower)
            reading_layer(tower, configured_feature_layer(model.config))
        _check_strategy(getattr(model.config, "vision_feature_select_strategy", "default"))

    def num_patches(self, model: Any) -> int:
        return num_patches(self.tower(model, "image"))

    def placeholder_id(self, model: Any, modality: str) -> int:
        return getattr(model.config, f"{modality}_token_id")

    def has_images(self, images: Mapping[str, Any]) -> bool:
        return any(
            _has_pixels(images, pixels) or _encoded(images, modality) is not None
            for modality, pixels in self.pixels.items()
        )

    def query_keys_hidden(
        self, model: Any, images: Mapping[str, Any]
    ) -> tuple[Tensor, Tensor, Tensor]:
        return self.read(model, "image", stacked(images["pixel_values"]), images, False)

    def num_heads(self, model: Any, modality: str) -> int:
        return num_heads(self.tower(model, modality))

    def read(
        self,
        model: Any,
        modality: str,
        pixel_values: Tensor,
        images: Mapping[str, Any],
        every_query: bool,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """`towers.clip.query_keys_hidden` of pixels [B, 3, height, width], as the arguments ask."""
        strategy = images.get("vision_feature_select_strategy")
        if strategy is not None:
            _check_strategy(strategy)
        layer = images.get("vision_feature_layer")
        if layer is None:
            layer = configured_feature_layer(model.config)
        return query_keys_hidden(
            self.tower(model, modality),
            pixel_values,
            layer,
            interpolate_pos_encoding=bool(images.get("interpolate_pos_encoding")),
            every_query=every_query,
        )

    def encode(
        self, model: Any, images: Mapping[str, Any], config: PruMergeConfig, backend: str
    ) -> dict[str, ImageTokens]:
        tokens = {}
        for modality, pixels in self.pixels.items():
            encoded = _encoded(images, modality)
            if encoded is None:
                if _has_pixels(images, pixels):
                    tokens[modality] = self.encode_pixels(model, modality, images, config, backend)
                continue
            if images.get(pixels) is not None:
                raise ValueError(
                    f"{pixels}: expected None together with mm_encoder_outputs, which hold the "
                    f"encoded {modality}s"
                )
            tokens[modality] = encoded
        return tokens

    def encode_pixels(
        self,
        model: Any,
        modality: str,
        images: Mapping[str, Any],
        config: PruMergeConfig,
        backend: str,
    ) -> ImageTokens:
        """Encode, prune, merge and project images or videos, one pruning an image or a frame."""
        pixels = images[self.pixels[modality]]
        if modality == "image":
            if images.get("image_sizes") is not None:
                raise ValueError("image_sizes: expected None, CLIP towers take images of one size")
            pictures = stacked(pixels)  # [B, 3, H, W]
            count = len(pictures)
        else:
            pictures, count = video_frames(pixels), len(pixels)  # [V * F, 3, H, W]
        inputs = self.read(model, modality, pictures, images, config.scoring().received)
        heads = self.num_heads(model, modality)
        merged = self.merge(modality, *inputs, config, backend, heads)
        tokens, _ = merged.packed()  # [sum of lengths, C]
        features = inner_model(model).multi_modal_projector(tokens)  # [sum of lengths, D]
        lengths = merged.lengths.view(count, -1).sum(1).tolist()
        each = self.placeholders(modality, inputs[1].shape[1] - 1) * (len(pictures) // count)
        return ImageTokens(features, lengths, [each] * count)

    def merge(
        self,
        modality: str,
        query: Tensor,
        keys: Tensor,
        hidden: Tensor,
        config: PruMergeConfig,
        backend: str,
        heads: int,
    ) -> MergedTokens:
        """`prune_merge` of what `read` returned; of fewer patches than `keep`, all are kept."""
        config = within_budget(config, keys.shape[1] - 1)
        return self.reduce(query, keys, hidden, config, num_heads=heads, backend=backend)

    def placeholders(self, modality: str, patches: int) -> int:
        """Placeholders in the caller's prompt of an image or a frame with so many patches."""
        return patches

    def views(
        self, model: Any, modality: str, images: Mapping[str, Any], every_query: bool = False
    ) -> Views:
        given = images[self.pixels[modality]]
        pixels = stacked(given) if modality == "image" else video_frames(given)  # [K, 3, H, W]
        query, keys, hidden = self.read(model, modality, pixels, images, every_query)
        valid = torch.ones(hidden.shape[0], hidden.shape[1] - 1, dtype=torch.bool)  # [K, n]
        return Views(query, keys, hidden, valid, pixels)


def stacked(pixel_values: Any) -> Tensor:
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


def video_frames(pixel_values: Any) -> Tensor:
    """The frames [V * F, 3, H, W] of videos [V, F, 3, H, W]."""
    if not isinstance(pixel_values, Tensor) or pixel_values.ndim != 5:
        got = list(pixel_values.shape) if isinstance(pixel_values, Tensor) else type(pixel_values)
        raise ValueError(
            f"pixel_values_videos: expected a batch [V, frames, 3, height, width], got {got}"
        )
    return pixel_values.flatten(0, 1)


def _has_pixels(images: Mapping[str, Any], argument: str) -> bool:
    pixel_values = images.get(argument)
    return pixel_values is not None and len(pixel_values) > 0


def _encoded(images: Mapping[str, Any], modality: str) -> ImageTokens | None:
    """What `get_image_features` or `get_video_features` returned before, patched or not."""
    output = (images.get("mm_encoder_outputs") or {}).get(modality)
    if output is None:
        return None
    if getattr(output, "pooler_output", None) is None:
        raise ValueError(
            f"mm_encoder_outputs: expected an output with the {modality}s' features as its "
            f"pooler_output, got {type(output).__name__}"
        )
    if not len(output.pooler_output):
        return None
    features = [feature.flatten(0, -2) for feature in output.pooler_output]  # [m, D] each
    lengths = [len(feature) for feature in features]
    placeholders = getattr(output, "placeholders", None)
    if placeholders is None:  # of a plain model, as many as there are tokens
        return ImageTokens(torch.cat(features), lengths, lengths)
    if len(placeholders) != len(lengths):
        raise ValueError(
            f"mm_encoder_outputs: expected placeholders for each of {len(lengths)} {modality}s, "
            f"got {len(placeholders)}"
        )
    return ImageTokens(torch.cat(features), lengths, placeholders.tolist())


def _check_strategy(strategy: object) -> None:
    if strategy != "default":
        raise UnsupportedModelError(
            "vision_feature_select_strategy: expected 'default' (patch tokens without the class "
            f"token), got {strategy!r}"
        )


ADAPTER = LlavaAdapter()
