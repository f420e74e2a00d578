"""`show`: what PruMerge does to one image, drawn over it."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor
from torch.nn.functional import normalize

from prumerge_fast.cli import report
from prumerge_fast.cli.pictures import Grid, look
from prumerge_fast.demo import MODEL_DIR
from prumerge_fast.demo.items import image_by_name
from prumerge_fast.errors import InputError
from prumerge_fast.harness.models import check_keep, load
from prumerge_fast.harness.provenance import provenance
from prumerge_fast.reduction.config import PruMergeConfig
from prumerge_fast.reduction.dispatch import resolve_backend
from prumerge_fast.reduction.reference import nearest

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
    image_aspect_ratio: str | None
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
    loaded = load(
        options.model or MODEL_DIR,
        dtype=options.dtype,
        device=options.device,
        image_aspect_ratio=options.image_aspect_ratio,
    )
    check_keep(options.config, loaded.patches)
    backend = resolve_backend(options.backend, loaded.device).name

    seen = look(loaded, image, options.image, {"shown": options.config}, backend=options.backend)
    merged, centres = seen.merged["shown"], seen.centres("shown")
    attention = merged.attention[0].float().cpu()  # [N]
    strongest = sorted(centres, key=lambda index: -float(attention[index]))[:STRONGEST]
    unit_keys = normalize(seen.keys[1:].float(), dim=-1)  # [N, C]
    links = {centre: nearest(unit_keys, centre, options.config.neighbours) for centre in strongest}
    picture = draw(seen.image, attention, centres, links)
    try:
        picture.save(output, "PNG")
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
                **provenance(options.command, loaded.device),
            }
        )
    else:
        print(f"{output}: {tokens} of {len(attention)} visual tokens")


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
    grid = Grid(image, len(attention), PANEL)
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
        sheet.paste(grid.final(panel), (left, CAPTION))
    return sheet


def _draw_attention(grid: Grid, attention: Tensor) -> Image.Image:
    share = np.sqrt(attention.numpy() / attention.max().item())  # [N]; the root lifts the tail
    positions = np.linspace(0, 1, len(HEAT))
    colours = np.stack([np.interp(share, positions, HEAT[:, c]) for c in range(3)], axis=-1)
    tiles = Image.fromarray(colours.astype(np.uint8).reshape(grid.cells, grid.cells, 3))
    heat = tiles.resize(grid.image.size, Image.Resampling.NEAREST)
    return Image.blend(grid.image.convert("L").convert("RGB"), heat, 0.65)


def _draw_centres(grid: Grid, centres: list[int]) -> Image.Image:
    panel = grid.lit(centres)
    pen = ImageDraw.Draw(panel)
    for rank, index in enumerate(centres, start=1):
        pen.rectangle(grid.box(index), outline="white", width=2)
        grid.number(pen, index, str(rank))
    return panel


def _draw_links(grid: Grid, centres: list[int], links: dict[int, list[int]]) -> Image.Image:
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
