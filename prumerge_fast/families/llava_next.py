"""LLaVA-NeXT (1.6) in transformers: `LlavaNextForConditionalGeneration`, images as several crops.

An image is an overview and a grid of crops of the enlarged image. Every crop is pruned on its own,
over the patches that the model reads: those in the padding around the image are none of them.

The model ends each row of the grid with a newline token. With `order="raster"`, tokens stay in
the places where the model has them, row by row through all crops, and a row that loses all of its
tokens loses its newline; the supplements of the crops follow. With `order="attention"` there are
no rows: crops follow each other, each with its supplement and then one newline; the overview has
none, as in the model.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from prumerge_fast.families.base import ImageTokens, Views, inner_model
from prumerge_fast.families.llava import LlavaAdapter
from prumerge_fast.reduction.config import PruMergeConfig
from prumerge_fast.reduction.output import MergedTokens
from prumerge_fast.reduction.padding import prune_merge_unpadded


class _Rows(NamedTuple):
    """Tokens of crops: features [R, C], the crop [R] of each, and its patch [R], -1 for none.

    Patches are numbered through all crops, N each.
    """

    tokens: Tensor
    crop: Tensor
    patch: Tensor


class LlavaNextAdapter(LlavaAdapter):
    """As LLaVA, with `image_newline`."""

    def read(
        self, model: Any, modality: str, pixel_values: Tensor, images: Mapping[str, Any]
    ) -> tuple[Tensor, Tensor, Tensor]:
        side = model.config.vision_config.image_size
        if images.get("interpolate_pos_encoding") and pixel_values.shape[-2:] != (side, side):
            raise ValueError(
                f"interpolate_pos_encoding: expected crops and frames of {side} x {side} pixels, "
                "whose patches the model lays out in grids of that size, got "
                + " x ".join(map(str, pixel_values.shape[-2:]))
            )
        return super().read(model, modality, pixel_values, images)

    def query_keys_hidden(
        self, model: Any, images: Mapping[str, Any]
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Of every crop; of images [B, crops, 3, height, width], crops that only pad among them."""
        pixel_values = images["pixel_values"]
        crops = pixel_values.flatten(0, 1) if pixel_values.ndim == 5 else pixel_values
        return self.read(model, "image", crops, images)

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
        crops, layout = self._cut(model, images)
        query, keys, hidden = self.read(model, "image", crops, images)
        rows = _prune_crops(query, keys, hidden, layout, config, backend, self.reduce)

        features = inner_model(model).multi_modal_projector(rows.tokens)  # [R, D]
        newline = _newline(model).to(features)[None]  # [1, D]
        index, lengths = _arrange(rows.crop, rows.patch, layout, config.order)
        features = torch.cat((features, newline))[index.to(features.device)]
        return ImageTokens(features, lengths, [len(places) for places in layout.images])

    def views(self, model: Any, modality: str, images: Mapping[str, Any]) -> Views:
        """Of images: all overviews and crops, but for those that only pad a batch."""
        if modality != "image":
            return super().views(model, modality, images)
        crops, layout = self._cut(model, images)
        grids = [_grid(model, size) for size in images["image_sizes"]]
        return Views(*self.read(model, "image", crops, images), layout.is_read, crops, grids)

    def _cut(self, model: Any, images: Mapping[str, Any]) -> tuple[Tensor, _Layout]:
        """The crops [K, 3, H, W] of all images, and where the model reads their patches."""
        sizes = images.get("image_sizes")
        counts = _crop_counts(model, sizes)
        crops = _crops(images["pixel_values"], counts)
        return crops, _layout(model, counts, sizes, self.num_patches(model))


class _Layout(NamedTuple):
    """Where the model reads what of each image.

    Args:
        images: For each image, the patch in each place, numbered as in `_Rows`; -1 for a newline.
        is_read: [K, N] bool, which patches of each crop are in `images`.
        image_of_crop: [K].
        is_overview: [K] bool.
    """

    images: list[Tensor]
    is_read: Tensor
    image_of_crop: Tensor
    is_overview: Tensor


def _crop_counts(model: Any, image_sizes: Any) -> list[int]:
    """Number of crops of each image, the overview among them."""
    from transformers.models.llava_next.modeling_llava_next import image_size_to_num_patches

    if image_sizes is None:
        raise ValueError(
            "image_sizes: expected the height and width of each image, [images, 2], together "
            "with pixel_values, got None"
        )
    grids, side = model.config.image_grid_pinpoints, model.config.vision_config.image_size
    return [image_size_to_num_patches(size, grids, side) for size in image_sizes]


