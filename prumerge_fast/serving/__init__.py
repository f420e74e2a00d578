"""PruMerge where models are served and where they read images by the million."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from prumerge_fast.serving.encoder import PruMergeEncoder
    from prumerge_fast.serving.image_embeds import to_base64

__all__ = ["PruMergeEncoder", "to_base64"]

# Loaded at first use: vLLM imports the plugin, a neighbour, in each of its processes.
_MODULES = {"PruMergeEncoder": "encoder", "to_base64": "image_embeds"}


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(f"{__name__}.{_MODULES[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
