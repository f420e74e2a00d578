"""The model families that can be patched, found by class name without importing any of them."""

from __future__ import annotations

from importlib import import_module
from typing import NamedTuple

from prumerge_fast.errors import UnsupportedModelError
from prumerge_fast.families.base import BaseAdapter
from prumerge_fast.towers.wrappers import PARALLEL_WRAPPERS


class Family(NamedTuple):
    """A model family: its name for people, and the module whose `ADAPTER` knows it."""

    title: str
    module: str


_ORIGINAL = Family("the original LLaVA package", "prumerge_fast.families.original")
_ORIGINAL_TOWER = Family("its vision tower", "prumerge_fast.families.original_tower")

FAMILIES = {
    "LlavaForConditionalGeneration": Family(
        "LLaVA in transformers", "prumerge_fast.families.pixtral"
    ),
    "LlavaNextForConditionalGeneration": Family(
        "LLaVA-NeXT in transformers", "prumerge_fast.families.llava_next"
    ),
    "LlavaNextVideoForConditionalGeneration": Family(
        "LLaVA-NeXT-Video in transformers", "prumerge_fast.families.llava_next_video"
    ),
    "LlavaOnevisionForConditionalGeneration": Family(
        "LLaVA-OneVision in transformers", "prumerge_fast.families.llava_onevision"
    ),
    "VideoLlavaForConditionalGeneration": Family(
        "Video-LLaVA in transformers", "prumerge_fast.families.video_llava"
    ),
    "VipLlavaForConditionalGeneration": Family(
        "ViP-LLaVA in transformers", "prumerge_fast.families.vipllava"
    ),
    "InternVLForConditionalGeneration": Family(
        "InternVL in transformers", "prumerge_fast.families.internvl"
    ),
    "LlavaLlamaForCausalLM": _ORIGINAL,
    "LlavaMistralForCausalLM": _ORIGINAL,
    "LlavaMptForCausalLM": _ORIGINAL,
    "CLIPVisionTower": _ORIGINAL_TOWER,
}
# Models that people try, and why they cannot be pruned.
_REFUSED = {
    "Mistral3ForConditionalGeneration": (
        "its patch merger joins neighbouring patches of its Pixtral tower in front of the "
        "projector, which is not supported"
    ),
}


def adapter_for(model: object) -> BaseAdapter:
    """The adapter of a model's family; see `adapter_for_class`."""
    return adapter_for_class(type(model))


def adapter_named(name: str) -> BaseAdapter:
    """The adapter of the family of a class in `FAMILIES`."""
    return import_module(FAMILIES[name].module).ADAPTER


def adapter_for_class(model_class: type) -> BaseAdapter:
    """The adapter of the family that a class, or one it derives from, belongs to.

    Raises:
        UnsupportedModelError: It belongs to none; the message lists the families.
    """
    for cls in model_class.__mro__:
        if cls.__name__ in FAMILIES:
            return adapter_named(cls.__name__)
    for cls in model_class.__mro__:
        if cls.__name__ in _REFUSED:
            raise UnsupportedModelError(
                f"model: {cls.__name__} cannot be pruned: {_REFUSED[cls.__name__]}"
            )
    wrapper = next((cls for cls in model_class.__mro__ if cls.__name__ in PARALLEL_WRAPPERS), None)
    if wrapper is not None:
        raise UnsupportedModelError(
            f"model: expected a model, got a {wrapper.__name__} around one; patch its `module`, or "
            "the model before it is wrapped"
        )
    supported = ", ".join(f"{name} ({family.title})" for name, family in FAMILIES.items())
    raise UnsupportedModelError(
        f"model: expected a supported model, got {model_class.__name__}; supported: {supported}"
    )
