"""What a vision tower sees of an image or a video, and which of its patches are kept, drawn."""

from __future__ import annotations

import base64
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from prumerge_fast.families.base import Views
from prumerge_fast.harness.models import Loaded
from prumerge_fast.harness.prompts import check_pixels, model_inputs, pictures_of, placeholder
from prumerge_fast.harness.videos import sampled
from prumerge_fast.reduction.config import PruMergeConfig
from prumerge_fast.reduction.padding import within_budget
from prumerge_fast.reduction.reading import Reading, reduce_patches

MOST_VIEWS = 8  # of a video that are drawn
GAP = 6  # pixels between views


@dataclass(frozen=True, eq=False)
class View:
    """What is pruned on its own: an image, a crop of LLaVA-NeXT, a frame of a video.

    Args:
        image: As the vision tower sees it.
        patches: Those that take part, in raster order: all but the padding around the image.
        keys: [n, C], of these patches.
        attention: [N], what each policy scores all patches by, by its name; 0 in the padding.
        kept: The patches that each policy keeps, by its name, in the order of its output.
        joined: [N], where the model joins patches before they are pruned, the patch that stands for
            each, -1 in the padding; `None`: each stands for itself.
    """

    image: Image.Image
    patches: list[int]
    keys: Tensor
    attention: dict[str, Tensor]
    kept: dict[str, list[int]]
    joined: Tensor | None = None

    @property
    def cells(self) -> int:
        """N, all patches."""
        return len(next(iter(self.attention.values())))


@dataclass(frozen=True, eq=False)
class Seen:
    """One image or video, encoded and reduced.

    Args:
        views: What is pruned each on its own: of LLaVA-NeXT's images the overview, then the crops
            row by row.
        grid: Rows and columns of the crops; `None` where there are none.
        tokens: What the language model reads, by the policy's name.
        all_tokens: What it reads of the unpruned image or video.
    """

    views: list[View]
    grid: tuple[int, int] | None
    tokens: dict[str, int]
    all_tokens: int

    def arranged(self, tiles: Sequence[Image.Image]) -> Image.Image:
        """Pictures of the views that are `drawn`, of one size, in their places: the overview beside
        the grid; frames in a row."""
        if len(tiles) == 1:
            return tiles[0]
        places = [self._place(number) for number in range(len(tiles))]
        width, height = (edge + GAP for edge in tiles[0].size)
        rows, columns = (1 + max(edges) for edges in zip(*places, strict=True))
        whole = Image.new("RGB", (columns * width - GAP, rows * height - GAP), "white")
        for (row, column), tile in zip(places, tiles, strict=True):
            whole.paste(tile, (column * width, row * height))
        return whole

    def _place(self, number: int) -> tuple[int, int]:
        if self.grid is None or number == 0:
            return 0, number
        row, column = divmod(number - 1, self.grid[1])
        return row, 1 + column

    def drawn(self) -> list[int]:
        """The views that a picture shows: all, or of a long video some, evenly."""
        count = len(self.views)
        if self.grid is not None or count <= MOST_VIEWS:
            return list(range(count))
        return sampled(count, MOST_VIEWS)


def look(
    loaded: Loaded,
    picture: Any,
    name: str,
    configs: Mapping[str, PruMergeConfig],
    *,
    backend: str,
    modality: str = "image",
) -> Seen:
    """Encodes an image or a video once and reduces it by every config.

    Args:
        loaded: The model and its processor.
        picture: An image, or the frames [F, height, width, 3] of a video.
        name: Of the picture.
        configs: By the names of policies.
        backend: Of `prune_merge`.
        modality: "image" or "video".

    Raises:
        InputError: The processed pixels are not finite.
    """
    is_image = modality == "image"
    token = placeholder(loaded, modality)
    inputs = model_inputs(
        loaded, [token], [picture] if is_image else [], [] if is_image else [picture]
    )
    given = pictures_of(loaded, inputs)
    check_pixels(given[loaded.adapter.pixels[modality]], [name], modality)
    adapter, model = loaded.adapter.reading_once(), loaded.model
    with torch.inference_mode():
        views = {
            policy: adapter.views(model, modality, given, config, backend)
            for policy, config in configs.items()
        }
        encoded = {
            policy: adapter.encode(model, given, config, backend)[modality]
            for policy, config in configs.items()
        }
    resolved = {policy: adapter.resolved(model, config) for policy, config in configs.items()}
    first = next(iter(views.values()))
    processor = getattr(loaded.processor, f"{modality}_processor")
    mean, std = (
        torch.tensor(v)[:, None, None] for v in (processor.image_mean, processor.image_std)
    )
    pixels = (first.pixels.float().cpu() * std + mean).clamp(0, 1) * 255  # [K, 3, H, W]
    images = pixels.round().byte().permute(0, 2, 3, 1).numpy()
    return Seen(
        [
            _view(Image.fromarray(image), views, number, resolved, backend)
            for number, image in enumerate(images)
        ],
        first.grids[0] if first.grids else None,
        {policy: sum(tokens.lengths) for policy, tokens in encoded.items()},
        int((inputs["input_ids"] == adapter.placeholder_id(model, modality)).sum()),
    )


