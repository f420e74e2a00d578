"""What `get_image_features` and `get_video_features` of a patched model return in transformers 5.

Apart, because it imports transformers, which this package does only when a model is there.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor
from transformers.modeling_outputs import BaseModelOutputWithPooling


@dataclass
class PrunedFeatures(BaseModelOutputWithPooling):
    """The reduced, projected tokens of n images or videos; nothing else of the encoder is kept.

    Args:
        pooler_output: [m, D] of each.
        placeholders: [n] int64, how many placeholder tokens each has in the caller's prompt: a
            field and a tensor, so that it goes wherever the features go, through hooks and copies,
            until they come back as `mm_encoder_outputs`.
        places: [sum of m] int64, as `ImageTokens.places`.
    """

    pooler_output: list[Tensor] | None = None  # type: ignore[assignment]
    placeholders: Tensor | None = None
    places: Tensor | None = None

    def to_tuple(self) -> tuple[Any, ...]:
        """As the plain model's, with nothing but features."""
        return tuple(self[name] for name in self.keys() if name not in ("placeholders", "places"))
