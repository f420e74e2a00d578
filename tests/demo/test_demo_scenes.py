"""The scene generator: the same everywhere, and its answers are right."""

import collections
import math
import re
import subprocess
import sys

import numpy as np
import pytest

from prumerge_fast.demo.scenes import COLOURS, KINDS, PLACE, SHAPES, benchmark, make_scene

SCENES = [make_scene("validation", index) for index in range(300)]
QUESTIONS = [
    (scene, question) for scene in SCENES for v in range(3) for question in scene.questions(v)
]


def _number(scene, colour, shape):
    """How many objects have that colour and that shape; None stands for any."""
    return sum(
        colour in (None, item.colour) and shape in (None, item.shape) for item in scene.objects
    )


def _the(scene, name):
    (item,) = [item for item in scene.objects if item.name == name]
    return item


def _answer(scene, text):
    """Answers a question from its words alone, in another way than the generator."""
    words = re.findall(r"\w+", text.lower())
    colour = next((word for word in words if word in COLOURS), None)
    shape = next((s for s in SHAPES for word in words if word in (s, s + "s", s + "es")), None)
    names = re.findall(r"the (\w+ \w+?)(?: |\?)", text)
    if " or " in text:
        first, second = _the(scene, names[0]), _the(scene, names[1])
        if "left" in words:
            return "left" if first.x < second.x else "right"
        return "above" if first.y < second.y else "below"
    if "many" in words or "number" in words:
        return str(_number(scene, colour, shape))
    if "colour" in words:
        (item,) = [item for item in scene.objects if item.shape == shape]
        return item.colour
    if "shape" in words:
        (item,) = [item for item in scene.objects if item.colour == colour]
        return item.shape
    return "yes" if _number(scene, colour, shape) else "no"


def test_answers_are_right():
    wrong = [(s.index, q) for s, q in QUESTIONS if _answer(s, q.text) != q.answer]
    assert wrong == []


def test_places_are_right():
    found = collections.Counter()
    for scene in SCENES:
        question = scene.question(PLACE)
        if question is not None:
            item = _the(scene, re.search(r"is the (\w+ \w+)\?", question.text)[1])
            rows, columns = ("top", "centre", "bottom"), ("left", "middle", "right")
            assert question.answer == f"{rows[int(item.y * 3)]} {columns[int(item.x * 3)]}"
            found[question.answer] += 1
    assert len(found) == 9
    assert PLACE not in {question.kind for _, question in QUESTIONS}


def test_answers_are_balanced():
    answers = collections.defaultdict(collections.Counter)
    for _, question in QUESTIONS:
        answers[question.kind][question.answer] += 1
    assert set(answers) == set(KINDS)
    for one, other in [("yes", "no"), ("left", "right"), ("above", "below")]:
        counts = answers["existence" if one == "yes" else "position"]
        assert 0.4 < counts[one] / (counts[one] + counts[other]) < 0.6
    assert set(answers["existence"]) == {"yes", "no"}
    assert set(answers["position"]) == {"left", "right", "above", "below"}
    assert set(answers["count"]) == set("01234")
    assert set(answers["colour"]) == set(COLOURS)
    assert set(answers["shape"]) == set(SHAPES)
    assert max(answers["count"].values()) < 0.4 * answers["count"].total()


def test_absent_objects_are_plausible():
    for scene, question in QUESTIONS:
        if question.kind == "existence" and question.answer == "no":
            colour, shape = re.search(r"\ban? (\w+) (\w+)", question.text).groups()
            assert _number(scene, colour, None) or _number(scene, None, shape)


def test_objects_lie_apart_and_inside():
    for scene in SCENES:
        assert 2 <= len(scene.objects) <= 7
        for i, item in enumerate(scene.objects):
            assert item.radius < min(item.x, item.y, 1 - item.x, 1 - item.y)
            for other in scene.objects[:i]:
                apart = math.hypot(item.x - other.x, item.y - other.y)
                assert apart > item.radius + other.radius


@pytest.mark.parametrize("size", [112, 168, 400])
def test_objects_are_where_the_scene_says(size):
    for scene in SCENES[:10]:
        pixels = np.asarray(scene.render(size)).astype(float)
        assert pixels.shape == (size, size, 3)
        for item in scene.objects:
            # A ring is empty in its middle; all shapes cover the point half-way down.
            down = 0.85 if item.shape == "ring" else 0.3
            y, x = round((item.y + down * item.radius) * size), round(item.x * size)
            assert np.abs(pixels[y, x] - COLOURS[item.colour]).max() < 45, (scene.index, item)


def test_same_scene_in_every_process():
    code = """
import hashlib
from prumerge_fast.demo.scenes import make_scene
scene = make_scene("test", 7)
seen = scene.render().tobytes() + repr((scene, scene.questions())).encode()
print(hashlib.sha256(seen).hexdigest())
"""
    digests = {
        subprocess.run(
            [sys.executable, "-c", code],
            env={"PYTHONHASHSEED": seed},
            capture_output=True,
            check=True,
        ).stdout
        for seed in ("1", "2")
    }
    assert len(digests) == 1


def test_scenes_stay_what_the_weights_were_trained_on():
    scene = make_scene("test", 0)
    assert scene.describe() == (
        "pink cross centre middle, yellow star top middle, green square bottom middle, "
        "green circle centre middle, purple ring centre right, red square bottom right"
    )


def test_splits_differ():
    described = {split: make_scene(split, 3) for split in ("train", "validation", "test")}
    assert len({scene.objects for scene in described.values()}) == 3


def test_benchmark_takes_the_kinds_in_turn():
    items = benchmark("test", 51)
    assert [question.kind for _, question in items] == [KINDS[i % 5] for i in range(51)]
    assert len({scene.index for scene, _ in items}) == 51
    assert items == benchmark("test", 60)[:51]


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: make_scene("dev", 0), "split: expected one of train, validation, test, got 'dev'"),
        (lambda: make_scene("test", -1), "index: expected 0 or more, got -1"),
        (lambda: make_scene("test", 0).render(8), "size: expected at least 16 pixels, got 8"),
        (lambda: make_scene("test", 0).question("size"), "kind: expected one of existence, "),
        (lambda: benchmark("test", 0), "count: expected at least 1, got 0"),
    ],
)
def test_bad_input(call, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        call()
