"""`forward` of a patched model: the prompt shrinks with its images before the model sees it.

Both the whole model (ids to logits) and the inner one (ids to hidden states) are overridden, so
that it prunes whoever calls either: trainers that compute losses through the inner model, or a
`forward` that something else put on the instance. Outputs have the caller's length, unless they are
asked for as the language model gave them (`outputs="shrunk"`).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from prumerge_fast.errors import UnsupportedModelError
from prumerge_fast.families.arguments import named_arguments
from prumerge_fast.families.base import Adapter, ImageTokens
from prumerge_fast.patching.cache_layout import remember_layout, remembered_layout
from prumerge_fast.patching.prompt import PromptLayout, padding_of
from prumerge_fast.patching.sequences import packed_sequences, tell_sequences
from prumerge_fast.patching.shrinking import (
    check_prompt,
    embed_prompt,
    lay_out_prompt,
    shrink_per_token,
)
from prumerge_fast.patching.visual import (
    check_no_placeholders,
    encode_images,
    output_of,
    returns_dict,
    take_images,
)
from prumerge_fast.versions import (
    cache_argument,
    cache_of,
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
    return_dict = returns_dict(model, arguments)
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
    # The first argument is input_ids. The whole model passes on what it was not given, as `None`,
    # and, in transformers 4, the feature layer in any case.
    return len(args) > 1 or any(
        kwargs.get(name) is not None
        for name in adapter.image_arguments
        if name.startswith("pixel_values") or name == "mm_encoder_outputs"
    )


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
            set_visual_outputs(outputs, modality, tokens.features, output_of(tokens, True))
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
    if layout.stands is not None:
        sequence = packed_sequences(positions.expand_as(input_ids))  # [B, L]
        tell_sequences(model, arguments, layout.gather(sequence, -1) if sequence.any() else None)
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
    kept = rows[:, columns].contiguous()  # [B, k]
    arguments["logits_to_keep"] = needed = kept.unique()  # ascending
    return {"logits": torch.searchsorted(needed, kept), "hidden_states": rows}


def _rows_of_hidden_states(layout: PromptLayout, arguments: dict[str, Any]) -> dict[str, Tensor]:
    rows = layout.rows_of_columns()  # [B, L]
    return {"last_hidden_state": rows, "hidden_states": rows}


def _rows(values: Tensor, index: Tensor) -> Tensor:
    """Rows [B, k, ...] of values [B, S, ...], by index [B, k]."""
    index = index.to(values.device)
    return values[torch.arange(len(values), device=values.device)[:, None], index]


def _continue_prompt(arguments: dict[str, Any], layout: PromptLayout) -> None:
    """Translate the arguments of a step behind a shrunk prompt, in place."""
    new = arguments.get("input_ids")
    if new is None:
        new = arguments.get("inputs_embeds")
    if new is None:
        return  # the model itself says that it needs one of them
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
