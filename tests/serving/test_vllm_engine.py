"""The plugin inside vLLM's engine: answers as the patched transformers model gives them."""

from __future__ import annotations

import json
import os
import pickle
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from engines import Prompt, engine, expected, logprobs, model_of, said, saved_demo, vllm

from prumerge_fast.demo import MODEL_DIR
from prumerge_fast.demo.items import items_from_demo
from prumerge_fast.reduction.config import PruMergeConfig
from prumerge_fast.serving.vllm import tower
from prumerge_fast.serving.vllm.llava import PruMergeLlava

PATCHES = 196
PROMPT = "USER: {}{} ASSISTANT:"


@pytest.fixture(scope="module")
def prompts() -> list[Prompt]:
    """50 questions of one image each, two of several, and text alone."""
    items = items_from_demo(52)
    asked: list[Prompt] = [
        (PROMPT.format("<image>\n", item.text), [item.load()]) for item in items[:50]
    ]
    images = [item.load() for item in items[49:]]
    asked.append((PROMPT.format("<image>\n" * 2, items[50].text), images[:2]))
    asked.append((PROMPT.format("<image>\n" * 3, items[51].text), images))
    asked.append((PROMPT.format("", items[0].text), []))
    return asked


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("variant", ["prumerge", "prumerge+"])
def test_answers_are_those_of_transformers(prompts: list[Prompt], variant: str, dtype: str) -> None:
    """Compiled, prefilled in chunks of 16 tokens, and again from the prefix cache."""
    setting = {"variant": variant, "keep": 32}
    options = {
        "dtype": dtype,
        "enforce_eager": False,
        "enable_prefix_caching": True,
        "max_num_batched_tokens": 16,
        "max_num_seqs": 16,
    }
    with engine(MODEL_DIR, setting, **options) as llm:
        found = said(llm, prompts)
        again = said(llm, prompts)
    answers = expected(MODEL_DIR, prompts, PruMergeConfig(**setting), dtype)
    assert [answer for answer, _ in found] == answers
    assert [answer for answer, _ in again] == answers
    words = [len(text.replace("<image>", "").split()) for text, _ in prompts]
    for (_, tokens), (_, images), least in zip(found, prompts, words, strict=True):
        assert 33 * len(images) + least <= tokens < 33 * (len(images) + 1)


