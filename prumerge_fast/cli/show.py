"""`show`: what PruMerge does to one image, drawn over it."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor
from torch.nn.functional import normalize

from prumerge_fast.cli import report
from prumerge_fast.cli.inputs import InputError, image_by_name
from prumerge_fast.cli.models import Loaded, check_keep, check_pixels, load
from prumerge_fast.config import PruMergeConfig
from prumerge_fast.dispatch import prune_merge, resolve_backend
from prumerge_fast.reference import nearest
from prumerge_fast.vision import encode

PANEL = 480  # pixels of one panel's side, at least
CAPTION = 44
GAP = 12
STRONGEST = 4  # centres whose neighbours are drawn
COLOURS = ((255, 92, 92), (80, 200, 255), (255, 214, 64), (140, 240, 120))
# Black, violet, orange, pale yellow: dark to bright, so that the order survives a grey print.
HEAT = np.array([(0, 0, 4), (87, 16, 110), (188, 55, 84), (249, 142, 9), (252, 255, 164)])


@dataclass(frozen=True)
class ShowOptions:
    """The options of the command (`prumerge-fast show --help` describes them)."""

    command: list[str]
    image: str
    output: Path | None
    model: str | None
    config: PruMergeConfig
    backend: str
    dtype: str
    device: str
    as_json: bool


def run(options: ShowOptions) -> None:
    """Runs the command.

    Raises:
        InputError: Something given cannot be used.
        BackendUnavailableError: The backend was asked for by name and cannot run.
    """
    output = options.output or Path(f"{_stem(options.image)}-{options.config.variant}.png")
    if output.suffix.lower() != ".png":
        raise InputError(f"--output: expected a name that ends in .png, got {output}")
    if output.exists() and output.resolve() == Path(options.image).resolve():
        raise InputError(f"--output: expected another file than the image, got {output}")
    image = image_by_name(options.image)
    loaded = load(options.model, dtype=options.dtype, device=options.device)
    check_keep(options.config, loaded.patches)
    backend = resolve_backend(options.backend, loaded.device).name

    pixel_values = loaded.processor.image_processor(image, return_tensors="pt")["pixel_values"]
    check_pixels(pixel_values, [options.image])
    with torch.inference_mode():
        query, keys, hidden = encode(loaded.model, pixel_values.to(loaded.device, loaded.dtype))
        merged = prune_merge(query, keys, hidden, options.config, backend=options.backend)
    centres = [index for index in merged.kept[0].tolist() if index >= 0]
    attention = merged.attention[0].float().cpu()  # [N]
    strongest = sorted(centres, key=lambda index: -float(attention[index]))[:STRONGEST]
    unit_keys = normalize(keys[0, 1:].float(), dim=-1)  # [N, C]
    links = {centre: nearest(unit_keys, centre, options.config.neighbours) for centre in strongest}
    picture = draw(seen_image(loaded, pixel_values[0]), attention, centres, links)
    try:
        picture.save(output)
    except OSError as error:
        raise InputError(f"--output: expected a writable file, got {output} ({error})") from None

    tokens = int(merged.lengths[0])
    if options.as_json:
        report.print_json(
            {
                "image": options.image,
                "output": str(output),
                "model": loaded.name,
                "backend": backend,
                "config": asdict(options.config),
                "patches": len(attention),
                "visual_tokens": tokens,
                "kept": centres,
                "attention": attention.tolist(),
                "neighbours": links,
                **report.provenance(options.command, loaded.device),
            }
        )
    else:
        print(f"{output}: {tokens} of {len(attention)} visual tokens")


def seen_image(loaded: Loaded, pixel_values: Tensor) -> Image.Image:
    """The image as the vision tower sees it, from its processed pixels [3, H, W]."""
    processor = loaded.processor.image_processor
    mean, std = (
        torch.tensor(v)[:, None, None] for v in (processor.image_mean, processor.image_std)
    )
    pixels = (pixel_values * std + mean).clamp(0, 1) * 255  # [3, H, W]
    return Image.fromarray(pixels.round().byte().permute(1, 2, 0).numpy())


def draw(
    image: Image.Image, attention: Tensor, centres: list[int], links: dict[int, list[int]]
) -> Image.Image:
    """Three panels: class attention, kept centres, and the neighbours that some of them merge.

    Args:
        image: What the vision tower sees; square.
        attention: [N], class attention of the patches, in raster order.
        centres: Kept patches, in the order of the output.
        links: Neighbours of some of the centres.
    """
    grid = _Grid(image, round(len(attention) ** 0.5))
    most = max((len(near) for near in links.values()), default=0)
    panels = {
        f"class attention, at most {attention.max():.1%}": _draw_attention(grid, attention),
        f"{len(centres)} of {len(attention)} patches kept, in order": _draw_centres(grid, centres),
        f"{len(links)} strongest centres, {most} neighbours each": _draw_links(
            grid, centres, links
        ),
    }
    width = len(panels) * (grid.side + GAP) + GAP
    sheet = Image.new("RGB", (width, grid.side + CAPTION + GAP), "white")
    pen = ImageDraw.Draw(sheet)
    for number, (caption, panel) in enumerate(panels.items()):
        left = GAP + number * (grid.side + GAP)
        pen.text((left, CAPTION / 2), caption, "black", ImageFont.load_default(20), anchor="lm")
        sheet.paste(panel.resize((grid.side, grid.side), Image.Resampling.LANCZOS), (left, CAPTION))
    return sheet


class _Grid:
    """The image, enlarged, and where its patches lie on it; at twice a panel's final size."""

    def __init__(self, image: Image.Image, cells: int) -> None:
        self.cells = cells
        self.cell = 2 * -(-PANEL // cells)  # pixels of a patch's side
        self.side = self.cell * cells // 2
        self.image = image.resize((2 * self.side,) * 2, Image.Resampling.LANCZOS)

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


def _draw_attention(grid: _Grid, attention: Tensor) -> Image.Image:
    share = np.sqrt(attention.numpy() / attention.max().item())  # [N]; the root lifts the tail
    positions = np.linspace(0, 1, len(HEAT))
    colours = np.stack([np.interp(share, positions, HEAT[:, c]) for c in range(3)], axis=-1)
    tiles = Image.fromarray(colours.astype(np.uint8).reshape(grid.cells, grid.cells, 3))
    heat = tiles.resize(grid.image.size, Image.Resampling.NEAREST)
    return Image.blend(grid.image.convert("L").convert("RGB"), heat, 0.65)


def _draw_centres(grid: _Grid, centres: list[int]) -> Image.Image:
    panel = grid.dimmed(0.3)
    pen = ImageDraw.Draw(panel)
    for rank, index in enumerate(centres, start=1):
        panel.paste(grid.image.crop(grid.box(index)), grid.box(index))
        pen.rectangle(grid.box(index), outline="white", width=2)
        grid.number(pen, index, str(rank))
    return panel


def _draw_links(grid: _Grid, centres: list[int], links: dict[int, list[int]]) -> Image.Image:
    panel = grid.dimmed(0.5)
    tint = ImageDraw.Draw(panel, "RGBA")
    for (_, near), colour in zip(links.items(), COLOURS, strict=False):
        for index in near:
            tint.rectangle(grid.box(index), (*colour, 90))
    pen = ImageDraw.Draw(panel)
    for (centre, near), colour in zip(links.items(), COLOURS, strict=False):
        for index in near:
            pen.line([grid.middle(centre), grid.middle(index)], colour, width=3)
    for centre, colour in zip(links, COLOURS, strict=False):
        pen.rectangle(grid.box(centre), colour, outline="white", width=4)
        grid.number(pen, centre, str(centres.index(centre) + 1))
    return panel


def _stem(image: str) -> str:
    return image.replace(":", "-") if image.startswith("demo:") else Path(image).stem