def _grid(model: Any, image_size: Any) -> tuple[int, int]:
    """Rows and columns of the crops of an image of this height and width."""
    from transformers.models.llava_next.modeling_llava_next import get_anyres_image_grid_shape

    grids, side = model.config.image_grid_pinpoints, model.config.vision_config.image_size
    rows, columns = get_anyres_image_grid_shape(image_size, grids, side)
    return int(rows), int(columns)


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


def _layout(model: Any, counts: list[int], image_sizes: Any, patches: int) -> _Layout:
    """Found by letting the model pack the numbers of patches in place of their features."""
    numbers = torch.arange(sum(counts) * patches).view(-1, patches, 1)  # [K, N, 1]
    packed, _ = inner_model(model).pack_image_features(
        numbers.split(counts), image_sizes, "default", torch.tensor([-1])
    )
    images = [places[:, 0] for places in packed]
    read = torch.cat(images)
    is_read = torch.zeros(len(numbers), patches, dtype=torch.bool)
    is_read.view(-1)[read[read >= 0]] = True
    crops = torch.tensor(counts)
    first = torch.zeros(len(numbers), dtype=torch.bool)
    first[crops.cumsum(0) - crops] = True
    image_of_crop = torch.arange(len(counts)).repeat_interleave(crops)
    return _Layout(images, is_read, image_of_crop, first & (crops > 1)[image_of_crop])


def _prune_crops(
    query: Tensor,
    keys: Tensor,
    hidden: Tensor,
    layout: _Layout,
    config: PruMergeConfig,
    backend: str,
    reduce: Callable[..., MergedTokens],
) -> _Rows:
    """Prune and merge each crop over its patches that are read; rows in the order of crops."""
    merged = prune_merge_unpadded(query, keys, hidden, layout.is_read, config, backend, reduce)
    tokens, kept = zip(*merged, strict=True)  # of each crop [m, C] and [m]
    crop = torch.arange(len(merged)).repeat_interleave(torch.tensor(list(map(len, kept))))  # [R]
    patch = torch.cat(kept).long().cpu()  # [R]
    numbered = crop * layout.is_read.shape[1] + patch  # [R]
    return _Rows(torch.cat(tokens), crop, numbered.where(patch >= 0, -1))


def _newline(model: Any) -> Tensor:
    """The newline [D], which accelerate brings only to the model's own `forward`."""
    owner = inner_model(model)
    if not owner.image_newline.is_meta:
        return owner.image_newline
    from accelerate.utils import align_module_device

    with align_module_device(owner):
        return owner.image_newline


def _arrange(crop: Tensor, patch: Tensor, layout: _Layout, order: str) -> tuple[Tensor, list[int]]:
    """Rows [R] of crops, in the order of crops, and newlines as the language model reads them.

    Returns:
        Index of each row, R for a newline; and the number of rows of each image.
    """
    in_grid = ~layout.is_overview[crop]  # [R]
    image = layout.image_of_crop[crop]  # [R]
    if order == "attention":
        ended = crop[in_grid].unique()  # crops that a newline ends
        newline_image = layout.image_of_crop[ended]
        key = torch.cat((2 * crop, 2 * ended + 1))
    else:
        read = torch.cat(layout.images)  # [T], all images
        lengths = torch.tensor([len(places) for places in layout.images])
        ends = lengths.cumsum(0)
        place = torch.empty(layout.is_read.numel(), dtype=torch.int64)
        place[read[read >= 0]] = (read >= 0).nonzero()[:, 0]
        behind = torch.where(  # what a supplement follows
            in_grid, ends[image], (ends - lengths)[image] + layout.is_read.shape[1]
        )
        is_patch = patch >= 0  # [R]
        key = torch.where(is_patch, 2 * place[patch], 2 * behind - 1)  # [R]

        newlines = (read < 0).nonzero()[:, 0]  # places, which end rows
        all_in_grid = (read >= 0) & ~layout.is_overview[read // layout.is_read.shape[1]]  # [T]
        is_empty = torch.ones_like(newlines, dtype=torch.bool)
        is_empty[torch.searchsorted(newlines, all_in_grid.nonzero()[:, 0])] = False
        is_left = is_empty  # a row without patches has none to lose
        is_left[torch.searchsorted(newlines, place[patch[is_patch & in_grid]])] = True
        newlines = newlines[is_left]
        newline_image = torch.searchsorted(ends, newlines, right=True)
        key = torch.cat((key, 2 * newlines))
    index = torch.arange(len(key)).clamp(max=len(crop))
    image = torch.cat((image, newline_image))
    return index[key.argsort(stable=True)], image.bincount(minlength=len(layout.images)).tolist()


ADAPTER = LlavaNextAdapter()
