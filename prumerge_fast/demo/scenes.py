"""A deterministic generator of pictures with questions and exact answers.

A scene holds three to seven coloured shapes of three sizes on a muted, textured background with
clutter. Everything follows from `(split, index)`: the same pair gives the same scene, picture and
questions on every machine, and the three splits never share a random stream. Scenes are vector
graphics, so that one scene renders at any size.

The questions are those of the usual LLaVA benchmarks in small: existence in the manner of POPE
(Li et al. 2023, arXiv 2305.10355: half of the answers "no", and absent objects are plausible,
made of a colour and a shape that the picture does hold), colour, shape, counting from 0 to 4 and
relative position.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from PIL import Image, ImageDraw

COLOURS: dict[str, tuple[int, int, int]] = {
    "red": (222, 30, 36),
    "green": (40, 176, 60),
    "blue": (40, 84, 230),
    "yellow": (246, 222, 40),
    "purple": (142, 44, 190),
    "orange": (250, 136, 20),
    "pink": (255, 130, 190),
    "white": (246, 246, 246),
}
SHAPES = ("circle", "square", "triangle", "star", "cross", "ring")
RADII = (0.058, 0.078, 0.104)  # small, medium, large: a share of the picture's side
KINDS = ("existence", "colour", "shape", "count", "position")
PLACE = "place"  # asked in training only: where an object is, in two words
SPLITS = ("train", "validation", "test")
MAX_COUNT = 4

_OBJECTS = (3, 7)  # fewest and most objects in a scene
_MARGIN = 0.02  # between two objects, and between an object and the border
_CLEAR_OFFSET = 0.12  # "left of" is asked only where it is plain to see
_SUPERSAMPLING = 4
_TEXTURE_CELLS = 56


@dataclass(frozen=True)
class SceneObject:
    """One coloured shape. `x`, `y` (the centre) and `radius` are shares of the picture's side."""

    shape: str
    colour: str
    x: float
    y: float
    radius: float

    @property
    def pair(self) -> tuple[str, str]:
        return self.colour, self.shape

    @property
    def name(self) -> str:
        return f"{self.colour} {self.shape}"


@dataclass(frozen=True)
class Question:
    """A question with its only right answer: one lower-case word or digit (`PLACE`: two words)."""

    kind: str
    text: str
    answer: str


@dataclass(frozen=True)
class Scene:
    """A scene, made by `make_scene`."""

    split: str
    index: int
    objects: tuple[SceneObject, ...]

    @cached_property
    def pairs(self) -> frozenset[tuple[str, str]]:
        return frozenset(item.pair for item in self.objects)

    def stream(self, purpose: str) -> np.random.Generator:
        """Random numbers of this scene's own, the same at every call with the same `purpose`."""
        return np.random.default_rng(
            # Python's hash of a string differs from run to run, hence the bytes.
            [SPLITS.index(self.split), self.index, *purpose.encode()]
        )

    def render(self, size: int = 168) -> Image.Image:
        """Draws the scene as an RGB image of `size` x `size` pixels."""
        if size < 16:
            raise ValueError(f"size: expected at least 16 pixels, got {size}")
        rng = self.stream("picture")
        image = _background(rng, size)
        for item in self.objects:
            _draw_object(image, item, _jitter(rng, COLOURS[item.colour]))
        return image

    def question(self, kind: str, variant: int = 0) -> Question | None:
        """The `variant`-th question of a kind, or None where the scene does not allow that kind."""
        if kind not in _ASK:
            raise ValueError(f"kind: expected one of {', '.join(_ASK)}, got {kind!r}")
        return _ASK[kind](self, self.stream(f"{kind}-{variant}"))

    def questions(self, variant: int = 0) -> list[Question]:
        """One question of every kind that the scene allows."""
        asked = (self.question(kind, variant) for kind in KINDS)
        return [question for question in asked if question is not None]

    def describe(self) -> str:
        """A caption that names every object with its place, from left to right."""
        ordered = sorted(self.objects, key=lambda item: item.x)
        return ", ".join(f"{item.name} {_place(item)}" for item in ordered)


