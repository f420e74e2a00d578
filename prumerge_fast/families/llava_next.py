"""LLaVA-NeXT (1.6) in transformers: `LlavaNextForConditionalGeneration`, images as several crops.

An image is an overview and a grid of crops of the enlarged image. Every crop is pruned on its own,
over the patches that the model reads: those in the padding around the image are none of them.

The model ends each row of the grid with a newline token. With `order="raster"`, tokens stay in
the places where the model has them, row by row through all crops, and a row that loses all of its
tokens loses its newline; the supplements of the crops follow. With `order="attention"` there are
no rows: crops follow each other, each with its supplement and then one newline; the overview has
none, as in the model. With `supplement="image"` the supplements of an image's crops, the overview's
among them, are one row, their mean, which is the image's last, behind all newlines.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from prumerge_fast.families.arguments import on_host
from prumerge_fast.families.base import ImageTokens, Views, inner_model
from prumerge_fast.families.crops import (
    CropLayout,
    crop_counts,
    crop_grid,
    crop_layout,
    prune_crops,
    with_newlines,
)
from prumerge_fast.families.llava import LlavaAdapter
from prumerge_fast.reduction.config import PruMergeConfig
from prumerge_fast.reduction.reading import Patches, Reading


class LlavaNextAdapter(LlavaAdapter):
    """As LLaVA, with `image_newline`."""

    def read(
        self,
        model: Any,
        modality: str,
        pixel_values: Tensor,
        images: Mapping[str, Any],
        every_query: bool,
    ) -> Reading:
        side = model.config.vision_config.image_size
        if images.get("interpolate_pos_encoding") and pixel_values.shape[-2:] != (side, side):
            raise ValueError(
                f"interpolate_pos_encoding: expected crops and frames of {side} x {side} pixels, "
                "whose patches the model lays out in grids of that size, got "
                + " x ".join(map(str, pixel_values.shape[-2:]))
            )
        return super().read(model, modality, pixel_values, images, every_query)

    def reading(
        self, model: Any, images: Mapping[str, Any], *, every_query: bool = False
    ) -> Reading:
        """Of every crop; of images [B, crops, 3, height, width], crops that only pad among them."""
        pixel_values = images["pixel_values"]
        crops = pixel_values.flatten(0, 1) if pixel_values.ndim == 5 else pixel_values
        return self.read(model, "image", crops, images, every_query)

    def encode_pixels(
        self,
        model: Any,
        modality: str,
        images: Mapping[str, Any],
        config: PruMergeConfig,
        backend: str,
    ) -> ImageTokens:
        if modality != "image":
            return super().encode_pixels(model, modality, images, config, backend)
        images = on_host(images)
        crops, layout = self._cut(model, images)
        reading = self.read(model, "image", crops, images, config.scores == "received")
        patches = self.packed(model, images, reading, layout, config, backend)
        rows = prune_crops(patches, layout, config, backend, self.reduce)

        projected = self.projected(model, rows.tokens)  # [R, D]
        newline = newline_of(model)
        features, lengths, places = with_newlines(projected, newline, rows, layout, config.order)
        return ImageTokens(features, lengths, [len(image) for image in layout.images], places)

    def views(
        self,
        model: Any,
        modality: str,
        images: Mapping[str, Any],
        config: PruMergeConfig,
        backend: str,
    ) -> Views:
        """Of images: all overviews and crops, but for those that only pad a batch."""
        if modality != "image":
            return super().views(model, modality, images, config, backend)
        config, images = self.resolved(model, config), on_host(images)
        crops, layout = self._cut(model, images)
        reading = self.read(model, "image", crops, images, config.scores == "received")
        patches = self.packed(model, images, reading, layout, config, backend)
        grids = [
            crop_grid(model.config, size) if count > 1 else (0, 0)
            for size, count in zip(
                images["image_sizes"], layout.image_of_crop.bincount(), strict=True
            )
        ]
        return Views(patches, layout.is_read, crops, grids)

    def counts(self, model: Any, images: Mapping[str, Any]) -> list[int]:
        """Number of crops of each image, the overview among them."""
        return crop_counts(model.config, images.get("image_sizes"))

    def layout(self, model: Any, images: Mapping[str, Any], counts: list[int]) -> CropLayout:
        """Where the model reads the patches of images of so many crops."""
        return crop_layout(model.config, counts, images["image_sizes"], self.num_patches(model))

    def packed(
        self,
        model: Any,
        images: Mapping[str, Any],
        reading: Reading,
        layout: CropLayout,
        config: PruMergeConfig,
        backend: str,
    ) -> Patches:
        """The patches [K, N] that are pruned: those that were read, or what the model packs."""
        return reading

    def _cut(self, model: Any, images: Mapping[str, Any]) -> tuple[Tensor, CropLayout]:
        """The crops [K, 3, H, W] of all images, and where the model reads their patches."""
        counts = self.counts(model, images)
        return _crops(images["pixel_values"], counts), self.layout(model, images, counts)


def _crops(pixel_values: Any, counts: list[int]) -> Tensor:
    """The crops of all images, [K, 3, H, W], without those that pad an image to the batch's."""
    shape = list(pixel_values.shape) if isinstance(pixel_values, Tensor) else type(pixel_values)
    if isinstance(pixel_values, Tensor):
        if pixel_values.ndim == 4 and len(pixel_values) == sum(counts):
            return pixel_values
        if (
            pixel_values.ndim == 5
            and len(pixel_values) == len(counts)
            and pixel_values.shape[1] >= max(counts)
        ):
            return torch.cat(
                [crops[:count] for crops, count in zip(pixel_values, counts, strict=True)]
            )
    raise ValueError(
        "pixel_values: expected crops [images, crops, 3, height, width] or [sum of crops, 3, "
        f"height, width], which image_sizes say are {counts}, got {shape}"
    )


def newline_of(model: Any) -> Tensor:
    """The newline [D], which accelerate brings only to the model's own `forward`."""
    owner = inner_model(model)
    if not owner.image_newline.is_meta:
        return owner.image_newline
    from accelerate.utils import align_module_device

    with align_module_device(owner):
        return owner.image_newline


ADAPTER = LlavaNextAdapter()
