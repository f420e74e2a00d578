"""InternVL in transformers: `InternVLForConditionalGeneration`, an image as several tiles.

The model joins each square of four patches to one feature (pixel shuffle) and projects that; tiles,
and frames of videos, which come as images, are pruned after that, because the projector is not
linear. A group's attention and keys are the means of its patches'.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

from torch import Tensor

from prumerge_fast.errors import UnsupportedModelError
from prumerge_fast.families.base import inner_model
from prumerge_fast.families.llava import LlavaAdapter
from prumerge_fast.reduction.config import PruMergeConfig
from prumerge_fast.reduction.reading import Patches, Reading, Scored
from prumerge_fast.versions import is_4


class InternVLAdapter(LlavaAdapter):
    """As LLaVA, with `pixel_shuffle`."""

    prunes_projected = True

    def check(self, model: Any) -> None:
        super().check(model)
        _check_layer(model.config.vision_feature_layer)

    def num_patches(self, model: Any) -> int:
        """Groups of patches of a tile."""
        return int(super().num_patches(model) * model.config.downsample_ratio**2)

    def pieces(self, model: Any, modality: str, placeholders: int) -> int:
        return placeholders // self.num_patches(model)

    def scores(self, model: Any) -> Literal["class", "received"]:
        """The attention of its class token is reported to be worse than chance."""
        return "received"

    def why_scores(self, model: Any) -> str:
        return "its class token's attention is reported to be worse than chance"

    def tower_options(self, model: Any, images: Mapping[str, Any]) -> dict[str, Any]:
        return {}  # it interpolates its positions whenever that is needed

    def read(
        self,
        model: Any,
        modality: str,
        pixel_values: Tensor,
        images: Mapping[str, Any],
        every_query: bool,
    ) -> Reading:
        """Of pixels of any dtype, as the model takes them."""
        layer = images.get("vision_feature_layer")
        if layer is not None:
            _check_layer(layer)
        pixel_values = pixel_values.to(inner_model(model).dtype)
        return super().read(model, modality, pixel_values, images, every_query)

    def pooled(
        self, model: Any, modality: str, reading: Reading, config: PruMergeConfig, backend: str
    ) -> Patches:
        """Groups of patches: projected, and the means of attention and keys."""
        inner, channels = inner_model(model), reading.keys.shape[-1]
        projected = inner.multi_modal_projector(_shuffled(model, reading.features))  # [K, n, D]
        attention, keys, _ = reading.scored(config, backend)
        return Scored(
            _shuffled(model, attention[..., None]).mean(-1),  # [K, n]
            _shuffled(model, keys).unflatten(-1, (-1, channels)).mean(-2),  # [K, n, C]
            projected,
        )


def _check_layer(layer: object) -> None:
    """Raise `UnsupportedModelError` unless the model itself reads this feature layer."""
    if not isinstance(layer, int):
        raise UnsupportedModelError(f"vision_feature_layer: expected one int, got {layer!r}")
    if is_4() and layer != -1:
        raise UnsupportedModelError(
            "vision_feature_layer: expected -1, the one that InternVL of transformers 4 reads, got "
            f"{layer}"
        )


def _shuffled(model: Any, values: Tensor) -> Tensor:
    """[K, N, C] of a square of patches, group by group as the model joins them: [K, n, C * N/n]."""
    side = int(values.shape[1] ** 0.5)
    grid = values.reshape(len(values), side, side, -1)
    grid = inner_model(model).pixel_shuffle(grid, scale_factor=model.config.downsample_ratio)
    return grid.reshape(len(values), -1, grid.shape[-1])


ADAPTER = InternVLAdapter()
