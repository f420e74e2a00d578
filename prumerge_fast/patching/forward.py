"""`forward` of a patched model: the prompt shrinks with its images before the model sees it.

Both the whole model (ids to logits) and the inner one (ids to hidden states) are overridden, so
that it prunes whoever calls either: trainers that compute losses through the inner model, or a
`forward` that something else put on the instance. Outputs have the caller's length, unless they are
asked for as the language model gave them (`outputs="shrunk"`).
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from prumerge_fast.errors import UnsupportedModelError
from prumerge_fast.families.arguments import named_arguments
from prumerge_fast.families.base import Adapter, ImageTokens
from prumerge_fast.patching.cache_layout import remember_layout, remembered_layout
from prumerge_fast.patching.prompt import (
    IGNORED_LABEL,
    Placeholders,
    PromptLayout,
    padding_of,
    shrink_prompt,
)
from prumerge_fast.versions import (
    cache_argument,
    cache_of,
    is_4,
    set_visual_outputs,
)

# Arguments that describe the caller's prompt and cannot be shrunk, and what to do about it.
_PACKED = "pass position_ids, which shrink with the prompt"
_NOT_WITH_IMAGES = {
    "shift_labels": "pass labels, which shrink with the prompt",
    "cu_seq_lens_q": _PACKED,
    "cu_seq_lens_k": _PACKED,
    "max_length_q": _PACKED,
    "max_length_k": _PACKED,
}
# Types of tokens, which padding has none of.
_TOKEN_TYPES = ("token_type_ids", "mm_token_type_ids")


def forward(
    model: Any,
    adapter: Adapter,
    original: Callable[..., Any],
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
) -> Any:
    """Run `original`, the whole model's own `forward`, on the shrunk form of what was passed.

    Behind a prompt there is nothing to do that the inner model does not do.
    """
    if not _may_have_images(adapter, args, kwargs):
        return original(*args, **kwargs)
    arguments = named_arguments(original, *args, **kwargs)
    return _forward(model, adapter, original, arguments, _rows_of_logits)


def inner_forward(
    model: Any,
    adapter: Adapter,
    original: Callable[..., Any],
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
) -> Any:
    """Run `original`, the inner model's own `forward`, on the shrunk form of what was passed."""
    layout = remembered_layout(cache_of(kwargs))
    if not _may_have_images(adapter, args, kwargs) and layout is None:
        return original(*args, **kwargs)
    arguments = named_arguments(original, *args, **kwargs)
    return _forward(model, adapter, original, arguments, _rows_of_hidden_states, continues=True)


def _forward(
    model: Any,
    adapter: Adapter,
    original: Callable[..., Any],
    arguments: dict[str, Any],
    rows_of_outputs: Callable[[PromptLayout, dict[str, Any]], dict[str, Tensor]],
    *,
    continues: bool = False,
) -> Any:
    """Run `original` on the shrunk form of `arguments`, and give its outputs the caller's length.

    Args:
        rows_of_outputs: `(layout, arguments)` to the rows [B, k] of each output by name; it may
            change the arguments.
        continues: Whether a step behind a shrunk prompt is still in the caller's terms.
    """
    images = take_images(adapter, arguments)
    cache = cache_of(arguments)
    layout = remembered_layout(cache)
    if layout is None:
        check_no_placeholders(model, adapter, arguments.get("input_ids"), images)
    if not adapter.has_images(images):
        if layout is not None and continues:
            _continue_prompt(arguments, layout)
        return original(**arguments)
    check_cache_is_empty(cache)
    return_dict = _returns_dict(model, arguments)
    prompt = _shrink(model, adapter, arguments, images)
    as_caller = model.prumerge.outputs == "caller"
    rows = rows_of_outputs(prompt.layout, arguments) if as_caller else {}
    outputs = original(**arguments, return_dict=True)
    for name, index in rows.items():
        if isinstance(outputs.get(name), tuple):  # of every layer
            outputs[name] = tuple(_rows(states, index) for states in outputs[name])
        elif outputs.get(name) is not None:
            outputs[name] = _rows(outputs[name], index)
    prompt.note_on(outputs)
    return outputs if return_dict else outputs.to_tuple()


