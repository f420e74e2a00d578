"""The training recipe: packed turns are exact, targets fit the pictures, and runs resume."""

import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoProcessor, LlavaForConditionalGeneration

from prumerge_fast.demo import IMAGE_TOKEN, PROMPT, recipe
from prumerge_fast.demo import train as train_module
from prumerge_fast.demo.conversations import IGNORE, MIX, Conversations, conversation_loss
from prumerge_fast.demo.scenes import COLOURS, SHAPES, benchmark, make_scene
from prumerge_fast.demo.set_prediction import PAIRS, patch_targets, set_targets
from prumerge_fast.demo.train import Stage, TrainConfig, pixel_values, train

SHORT = TrainConfig(
    tower=Stage(3, 2, 1e-3, warmup=1),
    align=Stage(2, 2, 1e-3, warmup=1),
    instruct=Stage(2, 2, 1e-3, warmup=1),
    answer=Stage(1, 2, 1e-3, warmup=1),
    turns=5,
    save_every=1,
    workers=0,
)


@pytest.fixture(scope="module")
def untrained(tmp_path_factory):
    """An untrained model, and model and processor as loaded from where `recipe.save` put it."""
    torch.manual_seed(0)
    tokenizer = recipe.build_tokenizer()
    model = LlavaForConditionalGeneration(recipe.build_config(tokenizer)).bfloat16().float().eval()
    folder = tmp_path_factory.mktemp("saved")
    recipe.save(model, tokenizer, folder)
    loaded = LlavaForConditionalGeneration.from_pretrained(folder, dtype=torch.float32).eval()
    return model, tokenizer, loaded, AutoProcessor.from_pretrained(folder)


def _asked(scene, turns):
    asked = (scene.question(kind, 1 + turn) for turn, kind in enumerate(MIX[:turns]))
    return [question for question in asked if question]


def test_saved_model_is_the_same_model(untrained):
    model, _, loaded, _ = untrained
    expected, got = model.state_dict(), loaded.state_dict()
    assert expected.keys() == got.keys()
    assert all(torch.equal(expected[name], got[name]) for name in expected)


def test_training_pixels_are_the_processors(untrained):
    *_, processor = untrained
    scene = make_scene("train", 5)
    inputs = processor(images=[scene.render()], text=[IMAGE_TOKEN], return_tensors="pt")
    torch.testing.assert_close(pixel_values(scene), inputs["pixel_values"][0], atol=1e-5, rtol=0)


@torch.no_grad()
def test_packed_turns_equal_separate_prompts(untrained):
    model, tokenizer, loaded, processor = untrained
    scenes = [make_scene("train", 1), make_scene("train", 2)]
    conversations = Conversations(tokenizer, turns=5)
    turns = [conversations.questions(scene) for scene in scenes]
    assert len({len(ids) for scene_turns in turns for ids, _ in scene_turns}) > 1
    pixels = torch.stack([pixel_values(scene) for scene in scenes])
    batch = conversations.batch(turns)
    packed = conversation_loss(model, pixels, conversations.prefix, batch)

    losses = []
    for scene in scenes:
        for question in _asked(scene, 5):
            prompt = PROMPT.format(question=question.text)
            inputs = processor(
                images=[scene.render()],
                text=[f"{prompt} {question.answer}{tokenizer.eos_token}"],
                return_tensors="pt",
            )
            logits = loaded(**inputs).logits[0]
            ids = inputs["input_ids"][0]
            answered = (
                len(tokenizer(f" {question.answer}")["input_ids"]) - 1 + 1
            )  # no <s>, but </s>
            losses += torch.nn.functional.cross_entropy(
                logits[-answered - 1 : -1], ids[-answered:], reduction="none"
            ).tolist()
    assert packed.item() == pytest.approx(np.mean(losses), rel=1e-4)


