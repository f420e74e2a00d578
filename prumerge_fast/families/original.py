"""The causal language models of the original LLaVA package (llava-torch 1.2.2).

They embed images of any number of features in `prepare_inputs_labels_for_multimodal`, together
with labels and masks, so that only the features differ under the patch. The method asks its
`encode_images` for them; ours finds there what was encoded, crops arranged, before the call.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from prumerge_fast.errors import UnsupportedModelError
from prumerge_fast.families.arguments import named_arguments
from prumerge_fast.families.base import BaseAdapter, Override
from prumerge_fast.families.original_tower import ADAPTER as TOWER
from prumerge_fast.reduction.config import PruMergeConfig
from prumerge_fast.reduction.padding import reduce_unpadded
from prumerge_fast.reduction.reading import Reading

Crop = tuple[Tensor, Tensor]
"""Projected tokens [m, D] of a crop, and the patch index [m] of each, -1 for the supplement."""


class OriginalAdapter(BaseAdapter):
    """`LlavaLlamaForCausalLM` and its kin.

    Images are [B, 3, S, S], [B, crops, 3, S, S] or a list of [3, S, S] and [crops, 3, S, S].
    """

    def check(self, model: Any) -> None:
        tower = model.get_vision_tower()
        if tower is None:
            raise UnsupportedModelError(
                "model: expected one with a vision tower, got "
                f"{type(model).__name__} without mm_vision_tower"
            )
        TOWER.check(tower)

    def num_patches(self, model: Any) -> int:
        return TOWER.num_patches(model.get_vision_tower())

    def device(self, model: Any) -> torch.device:
        return TOWER.device(model.get_vision_tower())

    def has_class_token(self, model: Any) -> bool:
        return TOWER.has_class_token(model.get_vision_tower())

    def reading(
        self, model: Any, images: Mapping[str, Any], *, every_query: bool = False
    ) -> Reading:
        return TOWER.reading(model.get_vision_tower(), images, every_query=every_query)

    def resolved(self, model: Any, config: PruMergeConfig) -> PruMergeConfig:
        if config.supplement == "image":
            raise ValueError(
                "supplement: expected True (one a crop) or False for the original LLaVA package, "
                "got 'image'"
            )
        return super().resolved(model, config)

    def overrides(self, model_class: type) -> Mapping[str, Override]:
        return {
            "encode_images": _encode_images,
            "prepare_inputs_labels_for_multimodal": _prepare_inputs,
        }


@dataclass(frozen=True, eq=False)
class _Encoded:
    """Stands for images in `prepare_inputs_labels_for_multimodal`: the features [m, D] of each."""

    features: list[Tensor]
    ndim: ClassVar[int] = 4  # so that the method leaves crops alone, which are arranged already


def _encode_images(
    model: Any,
    adapter: OriginalAdapter,
    original: Callable[..., Any],
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
) -> list[Tensor]:
    """The reduced, projected tokens [m, D] of each image of [B, 3, S, S]."""
    images = named_arguments(original, *args, **kwargs)["images"]
    if isinstance(images, _Encoded):
        return images.features
    features = [tokens for tokens, _ in _encode_crops(model, adapter, images)]
    model.prumerge.last_lengths = tuple(map(len, features))
    return features


def _prepare_inputs(
    model: Any,
    adapter: OriginalAdapter,
    original: Callable[..., Any],
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
) -> Any:
    arguments = named_arguments(original, *args, **kwargs)
    images, sizes = arguments["images"], arguments.get("image_sizes")
    if images is None or arguments["input_ids"].shape[1] == 1:  # no images, or decoding
        return original(*args, **kwargs)
    if isinstance(images, Tensor) and images.ndim == 4:
        features = _encode_images(model, adapter, model.encode_images, (images,), {})
    else:
        features = _encode_images_of_crops(model, adapter, images, sizes)
    return original(**{**arguments, "images": _Encoded(features)})


def _encode_images_of_crops(
    model: Any, adapter: OriginalAdapter, images: Any, sizes: Any
) -> list[Tensor]:
    """Tokens [m, D] of each image, of one crop or several, arranged as `mm_patch_merge_type`."""
    images = [crops[None] if crops.ndim == 3 else crops for crops in images]  # [crops, 3, S, S]
    grids: list[_Grid | None] = [None] * len(images)
    kind = getattr(model.config, "mm_patch_merge_type", "flat")
    if kind.startswith("spatial"):
        grids = [
            _grid(model, len(crops), sizes, index) if len(crops) > 1 else None
            for index, crops in enumerate(images)
        ]
    elif kind != "flat":
        raise ValueError(f"mm_patch_merge_type: expected flat or spatial..., got {kind!r}")

    patches, unpads = adapter.num_patches(model), "unpad" in kind
    valid = [
        grid.valid(patches)
        if grid is not None and unpads
        else torch.ones(len(crops), patches, dtype=torch.bool)
        for grid, crops in zip(grids, images, strict=True)
    ]  # of each image [crops, N]
    encoded = iter(_encode_crops(model, adapter, torch.cat(images), torch.cat(valid)))
    newline = model.get_model().image_newline if unpads else None  # [D]
    raster = model.prumerge.config.order == "raster"
    features = []
    for crops, grid in zip(images, grids, strict=True):
        parts = [next(encoded) for _ in crops]
        if grid is not None and raster:
            features.append(grid.in_rows(parts, newline))
        else:
            tokens = [tokens for tokens, _ in parts]
            features.append(torch.cat(tokens if newline is None else [*tokens, newline[None]]))
    model.prumerge.last_lengths = tuple(map(len, features))
    return features


def _encode_crops(
    model: Any, adapter: OriginalAdapter, pixels: Tensor, valid: Tensor | None = None
) -> list[Crop]:
    """Encode, prune, merge and project crops [B, 3, S, S], of which patches [B, N] are valid."""
    state = model.prumerge
    config = adapter.resolved(model, state.config)
    reading = adapter.reading(
        model, {"pixel_values": pixels}, every_query=config.scores == "received"
    )
    if valid is None:
        valid = torch.ones(len(pixels), adapter.num_patches(model), dtype=torch.bool)
    merged = reduce_unpadded(reading, valid, config, state.backend)
    packed = torch.cat([tokens for tokens, _ in merged]).to(pixels.dtype)  # [sum of m, C]
    projected = model.get_model().mm_projector(packed)  # [sum of m, D]
    split = projected.split([len(tokens) for tokens, _ in merged])
    return [(tokens, kept) for tokens, (_, kept) in zip(split, merged, strict=True)]


@dataclass(frozen=True)
class _Grid:
    """How the crops of an anyres image lie: the whole image, then rows of crops.

    Args:
        rows: Crops from top to bottom.
        columns: Crops from left to right.
        side: Patches along a side of a crop.
        size: Width and height of the image before it was resized and padded, in pixels.
    """

    rows: int
    columns: int
    side: int
    size: tuple[int, int]

    def valid(self, patches: int) -> Tensor:
        """[crops, N] bool, False for what the package drops as padding ("unpad")."""
        from llava.model.llava_arch import unpad_image

        height, width = self.rows * self.side, self.columns * self.side
        index = torch.arange(height * width).view(1, height, width)
        inside = torch.zeros(height * width, dtype=torch.bool)
        inside[unpad_image(index, self.size).flatten()] = True
        crops = inside.view(self.rows, self.side, self.columns, self.side).transpose(1, 2)
        whole = torch.ones(1, patches, dtype=torch.bool)
        return torch.cat([whole, crops.reshape(-1, patches)])

    def in_rows(self, crops: list[Crop], newline: Tensor | None) -> Tensor:
        """[m, D]: the whole image's tokens, the grid's row by row, its supplements.

        A newline [D], if there is one, ends every row of patches of which a token is left.
        """
        tokens = torch.cat([tokens for tokens, _ in crops[1:]])  # [m, D]
        kept = torch.cat([kept for _, kept in crops[1:]]).cpu()  # [m]
        lengths = torch.tensor([len(kept) for _, kept in crops[1:]])
        crop = torch.arange(len(lengths)).repeat_interleave(lengths)  # [m]
        row = crop // self.columns * self.side + kept // self.side  # [m]
        column = crop % self.columns * self.side + kept % self.side  # [m]
        width = self.columns * self.side + 1  # the newline's place is behind the last patch
        place = row * width + column  # [m]
        place[kept < 0] = self.rows * self.side * width  # supplements, behind all rows
        if newline is not None:
            ends = row[kept >= 0].unique() * width + width - 1
            place = torch.cat([place, ends])
            tokens = torch.cat([tokens, newline.to(tokens).expand(len(ends), -1)])
        order = place.argsort(stable=True).to(tokens.device)
        return torch.cat([crops[0][0], tokens[order]])


def _grid(model: Any, crops: int, sizes: Any, index: int) -> _Grid:
    """The grid of an image of so many crops, from the size that the caller gave."""
    from llava.mm_utils import get_anyres_image_grid_shape

    if getattr(model.config, "image_aspect_ratio", "square") != "anyres":
        raise ValueError(
            "images: expected one crop an image, because image_aspect_ratio is not 'anyres', got "
            f"{crops} of image {index}"
        )
    if sizes is None or index >= len(sizes):
        got = None if sizes is None else f"{len(sizes)} of them"
        raise ValueError(
            "image_sizes: expected (width, height) of each image, whose crops "
            f"mm_patch_merge_type={model.config.mm_patch_merge_type!r} arranges, got {got}"
        )
    width, height = map(int, sizes[index])
    tower = model.get_vision_tower()
    columns, rows = get_anyres_image_grid_shape(
        (width, height), model.config.image_grid_pinpoints, tower.config.image_size
    )
    if crops != 1 + rows * columns:
        raise ValueError(
            f"images: expected 1 + {columns} x {rows} crops of image {index} of {width} x "
            f"{height} pixels, got {crops}"
        )
    return _Grid(rows, columns, tower.num_patches_per_side, (width, height))


ADAPTER = OriginalAdapter()
