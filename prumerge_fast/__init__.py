"""LLaVA-PruMerge (arXiv 2403.15388) for any LLaVA: fewer visual tokens, the same answers.

import prumerge_fast

prumerge_fast.patch(model)                  # in place; generate() and forward() as before
prumerge_fast.patch(model, keep=64)         # a fixed number of tokens an image
prumerge_fast.unpatch(model)                # exactly as it was

`prune_merge` is the reduction itself, for other models; `reduce_tokens` the same by other scores,
such as `received_attention`.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from prumerge_fast.errors import BackendUnavailableError, PruMergeError, UnsupportedModelError
    from prumerge_fast.patching.patch import is_patched, patch, patched, unpatch
    from prumerge_fast.reduction.config import PruMergeConfig
    from prumerge_fast.reduction.dispatch import prune_merge, reduce_tokens
    from prumerge_fast.reduction.output import MergedTokens
    from prumerge_fast.reduction.received import received_attention

__all__ = [
    "BackendUnavailableError",
    "MergedTokens",
    "PruMergeConfig",
    "PruMergeError",
    "UnsupportedModelError",
    "is_patched",
    "patch",
    "patched",
    "prune_merge",
    "received_attention",
    "reduce_tokens",
    "unpatch",
]

__version__ = "0.1.0"

# Loaded at first use, so that the command line's `--help` need not wait for PyTorch.
_MODULES = {
    "BackendUnavailableError": "errors",
    "MergedTokens": "reduction.output",
    "PruMergeConfig": "reduction.config",
    "PruMergeError": "errors",
    "UnsupportedModelError": "errors",
    "is_patched": "patching.patch",
    "patch": "patching.patch",
    "patched": "patching.patch",
    "prune_merge": "reduction.dispatch",
    "received_attention": "reduction.received",
    "reduce_tokens": "reduction.dispatch",
    "unpatch": "patching.patch",
}


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(f"{__name__}.{_MODULES[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
