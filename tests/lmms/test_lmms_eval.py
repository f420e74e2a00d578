"""The plugin under lmms-eval itself, on demo scenes: the same answers as `compare`."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from PIL import Image
from saved_families import save, write_video

from prumerge_fast.cli import main
from prumerge_fast.demo import MODEL_DIR
from prumerge_fast.demo.items import items_from_demo
from prumerge_fast.errors import InputError, PruMergeError

pytest.importorskip(
    "lmms_eval", reason="lmms-eval is not installed; CI has it in a step of its own"
)
datasets = pytest.importorskip("datasets")
from lmms_eval.models import get_model  # noqa: E402
from lmms_eval.tasks import TaskManager  # noqa: E402

COUNT = 24
TASK = Path(__file__).with_name("lmms_task")
POLICIES = {"none": "LLaVA", "prumerge": "PruMerge", "prumerge+": "PruMerge+"}


def run(*command: Any, folder: Path) -> str:
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_HOME": str(folder / "home")}
    done = subprocess.run(
        [str(part) for part in command], capture_output=True, text=True, env=environment, cwd=folder
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def compared(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What `compare` says of the same questions."""
    folder = tmp_path_factory.mktemp("compare")
    return json.loads(run("prumerge-fast", "compare", "--count", COUNT, "--json", folder=folder))


