"""`generate` of a patched model: decodes behind the shrunk prompt, answers behind the caller's.

The images are encoded before decoding starts, because the length of the prompt depends on them, and
transformers' own `generate` gets the shrunk prompt as embeddings. What the caller sees or has a say
in, ids, lengths, streamers, logits processors, stopping criteria, counts the prompt as passed.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor

from prumerge_fast.families.arguments import named_arguments
from prumerge_fast.families.base import Adapter
from prumerge_fast.patching.cache_layout import forget_layout, remember_layout, remembered_layout
from prumerge_fast.patching.forward import check_cache_is_empty
from prumerge_fast.patching.prompt import PromptLayout
from prumerge_fast.patching.sequences import tell_sequences
from prumerge_fast.patching.shrinking import (
    check_prompt,
    embed_prompt,
    lay_out_prompt,
    shrink_per_token,
)
from prumerge_fast.patching.visual import check_no_placeholders, encode_images, take_images
from prumerge_fast.towers.wrappers import check_adapters
from prumerge_fast.versions import cache_argument, cache_of, is_default_length, set_length

# Made by `generate` itself, these look at positions only, and count the shrunk prompt.
_COUNT_POSITIONS = {
    "ExponentialDecayLengthPenalty",
    "ForcedEOSTokenLogitsProcessor",
    "MaxLengthCriteria",
    "MaxTimeCriteria",
    "MinLengthLogitsProcessor",
    "MinNewTokensLengthLogitsProcessor",
    "SuppressTokensAtBeginLogitsProcessor",
}
# Options that transformers does not combine with embeddings as the prompt, or that count what a
# cache holds of it.
_UNSUPPORTED = {
    "assistant_model": "assisted decoding",
    "assistant_early_exit": "assisted decoding",
    "prompt_lookup_num_tokens": "assisted decoding",
    "use_mtp": "assisted decoding",
    "prefill_chunk_size": "prefilling in chunks",
    "token_healing": "token healing",
    "return_legacy_cache": "a cache as a tuple",
}

# Whether `generate`, in this thread, decodes behind positions with gaps.
_HAS_GAPS = ContextVar("prumerge_fast_has_gaps", default=False)


@contextmanager
def _decoding(*, with_gaps: bool) -> Iterator[None]:
    """Notes which it is, within a call that may be of a processor of another `generate`'s too."""
    token = _HAS_GAPS.set(with_gaps)
    try:
        yield
    finally:
        _HAS_GAPS.reset(token)


class CallersPrompt:
    """The prompt as the caller passed it, in place of its shrunk form at the head of sequences.

    Args:
        input_ids: [B, L].
        attention_mask: [B, L].
        shrunk_length: S.
    """

    def __init__(self, input_ids: Tensor, attention_mask: Tensor, shrunk_length: int) -> None:
        self.input_ids = input_ids
        self.attention_mask = attention_mask
        self.shrunk_length = shrunk_length

    def restore(self, sequences: Tensor) -> Tensor:
        """Sequences [r * B, S + g], r of each prompt in a row, as [r * B, L + g]."""
        prompt = _repeat_to(self.input_ids, sequences.shape[0]).to(sequences.device)
        return torch.cat([prompt, sequences[:, self.shrunk_length :]], dim=1)


class WithCallersPrompt(list):
    """The caller's logits processors or stopping criteria, on their way into `generate`."""

    def __init__(self, items: Iterable[Any] | None, prompt: CallersPrompt) -> None:
        super().__init__(items or ())
        self.prompt = prompt


class _Restored:
    """A logits processor or stopping criterion that is shown the prompt as the caller passed it."""

    def __init__(self, inner: Any, prompt: CallersPrompt) -> None:
        self._inner = inner
        self._prompt = prompt

    def __call__(self, input_ids: Tensor, scores: Any) -> Any:
        return self._inner(self._prompt.restore(input_ids), scores)

    def __getattr__(self, name: str) -> Any:  # `generate` asks criteria for `eos_token_id`
        if name.startswith("_"):
            raise AttributeError(name)
        return getattr(self._inner, name)


class _RestoredStreamer:
    """A streamer that is given the prompt as the caller passed it, then the new tokens."""

    def __init__(self, inner: Any, prompt: CallersPrompt) -> None:
        self._inner = inner
        self._prompt: CallersPrompt | None = prompt

    def put(self, value: Tensor) -> None:
        if self._prompt is not None:
            value, self._prompt = self._prompt.restore(value), None
        self._inner.put(value)

    def end(self) -> None:
        self._inner.end()