def test_spans_move_only_positions(untrained):
    _, tokenizer, *_ = untrained
    conversations = Conversations(tokenizer, turns=3)
    turns = [conversations.questions(make_scene("train", 4))]
    ids, labels, positions, mask = conversations.batch(turns)
    short_ids, short_labels, short, short_mask = conversations.batch(turns, spans=[49])
    assert torch.equal(ids, short_ids)
    assert torch.equal(labels, short_labels)
    assert torch.equal(mask, short_mask)
    before, image = (
        len(conversations.prefix),
        slice(len(conversations.prefix), conversations.offset),
    )
    assert short[0, image].tolist() == [before + i * 49 // 196 for i in range(196)]
    assert (positions - short)[0, conversations.offset :].unique().tolist() == [196 - 49]
    spans = [conversations.span(make_scene("train", index)) for index in range(200)]
    assert min(spans) < 40
    assert max(spans) > 230
    assert 0.15 < spans.count(196) / 200 < 0.4
    assert spans[7] == conversations.span(make_scene("train", 7))


def test_only_answers_are_learnt(untrained):
    _, tokenizer, *_ = untrained
    conversations = Conversations(tokenizer, turns=5)
    scene = make_scene("train", 3)
    for (ids, labels), question in zip(
        conversations.questions(scene), _asked(scene, 5), strict=True
    ):
        learnt = [token for token, label in zip(ids, labels, strict=True) if label != IGNORE]
        assert tokenizer.decode(learnt) == f" {question.answer}{tokenizer.eos_token}"


def test_any_prompt_can_be_written(untrained):
    _, tokenizer, *_ = untrained
    text = "Größe, 寸法 — what's \t odd? 🙂"
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    assert tokenizer.unk_token_id not in ids
    assert tokenizer.decode(ids) == text
    for _, question in benchmark("test", 50):
        assert len(tokenizer(f" {question.answer}", add_special_tokens=False)["input_ids"]) == 1


def test_chat_template_writes_the_trained_prompt(untrained):
    *_, processor = untrained
    content = [{"type": "image"}, {"type": "text", "text": "How many rings are there?"}]
    prompt = processor.apply_chat_template(
        [{"role": "user", "content": content}], add_generation_prompt=True
    )
    assert prompt == PROMPT.format(question="How many rings are there?")


def test_targets_name_what_the_patches_show():
    scenes = [make_scene("train", index) for index in range(20)]
    colours, shapes, centres, places = patch_targets(scenes)
    counts, _ = set_targets(scenes)
    for b, scene in enumerate(scenes):
        assert counts[b].sum() == len(scene.objects)
        assert centres[b].sum() == len(scene.objects)
        for item in scene.objects:
            patch = int(item.y * recipe.GRID) * recipe.GRID + int(item.x * recipe.GRID)
            assert list(COLOURS)[colours[b, patch] - 1] == item.colour
            assert SHAPES[shapes[b, patch] - 1] == item.shape
            assert places[b, patch].tolist() == pytest.approx([item.x, item.y])
            assert counts[b, PAIRS.index(item.pair)] > 0


class _Interrupted(Exception):
    pass


def test_interrupted_run_resumes_as_if_nothing_had_happened(tmp_path, monkeypatch):
    whole = train(tmp_path / "whole", SHORT)
    for stop_after in (2, 4):  # in the tower stage, then in the alignment stage
        with monkeypatch.context() as patch:
            calls = []

            def render(scene, calls=calls, stop_after=stop_after):
                calls.append(scene)
                if len(calls) > stop_after:
                    raise _Interrupted
                return pixel_values(scene)

            patch.setattr("prumerge_fast.demo.train.pixel_values", render)
            with pytest.raises(_Interrupted):
                train(tmp_path / "parts", SHORT)
    resumed = train(tmp_path / "parts", SHORT)
    for (name, expected), got in zip(
        whole.state_dict().items(), resumed.state_dict().values(), strict=True
    ):
        assert torch.equal(expected, got), name
    assert (tmp_path / "parts" / "tiny-llava" / "model.safetensors").is_file()


def test_run_with_other_settings_is_refused(tmp_path):
    train(tmp_path, SHORT.scaled(0.1))
    with pytest.raises(
        ValueError, match="output: expected a new folder or a run with the settings"
    ):
        train(tmp_path, SHORT)


BAD = {
    "--scale: expected a finite number above 0, got 0.0": ["--scale", "0"],
    "--scale: expected a finite number above 0, got inf": ["--scale", "inf"],
    "--seed: expected a whole number from 0 to 2**32 - 1, got -1": ["--seed", "-1"],
    "output: expected a folder to write to, got": ["--output", str(Path(__file__) / "run")],
    "whose checkpoint.pt cannot be read": [],
}


@pytest.mark.parametrize("message", BAD)
def test_bad_input(message, tmp_path, monkeypatch, capsys):
    (tmp_path / "checkpoint.pt").write_text("half a checkp")
    monkeypatch.setattr(sys, "argv", ["train", "--output", str(tmp_path), *BAD[message]])
    with pytest.raises(SystemExit) as stopped:
        train_module.main()
    assert stopped.value.code == 2
    assert message in capsys.readouterr().err


def test_interrupted_command(tmp_path, monkeypatch, capsys):
    def interrupted(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(train_module, "_teach", interrupted)
    monkeypatch.setattr(sys, "argv", ["train", "--output", str(tmp_path)])
    with pytest.raises(SystemExit) as stopped:
        train_module.main()
    assert stopped.value.code == 130
    assert "the same command goes on" in capsys.readouterr().err


def test_stages_change_only_their_part(tmp_path):
    config = TrainConfig(
        tower=Stage(1, 2, 0.0),
        align=Stage(1, 2, 1e-3),
        instruct=Stage(1, 2, 1e-3),
        answer=Stage(1, 2, 1e-3),
        workers=0,
    )
    trained = train(tmp_path, config).state_dict()
    torch.manual_seed(config.seed)
    start = LlavaForConditionalGeneration(
        recipe.build_config(recipe.build_tokenizer())
    ).state_dict()
    for name, tensor in start.items():
        assert torch.equal(tensor, trained[name]) == ("vision_tower" in name), name


def test_log_is_json_lines(tmp_path):
    train(tmp_path, TrainConfig(Stage(20, 1, 1e-3), *[Stage(1, 1, 1e-3)] * 3, workers=0))
    (row,) = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert row["stage"] == "tower"
    assert row["step"] == 20
    assert np.isfinite(row["set"])
