"""The layout of a shrunk prompt, noted on the KV cache that holds the prompt.

It stands on the cache's first layer, which goes wherever the keys and values go: into copies and
pickles, and, by methods of a class of its own, along when sequences are rearranged.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor

from prumerge_fast.patching.instance_class import instance_class
from prumerge_fast.patching.prompt import PromptLayout
from prumerge_fast.versions import cache_argument

_ATTRIBUTE = "_prumerge_layout"
_PLAIN = "_prumerge_plain"  # on the class of a layer with a layout: what it was before
# Methods of a cache's layers that rearrange its sequences, and what they do to the layout.
_REARRANGING = {
    "reorder_cache": PromptLayout.rows,
    "batch_select_indices": PromptLayout.rows,
    "batch_repeat_interleave": PromptLayout.repeated,
}


@torch.compiler.disable
def remember_layout(cache: Any, layout: PromptLayout) -> None:
    """Note on a KV cache that it holds the shrunk form of the caller's prompt."""
    holder = _holder(cache)
    keys = getattr(holder, "keys", None)
    if isinstance(keys, Tensor) and keys.ndim == 4:  # of beams and samples, several a prompt
        layout = layout.for_rows(keys.shape[0])
    setattr(holder, _ATTRIBUTE, layout)
    if holder is not cache and not hasattr(type(holder), _PLAIN):
        holder.__class__ = _following(holder.__class__)


def forget_layout(cache: Any) -> None:
    """Make later steps take the cache's prompt as it is."""
    holder = _holder(cache)
    if hasattr(holder, _ATTRIBUTE):
        delattr(holder, _ATTRIBUTE)
    if hasattr(type(holder), _PLAIN):
        holder.__class__ = getattr(type(holder), _PLAIN)


def remembered_layout(cache: Any) -> PromptLayout | None:
    """The layout of the prompt in a KV cache; `None` if it holds none that was shrunk.

    Raises:
        ValueError: The cache holds less than the prompt, after it was cropped. (A static cache of
            transformers 4 miscounts itself where the first sequence has padding.)
    """
    layout = getattr(_holder(cache), _ATTRIBUTE, None)
    if layout is None:
        return None
    cached = int(cache.get_seq_length())
    if cached == 0:  # reset, to be used for another prompt
        forget_layout(cache)
        return None
    if cached < layout.shrunk_length:
        raise ValueError(
            f"{cache_argument()}: expected a cache that holds the whole prompt, "
            f"{layout.shrunk_length} tokens after pruning, got one of length {cached}"
        )
    return layout


def _holder(cache: Any) -> Any:
    """The first layer; of a cache of another make, or one without layers yet, the cache."""
    layers = getattr(cache, "layers", None)
    return layers[0] if layers else cache


@functools.cache
def _following(base: Any) -> type[Any]:
    """The class of layers of class `base` whose layout follows their sequences."""

    def rearranging(name: str) -> Any:
        @functools.wraps(getattr(base, name))
        def method(self: Any, rows: Any = None, **by_name: Any) -> None:
            (rows,) = by_name.values() or (rows,)
            layout = _REARRANGING[name](getattr(self, _ATTRIBUTE), rows)
            getattr(super(subclass, self), name)(rows)
            setattr(self, _ATTRIBUTE, layout)

        return method

    methods = {name: rearranging(name) for name in _REARRANGING if hasattr(base, name)}
    subclass = instance_class(base, {**methods, _PLAIN: base}, _empty)
    return subclass


def _empty(base: Any) -> Any:
    subclass: Any = _following(base)
    return subclass.__new__(subclass)
