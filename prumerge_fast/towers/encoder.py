"""Runs a vision tower up to its features, with the queries and keys that say how patches matter.

They are of the layer that *reads* the features (the last one, for LLaVA's feature layer -2), of
which nothing else is run: its attention, values, output projection and MLP change nothing in the
features. Where no layer reads them (feature layer -1), they are of the layer that *writes* them,
caught as they pass.

A kind of tower is one small class that says where its parts are.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from prumerge_fast.errors import UnsupportedModelError
from prumerge_fast.reduction.reading import Reading
from prumerge_fast.towers.weights import brought, check_whole
from prumerge_fast.towers.wrappers import unwrapped, wrapping
from prumerge_fast.versions import run_encoder_layer, vision_transformer


class EncoderTower(ABC):
    """A tower of transformers: embeddings, then layers that normalise what they read.

    Stateless: every method is given the tower, or what PEFT or `torch.compile` put around it.
    """

    class_name: ClassVar[str]
    """Of the towers of this kind."""

    class_token: ClassVar[bool]
    """Whether row 0 of the features is one."""

    takes_sizes: ClassVar[bool] = False
    """Whether images have sizes of their own, as an option of its `forward`."""

    multiplied: ClassVar[tuple[str, str]] = ("q_proj", "k_proj")
    """Modules of a layer's attention that give queries and keys as they are multiplied."""

    rotary: ClassVar[bool] = False
    """Whether layers turn queries and keys by positions that they are given."""

    @abstractmethod
    def embed(
        self, transformer: Any, pixel_values: Tensor, options: dict[str, Any]
    ) -> tuple[Tensor, dict[str, Any]]:
        """What the first layer reads, [B, R, C], and what all layers are given beside it."""

    def first(self, tower: Any) -> nn.Module:
        """The module that is called before all others."""
        return self.transformer(tower).embeddings

    def encoder(self, transformer: Any) -> nn.Module:
        """The module of the layers, which runs in a tower that runs as a whole."""
        return transformer.encoder

    def layers(self, transformer: Any) -> Sequence[Any]:
        return transformer.encoder.layers

    def norm(self, layer: Any) -> nn.Module:
        """What a layer's attention reads through."""
        return layer.layer_norm1

    def attention(self, layer: Any) -> Any:
        """The module with `q_proj` and `k_proj`."""
        return layer.self_attn

    def project(self, attention: Any, asking: Tensor, normed: Tensor) -> tuple[Tensor, Tensor]:
        """Queries and keys, as `multiplied` gives them, of what the norm makes of tokens."""
        keys = attention.k_proj(normed)
        return attention.q_proj(asking), keys

    def finish(self, transformer: Any, feature_layer: object) -> nn.Module | None:
        """What the last layer's output goes through before it is features, if anything."""
        return None

    def whole(
        self, tower: Any, pixel_values: Tensor, feature_layer: object, options: dict[str, Any]
    ) -> Mapping[int, Tensor]:
        """What `read` finds by index where the tower runs as a whole: its `hidden_states`."""
        outputs = tower(pixel_values, output_hidden_states=True, **options)
        return dict(enumerate(outputs.hidden_states))

    def reading(
        self, attention: Any, query: Tensor, keys: Tensor, hidden: Tensor, beside: dict[str, Any]
    ) -> Reading:
        """What a layer's queries and keys say of the images.

        Args:
            attention: The layer's.
            query: [B, C] or [B, R, C].
            keys: [B, R, C].
            hidden: [B, R, D], the features.
            beside: What all layers are given; nothing unless the tower is `rotary`.
        """
        return Reading(query, keys, hidden, attention.num_heads, self.class_token)

    def transformer(self, tower: Any) -> Any:
        """The module with the embeddings, inside all that is around it."""
        return vision_transformer(unwrapped(tower))

    def make_buffers(self, tower: Any) -> None:
        """Makes what no checkpoint holds, in place, of a tower from the meta device."""
        for module in self.transformer(tower).modules():
            for name, buffer in module.named_buffers(recurse=False):
                if buffer.is_meta and name == "position_ids":
                    places = torch.arange(buffer.shape[-1])[None]
                    module.register_buffer(name, places, persistent=False)

    def num_patches(self, tower: Any) -> int:
        """N, the patch tokens of an image of the tower's own size, without a class token."""
        return self.transformer(tower).embeddings.num_patches

    def last(self, tower: Any, feature_layer: object) -> Sequence[nn.Module]:
        """The modules that end what `read` runs, whichever comes last."""
        index, layers = self.deepest(tower, feature_layer), self.layers(self.transformer(tower))
        if index == len(layers):
            return [self.finish(self.transformer(tower), feature_layer) or layers[-1]]
        attention = self.attention(layers[index])
        return [getattr(attention, name) for name in self.multiplied]

    def deepest(self, tower: Any, feature_layer: object) -> int:
        """The highest index 0 .. L into the `hidden_states` of a tower of L layers.

        Args:
            tower: A tower of this kind.
            feature_layer: `vision_feature_layer` as transformers counts it: 0 is the output of the
                embeddings, -1 that of the last layer. One or several.

        Raises:
            UnsupportedModelError: It is no int or list of ints, or out of range.
        """
        return max(self._indices(tower, feature_layer))

    def _indices(self, tower: Any, feature_layer: object) -> list[int]:
        layers, name = len(self.layers(self.transformer(tower))), "vision_feature_layer"
        if not isinstance(feature_layer, (list, tuple)):
            return [layer_index(layers, feature_layer, name)]
        if not feature_layer:
            raise UnsupportedModelError(
                f"{name}: expected an int or several, got {feature_layer!r}"
            )
        return [layer_index(layers, one, f"{name}[{i}]") for i, one in enumerate(feature_layer)]

    def read(
        self,
        tower: Any,
        pixel_values: Tensor,
        feature_layer: int | Sequence[int],
        *,
        every_query: bool = False,
        **options: Any,
    ) -> Reading:
        """Features of the images, and the query and keys that score and join them.

        Modules are called, never their weights, so that LoRA, quantised and offloaded layers work.
        A tower with hooks on it, or on its encoder, runs as a whole, so that they see what they
        would.

        Args:
            tower: A tower of this kind and of width C.
            pixel_values: [B, 3, height, width].
            feature_layer: See `deepest`.
            every_query: Those of the patches too; always of a tower without a class token.
            options: Of the tower's own `forward`.

        Returns:
            query [B, C] of the class token, or [B, R, C] with `every_query`; keys [B, R, C]; and
            hidden [B, R, C], which equals `hidden_states[feature_layer]` of the tower, or what the
            tower makes of the last; all in the dtype of hidden. With S feature layers, hidden
            [B, R, S * C] has them side by side in the order given, and query and keys are those of
            the deepest.

        Raises:
            UnsupportedModelError: There is no such feature layer, or the tower's weights are
                offloaded together with a module around it, or sharded layer by layer.
            ValueError: The images have the wrong size.
        """
        indices = self._indices(tower, feature_layer)
        transformer, deepest = self.transformer(tower), max(indices)
        layers = self.layers(transformer)
        at = min(deepest, len(layers) - 1)  # the layer that reads them, or else the last
        norm, attention = self.norm(layers[at]), self.attention(layers[at])
        parts = [norm, attention.q_proj, attention.k_proj]
        parts += [getattr(attention, name) for name in self.multiplied]
        around, inside = [tower, transformer, self.encoder(transformer)], [layers[at], attention]
        states = None
        beside: dict[str, Any] = {}
        caught: dict[str, Tensor] = {}
        with ExitStack() as stack:
            if at < deepest and not torch.compiler.is_compiling():
                for name in self.multiplied:
                    stack.enter_context(_catching(attention, name, caught))
            if self._is_watched(tower):
                if self.rotary:
                    stack.enter_context(_catching_arguments(layers[at], beside))
                states = self.whole(tower, pixel_values, feature_layer, options)
            stack.enter_context(brought(around))
            if at == deepest:  # before there is work
                stack.enter_context(brought(inside))
                check_whole([*around, *inside], parts, f"layer {at}")
            else:
                check_whole(around, [layers[at]], f"layer {at}")
            if states is None:
                state, beside = self.embed(transformer, pixel_values, options)
                states = self._states(transformer, state, beside, {*indices, at})
                finish = self.finish(transformer, feature_layer)
                if at < deepest and finish is not None:
                    check_whole(around, [finish], "what follows the last layer")
                    states[deepest] = finish(states[deepest])
            elif self.rotary and not beside:  # as where what was compiled calls no hooks
                _, beside = self.embed(transformer, pixel_values, options)
            if caught:
                query, keys = (caught[name] for name in self.multiplied)  # [B, R, C]
                if self.class_token and not every_query:
                    query = query[:, 0]  # [B, C]
            else:  # not called, or called by what computes them again, or calls no hooks
                if at < deepest:
                    stack.enter_context(brought(inside))
                    check_whole([*around, *inside], parts, f"layer {at}")
                normed = norm(states[at])  # [B, R, C]
                asking = normed if every_query or not self.class_token else normed[:, 0]
                query, keys = self.project(attention, asking, normed)  # [B, C] or [B, R, C]
        hidden = torch.cat([states[index] for index in indices], dim=-1)  # [B, R, S * C]
        # Under autocast, projections come out in half precision and the residual stream does not.
        return self.reading(attention, query.to(hidden), keys.to(hidden), hidden, beside)

    def _states(
        self, transformer: Any, state: Tensor, beside: dict[str, Any], indices: set[int]
    ) -> dict[int, Tensor]:
        """Those of the tower's `hidden_states`, each [B, R, C], by index; nothing beyond is run."""
        states = {0: state}
        for index, layer in enumerate(self.layers(transformer)[: max(indices)], start=1):
            state = run_encoder_layer(layer, state, **beside)
            if index in indices:
                states[index] = state
        return states

    def _is_watched(self, tower: Any) -> bool:
        """Whether there are hooks on modules that only a tower run as a whole calls."""
        transformer = self.transformer(tower)
        return any(
            module._forward_hooks or module._forward_pre_hooks
            for module in (*wrapping(tower), transformer, self.encoder(transformer))
        )


