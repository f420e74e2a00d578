"""The arguments of a call to a model's own method, however they were passed."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor


def named_arguments(method: Callable[..., Any], *args: Any, **kwargs: Any) -> dict[str, Any]:
    """The arguments of a call by name, those of a `**kwargs` parameter among them."""
    signature = inspect.signature(method)
    arguments = signature.bind(*args, **kwargs).arguments
    for name, parameter in signature.parameters.items():
        if parameter.kind is inspect.Parameter.VAR_KEYWORD:
            arguments.update(arguments.pop(name, {}))
    return arguments


def on_host(images: Mapping[str, Any]) -> dict[str, Any]:
    """These arguments, with lists of how large images are and how they are cut: read once from a
    device, not again for every image and step."""
    names = ("image_sizes", "batch_num_images")
    read = {name: images[name] for name in names if isinstance(images.get(name), Tensor)}
    return {**images, **{name: values.tolist() for name, values in read.items()}}
