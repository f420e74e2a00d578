"""The processor of a model; that of one which takes videos, without torchvision as well.

The video processors of transformers need torchvision, and with them the whole processor. Without
it, frames are resized, cropped and normalised as images are, with the video processor's own sizes.
"""

from __future__ import annotations

from collections.abc import Sequence
from importlib import import_module
from typing import Any

import numpy as np
from PIL import Image

_STEPS = ("resize", "center_crop", "rescale", "normalize")
_SETTINGS = ("size", "crop_size", "resample", "rescale_factor", "image_mean", "image_std")


def load_processor(source: str, config: Any, *, takes_videos: bool) -> Any:
    """The processor in a folder or on the hub.

    Args:
        source: Folder or hub name.
        config: The model's configuration.
        takes_videos: Whether its processor has a part for videos.
    """
    from transformers import AutoProcessor
    from transformers.utils import is_torchvision_available

    if not takes_videos or is_torchvision_available():
        return AutoProcessor.from_pretrained(source)
    return _assembled(source, config.model_type)


def _assembled(source: str, model_type: str) -> Any:
    """What `AutoProcessor` would load, part by part."""
    from transformers import AutoTokenizer

    # `transformers` itself has some versions' only with torchvision.
    from transformers.models.auto.image_processing_auto import AutoImageProcessor
    from transformers.models.auto.processing_auto import PROCESSOR_MAPPING_NAMES

    package = f"transformers.models.{model_type}"
    name = PROCESSOR_MAPPING_NAMES[model_type]
    whole = getattr(import_module(f"{package}.processing_{model_type}"), name)
    # It would look the video processor's class up in what torchvision's absence has emptied.
    lenient = {"check_argument_for_proper_class": lambda self, argument, part: type(part)}
    processor_class: Any = type(name, (whole,), lenient)
    # `transformers` itself has a dummy of this class that says to install torchvision.
    videos = import_module(f"{package}.video_processing_{model_type}")
    name_of_video = name.replace("Processor", "VideoProcessor")
    video_class: Any = type(
        name_of_video, (getattr(videos, name_of_video),), {"preprocess": _preprocess}
    )
    parts = {
        "tokenizer": AutoTokenizer.from_pretrained(source),
        "image_processor": AutoImageProcessor.from_pretrained(source),
        "video_processor": video_class.from_pretrained(source),
    }
    settings, _ = processor_class.get_processor_dict(source)
    names = (
        processor_class.get_attributes()
        if hasattr(processor_class, "get_attributes")
        else processor_class.attributes  # 4.x
    )
    return processor_class.from_args_and_dict([parts[name] for name in names], settings)


def _preprocess(video_processor: Any, videos: Sequence[np.ndarray], **_: Any) -> Any:
    """Pixels [V, F, 3, height, width] of videos [F, H, W, 3]."""
    import torch
    from transformers import BatchFeature, CLIPImageProcessor

    steps = {f"do_{step}": getattr(video_processor, f"do_{step}") for step in _STEPS}
    settings = {name: getattr(video_processor, name) for name in _SETTINGS}
    # The sizes are objects of their own in 5.x, which image processors take as dicts.
    sizes = {name: _as_dict(settings[name]) for name in ("size", "crop_size")}
    processor = CLIPImageProcessor(**steps, **{**settings, **sizes})
    pixels = [
        processor([Image.fromarray(frame) for frame in video], return_tensors="pt")["pixel_values"]
        for video in videos
    ]
    return BatchFeature({"pixel_values_videos": torch.stack(pixels)})


def _as_dict(size: Any) -> dict[str, int] | None:
    if size is None:
        return None
    return {name: edge for name, edge in dict(size).items() if edge is not None}