def layer_index(layers: int, feature_layer: object, name: str) -> int:
    """The index 0 .. L of a feature layer in a tower of L layers; errors call the option `name`.

    Raises:
        UnsupportedModelError: It is no int, or out of range.
    """
    expected = f"{name}: expected one int"
    if isinstance(feature_layer, bool) or not isinstance(feature_layer, int):
        raise UnsupportedModelError(f"{expected}, got {feature_layer!r}")
    index = feature_layer if feature_layer >= 0 else layers + 1 + feature_layer
    if not 0 <= index <= layers:
        raise UnsupportedModelError(
            f"{expected} from {-layers - 1} to {layers}, for a tower of {layers} layers, got "
            f"{feature_layer}"
        )
    return index


def _catching(attention: Any, name: str, caught: dict[str, Tensor]) -> Any:
    """Notes what the projection of that name returns, for as long as it is entered.

    But not what comes without its gradient, where there is to be one: reentrant checkpointing runs
    layers without, and again for it.
    """
    wants_gradient = torch.is_grad_enabled()

    def hook(_module: object, _args: object, output: Tensor) -> None:
        if torch.is_grad_enabled() or not wants_gradient:
            caught[name] = output

    return getattr(attention, name).register_forward_hook(hook)


def _catching_arguments(layer: nn.Module, caught: dict[str, Any]) -> Any:
    """Notes what a layer is given by name, for as long as it is entered."""

    def hook(_module: object, _args: object, arguments: dict[str, Any]) -> None:
        caught.update(arguments)

    return layer.register_forward_pre_hook(hook, with_kwargs=True)
