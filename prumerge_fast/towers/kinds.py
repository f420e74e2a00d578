"""The kinds of vision towers that are known, found by class name."""

from __future__ import annotations

from typing import Any

from prumerge_fast.errors import UnsupportedModelError
from prumerge_fast.towers import clip, internvit, pixtral, siglip
from prumerge_fast.towers.encoder import EncoderTower
from prumerge_fast.towers.wrappers import (
    PARALLEL_WRAPPERS,
    check_adapters,
    class_names,
    unwrapped,
)

_KINDS: dict[str, EncoderTower] = {
    tower.class_name: tower for tower in (clip.TOWER, siglip.TOWER, pixtral.TOWER, internvit.TOWER)
}


def tower_kind(tower: Any) -> EncoderTower:
    """The kind of a vision tower of transformers; PEFT or `torch.compile` may stand around it.

    Raises:
        UnsupportedModelError: It is of none that is known.
    """
    check_adapters(tower, "vision tower")
    inner = unwrapped(tower)
    for cls in type(inner).__mro__:
        if cls.__name__ in _KINDS:
            return _KINDS[cls.__name__]
    raise UnsupportedModelError(
        f"vision tower: expected one of {', '.join(_KINDS)}, got {unknown(inner)}"
    )


def unknown(tower: Any) -> str:
    """The class of a tower of no kind that is known, and what is the matter with it."""
    if PARALLEL_WRAPPERS & class_names(tower):
        reason = "has to be called as a whole; patch runs the layers inside: wrap the whole model"
    else:
        reason = "is not known"
    return f"{type(tower).__name__}, which {reason}"
