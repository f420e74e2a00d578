"""CLIP's vision tower, by whose class token LLaVA-PruMerge scores patches (arXiv 2403.15388)."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from prumerge_fast.towers.encoder import EncoderTower
from prumerge_fast.versions import clip_layer_masks


class ClipTower(EncoderTower):
    """`CLIPVisionModel`."""

    class_name = "CLIPVisionModel"
    class_token = True

    def embed(
        self, transformer: Any, pixel_values: Tensor, options: dict[str, Any]
    ) -> tuple[Tensor, dict[str, Any]]:
        state = transformer.pre_layrnorm(transformer.embeddings(pixel_values, **options))
        return state, clip_layer_masks()


TOWER = ClipTower()
