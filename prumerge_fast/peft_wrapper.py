"""Models that PEFT wraps. Classes are known by name: PEFT need not be installed."""

from __future__ import annotations

from typing import Any

from prumerge_fast.errors import UnsupportedModelError


def without_peft(model: Any) -> Any:
    """The model that PEFT wraps (`PeftModel`, `PeftMixedModel`); any other as it is."""
    names = {cls.__name__ for cls in type(model).__mro__}
    if "PeftMixedModel" in names:  # which has no `get_base_model`
        return model.base_model.model
    return model.get_base_model() if "PeftModel" in names else model


def check_adapters(wrapper: Any) -> None:
    """Raise `UnsupportedModelError` if PEFT puts tokens of its own into the prompt."""
    config = getattr(wrapper, "active_peft_config", None)
    if getattr(config, "is_prompt_learning", False):
        raise UnsupportedModelError(
            "model: expected adapters that leave the prompt alone, such as LoRA, got "
            f"{type(config).__name__}, whose own tokens a shrunk prompt has no place for"
        )
