"""Fine-tunes the demo model with LoRA, once as it is and once under PruMerge, and compares.

    python -m prumerge_fast.demo.finetune --output runs/finetune

The four rows of the result are LLaVA and LLaVA-PruMerge as they ship, and both after one epoch of
LoRA (Hu et al. 2021, arXiv 2106.09685) on scenes that no training has seen: the one trained on all
visual tokens, the other on the pruned and merged ones, both on the same questions in the same
order. This is what anyone does who fine-tunes a LLaVA with PEFT and the Trainer of transformers;
`patch` is the only line that PruMerge adds.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor
from torch.utils.data import Dataset
from transformers import LlavaForConditionalGeneration, Trainer, TrainingArguments, set_seed

from prumerge_fast.demo import IMAGE_TOKEN, MODEL_DIR, recipe
from prumerge_fast.demo.conversations import IGNORE, Conversations
from prumerge_fast.demo.items import items_from_demo
from prumerge_fast.demo.scenes import make_scene
from prumerge_fast.demo.train import TrainConfig, pixel_values
from prumerge_fast.errors import InputError
from prumerge_fast.harness.models import Loaded, load, resolve_device
from prumerge_fast.harness.provenance import provenance
from prumerge_fast.harness.questions import accuracy
from prumerge_fast.patching.patch import patch
from prumerge_fast.reduction.config import PruMergeConfig

LANGUAGE = r"model\.(language_model\..*\.\w+_proj|multi_modal_projector\.linear_[12])"
TOWER = r"model\.vision_tower\..*\.self_attn\.\w+_proj"


@dataclass(frozen=True)
class FinetuneConfig:
    """One epoch of LoRA."""

    variant: Literal["prumerge", "prumerge+"] = "prumerge"
    questions: int = 3600
    batch_size: int = 24
    learning_rate: float = 1e-3
    rank: int = 32
    tower: bool = False  # LoRA on the vision tower's attention too
    seed: int = 0
    save_every: int = 50  # steps


class Questions(Dataset[dict[str, Tensor]]):
    """One question about each of `count` scenes of the training split, from behind the demo's."""

    def __init__(self, tokenizer: Any, count: int) -> None:
        stages = TrainConfig()
        lessons = (stages.tower, stages.align, stages.instruct, stages.answer)
        self.first = sum(stage.steps * stage.batch_size for stage in lessons)
        self.count = count
        self.conversations = Conversations(tokenizer, turns=1)
        image = [tokenizer.convert_tokens_to_ids(IMAGE_TOKEN)] * recipe.GRID**2
        self.prompt = [*self.conversations.prefix, *image]
        self.padding = tokenizer.pad_token_id

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        scene = make_scene("train", self.first + index)
        questions = scene.questions(variant=1)
        question = questions[index % len(questions)]
        ids, labels = self.conversations.turn(question.text, question.answer)
        return {
            "input_ids": torch.tensor(self.prompt + ids),  # [L]
            "labels": torch.tensor([IGNORE] * len(self.prompt) + labels),  # [L]
            "pixel_values": pixel_values(scene),  # [3, H, W]
        }

    def collate(self, rows: Sequence[dict[str, Tensor]]) -> dict[str, Tensor]:
        """Rows of unequal length as one batch, padded on the right."""

        def padded(name: str, value: int) -> Tensor:
            columns = [row[name] for row in rows]
            return torch.nn.utils.rnn.pad_sequence(columns, True, value)  # [B, L]

        input_ids = padded("input_ids", self.padding)
        return {
            "input_ids": input_ids,
            "attention_mask": (input_ids != self.padding).long(),
            "labels": padded("labels", IGNORE),
            "pixel_values": torch.stack([row["pixel_values"] for row in rows]),
        }


def add_lora(model: LlavaForConditionalGeneration, *, rank: int, tower: bool) -> PeftModel:
    """Wraps a LLaVA with LoRA on its language model and projector, and the tower's attention."""
    targets = f"{LANGUAGE}|{TOWER}" if tower else LANGUAGE
    lora = LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=targets)
    return get_peft_model(model, lora)


def finetune(
    model: PeftModel, tokenizer: Any, output: Path, config: FinetuneConfig
) -> dict[str, float]:
    """Trains for one epoch, or what is left of it, and saves the adapter as `output`/adapter.

    Returns:
        `steps` that this call took, and the `seconds` they took.
    """
    data = Questions(tokenizer, config.questions)
    arguments = TrainingArguments(
        output_dir=str(output),
        per_device_train_batch_size=config.batch_size,
        num_train_epochs=1,
        learning_rate=config.learning_rate,
        lr_scheduler_type="cosine",
        warmup_steps=20,
        max_grad_norm=1.0,
        logging_steps=10,
        save_steps=config.save_every,
        save_total_limit=1,
        remove_unused_columns=False,  # what the images come in
        dataloader_pin_memory=False,
        disable_tqdm=False,
        report_to=[],
        seed=config.seed,
        bf16=True,
        use_cpu=not torch.cuda.is_available(),
    )
    trainer = Trainer(model, arguments, data_collator=data.collate, train_dataset=data)
    before = _last_step(output)
    checkpoint = str(output / f"checkpoint-{before}") if before else None
    done = trainer.train(resume_from_checkpoint=checkpoint)
    model.save_pretrained(str(output / "adapter"))
    return {"steps": done.global_step - before, "seconds": done.metrics["train_runtime"]}