@pytest.fixture(scope="module")
def task(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the task and its data."""
    folder = tmp_path_factory.mktemp("task")
    items = items_from_demo(COUNT)
    columns = {
        "image": [item.load() for item in items],
        "question": [item.text for item in items],
        "answer": [item.expected for item in items],
    }
    datasets.DatasetDict(test=datasets.Dataset.from_dict(columns)).save_to_disk(folder / "data")
    shutil.copy(TASK / "utils.py", folder)
    text = (TASK / "demo_scenes.yaml").read_text()
    (folder / "demo_scenes.yaml").write_text(text.replace("DATASET", str(folder / "data")))
    return folder


@pytest.mark.parametrize(
    ("variant", "batch_size"), [("none", 1), ("prumerge", 8), ("prumerge+", 3)]
)
def test_answers_are_those_of_compare(
    task: Path, compared: dict[str, Any], tmp_path: Path, variant: str, batch_size: int
) -> None:
    run(
        *("lmms-eval", "--model", "llava_prumerge", "--tasks", "demo_scenes"),
        *("--model_args", f"pretrained={MODEL_DIR},variant={variant},device=cpu"),
        *("--include_path", task, "--batch_size", batch_size),
        *("--output_path", tmp_path / "out", "--log_samples"),
        folder=tmp_path,
    )
    (results,) = (tmp_path / "out").rglob("*_results.json")
    (samples,) = (tmp_path / "out").rglob("*_samples_demo_scenes.jsonl")
    policy = POLICIES[variant]
    score = json.loads(results.read_text())["results"]["demo_scenes"]["exact_match,none"]
    assert score == pytest.approx(compared["results"][policy]["accuracy"])
    rows = sorted(map(json.loads, samples.read_text().splitlines()), key=lambda row: row["doc_id"])
    said = [row["filtered_resps"] for row in rows]
    assert said == [answer["answers"][policy] for answer in compared["answers"]]


@pytest.fixture(scope="module")
def build() -> Callable[..., Any]:
    model = get_model("llava_prumerge")
    return lambda arguments="", **more: model.create_from_arg_string(
        f"pretrained={MODEL_DIR},device=cpu{arguments}", more
    )


def request(model: Any, context: str, second: Any, images: list[Any]) -> Any:
    """One of lmms-eval's, with a document of its own."""
    split = model.task_dict.setdefault("task", {}).setdefault("test", {})
    number = len(split)
    split[number] = images
    return SimpleNamespace(args=(context, second, lambda doc: doc, number, "task", "test"))


def picture_of(item: Any) -> Any:
    """As the model holds the image of an item."""
    return SimpleNamespace(modality="image", content=item.load())


def test_loss_of_right_answers_is_least(build: Callable[..., Any]) -> None:
    model = build(",variant=prumerge+")
    item = next(item for item in items_from_demo(40) if item.expected == "yes")
    answers = ["yes", "no", "red"]
    found = model.loglikelihood([request(model, item.text, a, [item.load()]) for a in answers])
    losses = [loss for loss, _ in found]
    assert losses.index(min(losses)) == 0
    assert [greedy for _, greedy in found] == [True, False, False]
    spaced = model.loglikelihood([request(model, item.text, " yes", [item.load()])])
    assert spaced == [found[0]]
    assert all(loss > 0 for loss in losses)


def test_loss_is_that_of_labels(build: Callable[..., Any]) -> None:
    model = build(",variant=none")
    item = items_from_demo(1)[0]
    ((loss, _),) = model.loglikelihood([request(model, item.text, "red", [item.load()])])
    pictures = [picture_of(item)]
    prompt = model._prompt(item.text, pictures)
    inputs = model._inputs([f"{prompt} red"], [pictures])
    ids = inputs["input_ids"]
    before = model._inputs([prompt], [pictures])["input_ids"]
    assert ids.shape[1] == before.shape[1] + 1
    labels = ids.clone()
    labels[:, :-1] = -100
    with torch.inference_mode():
        expected = model.model(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            pixel_values=inputs["pixel_values"],
            labels=labels,
        ).loss
    assert loss == pytest.approx(expected.item(), rel=1e-5)


def test_prompts_without_images_several_images_and_stop_strings(build: Callable[..., Any]) -> None:
    model = build(batch_size=4)
    image = items_from_demo(1)[0].load()
    options = {"max_new_tokens": 2, "until": ["\n\n"]}
    texts = model.generate_until(
        [
            request(model, "what colour is it?", options, []),
            request(model, "what colour is it?", options, [image]),
            request(model, "<image> <image> same?", options, [image, image]),
        ]
    )
    assert len(texts) == 3
    picture = picture_of(items_from_demo(1)[0])
    prompts = [model._prompt("same?", [picture] * n) for n in (0, 2)]
    assert [prompt.count(model._loaded.processor.image_token) for prompt in prompts] == [0, 2]
    assert model._prompt("<image> same?", [picture]).count("<image>") == 1


@pytest.mark.parametrize(
    ("options", "samples"),
    [
        ({}, False),
        ({"until": None, "do_sample": False}, False),  # what a task without options passes
        ({"temperature": 0.0, "top_p": 0, "do_sample": True}, False),
        ({"temperature": 0.7, "do_sample": False}, False),
        ({"temperature": 0.7}, True),
        ({"do_sample": True}, True),
    ],
)
def test_when_it_samples(
    build: Callable[..., Any],
    monkeypatch: pytest.MonkeyPatch,
    options: dict[str, Any],
    samples: bool,
) -> None:
    model = build(",variant=none")
    generate, seen = model.model.generate, {}

    def spy(**given: Any) -> Any:
        seen.update(given)
        return generate(**given)

    monkeypatch.setattr(model.model, "generate", spy)
    item = items_from_demo(1)[0]
    asked = {**options, "max_new_tokens": 2}
    model.generate_until([request(model, item.text, asked, [item.load()])])
    assert seen["do_sample"] is samples
    assert seen.get("temperature") == (options.get("temperature") if samples else None)


def test_conversation_of_llava(build: Callable[..., Any]) -> None:
    image = picture_of(items_from_demo(1)[0])
    plain, llava = build(), build(",conv_template=vicuna_v1")
    for context, images in [("red?", [image]), ("<image> or <image>?", [image] * 2), ("red?", [])]:
        prompt = llava._prompt(context, images)
        assert prompt.startswith("A chat between a curious user and an artificial intelligence as")
        assert prompt.endswith(f"user's questions. {plain._prompt(context, images)}")


@pytest.mark.parametrize("size", [(101, 60), (60, 101), (77, 77)])
def test_padding_is_that_of_llava(build: Callable[..., Any], size: tuple[int, int]) -> None:
    from transformers.models.llava.image_processing_pil_llava import LlavaImageProcessorPil

    model = build(",image_aspect_ratio=pad")
    picture = items_from_demo(1)[0].load().resize(size)
    pictures = model._pictures(lambda doc: doc, *request(model, "", {}, [picture]).args[3:])
    given = model._inputs([model._prompt("red?", pictures)], [pictures])["pixel_values"]
    expected = LlavaImageProcessorPil.from_pretrained(MODEL_DIR, do_pad=True)(
        picture, return_tensors="pt"
    )["pixel_values"]
    torch.testing.assert_close(given, expected)
    cropped = build()._inputs([model._prompt("red?", pictures)], [pictures])["pixel_values"]
    assert torch.equal(given, cropped) == (size[0] == size[1])


def test_four_bits(build: Callable[..., Any]) -> None:
    pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed (extra: int4)")
    model = build(",load_in_4bit=True,variant=prumerge+")
    assert model.model.is_loaded_in_4bit
    items = items_from_demo(4)
    options = {"max_new_tokens": 4}
    asked = [request(model, item.text, options, [item.load()]) for item in items]
    assert model.generate_until(asked) == [item.expected for item in items]


def test_benchmarks_of_the_document_exist() -> None:
    document = (Path(__file__).parents[2] / "docs" / "lmms-eval.md").read_text()
    (command,) = re.findall(r"--tasks ([\w,]+)", document)
    named = {*command.split(","), *re.findall(r"`(\w+_test)`", document)}
    assert len(named) >= 7
    assert named <= set(TaskManager().all_tasks)


@pytest.mark.parametrize(
    ("arguments", "error", "says"),
    [
        (
            ",variant=best",
            ValueError,
            "^variant: expected 'prumerge' or 'prumerge\\+' or 'none', got",
        ),
        (",keep=1000", InputError, "^keep: expected at most N = 196"),
        (",pretrained=/nowhere", InputError, "^pretrained: expected a folder or a hub name"),
        (",device=tpu", InputError, "^device: expected auto, cpu, cuda or cuda:INDEX, got 'tpu'"),
        (",conv_template=v0", ValueError, "^conv_template: expected 'vicuna_v1', got 'v0'"),
        (",image_aspect_ratio=anyres", ValueError, "^image_aspect_ratio: expected 'pad', got"),
        (",variant=none,keep=8", ValueError, "keep: expected none beside variant=none, got 8"),
        (",variant=none,positions=original", ValueError, "positions: expected none beside variant"),
        (",positions=raster", ValueError, "^positions: expected 'compact' or 'original', got"),
        (",dtype=int8", ValueError, "^dtype: expected 'auto' or 'float32'"),
        (",load_in_4bit=maybe", TypeError, "load_in_4bit: expected True or False, got 'maybe'"),
        (",frames=0", ValueError, "^frames: expected a whole number >= 1, got 0"),
        (",batch_size=auto", ValueError, "batch_size: expected a whole number >= 1, got auto"),
        (",colour=red", TypeError, "unexpected keyword argument 'colour'"),
    ],
)
def test_bad_arguments(
    build: Callable[..., Any], arguments: str, error: type[Exception], says: str
) -> None:
    with pytest.raises((error, PruMergeError), match=says):
        build(arguments)


@pytest.mark.parametrize("family", ["LLaVA-NeXT", "Video-LLaVA", "LLaVA-NeXT-Video"])
def test_families_answer_as_under_compare(
    family: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Images, and videos by the names of their files, in batches that mix both."""
    folder = save(family, tmp_path / "model")
    pictures: list[Any] = [tmp_path / f"{side}.png" for side in (40, 100)]
    for path in pictures:
        Image.effect_noise((int(path.stem), 50), 90).convert("RGB").save(path)
    videos = []
    if family != "LLaVA-NeXT":
        videos = [write_video(tmp_path / f"{count}.mp4", count) for count in (2, 9)]
    arguments = ["--model", folder, "--prompt", "what ?", "--frames", "3", "--keep", "3", "--json"]
    arguments += ["--images", *pictures, *(["--videos", *videos] if videos else [])]
    capsys.readouterr()
    assert main(["compare", *map(str, arguments), "--max-new-tokens", "4"]) == 0
    answers = json.loads(capsys.readouterr().out)["answers"]

    model_class = get_model("llava_prumerge")
    for variant, policy in POLICIES.items():
        kept = "" if variant == "none" else ",keep=3"
        model = model_class.create_from_arg_string(
            f"pretrained={folder},device=cpu,frames=3,variant={variant}{kept}", {"batch_size": 3}
        )
        visuals = [Image.open(path) for path in pictures] + list(map(str, videos))
        asked = [request(model, "what ?", {"max_new_tokens": 4}, [one]) for one in visuals]
        assert model.generate_until(asked) == [said["answers"][policy] for said in answers]
        placed = [request(model, "<image> ?", {"max_new_tokens": 4}, [visuals[0]])]
        placed.append(request(model, "what ?", {"max_new_tokens": 4}, [visuals[0], visuals[-1]]))
        assert len(model.generate_until(placed)) == 2


def test_videos_are_refused(build: Callable[..., Any]) -> None:
    model = build()
    says = "expected images, which are all that a LlavaForConditionalGeneration takes, .* got str"
    with pytest.raises(TypeError, match=says):
        model.generate_until([request(model, "what?", {}, ["clip.mp4"])])
