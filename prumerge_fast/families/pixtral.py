"""LLaVA in transformers with Pixtral's vision tower: images of their own sizes, row by row.

Every image is pruned on its own, over its own patches. In prompts, placeholders stand in rows as
patches do, and text tokens end them: `[IMG_BREAK]` each row but the last, `[IMG_END]` the image. A
token stays in its row, whatever `order` says, which sorts a row's tokens; a row that loses all of
its tokens loses its break. The supplement ends the last row.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from prumerge_fast.families.arguments import on_host
from prumerge_fast.families.base import ImageTokens, Views
from prumerge_fast.families.llava import LlavaAdapter, stacked
from prumerge_fast.reduction.config import PruMergeConfig
from prumerge_fast.reduction.padding import reduce_unpadded
from prumerge_fast.towers.kinds import tower_kind
from prumerge_fast.towers.pixtral import TOWER


class LlavaOrPixtralAdapter(LlavaAdapter):
    """`LlavaForConditionalGeneration`, whose towers may be Pixtral's."""

    takes_sizes = True

    def tower_options(self, model: Any, images: Mapping[str, Any]) -> dict[str, Any]:
        if not self._takes_sizes(model):
            return super().tower_options(model, images)
        sizes = images.get("image_sizes")  # rotary positions need no interpolation
        return {} if sizes is None else {"image_sizes": sizes}

    def encode_pixels(
        self,
        model: Any,
        modality: str,
        images: Mapping[str, Any],
        config: PruMergeConfig,
        backend: str,
    ) -> ImageTokens:
        if not self._takes_sizes(model):
            return super().encode_pixels(model, modality, images, config, backend)
        images = on_host(images)
        pixels = stacked(images["pixel_values"])  # [B, 3, H, W]
        tower, sizes = self.tower(model, modality), images.get("image_sizes")
        grids = torch.tensor(TOWER.grids(tower, pixels, sizes))  # [B, 2]
        reading = self.read(model, modality, pixels, images, config.scores == "received")
        present = TOWER.present(tower, pixels, sizes)  # [B, N]
        tokens, kept = zip(
            *reduce_unpadded(reading, present, config, backend, self.reduce), strict=True
        )
        lengths = list(map(len, kept))
        each = torch.arange(len(lengths)).repeat_interleave(torch.tensor(lengths))  # [R], images
        rows, columns = grids[each].T  # [R] each
        patch = torch.cat(kept).long().cpu()  # [R], in the grid of a padded image
        width = pixels.shape[-1] // TOWER.transformer(tower).patch_size
        places = (patch // width * columns + patch % width).where(patch >= 0, rows * columns - 1)
        first = (grids[:, 0].cumsum(0) - grids[:, 0])[each]  # rows are counted through all images
        order = (first + places // columns).argsort(stable=True)  # [R]
        features = torch.cat(tokens)  # [R, C]
        features = self.projected(model, features[order.to(features.device)])  # [R, D]
        return ImageTokens(
            features, lengths, grids.prod(1).tolist(), places[order], grids[:, 1].tolist()
        )

    def views(
        self,
        model: Any,
        modality: str,
        images: Mapping[str, Any],
        config: PruMergeConfig,
        backend: str,
    ) -> Views:
        images = on_host(images)
        views = super().views(model, modality, images, config, backend)
        if not self._takes_sizes(model):
            return views
        tower, sizes = self.tower(model, modality), images.get("image_sizes")
        return views._replace(valid=TOWER.present(tower, views.pixels, sizes))

    def _takes_sizes(self, model: Any) -> bool:
        return tower_kind(self.tower(model, "image")).takes_sizes


ADAPTER = LlavaOrPixtralAdapter()
