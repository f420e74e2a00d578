"""`patch`, `unpatch` and `patched`: LLaVA-PruMerge on one model instance, and off it again.

A patched instance gets a subclass of its own class, of the same name, with the methods that
`overrides` lists, and so does its inner model (`model.model`), which trainers call by itself.
Nothing else changes, on the instance, its modules or anywhere in the process, so that undoing it is
complete, and saving, copying and pickling work.

A model that PEFT or `torch.compile` wraps is patched inside its wrapper, which passes everything
on; compiled code notices the change of class.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import MethodType
from typing import Any, TypeVar

from prumerge_fast.errors import UnsupportedModelError
from prumerge_fast.families import adapter_for, adapter_for_class
from prumerge_fast.families.base import Adapter, Override, inner_model
from prumerge_fast.patching.instance_class import instance_class
from prumerge_fast.patching.overrides import inner_overrides, overrides_of
from prumerge_fast.reduction.backends import resolve_backend
from prumerge_fast.reduction.config import PruMergeConfig
from prumerge_fast.towers.wrappers import check_adapters, unwrapped

Model = TypeVar("Model")

# Where an instance may hold a `forward`; accelerate's hooks keep that of the class in the second.
_INSTANCE_FORWARDS = ("forward", "_old_forward")


@dataclass
class PruMergeState:
    """What a patched model carries as `model.prumerge`.

    Args:
        config: The options.
        backend: As asked for: `"auto"`, `"triton"`, `"torch"` or `"reference"`.
        outputs: `"caller"` or `"shrunk"`, whose length logits and hidden states have.
        last_lengths: Tokens of each image, then of each video, when any were last encoded.
    """

    config: PruMergeConfig
    backend: str
    outputs: str = "caller"
    last_lengths: tuple[int, ...] | None = None


def patch(
    model: Model,
    config: PruMergeConfig | None = None,
    *,
    backend: str | None = None,
    outputs: str | None = None,
    **config_fields: Any,
) -> Model:
    """Make a LLaVA prune and merge its visual tokens (LLaVA-PruMerge, arXiv 2403.15388), in place.

    `patch(model)` uses the defaults; `patch(model, keep=64)` sets options. On a patched model it
    reconfigures: options that are not given stay, unless `config` is given, which replaces all.

    A patched model behaves as before, and its language model sees shorter prompts: `forward`, its
    own or that of `model.model`, shortens ids, mask, positions and labels with the images, and
    `generate` returns answers behind the prompt as the caller passed it. `get_image_features`
    returns the reduced features.

    Logits and hidden states have the caller's length: text stands in its own columns, and an
    image's placeholders hold the rows of its tokens in order, the last of them repeated up to the
    image's last placeholder. The loss of `labels` is that of the shrunk prompt. Attentions have the
    shrunk length.

    With images, assisted decoding, chunked prefill and embeddings as the prompt raise `ValueError`,
    as do new images in a later turn that reuses the cache.

    Args:
        model: A model of a supported family, or a wrapper of one, PEFT's or that of
            `torch.compile`; its weights are not touched.
        config: The options; `None` for the defaults, or those the model is patched with. The
            defaults of models whose patches are scored by the attention that they receive, for want
            of a class token, are `PruMergeConfig(variant="prumerge+", keep=0.25)`.
        backend: `"auto"`, `"triton"`, `"torch"` or `"reference"`; `None` for `"auto"`, or the one
            that the model is patched with.
        outputs: `"caller"`: logits and hidden states of the caller's length, as above. `"shrunk"`:
            the rows that the language model gave, without copies; `logits_to_keep` counts those.
            `None` for `"caller"`, or what the model is patched with. The original LLaVA package
            has `"shrunk"` alone: its prompts hold one placeholder an image, patched or not.
        config_fields: Options of `PruMergeConfig`, over those of `config`.

    Returns:
        `model`, with its state as `model.prumerge`.

    Raises:
        UnsupportedModelError: The model's family is unknown, or it is configured in a way that
            PruMerge does not work with.
        TypeError: There is no option of that name, or a value has the wrong type.
        ValueError: A value is out of range.
        BackendUnavailableError: The backend was asked for by name and cannot run.
    """
    instance: Any = unwrapped(model)
    adapter = adapter_for(instance)
    current = instance.prumerge if is_patched(instance) else None
    if config is None:
        config = None if current is None else current.config
    elif not isinstance(config, PruMergeConfig):
        raise TypeError(f"config: expected a PruMergeConfig or None, got {type(config).__name__}")
    if backend is None:
        backend = "auto" if current is None else current.backend
    if outputs is None:
        outputs = adapter.outputs[0] if current is None else current.outputs
    elif outputs not in adapter.outputs:
        expected = " or ".join(map(repr, adapter.outputs))
        raise ValueError(
            f"outputs: expected {expected} for {type(instance).__name__}, got {outputs!r}"
        )
    check_adapters(model, "model")
    adapter.check(instance)
    if config is None:
        config = adapter.default_config(instance)
    config = config.replace(**config_fields)
    if config.positions not in adapter.positions:
        raise ValueError(
            f"positions: expected {' or '.join(map(repr, adapter.positions))} for "
            f"{type(instance).__name__}, whose positions the patch does not make, got "
            f"{config.positions!r}"
        )
    adapter.resolved(instance, config)  # raises where it cannot score as asked
    config.budget(adapter.num_patches(instance))  # raises when `keep` does not fit
    resolve_backend(backend, adapter.device(instance))
    before = _patched_parts(instance)
    plain = [part for part in _parts(instance) if not any(m in before for m in part.modules())]
    for part in plain:
        _check_methods(part, instance)
    outer: Any = type(instance) if current is None else type(instance)._prumerge_base
    for part in plain:
        _change_class(part, _patched_class(part.__class__, outer))
    _set_state([*before, *plain], PruMergeState(config, backend, outputs))
    return model


def unpatch(model: Model) -> Model:
    """Make a patched model exactly what it was before.

    Returns:
        `model`.

    Raises:
        ValueError: The model is not patched.
        UnsupportedModelError: Its class was replaced since.
    """
    instance: Any = unwrapped(model)
    if not is_patched(instance):
        raise ValueError(f"model: expected a patched model, got a plain {type(instance).__name__}")
    parts = _patched_parts(instance)
    for part in parts:
        if "_prumerge_base" not in vars(type(part)):
            raise UnsupportedModelError(
                f"model: its class was replaced after patching ({type(part).__name__}), which "
                "unpatching would undo as well; undo that first"
            )
    for part in parts:
        del part.prumerge
        _change_class(part, type(part)._prumerge_base)
    return model


@contextmanager
def patched(
    model: Model,
    config: PruMergeConfig | None = None,
    *,
    backend: str | None = None,
    outputs: str | None = None,
    **config_fields: Any,
) -> Iterator[Model]:
    """`patch` for the duration of a `with` block; then the model is what it was, patched or not.

    Takes the arguments of `patch` and raises its errors.
    """
    instance: Any = unwrapped(model)
    before = instance.prumerge if is_patched(instance) else None
    patch(model, config, backend=backend, outputs=outputs, **config_fields)
    try:
        yield model
    finally:
        if before is not None:
            if not is_patched(model):
                patch(model, before.config, backend=before.backend, outputs=before.outputs)
            _set_state(_patched_parts(instance), before)
        elif is_patched(model):
            unpatch(model)


def is_patched(model: object) -> bool:
    """Whether `patch` was applied to this instance, or to the one inside its wrappers."""
    return hasattr(type(unwrapped(model)), "_prumerge_base")


def _parts(model: Any) -> list[Any]:
    """What of a model changes its class: itself and, in transformers, its inner model."""
    return [model, inner_model(model)] if isinstance(adapter_for(model), Adapter) else [model]


def _patched_parts(model: Any) -> list[Any]:
    """Those that were patched together with the model, whatever stands around them since."""
    if not is_patched(model):
        return []
    return [
        part
        for part in model.modules()
        if hasattr(type(part), "_prumerge_base") and part.prumerge is model.prumerge
    ]


def _set_state(parts: list[Any], state: PruMergeState) -> None:
    for part in parts:
        part.prumerge = state


@functools.cache
def _patched_class(base: Any, outer: Any) -> Any:
    """The subclass that patched instances of `base` have, or the inner models of those of `outer`.

    Per class: instances hold the state.
    """
    adapter: Any = adapter_for_class(outer)
    overrides = overrides_of(adapter, base) if base is outer else inner_overrides(adapter, base)

    def overriding(name: str, override: Override) -> Any:
        @functools.wraps(getattr(base, name))
        def method(self: Any, *args: Any, **kwargs: Any) -> Any:
            # What wrapped it while the model was patched may still hold it.
            if not isinstance(self, subclass):
                return getattr(base, name)(self, *args, **kwargs)
            return override(self, adapter, getattr(super(subclass, self), name), args, kwargs)

        # `unwrap_model` of accelerate would follow `__wrapped__` to the plain method.
        method.__signature__ = inspect.signature(method)  # type: ignore[attr-defined]
        del method.__wrapped__
        return method

    @functools.wraps(base.__init__)
    def __init__(self: Any, *args: Any, **kwargs: Any) -> None:
        # `type(model)(config)` makes a model, not a patched one: `patch` is per instance.
        self.__class__ = base
        self.__init__(*args, **kwargs)

    namespace = {
        **{name: overriding(name, each) for name, each in overrides.items()},
        "__init__": __init__,
        "_prumerge_base": base,
    }
    subclass = instance_class(base, namespace, functools.partial(_new_patched, outer=outer))
    return subclass


def _new_patched(base: Any, outer: Any) -> Any:
    subclass = _patched_class(base, outer)
    return subclass.__new__(subclass)


def _check_methods(part: Any, model: Any) -> None:
    """Raise if the instance has methods of its own that a change of class would not reach.

    A `forward` of its own on a whole model of transformers goes by the inner one, which prunes.
    """
    if is_patched(part):
        raise UnsupportedModelError(
            f"model: its {type(part).__name__} was patched with another model; unpatch it first"
        )
    own = part.__dict__.get("_old_forward", part.__dict__.get("forward"))
    adapter = adapter_for(model)
    replaced = own is not None and getattr(own, "__func__", None) is not type(part).forward
    if replaced and (part is not model or not isinstance(adapter, Adapter)):
        raise UnsupportedModelError(
            f"model: the `forward` of its {type(part).__name__} was replaced on the instance, "
            "which patching would not reach; undo that first, and patch before wrapping"
        )
    overrides = overrides_of if part is model else inner_overrides
    for name in overrides(adapter, type(part)):  # type: ignore[arg-type]
        if not hasattr(type(part), name):
            raise UnsupportedModelError(
                f"model: expected an inner model with `{name}`, got a {type(part).__name__}; patch "
                "before it is wrapped"
            )
        if name != "forward" and name in part.__dict__:
            raise UnsupportedModelError(
                f"model: expected the `{name}` of its class, but it was replaced on the instance"
            )


def _change_class(model: Any, cls: type[Any]) -> None:
    old: Any = type(model)
    for name in _INSTANCE_FORWARDS:
        own = model.__dict__.get(name)
        if isinstance(own, MethodType) and own.__func__ is old.forward:
            model.__dict__[name] = MethodType(cls.forward, model)
    model.__class__ = cls
