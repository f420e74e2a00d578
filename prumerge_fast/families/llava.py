"""LLaVA 1.5 and its kin in transformers: `LlavaForConditionalGeneration`, with CLIP or SigLIP.

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
from prumerge_fast.reduction.reading import Patches, Reading
from prumerge_fast.towers.kinds import tower_kind
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

    takes_sizes: ClassVar[bool] = False
    """Whether towers may be such as take images of their own sizes."""

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
            kind = tower_kind(tower)
            if kind.takes_sizes and not self.takes_sizes:
                raise UnsupportedModelError(
                    f"vision tower: expected one for images of one size, got a {kind.class_name}, "
                    f"which {type(model).__name__} itself does not run"
                )
            kind.deepest(tower, configured_feature_layer(model.config))
        self._check_strategy(
            model, getattr(model.config, "vision_feature_select_strategy", "default")
        )

    def num_patches(self, model: Any) -> int:
        tower = self.tower(model, "image")
        return tower_kind(tower).num_patches(tower)

    def has_class_token(self, model: Any) -> bool:
        return tower_kind(self.tower(model, "image")).class_token

    def placeholder_id(self, model: Any, modality: str) -> int:
        return getattr(model.config, f"{modality}_token_id")

    def has_images(self, images: Mapping[str, Any]) -> bool:
        return any(
            _has_pixels(images, pixels) or _encoded(images, modality) is not None
            for modality, pixels in self.pixels.items()
        )

    def reading(
        self, model: Any, images: Mapping[str, Any], *, every_query: bool = False
    ) -> Reading:
        return self.read(model, "image", stacked(images["pixel_values"]), images, every_query)

    def read(
        self,
        model: Any,
        modality: str,
        pixel_values: Tensor,
        images: Mapping[str, Any],
        every_query: bool,
    ) -> Reading:
        """`EncoderTower.read` of pixels [B, 3, height, width], as the arguments ask."""
        strategy = images.get("vision_feature_select_strategy")
        if strategy is not None:
            self._check_strategy(model, strategy)
        layer = images.get("vision_feature_layer")
        if layer is None:
            layer = configured_feature_layer(model.config)
        tower, options = self.tower(model, modality), self.tower_options(model, images)
        return tower_kind(tower).read(
            tower, pixel_values, layer, every_query=every_query, **options
        )

    def tower_options(self, model: Any, images: Mapping[str, Any]) -> dict[str, Any]:
        """What a tower's `forward` is given beside pixels."""
        return {"interpolate_pos_encoding": True} if images.get("interpolate_pos_encoding") else {}

    def _check_strategy(self, model: Any, strategy: object) -> None:
        """Raise `UnsupportedModelError` unless it leaves all patches, and patches alone."""
        expected, meaning = "full", "all tokens of a vision tower without a class token"
        if self.has_class_token(model):
            expected, meaning = "default", "patch tokens without the class token"
        if strategy != expected:
            raise UnsupportedModelError(
                f"vision_feature_select_strategy: expected {expected!r} ({meaning}), got "
                f"{strategy!r}"
            )

    def encode(
        self, model: Any, images: Mapping[str, Any], config: PruMergeConfig, backend: str
    ) -> dict[str, ImageTokens]:
        config, tokens = self.resolved(model, config), {}
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
                raise ValueError("image_sizes: expected None, this tower takes images of one size")
            pictures = stacked(pixels)  # [B, 3, H, W]
            count = len(pictures)
        else:
            pictures, count = video_frames(pixels), len(pixels)  # [V * F, 3, H, W]
        reading = self.read(model, modality, pictures, images, config.scores == "received")
        patches = self.pooled(model, modality, reading, config, backend)
        merged = self.merge(modality, reading, patches, config, backend)
        tokens, _ = merged.packed()  # [sum of lengths, C]
        features = self.projected(model, tokens)  # [sum of lengths, D]
        lengths = merged.lengths.view(count, -1).sum(1).tolist()
        each = self.placeholders(modality, patches.features.shape[1])  # of an image or a frame
        frames = len(pictures) // count
        places = _places(merged, each, frames)
        return ImageTokens(features, lengths, [each * frames] * count, places)

    def pooled(
        self, model: Any, modality: str, reading: Reading, config: PruMergeConfig, backend: str
    ) -> Patches:
        """The patches that are pruned: those that were read, or what the model makes of them."""
        return reading

    def merge(
        self,
        modality: str,
        reading: Reading,
        patches: Patches,
        config: PruMergeConfig,
        backend: str,
    ) -> MergedTokens:
        """`reduce_patches` of what was read and pooled; of fewer than `keep`, all are kept."""
        config = within_budget(config, patches.features.shape[1])
        return self.reduce(patches, config, backend)

    def projected(self, model: Any, tokens: Tensor) -> Tensor:
        """Merged tokens [R, C] as the language model reads them, [R, D]."""
        return tokens if self.prunes_projected else inner_model(model).multi_modal_projector(tokens)

    def placeholders(self, modality: str, patches: int) -> int:
        """Placeholders in the caller's prompt of an image or a frame with so many patches."""
        return patches

    def views(
        self,
        model: Any,
        modality: str,
        images: Mapping[str, Any],
        config: PruMergeConfig,
        backend: str,
    ) -> Views:
        given, config = images[self.pixels[modality]], self.resolved(model, config)
        pixels = stacked(given) if modality == "image" else video_frames(given)  # [K, 3, H, W]
        reading = self.read(model, modality, pixels, images, config.scores == "received")
        patches = self.pooled(model, modality, reading, config, backend)
        valid = torch.ones(patches.features.shape[:2], dtype=torch.bool)  # [K, N]
        return Views(patches, valid, pixels)


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
        every = torch.cat([torch.arange(length) for length in lengths])
        return ImageTokens(torch.cat(features), lengths, lengths, every)
    if len(placeholders) != len(lengths):
        raise ValueError(
            f"mm_encoder_outputs: expected placeholders for each of {len(lengths)} {modality}s, "
            f"got {len(placeholders)}"
        )
    places = getattr(output, "places", None)
    if places is None or len(places) != sum(lengths):
        got = None if places is None else len(places)
        raise ValueError(
            f"mm_encoder_outputs: expected the places of {sum(lengths)} tokens of {modality}s, got "
            f"{got}"
        )
    columns = getattr(output, "columns", None)
    columns = None if columns is None else columns.tolist()
    return ImageTokens(torch.cat(features), lengths, placeholders.tolist(), places.cpu(), columns)


def _places(merged: MergedTokens, placeholders: int, frames: int) -> Tensor:
    """`ImageTokens.places` of videos of so many frames, of so many placeholders each; or images."""
    kept = merged.kept.long().cpu()  # [V * F, capacity]
    place = kept.where(kept >= 0, placeholders - 1)
    frame = torch.arange(len(kept)) % frames
    is_token = torch.arange(kept.shape[1]) < merged.lengths.cpu()[:, None]
    return (place + placeholders * frame[:, None])[is_token]


ADAPTER = LlavaAdapter()
