"""InternVL's vision tower, InternViT: queries and keys that may be normalised, a class token."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from prumerge_fast.towers.encoder import EncoderTower
from prumerge_fast.versions import is_4


class InternVitTower(EncoderTower):
    """`InternVLVisionModel`."""

    class_name = "InternVLVisionModel"
    class_token = True
    multiplied = ("q_norm", "k_norm")

    def embed(
        self, transformer: Any, pixel_values: Tensor, options: dict[str, Any]
    ) -> tuple[Tensor, dict[str, Any]]:
        state = transformer.embeddings(pixel_values, **options)
        return (state[0] if isinstance(state, tuple) else state), {}  # 4.x: with the grid

    def layers(self, transformer: Any) -> Sequence[Any]:
        return transformer.encoder.layer

    def norm(self, layer: Any) -> nn.Module:
        return layer.layernorm_before

    def attention(self, layer: Any) -> Any:
        return layer.attention

    def project(self, attention: Any, asking: Tensor, normed: Tensor) -> tuple[Tensor, Tensor]:
        query, keys = super().project(attention, asking, normed)
        return attention.q_norm(query), attention.k_norm(keys)

    def finish(self, transformer: Any, feature_layer: object) -> nn.Module | None:
        """For -1, which the model takes as what the tower returns; L is the last layer's output."""
        return transformer.layernorm if feature_layer == -1 else None

    def whole(
        self, tower: Any, pixel_values: Tensor, feature_layer: object, options: dict[str, Any]
    ) -> Mapping[int, Tensor]:
        """4.x has none of the states between layers; its model reads the last one only."""
        if is_4():
            last = tower(pixel_values, **options).last_hidden_state
            return {len(self.layers(self.transformer(tower))): last}
        outputs = tower(pixel_values, output_hidden_states=True, **options)
        states = dict(enumerate(outputs.hidden_states))
        if feature_layer == -1:
            states[len(states) - 1] = outputs.last_hidden_state
        return states

    def num_patches(self, tower: Any) -> int:
        return self.transformer(tower).embeddings.patch_embeddings.num_patches


TOWER = InternVitTower()
