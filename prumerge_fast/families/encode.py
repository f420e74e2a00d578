"""What `prune_merge` takes, from a whole model of any family."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from prumerge_fast.families import adapter_for
from prumerge_fast.towers.wrappers import unwrapped


def encode(model: Any, pixel_values: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Queries, keys and features of a whole model of a supported family, patched or not.

    Args:
        model: Any model that `patch` takes.
        pixel_values: As the model takes them; [B, 3, height, width] for LLaVA.

    Returns:
        query [B, C], keys [B, 1+N, C] and hidden [B, 1+N, S * C], the arguments of
        `prune_merge`; LLaVA-NeXT has them for each crop.

    Raises:
        UnsupportedModelError: No family is known for `model`, or it is configured in a way that
            PruMerge does not work with.
    """
    model = unwrapped(model)
    return adapter_for(model).query_keys_hidden(model, {"pixel_values": pixel_values})
