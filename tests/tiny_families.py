"""Tiny models of each family of transformers, prompts for them, and an oracle for each.

Oracles are written in loops, from the unpatched model's own modules, without the adapters.
"""

from __future__ import annotations

import functools
import inspect
import math
from fractions import Fraction
from typing import Any, ClassVar

import torch
import transformers
from PIL import Image
from tiny_models import (
    BOS,
    IMAGE,
    PATCHES,
    VIDEO,
    Oracle,
    batch,
    tiny_model,
    tower_outputs,
)
from torch import Tensor
from transformers import (
    CLIPImageProcessor,
    CLIPVisionConfig,
    InternVLVisionConfig,
    LlavaNextImageProcessor,
    LlavaOnevisionImageProcessor,
    PixtralImageProcessor,
    PixtralVisionConfig,
    SiglipImageProcessor,
    SiglipVisionConfig,
)

from prumerge_fast.reduction.config import PruMergeConfig
from prumerge_fast.reduction.dispatch import reduce_tokens

V5 = int(transformers.__version__.split(".")[0]) >= 5
SIDE = 5  # patches of 6 pixels
HEADS = 4  # of the towers
FRAMES = 3


def takes(model: Any, argument: str) -> bool:
    """Whether the `forward` of a model, or of a class, takes an argument of that name."""
    return argument in inspect.signature(model.forward).parameters


Part = Any  # a list of token ids, or a picture: ("image" or "video", its number)

WITHOUT_CLASS_TOKEN = PruMergeConfig(variant="prumerge+", keep=0.25)


class Family:
    """A family with four images and two videos of its own making."""

    kinds: tuple[str, ...] = ("image",)
    cuts = False
    """Whether images are cut in crops."""
    model_name: str
    layer_argument = "vision_feature_layer"
    layers: tuple[int, ...] = (-2,)
    options: ClassVar[dict[str, Any]] = {}
    vision: Any = CLIPVisionConfig
    class_token = True
    default = PruMergeConfig()
    """What `patch(model)` is."""
    takes_any_size = False

    def model(self, **changes: Any) -> Any:
        model_class = getattr(transformers, f"{self.model_name}ForConditionalGeneration")
        config_class = getattr(transformers, f"{self.model_name}Config")
        options = {"vision": self.vision, **self.options, **changes}
        if "video" in self.kinds:
            options["video_token_index"] = VIDEO
        return tiny_model(model_class, config_class, **options)

    def placeholders(self, kind: str, number: int) -> int:
        return PATCHES

    def pixels(self, kind: str, number: int) -> Tensor:
        generator = torch.Generator().manual_seed(10 * number + len(kind))
        shape = (3, 30, 30) if kind == "image" else (FRAMES, 3, 30, 30)
        return torch.randn(shape, generator=generator)

    def arguments(self, kind: str, numbers: list[int]) -> dict[str, Tensor]:
        """What the model takes for these images or videos."""
        name = "pixel_values" if kind == "image" else "pixel_values_videos"
        return {name: torch.stack([self.pixels(kind, number) for number in numbers])}

    def processed(self, image: Image.Image) -> dict[str, Tensor]:
        """What the model takes for this image."""
        processor = self.processor(
            size={"shortest_edge": 30}, crop_size={"height": 30, "width": 30}
        )
        # Of a picture one pixel high, transformers 4 cannot tell channels from rows by itself.
        processed = dict(processor(image, input_data_format="channels_last", return_tensors="pt"))
        if "pixel_values" not in self.arguments("image", [0]):  # Video-LLaVA in transformers 4
            processed = {"pixel_values_images": processed["pixel_values"]}
        return processed

    def processor(self, **size: Any) -> Any:
        return CLIPImageProcessor(**size)

    def features(self, oracle: FamilyOracle, kind: str, number: int) -> Tensor:
        """The projected tokens [m, D] of an image or a video, by hand."""
        return oracle.prune(self.tower(oracle.model, kind), self.pixels(kind, number))

    def places(self, oracle: FamilyOracle, kind: str, number: int) -> list[int]:
        """Which of the picture's placeholders each of those tokens stands for, by hand."""
        oracle.prune(self.tower(oracle.model, kind), self.pixels(kind, number))
        return [index if index >= 0 else PATCHES - 1 for index in oracle.kept]

    def picture(self, kind: str, number: int) -> list[int]:
        """What stands for an image or a video in the caller's prompt."""
        return [IMAGE if kind == "image" else VIDEO] * self.placeholders(kind, number)

    def laid(self, oracle: FamilyOracle, kind: str, number: int) -> tuple[Tensor, list[int]]:
        """What of it the language model reads, [n, D], and the column of `picture` of each."""
        tokens, last = self.features(oracle, kind, number), self.placeholders(kind, number) - 1
        return tokens, [min(place, last) for place in range(len(tokens))]

    def stands(self, oracle: FamilyOracle, kind: str, number: int) -> list[int]:
        """The column of `picture` that each of them stands for."""
        return self.places(oracle, kind, number)

    def tower(self, model: Any, kind: str) -> Any:
        return model.model.vision_tower

    def prompts(self) -> list[list[Part]]:
        """One image, two, none, a video, both; of unequal length."""
        prompts: list[list[Part]] = [
            [[BOS, 30], ("image", 0), [31] * 11],
            [[BOS, 5, 6, 7], ("image", 1), [8, 9]],
            [[BOS], ("image", 2), [11, 12, 13], ("image", 3), [14]],
            [[BOS, 20, 21, 22]],
        ]
        if "video" in self.kinds:
            prompts += [
                [[BOS, 4], ("video", 0), [5, 6]],
                [[BOS, 3], ("video", 1), [7], ("image", 2), [8], [9]],
            ]
        return prompts

    def ids(self, parts: list[Part]) -> list[int]:
        ids: list[int] = []
        for part in parts:
            if isinstance(part, list):
                ids += part
            else:
                ids += self.picture(*part)
        return ids

    def inputs(self, prompts: list[list[Part]], side: str = "left") -> dict[str, Tensor]:
        """A batch, as a processor makes it."""
        inputs = batch([self.ids(parts) for parts in prompts], side)
        for kind in self.kinds:
            pictures = self.pictures(prompts, kind)
            if pictures:
                inputs |= self.arguments(kind, [number for _, number in pictures])
        return inputs

    def pictures(self, prompts: list[list[Part]], kind: str) -> list[Part]:
        """The images or the videos of the prompts, in order."""
        return [part for parts in prompts for part in parts if part[0] == kind]


