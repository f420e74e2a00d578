"""Checks the sizes in a configuration before they are computed with."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from prumerge_fast.errors import UnsupportedModelError

_WIDTHS = ("hidden_size", "intermediate_size", "num_attention_heads", "num_hidden_layers")
_SIZES = {
    "vision_config": (*_WIDTHS, "image_size", "patch_size", "num_channels"),
    "text_config": (*_WIDTHS, "vocab_size"),
}


def check_sizes(config: Any, *parts: str) -> None:
    """Raise `UnsupportedModelError` if a size in these parts of a configuration cannot be one."""
    for part in parts:
        for name in _SIZES[part]:
            size = getattr(getattr(config, part), name, 1)
            if any(not isinstance(edge, int) or edge < 1 for edge in _edges(config, size)):
                raise UnsupportedModelError(
                    f"{part}.{name}: expected a whole number >= 1, got {size!r}"
                )
    image, patch = (getattr(config.vision_config, name, 1) for name in ("image_size", "patch_size"))
    if min(_edges(config, image)) < max(_edges(config, patch)):
        raise UnsupportedModelError(
            f"vision_config.image_size: expected at least patch_size, {patch}, got {image}"
        )


def _edges(config: Any, size: Any) -> Sequence[Any]:
    """Height and width, where the tower is given both: InternViT."""
    pairs = config.vision_config.model_type == "internvl_vision"
    return size if pairs and isinstance(size, (list, tuple)) and size else [size]