@torch.inference_mode()
def _view(
    image: Image.Image,
    views: Mapping[str, Views],
    number: int,
    configs: Mapping[str, PruMergeConfig],
    backend: str,
) -> View:
    first = next(iter(views.values()))
    valid = first.valid[number]  # [N]
    patches = valid.nonzero()[:, 0]  # [n]
    keys = torch.empty(0)
    attention, kept = {}, dict[str, list[int]]()
    for policy, config in configs.items():
        attention[policy], kept[policy] = torch.zeros(len(valid)), []
        if not len(patches):
            continue
        read = views[policy].patches
        device = read.features.device
        chosen = read.chosen(torch.tensor([number], device=device), patches[None].to(device))
        if isinstance(chosen, Reading):
            chosen = chosen.scored(config, backend)
        keys = chosen.keys[0]  # [n, C]
        merged = reduce_patches(chosen, within_budget(config, len(patches)), backend)
        attention[policy][patches] = chosen.attention[0].float().cpu()
        centres = merged.kept[0].cpu()
        kept[policy] = patches[centres[centres >= 0]].tolist()
    joined = None if first.cells is None else first.cells[number]  # [N]
    return View(image, patches.tolist(), keys, attention, kept, joined)


class Grid:
    """The image, enlarged, and where its patches lie on it; at twice its final size.

    Args:
        image: Of which patches are squares.
        patches: N.
        panel: Pixels of the final picture's longer side, at least.
        joined: Of a `View`.
    """

    def __init__(
        self, image: Image.Image, patches: int, panel: int, joined: Tensor | None = None
    ) -> None:
        self.joined = joined
        self.rows = round((patches * image.height / image.width) ** 0.5)
        self.columns = patches // self.rows
        self.cell = 2 * -(-panel // max(self.rows, self.columns))  # pixels of a patch's side
        size = self.columns * self.cell, self.rows * self.cell
        self.image = image.resize(size, Image.Resampling.LANCZOS)

    def final(self, picture: Image.Image) -> Image.Image:
        """What was drawn, at its final size."""
        width, height = self.image.size
        return picture.resize((width // 2, height // 2), Image.Resampling.LANCZOS)

    def dimmed(self, brightness: float) -> Image.Image:
        return self.image.point(lambda value: value * brightness)

    def members(self, index: int) -> list[tuple[int, int]]:
        """Rows and columns of the patches that a patch stands for."""
        members = [index]
        if self.joined is not None:
            members = (self.joined == index).nonzero()[:, 0].tolist()
        return [divmod(member, self.columns) for member in members]

    def spread(self, values: Tensor) -> Tensor:
        """[N], of each patch the value of the one that stands for it; 0 in the padding."""
        if self.joined is None:
            return values
        return values[self.joined].masked_fill(self.joined < 0, 0)

    def box(self, index: int) -> tuple[int, int, int, int]:
        """Around what a patch stands for, which is a rectangle."""
        rows, columns = zip(*self.members(index), strict=True)
        left, top, right, bottom = min(columns), min(rows), max(columns) + 1, max(rows) + 1
        return left * self.cell, top * self.cell, right * self.cell, bottom * self.cell

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
        kept = {member for index in centres for member in self.members(index)}
        for row, column in kept:
            left, top = column * self.cell, row * self.cell
            right, bottom = left + self.cell, top + self.cell
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
