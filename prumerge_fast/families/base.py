"""What a model family has to say about itself; everything else is shared."""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, NamedTuple, get_args

import torch
from torch import Tensor

from prumerge_fast.reduction.config import Positions, PruMergeConfig
from prumerge_fast.reduction.output import MergedTokens
from prumerge_fast.reduction.reading import Patches, Reading, reduce_patches
from prumerge_fast.towers.wrappers import unwrapped


@dataclass(frozen=True, eq=False)
class ImageTokens:
    """The visual tokens of n images, or videos, as the language model reads them.

    Args:
        features: [sum of lengths, D], image after image.
        lengths: Number of tokens of each image.
        placeholders: Number of placeholder tokens that each image has in the caller's prompt.
        places: [sum of lengths] int64 on the CPU, the placeholder of its own image, from 0 on, that
            each token stands for: its patch's; the last of a crop's image or of a frame for what
            sums that up.
        columns: Of each image whose tokens stand in the rows that its placeholders stand in, the
            number of placeholders of a row; `None` where all stand at the image's first ones.
    """

    features: Tensor
    lengths: list[int]
    placeholders: list[int]
    places: Tensor
    columns: list[int] | None = None


class Views(NamedTuple):
    """What is pruned each on its own, as the tower read it: K images, crops or frames.

    Args:
        patches: Of each, N.
        valid: [K, N] bool; False for patches in the padding around an image, which take no part.
        pixels: [K, 3, H, W].
        grids: Rows and columns of each image's crops, which its overview comes before, 0 of one
            that is not cut; empty where images and frames are not cut.
        cells: [K, N], the patch whose place in `patches` each patch's features are part of, -1 in
            the padding: where a model joins patches before they are pruned. `None`: each its own.
    """

    patches: Patches
    valid: Tensor
    pixels: Tensor
    grids: Sequence[tuple[int, int]] = ()
    cells: Tensor | None = None


Override = Callable[[Any, Any, Callable[..., Any], tuple[Any, ...], dict[str, Any]], Any]
"""`(model, adapter, original, args, kwargs)`: a call of a method that a patched model overrides."""


def inner_model(model: Any) -> Any:
    """The part of a model of transformers that ends in hidden states; of that part, itself."""
    return unwrapped(getattr(model, "model", model))


class BaseAdapter(ABC):
    """What `patch` needs of a model family. Stateless: every method is given the model."""

    outputs: ClassVar[tuple[str, ...]] = ("shrunk",)
    """Whose length outputs can have, the default first."""

    positions: ClassVar[tuple[str, ...]] = ("compact",)
    """Which of `PruMergeConfig.positions` the language model can be given."""

    @abstractmethod
    def check(self, model: Any) -> None:
        """Raise `UnsupportedModelError`, with the reason, if PruMerge cannot work on `model`."""

    @abstractmethod
    def num_patches(self, model: Any) -> int:
        """N, the number of patch tokens that one pruning chooses from, at most."""

    @abstractmethod
    def reading(
        self, model: Any, images: Mapping[str, Any], *, every_query: bool = False
    ) -> Reading:
        """What the tower reads of these images."""

    @abstractmethod
    def has_class_token(self, model: Any) -> bool:
        """Whether its towers have one, whose attention can score patches."""

    def scores(self, model: Any) -> Literal["class", "received"]:
        """What `scores="auto"` stands for on this model."""
        return "class" if self.has_class_token(model) else "received"

    def why_scores(self, model: Any) -> str:
        """The reason for that, as half a sentence."""
        has = "has a" if self.has_class_token(model) else "has no"
        return f"its vision tower {has} class token"

    def default_config(self, model: Any) -> PruMergeConfig:
        """What `patch` starts from without options.

        Attention received is flat: images, and crops above all, may have no outlier by it. So the
        number of tokens is not left to it.
        """
        if self.scores(model) == "class":
            return PruMergeConfig()
        return PruMergeConfig(variant="prumerge+", keep=0.25)

    def resolved(self, model: Any, config: PruMergeConfig) -> PruMergeConfig:
        """`config` with the scores and heads that `"auto"` stands for on this model.

        Raises:
            ValueError: It asks for the class token's attention, and there is none.
        """
        if config.scores == "auto":
            config = config.replace(scores=self.scores(model))
        scoring = config.scoring(class_token=self.has_class_token(model))
        return config.replace(heads="separate" if scoring.separate else "joint")

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
    positions: ClassVar[tuple[str, ...]] = get_args(Positions)

    image_arguments: ClassVar[tuple[str, ...]]
    """Names of those arguments."""

    pixels: ClassVar[dict[str, str]] = {"image": "pixel_values"}
    """For each modality of the family, the argument that holds its pixels."""

    prunes_projected: ClassVar[bool] = False
    """Whether patches are pruned behind the projector, not in front of it."""

    reduce: Callable[[Patches, PruMergeConfig, str], MergedTokens] = staticmethod(reduce_patches)
    """What reduces patches, called as `reduce_patches` is; `reading_once` gives a copy with
    another."""

    @abstractmethod
    def tower(self, model: Any, modality: str) -> Any:
        """The vision tower of a modality."""

    def pieces(self, model: Any, modality: str, placeholders: int) -> int:
        """How many pictures, as `ImageTokens` counts them, so many placeholders of a prompt's only
        picture are: one, but where the model does not tell tiles of an image from images."""
        return int(placeholders > 0)

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
    ) -> Reading:
        """What the tower reads of K images, crops or frames [K, 3, height, width].

        Queries are those of the class token alone, or those of all patches (`every_query`).
        """

    @abstractmethod
    def views(
        self,
        model: Any,
        modality: str,
        images: Mapping[str, Any],
        config: PruMergeConfig,
        backend: str,
    ) -> Views:
        """What is pruned each on its own of these images or videos, as `config` scores it."""

    def reading_once(
        self, reduce: Callable[[Patches, PruMergeConfig, str], MergedTokens] | None = None
    ) -> Adapter:
        """A copy for one batch, whose towers it runs once however often that is encoded.

        Twice where some configs ask for all queries and some do not.

        Args:
            reduce: What reduces patches in it; `None`: as here.
        """
        other, found = copy.copy(self), dict[tuple[str, bool], Reading]()

        def read(
            model: Any, modality: str, pixels: Tensor, images: Any, every_query: bool
        ) -> Reading:
            key = modality, every_query
            if key not in found:
                found[key] = self.read(model, modality, pixels, images, every_query)
            return found[key]

        other.read = read  # type: ignore[method-assign, assignment]
        if reduce is not None:
            other.reduce = reduce
        return other
