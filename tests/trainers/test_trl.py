"""One step of TRL's trainers on the demo model: policies and losses see the pruned prompts alone.

TRL computes losses through the inner model, by the caller's labels. Run in an environment with
`trl` and `datasets`, which `.ci/run` makes.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("trl")
import datasets
import torch
from peft import LoraConfig
from recipes import run
from tiny_models import EVERYTHING, lengths_seen
from transformers import AutoProcessor
from trl import DPOConfig, DPOTrainer, GRPOConfig, GRPOTrainer, SFTConfig, SFTTrainer

import prumerge_fast
from prumerge_fast.demo import MODEL_DIR, load_demo
from prumerge_fast.demo.scenes import benchmark
from prumerge_fast.patching.patch import is_patched, patch, unpatch

KEEP = 5
SCENES = benchmark("test", 4)
PATCHES = 196
TEXT = datasets.Value("string")
MESSAGES = datasets.List({"role": TEXT, "content": TEXT})
LORA = LoraConfig(r=4, target_modules=r".*language_model.*\.q_proj", task_type="CAUSAL_LM")


def said(role: str, text: str) -> list[dict[str, str]]:
    return [{"role": role, "content": text}]


def rows(**columns: Any) -> datasets.Dataset:
    """A picture each, and of every scene and question what `columns` make of the question."""
    features = datasets.Features(
        {"images": datasets.List(datasets.Image()), **dict.fromkeys(columns, MESSAGES)}
    )
    return datasets.Dataset.from_list(
        [
            {
                "images": [scene.render()],
                **{name: make(question) for name, make in columns.items()},
            }
            for scene, question in SCENES
        ],
        features=features,
    )


QUESTION = {"prompt": lambda question: said("user", question.text)}
ANSWERED = {
    "messages": lambda question: said("user", question.text) + said("assistant", question.answer)
}
PREFERRED = {
    **QUESTION,
    "chosen": lambda question: said("assistant", question.answer),
    "rejected": lambda question: said("assistant", "no red blue"),
}


def options(folder: Path, **more: Any) -> dict[str, Any]:
    return {
        "output_dir": str(folder),
        "max_steps": 1,
        "per_device_train_batch_size": 2,
        "learning_rate": 1e-3,
        "use_cpu": True,
        "bf16": False,
        "report_to": [],
        "save_strategy": "no",
        "logging_steps": 1,
        "shuffle_dataset": False,
        **more,
    }


def sft(model: Any, folder: Path, **more: Any) -> Any:
    arguments = SFTConfig(**options(folder, max_length=None, **more))
    return SFTTrainer(
        model, arguments, train_dataset=rows(**ANSWERED), processing_class=processor()
    )


def dpo(model: Any, folder: Path, **more: Any) -> Any:
    given = options(folder, max_length=None, **more)
    del given["shuffle_dataset"]
    return DPOTrainer(
        model,
        args=DPOConfig(**given),
        train_dataset=rows(**PREFERRED),
        processing_class=processor(),
        peft_config=LORA,
    )


def grpo(model: Any, folder: Path, **more: Any) -> Any:
    # Warm enough that the two answers to a question differ; else their advantages cancel out.
    arguments = GRPOConfig(
        **options(folder, num_generations=2, max_completion_length=4, temperature=9.0, **more)
    )
    return GRPOTrainer(
        model,
        reward_funcs=lambda completions, **_: [float(i % 2) for i in range(len(completions))],
        args=arguments,
        train_dataset=rows(**QUESTION),
        processing_class=processor(),
        peft_config=LORA,
    )


TRAINERS = {"SFT": sft, "DPO": dpo, "GRPO": grpo}


def processor() -> Any:
    return AutoProcessor.from_pretrained(MODEL_DIR)


def step(trainer: Any) -> dict[str, float]:
    """What TRL logs of one step: at the first, losses of DPO and GRPO say nothing by themselves."""
    torch.manual_seed(0)
    trainer.train()
    entry = next(entry for entry in trainer.state.log_history if "grad_norm" in entry)
    return {name: float(value) for name, value in entry.items() if "time" not in name}


@pytest.mark.parametrize("name", TRAINERS)
def test_the_language_model_sees_pruned_prompts_alone(name: str, tmp_path: Path) -> None:
    model = patch(load_demo()[0], keep=KEEP)
    seen = lengths_seen(model)
    trainer = TRAINERS[name](model, tmp_path)
    before = {n: p.detach().clone() for n, p in model.named_parameters() if p.requires_grad}
    step(trainer)
    assert is_patched(trainer.model)
    assert set(model.prumerge.last_lengths) == {KEEP + 1}
    assert seen
    assert max(seen) < PATCHES
    assert any(not torch.equal(p, before[n]) for n, p in model.named_parameters() if n in before)
    unpatch(model)
    assert not is_patched(trainer.model)


@pytest.mark.parametrize("name", TRAINERS)
def test_losses_with_everything_kept_are_the_plain_models(name: str, tmp_path: Path) -> None:
    expected = step(TRAINERS[name](load_demo()[0], tmp_path / "plain"))
    assert expected["grad_norm"] > 1e-4
    model = patch(load_demo()[0], **EVERYTHING)
    seen = lengths_seen(model)
    actual = step(TRAINERS[name](model, tmp_path / "patched"))
    assert actual == pytest.approx(expected, rel=1e-3, abs=1e-6)
    assert max(seen) > PATCHES


def test_the_recipe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    names = {"prumerge_fast": prumerge_fast, "model": load_demo()[0], "processor": processor()}
    changed = {'"runs/sft", max_length': '"runs/sft", max_steps=1, use_cpu=True, max_length'}
    run({**names, "data": rows(**ANSWERED)}, "trl", **changed)
    assert set(names["model"].prumerge.last_lengths) == {65}