def _may_have_images(adapter: Adapter, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    # The first argument is input_ids. The whole model passes on what it was not given, as `None`.
    return len(args) > 1 or any(kwargs.get(name) is not None for name in adapter.image_arguments)


def refuse_placeholder_mask(
    model: Any,
    adapter: Adapter,
    original: Callable[..., Any],
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
) -> Any:
    """`get_placeholder_mask`, which only the inner model's plain `forward` asks for."""
    raise UnsupportedModelError(
        f"model: the `forward` of {type(model).__name__} was called around the patch, by its class "
        "or by a replacement on the instance, and would have run unpruned; call the model itself, "
        "model(...) or model.model(...), or unpatch it"
    )


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
    return_dict = _returns_dict(model, arguments)
    if arguments:
        raise TypeError(
            f"get_{modality}_features: expected {', '.join(adapter.image_arguments)} or "
            f"return_dict on a patched model, got {', '.join(arguments)}"
        )
    tokens = encode_images(model, adapter, images).get(modality)
    if tokens is None:  # a batch of none
        return _features_output([], [], return_dict)
    return _output_of(tokens, return_dict)


def _features_output(features: list[Tensor], placeholders: list[int], return_dict: bool) -> Any:
    """What `get_image_features` returns: 4.x the list itself, 5.x an output that holds it."""
    if is_4():
        return features
    # Imports transformers, which this package does only when a model is there.
    from prumerge_fast.patching.encoder_output import PrunedFeatures

    device = features[0].device if features else None
    counts = torch.tensor(placeholders, dtype=torch.int64, device=device)
    output = PrunedFeatures(pooler_output=features, placeholders=counts)
    return output if return_dict else output.to_tuple()


def _output_of(tokens: ImageTokens, return_dict: bool) -> Any:
    """The tokens [m, D] of each image or video, in the form that `get_features` returns."""
    return _features_output(
        list(tokens.features.split(tokens.lengths)), tokens.placeholders, return_dict
    )


def take_images(adapter: Adapter, arguments: dict[str, Any]) -> dict[str, Any]:
    """Remove the arguments that describe images and return them."""
    images = {name: arguments.pop(name) for name in adapter.image_arguments if name in arguments}
    return adapter.renamed(images)


def check_cache_is_empty(cache: Any) -> None:
    """Raise `ValueError` if images come together with a cache that holds an earlier prompt."""
    if cache is None:
        return
    if not hasattr(cache, "get_seq_length"):
        raise ValueError(
            f"{cache_argument()}: expected a Cache or None together with images on a patched "
            f"model, got {type(cache).__name__}"
        )
    if int(cache.get_seq_length()) > 0:
        raise ValueError(
            f"{cache_argument()}: expected an empty cache together with new images, got one that "
            f"holds {int(cache.get_seq_length())} tokens; start anew with the whole prompt"
        )


def encode_images(
    model: Any, adapter: Adapter, images: Mapping[str, Any]
) -> dict[str, ImageTokens]:
    """Encode, prune, merge and project, by modality; note the lengths on `model.prumerge`."""
    state = model.prumerge
    encoded = adapter.encode(model, images, state.config, state.backend)
    state.last_lengths = tuple(length for tokens in encoded.values() for length in tokens.lengths)
    return encoded


def lay_out_prompt(
    model: Any,
    adapter: Adapter,
    input_ids: Tensor,
    attention_mask: Tensor | None,
    encoded: Mapping[str, ImageTokens],
    side: Literal["left", "right"],
    last_columns: int = 0,
) -> PromptLayout:
    """`shrink_prompt` for these images and videos, padded on `side`."""
    visual = [
        Placeholders(
            modality,
            adapter.placeholder_id(model, modality),
            tokens.placeholders,
            tokens.lengths,
        )
        for modality, tokens in encoded.items()
    ]
    return shrink_prompt(
        input_ids, attention_mask, visual, padding_side=side, last_columns=last_columns
    )


def embed_prompt(
    model: Any,
    adapter: Adapter,
    layout: PromptLayout,
    input_ids: Tensor,
    attention_mask: Tensor | None,
    encoded: Mapping[str, ImageTokens],
) -> Tensor:
    """Embeddings [B, S, D] of the shrunk prompt, with the visual tokens in place."""
    embeds = model.get_input_embeddings()(layout.ids(input_ids, attention_mask))  # [B, S, D]
    for modality, tokens in encoded.items():
        is_placeholder = input_ids == adapter.placeholder_id(model, modality)  # [B, L]
        mask = layout.gather(is_placeholder, False).to(embeds.device)  # [B, S]
        features = tokens.features.to(embeds.device, embeds.dtype)  # [sum of lengths, D]
        embeds = embeds.masked_scatter(mask[..., None], features)
    return embeds


def check_prompt(input_ids: Any, attention_mask: Any, inputs_embeds: Any) -> None:
    """Raise `ValueError` unless images come with ids [B, L] and a mask [B, L] or none."""
    if inputs_embeds is not None:
        raise ValueError(
            "inputs_embeds: expected None together with images on a patched model, which has to "
            "see the image tokens in input_ids to shrink the prompt"
        )
    if not isinstance(input_ids, Tensor) or input_ids.ndim != 2:
        got = list(input_ids.shape) if isinstance(input_ids, Tensor) else type(input_ids).__name__
        raise ValueError(f"input_ids: expected a tensor [B, L] together with images, got {got}")
    _check_shape("attention_mask", attention_mask, input_ids)


def shrink_per_token(arguments: dict[str, Any], layout: PromptLayout, input_ids: Tensor) -> None:
    """Shorten what else has a value per token of the prompt: positions, labels, types; in place."""
    for name in ("position_ids", "labels", *_TOKEN_TYPES):
        value = arguments.get(name)
        if value is None:
            continue
        if name == "position_ids" and isinstance(value, Tensor) and value.shape[:1] == (1,):
            _check_shape(name, value, input_ids[:1])  # of all rows
        else:
            _check_shape(name, value, input_ids)
        if name == "position_ids":
            arguments[name] = layout.positions(value)
        elif name == "labels":
            arguments[name] = layout.labels(value)
            _shrink_count(arguments, value, arguments[name])
        else:
            arguments[name] = layout.gather(value, 0)


def _shrink_count(arguments: dict[str, Any], labels: Tensor, shrunk: Tensor) -> None:
    """Count in `num_items_in_batch`, which the loss is divided by, the labels that are left.

    `Trainer` counts those of the prompts as passed, of a whole step; of its other batches as large
    a share is taken to be left as of this one.
    """
    if arguments.get("num_items_in_batch") is None:
        return
    before, after = (int((each[:, 1:] != IGNORED_LABEL).sum()) for each in (labels, shrunk))
    if after < before:
        arguments["num_items_in_batch"] = arguments["num_items_in_batch"] * after / before


def _check_shape(name: str, value: Any, input_ids: Tensor) -> None:
    """Raise `ValueError` unless `value` is `None` or has one entry for each of the ids."""
    if value is None or (isinstance(value, Tensor) and value.shape == input_ids.shape):
        return
    got = list(value.shape) if isinstance(value, Tensor) else type(value).__name__
    raise ValueError(f"{name}: expected the shape of input_ids, {list(input_ids.shape)}, got {got}")


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


def _check_packing(arguments: dict[str, Any], layout: PromptLayout) -> None:
    """Raise `ValueError` if padding comes into packed rows, known as such by having no mask."""
    positions = arguments.get("position_ids")
    if (
        positions is not None
        and (positions.diff(dim=-1) < 0).any()
        and layout.mask(None) is not None
    ):
        raise ValueError(
            "position_ids: expected no row of several sequences where rows lose unequal numbers of "
            "image tokens, since padding would join its sequences; pack into one row, or set keep"
        )


@dataclass(frozen=True, eq=False)
class _Shrunk:
    """A prompt whose shrunk form the model is about to see, and what its outputs say of it."""

    layout: PromptLayout
    encoded: dict[str, ImageTokens]

    def note_on(self, outputs: Any) -> None:
        """Put the visual tokens on the outputs, and the layout on their KV cache."""
        for modality, tokens in self.encoded.items():
            set_visual_outputs(outputs, modality, tokens.features, _output_of(tokens, True))
        cache = cache_of(outputs)
        if cache is not None:
            remember_layout(cache, self.layout)


def _shrink(
    model: Any, adapter: Adapter, arguments: dict[str, Any], images: Mapping[str, Any]
) -> _Shrunk:
    """Encode the images, and put the shrunk prompt's embeddings in place of ids, in `arguments`."""
    input_ids = arguments.pop("input_ids", None)
    attention_mask = arguments.pop("attention_mask", None)
    check_prompt(input_ids, attention_mask, arguments.pop("inputs_embeds", None))
    for name, instead in _NOT_WITH_IMAGES.items():
        if arguments.get(name) is not None:
            raise ValueError(
                f"{name}: expected None together with images on a patched model; {instead}"
            )
    side, last_columns = padding_of(attention_mask)
    if model.prumerge.outputs == "shrunk" and _checked_last(arguments):  # the last columns are both
        side, last_columns = "left", max(last_columns, arguments["logits_to_keep"])
    encoded = encode_images(model, adapter, images)
    layout = lay_out_prompt(model, adapter, input_ids, attention_mask, encoded, side, last_columns)
    if attention_mask is None:
        _check_packing(arguments, layout)
    arguments["inputs_embeds"] = embed_prompt(
        model, adapter, layout, input_ids, attention_mask, encoded
    )
    arguments["attention_mask"] = layout.mask(attention_mask)
    positions = arguments.get("position_ids")
    shrink_per_token(arguments, layout, input_ids)
    if positions is None:
        positions = torch.arange(input_ids.shape[1], device=input_ids.device)[None]  # [1, L]
        arguments["position_ids"] = layout.columns().to(arguments["inputs_embeds"].device)
    arguments.pop("cache_position", None)  # 0 .. L-1; the model counts the shrunk prompt itself
    return _Shrunk(layout.placed(positions), encoded)


def _checked_last(arguments: dict[str, Any]) -> int:
    """`logits_to_keep` where outputs have the shrunk length, whose indices nobody knows."""
    logits_to_keep = arguments.get("logits_to_keep", 0)
    if not isinstance(logits_to_keep, int):
        raise ValueError(
            "logits_to_keep: expected an int (the last positions) together with images on a model "
            "patched with outputs='shrunk', got indices"
        )
    return logits_to_keep


def _rows_of_logits(layout: PromptLayout, arguments: dict[str, Any]) -> dict[str, Tensor]:
    """Which rows stand for which of the caller's columns.

    `logits_to_keep`, the last or any of the caller's columns, becomes the rows that any prompt
    needs for them.
    """
    rows = layout.rows_of_columns()  # [B, L]
    logits_to_keep = arguments.get("logits_to_keep", 0)
    if isinstance(logits_to_keep, int) and logits_to_keep == 0:
        return {"logits": rows, "hidden_states": rows}
    columns = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
    kept = rows[:, columns]  # [B, k]
    arguments["logits_to_keep"] = needed = kept.unique()  # ascending
    return {"logits": torch.searchsorted(needed, kept), "hidden_states": rows}


def _rows_of_hidden_states(layout: PromptLayout, arguments: dict[str, Any]) -> dict[str, Tensor]:
    rows = layout.rows_of_columns()  # [B, L]
    return {"last_hidden_state": rows, "hidden_states": rows}


def _rows(values: Tensor, index: Tensor) -> Tensor:
    """Rows [B, k, ...] of values [B, S, ...], by index [B, k]."""
    index = index.to(values.device)
    return values[torch.arange(len(values), device=values.device)[:, None], index]


def _returns_dict(model: Any, arguments: dict[str, Any]) -> bool:
    """Remove `return_dict` from the arguments; what it asks for, or the model's default."""
    return_dict = arguments.pop("return_dict", None)
    return bool(model.config.return_dict if return_dict is None else return_dict)


def _continue_prompt(arguments: dict[str, Any], layout: PromptLayout) -> None:
    """Translate the arguments of a step behind a shrunk prompt, in place."""
    new = arguments.get("input_ids")
    if new is None:
        new = arguments["inputs_embeds"]
    rows, steps = new.shape[:2]
    layout = layout.for_rows(rows)
    cached = int(cache_of(arguments).get_seq_length())
    callers_length = cached + layout.removed + steps
    mask = arguments.get("attention_mask")
    counts_shrunk_prompt = False
    if mask is None:
        prompt = layout.mask(None)
        if prompt is not None:
            later = prompt.new_ones(rows, cached + steps - layout.shrunk_length)
            arguments["attention_mask"] = torch.cat([prompt, later], dim=1)
    elif mask.ndim == 2 and mask.shape[1] == callers_length:
        arguments["attention_mask"] = layout.gather(mask, 0)
    elif mask.ndim == 2 and mask.shape[1] == cached + steps:
        counts_shrunk_prompt = True
    else:
        raise ValueError(
            f"attention_mask: expected [{rows}, {callers_length}], as the prompt was passed, or "
            f"[{rows}, {cached + steps}], as it was pruned, got {list(mask.shape)}"
        )
    positions = arguments.get("position_ids")
    if positions is None:  # the caller's columns
        positions = torch.arange(callers_length - steps, callers_length, device=new.device)[None]
        counts_shrunk_prompt = False
    arguments["position_ids"] = layout.later_positions(positions, cached, not counts_shrunk_prompt)
    arguments.pop("cache_position", None)  # counts the caller's prompt; the model knows its cache
