"""`show`: what PruMerge does to one image or video, drawn over it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor
from torch.nn.functional import normalize

from prumerge_fast.cli import report
from prumerge_fast.cli.pictures import Grid, Seen, View, look
from prumerge_fast.demo import MODEL_DIR
from prumerge_fast.demo.items import image_by_name
from prumerge_fast.errors import InputError
from prumerge_fast.harness.models import config_of, load
from prumerge_fast.harness.prompts import check_modality
from prumerge_fast.harness.provenance import provenance
from prumerge_fast.harness.videos import VIDEO_SUFFIXES, read_video
from prumerge_fast.reduction.backends import resolve_backend
from prumerge_fast.reduction.reference import nearest
from prumerge_fast.towers.wrappers import unwrapped

PANEL = 480  # pixels of one panel's side, at least
CAPTION = 44
GAP = 12
SHOWN = "shown"  # the one policy's name
_VIDEOS = tuple(suffix for suffix in VIDEO_SUFFIXES if suffix != ".gif")
STRONGEST = 4  # centres whose neighbours are drawn
SCORES = {"class": "class attention", "received": "attention received"}
COLOURS = ((255, 92, 92), (80, 200, 255), (255, 214, 64), (140, 240, 120))
# Black, violet, orange, pale yellow: dark to bright, so that the order survives a grey print.
HEAT = np.array([(0, 0, 4), (87, 16, 110), (188, 55, 84), (249, 142, 9), (252, 255, 164)])


@dataclass(frozen=True)
class ShowOptions:
    """The options of the command (`prumerge-fast show --help` describes them)."""

    command: list[str]
    image: str
    output: Path | None
    frames: int
    model: str | None
    image_aspect_ratio: str | None
    chosen: Mapping[str, Any]
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
    if options.output is not None:
        _check_output(options.output, options.image)
    modality = "video" if Path(options.image).suffix.lower() in _VIDEOS else "image"
    picture: Any = (
        read_video(Path(options.image), options.frames)
        if modality == "video"
        else image_by_name(options.image)
    )
    loaded = load(
        options.model or MODEL_DIR,
        dtype=options.dtype,
        device=options.device,
        image_aspect_ratio=options.image_aspect_ratio,
    )
    config = config_of(loaded.model, options.chosen)
    output = options.output or Path(f"{_stem(options.image)}-{config.variant}.png")
    check_modality(loaded, modality, options.image)
    backend = resolve_backend(options.backend, loaded.device).name

    seen = look(
        loaded,
        picture,
        options.image,
        {SHOWN: config},
        backend=options.backend,
        modality=modality,
    )
    scores = loaded.adapter.resolved(unwrapped(loaded.model), config).scores
    links = [_links(view, config.neighbours) for view in seen.views]
    try:
        draw(seen, links, SCORES[scores]).save(output, "PNG")
    except OSError as error:
        raise InputError(f"--output: expected a writable file, got {output} ({error})") from None

    tokens = seen.tokens[SHOWN]
    if options.as_json:
        views = [
            {
                "patches": len(view.patches),
                "kept": view.kept[SHOWN],
                "attention": view.attention[SHOWN].tolist(),
                "neighbours": links_,
            }
            for view, links_ in zip(seen.views, links, strict=True)
        ]
        report.print_json(
            {
                "image": options.image,
                "modality": modality,
                "output": str(output),
                "model": loaded.name,
                "backend": backend,
                "config": asdict(config),
                "scores": scores,
                "all_tokens": seen.all_tokens,
                "visual_tokens": tokens,
                **(views[0] if len(views) == 1 else {"grid": seen.grid, "views": views}),
                **provenance(options.command, loaded.device),
            }
        )
    else:
        print(f"{output}: {tokens} of {seen.all_tokens} visual tokens")


def _check_output(output: Path, image: str) -> None:
    """Raise `InputError` unless a drawing of the image can have that name."""
    if output.suffix.lower() != ".png":
        raise InputError(f"--output: expected a name that ends in .png, got {output}")
    if output.exists() and output.resolve() == Path(image).resolve():
        raise InputError(f"--output: expected another file than the image, got {output}")


def _links(view: View, neighbours: int) -> dict[int, list[int]]:
    """What the strongest centres of a view merge: patches by centre."""
    unit_keys = normalize(view.keys.float(), dim=-1)  # [n, C]
    strongest = sorted(view.kept[SHOWN], key=lambda index: -float(view.attention[SHOWN][index]))
    return {
        centre: [
            view.patches[near]
            for near in nearest(unit_keys, view.patches.index(centre), neighbours)
        ]
        for centre in strongest[:STRONGEST]
    }


def draw(seen: Seen, links: list[dict[int, list[int]]], scores: str) -> Image.Image:
    """Three panels: scores, kept centres, and the neighbours that some of them merge.

    Side by side; where there are several crops or frames, one below the other.

    Args:
        seen: What was pruned.
        links: Of each view, neighbours of some of its centres.
        scores: What patches are scored by.
    """
    several = len(seen.views) > 1
    numbers = seen.drawn()
    views = [seen.views[number] for number in numbers]
    shown = [links[number] for number in numbers]
    attention = [view.attention[SHOWN] for view in views]
    panel = PANEL // 2 if several else PANEL
    grids = [Grid(view.image, view.cells, panel, view.joined) for view in views]

    def arranged(tiles: Iterable[Image.Image]) -> Image.Image:
        return seen.arranged([g.final(tile) for g, tile in zip(grids, tiles, strict=True)])

    kept = sum(len(view.kept[SHOWN]) for view in views)
    patches = sum(len(view.patches) for view in views)
    strongest = sum(map(len, shown))
    most = max((len(near) for of_view in shown for near in of_view.values()), default=0)
    highest = max(of_view.max().item() for of_view in attention)
    frames = f" in {len(views)} frames" if several and seen.grid is None else ""
    panels = {
        f"{scores}, at most {highest:.1%}": arranged(
            _draw_attention(grid, of_view) for grid, of_view in zip(grids, attention, strict=True)
        ),
        f"{kept} of {patches} patches kept{frames}, in order": arranged(
            _draw_centres(grid, view.kept[SHOWN]) for grid, view in zip(grids, views, strict=True)
        ),
        f"{strongest} strongest centres, {most} neighbours each": arranged(
            _draw_links(grid, view.kept[SHOWN], of_view)
            for grid, view, of_view in zip(grids, views, shown, strict=True)
        ),
    }
    return _sheet(panels, below=several)


def _sheet(panels: dict[str, Image.Image], *, below: bool) -> Image.Image:
    """Panels of one size with their captions above them: one below or beside the other."""
    width, height = next(iter(panels.values())).size
    step = (0, height + CAPTION) if below else (width + GAP, 0)
    others = len(panels) - 1
    size = (2 * GAP + width + others * step[0], CAPTION + height + GAP + others * step[1])
    sheet = Image.new("RGB", size, "white")
    pen = ImageDraw.Draw(sheet)
    for number, (caption, panel) in enumerate(panels.items()):
        left, top = GAP + number * step[0], number * step[1]
        pen.text(
            (left, top + CAPTION / 2), caption, "black", ImageFont.load_default(20), anchor="lm"
        )
        sheet.paste(panel, (left, top + CAPTION))
    return sheet


def _draw_attention(grid: Grid, attention: Tensor) -> Image.Image:
    most = max(attention.max().item(), 1e-12)  # a crop may be all padding
    share = np.sqrt(grid.spread(attention).numpy() / most)  # [N]; the root lifts the tail
    positions = np.linspace(0, 1, len(HEAT))
    colours = np.stack([np.interp(share, positions, HEAT[:, c]) for c in range(3)], axis=-1)
    tiles = Image.fromarray(colours.astype(np.uint8).reshape(grid.rows, grid.columns, 3))
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
