"""Trains the demo model: LLaVA's recipe (Liu et al. 2023, arXiv 2304.08485) in small.

Run it with `python -m prumerge_fast.demo.train --output runs/demo`. The stages are LLaVA's, with
one more for short answers:

1. *Tower.* A CLIP-style vision tower learns what is in the picture. Its class token predicts the
   set of objects (how many there are of each colour and shape, and where); its patch tokens at
   LLaVA's feature layer predict what they show (token labelling, Jiang et al. 2021,
   arXiv 2104.10858). So the class attention of the last layer has a reason to look at objects.
2. *Alignment.* The projector and the language model learn to describe pictures; tower frozen.
   (LLaVA trains the projector alone here, but its language model is pre-trained, ours is not.)
3. *Instruction tuning.* The same weights learn to answer questions; tower frozen. Positions of the
   image are randomised and some tokens scaled down (see `conversations`).
4. *Answers.* The same with questions alone, so that the model stops behind its answer.

No stage knows about PruMerge. Every step draws scenes never drawn before, so nothing is memorised
and an interrupted run goes on from its checkpoint with the scenes that come next.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm
from transformers import LlavaForConditionalGeneration
from transformers.image_utils import OPENAI_CLIP_MEAN, OPENAI_CLIP_STD

from prumerge_fast.demo import recipe
from prumerge_fast.demo.conversations import (
    Conversations,
    Turn,
    conversation_loss,
    token_scales,
)
from prumerge_fast.demo.scenes import Scene, make_scene
from prumerge_fast.demo.set_prediction import SetPrediction
from prumerge_fast.errors import InputError

LOG_EVERY = 20  # steps


@dataclass(frozen=True)
class Stage:
    """How long and how fast one stage learns."""

    steps: int
    batch_size: int
    learning_rate: float
    warmup: int = 100

    def rate(self, step: int) -> float:
        """The learning rate of a step: linear warm-up, then a cosine down to 2 %."""
        if step < self.warmup:
            return self.learning_rate * (step + 1) / self.warmup
        progress = (step - self.warmup) / max(1, self.steps - self.warmup)
        return self.learning_rate * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * progress)))


@dataclass(frozen=True)
class TrainConfig:
    """The whole run; the defaults are the recipe of the weights that ship (see their card)."""

    tower: Stage = field(default_factory=lambda: Stage(3200, 32, 1e-3))
    align: Stage = field(default_factory=lambda: Stage(400, 24, 1e-3))
    instruct: Stage = field(default_factory=lambda: Stage(4600, 24, 1e-3))
    answer: Stage = field(default_factory=lambda: Stage(900, 24, 4e-4))
    turns: int = 10  # questions asked about each scene in stages 3 and 4
    seed: int = 0
    save_every: int = 200
    workers: int = 1

    def scaled(self, factor: float) -> TrainConfig:
        """The same run with `factor` times as many steps in every stage."""

        def scale(stage: Stage) -> Stage:
            return replace(stage, steps=max(1, round(stage.steps * factor)))

        return replace(
            self,
            tower=scale(self.tower),
            align=scale(self.align),
            instruct=scale(self.instruct),
            answer=scale(self.answer),
        )


# Data


class Pictures(Dataset[tuple[Tensor, Scene]]):
    """Scenes `first` to `first + count - 1` of the training split, with their pixel values."""

    def __init__(self, first: int, count: int) -> None:
        self.first, self.count = first, count

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> tuple[Tensor, Scene]:
        scene = make_scene("train", self.first + index)
        return pixel_values(scene), scene


def pixel_values(scene: Scene) -> Tensor:
    """What the model's image processor makes of the scene at the tower's resolution: [3, H, W]."""
    pixels = np.asarray(scene.render(recipe.IMAGE_SIZE), dtype=np.float32) / 255
    pixels = (pixels - OPENAI_CLIP_MEAN) / OPENAI_CLIP_STD
    return torch.from_numpy(pixels.transpose(2, 0, 1).astype(np.float32))


def _collate(items: list[tuple[Tensor, Scene]]) -> tuple[Tensor, list[Scene]]:
    return torch.stack([pixels for pixels, _ in items]), [scene for _, scene in items]


# The run


@dataclass(frozen=True)
class Lesson:
    """A stage with what it trains: `loss(pixels, scenes)` returns the losses to add up."""

    name: str
    stage: Stage
    parameters: list[nn.Parameter]
    loss: Callable[[Tensor, list[Scene]], dict[str, Tensor]]


class Run:
    """A training run in a folder: its models, its checkpoint and its log."""

    def __init__(self, output: Path, config: TrainConfig) -> None:
        try:
            output.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise InputError(
                f"output: expected a folder to write to, got {output} ({error})"
            ) from None
        torch.manual_seed(config.seed)
        self.output, self.config = output, config
        self.tokenizer = recipe.build_tokenizer()
        self.model = LlavaForConditionalGeneration(recipe.build_config(self.tokenizer))
        self.heads = SetPrediction(recipe.VISION_WIDTH)
        self.conversations = Conversations(self.tokenizer, config.turns)
        self.checkpoint = output / "checkpoint.pt"
        self.log = output / "log.jsonl"

    def lessons(self) -> list[Lesson]:
        tower = [*self.model.model.vision_tower.parameters(), *self.heads.parameters()]
        language = [p for name, p in self.model.named_parameters() if "vision_tower" not in name]
        talk = self.conversations
        return [
            Lesson("tower", self.config.tower, tower, self._tower_loss),
            Lesson(
                "align", self.config.align, language, partial(self._language_loss, talk.description)
            ),
            Lesson(
                "instruct",
                self.config.instruct,
                language,
                partial(self._language_loss, talk.instructions),
            ),
            Lesson(
                "answer", self.config.answer, language, partial(self._language_loss, talk.questions)
            ),
        ]

    def _tower_loss(self, pixels: Tensor, scenes: list[Scene]) -> dict[str, Tensor]:
        out = self.model.model.vision_tower(pixels, output_hidden_states=True)
        return self.heads(out.hidden_states[recipe.FEATURE_LAYER], out.pooler_output, scenes)

    def _language_loss(
        self, turns: Callable[[Scene], list[Turn]], pixels: Tensor, scenes: list[Scene]
    ) -> dict[str, Tensor]:
        batch = self.conversations.batch(
            [turns(scene) for scene in scenes], [self.conversations.span(scene) for scene in scenes]
        )
        scales = token_scales(scenes)
        prefix = self.conversations.prefix
        return {"answers": conversation_loss(self.model, pixels, prefix, batch, scales)}

    def save(self, stage: int, step: int, optimizer: torch.optim.Optimizer) -> None:
        """Replaces the checkpoint at once: an interruption leaves the old one or the new one."""
        unfinished = self.checkpoint.with_suffix(".partial")
        state = {
            "config": asdict(self.config),
            "stage": stage,
            "step": step,
            "model": self.model.state_dict(),
            "heads": self.heads.state_dict(),
            "optimizer": optimizer.state_dict(),
        }
        torch.save(state, unfinished)
        unfinished.replace(self.checkpoint)

    def resume(self) -> dict[str, Any]:
        """Where the run stands: `stage`, `step`, and `optimizer` once there is a checkpoint."""
        if not self.checkpoint.exists():
            return {"stage": 0, "step": 0}
        try:
            state = torch.load(self.checkpoint, weights_only=True)
        except Exception as error:  # of many kinds, where the file is damaged
            raise InputError(
                f"output: expected a new folder or a run's, got {self.output}, whose "
                f"{self.checkpoint.name} cannot be read ({error})"
            ) from None
        if state["config"] != asdict(self.config):
            raise InputError(
                f"output: expected a new folder or a run with the settings {asdict(self.config)}, "
                f"got {self.output}, a run with {state['config']}"
            )
        self.model.load_state_dict(state["model"])
        self.heads.load_state_dict(state["heads"])
        return state


def train(output: Path, config: TrainConfig | None = None) -> LlavaForConditionalGeneration:
    """Runs all stages, or what is left of them, and writes the model to `output`/tiny-llava.

    Raises:
        InputError: `output` holds a run with other settings, or cannot be written.
        FloatingPointError: A loss is no longer finite.
    """
    run = Run(output, config or TrainConfig())
    state = run.resume()
    first_scene = 0
    for number, lesson in enumerate(run.lessons()):
        if number >= state["stage"]:
            optimizer = torch.optim.AdamW(
                lesson.parameters, lr=lesson.stage.rate(0), betas=(0.9, 0.98), weight_decay=0.02
            )
            start = 0
            if number == state["stage"] and "optimizer" in state:
                optimizer.load_state_dict(state["optimizer"])
                start = state["step"]
            save = partial(run.save, number, optimizer=optimizer)
            _teach(lesson, optimizer, run, start=start, first_scene=first_scene, save=save)
        first_scene += lesson.stage.steps * lesson.stage.batch_size
    recipe.save(run.model, run.tokenizer, output / "tiny-llava")
    return run.model


def _teach(
    lesson: Lesson,
    optimizer: torch.optim.Optimizer,
    run: Run,
    *,
    start: int,
    first_scene: int,
    save: Callable[[int], None],
) -> None:
    """Trains from step `start` to the end of a stage whose scenes begin at `first_scene`."""
    stage = lesson.stage
    pictures = Pictures(
        first_scene + start * stage.batch_size, (stage.steps - start) * stage.batch_size
    )
    batches = DataLoader(
        pictures, stage.batch_size, collate_fn=_collate, num_workers=run.config.workers
    )
    progress = tqdm(batches, lesson.name, stage.steps, initial=start, mininterval=5)
    smooth: dict[str, float] = {}
    begun = time.time()
    for step, (pixels, scenes) in enumerate(progress, start=start + 1):
        for group in optimizer.param_groups:
            group["lr"] = stage.rate(step - 1)
        with torch.autocast("cpu", torch.bfloat16):
            losses = lesson.loss(pixels, scenes)
        loss = torch.stack(list(losses.values())).sum()
        if not torch.isfinite(loss):
            raise FloatingPointError(f"{lesson.name}: the loss is {loss.item()} at step {step}")
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(lesson.parameters, 1.0)
        optimizer.step()
        for key, value in losses.items():
            smooth[key] = 0.95 * smooth.get(key, value.item()) + 0.05 * value.item()
        if step % LOG_EVERY == 0:
            rounded = {key: round(value, 4) for key, value in smooth.items()}
            progress.set_postfix(rounded, refresh=False)
            row = {"stage": lesson.name, "step": step, "seconds": round(time.time() - begun, 1)}
            with run.log.open("a") as log:
                log.write(json.dumps({**row, **rounded}) + "\n")
        if step % run.config.save_every == 0 or step == stage.steps:
            save(step)


def main() -> None:
    parser = argparse.ArgumentParser(
        description="Train the demo LLaVA; an interrupted run resumes."
    )
    parser.add_argument("--output", type=Path, required=True, help="folder of the run")
    parser.add_argument("--scale", type=float, default=1.0, help="multiplies all step counts")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    if not (arguments.scale > 0 and math.isfinite(arguments.scale)):
        parser.error(f"--scale: expected a finite number above 0, got {arguments.scale}")
    if not 0 <= arguments.seed < 2**32:
        parser.error(f"--seed: expected a whole number from 0 to 2**32 - 1, got {arguments.seed}")
    config = TrainConfig(seed=arguments.seed)
    try:
        train(arguments.output, config.scaled(arguments.scale))
    except InputError as error:
        parser.error(str(error))
    except KeyboardInterrupt:
        parser.exit(130, "interrupted; the same command goes on from the last checkpoint\n")


if __name__ == "__main__":
    main()
