"""What the vision tower of a whole model reads, for a model of any family."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from prumerge_fast.families import adapter_for
from prumerge_fast.reduction.reading import Reading
from prumerge_fast.towers.wrappers import unwrapped


def encode(model: Any, pixel_values: Tensor) -> Reading:
    """Queries, keys and features of a whole model of a supported family, patched or not.

    Args:
        model: Any model that `patch` takes.
        pixel_values: As the model takes them; [B, 3, height, width] for LLaVA.

    Returns:
        What `reduce_patches` takes; LLaVA-NeXT has it for each crop.

    Raises:
        UnsupportedModelError: No family is known for `model`, or it is configured in a way that
            PruMerge does not work with.
    """
    model = unwrapped(model)
    return adapter_for(model).reading(model, {"pixel_values": pixel_values})