def test_without_the_setting_it_is_plain_vllm(prompts: list[Prompt], tmp_path: Path) -> None:
    """Answers, lengths of prompts, and how probable the answers are."""
    asked = [*prompts[:8], prompts[50], prompts[52]]
    (tmp_path / "asked").write_bytes(pickle.dumps((MODEL_DIR, asked)))
    code = (
        "import json, pickle, sys; from engines import engine, logprobs\n"
        "model, asked = pickle.load(open(sys.argv[1], 'rb'))\n"
        "with engine(model) as llm:\n"
        "    print('FOUND', json.dumps(logprobs(llm, asked)))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path / "asked")],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env={**os.environ, "VLLM_PLUGINS": "", "PYTHONPATH": str(Path(__file__).parent)},
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    (plain,) = (line[6:] for line in done.stdout.splitlines() if line.startswith("FOUND "))
    with engine(MODEL_DIR) as llm:
        assert isinstance(model_of(llm), PruMergeLlava)
        found = logprobs(llm, asked)
    assert found == json.loads(plain)
    assert found[0][1] > PATCHES


SHAPES = [(168, 168), (500, 160), (160, 500), (168, 336), (700, 90), (90, 700), (333, 401)]


@pytest.fixture(scope="module")
def llava_next(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return saved_demo(tmp_path_factory.mktemp("models") / "next", "LlavaNext")


@pytest.mark.parametrize(
    "setting",
    [
        {"keep": 32},
        {"variant": "prumerge+", "keep": 0.1},
        {"keep": 40, "supplement": False},
        {"keep": 32, "scores": "received"},
        {"keep": 32, "heads": "separate"},
    ],
)
def test_llava_next_of_many_shapes(
    llava_next: Path, prompts: list[Prompt], setting: dict[str, Any]
) -> None:
    scenes = [images[0] for _, images in prompts[: len(SHAPES)]]
    pictures = [scene.resize(shape) for scene, shape in zip(scenes, SHAPES, strict=True)]
    asked: list[Prompt] = [(PROMPT.format("<image>\n", "What is it?"), [one]) for one in pictures]
    asked.append((PROMPT.format("<image>\n" * 3, "And these?"), pictures[1:4]))
    asked.append((PROMPT.format("", "What is it?"), []))
    with engine(llava_next, setting, max_model_len=2048) as llm:
        found = said(llm, asked)
    answers = expected(llava_next, asked, PruMergeConfig(**setting))
    assert [answer for answer, _ in found] == answers
    assert len(set(answers)) > 3  # they depend on the picture
    assert len({tokens for _, tokens in found}) > 3


def test_models_that_transformers_5_saved(prompts: list[Prompt], tmp_path: Path) -> None:
    folder = saved_demo(tmp_path / "saved")
    with safetensors.safe_open(folder / "model.safetensors", "pt") as file:
        assert not any("vision_model" in name for name in file.keys())  # noqa: SIM118
    with engine(folder, {"keep": 32}) as llm:
        found = said(llm, prompts[:6])
    assert [answer for answer, _ in found] == expected(
        MODEL_DIR, prompts[:6], PruMergeConfig(keep=32)
    )
    with engine(folder) as llm:
        found = said(llm, prompts[:6])
    assert [answer for answer, _ in found] == expected(MODEL_DIR, prompts[:6], None)


def test_the_tower_sees_as_many_images_as_without_pruning(
    prompts: list[Prompt], monkeypatch: pytest.MonkeyPatch
) -> None:
    """vLLM's budget counts the 33 rows of an image that come out, not the 197 that go in."""
    seen = []
    read = tower.PrunedModel.read
    monkeypatch.setattr(
        tower.PrunedModel,
        "read",
        lambda self, pixels: seen.append(len(pixels)) or read(self, pixels),
    )
    options = {"max_num_batched_tokens": 1024, "max_num_seqs": 64}
    with engine(MODEL_DIR, {"keep": 32}, **options) as llm:
        found = said(llm, prompts[:30])
    assert max(seen) == 1024 // (1 + PATCHES) == 5
    assert sum(seen) == 30
    assert [answer for answer, _ in found] == expected(
        MODEL_DIR, prompts[:30], PruMergeConfig(keep=32)
    )


def test_says_once_what_runs(tmp_path: Path) -> None:
    """In a process of its own: vLLM says a line once in each."""
    code = (
        "from engines import MODEL_DIR, engine\n"
        "with engine(MODEL_DIR, {'variant': 'prumerge+', 'keep': 64}):\n"
        "    pass"
    )
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parent)}
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env=environment,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    line = "prumerge: 196 -> 65 tokens an image, PruMergeConfig(variant='prumerge+', keep=64,"
    assert (done.stdout + done.stderr).count(line) == 1


def test_the_setting_is_part_of_what_vllm_remembers_images_by(llava_next: Path) -> None:
    """Caches that engines share must not mix their images."""
    keys = set()
    settings = [None, {"keep": 32}, {"keep": 33}, {"keep": 32, "merge": "average"}]
    for folder in (MODEL_DIR, llava_next):
        for setting in settings:
            overrides = {} if setting is None else {"prumerge": setting}
            model = vllm.config.ModelConfig(str(folder), hf_overrides=overrides)
            processor = vllm.multimodal.MULTIMODAL_REGISTRY.create_processor(model)
            keys.add(processor.info.model_id)
    assert len(keys) == 2 * len(settings)


BAD = {
    "unknown": ({"kep": 3}, "PruMergeConfig has no option 'kep'"),
    "adaptive": ({"variant": "prumerge+"}, "keep: expected a number .*PruMergeEncoder"),
    "too many": ({"keep": 197}, "keep: expected at most N = 196"),
    "variant": ({"variant": "prune", "keep": 3}, "variant: expected 'prumerge' or 'prumerge\\+'"),
    "type": ({"keep": "32"}, "keep: expected None, an int .* got '32'"),
    "no options": (32, "expected options such as .* got 32"),
}