def scores_by_hand(
    query: Tensor, keys: Tensor, config: PruMergeConfig, class_token: bool = True
) -> Tensor:
    """[1, N], from the whole attention of all queries [1, R, C]."""
    received = config.scores == "received" or not class_token
    heads = HEADS if config.heads == "separate" or (config.heads, received) == ("auto", True) else 1
    q, k = (one.unflatten(2, (heads, -1)).transpose(1, 2) for one in (query, keys))
    shares = (q @ k.transpose(2, 3) / q.shape[3] ** 0.5).softmax(3)  # [1, H, R, R]
    asking = shares[:, :, class_token:] if received else shares[:, :, :1]
    return asking.mean((1, 2))[:, class_token:]


class FamilyOracle(Oracle):
    """Takes prompts in parts."""

    def __init__(self, family: Family, model: Any, config: PruMergeConfig) -> None:
        super().__init__(model, config)
        self.family = family

    @torch.no_grad()
    def prune(self, tower: Any, pixels: Tensor, read: Tensor | None = None) -> Tensor:
        """Tokens [m, D] of an image [3, H, W], chosen among the patches in `read`, or all."""
        return self.model.model.multi_modal_projector(self.merged(tower, pixels, read))

    def merged(self, tower: Any, pixels: Tensor, read: Tensor | None = None) -> Tensor:
        """These, not projected, [m, C]."""
        query, keys, hidden = tower_outputs(tower, pixels[None], *self.family.layers)
        first = int(self.family.class_token)
        if read is not None:
            rows = [*range(first), *(read + first).tolist()]
            query, keys, hidden = (t[:, rows] for t in (query, keys, hidden))
        attention = scores_by_hand(query, keys, self.config, self.family.class_token)
        return self.merge(attention, keys[:, first:], hidden[:, first:])

    def project(self, attention: Tensor, keys: Tensor, patches: Tensor) -> Tensor:
        """Projected tokens [m, D], from scores [1, n], keys [1, n, C] and features [1, n, C]."""
        return self.model.model.multi_modal_projector(self.merge(attention, keys, patches))

    def merge(self, attention: Tensor, keys: Tensor, patches: Tensor) -> Tensor:
        """Tokens [m, D] of patches [1, n, D]; notes the patches that are kept."""
        config = self.config
        if isinstance(config.keep, int):
            config = config.replace(keep=min(config.keep, keys.shape[1]))
        merged = reduce_tokens(attention, keys, patches, config, backend="reference")
        self.kept = merged.kept[0, : merged.lengths[0]].tolist()
        return merged.split()[0]

    @torch.no_grad()
    def tokens(self, part: Part) -> Tensor:
        """[m, D] of an image or a video."""
        return self.family.features(self, *part)

    @torch.no_grad()
    def laid(self, part: Part) -> tuple[Tensor, list[int]]:
        return self.family.laid(self, *part)

    @torch.no_grad()
    def embeds(self, parts: list[Part], _pixels: None = None) -> Tensor:
        """[1, S, D]"""
        table = self.model.get_input_embeddings()
        pieces = [
            table(torch.tensor(part)) if isinstance(part, list) else self.laid(part)[0]
            for part in parts
        ]
        return torch.cat(pieces)[None]

    def columns(self, parts: list[Part]) -> list[int]:
        """The column of the caller's prompt that each of the shrunk prompt's tokens stands for."""
        columns: list[int] = []
        start = 0
        for part in parts:
            is_text = isinstance(part, list)
            places = range(len(part)) if is_text else self.family.stands(self, *part)
            columns += [start + place for place in places]
            start += len(part) if is_text else len(self.family.picture(*part))
        return columns

    def placed(self, parts: list[Part], length: int) -> dict[str, Tensor]:
        if self.config.positions == "compact":
            return {}
        columns, end = self.columns(parts), len(self.family.ids(parts))
        columns += range(end, end + length - len(columns))
        # With a mask: without one, gaps would be the ends of packed sequences.
        return {
            "position_ids": torch.tensor([columns]),
            "attention_mask": torch.ones(1, length, dtype=torch.long),
        }

    def rows(self, parts: list[Part], _pixels: None = None) -> list[int]:
        """Which row of `logits` each of the caller's columns shows, by hand."""
        rows: list[int] = []
        before = 0  # positions of the shrunk prompt
        for part in parts:
            is_text = isinstance(part, list)
            columns = range(len(part)) if is_text else self.laid(part)[1]
            for column in range(len(part if is_text else self.family.picture(*part))):
                rows.append(before + sum(each <= column for each in columns) - 1)
            before += len(columns)
        return rows

    def labels(self, parts: list[Part]) -> list[int]:
        """Of the text but the first token."""
        labels: list[int] = []
        for part in parts:
            if isinstance(part, list):
                labels += part
                continue
            picture = self.family.picture(*part)
            of_part = [picture[column] for column in self.laid(part)[1]]
            labels += [-100 if label in (IMAGE, VIDEO) else label for label in of_part]
        return [-100, *labels[1:]]


