"""The methods that a patched model has otherwise than its class."""

from __future__ import annotations

import functools
from collections.abc import Mapping

import torch

from prumerge_fast.families.base import Adapter, BaseAdapter, Override
from prumerge_fast.patching import forward, generation, visual


def inner_overrides(adapter: Adapter, model_class: type) -> Mapping[str, Override]:
    """What `patch` overrides of the inner model's methods, by name."""
    return {
        **_features(adapter, model_class),
        "forward": forward.inner_forward,
        "get_placeholder_mask": forward.refuse_placeholder_mask,
    }


def _features(adapter: Adapter, model_class: type) -> dict[str, Override]:
    return {
        f"get_{modality}_features": functools.partial(visual.get_features, modality)
        for modality in adapter.pixels
        if hasattr(model_class, f"get_{modality}_features")
    }


def overrides_of(adapter: BaseAdapter, model_class: type) -> Mapping[str, Override]:
    """What `patch` overrides of a model's methods, by name: of transformers' families the same."""
    if not isinstance(adapter, Adapter):
        return adapter.overrides(model_class)
    return {
        **_features(adapter, model_class),
        "forward": forward.forward,
        "generate": torch.no_grad()(generation.generate),
        "prepare_inputs_for_generation": generation.prepare_inputs,
        "_get_logits_processor": lambda model, adapter, original, args, kwargs: (
            generation.logits_processors(original, *args, **kwargs)
        ),
        "_get_stopping_criteria": lambda model, adapter, original, args, kwargs: (
            generation.stopping_criteria(original, *args, **kwargs)
        ),
        **adapter.overrides(model_class),
    }
