"""What a vision tower sees of an image, and which of its patches are kept, drawn."""

from __future__ import annotations

import base64
import io
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from prumerge_fast.families.encode import encode
from prumerge_fast.harness.models import Loaded
from prumerge_fast.harness.prompts import check_pixels, framed
from prumerge_fast.reduction.config import PruMergeConfig
from prumerge_fast.reduction.dispatch import prune_merge
from prumerge_fast.reduction.output import MergedTokens


@dataclass(frozen=True, eq=False)
class Seen:
    """One image, encoded and reduced.

    Args:
        image: As the vision tower sees it; square.
        keys: [1+N, C], of the class token and the patches.
        merged: What each policy made of it, by the policy's name; B = 1.
    """

    image: Image.Image
    keys: Tensor
    merged: dict[str, MergedTokens]

    def centres(self, policy: str) -> list[int]:
        """The patches that a policy keeps, in the order of its output."""
        return [index for index in self.merged[policy].kept[0].tolist() if index >= 0]


def look(
    loaded: Loaded,
    image: Image.Image,
    name: str,
    configs: Mapping[str, PruMergeConfig],
    *,
    backend: str,
) -> Seen:
    """Encodes an image once and reduces it by every config.

    Raises:
        InputError: The processed pixels of the image (by its `name`) are not finite.
    """
    processor = loaded.processor.image_processor
    framed_image = framed(loaded, image)
    pixel_values = processor(framed_image, return_tensors="pt")["pixel_values"]  # [1, 3, H, W]
    check_pixels(pixel_values, [name])
    with torch.inference_mode():
        query, keys, hidden = encode(loaded.model, pixel_values.to(loaded.device, loaded.dtype))
        merged = {
            policy: prune_merge(query, keys, hidden, config, backend=backend)
            for policy, config in configs.items()
        }
    mean, std = (
        torch.tensor(v)[:, None, None] for v in (processor.image_mean, processor.image_std)
    )
    pixels = (pixel_values[0] * std + mean).clamp(0, 1) * 255  # [3, H, W]
    seen = Image.fromarray(pixels.round().byte().permute(1, 2, 0).numpy())
    return Seen(seen, keys[0], merged)


class Grid:
    """The image, enlarged, and where its patches lie on it; at twice its final size.

    Args:
        image: Square.
        patches: N, a square number.
        panel: Pixels of the final picture's side, at least.
    """

    def __init__(self, image: Image.Image, patches: int, panel: int) -> None:
        self.cells = round(patches**0.5)
        self.cell = 2 * -(-panel // self.cells)  # pixels of a patch's side
        self.side = self.cell * self.cells // 2
        self.image = image.resize((2 * self.side,) * 2, Image.Resampling.LANCZOS)

    def final(self, picture: Image.Image) -> Image.Image:
        """What was drawn, at its final size."""
        return picture.resize((self.side, self.side), Image.Resampling.LANCZOS)

    def dimmed(self, brightness: float) -> Image.Image:
        return self.image.point(lambda value: value * brightness)

    def box(self, index: int) -> tuple[int, int, int, int]:
        row, column = divmod(index, self.cells)
        left, top = column * self.cell, row * self.cell
        return left, top, left + self.cell, top + self.cell

    def middle(self, index: int) -> tuple[float, float]:
        left, top, right, bottom = self.box(index)
        return (left + right) / 2, (top + bottom) / 2

    def number(self, pen: ImageDraw.ImageDraw, index: int, text: str) -> None:
        pen.text(
            self.middle(index),
            text,
            "white",
            ImageFont.load_default(0.5 * self.cell),
            anchor="mm",
            stroke_width=self.cell // 16,
            stroke_fill="black",
        )

    def lit(self, centres: list[int]) -> Image.Image:
        """The image, dark but for the kept patches."""
        picture = self.dimmed(0.3)
        for index in centres:
            picture.paste(self.image.crop(self.box(index)), self.box(index))
        return picture

    def outlined(self, centres: list[int], colour: str) -> Image.Image:
        """The image, dark but for the kept patches, with a line around each group of them."""
        picture = self.lit(centres)
        pen = ImageDraw.Draw(picture)
        kept = {divmod(index, self.cells) for index in centres}
        for row, column in kept:
            left, top, right, bottom = self.box(row * self.cells + column)
            for neighbour, edge in {
                (row - 1, column): (left, top, right, top),
                (row + 1, column): (left, bottom, right, bottom),
                (row, column - 1): (left, top, left, bottom),
                (row, column + 1): (right, top, right, bottom),
            }.items():
                if neighbour not in kept:
                    pen.line(edge, colour, width=4)
        return picture


def data_uri(picture: Image.Image) -> str:
    """A picture as a compressed `data:` address, for a page that stands alone."""
    file = io.BytesIO()
    picture.save(file, "WEBP", quality=70, method=6)
    return f"data:image/webp;base64,{base64.b64encode(file.getvalue()).decode()}"