class Llava(Family):
    model_name = "Llava"


class LlavaLayers(Family):
    model_name = "Llava"
    layers = (-2, -3)
    options: ClassVar[dict[str, Any]] = {"vision_feature_layer": [-2, -3]}


class VipLlava(Family):
    model_name = "VipLlava"
    layers = (-2, 1, 0)
    layer_argument = "vision_feature_layer"
    if not takes(transformers.VipLlavaModel, layer_argument):  # 4.x, 5.17
        layer_argument = "vision_feature_layers"
    options: ClassVar[dict[str, Any]] = {layer_argument: [-2, 1, 0]}


class VideoLlava(Family):
    kinds = ("image", "video")
    model_name = "VideoLlava"

    def placeholders(self, kind: str, number: int) -> int:
        return PATCHES if kind == "image" else FRAMES * (1 + PATCHES)

    def arguments(self, kind: str, numbers: list[int]) -> dict[str, Tensor]:
        arguments = super().arguments(kind, numbers)
        if kind == "image" and not takes(transformers.VideoLlavaModel, "pixel_values"):
            return {"pixel_values_images": arguments["pixel_values"]}
        return arguments

    def tower(self, model: Any, kind: str) -> Any:
        return model.model.image_tower if kind == "image" else model.model.video_tower

    def features(self, oracle: FamilyOracle, kind: str, number: int) -> Tensor:
        if kind == "image":
            return super().features(oracle, kind, number)
        tower, pieces = self.tower(oracle.model, kind), []
        for frame in self.pixels(kind, number):
            _, _, hidden = tower_outputs(tower, frame[None], *self.layers)
            pieces.append(oracle.model.model.multi_modal_projector(hidden[0, :1]))
            pieces.append(oracle.prune(tower, frame))
        return torch.cat(pieces)

    def places(self, oracle: FamilyOracle, kind: str, number: int) -> list[int]:
        if kind == "image":
            return super().places(oracle, kind, number)
        places = []
        for start, frame in enumerate(self.pixels(kind, number)):
            start *= 1 + PATCHES
            oracle.prune(self.tower(oracle.model, kind), frame)
            places.append(start)
            places += [start + (1 + kept if kept >= 0 else PATCHES) for kept in oracle.kept]
        return places


class CropByHand:
    """What was just kept of a crop: tokens with the rows and columns of their cells in the grid,
    and what sums up the rest. An overview's cells are in one row."""

    def __init__(
        self, oracle: FamilyOracle, tokens: Tensor, cells: list[tuple[int, int]] | None = None
    ) -> None:
        kept = [index for index in oracle.kept if index >= 0]
        self.cells = [(0, index) for index in range(PATCHES)] if cells is None else cells
        self.kept = [(self.cells[index], tokens[i]) for i, index in enumerate(kept)]
        self.supplement = list(tokens[len(kept) :])


