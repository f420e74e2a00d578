"""Plugin for lmms-eval: the model `llava_prumerge`.

It is found by the entry point group `lmms_eval.models`; docs/lmms-eval.md says how to use it.
"""

from __future__ import annotations

from typing import Any


def manifest() -> Any:
    """The `ModelManifest` that lmms-eval registers; the model is imported when it is asked for."""
    from lmms_eval.models.registry_v2 import ModelManifest

    return ModelManifest("llava_prumerge", f"{__name__}.model.LlavaPruMerge")
