"""The weights that ship: loaded by plain transformers, small, and right about scenes never seen."""

import json

import pytest
import torch
from transformers import AutoProcessor, LlavaForConditionalGeneration

import prumerge_fast
from prumerge_fast.demo import MODEL_DIR, PROMPT, load_demo
from prumerge_fast.demo.scenes import benchmark


@pytest.fixture(scope="module")
def demo():
    return load_demo()


def _accuracy(model, processor, items):
    """Share of right answers and by kind, through the model's own `generate`."""
    right = {}
    for start in range(0, len(items), 25):
        batch = items[start : start + 25]
        inputs = processor(
            images=[scene.render() for scene, _ in batch],
            text=[PROMPT.format(question=question.text) for _, question in batch],
            padding=True,
            return_tensors="pt",
        )
        ids = model.generate(**inputs, max_new_tokens=4, do_sample=False)
        answers = processor.batch_decode(ids[:, inputs["input_ids"].shape[1] :], True)
        for (_, question), answer in zip(batch, answers, strict=True):
            right.setdefault(question.kind, []).append(answer.strip() == question.answer)
    every = [hit for hits in right.values() for hit in hits]
    return sum(every) / len(every), {kind: sum(hits) / len(hits) for kind, hits in right.items()}


def test_plain_transformers_loads_it(demo):
    _, info = LlavaForConditionalGeneration.from_pretrained(MODEL_DIR, output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    assert not info["mismatched_keys"]
    assert type(AutoProcessor.from_pretrained(MODEL_DIR)).__name__ == "LlavaProcessor"
    assert demo[0].dtype == torch.float32
    assert load_demo(torch.bfloat16)[0].dtype == torch.bfloat16


def test_it_is_what_prumerge_needs(demo):
    config = demo[0].config
    vision, text = config.vision_config, config.text_config
    assert config.vision_feature_layer == -2
    assert (vision.image_size // vision.patch_size) ** 2 >= 196
    assert vision.hidden_size % 64 == vision.intermediate_size % 64 == 0
    assert text.hidden_size % 64 == text.intermediate_size % 64 == 0
    assert sum(path.stat().st_size for path in MODEL_DIR.iterdir()) <= 10 * 2**20


@torch.no_grad()
def test_accuracy_on_scenes_never_seen(demo):
    """A sample of what `bench/results/demo-compare.json` measures on 1,000 questions."""
    overall, by_kind = _accuracy(*demo, benchmark("test", 200))
    assert overall >= 0.85
    assert by_kind["existence"] >= 0.9


@torch.no_grad()
def test_answers_need_the_picture(demo):
    model, processor = demo
    items = benchmark("test", 100)
    questions = [question for _, question in items]
    scenes = [scene for scene, _ in items]
    shuffled = list(zip(scenes[7:] + scenes[:7], questions, strict=True))
    overall, _ = _accuracy(model, processor, shuffled)
    assert overall < 0.6


@torch.no_grad()
@pytest.mark.parametrize(("variant", "bar"), [("prumerge", 0.5), ("prumerge+", 0.8)])
def test_pruned_model_still_answers(demo, variant, bar):
    model, processor = demo
    items = benchmark("test", 100)
    with prumerge_fast.patched(model, variant=variant):
        overall, _ = _accuracy(model, processor, items)
        assert max(model.prumerge.last_lengths) <= 197
    assert overall >= bar


def test_config_is_free_of_local_paths():
    for path in MODEL_DIR.glob("*.json"):
        if path.name != "tokenizer.json":
            assert "_name_or_path" not in json.loads(path.read_text()), path.name
