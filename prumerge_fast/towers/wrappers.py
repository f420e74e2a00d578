"""What stands around a model or a tower: `torch.compile` and PEFT, one in the other at will.

Classes are known by name: PEFT need not be installed.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from prumerge_fast.errors import UnsupportedModelError

# They hand their module out only after work in `forward` that a call past them leaves out: weights
# brought together, gradients exchanged.
PARALLEL_WRAPPERS = frozenset(
    {"DataParallel", "DistributedDataParallel", "FullyShardedDataParallel"}
)


def unwrapped(module: Any) -> Any:
    """The model or tower inside all of its wrappers; without any, `module` itself."""
    *_, innermost = wrapping(module)
    return innermost


def wrapping(module: Any) -> Iterator[Any]:
    """`module`, then what it wraps, from the outside in."""
    yield module
    while (module := _inner(module)) is not None:
        yield module


def _inner(module: Any) -> Any | None:
    """What `module` calls in place of itself: `None` if it is no wrapper that we know."""
    names = class_names(module)
    if "OptimizedModule" in names:  # of `torch.compile(module)`; `module.compile()` wraps nothing
        return module._orig_mod
    if "PeftMixedModel" in names:  # which has no `get_base_model`
        return module.base_model.model
    if "PeftModel" in names:
        return module.get_base_model()
    if "ModulesToSaveWrapper" in names:  # around each of PEFT's `modules_to_save`
        active, copies = module.active_adapters, module.modules_to_save
        if module.disable_adapters or not active or any(name not in copies for name in active):
            return module.original_module
        return copies[active[0]]
    return None


def class_names(module: Any) -> set[str]:
    """Names of the module's class and of its bases."""
    return {cls.__name__ for cls in type(module).__mro__}


def check_adapters(module: Any, name: str) -> None:
    """Raise `UnsupportedModelError` if PEFT puts tokens of its own into the input of a module.

    Args:
        module: A model or a tower, wrapped or not.
        name: What errors call it.
    """
    for wrapper in wrapping(module):
        config = getattr(wrapper, "active_peft_config", None)
        if getattr(config, "is_prompt_learning", False):
            raise UnsupportedModelError(
                f"{name}: expected adapters that leave the prompt alone, such as LoRA, got "
                f"{type(config).__name__}, whose own tokens a shrunk prompt has no place for"
            )