def generate(
    model: Any,
    adapter: Adapter,
    original: Callable[..., Any],
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
) -> Any:
    """Run `original`, the model's own `generate`, on the shrunk form of what the caller passed."""
    arguments = named_arguments(original, *args, **kwargs)
    images = take_images(adapter, arguments)
    cache = cache_of(arguments)
    layout = remembered_layout(cache)
    if layout is not None:
        return _generate_later_turn(model, adapter, original, arguments, layout)
    prompt = arguments.get("input_ids", arguments.get("inputs"))
    check_no_placeholders(model, adapter, prompt, images)
    if not adapter.has_images(images):
        with _decoding(with_gaps=False):
            return original(**arguments)
    check_cache_is_empty(cache)
    options = _resolved_options(model, original, arguments)
    _check_options(model, options, arguments)

    input_ids = _take_prompt(arguments)
    attention_mask = arguments.pop("attention_mask", None)
    check_prompt(input_ids, attention_mask, arguments.pop("inputs_embeds", None))
    if attention_mask is None:
        attention_mask = _inferred_mask(options, input_ids)
    encoded = encode_images(model, adapter, images)
    # Decoding appends on the right.
    layout = lay_out_prompt(model, adapter, input_ids, attention_mask, encoded, side="left")
    arguments["inputs_embeds"] = embed_prompt(
        model, adapter, layout, input_ids, attention_mask, encoded
    )
    return _generate_behind(model, original, arguments, options, layout, input_ids, attention_mask)


def _generate_later_turn(
    model: Any,
    adapter: Adapter,
    original: Callable[..., Any],
    arguments: dict[str, Any],
    layout: PromptLayout,
) -> Any:
    """Go on from a cache that holds an earlier, shrunk prompt and perhaps its answer."""
    cache = cache_of(arguments)
    input_ids = _take_prompt(arguments)
    check_prompt(input_ids, None, arguments.get("inputs_embeds"))
    rows, length = input_ids.shape
    layout = layout.for_rows(rows)
    options = _resolved_options(model, original, arguments)
    _check_options(model, options, arguments)
    attention_mask = arguments.pop("attention_mask", None)
    if attention_mask is None:
        attention_mask = _inferred_mask(options, input_ids)
    held = int(cache.get_seq_length()) + layout.removed  # columns of the caller's, in the cache
    if length <= held or attention_mask.shape != input_ids.shape:
        raise ValueError(
            "input_ids and attention_mask: expected the whole conversation, more than the "
            f"{held} tokens whose keys and values {cache_argument()} holds, got "
            f"{list(input_ids.shape)} and {list(attention_mask.shape)}"
        )
    later = input_ids[:, held:]
    if any((later == adapter.placeholder_id(model, kind)).any() for kind in adapter.pixels):
        raise ValueError(
            f"input_ids: expected no image behind the tokens in {cache_argument()} on a patched "
            f"model; pass the conversation without {cache_argument()}"
        )
    return _generate_behind(model, original, arguments, options, layout, input_ids, attention_mask)


def _generate_behind(
    model: Any,
    original: Callable[..., Any],
    arguments: dict[str, Any],
    options: Any,
    layout: PromptLayout,
    input_ids: Tensor,
    attention_mask: Tensor,
) -> Any:
    """Decode behind the shrunk prompt and hand back what the caller expects."""
    _shift_lengths(model, arguments, options, layout.removed, input_ids.shape[1])
    positions = arguments.get("position_ids")
    if positions is None:  # as `generate` counts them
        positions = (attention_mask.cumsum(1) - 1).clamp(min=0)  # [B, L + g]
        if layout.stands is not None:  # by itself it would count what is left
            arguments["position_ids"] = positions
    shrink_per_token(arguments, layout, input_ids)
    layout = layout.placed(positions)
    shrunk_ids = layout.ids(input_ids, attention_mask)
    prompt = CallersPrompt(input_ids, attention_mask, shrunk_ids.shape[1])
    arguments["input_ids"] = shrunk_ids
    arguments["attention_mask"] = layout.mask(attention_mask)
    for name in ("logits_processor", "stopping_criteria"):
        arguments[name] = WithCallersPrompt(arguments.get(name), prompt)
    if arguments.get("streamer") is not None:
        arguments["streamer"] = _RestoredStreamer(arguments["streamer"], prompt)
    cache = cache_of(arguments)
    forget_layout(cache)  # until `generate` is through: it counts what the cache holds
    try:
        with _decoding(with_gaps=layout.stands is not None):
            result = original(**arguments)
    finally:  # a call that failed may have left the shrunk prompt in the cache
        if cache is not None:
            remember_layout(cache, layout)
    if isinstance(result, Tensor):
        return prompt.restore(result)
    if not isinstance(getattr(result, "sequences", None), Tensor):
        raise ValueError(
            "custom_generate: expected it to return ids [B, length], or an output that holds them "
            f"as sequences, on a patched model, got {type(result).__name__}"
        )
    cache = cache_of(result)
    if cache is not None:
        remember_layout(cache, layout)
    result.sequences = prompt.restore(result.sequences)
    return result


