"""What stands around a model or a tower. Classes are known by name: PEFT need not be installed."""

from __future__ import annotations

from typing import Any


def without_peft(model: Any) -> Any:
    """The model that PEFT wraps (`PeftModel`, `PeftMixedModel`); any other as it is."""
    names = {cls.__name__ for cls in type(model).__mro__}
    if "PeftMixedModel" in names:  # which has no `get_base_model`
        return model.base_model.model
    return model.get_base_model() if "PeftModel" in names else model
