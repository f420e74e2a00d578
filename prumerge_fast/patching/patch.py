"""`patch`, `unpatch` and `patched`: LLaVA-PruMerge on one model instance, and off it again.

A patched instance gets a subclass of its own class, of the same name, with the methods that its
family's adapter overrides. Nothing else changes, on the instance, its modules or anywhere in the
process, so that undoing it is complete, and saving, copying and pickling work.

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
from prumerge_fast.families.base import Override
from prumerge_fast.patching.instance_class import instance_class
from prumerge_fast.patching.overrides import overrides_of
from prumerge_fast.reduction.config import PruMergeConfig
from prumerge_fast.reduction.dispatch import resolve_backend
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
        last_lengths: Tokens of each image, then of each video, when any were last encoded.
    """

    config: PruMergeConfig
    backend: str
    last_lengths: tuple[int, ...] | None = None


def patch(
    model: Model,
    config: PruMergeConfig | None = None,
    *,
    backend: str | None = None,
    **config_fields: Any,
) -> Model:
    """Make a LLaVA prune and merge its visual tokens (LLaVA-PruMerge, arXiv 2403.15388), in place.

    `patch(model)` uses the defaults; `patch(model, keep=64)` sets options. On a patched model it
    reconfigures: options that are not given stay, unless `config` is given, which replaces all.

    A patched model behaves as before, with shorter prompts: `forward` shortens ids, mask, positions
    and labels with the images, so its logits have the length of the shrunk prompt, and `generate`
    returns answers behind the prompt as the caller passed it. Hidden states and attentions have the
    shrunk length. `get_image_features` returns the reduced features.

    With images, assisted decoding, chunked prefill and embeddings as the prompt raise `ValueError`,
    as do new images in a later turn that reuses the cache.

    Args:
        model: A model of a supported family, or a wrapper of one, PEFT's or that of
            `torch.compile`; its weights are not touched.
        config: The options; `None` for the defaults, or those the model is patched with.
        backend: `"auto"`, `"triton"`, `"torch"` or `"reference"`; `None` for `"auto"`, or the one
            that the model is patched with.
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
        config = PruMergeConfig() if current is None else current.config
    elif not isinstance(config, PruMergeConfig):
        raise TypeError(f"config: expected a PruMergeConfig or None, got {type(config).__name__}")
    config = config.replace(**config_fields)
    if backend is None:
        backend = "auto" if current is None else current.backend
    check_adapters(model, "model")
    adapter.check(instance)
    config.budget(adapter.num_patches(instance))  # raises when `keep` does not fit
    resolve_backend(backend, adapter.device(instance))
    if current is None:
        _check_methods(instance)
        _change_class(instance, _patched_class(instance.__class__))
    instance.prumerge = PruMergeState(config, backend)
    return model


def unpatch(model: Model) -> Model:
    """Make a patched model exactly what it was before.

    Returns:
        `model`.

    Raises:
        ValueError: The model is not patched.
        UnsupportedModelError: Its class, or a method of the instance that `patch` overrides, was
            replaced since.
    """
    instance: Any = unwrapped(model)
    if not is_patched(instance):
        raise ValueError(f"model: expected a patched model, got a plain {type(instance).__name__}")
    if "_prumerge_base" not in vars(type(instance)):
        raise UnsupportedModelError(
            "model: its class was replaced after patching, which unpatching would undo as well; "
            "undo that first"
        )
    _check_methods(instance)
    del instance.prumerge
    _change_class(instance, type(instance)._prumerge_base)
    return model


@contextmanager
def patched(
    model: Model,
    config: PruMergeConfig | None = None,
    *,
    backend: str | None = None,
    **config_fields: Any,
) -> Iterator[Model]:
    """`patch` for the duration of a `with` block; then the model is what it was, patched or not.

    Takes the arguments of `patch` and raises its errors.
    """
    instance: Any = unwrapped(model)
    before = instance.prumerge if is_patched(instance) else None
    patch(model, config, backend=backend, **config_fields)
    try:
        yield model
    finally:
        if before is not None:
            if not is_patched(model):
                patch(model, before.config, backend=before.backend)
            instance.prumerge = before
        elif is_patched(model):
            unpatch(model)


def is_patched(model: object) -> bool:
    """Whether `patch` was applied to this instance, or to the one inside its wrappers."""
    return hasattr(type(unwrapped(model)), "_prumerge_base")


@functools.cache
def _patched_class(base: Any) -> Any:
    """The subclass that patched instances of `base` have. Per class: instances hold the state."""
    adapter = adapter_for_class(base)

    def overriding(name: str, override: Override) -> Any:
        @functools.wraps(getattr(base, name))
        def method(self: Any, *args: Any, **kwargs: Any) -> Any:
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
        **{
            name: overriding(name, override)
            for name, override in overrides_of(adapter, base).items()
        },
        "__init__": __init__,
        "_prumerge_base": base,
    }
    subclass = instance_class(base, namespace, _new_patched)
    return subclass


def _new_patched(base: Any) -> Any:
    subclass = _patched_class(base)
    return subclass.__new__(subclass)


def _check_methods(model: Any) -> None:
    """Raise if the instance has methods of its own that a change of class would not reach."""
    own = model.__dict__.get("_old_forward", model.__dict__.get("forward"))
    if own is not None and getattr(own, "__func__", None) is not type(model).forward:
        raise UnsupportedModelError(
            "model: its `forward` was replaced on the instance, which patching and unpatching "
            "would not reach; undo that first, and patch before wrapping"
        )
    for name in overrides_of(adapter_for(model), type(model)):
        if name != "forward" and name in model.__dict__:
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