def prepare_inputs(
    model: Any,
    adapter: Adapter,
    original: Callable[..., Any],
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
) -> Any:
    """`prepare_inputs_for_generation` of a step; behind positions with gaps, with what they miss.

    Transformers 5 counts positions on from step to step, transformers 4 repeats the last one.
    """
    if not _HAS_GAPS.get():
        return original(*args, **kwargs)
    positions, mask = kwargs["position_ids"], kwargs.get("attention_mask")
    missing = 0 if mask is None else mask.shape[1] - positions.shape[1]
    if missing > 0:
        later = torch.arange(1, missing + 1, device=positions.device) + positions[:, -1:]
        kwargs["position_ids"] = torch.cat([positions, later], 1)
    inputs = original(*args, **kwargs)
    cache = cache_of(inputs)
    of_several = inputs["position_ids"].shape[1] > 1
    if of_several and (cache is None or int(cache.get_seq_length()) == 0):
        tell_sequences(model, inputs)
    return inputs


def logits_processors(original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """`_get_logits_processor` of a patched model: all but mere counters see the caller's prompt."""
    custom = kwargs.get("logits_processor")
    if not isinstance(custom, WithCallersPrompt):
        return original(*args, **kwargs)
    prompt, config = custom.prompt, kwargs["generation_config"]
    kwargs["encoder_input_ids"] = prompt.input_ids
    if kwargs.get("model_kwargs") is not None:  # repetition penalties leave out padding
        repeats = max(config.num_beams or 1, config.num_return_sequences or 1)
        mask = prompt.attention_mask.repeat_interleave(repeats, 0)
        kwargs["model_kwargs"] = {**kwargs["model_kwargs"], "attention_mask": mask}
    return _restored(original(*args, **kwargs), custom)


def stopping_criteria(original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """`_get_stopping_criteria` of a patched model, as `logits_processors`."""
    custom = kwargs.get("stopping_criteria")
    criteria = original(*args, **kwargs)
    return _restored(criteria, custom) if isinstance(custom, WithCallersPrompt) else criteria


def _restored(items: Any, custom: WithCallersPrompt) -> Any:
    """Wrap, in place, what looks at tokens or comes from the caller."""
    for index, item in enumerate(items):
        is_custom = any(item is other for other in custom)
        if is_custom or type(item).__name__ not in _COUNT_POSITIONS:
            items[index] = _Restored(item, custom.prompt)
    return items


def _repeat_to(tensor: Tensor, rows: int) -> Tensor:
    return tensor.repeat_interleave(rows // tensor.shape[0], 0)


def _take_prompt(arguments: dict[str, Any]) -> Any:
    """Remove the prompt from the arguments; `generate` takes it by either of two names."""
    inputs, input_ids = arguments.pop("inputs", None), arguments.pop("input_ids", None)
    if inputs is not None and input_ids is not None:
        raise ValueError("inputs and input_ids: expected one of them, got both")
    return inputs if inputs is not None else input_ids


def _resolved_options(model: Any, original: Callable[..., Any], arguments: dict[str, Any]) -> Any:
    """The configuration that `generate` will go by: arguments, then configuration, then model's."""
    parameters = inspect.signature(original).parameters
    options = {name: value for name, value in arguments.items() if name not in parameters}
    if "use_model_defaults" in arguments:  # of transformers 4
        options["use_model_defaults"] = arguments["use_model_defaults"]
    return model._prepare_generation_config(arguments.get("generation_config"), **options)[0]


def _check_options(model: Any, options: Any, arguments: dict[str, Any]) -> None:
    wrapper = getattr(model.prepare_inputs_for_generation, "__self__", model)  # PEFT's
    check_adapters(wrapper, "model")
    for name, title in _UNSUPPORTED.items():
        if arguments.get(name, getattr(options, name, None)):
            raise ValueError(
                f"{name}: {title} does not work with images on a patched model; "
                "leave it out or unpatch the model"
            )
    if options.cache_implementation == "paged":
        raise ValueError(
            "cache_implementation: 'paged' (continuous batching) does not work with images on a "
            "patched model"
        )
    if isinstance(arguments.get("custom_generate"), str):
        raise ValueError(
            "custom_generate: expected a callable or None together with images on a patched "
            f"model, got {arguments['custom_generate']!r}"
        )


def _inferred_mask(options: Any, input_ids: Tensor) -> Tensor:
    """The mask [B, L] that `generate` assumes when none is given: from the padding id, if clear."""
    pad, end = options.pad_token_id, options.eos_token_id
    ends = [] if end is None else torch.as_tensor(end).flatten().tolist()
    if pad is None or int(pad) in ends:
        return torch.ones_like(input_ids)
    return (input_ids != int(pad)).long()


def _shift_lengths(
    model: Any, arguments: dict[str, Any], options: Any, removed: int, length: int
) -> None:
    """Make `max_length` and `min_length`, which count the caller's prompt, count the shrunk one."""
    for name in ("max_length", "min_length"):
        limit = getattr(options, name)
        if limit is None or is_default_length(model, arguments, limit, name):
            continue  # the default counts new tokens
        if name == "max_length":
            if options.max_new_tokens is not None:
                continue  # takes precedence
            if limit <= length:
                raise ValueError(
                    f"max_length: expected more than the prompt's {length} tokens, got {limit}; "
                    "max_new_tokens counts new tokens only"
                )
        set_length(arguments, name, limit - removed)
