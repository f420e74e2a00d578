"""Tiny models of each family with random weights, saved with the processor of their family."""

from __future__ import annotations

from importlib import import_module
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest
import transformers
from command_line import tokenizer
from tiny_families import FAMILIES, V5, LlavaNext
from tiny_models import IMAGE, VIDEO

# Pixels; a patch has 6. LLaVA-NeXT-Video's processor halves the grid: it is even.
SIDES = {"LLaVA-NeXT-Video": 36, "LLaVA with Pixtral": 48}
_PROCESSORS = {"LLaVA": "llava", "ViP-LLaVA": "llava", "LLaVA-NeXT": "llava_next"}
_PROCESSORS |= {"LLaVA with SigLIP": "llava", "LLaVA-NeXT with SigLIP": "llava_next"}
_PROCESSORS |= {"Video-LLaVA": "video_llava", "LLaVA-NeXT-Video": "llava_next_video"}
_PROCESSORS |= {"LLaVA-OneVision": "llava_onevision", "LLaVA with Pixtral": "pixtral"}


def side_of(name: str) -> int:
    """Of the square of pixels that the tower of a family sees."""
    return SIDES.get(name, 30)


def save(name: str, path: Path, grids: Any = None, **template: str) -> Path:
    """Saves the tiny model of a family, with its processor and this `chat_template`, if any.

    Args:
        name: Of the family.
        path: A folder.
        grids: `image_grid_pinpoints`; `None`: those that all families with crops have.
        template: Of the processor.
    """
    family: Any = FAMILIES[name]
    side = side_of(name)
    sizes = {"size": {"shortest_edge": side}, "crop_size": {"height": side, "width": side}}
    tokens = {"<image>": IMAGE} | ({"<video>": VIDEO} if "video" in family.kinds else {})
    if name == "LLaVA with Pixtral":
        if V5:
            pytest.importorskip("torchvision")  # without which there is no processor
        tokens = {"[IMG]": IMAGE, "[IMG_BREAK]": family.row_break, "[IMG_END]": family.image_end}
    options: dict[str, Any] = {}
    if family.cuts:
        grids = grids or LlavaNext.options["image_grid_pinpoints"]
        grids = [[edge * side // 30 for edge in grid] for grid in grids]
        options["image_grid_pinpoints"] = grids
    model = family.model(image_size=side, **options)
    model.save_pretrained(path)

    kind = _PROCESSORS[name]
    package = f"transformers.models.{kind}"
    processing = import_module(f"{package}.processing_{kind}")
    processor_class = next(
        getattr(processing, one) for one in processing.__all__ if one.endswith("Processor")
    )
    parts = {"tokenizer": tokenizer(**tokens)}
    if kind == "pixtral":
        parts["image_processor"] = family.processor()
    elif kind == "llava_onevision":
        sizes = {"size": sizes["crop_size"]}
        parts["image_processor"] = transformers.LlavaOnevisionImageProcessor(**sizes, **options)
    elif kind.startswith("llava_next"):
        parts["image_processor"] = transformers.LlavaNextImageProcessor(**sizes, **options)
    elif kind == "video_llava":
        parts["image_processor"] = transformers.VideoLlavaImageProcessor(**sizes)
    elif family.class_token:
        parts["image_processor"] = transformers.CLIPImageProcessor(**sizes)
    else:
        parts["image_processor"] = transformers.SiglipImageProcessor(size=sizes["crop_size"])
    if "video" in family.kinds:  # `transformers` itself has it with torchvision only
        videos = import_module(f"{package}.video_processing_{kind}")
        video_class = getattr(videos, videos.__all__[0])
        parts["video_processor"] = video_class(**sizes)
    # Without torchvision it does not find the class that its video processor has to be of.
    with mock.patch.object(processor_class, "check_argument_for_proper_class"):
        processor = processor_class(
            **parts,
            **template,
            patch_size=6,
            num_image_tokens=(side // 6) ** 2,  # of OneVision
            vision_feature_select_strategy="default" if family.class_token else "full",
            num_additional_image_tokens=int(family.class_token),
        )
    processor.save_pretrained(path)
    return path


def write_video(
    path: Path, frames: int, size: tuple[int, int] = (64, 48), rotation: int = 0
) -> Path:
    """Writes a video of plain frames, each brighter than the one before, with a red left half.

    Args:
        path: Of the file; its suffix chooses the format.
        frames: How many.
        size: Width and height.
        rotation: Degrees counter-clockwise that whoever shows it is to turn it by.
    """
    import av

    with av.open(str(path), "w") as container:
        stream = container.add_stream("mpeg4", rate=5)
        stream.width, stream.height = size
        stream.pix_fmt = "yuv420p"
        if rotation:
            stream.set_display_rotation(rotation)
        for number in range(frames):
            picture = np.full((size[1], size[0], 3), 255 * number // max(frames, 2), np.uint8)
            picture[:, : size[0] // 2, 0] = 255
            container.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
        container.mux(stream.encode())
    return path
