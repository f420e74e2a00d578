"""What a model family has to say about itself; everything else is shared."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from prumerge_fast.reduction.config import PruMergeConfig
from prumerge_fast.towers.wrappers import unwrapped


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


Override = Callable[[Any, Any, Callable[..., Any], tuple[Any, ...], dict[str, Any]], Any]
"""`(model, adapter, original, args, kwargs)`: a call of a method that a patched model overrides."""


def inner_model(model: Any) -> Any:
    """The part of a model of transformers that ends in hidden states; of that part, itself."""
    return unwrapped(getattr(model, "model", model))


class BaseAdapter(ABC):
    """What `patch` needs of a model family. Stateless: every method is given the model."""

    outputs: ClassVar[tuple[str, ...]] = ("shrunk",)
    """Whose length outputs can have, the default first."""

    @abstractmethod
    def check(self, model: Any) -> None:
        """Raise `UnsupportedModelError`, with the reason, if PruMerge cannot work on `model`."""

    @abstractmethod
    def num_patches(self, model: Any) -> int:
        """N, the number of patch tokens that one pruning chooses from, at most."""

    @abstractmethod
    def query_keys_hidden(
        self, model: Any, images: Mapping[str, Any]
    ) -> tuple[Tensor, Tensor, Tensor]:
        """The arguments of `prune_merge` for these images."""

    def overrides(self, model_class: type) -> Mapping[str, Override]:
        """Methods that a patched model of this family alone has otherwise, by name."""
        return {}

    def device(self, model: Any) -> torch.device:
        """Where the images are encoded; of offloaded weights, where accelerate brings them."""
        if model.device.type != "meta":
            return model.device
        hooks = (getattr(module, "_hf_hook", None) for module in model.modules())
        devices = (getattr(hook, "execution_device", None) for hook in hooks)
        return next((torch.device(d) for d in devices if d is not None), model.device)


class Adapter(BaseAdapter):
    """A family in transformers, whose prompts hold as many placeholders as there are features.

    Methods take the whole model or the inner one, and the arguments of its `forward` that describe
    images and videos, by name (`images`). A modality is `"image"` or `"video"`.
    """

    outputs: ClassVar[tuple[str, ...]] = ("caller", "shrunk")

    image_arguments: ClassVar[tuple[str, ...]]
    """Names of those arguments."""

    pixels: ClassVar[dict[str, str]] = {"image": "pixel_values"}
    """For each modality of the family, the argument that holds its pixels."""

    @abstractmethod
    def placeholder_id(self, model: Any, modality: str) -> int:
        """Id of the placeholder token in prompts."""

    def renamed(self, images: dict[str, Any]) -> dict[str, Any]:
        """These arguments, as `pixels` names them in every version of transformers."""
        return images

    @abstractmethod
    def has_images(self, images: Mapping[str, Any]) -> bool:
        """Whether these arguments hold any image or video."""

    @abstractmethod
    def encode(
        self, model: Any, images: Mapping[str, Any], config: PruMergeConfig, backend: str
    ) -> dict[str, ImageTokens]:
        """Encode, prune, merge and project what is given, by modality."""
