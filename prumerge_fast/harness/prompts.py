"""Questions, images and videos as model inputs: in the checkpoint's own format, or in LLaVA-1.5's.

The checkpoints of LLaVA-1.5 on the hub ask otherwise than LLaVA's own code: their chat template
leaves out the system message, and their image processor crops what is not square.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageOps

from prumerge_fast.errors import InputError, PictureError
from prumerge_fast.harness.inputs import IMAGE_TOKEN, VIDEO_TOKEN, Item
from prumerge_fast.harness.models import Conversation, Loaded
from prumerge_fast.versions import takes_special_tokens_option

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
    check_modalities(loaded, items)
    read = {kind: [item for item in items if item.modality == kind] for kind in ("image", "video")}
    with np.errstate(divide="ignore", invalid="ignore"):  # an error below, not a warning
        inputs = model_inputs(
            loaded,
            [format_prompt(loaded, item) for item in items],
            [item.load() for item in read["image"]],
            [item.load() for item in read["video"]],
        )
    for modality, argument in loaded.adapter.pixels.items():
        if read[modality]:
            pixels = loaded.adapter.renamed(dict(inputs))[argument]
            check_pixels(pixels, [item.image for item in read[modality]], modality)
    return inputs


def check_modalities(loaded: Loaded, items: Sequence[Item]) -> None:
    """`check_modality` of everything that is asked about."""
    for item in items:
        check_modality(loaded, item.modality, item.image)


def check_modality(loaded: Loaded, modality: str, name: str) -> None:
    """Raises InputError where a model does not take what is called `name`: a video."""
    if modality not in loaded.adapter.pixels:
        raise InputError(
            f"--videos: expected a model that takes videos, got {loaded.name}, a "
            f"{type(loaded.model).__name__}, which takes images only, and the video {name}"
        )


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


def model_inputs(
    loaded: Loaded,
    prompts: list[str],
    images: Sequence[Image.Image],
    videos: Sequence[np.ndarray] = (),
) -> Any:
    """What the processor makes of whole prompts, and of the images and videos of all of them.

    Args:
        loaded: The model and its processor.
        prompts: B prompts with an image or video token for each of their images and videos.
        images: In the order of the prompts.
        videos: Frames [F, height, width, 3] uint8 of each, in the order of the prompts.
    """
    given: dict[str, Any] = {"videos": list(videos)} if videos else {}
    prompts, given["add_special_tokens"] = first_token_once(loaded.processor.tokenizer, prompts)
    if not takes_special_tokens_option(loaded.processor):
        first = "" if given.pop("add_special_tokens") else loaded.processor.tokenizer.bos_token
        prompts = [prompt.removeprefix(first) for prompt in prompts]
    inputs = loaded.processor(
        images=_of_prompts(loaded, prompts, [framed(loaded, image) for image in images]) or None,
        text=prompts,
        padding=True,
        return_tensors="pt",
        **given,
    )
    return inputs.to(loaded.device, loaded.dtype)


def _of_prompts(loaded: Loaded, prompts: list[str], images: list[Image.Image]) -> list[Any]:
    """The images prompt by prompt, where a model reads one of several otherwise than one alone."""
    if "batch_num_images" not in loaded.adapter.image_arguments:
        return images
    counts = [prompt.count(placeholder(loaded, "image")) for prompt in prompts]
    if sum(counts) != len(images):
        return images  # the processor says what is wrong
    rest = iter(images)
    return [list(itertools.islice(rest, count)) for count in counts if count]


def pictures_of(loaded: Loaded, inputs: Any) -> dict[str, Any]:
    """What of model inputs describes images and videos, named as the family's adapter takes it."""
    names = loaded.adapter.image_arguments
    return loaded.adapter.renamed({name: inputs[name] for name in names if name in inputs})


def first_token_once(tokenizer: Any, prompts: list[str]) -> tuple[list[str], bool]:
    """Prompts of which all have the tokenizer's first token already or none has, as a chat template
    may have written it; and whether the tokenizer is to add it."""
    first = tokenizer.bos_token
    if first is None or not any(prompt.startswith(first) for prompt in prompts):
        return prompts, True
    if tokenizer("")["input_ids"][:1] == [tokenizer.bos_token_id]:  # it would have to all of them
        prompts = [first + prompt.removeprefix(first) for prompt in prompts]
    return prompts, False


def framed(loaded: Loaded | Conversation, image: Image.Image) -> Image.Image:
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


def check_pixels(pixel_values: torch.Tensor, names: Sequence[str], modality: str = "image") -> None:
    """Raises PictureError where processed pixels [B, ...] of an image or video are not finite.

    Of images in several tiles each, the names of all are given.
    """
    finite = pixel_values.isfinite().flatten(1).all(1).tolist()  # [B]
    if len(finite) > len(names):
        names = [" or ".join(names)] * len(finite)
    for name, good in zip(names, finite, strict=True):
        if not good:
            raise PictureError(
                f"expected finite pixel values from the model's {modality} processor, "
                f"got NaN or infinity for {name}",
                modality,
            )


def format_prompt(loaded: Loaded | Conversation, item: Item) -> str:
    """The whole prompt of a question about one image or video."""
    if item.verbatim:
        token = placeholder(loaded, item.modality)
        return item.text.replace(IMAGE_TOKEN, token).replace(VIDEO_TOKEN, token)
    return chat_prompt(loaded, item.text, [item.modality])


def placeholder(loaded: Loaded | Conversation, modality: str) -> str:
    """What the model's processor takes for an image or a video in a prompt."""
    return getattr(loaded.processor, f"{modality}_token")


def chat_prompt(loaded: Loaded | Conversation, text: str, pictures: Sequence[str]) -> str:
    """A question behind its pictures, each "image" or "video": in the conversation asked for, by
    the processor's chat template, or, where it has none, as in LLaVA-1.5 without the system
    message."""
    processor = loaded.processor
    if loaded.conv_template is None and processor.chat_template is not None:
        content: list[dict[str, str]] = [{"type": modality} for modality in pictures]
        content.append({"type": "text", "text": text})
        return processor.apply_chat_template(
            [{"role": "user", "content": content}], add_generation_prompt=True
        )
    placeholders = "".join(f"{placeholder(loaded, modality)}\n" for modality in pictures)
    system = "" if loaded.conv_template is None else f"{_VICUNA_SYSTEM} "
    return f"{system}USER: {placeholders}{text} ASSISTANT:"
