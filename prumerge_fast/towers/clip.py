"""Runs a CLIP vision tower up to the feature layer, and of the layer that reads it only Q and K.

LLaVA-PruMerge (arXiv 2403.15388) scores patches with the class token's query and the keys of the
layer that reads the features (the last one, for LLaVA's feature layer -2). The rest of that layer,
its attention, values, output projection and MLP, changes nothing in the features and is not run.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor

from prumerge_fast.errors import UnsupportedModelError
from prumerge_fast.towers.wrappers import (
    PARALLEL_WRAPPERS,
    check_adapters,
    class_names,
    unwrapped,
    wrapping,
)
from prumerge_fast.versions import clip_transformer, run_encoder_layer


def check_tower(tower: Any) -> None:
    """Raise `UnsupportedModelError` unless `tower` is a CLIP vision tower of transformers.

    PEFT or `torch.compile` may stand around it.
    """
    check_adapters(tower, "vision tower")
    check_class(unwrapped(tower), "CLIPVisionModel")


def check_class(tower: Any, expected: str) -> None:
    """Raise `UnsupportedModelError` unless the tower's class or a base of it is called so."""
    name = type(tower).__name__
    if expected in class_names(tower):
        return
    if PARALLEL_WRAPPERS & class_names(tower):
        reason = "has to be called as a whole; patch runs the layers inside: wrap the whole model"
    elif "siglip" in name.lower() or "pixtral" in name.lower():
        reason = "has no class token, whose attention PruMerge ranks patches by"
    else:
        reason = "is not known"
    raise UnsupportedModelError(f"vision tower: expected a {expected}, got {name}, which {reason}")


def _transformer(tower: Any) -> Any:
    return clip_transformer(unwrapped(tower))


def num_patches(tower: Any) -> int:
    """N, the patch tokens of an image of the tower's own size, without the class token."""
    return _transformer(tower).embeddings.num_patches


def num_heads(tower: Any) -> int:
    """Heads of each encoder layer."""
    return _transformer(tower).config.num_attention_heads


def reading_layer(tower: Any, feature_layer: object) -> int:
    """Index of the encoder layer that reads `hidden_states[feature_layer]`.

    Args:
        tower: A CLIP vision tower with L encoder layers.
        feature_layer: `vision_feature_layer` as transformers counts it: 0 is the output of the
            embeddings, -1 that of the last layer. Of several, the deepest counts.

    Raises:
        UnsupportedModelError: It is no int or list of ints, out of range, or the last layer's
            output, which no layer reads, so that there are no queries and keys of it.
    """
    return max(_layer_indices(tower, feature_layer))


def _layer_indices(tower: Any, feature_layer: object) -> list[int]:
    """Indices 0 .. L-1 into `hidden_states`, one or several."""
    layers, name = len(_transformer(tower).encoder.layers), "vision_feature_layer"
    if not isinstance(feature_layer, (list, tuple)):
        return [layer_index(layers, feature_layer, name)]
    if not feature_layer:
        raise UnsupportedModelError(f"{name}: expected an int or several, got {feature_layer!r}")
    return [layer_index(layers, one, f"{name}[{i}]") for i, one in enumerate(feature_layer)]


def layer_index(layers: int, feature_layer: object, name: str) -> int:
    """`reading_layer` for a tower of so many layers; errors call the option `name`."""
    expected = f"{name}: expected one int"
    if isinstance(feature_layer, bool) or not isinstance(feature_layer, int):
        raise UnsupportedModelError(f"{expected}, got {feature_layer!r}")
    index = feature_layer if feature_layer >= 0 else layers + 1 + feature_layer
    if index == layers:
        raise UnsupportedModelError(
            f"{expected} below the last layer, got {feature_layer}: no layer reads the output of "
            f"the last of {layers} layers, so it has no queries and keys"
        )
    if not 0 <= index < layers:
        raise UnsupportedModelError(
            f"{expected} from {-layers - 1} to {layers - 1}, without -1, for a tower of {layers} "
            f"layers, got {feature_layer}"
        )
    return index


