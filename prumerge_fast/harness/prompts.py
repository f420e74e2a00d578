"""Questions and images as model inputs: in the checkpoint's own format, or in LLaVA-1.5's.

The checkpoints of LLaVA-1.5 on the hub ask otherwise than LLaVA's own code: their chat template
leaves out the system message, and their image processor crops what is not square.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageOps

from prumerge_fast.errors import PictureError
from prumerge_fast.harness.inputs import IMAGE_TOKEN, Item
from prumerge_fast.harness.models import Loaded

# The system message of the conversation `vicuna_v1` in LLaVA's llava/conversation.py.
_VICUNA_SYSTEM = (
    "A chat between a curious user and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the user's questions."
)


def prepare(loaded: Loaded, items: Sequence[Item]) -> Any:
    """Model inputs for a batch of questions, padded on the left, on the model's device.

    Raises:
        PictureError: An image cannot be read, or its pixels are not finite once processed.
    """
    with np.errstate(divide="ignore", invalid="ignore"):  # an error below, not a warning
        inputs = model_inputs(
            loaded,
            [format_prompt(loaded, item) for item in items],
            [item.load() for item in items],
        )
    check_pixels(inputs["pixel_values"], [item.image for item in items])
    return inputs


def prepare_readable(
    loaded: Loaded, items: Sequence[Item], *, strict: bool
) -> tuple[Any, dict[int, str]]:
    """`prepare` of the questions whose pictures can be used.

    Returns:
        The inputs, `None` where no picture can be used, and what is wrong with the pictures of the
        others, by their place in `items`.

    Raises:
        PictureError: One cannot, and that is to end the run (`strict`).
    """
    try:
        return prepare(loaded, items), {}
    except PictureError as error:
        if strict:
            raise
        if len(items) == 1:
            return None, {0: error.says}
    failed = {}
    for place, item in enumerate(items):
        try:
            prepare(loaded, [item])
        except PictureError as error:
            failed[place] = error.says
    good = [item for place, item in enumerate(items) if place not in failed]
    return prepare(loaded, good) if good else None, failed


def model_inputs(loaded: Loaded, prompts: list[str], images: Sequence[Image.Image]) -> Any:
    """What the processor makes of whole prompts and the images of all of them, in order."""
    # A chat template may have written the tokenizer's first token already.
    first = loaded.processor.tokenizer.bos_token
    inputs = loaded.processor(
        images=[framed(loaded, image) for image in images] or None,
        text=prompts,
        padding=True,
        return_tensors="pt",
        add_special_tokens=first is None or not prompts[0].startswith(first),
    )
    return inputs.to(loaded.device, loaded.dtype)


def framed(loaded: Loaded, image: Image.Image) -> Image.Image:
    """What the image processor is given: the image, padded to a square where that is asked for.

    As `expand2square` in LLaVA's llava/mm_utils.py: in the middle, on the processor's mean colour.
    """
    if loaded.image_aspect_ratio == "pad":
        side = max(image.size)
        mean = loaded.processor.image_processor.image_mean
        square = Image.new("RGB", (side, side), tuple(int(255 * channel) for channel in mean))
        square.paste(image, ((side - image.width) // 2, (side - image.height) // 2))
        image = square
    if min(image.size) <= 3:  # transformers 4 takes a side of 1 or 3 pixels for the channels
        image = ImageOps.scale(image, 4, Image.Resampling.NEAREST)
    return image


def check_pixels(pixel_values: torch.Tensor, names: Sequence[str]) -> None:
    """Raises PictureError where an image's processed pixels [B, 3, H, W] are not finite."""
    finite = pixel_values.isfinite().flatten(1).all(1).tolist()  # [B]
    for name, good in zip(names, finite, strict=True):
        if not good:
            raise PictureError(
                "expected finite pixel values from the model's image processor, "
                f"got NaN or infinity for {name}"
            )


def format_prompt(loaded: Loaded, item: Item) -> str:
    """The whole prompt of a question about one image."""
    if item.verbatim:
        return item.text.replace(IMAGE_TOKEN, loaded.processor.image_token)
    return chat_prompt(loaded, item.text, images=1)


def chat_prompt(loaded: Loaded, text: str, images: int) -> str:
    """A question behind its images: in the conversation asked for, by the processor's chat
    template, or, where it has none, as in LLaVA-1.5 without the system message."""
    processor = loaded.processor
    if loaded.conv_template is None and processor.chat_template is not None:
        content = [{"type": "image"}] * images + [{"type": "text", "text": text}]
        return processor.apply_chat_template(
            [{"role": "user", "content": content}], add_generation_prompt=True
        )
    placeholders = f"{processor.image_token}\n" * images
    system = "" if loaded.conv_template is None else f"{_VICUNA_SYSTEM} "
    return f"{system}USER: {placeholders}{text} ASSISTANT:"
