"""Reading images and questions, and scoring answers: no model involved."""

import json

import numpy as np
import pytest
from PIL import Image

from prumerge_fast.demo.items import image_by_name, items_from_demo
from prumerge_fast.errors import InputError
from prumerge_fast.harness.answers import Answer, normalise, summarise
from prumerge_fast.harness.inputs import Item, items_from_images, items_from_jsonl
from prumerge_fast.harness.pictures import read_image
from prumerge_fast.harness.stages import StageTimes


@pytest.fixture
def picture(tmp_path):
    path = tmp_path / "picture.png"
    Image.new("RGB", (8, 8), (10, 20, 30)).save(path)
    return path


def write_questions(path, *lines):
    path.write_text("\n".join(x if isinstance(x, str) else json.dumps(x) for x in lines))
    return path


def test_questions_in_llavas_format(tmp_path, picture):
    path = write_questions(
        tmp_path / "q.jsonl",
        {"question_id": 7, "image": "picture.png", "text": "<image>\nIs it dark?", "label": "yes"},
        "",
        {"question_id": "b", "image": "picture.png", "text": "How many?", "answer": 3},
        {"question_id": 9, "image": "picture.png", "text": "What?", "category": "free"},
        {
            "question_id": 10,
            "image": "picture.png",
            "text": "Is it?",
            "answer": None,
            "label": "no",
        },
        {"question_id": 11, "image": "picture.png", "text": "Why?", "answer": 0, "label": "no"},
    )
    items = items_from_jsonl(path, tmp_path)
    assert [(i.question_id, i.text, i.expected, i.category) for i in items] == [
        (7, "Is it dark?", "yes", None),
        ("b", "How many?", "3", None),
        (9, "What?", None, "free"),
        (10, "Is it?", "no", None),
        (11, "Why?", "0", None),
    ]
    assert items[0].load().getpixel((0, 0)) == (10, 20, 30)


GOOD = {"question_id": 1, "image": "picture.png", "text": "What?"}


@pytest.mark.parametrize(
    ("line", "says"),
    [
        ('{"question_id": 1,', "expected one JSON object a line"),
        ("[1, 2]", "expected a JSON object, got list"),
        (
            {"question_id": 1, "image": "picture.png"},
            "expected the fields question_id, image and text, got none named text",
        ),
        (
            {"text": "x"},
            "expected the fields question_id, image and text, got none named question_id",
        ),
        ({**GOOD, "text": 5}, "expected text to be str, got 5"),
        ({**GOOD, "question_id": None}, "expected question_id to be int or str, got None"),
        ({**GOOD, "image": "gone.png"}, "expected an existing image, got "),
        ({**GOOD, "image": "x" * 300}, "expected an existing image, got "),
        ({**GOOD, "text": "\ud800"}, "text: expected Unicode text, got '\\ud800' ("),
        ({**GOOD, "question_id": "\ud800"}, "question_id: expected Unicode text, got "),
        ({**GOOD, "category": "\ud800"}, "category: expected Unicode text, got "),
        ({**GOOD, "label": "\ud800"}, "label: expected Unicode text, got "),
        ('{"question_id": ' + "1" * 5000 + "}", "expected one JSON object a line, got Exceeds"),
        ("[" * 100_000, "expected one JSON object a line, got maximum recursion depth"),
        (
            {**GOOD, "answer": ["a", "b"]},
            "expected answer or label to be a str or a number, got [",
        ),
        ({**GOOD, "label": True}, "expected answer or label to be a str or a number, got True"),
    ],
)
def test_a_bad_line_is_named_by_its_number(tmp_path, picture, line, says):
    path = write_questions(tmp_path / "q.jsonl", GOOD, "", line)
    with pytest.raises(InputError) as caught:
        items_from_jsonl(path, tmp_path)
    assert f"q.jsonl:3: {says}" in str(caught.value)


def test_question_file_with_a_byte_order_mark(tmp_path, picture):
    path = tmp_path / "q.jsonl"
    path.write_text(json.dumps(GOOD), encoding="utf-8-sig")
    assert [item.text for item in items_from_jsonl(path, tmp_path)] == ["What?"]


def test_line_ends_of_unicode_within_a_question(tmp_path, picture):
    text = "two\u2028lines, \x85 three"
    path = tmp_path / "q.jsonl"
    path.write_text(json.dumps({**GOOD, "text": text}, ensure_ascii=False), encoding="utf-8")
    assert [item.text for item in items_from_jsonl(path, tmp_path)] == [text]


