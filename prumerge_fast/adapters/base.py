"""What a model family has to say about itself; everything else is shared."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor

from prumerge_fast.config import PruMergeConfig

PLACEHOLDERS_ATTRIBUTE = "_prumerge_placeholders"
"""On encoded images: how many placeholders each had before it was pruned."""


@dataclass(frozen=True, eq=False)
class ImageTokens:
    """The visual tokens of n images, or videos, as the language model reads them.

    Args:
        features: [sum of lengths, D], image after image.
        lengths: Number of tokens of each image.
        placeholders: Number of placeholder tokens that each image has in the caller's prompt.
    """

    features: Tensor
    lengths: list[int]
    placeholders: list[int]


class Adapter(ABC):
    """One model family. Stateless: every method is given the model.

    Methods take the arguments of the model's `forward` that describe images and videos, by name
    (`images`). A modality is `"image"` or `"video"`.
    """

    image_arguments: ClassVar[tuple[str, ...]]
    """Names of those arguments."""

    pixels: ClassVar[dict[str, str]] = {"image": "pixel_values"}
    """For each modality of the family, the argument that holds its pixels."""

    @abstractmethod
    def check(self, model: Any) -> None:
        """Raise `UnsupportedModelError`, with the reason, if PruMerge cannot work on `model`."""

    @abstractmethod
    def num_patches(self, model: Any) -> int:
        """N, the number of patch tokens that one pruning chooses from, at most."""

    @abstractmethod
    def placeholder_id(self, model: Any, modality: str) -> int:
        """Id of the placeholder token in prompts."""

    @abstractmethod
    def has_images(self, images: Mapping[str, Any]) -> bool:
        """Whether these arguments hold any image or video."""

    @abstractmethod
    def query_keys_hidden(
        self, model: Any, images: Mapping[str, Any]
    ) -> tuple[Tensor, Tensor, Tensor]:
        """The arguments of `prune_merge` for these images."""

    @abstractmethod
    def encode(
        self, model: Any, images: Mapping[str, Any], config: PruMergeConfig, backend: str
    ) -> dict[str, ImageTokens]:
        """Encode, prune, merge and project what is given, by modality."""