def make_scene(split: str, index: int) -> Scene:
    """The scene number `index` (0, 1, ...) of a split.

    Raises:
        ValueError: `split` is not one of `SPLITS`, or `index` is negative.
    """
    if split not in SPLITS:
        raise ValueError(f"split: expected one of {', '.join(SPLITS)}, got {split!r}")
    if index < 0:
        raise ValueError(f"index: expected 0 or more, got {index}")
    rng = Scene(split, index, ()).stream("objects")
    wanted = int(rng.integers(_OBJECTS[0], _OBJECTS[1] + 1))
    pairs = [_random_pair(rng) for _ in range(wanted)]
    if rng.random() < 0.6:  # counting needs scenes where something occurs more than once
        copies = int(rng.integers(2, MAX_COUNT + 1))
        pairs[:copies] = _alike(rng, pairs[0], min(copies, wanted))
    return Scene(split, index, tuple(_place_objects(rng, pairs)))


def benchmark(split: str, count: int) -> list[tuple[Scene, Question]]:
    """The first `count` questions of a split, the kinds in turn, each scene asked at most once.

    Each kind takes the next scene that allows it, so that all kinds are equally frequent whatever
    they demand of a scene.

    Raises:
        ValueError: `split` is unknown or `count` is less than 1.
    """
    if count < 1:
        raise ValueError(f"count: expected at least 1, got {count}")
    items: list[tuple[Scene, Question]] = []
    for scene in _scenes(split):
        question = scene.question(KINDS[len(items) % len(KINDS)])
        if question is not None:
            items.append((scene, question))
        if len(items) == count:
            break
    return items


def _scenes(split: str) -> Iterator[Scene]:
    index = 0
    while True:
        yield make_scene(split, index)
        index += 1


# Composition


def _random_pair(rng: np.random.Generator) -> tuple[str, str]:
    return str(rng.choice(list(COLOURS))), str(rng.choice(SHAPES))


def _alike(rng: np.random.Generator, pair: tuple[str, str], copies: int) -> list[tuple[str, str]]:
    """`copies` pairs that share the colour, the shape or both with `pair`."""
    colour, shape = pair
    shared = rng.choice(["colour", "shape", "both"])
    others = [_random_pair(rng) for _ in range(copies)]
    if shared == "both":
        return [pair] * copies
    if shared == "colour":
        return [(colour, other_shape) for _, other_shape in others]
    return [(other_colour, shape) for other_colour, _ in others]


def _place_objects(rng: np.random.Generator, pairs: list[tuple[str, str]]) -> Iterator[SceneObject]:
    """Places the pairs one after another without overlap; one that finds no room is left out."""
    placed: list[SceneObject] = []
    for colour, shape in pairs:
        for _ in range(50):
            radius = float(rng.choice(RADII))
            low, high = radius + _MARGIN, 1 - radius - _MARGIN
            x, y = (float(v) for v in rng.uniform(low, high, 2))
            if all(
                math.hypot(x - other.x, y - other.y) > 1.2 * (radius + other.radius) + _MARGIN
                for other in placed
            ):
                placed.append(SceneObject(shape, colour, x, y, radius))
                break
    yield from placed


# Drawing


def _background(rng: np.random.Generator, size: int) -> Image.Image:
    """Muted blotches, a regular pattern, grain, and clutter of lines and specks."""
    base = rng.uniform(70, 130) + rng.uniform(-18, 18, 3)  # nearly grey
    blotches = rng.normal(0, 16, (6, 6, 1)) + rng.normal(0, 6, (6, 6, 3))
    grain = rng.normal(0, 7, (_TEXTURE_CELLS, _TEXTURE_CELLS, 1))
    texture = grain + _pattern(rng)[..., None]
    pixels = _resized(blotches, size) + _resized(
        np.broadcast_to(texture, (*texture.shape[:2], 3)), size
    )
    image = Image.fromarray(np.clip(base + pixels, 0, 255).astype(np.uint8))

    draw = ImageDraw.Draw(image)
    for _ in range(int(rng.integers(4, 12))):
        tone = tuple(
            int(v) for v in np.clip(base + rng.normal(0, 30) + rng.normal(0, 8, 3), 0, 255)
        )
        x, y = rng.uniform(0, size, 2).tolist()
        dx, dy = rng.normal(0, 0.12 * size, 2).tolist()
        if rng.random() < 0.5:
            width = max(1, round(size * float(rng.uniform(0.004, 0.012))))
            draw.line([x, y, x + dx, y + dy], tone, width)
        else:
            r = float(rng.uniform(0.006, 0.018)) * size
            draw.ellipse([x - r, y - r, x + r, y + r], tone)
    return image