def arranged(
    oracle: FamilyOracle, parts: list[CropByHand], project: Any, grid: tuple[range, range]
) -> tuple[Tensor, list[int]]:
    """What the language model reads of an overview and its crops, whose cells have these rows and
    columns: [m, D], and the placeholder that each stands for."""
    newline = oracle.model.model.image_newline
    joined = oracle.config.supplement == "image"
    rows, columns = grid
    width = len(columns) + 1
    last = PATCHES + len(rows) * width - 1

    def place(row: int, column: int) -> int:
        return PATCHES + (row - rows.start) * width + column - columns.start

    def end(row: int) -> tuple[None, int]:
        return None, place(row, columns.stop)

    def own(crop: CropByHand) -> list[tuple[Any, int]]:
        return [] if joined else [(row, last) for row in crop.supplement]

    overview, *crops = parts
    pieces: list[tuple[Any, int]] = [(token, index) for (_, index), token in overview.kept]
    pieces += own(overview)
    if oracle.config.order == "attention":
        for crop in crops:
            tokens = [(token, place(*cell)) for cell, token in crop.kept] + own(crop)
            if tokens:
                pieces += [*tokens, end(max(row for row, _ in crop.cells))]
    else:
        kept = sorted((one for crop in crops for one in crop.kept), key=lambda one: one[0])
        for row in dict.fromkeys(cell[0] for cell, _ in kept):
            pieces += [(token, place(*cell)) for cell, token in kept if cell[0] == row]
            pieces.append(end(row))
        pieces += [piece for crop in crops for piece in own(crop)]
    supplements = [row for crop in parts for row in crop.supplement]
    if joined and supplements:
        pieces.append((sum(supplements) / len(supplements), last))
    tokens = [newline if token is None else project(token[None])[0] for token, _ in pieces]
    places = [number for _, number in pieces]
    return torch.stack(tokens) if tokens else newline[None][:0], places


class LlavaNext(Family):
    cuts = True
    model_name = "LlavaNext"
    # Height and width of each image, the grid of crops that it gets (rows, columns), and the rows
    # and columns of the grid's patches that are no padding.
    sizes = ((60, 60), (10, 50), (60, 40), (90, 40))
    grids = ((2, 2), (1, 2), (2, 2), (3, 1))
    read = (
        (range(10), range(10)),
        (range(1, 4), range(10)),
        (range(10), range(2, 8)),
        (range(2, 13), range(5)),
    )
    options: ClassVar[dict[str, Any]] = {
        "image_grid_pinpoints": [[30, 60], [60, 30], [60, 60], [90, 30]]
    }

    def processor(self, **size: Any) -> Any:
        return LlavaNextImageProcessor(**size, **self.options)

    def placeholders(self, kind: str, number: int) -> int:
        rows, columns = self.read[number]
        return PATCHES + len(rows) * (len(columns) + 1)

    def pixels(self, kind: str, number: int) -> Tensor:
        """[crops, 3, 30, 30], the overview first."""
        generator = torch.Generator().manual_seed(number)
        rows, columns = self.grids[number]
        return torch.randn(1 + rows * columns, 3, 30, 30, generator=generator)

    def arguments(self, kind: str, numbers: list[int]) -> dict[str, Tensor]:
        crops = [self.pixels(kind, number) for number in numbers]
        padded = torch.full((len(crops), max(map(len, crops)), 3, 30, 30), torch.nan)
        for row, image in zip(padded, crops, strict=True):
            row[: len(image)] = image
        sizes = torch.tensor([self.sizes[number] for number in numbers])
        return {"pixel_values": padded, "image_sizes": sizes}

    def features(self, oracle: FamilyOracle, kind: str, number: int) -> Tensor:
        return self.by_hand(oracle, number)[0]

    def by_hand(self, oracle: FamilyOracle, number: int) -> tuple[Tensor, list[int]]:
        """What `features` and `places` return of an image."""
        tower, crops = self.tower(oracle.model, "image"), self.pixels("image", number)
        rows, columns = self.read[number]
        parts = [CropByHand(oracle, oracle.merged(tower, crops[0]))]
        for index, crop in enumerate(crops[1:]):
            row, column = divmod(index, self.grids[number][1])
            read = [
                (r, c)
                for r in range(row * SIDE, (row + 1) * SIDE)
                for c in range(column * SIDE, (column + 1) * SIDE)
                if r in rows and c in columns
            ]
            at = torch.tensor([r % SIDE * SIDE + c % SIDE for r, c in read])
            parts.append(CropByHand(oracle, oracle.merged(tower, crop, at), read))
        projector = oracle.model.model.multi_modal_projector
        return arranged(oracle, parts, projector, self.read[number])

    def places(self, oracle: FamilyOracle, kind: str, number: int) -> list[int]:
        return self.by_hand(oracle, number)[1]


