"""LLaVA-OneVision in transformers: `LlavaOnevisionForConditionalGeneration`.

Its projector is not linear, and behind it the model joins patches: of large images the whole grid
is interpolated (`anyres_max_9`), of videos each frame is. So it is pruned behind all of that, over
what the model packs, *cells*; attention and keys are packed alike. A cell belongs to the crop in
which its middle lies, and has the place of the patch in which that lies.

An image that is alone in its prompt is an overview and a grid of crops, as LLaVA-NeXT's, newlines
included; one of several in a prompt (`batch_num_images`) is one view with a newline behind it. A
video has a newline behind its last frame. Those that keep no token have no newline.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from prumerge_fast.errors import UnsupportedModelError
from prumerge_fast.families.arguments import on_host
from prumerge_fast.families.base import ImageTokens, Views, inner_model
from prumerge_fast.families.crops import CropLayout, crop_counts, crop_grid, layout_of
from prumerge_fast.families.llava import IMAGES_AND_VIDEOS
from prumerge_fast.families.llava_next import LlavaNextAdapter, newline_of
from prumerge_fast.reduction.config import PruMergeConfig
from prumerge_fast.reduction.reading import Patches, Reading, Scored

_ROUNDING = 1e-4  # of a patch; middles of cells are farther from a border, or on it


class LlavaOnevisionAdapter(LlavaNextAdapter):
    """As LLaVA-NeXT, with `apply_pooling` for videos."""

    pixels = IMAGES_AND_VIDEOS
    image_arguments = (
        *LlavaNextAdapter.image_arguments,
        "pixel_values_videos",
        "image_sizes_videos",
        "vision_aspect_ratio",
        "batch_num_images",
    )
    prunes_projected = True

    def check(self, model: Any) -> None:
        super().check(model)
        try:
            _checked_ratio(model.config.vision_aspect_ratio)
        except ValueError as error:
            raise UnsupportedModelError(str(error)) from None

    def encode_pixels(
        self,
        model: Any,
        modality: str,
        images: Mapping[str, Any],
        config: PruMergeConfig,
        backend: str,
    ) -> ImageTokens:
        tokens = super().encode_pixels(model, modality, images, config, backend)
        return tokens if modality == "image" else _ended(tokens, newline_of(model))

    def pooled(
        self, model: Any, modality: str, reading: Reading, config: PruMergeConfig, backend: str
    ) -> Patches:
        """Of frames [V * F, N]: their cells [V * F, n], as the model pools them."""
        return _each(
            inner_model(model).apply_pooling, self._projected(model, reading, config, backend)
        )

    def packed(
        self,
        model: Any,
        images: Mapping[str, Any],
        reading: Reading,
        layout: CropLayout,
        config: PruMergeConfig,
        backend: str,
    ) -> Patches:
        """The cells [K, N] of crops, zeros where there is none."""
        inner, ratio = inner_model(model), _ratio(model, images)
        counts = layout.image_of_crop.bincount().tolist()
        places = torch.cat(layout.images)  # [T]
        places = places[places >= 0].to(reading.hidden.device)  # [cells]

        def pack(values: Tensor) -> Tensor:  # [K, N, X]
            packed, _ = inner.pack_image_features(
                values.split(counts), images["image_sizes"], None, ratio
            )
            grids = torch.zeros_like(values).flatten(0, 1)  # [K * N, X]
            return grids.index_copy_(0, places, torch.cat(packed)).view_as(values)

        return _each(pack, self._projected(model, reading, config, backend))

    def _projected(
        self, model: Any, reading: Reading, config: PruMergeConfig, backend: str
    ) -> Scored:
        scored = reading.scored(config, backend)
        return scored._replace(features=inner_model(model).multi_modal_projector(scored.features))

    def counts(self, model: Any, images: Mapping[str, Any]) -> list[int]:
        sizes = images.get("image_sizes")
        several = images.get("batch_num_images")
        is_cut = None
        if several is not None and sizes is not None:
            several = [int(count) for count in several]
            is_cut = [count == 1 for count in several for _ in range(count)]
            if len(is_cut) != len(sizes):
                raise ValueError(
                    "batch_num_images: expected the number of images of each prompt that has any, "
                    f"{len(sizes)} together, as image_sizes has, got {several}"
                )
        return crop_counts(model.config, sizes, is_cut)

    def layout(self, model: Any, images: Mapping[str, Any], counts: list[int]) -> CropLayout:
        return self._layout(model, images["image_sizes"], counts, _ratio(model, images))

    def _layout(
        self, model: Any, sizes: Sequence[Any], counts: list[int], ratio: str
    ) -> CropLayout:
        """Found by letting the model pack where patches are in place of their features."""
        patches = self.num_patches(model)
        side = math.isqrt(patches)
        columns = [crop_grid(model.config, size)[1] for size in sizes]  # of the grid of crops
        middles = torch.cat(
            [_middles(*each, side) for each in zip(counts, columns, strict=True)]
        )  # [K, N, 3]
        packed, _ = inner_model(model).pack_image_features(
            middles.split(counts), sizes, middles.new_zeros(3), ratio
        )
        images, first = [], 0
        for places, count, width in zip(packed, counts, columns, strict=True):  # places [T, 3]
            row, column = (places[:, :2] + _ROUNDING).long().T  # [T] each, of the grid's patches
            in_grid = places[:, 2] > 1.5
            crop = (1 + row // side * width + column // side).where(in_grid, 0)  # [T]
            number = (first + crop) * patches + row % side * side + column % side
            images.append(number.where(places[:, 2] > 0.5, -1))
            first += count
        return layout_of(images, counts, patches)

    def views(
        self,
        model: Any,
        modality: str,
        images: Mapping[str, Any],
        config: PruMergeConfig,
        backend: str,
    ) -> Views:
        views = super().views(model, modality, images, config, backend)
        if modality != "image":
            return views
        images = on_host(images)
        counts = self.counts(model, images)
        # Nothing is interpolated that is no larger than this.
        whole = self._layout(
            model, images["image_sizes"], counts, f"anyres_max_{max(counts)}"
        ).is_read
        return views._replace(cells=_nearest(views.valid, whole))


def _middles(count: int, columns: int, side: int) -> Tensor:
    """Of the patches of an image of so many crops, [count, N, 3] float64.

    Their rows and columns in the overview, which comes first, or in the grid of all crops; and what
    they are in, 1 for the overview or a view that is not cut, 2 for the grid.
    """
    patch = torch.arange(side * side)  # [N]
    crop = torch.arange(count)[:, None]  # [count, 1]
    in_grid = crop > 0
    row = (crop - 1) // columns * side * in_grid + patch // side  # [count, N]
    column = (crop - 1) % columns * side * in_grid + patch % side
    kind = (1 + in_grid.long()).expand_as(row)
    middles = torch.stack((row, column, kind), -1).double()
    middles[..., :2] += 0.5
    return middles


def _nearest(is_cell: Tensor, is_read: Tensor) -> Tensor:
    """`Views.cells` [K, N] of crops whose cells have these places, of the patches in the image."""
    side = math.isqrt(is_cell.shape[1])
    patch = torch.arange(side * side)  # [N]
    place = torch.stack((patch // side, patch % side), -1).double()  # [N, 2]
    apart = torch.cdist(place, place) + 1e-6 * patch  # [N, N], of equals the first
    nearest = torch.stack([apart.masked_fill(~cells, torch.inf).argmin(1) for cells in is_cell])
    return nearest.where(is_read & is_cell.any(1, keepdim=True), -1)


def _each(change: Any, scored: Scored) -> Scored:
    """`change` of attention, keys and features, [..., N, X] each."""
    attention, keys, features = scored
    return Scored(change(attention[..., None])[..., 0], change(keys), change(features))


def _ended(videos: ImageTokens, newline: Tensor) -> ImageTokens:
    """With the newline [D], which has a placeholder of its own, behind each video that kept any.

    As in the model, it keeps its dtype, which under autocast is not that of features.
    """
    newline = newline.to(videos.features.device)[None]
    features, lengths, places = list[Tensor](), list[int](), list[Tensor]()
    for tokens, own, count in zip(
        videos.features.split(videos.lengths),
        videos.places.split(videos.lengths),
        videos.placeholders,
        strict=True,
    ):
        ended = len(tokens) > 0
        features += [tokens, newline[:ended]]
        places += [own, torch.full((int(ended),), count)]
        lengths.append(len(tokens) + ended)
    placeholders = [count + 1 for count in videos.placeholders]
    return ImageTokens(torch.cat(features), lengths, placeholders, torch.cat(places))


def _ratio(model: Any, images: Mapping[str, Any]) -> str:
    given = images.get("vision_aspect_ratio")
    return model.config.vision_aspect_ratio if given is None else _checked_ratio(given)


def _checked_ratio(ratio: object) -> str:
    if isinstance(ratio, str) and re.fullmatch(r"anyres_max_[1-9]\d*", ratio):
        return ratio
    raise ValueError(
        "vision_aspect_ratio: expected 'anyres_max_' and the crops from which on an image is "
        f"interpolated, such as 'anyres_max_9', got {ratio!r}"
    )


ADAPTER = LlavaOnevisionAdapter()