def _last_step(output: Path) -> int:
    """The step of the last whole checkpoint, 0 for none. `Trainer` writes its state last."""
    states = output.glob("checkpoint-*/trainer_state.json")
    return max((int(state.parent.name.rpartition("-")[2]) for state in states), default=0)


def evaluate(loaded: Loaded, config: PruMergeConfig | None, count: int) -> dict[str, Any]:
    """Accuracy, overall and by kind, on `count` questions about test scenes."""
    row = accuracy(loaded, config, items_from_demo(count), batch_size=25)
    return {name: row[name] for name in ("visual_tokens", "accuracy", "accuracy_by_category")}


def run(output: Path, config: FinetuneConfig, count: int) -> dict[str, dict[str, Any]]:
    """The four rows; a run that was interrupted goes on where it stopped.

    Raises:
        InputError: `output` holds a run with other settings, or cannot be written.
    """
    _open(output, json.dumps(asdict(config)))
    pruned = PruMergeConfig(variant=config.variant)
    names = {"LLaVA": None, f"LLaVA-{'PruMerge' + config.variant.removeprefix('prumerge')}": pruned}
    rows: dict[str, dict[str, Any]] = {}
    for name, policy in names.items():
        rows[name] = evaluate(_demo(), policy, count)
    for name, policy in names.items():
        set_seed(config.seed)
        loaded = _demo()
        model = add_lora(loaded.model, rank=config.rank, tower=config.tower)
        if policy is not None:
            patch(model, policy)
        training = finetune(model, loaded.processor.tokenizer, output / name.lower(), config)
        model.eval()
        rows[f"{name} fine-tuned"] = {**evaluate(loaded, policy, count), "training": training}
    return rows


def _open(output: Path, settings: str) -> None:
    """Makes the folder of a run with these settings, or finds it as it was left."""
    path = output / "settings.json"
    try:
        output.mkdir(parents=True, exist_ok=True)
        if not path.exists():
            path.write_text(settings + "\n")
        found = path.read_text().strip()
    except OSError as error:
        raise InputError(f"output: expected a folder to write to, got {output} ({error})") from None
    if found != settings:
        raise InputError(
            f"output: expected a new folder or a run with the settings {settings}, got {output}, "
            f"a run with {found}"
        )


def _demo() -> Loaded:
    return load(MODEL_DIR, dtype="auto", device="auto")


def main() -> None:
    defaults = FinetuneConfig()
    parser = argparse.ArgumentParser(
        description="LoRA on the demo model with and without PruMerge; resumes when interrupted."
    )
    parser.add_argument("--output", type=Path, required=True, help="folder of the run")
    parser.add_argument("--variant", choices=["prumerge", "prumerge+"], default=defaults.variant)
    parser.add_argument("--questions", type=int, default=defaults.questions, help="in the epoch")
    parser.add_argument("--tower", action="store_true", help="LoRA on the tower's attention too")
    parser.add_argument("--seed", type=int, default=defaults.seed)
    parser.add_argument("--count", type=int, default=1000, help="test questions of each row")
    arguments = parser.parse_args()
    for name in ("questions", "count"):
        if getattr(arguments, name) < 1:
            parser.error(f"--{name}: expected a whole number >= 1, got {getattr(arguments, name)}")
    if not 0 <= arguments.seed < 2**32:
        parser.error(f"--seed: expected a whole number from 0 to 2**32 - 1, got {arguments.seed}")
    config = FinetuneConfig(
        variant=arguments.variant,
        questions=arguments.questions,
        tower=arguments.tower,
        seed=arguments.seed,
    )
    try:
        rows = run(arguments.output, config, arguments.count)
    except InputError as error:
        parser.error(str(error))
    except KeyboardInterrupt:
        parser.exit(130, "interrupted; the same command goes on from the last checkpoint\n")
    result = {
        "settings": asdict(config),
        "questions": arguments.count,
        "results": rows,
        **provenance([], resolve_device("auto")),
        "command": ["python", "-m", "prumerge_fast.demo.finetune", *sys.argv[1:]],
    }
    path = arguments.output / "result.json"
    path.write_text(json.dumps(result, indent=2) + "\n")
    print(path)


if __name__ == "__main__":
    main()