def _pattern(rng: np.random.Generator) -> np.ndarray:
    """Stripes, a chequerboard or nothing, at a random angle, phase and pitch: [cells, cells]."""
    rows, columns = np.mgrid[0:_TEXTURE_CELLS, 0:_TEXTURE_CELLS]
    angle, phase = rng.uniform(0, math.pi), rng.uniform(0, 2 * math.pi)
    pitch, strength = rng.uniform(0.3, 1.2), rng.uniform(4, 14)
    along = np.sin(pitch * (columns * math.cos(angle) + rows * math.sin(angle)) + phase)
    across = np.sin(pitch * (rows * math.cos(angle) - columns * math.sin(angle)))
    style = int(rng.integers(3))
    if style == 0:
        return strength * along
    if style == 1:
        return strength * np.sign(along * across)
    return np.zeros_like(along)


def _resized(values: np.ndarray, size: int) -> np.ndarray:
    """[h, w, 3] float values interpolated to [size, size, 3]."""
    channels = [
        Image.fromarray(np.ascontiguousarray(values[..., c], dtype=np.float32)).resize(
            (size, size), Image.Resampling.BICUBIC
        )
        for c in range(3)
    ]
    return np.stack([np.asarray(channel) for channel in channels], axis=-1)


def _jitter(rng: np.random.Generator, colour: tuple[int, int, int]) -> tuple[int, ...]:
    return tuple(int(v) for v in np.clip(np.array(colour) + rng.normal(0, 7, 3), 0, 255))


def _draw_object(image: Image.Image, item: SceneObject, colour: tuple[int, ...]) -> None:
    side = max(4, round(2 * item.radius * image.width))
    mask = Image.new("L", (side * _SUPERSAMPLING,) * 2)
    _DRAW[item.shape](ImageDraw.Draw(mask), side * _SUPERSAMPLING - 1)
    mask = mask.resize((side, side), Image.Resampling.BOX)
    corner = round(item.x * image.width - side / 2), round(item.y * image.height - side / 2)
    image.paste(Image.new("RGB", (side, side), colour), corner, mask)


def _draw_circle(draw: ImageDraw.ImageDraw, s: float) -> None:
    draw.ellipse([0, 0, s, s], 255)


def _draw_square(draw: ImageDraw.ImageDraw, s: float) -> None:
    draw.rectangle([0.06 * s, 0.06 * s, 0.94 * s, 0.94 * s], 255)


def _draw_triangle(draw: ImageDraw.ImageDraw, s: float) -> None:
    draw.polygon([(0.5 * s, 0.02 * s), (s, 0.94 * s), (0, 0.94 * s)], 255)


def _draw_star(draw: ImageDraw.ImageDraw, s: float) -> None:
    points = []
    for corner in range(10):
        radius = (0.54 if corner % 2 == 0 else 0.22) * s
        angle = math.pi * (corner / 5 - 0.5)
        points.append((0.5 * s + radius * math.cos(angle), 0.54 * s + radius * math.sin(angle)))
    draw.polygon(points, 255)


def _draw_cross(draw: ImageDraw.ImageDraw, s: float) -> None:
    draw.rectangle([0.34 * s, 0, 0.66 * s, s], 255)
    draw.rectangle([0, 0.34 * s, s, 0.66 * s], 255)


def _draw_ring(draw: ImageDraw.ImageDraw, s: float) -> None:
    draw.ellipse([0, 0, s, s], 255)
    draw.ellipse([0.27 * s, 0.27 * s, 0.73 * s, 0.73 * s], 0)


_DRAW = {
    "circle": _draw_circle,
    "square": _draw_square,
    "triangle": _draw_triangle,
    "star": _draw_star,
    "cross": _draw_cross,
    "ring": _draw_ring,
}


# Questions


def _existence(scene: Scene, rng: np.random.Generator) -> Question:
    present = sorted(scene.pairs)
    if rng.random() < 0.5:
        (colour, shape), answer = present[rng.integers(len(present))], "yes"
    else:
        (colour, shape), answer = _plausible_absent(scene, rng), "no"
    text = _either(
        rng,
        f"Is there {_article(colour)} {colour} {shape} in the picture?",
        f"Can you see {_article(colour)} {colour} {shape}?",
    )
    return Question("existence", text, answer)


