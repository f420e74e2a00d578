"""How LLaVA-NeXT and its kin cut images into crops, and where the language model reads what of
them.

All of it follows from a model's configuration, so that engines which build models of their own
share it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from types import SimpleNamespace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from prumerge_fast.reduction.config import PruMergeConfig
from prumerge_fast.reduction.output import MergedTokens
from prumerge_fast.reduction.padding import reduce_unpadded
from prumerge_fast.reduction.reading import Patches, reduce_patches


class CropRows(NamedTuple):
    """Tokens of crops: features [R, C], the crop [R] of each, and its patch [R].

    Patches are numbered through all crops, N each. A crop's supplement is of none, -1; one that
    sums up a whole image, -2, stands last and has the image's last crop.
    """

    tokens: Tensor
    crop: Tensor
    patch: Tensor


class CropLayout(NamedTuple):
    """Where the model reads what of each image.

    Args:
        images: For each image, the patch in each place, numbered as in `CropRows`;
            -1 for a newline.
        is_read: [K, N] bool, which patches of each crop are in `images`.
        image_of_crop: [K]. An image of one crop is not cut.
        is_overview: [K] bool.
    """

    images: list[Tensor]
    is_read: Tensor
    image_of_crop: Tensor
    is_overview: Tensor


def crop_counts(config: Any, image_sizes: Any, is_cut: Sequence[bool] | None = None) -> list[int]:
    """Number of crops of each image, the overview among them; of one that is not cut, 1.

    Args:
        config: A model's configuration.
        image_sizes: Height and width of each image.
        is_cut: Of each image; `None`: all are.
    """
    from transformers.models.llava_next.modeling_llava_next import image_size_to_num_patches

    if image_sizes is None:
        raise ValueError(
            "image_sizes: expected the height and width of each image, [images, 2], together "
            "with pixel_values, got None"
        )
    grids, side = config.image_grid_pinpoints, config.vision_config.image_size
    if is_cut is None:
        is_cut = [True] * len(image_sizes)
    return [
        image_size_to_num_patches(size, grids, side) if cut else 1
        for size, cut in zip(image_sizes, is_cut, strict=True)
    ]


def crop_grid(config: Any, image_size: Any) -> tuple[int, int]:
    """Rows and columns of the crops of an image of this height and width."""
    from transformers.models.llava_next.modeling_llava_next import get_anyres_image_grid_shape

    grids, side = config.image_grid_pinpoints, config.vision_config.image_size
    rows, columns = get_anyres_image_grid_shape(image_size, grids, side)
    return int(rows), int(columns)


def crop_layout(config: Any, counts: list[int], image_sizes: Any, patches: int) -> CropLayout:
    """Found by letting transformers pack the numbers of patches in place of their features.

    Args:
        config: A LLaVA-NeXT's configuration.
        counts: What `crop_counts` returned.
        image_sizes: Height and width of each image.
        patches: N, those of a crop.
    """
    from transformers.models.llava_next.modeling_llava_next import LlavaNextModel

    reads_only_config: Any = SimpleNamespace(config=config)
    numbers = torch.arange(sum(counts) * patches).view(-1, patches, 1)  # [K, N, 1]
    packed, _ = LlavaNextModel.pack_image_features(
        reads_only_config,
        numbers.split(counts),
        image_sizes,
        "default",
        torch.tensor([-1]),
    )
    return layout_of([places[:, 0] for places in packed], counts, patches)


def layout_of(images: list[Tensor], counts: list[int], patches: int) -> CropLayout:
    """The layout of images of so many crops of N patches, from `CropLayout.images`."""
    read = torch.cat(images)
    is_read = torch.zeros(sum(counts), patches, dtype=torch.bool)
    is_read.view(-1)[read[read >= 0]] = True
    crops = torch.tensor(counts)
    first = torch.zeros(len(is_read), dtype=torch.bool)
    first[crops.cumsum(0) - crops] = True
    image_of_crop = torch.arange(len(counts)).repeat_interleave(crops)
    return CropLayout(images, is_read, image_of_crop, first & (crops > 1)[image_of_crop])


def prune_crops(
    patches: Patches,
    layout: CropLayout,
    config: PruMergeConfig,
    backend: str,
    reduce: Callable[[Patches, PruMergeConfig, str], MergedTokens] = reduce_patches,
) -> CropRows:
    """Prune and merge each crop over its patches that are read; rows in the order of crops.

    With `supplement="image"`, those of an image's crops are one, their mean, behind all rows.
    """
    merged = reduce_unpadded(patches, layout.is_read, config, backend, reduce)
    tokens, kept = zip(*merged, strict=True)  # of each crop [m, C] and [m]
    crop = torch.arange(len(merged)).repeat_interleave(torch.tensor(list(map(len, kept))))  # [R]
    patch = torch.cat(kept).long().cpu()  # [R]
    numbered = crop * layout.is_read.shape[1] + patch  # [R]
    rows = CropRows(torch.cat(tokens), crop, numbered.where(patch >= 0, -1))
    return _with_joined_supplements(rows, layout) if config.supplement == "image" else rows


def _with_joined_supplements(rows: CropRows, layout: CropLayout) -> CropRows:
    crops = layout.image_of_crop.bincount()  # [images]
    image = layout.image_of_crop[rows.crop]  # [R]
    joins = (rows.patch < 0) & (crops[image] > 1)  # [R]
    images, counts = image[joins].unique_consecutive(return_counts=True)  # [I] each
    if not len(images):
        return rows
    device = rows.tokens.device
    members = rows.tokens[joins.to(device)].split(counts.tolist())
    means = [of_image.float().mean(0, keepdim=True).to(of_image) for of_image in members]
    last = crops.cumsum(0)[images] - 1  # [I]
    return CropRows(
        torch.cat((rows.tokens[~joins.to(device)], *means)),
        torch.cat((rows.crop[~joins], last)),
        torch.cat((rows.patch[~joins], torch.full_like(last, -2))),
    )


def with_newlines(
    features: Tensor, newline: Tensor, rows: CropRows, layout: CropLayout, order: str
) -> tuple[Tensor, list[int], Tensor]:
    """What the language model reads: the projected rows and the newlines between them.

    Args:
        features: [R, D], of `rows.tokens`.
        newline: [D].
        rows: Where those come from.
        layout: Of all images.
        order: As in `PruMergeConfig`.

    Returns:
        Features of all images, one after the other; the number of rows of each; and the place of
        each row in its image as the model itself has it, as `ImageTokens.places`.
    """
    index, lengths, places = _arrange(rows.crop, rows.patch, layout, order)
    arranged = torch.cat((features, newline.to(features)[None]))[index.to(features.device)]
    return arranged, lengths, places


def _arrange(
    crop: Tensor, patch: Tensor, layout: CropLayout, order: str
) -> tuple[Tensor, list[int], Tensor]:
    """Rows [R] of crops, in the order of crops, and newlines as the language model reads them.

    Returns:
        Index of each row, R for a newline; the number of rows of each image; and the place of each
        row among its image's: a patch's own, for a supplement the last, for a newline behind a crop
        that of the newline behind the crop's last row.
    """
    read = torch.cat(layout.images)  # [T], all images
    total = torch.tensor([len(places) for places in layout.images])
    ends = total.cumsum(0)
    place = torch.full((layout.is_read.numel(),), -1)  # [K * N], among all images'
    place[read[read >= 0]] = (read >= 0).nonzero()[:, 0]
    newlines = (read < 0).nonzero()[:, 0]  # places, which end rows

    in_grid = ~layout.is_overview[crop]  # [R]
    image = layout.image_of_crop[crop]  # [R]
    is_patch = patch >= 0  # [R]
    stands = place[patch].where(is_patch, ends[image] - 1)  # [R]
    if order == "attention":
        of_image = patch == -2  # [R], what sums up a whole image
        ended = crop[in_grid & ~of_image].unique()  # crops that a newline ends
        newline_image = layout.image_of_crop[ended]
        last = place.view(layout.is_read.shape).amax(1)[ended]
        newlines = newlines[torch.searchsorted(newlines, last)]
        key = torch.cat((3 * crop + 2 * of_image, 3 * ended + 1))
    else:
        is_first = torch.ones_like(layout.is_overview)  # [K], an overview or an image not cut
        is_first[1:] = layout.image_of_crop.diff() > 0
        behind = torch.where(  # what a supplement follows
            is_first[crop],  # never of what sums up a whole image: it has the last crop
            (ends - total)[image] + layout.is_read.shape[1],
            ends[image],
        )
        key = torch.where(is_patch, 2 * stands, 2 * behind - 1)  # [R]

        all_in_grid = (read >= 0) & ~layout.is_overview[read // layout.is_read.shape[1]]  # [T]
        is_empty = torch.ones_like(newlines, dtype=torch.bool)
        is_empty[torch.searchsorted(newlines, all_in_grid.nonzero()[:, 0])] = False
        is_left = is_empty  # a row without patches has none to lose
        is_left[torch.searchsorted(newlines, place[patch[is_patch & in_grid]])] = True
        newlines = newlines[is_left]
        newline_image = torch.searchsorted(ends, newlines, right=True)
        key = torch.cat((key, 2 * newlines))
    order_of_rows = key.argsort(stable=True)
    index = torch.arange(len(key)).clamp(max=len(crop))
    image = torch.cat((image, newline_image))
    stands = torch.cat((stands, newlines)) - (ends - total)[image]
    lengths = image.bincount(minlength=len(layout.images)).tolist()
    return index[order_of_rows], lengths, stands[order_of_rows]
