"""Pictures and videos among the arguments of a call: encoded, pruned, merged and projected."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from prumerge_fast.errors import UnsupportedModelError
from prumerge_fast.families.arguments import named_arguments
from prumerge_fast.families.base import Adapter, ImageTokens, inner_model
from prumerge_fast.versions import is_4


def get_features(
    modality: str,
    model: Any,
    adapter: Adapter,
    original: Callable[..., Any],
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
) -> Any:
    """The reduced, projected tokens [m, D] of each image or video, in the form of `original`.

    Of the output that transformers 5 returns, only `pooler_output` is set.
    """
    arguments = named_arguments(original, *args, **kwargs)
    # The first parameter holds the pixels; its name depends on the version.
    first, pixels = next(iter(inspect.signature(original).parameters)), adapter.pixels[modality]
    if first in arguments:
        arguments[pixels] = arguments.pop(first)
    images = take_images(adapter, arguments)
    return_dict = returns_dict(model, arguments)
    if arguments:
        raise TypeError(
            f"get_{modality}_features: expected {', '.join(adapter.image_arguments)} or "
            f"return_dict on a patched model, got {', '.join(arguments)}"
        )
    tokens = encode_images(model, adapter, images).get(modality)
    if tokens is None:  # a batch of none
        nothing = torch.empty(0, dtype=torch.int64)
        tokens = ImageTokens(torch.empty(0), [], [], nothing)
    return output_of(tokens, return_dict)


def take_images(adapter: Adapter, arguments: dict[str, Any]) -> dict[str, Any]:
    """Remove the arguments that describe images and return them."""
    images = {name: arguments.pop(name) for name in adapter.image_arguments if name in arguments}
    return adapter.renamed(images)


def encode_images(
    model: Any, adapter: Adapter, images: Mapping[str, Any]
) -> dict[str, ImageTokens]:
    """Encode, prune, merge and project, by modality; note the lengths on `model.prumerge`."""
    inner, state = inner_model(model), model.prumerge
    if not hasattr(inner, "prumerge"):
        raise UnsupportedModelError(
            f"model: its inner model is a {type(inner).__name__} that was put there after patching "
            "and does not prune; undo that, or patch the model again"
        )
    encoded = adapter.encode(model, images, state.config, state.backend)
    state.last_lengths = tuple(length for tokens in encoded.values() for length in tokens.lengths)
    return encoded


def returns_dict(model: Any, arguments: dict[str, Any]) -> bool:
    """Remove `return_dict` from the arguments; what it asks for, or the model's default."""
    return_dict = arguments.pop("return_dict", None)
    return bool(model.config.return_dict if return_dict is None else return_dict)


def output_of(tokens: ImageTokens, return_dict: bool) -> Any:
    """What `get_image_features` returns of them: 4.x the list of each image's or video's tokens
    [m, D], 5.x an output that holds it."""
    features = list(tokens.features.split(tokens.lengths)) if tokens.lengths else []
    if is_4():
        return features
    # Imports transformers, which this package does only when a model is there.
    from prumerge_fast.patching.encoder_output import pruned_features

    output = pruned_features(tokens)
    return output if return_dict else output.to_tuple()


def check_no_placeholders(
    model: Any, adapter: Adapter, input_ids: Any, images: Mapping[str, Any]
) -> None:
    """Raise `ValueError` if an empty batch of images comes with placeholders of images."""
    if not isinstance(input_ids, Tensor):
        return
    for modality, pixels in adapter.pixels.items():
        encoded = (images.get("mm_encoder_outputs") or {}).get(modality)
        given = {pixels: images.get(pixels)}
        given["mm_encoder_outputs"] = getattr(encoded, "pooler_output", None)
        empty = [name for name, value in given.items() if value is not None and not len(value)]
        if not empty:
            continue
        tokens = int((input_ids == adapter.placeholder_id(model, modality)).sum())
        if tokens:
            raise ValueError(
                f"{modality.capitalize()} features and {modality} tokens do not match: input_ids "
                f"holds {tokens} {modality} tokens, and {empty[0]} no {modality}"
            )