@pytest.mark.parametrize(("setting", "says"), BAD.values(), ids=BAD)
def test_bad_settings_end_at_start(setting: Any, says: str) -> None:
    with (
        pytest.raises(ValueError, match=r"hf_overrides\['prumerge'\]: " + says),
        engine(MODEL_DIR, setting),
    ):
        pass


REFUSED = {
    "raster": ("LlavaNext", {}, {}, {"order": "raster"}, "order: expected 'attention'"),
    "full": ("Llava", {"vision_feature_select_strategy": "full"}, {}, {}, "got 'full'"),
    "last layer": ("Llava", {"vision_feature_layer": -1}, {}, {}, "no layer reads the output"),
    "layers": ("Llava", {"vision_feature_layer": [-2, -3]}, {}, {}, "expected one int"),
    "LoRA": (
        "Llava",
        {},
        {"enable_lora": True, "enable_tower_connector_lora": True},
        {},
        "enable_tower_connector_lora: expected False",
    ),
    "stages": (
        "Llava",
        {},
        {"pipeline_parallel_size": 2, "distributed_executor_backend": "mp"},
        {},
        "pipeline_parallel_size",
    ),
    "transformers": (
        "Llava",
        {},
        {"model_impl": "transformers"},
        {},
        "run by vLLM itself .* got TransformersMultiModalForCausalLM",
    ),
}


@pytest.mark.parametrize(
    ("family", "changes", "options", "more", "says"), REFUSED.values(), ids=REFUSED
)
def test_what_cannot_run_is_refused_at_start(
    tmp_path: Path, family: str, changes: Any, options: Any, more: Any, says: str
) -> None:
    folder = saved_demo(tmp_path / "model", family)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | changes))
    with (
        pytest.raises(ValueError, match=says),
        engine(folder, {"keep": 32, **more}, **options),
    ):
        pass


def test_other_models_refuse_the_setting(tmp_path: Path) -> None:
    config = json.loads((MODEL_DIR / "config.json").read_text())["text_config"]
    config["architectures"] = ["LlamaForCausalLM"]
    folder = tmp_path / "llama"
    shutil.copytree(MODEL_DIR, folder)
    (folder / "config.json").write_text(json.dumps(config))
    with (
        pytest.raises(ValueError, match=r"LlavaForConditionalGeneration, .* got LlamaForCausalLM"),
        engine(folder, {"keep": 32}, limit_mm_per_prompt=None),
    ):
        pass


def test_checkpoints_without_the_reading_layer_are_refused(tmp_path: Path) -> None:
    folder = saved_demo(tmp_path / "model")
    file = folder / "model.safetensors"
    weights = safetensors.torch.load_file(file)
    left = {
        name: tensor
        for name, tensor in weights.items()
        if "vision_tower.encoder.layers.4." not in name
    }
    safetensors.torch.save_file(left, file, {"format": "pt"})
    with (
        pytest.raises(ValueError, match=r"the layer that reads the features .*q_proj"),
        engine(folder, {"keep": 32}),
    ):
        pass


def test_weights_may_come_one_by_one() -> None:
    """As trainers bring them to an engine that runs."""
    with engine(MODEL_DIR, {"keep": 32}) as llm:
        model = model_of(llm)
        for name in ("model.norm", "model.layers.0.input_layernorm"):
            weight = model.language_model.get_submodule(name).weight.detach().clone()
            assert model.load_weights([(f"language_model.{name}.weight", weight)])
        prefix = "vision_tower.vision_model.encoder.layers"
        for name in (f"{prefix}.0.layer_norm1", f"{prefix}.4.layer_norm1"):
            weight = torch.full_like(model.vision_tower.prumerge_reader.layer_norm1.weight, 2)
            (loaded,) = model.load_weights([(f"{name}.weight", weight)])
            assert model.get_parameter(loaded).eq(2).all()
        assert "prumerge_reader" in loaded
