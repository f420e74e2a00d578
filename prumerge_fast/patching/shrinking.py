"""The parts of a prompt that shrink with its images: layout, embeddings, what else has a value a
token."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

from torch import Tensor

from prumerge_fast.families.base import Adapter, ImageTokens
from prumerge_fast.patching.prompt import IGNORED_LABEL, Placeholders, PromptLayout, shrink_prompt

# Types of tokens, which padding has none of.
_TOKEN_TYPES = ("token_type_ids", "mm_token_type_ids")


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
    is_compact = model.prumerge.config.positions == "compact"
    visual = [
        Placeholders(
            modality,
            adapter.placeholder_id(model, modality),
            tokens.placeholders,
            tokens.lengths,
            None if is_compact else tokens.places,
            _row_lengths(tokens),
        )
        for modality, tokens in encoded.items()
    ]
    return shrink_prompt(
        input_ids, attention_mask, visual, padding_side=side, last_columns=last_columns
    )


def _row_lengths(tokens: ImageTokens) -> list[list[int]] | None:
    """`Placeholders.row_lengths`."""
    if tokens.columns is None:
        return None
    places = tokens.places.split(tokens.lengths)
    return [
        (of_image // columns).bincount(minlength=count // columns).tolist()
        for of_image, columns, count in zip(
            places, tokens.columns, tokens.placeholders, strict=True
        )
    ]


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