class LlavaNextVideo(LlavaNext):
    kinds = ("image", "video")
    model_name = "LlavaNextVideo"

    def placeholders(self, kind: str, number: int) -> int:
        return super().placeholders(kind, number) if kind == "image" else FRAMES * 4

    def pixels(self, kind: str, number: int) -> Tensor:
        if kind == "image":
            return super().pixels(kind, number)
        return Family.pixels(self, kind, number)

    def arguments(self, kind: str, numbers: list[int]) -> dict[str, Tensor]:
        if kind == "image":
            return super().arguments(kind, numbers)
        return Family.arguments(self, kind, numbers)

    def features(self, oracle: FamilyOracle, kind: str, number: int) -> Tensor:
        if kind == "image":
            return super().features(oracle, kind, number)
        return torch.cat([self.pooled(oracle, frame) for frame in self.pixels(kind, number)])

    def places(self, oracle: FamilyOracle, kind: str, number: int) -> list[int]:
        if kind == "image":
            return super().places(oracle, kind, number)
        places = []
        for index, frame in enumerate(self.pixels(kind, number)):
            self.pooled(oracle, frame)
            places += [4 * index + (kept if kept >= 0 else 3) for kept in oracle.kept]
        return places

    def pooled(self, oracle: FamilyOracle, frame: Tensor) -> Tensor:
        """Tokens [m, D] of a frame of a video."""
        tower = self.tower(oracle.model, "video")
        query, keys, hidden = tower_outputs(tower, frame[None], *self.layers)
        windows = [  # of 2 x 2 patches; the last row and column of 5 are not read
            [r * SIDE + c for r in (y, y + 1) for c in (x, x + 1)] for y in (0, 2) for x in (0, 2)
        ]
        attention = scores_by_hand(query, keys, oracle.config)  # [1, N]
        pooled = [
            torch.stack([values[:, window].mean(1) for window in windows], 1)
            for values in (attention, keys[:, 1:], hidden[:, 1:])
        ]
        return oracle.project(*pooled)


class LlavaSiglip(Family):
    """As llava-interleave: all patches, of the last layer, whose output no layer reads."""

    model_name = "Llava"
    layers = (-1,)
    vision = SiglipVisionConfig
    class_token = False
    default = WITHOUT_CLASS_TOKEN
    options: ClassVar[dict[str, Any]] = {
        "vision_feature_select_strategy": "full",
        "vision_feature_layer": -1,
    }

    def processor(self, **size: Any) -> Any:
        size["size"] = size.pop("crop_size")
        return SiglipImageProcessor(**size)


class LlavaNextSiglip(LlavaNext):
    vision = SiglipVisionConfig
    class_token = False
    default = WITHOUT_CLASS_TOKEN
    options: ClassVar[dict[str, Any]] = {
        **LlavaNext.options,
        "vision_feature_select_strategy": "full",
    }


def halved(count: int, other: int) -> Tensor:
    """[other, count], bilinear interpolation of `count` values in a row to `other`."""
    weights = torch.zeros(other, count)
    for i in range(other):
        place = (i + 0.5) * count / other - 0.5
        below = int(place)
        share = place - below
        weights[i, below] += 1 - share
        weights[i, min(below + 1, count - 1)] += share
    return weights


