"""Which of PEFT's adapters a patched model takes."""

from __future__ import annotations

from typing import Any

from prumerge_fast.errors import UnsupportedModelError


def check_adapters(wrapper: Any) -> None:
    """Raise `UnsupportedModelError` if PEFT puts tokens of its own into the prompt."""
    config = getattr(wrapper, "active_peft_config", None)
    if getattr(config, "is_prompt_learning", False):
        raise UnsupportedModelError(
            "model: expected adapters that leave the prompt alone, such as LoRA, got "
            f"{type(config).__name__}, whose own tokens a shrunk prompt has no place for"
        )