@pytest.mark.parametrize("content", [b"", b"\n\n", b"\xff\xfe\x00"])
def test_question_file_without_questions(tmp_path, content):
    path = tmp_path / "q.jsonl"
    path.write_bytes(content)
    with pytest.raises(InputError, match=r"--questions: expected"):
        items_from_jsonl(path, tmp_path)


def test_unreadable_images(tmp_path, picture):
    with pytest.raises(InputError, match=r"expected an existing file, got .*gone\.png"):
        read_image(tmp_path / "gone.png")
    text = tmp_path / "text.png"
    text.write_text("no image")
    with pytest.raises(InputError, match=r"expected an image file, got .*text\.png"):
        read_image(text)
    Image.effect_noise((64, 64), 90).save(picture)
    picture.write_bytes(picture.read_bytes()[:800])
    with pytest.raises(InputError, match=r"expected a readable image, got .*picture\.png"):
        read_image(picture)


@pytest.mark.parametrize(
    "pixels",
    [np.full((8, 8), 30_000, np.uint16), np.full((8, 8), 0.5, np.float32)],
    ids=["16 bits", "float"],
)
def test_images_that_pillow_would_cut_off(tmp_path, pixels):
    path = tmp_path / "deep.tif"
    Image.fromarray(pixels).save(path)
    with pytest.raises(InputError, match=r"expected 8 bits a channel, got .*deep\.tif"):
        read_image(path)


def test_images_of_too_many_pixels(picture, monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 31)
    with pytest.raises(InputError, match=r"expected a readable image, got .*exceeds limit of 62"):
        read_image(picture)


def test_every_prompt_about_every_image(picture):
    items = items_from_images([picture, picture], ["What?", "USER: <image> Why? ASSISTANT:"])
    assert [(i.question_id, i.text, i.verbatim) for i in items] == [
        (0, "What?", False),
        (1, "USER: <image> Why? ASSISTANT:", True),
        (2, "What?", False),
        (3, "USER: <image> Why? ASSISTANT:", True),
    ]
    with pytest.raises(
        InputError, match="--prompt: expected at most one <image> or <video>, got 2"
    ):
        items_from_images([picture], ["<image><image>"])
    with pytest.raises(InputError, match="--prompt: expected Unicode text, got "):
        items_from_images([picture], ["what is \udcff?"])


def test_demo_questions_and_scenes():
    items = items_from_demo(10)
    assert {item.category for item in items} == {
        "existence", "colour", "shape", "count", "position"
    }  # fmt: skip
    assert all(item.expected for item in items)
    assert image_by_name(items[3].image).tobytes() == items[3].load().tobytes()
    for name in ("demo:-1", "demo:one", "demo:" + "9" * 5000):
        with pytest.raises(InputError, match="IMAGE: expected demo:INDEX"):
            image_by_name(name)


@pytest.mark.parametrize(
    ("answer", "same"),
    [
        ("Yes.", "yes"),
        (" The  red\ncircle! ", "red circle"),
        ('"A dog"', "dog"),
        ("a", "a"),
        ("3", "3"),
        ("don't know", "don't know"),
        ("", ""),
    ],
)
def test_normalised_answers(answer, same):
    assert normalise(answer) == same


def test_summary():
    def answer(text, expected, category, tokens):
        item = Item(0, "x.png", Image.Image, "?", expected, category)
        return Answer(item, text, tokens, cache_bytes=1024.0 * tokens)

    baseline = [answer("yes", "yes", "a", 576), answer("no", "yes", "a", 576),
                answer("2", "2", "b", 576), answer("hm", None, None, 576)]  # fmt: skip
    answers = [answer("Yes.", "yes", "a", 40), answer("yes", "yes", "a", 60),
               answer("3", "2", "b", 50), answer("hm", None, None, 50)]  # fmt: skip
    times = [
        StageTimes(0.1, None, 0.01, 0.2, 0.3, 0.7),
        StageTimes(0.3, None, 0.03, 0.4, 0.5, 1.3),
    ]

    summary = summarise(answers, times, baseline)
    assert summary["visual_tokens"] == {"mean": 50, "min": 40, "max": 60}
    assert summary["kv_cache_bytes"] == 50 * 1024
    assert summary["agreement"] == 0.5
    assert summary["accuracy"] == pytest.approx(2 / 3)
    assert summary["accuracy_by_category"] == {"a": 1.0, "b": 0.0}
    milliseconds = summary["milliseconds"]
    assert milliseconds["prune_merge"] is None
    assert milliseconds["vision"] == pytest.approx(200)
    assert milliseconds["projector"] == pytest.approx(20)
    assert milliseconds["total"] == pytest.approx(1000)
    assert summarise(answers[3:], times, baseline[3:])["accuracy"] is None
