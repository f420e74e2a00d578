"""Pixtral's vision tower: images of their own sizes in one sequence, rotary positions.

Images are padded to the largest of a batch, and so are their patches in what is read: each image
has the grid of the padded one, of which `present` says what is there.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from prumerge_fast.reduction.reading import Reading
from prumerge_fast.towers.encoder import EncoderTower


class PixtralTower(EncoderTower):
    """`PixtralVisionModel`."""

    class_name = "PixtralVisionModel"
    class_token = False
    takes_sizes = True
    rotary = True

    def embed(
        self, transformer: Any, pixel_values: Tensor, options: dict[str, Any]
    ) -> tuple[Tensor, dict[str, Any]]:
        # Without what records outputs around it.
        own_forward = inspect.unwrap(type(transformer).forward)
        return own_forward(_UpToLayers(transformer), pixel_values, **options)

    def first(self, tower: Any) -> nn.Module:
        return self.transformer(tower).patch_conv

    def encoder(self, transformer: Any) -> nn.Module:
        return transformer.transformer

    def layers(self, transformer: Any) -> Sequence[Any]:
        return transformer.transformer.layers

    def norm(self, layer: Any) -> nn.Module:
        return layer.attention_norm

    def attention(self, layer: Any) -> Any:
        return layer.attention

    def num_patches(self, tower: Any) -> int:
        """N of the largest image that the tower is made for."""
        config = self.transformer(tower).config
        return (config.image_size // config.patch_size) ** 2

    def make_buffers(self, tower: Any) -> None:
        transformer = self.transformer(tower)
        rotary = transformer.patch_positional_embedding
        for name, buffer in type(rotary)(transformer.config).named_buffers():
            rotary.register_buffer(name, buffer, persistent=False)

    def reading(
        self, attention: Any, query: Tensor, keys: Tensor, hidden: Tensor, beside: dict[str, Any]
    ) -> Reading:
        """Queries and keys as they are multiplied, turned; similar are those that are not."""
        from transformers.models.pixtral.modeling_pixtral import apply_rotary_pos_emb

        heads = attention.num_heads
        q, k = (one.unflatten(2, (heads, -1)).transpose(1, 2) for one in (query, keys))
        cos, sin = beside["position_embeddings"]  # [S, d] each
        turned = apply_rotary_pos_emb(q, k, cos, sin, unsqueeze_dim=0)  # [1, H, S, d] each
        query, turned_keys = (one.transpose(1, 2).flatten(2).to(hidden) for one in turned)
        return Reading(query, turned_keys, hidden, heads, self.class_token, keys)

    def read(
        self,
        tower: Any,
        pixel_values: Tensor,
        feature_layer: int | Sequence[int],
        *,
        every_query: bool = False,
        **options: Any,
    ) -> Reading:
        """As `EncoderTower.read`, of images as large as the option `image_sizes` says, or whole.

        Returns:
            R is the number of patches of a padded image; what is not `present` is zero.
        """
        there = self.present(tower, pixel_values, options.get("image_sizes")).to(
            pixel_values.device
        )  # [B, N]
        packed = super().read(
            tower, pixel_values, feature_layer, every_query=every_query, **options
        )

        def padded(values: Tensor) -> Tensor:
            """[1, S, C] to [B, N, C]"""
            whole = values.new_zeros(*there.shape, values.shape[-1])
            return whole.masked_scatter(there.to(values.device)[..., None], values)

        query, keys, hidden, _, _, similar = packed
        return packed._replace(
            query=padded(query),
            keys=padded(keys),
            hidden=padded(hidden),
            similar=None if similar is None else padded(similar),
        )

    def grids(self, tower: Any, pixel_values: Tensor, image_sizes: Any) -> list[tuple[int, int]]:
        """Rows and columns of each image's patches.

        Args:
            tower: A tower of this kind.
            pixel_values: [B, 3, height, width].
            image_sizes: Height and width of each image, [B, 2], in front of its padding; `None`:
                there is none.

        Raises:
            ValueError: They are not those of these images.
        """
        height, width = pixel_values.shape[-2:]
        side = self.transformer(tower).patch_size
        if image_sizes is None:
            return [(height // side, width // side)] * len(pixel_values)
        expected = (
            f"image_sizes: expected height and width of each of {len(pixel_values)} images, from "
            f"{side} to {height} and {width}, got"
        )
        try:
            given = torch.as_tensor(image_sizes)
        except (TypeError, ValueError, RuntimeError) as error:
            raise ValueError(f"{expected} {image_sizes!r}") from error
        sizes = given.tolist()
        whole = not (given.is_floating_point() or given.is_complex() or given.dtype == torch.bool)
        if not (
            given.shape == (len(pixel_values), 2)
            and whole
            and all(side <= h <= height and side <= w <= width for h, w in sizes)
        ):
            raise ValueError(f"{expected} {sizes}")
        return [(h // side, w // side) for h, w in sizes]

    def present(self, tower: Any, pixel_values: Tensor, image_sizes: Any) -> Tensor:
        """[B, N] bool on the CPU, which patches of the padded images are of the images."""
        side = self.transformer(tower).patch_size
        rows, columns = (torch.arange(edge // side) for edge in pixel_values.shape[-2:])
        grids = torch.tensor(self.grids(tower, pixel_values, image_sizes))[:, :, None]  # [B, 2, 1]
        inside = (rows < grids[:, 0])[:, :, None] & (columns < grids[:, 1])[:, None]
        return inside.flatten(1)


class _UpToLayers:
    """The tower to its own `forward`, in which the layers return what they are given.

    So masks, positions and what attention of other kinds takes instead are the tower's own, in
    every version.
    """

    def __init__(self, tower: Any) -> None:
        self._tower = tower

    def __getattr__(self, name: str) -> Any:
        return getattr(self._tower, name)

    def transformer(
        self,
        state: Tensor,
        output_hidden_states: object = None,
        output_attentions: object = None,
        return_dict: object = None,
        **beside: Any,
    ) -> tuple[Tensor, dict[str, Any]]:
        return state, beside


TOWER = PixtralTower()