def query_keys_hidden(
    tower: Any,
    pixel_values: Tensor,
    feature_layer: int | Sequence[int],
    *,
    interpolate_pos_encoding: bool = False,
    every_query: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    """Features of the images, and the query and keys that PruMerge scores them with.

    Modules are called, never their weights, so that LoRA, quantised and offloaded layers work. A
    tower with hooks on it, or on its encoder, runs as a whole, so that they see what they would.

    Args:
        tower: A CLIP vision tower (`check_tower`) of width C.
        pixel_values: [B, 3, height, width].
        feature_layer: See `reading_layer`.
        interpolate_pos_encoding: Take pixels of another size than the tower's, as the tower's own
            `forward` does; N follows from them.
        every_query: Those of the patches too.

    Returns:
        query [B, C] of the class token, or [B, 1+N, C] with `every_query`; keys [B, 1+N, C]; and
        hidden [B, 1+N, C], which equals `hidden_states[feature_layer]` of the tower; all in the
        dtype of hidden. With S feature layers, hidden [B, 1+N, S * C] has them side by side in the
        order given, and query and keys are those of the layer that reads the deepest.

    Raises:
        UnsupportedModelError: No layer reads `feature_layer`, or the tower's weights are offloaded
            together with a module around it, or sharded layer by layer.
        ValueError: The images have the wrong size.
    """
    check_tower(tower)  # again: it may have been wrapped since
    indices = _layer_indices(tower, feature_layer)
    deepest = max(indices)
    options = {"interpolate_pos_encoding": True} if interpolate_pos_encoding else {}
    states = None
    if _is_watched(tower):
        states = tower(pixel_values, output_hidden_states=True, **options).hidden_states
    with _weights(tower, deepest):
        if states is None:
            states = _states(tower, pixel_values, indices, options)
        reader = _transformer(tower).encoder.layers[deepest]
        normed = reader.layer_norm1(states[deepest])  # [B, 1+N, C]
        keys = reader.self_attn.k_proj(normed)  # [B, 1+N, C]
        asking = normed if every_query else normed[:, 0]
        query = reader.self_attn.q_proj(asking)  # [B, C] or [B, 1+N, C]
    hidden = torch.cat([states[index] for index in indices], dim=-1)  # [B, 1+N, S * C]
    # Under autocast, projections come out in half precision and the residual stream does not.
    return query.to(hidden), keys.to(hidden), hidden


def _states(
    tower: Any, pixel_values: Tensor, indices: list[int], options: dict[str, bool]
) -> dict[int, Tensor]:
    """Those of the tower's `hidden_states`, each [B, 1+N, C], by index; no layer beyond is run."""
    transformer = _transformer(tower)
    state = transformer.pre_layrnorm(transformer.embeddings(pixel_values, **options))
    states = {0: state}
    for index, layer in enumerate(transformer.encoder.layers[: max(indices)], start=1):
        state = run_encoder_layer(layer, state)
        if index in indices:
            states[index] = state
    return states


def _is_watched(tower: Any) -> bool:
    """Whether there are hooks on modules that only a tower run as a whole calls by themselves."""
    transformer = _transformer(tower)
    return any(
        module._forward_hooks or module._forward_pre_hooks
        for module in (*wrapping(tower), transformer, transformer.encoder)
    )


def _weights(tower: Any, index: int) -> ExitStack:
    """Brings the weights that accelerate loads for a module as a whole, where parts of it are run.

    Layer `index` and what is around it are not called themselves, and so their hooks are not.
    """
    transformer = _transformer(tower)
    reader = transformer.encoder.layers[index]
    stack = ExitStack()
    around = dict.fromkeys((tower, transformer, transformer.encoder, reader, reader.self_attn))
    for module in around:
        if hasattr(module, "_hf_hook") and _is_away(module):
            module._hf_hook.pre_forward(module)
            stack.callback(module._hf_hook.post_forward, module, None)
    projection = reader.self_attn.k_proj
    if not hasattr(projection, "_hf_hook") and any(  # several modules under LoRA
        _is_away(module, recurse=False) and not hasattr(module, "_hf_hook")
        for module in projection.modules()
    ):
        stack.close()
        raise UnsupportedModelError(
            "vision tower: expected weights that are there, or that accelerate brings to the tower "
            "or its parts; they are offloaded together with a module around it"
        )
    parts = (reader.layer_norm1, reader.self_attn.q_proj, projection)  # which are called
    in_shards = any(map(_is_sharded, around)) and any(
        type(parameter).__name__ == "DTensor"
        for part in parts
        if not _is_sharded(part)
        for parameter in part.parameters()
    )
    if in_shards or any("FullyShardedDataParallel" in class_names(module) for module in around):
        stack.close()
        raise UnsupportedModelError(
            f"vision tower: expected layer {index} whole, got it sharded (FSDP): parts of it run "
            "by themselves, which do not gather it; shard the language model's layers only"
        )
    return stack


def _is_sharded(module: Any) -> bool:
    """Whether FSDP gathers the module's weights where the module is called."""
    return "FSDPModule" in class_names(module)


def _is_away(module: Any, recurse: bool = True) -> bool:
    return any(parameter.is_meta for parameter in module.parameters(recurse))
