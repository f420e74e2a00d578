"""The arguments of a call to a model's own method, however they were passed."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any


def named_arguments(method: Callable[..., Any], *args: Any, **kwargs: Any) -> dict[str, Any]:
    """The arguments of a call by name, those of a `**kwargs` parameter among them."""
    signature = inspect.signature(method)
    arguments = signature.bind(*args, **kwargs).arguments
    for name, parameter in signature.parameters.items():
        if parameter.kind is inspect.Parameter.VAR_KEYWORD:
            arguments.update(arguments.pop(name, {}))
    return arguments
