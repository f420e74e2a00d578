"""SigLIP's vision tower, that of SigLIP 2 at a fixed resolution too: no class token."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from prumerge_fast.towers.encoder import EncoderTower


class SiglipTower(EncoderTower):
    """`SiglipVisionModel`."""

    class_name = "SiglipVisionModel"
    class_token = False

    def embed(
        self, transformer: Any, pixel_values: Tensor, options: dict[str, Any]
    ) -> tuple[Tensor, dict[str, Any]]:
        side, patch = transformer.config.image_size, transformer.config.patch_size
        height, width = pixel_values.shape[-2:]
        patches = (height // patch) * (width // patch)
        if patches != (side // patch) ** 2 and not options.get("interpolate_pos_encoding"):
            raise ValueError(  # of what PyTorch would call tensors that do not match
                f"pixel_values: expected the size of this vision tower, {side}*{side}, or "
                f"interpolate_pos_encoding=True, got {height}*{width}"
            )
        return transformer.embeddings(pixel_values, **options), {"attention_mask": None}


TOWER = SiglipTower()