class LlavaOnevision(LlavaNext):
    """Image 3 is interpolated; 4 and 5 are of one prompt, each one view."""

    kinds = ("image", "video")
    model_name = "LlavaOnevision"
    layers = (-1,)
    vision = SiglipVisionConfig
    class_token = False
    default = WITHOUT_CLASS_TOKEN
    sizes = ((60, 60), (10, 50), (60, 40), (120, 100), (60, 40), (10, 50))
    grids = ((2, 2), (1, 2), (2, 2), (4, 4))
    read = (*LlavaNext.read[:3], (range(20), range(2, 18)))
    cells = ((10, 10), (3, 10), (10, 6), (16, 13))  # 20 x 16 are more than 1.1 * 1.1 * 9 crops
    options: ClassVar[dict[str, Any]] = {
        "image_grid_pinpoints": [[30, 60], [60, 30], [60, 60], [90, 30], [120, 120]]
    }

    def prompts(self) -> list[list[Part]]:
        prompts = super().prompts()
        prompts[2] = [[BOS], ("image", 4), [11, 12, 13], ("image", 5), [14]]
        return [*prompts, [[BOS, 6], ("image", 3), [7, 8]]]

    def processor(self, **size: Any) -> Any:
        return LlavaOnevisionImageProcessor(size=size["crop_size"], **self.options)

    def placeholders(self, kind: str, number: int) -> int:
        if kind == "video":
            return FRAMES * 9 + 1
        if number >= 4:
            return PATCHES + 1
        height, width = self.cells[number]
        return PATCHES + height * (width + 1)

    def pixels(self, kind: str, number: int) -> Tensor:
        if kind == "video":
            return Family.pixels(self, kind, number)
        if number >= 4:
            return Family.pixels(self, kind, number)[None]
        return super().pixels(kind, number)

    def arguments(self, kind: str, numbers: list[int]) -> dict[str, Tensor]:
        if kind == "video":
            return Family.arguments(self, kind, numbers)
        arguments = super().arguments(kind, numbers)
        if max(numbers) < 4:
            return arguments
        together = "".join("v" if number >= 4 else "c" for number in numbers).replace("vv", "w")
        counts = [2 if one == "w" else 1 for one in together]
        return {**arguments, "batch_num_images": torch.tensor(counts)}

    def features(self, oracle: FamilyOracle, kind: str, number: int) -> Tensor:
        return self.tokens(oracle, kind, number)[0]

    def places(self, oracle: FamilyOracle, kind: str, number: int) -> list[int]:
        return self.tokens(oracle, kind, number)[1]

    def tokens(self, oracle: FamilyOracle, kind: str, number: int) -> tuple[Tensor, list[int]]:
        if kind == "image" and number < 4:
            return self.by_hand(oracle, number)
        each, tokens, places = 9 if kind == "video" else PATCHES, list[Tensor](), list[int]()
        end = self.placeholders(kind, number) - 1
        for index, pixels in enumerate(self.pixels(kind, number)):
            tokens += self.view(oracle, kind, pixels)
            of_supplement = end if kind == "image" else each * (index + 1) - 1
            places += [each * index + i if i >= 0 else of_supplement for i in oracle.kept]
        in_rows = kind == "image" and oracle.config.order == "raster"
        if any(index >= 0 for index in oracle.kept) if in_rows else tokens:
            tokens.append(oracle.model.model.image_newline)
            places.append(end)
        empty = oracle.model.model.image_newline[None][:0]
        return torch.stack(tokens) if tokens else empty, places

    def by_hand(self, oracle: FamilyOracle, number: int) -> tuple[Tensor, list[int]]:
        pixels = self.pixels("image", number)
        parts = [CropByHand(oracle, self.view(oracle, "image", pixels[0]))]
        grid = self.whole(oracle, number)  # attention, keys, features, [height, width, X] each
        for index in range(1, len(pixels)):
            cells = self.of_crop(number, index - 1)
            if not cells:
                continue
            at = torch.tensor(cells).T
            attention, keys, features = (value[at[0], at[1]][None] for value in grid)
            parts.append(CropByHand(oracle, oracle.merge(attention[..., 0], keys, features), cells))
        height, width = self.cells[number]
        return arranged(oracle, parts, lambda row: row, (range(height), range(width)))

    def scored(self, oracle: FamilyOracle, kind: str, pixels: Tensor) -> list[Tensor]:
        """Attention, keys and projected features [5, 5, X] of a crop or a frame [3, 30, 30]."""
        tower = self.tower(oracle.model, kind)
        query, keys, hidden = tower_outputs(tower, pixels[None], *self.layers)
        attention = scores_by_hand(query, keys, oracle.config, class_token=False)
        features = oracle.model.model.multi_modal_projector(hidden)
        return [v[0].unflatten(0, (SIDE, SIDE)) for v in (attention[..., None], keys, features)]

    def view(self, oracle: FamilyOracle, kind: str, pixels: Tensor) -> Tensor:
        """Tokens [m, D] of an image that is not cut, an overview or a frame."""
        values = self.scored(oracle, kind, pixels)
        if kind == "video":
            half = halved(SIDE, 3)
            values = [torch.einsum("ih,jw,hwx->ijx", half, half, value) for value in values]
        attention, keys, features = (value.flatten(0, 1)[None] for value in values)
        return oracle.merge(attention[..., 0], keys, features)

    def whole(self, oracle: FamilyOracle, number: int) -> list[Tensor]:
        """Attention, keys and features of the cells of all crops, [height, width, X] each."""
        crops = [self.scored(oracle, "image", crop) for crop in self.pixels("image", number)[1:]]
        columns = self.grids[number][1]
        rows = [crops[start : start + columns] for start in range(0, len(crops), columns)]
        inside, (height, width) = self.read[number], self.cells[number]
        ratio = math.sqrt(len(inside[0]) * len(inside[1]) / (9 * PATCHES))
        assert (ratio > 1.1) == (number == 3)
        down, across = halved(len(inside[0]), height), halved(len(inside[1]), width)
        found = []
        for part in range(3):
            grid = torch.cat([torch.cat([crop[part] for crop in row], 1) for row in rows])
            grid = grid[inside[0].start : inside[0].stop, inside[1].start : inside[1].stop]
            found.append(torch.einsum("ih,jw,hwx->ijx", down, across, grid))
        return found

    def of_crop(self, number: int, crop: int) -> list[tuple[int, int]]:
        """The cells whose middle lies in a crop of the grid."""
        (rows, columns), (height, width) = self.read[number], self.cells[number]

        def crop_of(index: int, cells: int, inside: range) -> int:
            middle = Fraction((2 * index + 1) * len(inside), 2 * cells)
            return math.floor(inside.start + middle) // SIDE

        where = divmod(crop, self.grids[number][1])
        return [
            (i, j)
            for i in range(height)
            for j in range(width)
            if (crop_of(i, height, rows), crop_of(j, width, columns)) == where
        ]


