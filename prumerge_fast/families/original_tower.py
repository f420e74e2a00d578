"""`CLIPVisionTower` of the original LLaVA package (llava-torch 1.2.2), alone or in a model."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from prumerge_fast.errors import UnsupportedModelError
from prumerge_fast.families.arguments import named_arguments
from prumerge_fast.families.base import BaseAdapter, Override
from prumerge_fast.reduction.reading import Reading, reduce_patches
from prumerge_fast.towers.encoder import layer_index
from prumerge_fast.towers.kinds import tower_kind, unknown
from prumerge_fast.towers.wrappers import class_names, unwrapped


class OriginalTowerAdapter(BaseAdapter):
    """The tower alone: its `forward` returns the reduced features, not projected.

    A list of images gives a list of [1, m, C], as without the patch. A tensor [B, 3, S, S] gives
    [B, m, C], which takes one m: a `keep`, or one image.
    """

    def check(self, model: Any) -> None:
        if "CLIPVisionTower" not in class_names(model):
            raise UnsupportedModelError(
                f"vision tower: expected a CLIPVisionTower, got {unknown(model)}"
            )
        owner = next(cls for cls in type(model).__mro__ if "forward" in vars(cls))
        if owner.__name__ != "CLIPVisionTower":  # such as CLIPVisionTowerS2, of several scales
            raise UnsupportedModelError(
                "vision tower: expected the features of CLIPVisionTower, got a "
                f"{owner.__name__}, whose forward computes others"
            )
        if model.is_loaded and not tower_kind(model.vision_tower).class_token:
            raise UnsupportedModelError(
                "vision tower: expected a CLIPVisionModel in the CLIPVisionTower, got "
                f"{unwrapped(model.vision_tower).__class__.__name__}"
            )
        layer_index(model.config.num_hidden_layers, model.select_layer, "mm_vision_select_layer")
        if model.select_feature != "patch":
            raise UnsupportedModelError(
                "mm_vision_select_feature: expected 'patch' (patch tokens without the class "
                f"token), got {model.select_feature!r}"
            )

    def num_patches(self, model: Any) -> int:
        return model.num_patches

    def device(self, model: Any) -> torch.device:
        return model.device if model.is_loaded else torch.device("cpu")  # where loading puts it

    def has_class_token(self, model: Any) -> bool:
        return True

    def reading(
        self, model: Any, images: Mapping[str, Any], *, every_query: bool = False
    ) -> Reading:
        pixels, size = images["pixel_values"], model.config.image_size
        shape = (model.config.num_channels, size, size)
        if not isinstance(pixels, Tensor) or pixels.ndim != 4 or pixels.shape[1:] != shape:
            got = list(pixels.shape) if isinstance(pixels, Tensor) else type(pixels).__name__
            raise ValueError(
                f"images: expected tensors [B, {', '.join(map(str, shape))}] for this vision "
                f"tower, got {got}"
            )
        with torch.no_grad():  # as the tower's own forward
            return tower_kind(model.vision_tower).read(
                model.vision_tower,
                pixels.to(model.device, model.dtype),
                model.select_layer,
                every_query=every_query,
            )

    def overrides(self, model_class: type) -> Mapping[str, Override]:
        return {"forward": _forward}


def _forward(
    tower: Any,
    adapter: OriginalTowerAdapter,
    original: Callable[..., Any],
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
) -> Tensor | list[Tensor]:
    images = named_arguments(original, *args, **kwargs)["images"]
    listed = isinstance(images, list)
    if listed and not images:
        return []
    pixels = torch.stack(images) if listed else images  # [B, 3, S, S]
    state = tower.prumerge
    config = adapter.resolved(tower, state.config)
    reading = adapter.reading(
        tower, {"pixel_values": pixels}, every_query=config.scores == "received"
    )
    merged = reduce_patches(reading, config, state.backend)
    state.last_lengths = tuple(merged.lengths.tolist())
    features = [
        tokens[None].to(image.dtype) for tokens, image in zip(merged.split(), images, strict=True)
    ]  # B of [1, m, C]
    if listed:
        return features
    if len(set(state.last_lengths)) > 1:
        raise ValueError(
            "images: expected a list, one image, or keep=n, because these images keep "
            f"{', '.join(map(str, state.last_lengths))} tokens, which no one tensor [B, m, C] "
            "holds; a patched LLaVA takes any batch"
        )
    return torch.cat(features)


ADAPTER = OriginalTowerAdapter()
