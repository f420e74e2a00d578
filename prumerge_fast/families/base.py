"""What a model family has to say about itself; everything else is shared."""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor

from prumerge_fast.reduction.config import PruMergeConfig
from prumerge_fast.reduction.dispatch import prune_merge
from prumerge_fast.reduction.output import MergedTokens
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


class Views(NamedTuple):
    """What is pruned each on its own, as the tower read it: K images, crops or frames.

    Args:
        query: [K, C] of the class token, or [K, 1+n, C] of all patches.
        keys: [K, 1+n, C], the class token's first.
        hidden: [K, 1+n, S * C].
        valid: [K, n] bool; False for patches in the padding around an image, which take no part.
        pixels: [K, 3, H, W].
        grids: Rows and columns of each image's crops, which its overview comes before; empty where
            images and frames are not cut.
    """

    query: Tensor
    keys: Tensor
    hidden: Tensor
    valid: Tensor
    pixels: Tensor
    grids: Sequence[tuple[int, int]] = ()


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

    reduce: Callable[..., MergedTokens] = staticmethod(prune_merge)
    """What reduces patches, called as `prune_merge` is; `reading_once` gives a copy with another.
    """

    @abstractmethod
    def tower(self, model: Any, modality: str) -> Any:
        """The vision tower of a modality."""

    def pooling(self, model: Any) -> Any:
        """The module that pools the tower's features before they are pruned; `None` for none."""
        return None

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

    @abstractmethod
    def read(
        self,
        model: Any,
        modality: str,
        pixel_values: Tensor,
        images: Mapping[str, Any],
        every_query: bool,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """The arguments of `prune_merge` for K images, crops or frames [K, 3, height, width].

        Queries are those of the class token alone, or those of all patches (`every_query`).
        """

    @abstractmethod
    def num_heads(self, model: Any, modality: str) -> int:
        """Heads of the layer that queries and keys are of."""

    @abstractmethod
    def views(
        self, model: Any, modality: str, images: Mapping[str, Any], every_query: bool = False
    ) -> Views:
        """What is pruned each on its own of these images or videos."""

    def reading_once(self, reduce: Callable[..., MergedTokens] | None = None) -> Adapter:
        """A copy for one batch, whose towers it runs once however often that is encoded.

        Twice where some configs ask for all queries and some do not.

        Args:
            reduce: What reduces patches in it; `None`: as here.
        """
        other, found = copy.copy(self), dict[tuple[str, bool], tuple[Tensor, Tensor, Tensor]]()

        def read(
            model: Any, modality: str, pixels: Tensor, images: Any, every_query: bool
        ) -> tuple[Tensor, Tensor, Tensor]:
            key = modality, every_query
            if key not in found:
                found[key] = self.read(model, modality, pixels, images, every_query)
            return found[key]

        other.read = read  # type: ignore[method-assign, assignment]
        if reduce is not None:
            other.reduce = reduce
        return other