class LlavaPixtral(Family):
    """Images of their own sizes, their rows ended by text."""

    model_name = "Llava"
    vision = PixtralVisionConfig
    class_token = False
    default = WITHOUT_CLASS_TOKEN
    layers = (-1,)
    options: ClassVar[dict[str, Any]] = {
        "vision_feature_select_strategy": "full",
        "vision_feature_layer": -1,
        "image_size": 48,
    }
    takes_any_size = True
    grids = ((5, 4), (3, 6), (8, 1), (4, 5))  # rows and columns of patches
    row_break, image_end = 86, 87

    def processor(self, **size: Any) -> Any:
        return PixtralImageProcessor(size={"longest_edge": 48}, patch_size=6)

    def placeholders(self, kind: str, number: int) -> int:
        rows, columns = self.grids[number]
        return rows * columns

    def picture(self, kind: str, number: int) -> list[int]:
        rows, columns = self.grids[number]
        ids = []
        for row in range(rows):
            ids += [IMAGE] * columns
            ids.append(self.image_end if row == rows - 1 else self.row_break)
        return ids

    def pixels(self, kind: str, number: int) -> Tensor:
        generator = torch.Generator().manual_seed(number)
        rows, columns = self.grids[number]
        return torch.randn(3, 6 * rows, 6 * columns, generator=generator)

    def arguments(self, kind: str, numbers: list[int]) -> dict[str, Tensor]:
        images = [self.pixels(kind, number) for number in numbers]
        sizes = torch.tensor([image.shape[1:] for image in images])
        padded = torch.full((len(images), 3, *sizes.amax(0).tolist()), 9.0)
        for row, image in zip(padded, images, strict=True):
            row[:, : image.shape[1], : image.shape[2]] = image
        return {"pixel_values": padded, "image_sizes": sizes}

    def in_rows(self, oracle: FamilyOracle, number: int) -> tuple[Tensor, list[list[int]]]:
        """Projected tokens [m, D] row by row, and the column in its row of each, by rows."""
        rows, columns = self.grids[number]
        tower, pixels = self.tower(oracle.model, "image"), self.pixels("image", number)
        states = tower(pixels[None], output_hidden_states=True).hidden_states
        layer = tower.transformer.layers[-1]
        read = layer.attention_norm(states[-2])
        query, keys = layer.attention.q_proj(read), layer.attention.k_proj(read)
        turned = [self.turned(one[0], columns)[None] for one in (query, keys)]
        attention = scores_by_hand(*turned, oracle.config, class_token=False)
        tokens = oracle.merge(attention, keys, states[-1])
        found: list[list[tuple[int, Tensor]]] = [[] for _ in range(rows)]
        for kept, token in zip(oracle.kept, tokens, strict=True):
            row, column = divmod(kept, columns) if kept >= 0 else (rows - 1, columns - 1)
            found[row].append((column, token))
        ordered = [token for row in found for _, token in row]
        projected = oracle.model.model.multi_modal_projector(
            torch.stack(ordered or [tokens.sum(0)])
        )
        return projected[: len(ordered)], [[column for column, _ in row] for row in found]

    def turned(self, vectors: Tensor, columns: int) -> Tensor:
        """[N, C] by their places, head by head: pairs of channels, half by the row of a patch."""
        x, y = vectors.unflatten(1, (HEADS, 2, -1)).unbind(2)  # [N, H, d / 2]
        cos, sin = self.rotation(len(vectors) // columns, columns, x.shape[2])[:, :, None]
        return torch.stack((x * cos - y * sin, y * cos + x * sin), 2).flatten(1)

    @functools.cache  # noqa: B019
    def rotation(self, rows: int, columns: int, pairs: int) -> Tensor:
        """Cosines and sines [2, N, d / 2] of the angles of patches."""
        angles = torch.empty(rows * columns, pairs)
        for patch in range(rows * columns):
            for pair in range(pairs):
                by_column, number = divmod(2 * pair, pairs)
                place = divmod(patch, columns)[by_column]
                angles[patch, pair] = place * 10_000 ** -(
                    (2 * number + 2 * by_column) / (2 * pairs)
                )
        return torch.stack((angles.cos(), angles.sin()))

    def features(self, oracle: FamilyOracle, kind: str, number: int) -> Tensor:
        return self.in_rows(oracle, number)[0]

    def laid(self, oracle: FamilyOracle, kind: str, number: int) -> tuple[Tensor, list[int]]:
        tokens, in_rows = self.in_rows(oracle, number)
        columns = []
        for row, found in enumerate(in_rows):
            start, width = row * (self.grids[number][1] + 1), self.grids[number][1]
            columns += [start + min(place, width - 1) for place in range(len(found))]
            if found or row == len(in_rows) - 1:
                columns.append(start + width)
        picture, left = self.picture(kind, number), iter(tokens)
        table = oracle.model.get_input_embeddings()
        shown = [
            next(left) if picture[column] == IMAGE else table(torch.tensor(picture[column]))
            for column in columns
        ]
        return torch.stack(shown), columns

    def stands(self, oracle: FamilyOracle, kind: str, number: int) -> list[int]:
        _, in_rows = self.in_rows(oracle, number)
        stands = []
        for row, found in enumerate(in_rows):
            start, width = row * (self.grids[number][1] + 1), self.grids[number][1]
            stands += [start + column for column in found]
            if found or row == len(in_rows) - 1:
                stands.append(start + width)
        return stands


class InternVL(Family):
    """Tiles of 6 x 6 patches, joined by fours; the scores are those of families without a class
    token, which the model has."""

    model_name = "InternVL"
    vision = InternVLVisionConfig
    default = WITHOUT_CLASS_TOKEN
    layers = (-1,)
    options: ClassVar[dict[str, Any]] = {"image_size": 36}
    interpolates = False
    takes_any_size = True
    side = 6

    def model(self, **changes: Any) -> Any:
        model = super().model(**changes)
        embeddings = model.model.vision_tower.embeddings  # zeros, by which patches are the same
        with torch.no_grad():
            for parameter in (embeddings.cls_token, embeddings.position_embeddings):
                parameter.copy_(torch.linspace(-1, 1, parameter.numel()).view_as(parameter).sin())
                parameter.mul_(torch.arange(1, parameter.shape[1] + 1)[:, None] / 10)
        return model

    def placeholders(self, kind: str, number: int) -> int:
        return 9

    def pixels(self, kind: str, number: int) -> Tensor:
        generator = torch.Generator().manual_seed(number)
        return torch.randn(3, 36, 36, generator=generator)

    def processor(self, **size: Any) -> Any:
        return CLIPImageProcessor(size={"shortest_edge": 36}, crop_size={"height": 36, "width": 36})

    def features(self, oracle: FamilyOracle, kind: str, number: int) -> Tensor:
        tower = self.tower(oracle.model, kind)
        state = tower.embeddings(self.pixels(kind, number)[None])
        state = state[0] if isinstance(state, tuple) else state
        for layer in tower.encoder.layer[:-1]:
            state = layer(state)
        layer = tower.encoder.layer[-1]
        normed, own = layer.layernorm_before(state), layer.attention
        query, keys = own.q_norm(own.q_proj(normed)), own.k_norm(own.k_proj(normed))
        config = oracle.config
        if config.scores == "auto":
            config = config.replace(scores="received")
        attention = scores_by_hand(query, keys, config)[0]  # [N]
        patches, keys = tower.layernorm(layer(state))[0, 1:], keys[0, 1:]
        groups = [
            [y * self.side + x for y in (row, row + 1) for x in (column, column + 1)]
            for row in range(0, self.side, 2)
            for column in range(0, self.side, 2)
        ]
        joined = torch.stack([torch.cat([patches[index] for index in group]) for group in groups])
        means = [torch.stack([one[group].mean(0) for group in groups]) for one in (attention, keys)]
        projected = oracle.model.model.multi_modal_projector(joined)
        return oracle.merge(means[0][None], means[1][None], projected[None])

    def places(self, oracle: FamilyOracle, kind: str, number: int) -> list[int]:
        self.features(oracle, kind, number)
        return [index if index >= 0 else 8 for index in oracle.kept]


class InternVLNormed(InternVL):
    """As the largest InternVLs: queries and keys are normalised, features are those of tokens."""

    options: ClassVar[dict[str, Any]] = {
        "image_size": 36,
        "vision_options": {"use_qk_norm": True, "norm_type": "rms_norm", "use_mean_pooling": False},
    }


FAMILIES: dict[str, Family] = {
    "LLaVA": Llava(),
    "LLaVA of several layers": LlavaLayers(),
    "ViP-LLaVA": VipLlava(),
    "Video-LLaVA": VideoLlava(),
    "LLaVA-NeXT": LlavaNext(),
    "LLaVA-NeXT-Video": LlavaNextVideo(),
    "LLaVA with SigLIP": LlavaSiglip(),
    "LLaVA-NeXT with SigLIP": LlavaNextSiglip(),
    "LLaVA-OneVision": LlavaOnevision(),
    "LLaVA with Pixtral": LlavaPixtral(),
    "InternVL": InternVL(),
    "InternVL with normed keys": InternVLNormed(),
}
