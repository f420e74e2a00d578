"""The commands on a tiny random model of every family of transformers: images, crops and videos."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from command_line import refusal
from PIL import Image
from saved_families import save, side_of, write_video
from tiny_families import FAMILIES
from transformers.models.auto.image_processing_auto import AutoImageProcessor

from prumerge_fast.cli import main
from prumerge_fast.cli.pictures import Grid, look
from prumerge_fast.harness import stages
from prumerge_fast.harness.models import load
from prumerge_fast.harness.prompts import model_inputs, prepare
from prumerge_fast.harness.videos import read_video, sampled
from prumerge_fast.patching.patch import patched
from prumerge_fast.reduction.config import PruMergeConfig
from prumerge_fast.towers.encoder import EncoderTower

NAMES = ["ViP-LLaVA", "LLaVA-NeXT", "Video-LLaVA", "LLaVA-NeXT-Video", "LLaVA-NeXT with SigLIP"]
NAMES += ["LLaVA-OneVision", "LLaVA with Pixtral"]
OF_VIDEOS = [name for name in NAMES if "video" in FAMILIES[name].kinds]
FRAMES = 3
KEEP = 3
ANSWER = 4  # tokens


@dataclass(frozen=True)
class Saved:
    name: str
    folder: Path


@pytest.fixture(scope="session", params=NAMES)
def saved(request, tmp_path_factory) -> Saved:
    return saved_once(request.param, tmp_path_factory)


@pytest.fixture(scope="session", params=OF_VIDEOS)
def of_videos(request, tmp_path_factory) -> Saved:
    return saved_once(request.param, tmp_path_factory)


_SAVED: dict[str, Saved] = {}


def saved_once(name: str, factory: Any) -> Saved:
    if name not in _SAVED:
        path = factory.mktemp("families") / name.replace(" ", "-")
        _SAVED[name] = Saved(name, save(name, path))
    return _SAVED[name]


@pytest.fixture(scope="session")
def pictures(tmp_path_factory) -> Path:
    """One that LLaVA-NeXT cuts into 4 crops, and one that it cuts into 2."""
    path = tmp_path_factory.mktemp("pictures")
    for name, size in (("square.png", (60, 60)), ("wide.png", (100, 33))):
        noise = np.random.default_rng(size[0]).integers(0, 256, (*size[::-1], 3), dtype=np.uint8)
        Image.fromarray(noise).save(path / name)
    return path


@pytest.fixture(scope="session")
def films(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("films")
    write_video(path / "long.mp4", 11)
    write_video(path / "short.avi", 2, size=(48, 64))
    (path / "._long.mp4").write_bytes(b"a side file")
    return path


def compared(capsys, saved, *arguments) -> dict[str, Any]:
    given = ["compare", "--model", saved.folder, "--max-new-tokens", ANSWER, "--json", *arguments]
    assert main([str(argument) for argument in given]) == 0, capsys.readouterr().err
    return json.loads(capsys.readouterr().out)


def model_of(saved: Saved) -> Any:
    model_class = getattr(
        transformers, f"{FAMILIES[saved.name].model_name}ForConditionalGeneration"
    )
    return model_class.from_pretrained(saved.folder)


_STRATEGY = "vision_feature_select_strategy"


def of_video(name: str, frames: int) -> int:
    """Placeholders of a video."""
    side = side_of(name) // 6
    if name == "LLaVA-OneVision":
        return frames * ((side + 1) // 2) ** 2 + 1
    return frames * (side * side // 4 if name == "LLaVA-NeXT-Video" else 1 + side * side)


def kept_of_video(name: str, frames: int, keep: int) -> int:
    """Tokens of a video of whose frames so many are kept, and supplements."""
    each, newline = {"Video-LLaVA": (1, 0), "LLaVA-OneVision": (0, 1)}.get(name, (0, 0))
    return frames * (each + keep + 1) + newline


def by_hand(saved: Saved, path: Path, question: str) -> dict[str, Any]:
    """The inputs of one question, as transformers makes them; of a video without its processor."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(saved.folder)
    images = AutoImageProcessor.from_pretrained(saved.folder)
    side = side_of(saved.name)
    if path.suffix == ".png":
        pixels = dict(images(Image.open(path), return_tensors="pt"))
        token, count = "<image>", (side // 6) ** 2
        if saved.name == "LLaVA with Pixtral":
            rows, columns = (pixels["image_sizes"][0] // 6).tolist()
            assert (rows, columns) == ((8, 8) if path.name == "square.png" else (3, 8))
            whole = "[IMG_BREAK]".join(["[IMG]" * columns] * rows) + "[IMG_END]"
            token, count = whole, 1
        elif "image_sizes" in pixels:
            model = model_of(saved)
            packed, _ = model.model.pack_image_features(
                [torch.zeros(len(pixels["pixel_values"][0]), count, 1)],
                image_sizes=pixels["image_sizes"],
                image_newline=torch.zeros(1),
                **({} if saved.name == "LLaVA-OneVision" else {_STRATEGY: "default"}),
            )
            count = len(packed[0])
    else:
        frames = read_video(path, FRAMES)
        size = {"shortest_edge": side}, {"height": side, "width": side}
        clip = transformers.CLIPImageProcessor(size=size[0], crop_size=size[1])
        if saved.name == "LLaVA-OneVision":  # frames are squeezed
            clip = transformers.CLIPImageProcessor(size=size[1], do_center_crop=False)
        seen = clip([Image.fromarray(frame) for frame in frames], return_tensors="pt")
        pixels = {"pixel_values_videos": seen["pixel_values"][None]}
        token, count = "<video>", of_video(saved.name, FRAMES)
    text = f"USER: {token * count}\n{question} ASSISTANT:"
    return {**tokenizer(text, return_tensors="pt"), **pixels}


@torch.no_grad()
def check(saved: Saved, result: dict[str, Any], placeholders: list[int]) -> list[int]:
    """Answers, tokens and stages of a comparison, against plain transformers one by one.

    Returns:
        How many tokens PruMerge keeps of each question.
    """
    model = model_of(saved)
    tokenizer = transformers.AutoTokenizer.from_pretrained(saved.folder)
    kept = []
    for answer in result["answers"]:
        inputs = by_hand(saved, Path(answer["image"]), answer["question"])
        start = inputs["input_ids"].shape[1]
        options = {"max_new_tokens": ANSWER, "do_sample": False}
        plain = model.generate(**inputs, **options)[0, start:]
        said = tokenizer.decode(plain, skip_special_tokens=True).strip()
        assert answer["answers"]["LLaVA"] == said
        with patched(model, PruMergeConfig(keep=KEEP)):
            pruned = model.generate(**inputs, **options)[0, start:]
            kept.append(sum(model.prumerge.last_lengths))
        said = tokenizer.decode(pruned, skip_special_tokens=True).strip()
        assert answer["answers"]["PruMerge"] == said
    rows = result["results"]
    for name, counts in (("LLaVA", placeholders), ("PruMerge", kept)):
        found = rows[name]["visual_tokens"]
        mean = pytest.approx(sum(counts) / len(counts))
        assert found == {"mean": mean, "min": min(counts), "max": max(counts)}
    for name, row in rows.items():
        stages = dict(row["milliseconds"])
        assert (stages.pop("prune_merge") is None) == (name == "LLaVA")
        assert all(time > 0 for time in stages.values()), stages
        assert stages["total"] > max(time for stage, time in stages.items() if stage != "total")
    return kept


def test_images(saved, pictures, capsys):
    """Two images at once, which LLaVA-NeXT cuts into 4 and into 2 crops."""
    options = ("--batch-size", 2, "--keep", KEEP, "--variant", "prumerge")
    result = compared(capsys, saved, "--images", pictures, "--prompt", "what ?", *options)
    side = side_of(saved.name) // 6
    placeholders = [side * side] * 2
    if FAMILIES[saved.name].cuts:
        # The overview; the grid of 2 x 2 crops and of 1 x 2, the image in it a third as high as it
        # is wide; a newline for each of its rows.
        wide = {5: 3, 6: 4}[side]  # rows
        placeholders = [
            side * side + 2 * side * (2 * side + 1),
            side * side + wide * (2 * side + 1),
        ]
    if saved.name == "LLaVA with Pixtral":
        placeholders = [8 * 8, 3 * 8]
    check(saved, result, placeholders)
    assert [Path(a["image"]).name for a in result["answers"]] == ["square.png", "wide.png"]
    tokens = result["results"]["PruMerge"]["visual_tokens"]
    if FAMILIES[saved.name].cuts:  # a newline behind each crop, none behind the overview
        assert (tokens["max"], tokens["min"]) == (5 * (KEEP + 1) + 4, 3 * (KEEP + 1) + 2)
    else:
        assert tokens["mean"] == KEEP + 1


def test_videos(of_videos, pictures, films, tmp_path, capsys):
    """Two videos and an image at once."""
    options = ("--batch-size", 3, "--keep", KEEP, "--variant", "prumerge", "--frames", FRAMES)
    asked = ("--images", pictures / "square.png", "--videos", films, "--prompt", "what ?")
    answers = ("--answers", tmp_path / "said.jsonl")
    result = compared(capsys, of_videos, *asked, *options, *answers)
    assert [a["modality"] for a in result["answers"]] == ["image", "video", "video"]
    assert [Path(a["image"]).name for a in result["answers"][1:]] == ["long.mp4", "short.avi"]
    assert result["settings"]["frames"] == FRAMES
    side = side_of(of_videos.name) // 6
    image = side * side + (2 * side * (2 * side + 1) if FAMILIES[of_videos.name].cuts else 0)
    video = of_video(of_videos.name, FRAMES)
    kept = check(of_videos, result, [image, video, video])
    written = (tmp_path / "said-prumerge.jsonl").read_text().splitlines()
    assert [json.loads(line)["metadata"]["visual_tokens"] for line in written] == kept


def test_share_of_a_frame_is_kept(of_videos, films, capsys):
    options = ("--keep", "0.32", "--variant", "prumerge+", "--frames", 2)
    result = compared(capsys, of_videos, "--videos", films, "--prompt", "what ?", *options)
    # Of 9, 9 and 25 patches.
    keep = 3 if FAMILIES[of_videos.name].cuts else 8
    video = kept_of_video(of_videos.name, 2, keep)
    tokens = result["results"]["PruMerge+"]["visual_tokens"]
    assert tokens == {"mean": video, "min": video, "max": video}


def test_files_after_one_option(of_videos, pictures, films, capsys):
    films_ = [films / "short.avi", films / "long.mp4"]
    images = [pictures / "wide.png", pictures / "square.png"]
    options = ("--variant", "prumerge", "--frames", 1, "--prompt", "what ?")
    result = compared(capsys, of_videos, "--videos", *films_, "--images", *images, *options)
    assert [a["image"] for a in result["answers"]] == list(map(str, [*images, *films_]))


@pytest.fixture
def moving(tmp_path) -> Path:
    """A GIF of two frames."""
    path = tmp_path / "a.gif"
    first, second = (Image.new("RGB", (60, 60), colour) for colour in ("red", "blue"))
    first.save(path, save_all=True, append_images=[second])
    return path


def test_one_file_as_image_and_as_video(
    moving, pictures, films, tmp_path, capsys, tmp_path_factory
):
    """It counts twice, and a page shows it as both."""
    saved = saved_once("Video-LLaVA", tmp_path_factory)
    page = tmp_path / "page.html"
    square, film = pictures / "square.png", films / "long.mp4"
    options = ("--variant", "prumerge", "--frames", 2, "--prompt", "what ?", "--html", page)
    pairs = [(square, "image"), (moving, "image"), (film, "video"), (moving, "video")]
    for asked in (
        ("--images", square, moving, "--videos", film, moving),
        ("--videos", film, "--images", square, moving, f"--videos={moving}"),
        ("--images", square, "--videos", film, "--json", moving, "--images", moving),
    ):
        result = compared(capsys, saved, *asked, *options)
        found = [(Path(a["image"]), a["modality"]) for a in result["answers"]]
        assert found == pairs
    sides = re.findall(r'<img src="[^"]*" width="(\d+)" height="(\d+)"', page.read_text())
    first, *_, last = sides
    assert first[0] == first[1]
    assert sides[2] == first
    assert int(last[0]) > int(last[1])  # its frames in a row

    moving.write_bytes(b"no picture")
    given = ["compare", "--model", saved.folder, "--images", square, moving, "--videos", moving]
    assert main([str(argument) for argument in (*given, *options)]) == 2
    captured = capsys.readouterr()
    assert captured.err.startswith("prumerge-fast: 2 of 3 pictures could not be read: expected an")


def test_question_files(of_videos, pictures, films, tmp_path, capsys):
    asked = tmp_path / "asked.jsonl"
    records = [
        {"question_id": 0, "video": "long.mp4", "text": "<video>\nwhat ?", "label": "w1"},
        {"question_id": 1, "image": "wide.png", "text": "what ?"},
    ]
    asked.write_text("".join(json.dumps(record) + "\n" for record in records))
    for path in (films / "long.mp4", pictures / "wide.png"):
        (tmp_path / path.name).write_bytes(path.read_bytes())
    options = ("--batch-size", 2, "--keep", KEEP, "--variant", "prumerge", "--frames", FRAMES)
    result = compared(capsys, of_videos, "--questions", asked, *options)
    assert [a["question"] for a in result["answers"]] == ["what ?", "what ?"]
    whole = (tmp_path / "long.mp4", tmp_path / "wide.png")
    items = [{**a, "image": str(path)} for a, path in zip(result["answers"], whole, strict=True)]
    placeholders = [
        (by_hand(of_videos, path, "what ?")["input_ids"] == token).sum().item()
        for path, token in zip(whole, (88, 90), strict=True)
    ]
    check(of_videos, {**result, "answers": items}, placeholders)

    both = {**records[0], "image": "wide.png"}
    asked.write_text(json.dumps(both))
    message = refusal(capsys, "compare", "--model", of_videos.folder, "--questions", asked)
    assert "asked.jsonl:1: expected either an image or a video, got both" in message
    asked.write_text(json.dumps({**records[0], "video": "none.mp4"}))
    message = refusal(capsys, "compare", "--model", of_videos.folder, "--questions", asked)
    assert "expected an existing video, got" in message


def test_prompts_of_videos(of_videos, films, pictures, tmp_path_factory):
    """The chat template's place for a video, and a whole prompt with either token."""
    from prumerge_fast.harness.inputs import items_from_images

    template = (
        "<s>{% for m in messages %}USER: {% for c in m.content %}{% if c.type == 'text' %}"
        "{{ c.text }}{% else %}<{{ c.type }}>{% endif %}{% endfor %}{% endfor %}"
        "{% if add_generation_prompt %} ASSISTANT:{% endif %}"
    )
    path = tmp_path_factory.mktemp("templates") / "model"
    loaded = load(save(of_videos.name, path, chat_template=template), dtype="auto", device="cpu")
    asked = ["what ?", "this <image> is"]
    items = items_from_images([], asked, [films / "long.mp4"], FRAMES)
    items += items_from_images([pictures / "square.png"], ["this <video> is"])
    inputs = prepare(loaded, items)
    count = of_video(of_videos.name, FRAMES)
    said = loaded.processor.tokenizer.batch_decode(inputs["input_ids"])
    said = [text.replace("<pad> ", "") for text in said]
    assert said[0] == f"<s> USER : {'<video> ' * count}what ? ASSISTANT :"
    assert said[1] == f"<s> this {'<video> ' * count}is"
    assert said[2].startswith("<s> this <image> <image>")
    assert "<video>" not in said[2]


def test_several_tokens_of_a_prompt_are_refused(of_videos, films, capsys):
    asked = ("--videos", films, "--prompt", "<video> and <image> ?")
    message = refusal(capsys, "compare", "--model", of_videos.folder, *asked)
    assert "--prompt: expected at most one <image> or <video>, got 2" in message


@pytest.mark.parametrize("name", ["ViP-LLaVA", "LLaVA-NeXT"])
def test_models_without_videos_refuse_them(name, films, capsys, tmp_path_factory):
    saved = saved_once(name, tmp_path_factory)
    asked = ("--videos", films, "--prompt", "what ?")
    message = refusal(capsys, "compare", "--model", saved.folder, *asked)
    assert message.startswith("prumerge-fast: --videos: expected a model that takes videos, got")


def test_bad_videos(of_videos, films, tmp_path, capsys):
    broken = tmp_path / "broken.mp4"
    whole = (films / "long.mp4").read_bytes()

    def said(path):
        return refusal(
            capsys, "compare", "--model", of_videos.folder, "--videos", path, "--prompt", "what ?"
        )

    for content in (b"", b"no video", whole[: len(whole) // 2]):
        broken.write_bytes(content)
        assert f"expected a readable video, got {broken}" in said(broken)
    empty = tmp_path / "empty"
    empty.mkdir()
    (empty / ".hidden.mp4").write_bytes(whole)
    assert "--videos: expected a folder with videos (.3g2, .3gp" in said(empty)
    assert "--videos: expected an existing file or folder" in said(tmp_path / "none.mp4")
    options = ("--prompt", "what ?", "--frames", 0)
    message = refusal(capsys, "compare", "--model", of_videos.folder, "--videos", films, *options)
    assert "--frames" in message
    options = ("--videos", films, "--prompt", "what ?", "--questions", broken)
    assert "--questions: expected no --images, --videos" in refusal(capsys, "compare", *options)
    assert "--prompt: expected at least one with --videos" in refusal(
        capsys, "compare", "--videos", films
    )


def test_a_broken_video_of_many(of_videos, films, tmp_path, capsys):
    """It is recorded with its error, and the others are asked."""
    broken = tmp_path / "broken.mp4"
    broken.write_bytes(b"no video")
    given = ["compare", "--model", of_videos.folder, "--videos", broken, films, "--frames", 1]
    given += ["--prompt", "what ?", "--max-new-tokens", 1, "--batch-size", 3, "--json"]
    assert main([str(argument) for argument in given]) == 2
    captured = capsys.readouterr()
    result = json.loads(captured.out)
    assert [Path(answer["image"]).name for answer in result["answers"]] == ["long.mp4", "short.avi"]
    (failed,) = result["failed"]
    assert failed["image"] == str(broken)
    assert failed["error"].startswith(f"expected a readable video, got {broken}")
    message = refusal(capsys, *given, "--strict")
    assert f"video: expected a readable video, got {broken}" in message


def test_without_pyav(of_videos, films, capsys, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "av", None)
    asked = ("--videos", films, "--prompt", "what ?")
    message = refusal(capsys, "compare", "--model", of_videos.folder, *asked)
    assert "--videos: expected PyAV to be installed" in message
    assert "pip install 'prumerge_fast[video]'" in message


def test_checkpoints_of_the_original_package_are_refused(folder, tmp_path, capsys):
    config = json.loads((folder / "config.json").read_text())
    config["architectures"] = ["LlavaLlamaForCausalLM"]
    (tmp_path / "config.json").write_text(json.dumps(config))
    message = refusal(capsys, "compare", "--model", tmp_path)
    assert "expected a checkpoint of transformers, got LlavaLlamaForCausalLM" in message


@pytest.mark.parametrize(
    ("count", "frames", "wanted"),
    [
        (11, 3, [0, 5, 10]),
        (10, 4, [0, 3, 6, 9]),
        (8, 8, list(range(8))),
        (100, 1, [0]),
        (2, 4, [0, 0, 1, 1]),
        (1, 3, [0, 0, 0]),
        (0, 3, []),
    ],
)
def test_frames_are_sampled_evenly(count, frames, wanted):
    assert sampled(count, frames) == wanted


def test_frames_are_those_of_the_video(films):
    """Each frame is brighter than the one before; the left half is red."""
    frames = read_video(films / "long.mp4", 3)
    assert frames.shape == (3, 48, 64, 3)
    assert frames.dtype == np.uint8
    right = frames[:, 10:-10, 40:-8].mean((1, 2, 3))
    assert np.allclose(right, [0, 255 * 5 / 11, 255 * 10 / 11], atol=12)
    assert (frames[:, 10:-10, 8:24, 0] > 200).all()
    assert len(read_video(films / "short.avi", 5)) == 5


@pytest.mark.parametrize(("rotation", "red"), [(-90, "top"), (90, "bottom"), (180, "right")])
def test_videos_are_as_a_person_sees_them(tmp_path, rotation, red):
    """A phone that is held upright writes lying frames, and by how much to turn them."""
    path = write_video(tmp_path / "phone.mp4", 2, rotation=rotation)
    frame = read_video(path, 1)[0]
    height, width = frame.shape[:2]
    assert (width, height) == ((64, 48) if rotation == 180 else (48, 64))
    halves = {
        "top": frame[: height // 2 - 8],
        "bottom": frame[height // 2 + 8 :],
        "right": frame[:, width // 2 + 8 :],
    }
    assert halves[red][..., 0].min() > 200
    other = {"top": "bottom", "bottom": "top"}.get(red)
    if other is not None:
        assert halves[other][..., 0].max() < 60


def test_moving_pictures(tmp_path):
    pages = [Image.new("RGB", (20, 10), (value, 0, 0)) for value in (0, 128, 255)]
    pages[0].save(tmp_path / "moving.gif", save_all=True, append_images=pages[1:], duration=100)
    frames = read_video(tmp_path / "moving.gif", 3)
    assert np.allclose(frames[:, 5, 5, 0], [0, 128, 255], atol=8)


def shown(capsys, saved, picture, output, *options) -> dict[str, Any]:
    given = ["show", picture, "--model", saved.folder, "-o", output, "--json", *options]
    assert main([str(argument) for argument in given]) == 0, capsys.readouterr().err
    return json.loads(capsys.readouterr().out)


def test_show_an_image(saved, pictures, tmp_path, capsys):
    """What it says is kept are the most attended patches of each crop that are no padding."""
    out = tmp_path / "shown.png"
    options = ("--keep", KEEP, "--variant", "prumerge")
    result = shown(capsys, saved, pictures / "wide.png", out, *options)
    has_class_token = FAMILIES[saved.name].class_token
    assert result["scores"] == ("class" if has_class_token else "received")
    rows = columns = side_of(saved.name) // 6
    if saved.name == "LLaVA with Pixtral":
        rows = 3
    crops = FAMILIES[saved.name].cuts
    views = result["views"] if crops else [result]
    assert len(views) == (3 if crops else 1)
    for number, view in enumerate(views):
        attention = np.asarray(view["attention"])
        scored_whole = saved.name == "LLaVA-OneVision" and number > 0  # padding has the rest
        if has_class_token or scored_whole:
            assert 0 < attention.sum() < 1  # the class token has the rest
        else:
            assert attention.sum() == pytest.approx(1)
        assert view["kept"] == sorted(range(rows * columns), key=lambda j: -attention[j])[:KEEP]
        assert list(map(int, view["neighbours"])) == view["kept"]
        padding = attention.reshape(rows, columns)[[0, -1]]
        assert (padding == 0).all() == (number > 0)
        assert view["patches"] == (attention > 0).sum()
    assert result["visual_tokens"] == (3 * (KEEP + 1) + 2 if crops else KEEP + 1)
    with Image.open(out) as sheet:
        assert sheet.width > (3 * 240 if crops else 3 * 480)
    if crops:
        assert result["grid"] == [1, 2]
        model, inputs = model_of(saved), by_hand(saved, pictures / "wide.png", "what ?")
        assert result["all_tokens"] == (inputs["input_ids"] == 90).sum()
        with patched(model, PruMergeConfig(keep=KEEP)), torch.no_grad():
            model(**inputs)
            assert model.prumerge.last_lengths == (result["visual_tokens"],)


@torch.no_grad()
def test_show_an_image_that_is_interpolated(tmp_path_factory, tmp_path, capsys):
    """Cells of two patches or more a side are drawn over all of these, and are no other patches."""
    name = "LLaVA-OneVision"
    grids = FAMILIES[name].options["image_grid_pinpoints"]
    saved = Saved(name, save(name, tmp_path_factory.mktemp("large") / "model", grids))
    picture = tmp_path / "large.png"
    noise = np.random.default_rng(0).integers(0, 256, (120, 100, 3), dtype=np.uint8)
    Image.fromarray(noise).save(picture)
    out = tmp_path / "shown.png"
    result = shown(capsys, saved, picture, out, "--keep", KEEP, "--supplement", "image")
    assert result["grid"] == [4, 4]
    assert sum(view["patches"] for view in result["views"][1:]) == 16 * 13
    assert result["visual_tokens"] == 17 * KEEP + 16 + 1
    for view in result["views"]:
        attention = np.asarray(view["attention"])
        assert (attention > 0).sum() == view["patches"]
        assert (attention[view["kept"]] > 0).all()
    loaded = load(saved.folder, dtype="auto", device="cpu")
    seen = look(loaded, Image.open(picture), "large", {"a": PruMergeConfig()}, backend="auto")
    # All of the image, which fills 20 x 16 patches of the grid, stands behind some cell.
    assert sum(int((view.joined >= 0).sum()) for view in seen.views[1:]) == 20 * 16
    for view in seen.views:
        grid = Grid(view.image, view.cells, 60, view.joined)
        drawn = sorted(member for patch in view.patches for member in grid.members(patch))
        assert len(drawn) == len(set(drawn))  # each patch of the image once
        inside = [i for i in range(25) if view.joined[i] >= 0]
        assert drawn == [divmod(i, 5) for i in inside]
        assert set(view.patches) <= set(inside)
        for patch in view.patches:
            left, top, right, bottom = grid.box(patch)
            members = grid.members(patch)
            assert (right - left) * (bottom - top) == len(members) * grid.cell**2
            assert divmod(patch, 5) in members


def test_stages_of_what_is_pruned_behind_the_projector(tmp_path_factory, pictures, monkeypatch):
    saved = saved_once("LLaVA-OneVision", tmp_path_factory)
    loaded = load(saved.folder, dtype="auto", device="cpu")
    inputs = model_inputs(loaded, ["<image> a"], [Image.open(pictures / "square.png")])
    marks, mark = list[str](), stages._Clock._mark
    monkeypatch.setattr(
        stages._Clock, "_mark", lambda clock, name: (marks.append(name), mark(clock, name))
    )
    options = {"backend": "auto", "max_new_tokens": 2, "min_new_tokens": 2}
    stages.measure(loaded.model, inputs, PruMergeConfig(keep=KEEP), **options)
    found = [name for name, before in zip(marks, ["", *marks], strict=False) if name != before]
    pruned = ["vision", "prune_merge", "projector", "prune_merge", "prefill"]
    assert found == ["before", *pruned, "decode", "end"]
    marks.clear()
    stages.measure(loaded.model, inputs, None, **options)
    assert marks == ["before", "vision", "projector", "prefill", "decode", "end"]


def test_several_images_of_a_prompt(tmp_path_factory, pictures):
    """They are views that are not cut, as one of a prompt of its own is."""
    saved = saved_once("LLaVA-OneVision", tmp_path_factory)
    loaded = load(saved.folder, dtype="auto", device="cpu")
    images = [Image.open(pictures / "square.png")] * 3
    inputs = model_inputs(loaded, ["<image> <image> a", "b", "<image> c"], images)
    assert inputs["batch_num_images"].tolist() == [2, 1]
    assert (inputs["input_ids"] == 90).sum(1).tolist() == [2 * 26, 0, 25 + 10 * 11]
    with patched(loaded.model, PruMergeConfig(keep=KEEP)):
        loaded.model(**inputs)
        assert loaded.model.prumerge.last_lengths == (KEEP + 2, KEEP + 2, 5 * (KEEP + 1) + 4)
        inputs["batch_num_images"] = torch.tensor([1, 1])
        with pytest.raises(ValueError, match=r"batch_num_images: .* 3 together.* got \[1, 1\]"):
            loaded.model(**inputs)


def test_what_is_not_given_follows_the_model(pictures, tmp_path, tmp_path_factory, capsys):
    """Without a class token: PruMerge+, a quarter of the tokens; `--keep none` is adaptive."""
    folder = tmp_path_factory.mktemp("siglip") / "model"
    save("LLaVA with SigLIP", folder)
    assert main(["doctor", "--json", "--model", str(folder)]) == 0
    found = json.loads(capsys.readouterr().out)["model"]
    assert (found["scores"], found["patches"]) == ("received", 25)
    assert found["why"] == "its vision tower has no class token"
    assert (found["defaults"]["variant"], found["defaults"]["keep"]) == ("prumerge+", 0.25)
    assert main(["doctor", "--model", str(folder)]) == 0
    assert "the attention they receive" in " ".join(capsys.readouterr().out.split())

    picture = str(pictures / "square.png")
    command = ["show", picture, "--model", str(folder), "--json", "-o", str(tmp_path / "a.png")]
    for options, variant, keep in (
        ([], "prumerge+", 0.25),
        (["--variant", "prumerge"], "prumerge", 0.25),
        (["--keep", "none"], "prumerge+", None),
        (["--keep", "3"], "prumerge+", 3),
    ):
        assert main(command + options) == 0
        config = json.loads(capsys.readouterr().out)["config"]
        assert (config["variant"], config["keep"]) == (variant, keep), options
    for options in (["--scores", "class"], ["--keep", "26"]):
        assert main(command + options) == 2
        said = capsys.readouterr().err
        assert said.startswith(f"prumerge-fast: {options[0]}: expected"), said
    assert main(["cost", "--json", "--model", str(folder), "--keep", "6", "--device", "H100"]) == 0


def test_show_a_video(of_videos, films, tmp_path, capsys):
    """Frames side by side; of more than eight, eight of them."""
    sizes = []
    for frames in (2, 11):
        out = tmp_path / f"{frames}.png"
        options = ("--keep", 2, "--frames", frames)
        result = shown(capsys, of_videos, films / "long.mp4", out, *options)
        assert result["modality"] == "video"
        assert len(result["views"]) == frames
        assert all(len(view["kept"]) == 2 for view in result["views"])
        assert result["visual_tokens"] == kept_of_video(of_videos.name, frames, 2)
        with Image.open(out) as sheet:
            sizes.append(sheet.width)
    assert 2 * 240 < sizes[0] < 3 * 240
    assert 8 * 240 < sizes[1] < 9 * 260


def test_show_refuses_a_video_of_a_model_without_videos(films, tmp_path, tmp_path_factory, capsys):
    saved = saved_once("ViP-LLaVA", tmp_path_factory)
    asked = (films / "long.mp4", "--model", saved.folder, "-o", tmp_path / "x.png")
    assert "expected a model that takes videos" in refusal(capsys, "show", *asked)


def test_page(of_videos, pictures, films, tmp_path, capsys):
    """Each policy's picture of an image, of crops and of a video, and how many tokens it keeps."""
    page = tmp_path / "page.html"
    options = ("--frames", 2, "--keep", KEEP, "--html", page)
    asked = ("--images", pictures, "--videos", films / "long.mp4", "--prompt", "what ?")
    result = compared(capsys, of_videos, *asked, *options)
    content = page.read_text()
    assert content.count('src="data:image/webp') == 3 * 3
    for row in result["results"].values():
        for end in ("min", "max"):
            assert f"<b>{row['visual_tokens'][end]}</b> tokens" in content


BUDGET = 4
EVALUATED = {
    "all tokens": {"keep": 1.0, "merge": "none", "supplement": False, "order": "raster"},
    "PruMerge, adaptive": {},
    "PruMerge+, adaptive": {"variant": "prumerge+"},
    "PruMerge (4)": {"keep": BUDGET - 1},
    "PruMerge, raster order (4)": {"keep": BUDGET - 1, "order": "raster"},
    "attention top-k (4)": {"keep": BUDGET, "merge": "none", "supplement": False},
}


@torch.no_grad()
def test_evaluate(saved, pictures, films, tmp_path, capsys, monkeypatch):
    """Each policy's answers and tokens are those of the model patched so, or not at all.

    Answers are read from the file that they are taken up from.
    """
    asked = [pictures / "square.png", pictures / "wide.png"]
    if "video" in FAMILIES[saved.name].kinds:
        asked += [films / "short.avi", films / "long.mp4"]
    questions = tmp_path / "questions.jsonl"
    with questions.open("w") as file:
        for number, path in enumerate(asked):
            kind = "image" if path.suffix == ".png" else "video"
            record = {"question_id": number, kind: path.name, "text": "what ?", "answer": "w1"}
            file.write(json.dumps(record) + "\n")
            (tmp_path / path.name).write_bytes(path.read_bytes())
    given = ("--model", saved.folder, "--questions", questions, "--frames", FRAMES)
    options = ("--tokens", BUDGET, "--batch-size", len(asked), "--max-new-tokens", ANSWER)
    command = ("evaluate", *given, *options, "-o", tmp_path / "out.json", "--json")
    towers = []
    read = EncoderTower.read
    monkeypatch.setattr(
        EncoderTower,
        "read",
        lambda kind, tower, *given, **options: (
            towers.append(tower) or read(kind, tower, *given, **options)
        ),
    )
    assert main([str(argument) for argument in command]) == 0, capsys.readouterr().err
    assert len(towers) == len(FAMILIES[saved.name].kinds)  # once, for all policies
    result = json.loads(capsys.readouterr().out)
    (found,) = tmp_path.glob("out*answers*")
    batch = json.loads(found.read_text().splitlines()[1])

    model = model_of(saved)
    tokenizer = transformers.AutoTokenizer.from_pretrained(saved.folder)
    for number, path in enumerate(asked):
        inputs = by_hand(saved, path, "what ?")
        for policy, config in EVALUATED.items():
            with patched(model, PruMergeConfig(**config)):
                ids = model.generate(**inputs, max_new_tokens=ANSWER, do_sample=False)
                (length,) = model.prumerge.last_lengths
            new = ids[0, inputs["input_ids"].shape[1] :]
            text = tokenizer.decode(new, skip_special_tokens=True).strip()
            assert batch["texts"][policy][number] == text, policy
            assert batch["tokens"][policy][number] == length, policy
        placeholders = (inputs["input_ids"] == 90).sum() + (inputs["input_ids"] == 88).sum()
        assert batch["tokens"]["all tokens"][number] == placeholders
        for policy in ("random (4)", "evenly spaced (4)"):
            length = batch["tokens"][policy][number]
            if FAMILIES[saved.name].cuts and path.suffix == ".png":
                crops = (5, 3)[number]  # and at most a newline a token
                assert BUDGET * crops < length < 2 * BUDGET * crops, policy
            else:  # the same of each frame, with its class token where there is one
                assert length == batch["tokens"]["PruMerge (4)"][number], policy
    assert batch["tokens"].keys() == result["policies"].keys()
    assert result["settings"]["frames"] == FRAMES


def test_evaluate_refuses_videos_of_a_model_without(films, tmp_path, tmp_path_factory, capsys):
    saved = saved_once("LLaVA-NeXT", tmp_path_factory)
    questions = tmp_path / "questions.jsonl"
    record = {"question_id": 0, "video": "long.mp4", "text": "what ?", "answer": "w1"}
    questions.write_text(json.dumps(record))
    given = ("--model", saved.folder, "--questions", questions, "--image-folder", films)
    assert "expected a model that takes videos" in refusal(capsys, "evaluate", *given)
