"""Weights of parts of a tower that run by themselves: brought where they are offloaded, refused
where they are sharded."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from contextlib import ExitStack
from typing import Any

from prumerge_fast.errors import UnsupportedModelError
from prumerge_fast.towers.wrappers import class_names


def brought(modules: Iterable[Any]) -> ExitStack:
    """Brings the weights that accelerate loads for modules that are not called themselves, and so
    their hooks are not. An exit puts the weights back."""
    stack = ExitStack()
    for module in dict.fromkeys(modules):
        if hasattr(module, "_hf_hook") and _is_away(module):
            module._hf_hook.pre_forward(module)
            stack.callback(module._hf_hook.post_forward, module, None)
    return stack


def check_whole(around: Sequence[Any], parts: Sequence[Any], name: str) -> None:
    """Raise `UnsupportedModelError` unless the weights of parts that are called are there, or come.

    Args:
        around: Modules that are not called themselves; their weights are `brought`.
        parts: Those within that are called.
        name: What errors call the layer that the parts are of.
    """
    if any(map(_stays_away, parts)):
        raise UnsupportedModelError(
            "vision tower: expected weights that are there, or that accelerate brings to the tower "
            "or its parts; they are offloaded together with a module around it"
        )
    in_shards = any(map(_is_sharded, around)) and any(
        type(parameter).__name__ == "DTensor"
        for part in parts
        if not _is_sharded(part)
        for parameter in part.parameters()
    )
    if in_shards or any("FullyShardedDataParallel" in class_names(module) for module in around):
        raise UnsupportedModelError(
            f"vision tower: expected {name} whole, got it sharded (FSDP): parts of it run by "
            "themselves, which do not gather it; shard the language model's layers only"
        )


def _is_sharded(module: Any) -> bool:
    """Whether FSDP gathers the module's weights where the module is called."""
    return "FSDPModule" in class_names(module)


def _stays_away(part: Any) -> bool:
    """Whether weights of a module that is called are offloaded, and no hook brings them."""
    if hasattr(part, "_hf_hook"):
        return False
    return _is_away(part, recurse=False) or any(map(_stays_away, part.children()))


def _is_away(module: Any, recurse: bool = True) -> bool:
    return any(parameter.is_meta for parameter in module.parameters(recurse))
