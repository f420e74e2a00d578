"""LLaVA-PruMerge (arXiv 2403.15388) for any LLaVA: fewer visual tokens, the same answers.

import prumerge_fast

prumerge_fast.patch(model)                  # in place; generate() and forward() as before
prumerge_fast.patch(model, keep=64)         # a fixed number of tokens an image
prumerge_fast.unpatch(model)                # exactly as it was

`prune_merge` is the reduction itself, for other models.
"""

from prumerge_fast.config import PruMergeConfig
from prumerge_fast.dispatch import prune_merge
from prumerge_fast.errors import BackendUnavailableError, PruMergeError, UnsupportedModelError
from prumerge_fast.output import MergedTokens
from prumerge_fast.patching import is_patched, patch, patched, unpatch

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
    "unpatch",
]

__version__ = "0.1.0"
