"""Questions about demo scenes, and the scenes by name, as the harness takes them."""

from __future__ import annotations

from pathlib import Path

from PIL import Image

from prumerge_fast.demo.scenes import benchmark, make_scene
from prumerge_fast.errors import InputError
from prumerge_fast.harness.inputs import Item
from prumerge_fast.harness.pictures import read_image

DEMO_PREFIX = "demo:"
MOST_SCENES = 100_000  # drawing up the questions takes a minute then, and asking them hours


def items_from_demo(count: int) -> list[Item]:
    """`count` questions about demo scenes that the demo model was never trained on.

    Raises:
        InputError: `count` is above `MOST_SCENES`.
    """
    if count > MOST_SCENES:
        raise InputError(f"--count: expected at most {MOST_SCENES}, got {count}")
    return [
        Item(
            number,
            f"{DEMO_PREFIX}{scene.index}",
            scene.render,
            question.text,
            question.answer,
            question.kind,
        )
        for number, (scene, question) in enumerate(benchmark("test", count))
    ]


def image_by_name(name: str) -> Image.Image:
    """The image in a file, or the demo scene of the test split for `demo:INDEX`.

    Raises:
        InputError: There is no such image.
    """
    if not name.startswith(DEMO_PREFIX):
        return read_image(Path(name))
    try:
        return make_scene("test", int(name.removeprefix(DEMO_PREFIX))).render()
    except ValueError:
        raise InputError(
            f"IMAGE: expected {DEMO_PREFIX}INDEX with INDEX >= 0, got {name!r}"
        ) from None