def _plausible_absent(scene: Scene, rng: np.random.Generator) -> tuple[str, str]:
    """An absent pair: mostly a colour and a shape that both occur, or else at least one of them."""
    colours = {item.colour for item in scene.objects}
    shapes = {item.shape for item in scene.objects}
    both = [(c, s) for c in sorted(colours) for s in sorted(shapes) if (c, s) not in scene.pairs]
    one = [(c, s) for c in COLOURS for s in SHAPES if (c in colours) != (s in shapes)]
    candidates = both if both and rng.random() < 0.6 else one
    return candidates[rng.integers(len(candidates))]


def _colour(scene: Scene, rng: np.random.Generator) -> Question | None:
    item = _only(scene, rng, "shape")
    if item is None:
        return None
    text = _either(
        rng, f"What colour is the {item.shape}?", f"Which colour does the {item.shape} have?"
    )
    return Question("colour", text, item.colour)


def _shape(scene: Scene, rng: np.random.Generator) -> Question | None:
    item = _only(scene, rng, "colour")
    if item is None:
        return None
    text = _either(
        rng, f"What shape is the {item.colour} object?", f"Which shape is {item.colour}?"
    )
    return Question("shape", text, item.shape)


def _count(scene: Scene, rng: np.random.Generator) -> Question:
    """Asks for a colour, a shape or a pair; each answer that the scene offers is equally likely."""
    names: dict[int, list[str]] = {}
    pairs = scene.pairs | {_plausible_absent(scene, rng)}
    for name, count in [
        *((f"{c} objects", sum(o.colour == c for o in scene.objects)) for c in COLOURS),
        *((_plural(s), sum(o.shape == s for o in scene.objects)) for s in SHAPES),
        *(
            (f"{c} {_plural(s)}", sum(o.pair == (c, s) for o in scene.objects))
            for c, s in sorted(pairs)
        ),
    ]:
        if count <= MAX_COUNT:
            names.setdefault(count, []).append(name)
    count = int(rng.choice(sorted(names)))
    name = names[count][rng.integers(len(names[count]))]
    text = _either(rng, f"How many {name} are there?", f"What is the number of {name}?")
    return Question("count", text, str(count))


def _position(scene: Scene, rng: np.random.Generator) -> Question | None:
    """Left or right of, above or below another object; both answers are equally likely."""
    unique = _unique(scene)
    candidates = [
        (first, second, axis)
        for first in unique
        for second in unique
        for axis in ("x", "y")
        if abs(getattr(first, axis) - getattr(second, axis)) > _CLEAR_OFFSET
    ]
    if not candidates:
        return None
    first, second, axis = candidates[rng.integers(len(candidates))]
    smaller, larger = ("left", "right") if axis == "x" else ("above", "below")
    between = "or right of" if axis == "x" else "or below"
    text = _either(
        rng,
        f"Is the {first.name} {smaller} {between} the {second.name}?",
        f"Do you see the {first.name} {smaller} {between} the {second.name}?",
    )
    is_smaller = getattr(first, axis) < getattr(second, axis)
    return Question("position", text, smaller if is_smaller else larger)


def _where(scene: Scene, rng: np.random.Generator) -> Question | None:
    unique = _unique(scene)
    if not unique:
        return None
    item = unique[rng.integers(len(unique))]
    text = _either(rng, f"Where is the {item.name}?", f"In which part is the {item.name}?")
    return Question(PLACE, text, _place(item))


_ASK = {
    "existence": _existence,
    "colour": _colour,
    "shape": _shape,
    "count": _count,
    "position": _position,
    PLACE: _where,
}


def _unique(scene: Scene) -> list[SceneObject]:
    """The objects that "the red circle" can mean."""
    return [o for o in scene.objects if sum(o.pair == other.pair for other in scene.objects) == 1]


def _only(scene: Scene, rng: np.random.Generator, attribute: str) -> SceneObject | None:
    """An object whose colour (or shape) no other object of the scene has, or None."""
    values = [getattr(item, attribute) for item in scene.objects]
    unique = [
        item for item, value in zip(scene.objects, values, strict=True) if values.count(value) == 1
    ]
    return unique[rng.integers(len(unique))] if unique else None


def _either(rng: np.random.Generator, first: str, second: str) -> str:
    return first if rng.random() < 0.5 else second


def _place(item: SceneObject) -> str:
    column = ("left", "middle", "right")[min(2, int(3 * item.x))]
    row = ("top", "centre", "bottom")[min(2, int(3 * item.y))]
    return f"{row} {column}"


def _article(word: str) -> str:
    return "an" if word[0] in "aeiou" else "a"


def _plural(shape: str) -> str:
    return shape + ("es" if shape.endswith("s") else "s")
