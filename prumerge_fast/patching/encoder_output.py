"""What `get_image_features` and `get_video_features` of a patched model return in transformers 5.

Apart, because it imports transformers, which this package does only when a model is there.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers.modeling_outputs import BaseModelOutputWithPooling

from prumerge_fast.families.base import ImageTokens


@dataclass
class PrunedFeatures(BaseModelOutputWithPooling):
    """The reduced, projected tokens of n images or videos; nothing else of the encoder is kept.

    Args:
        pooler_output: [m, D] of each.
        placeholders: [n] int64, how many placeholder tokens each has in the caller's prompt: a
            field and a tensor, so that it goes wherever the features go, through hooks and copies,
            until they come back as `mm_encoder_outputs`.
        places: [sum of m] int64, as `ImageTokens.places`.
        columns: [n] int64, as `ImageTokens.columns`.
    """

    pooler_output: list[Tensor] | None = None  # type: ignore[assignment]
    placeholders: Tensor | None = None
    places: Tensor | None = None
    columns: Tensor | None = None

    def to_tuple(self) -> tuple[Any, ...]:
        """As the plain model's, with nothing but features."""
        ours = ("placeholders", "places", "columns")
        return tuple(self[name] for name in self.keys() if name not in ours)


def pruned_features(tokens: ImageTokens) -> PrunedFeatures:
    """These tokens as a patched model returns them, and takes them as `mm_encoder_outputs`."""
    device = tokens.features.device
    columns = tokens.columns
    return PrunedFeatures(
        pooler_output=list(tokens.features.split(tokens.lengths)) if tokens.lengths else [],
        placeholders=torch.tensor(tokens.placeholders, dtype=torch.int64, device=device),
        places=tokens.places.to(device),
        columns=None if columns is None else torch.tensor(columns, device=device),
    )
